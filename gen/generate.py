"""Synthetic data: n generations per prompt of a data set. A killed run resumes without losing or repeating one.

    vllm serve M &
    python -m gen.generate --hf-dataset D --prompt-column problem --model M --temperature 0.6 --num-generations 4 \\
        --output-dir runs/gen [--vllm-server-url http://a:8000/v1,http://b:8000/v1 --field value ...]

The flags are those of open-r1's generate.py and the columns are distilabel's (`gen/store.py`);
`build_distilabel_pipeline` replaces open-r1's function. Run the same command again to generate what is
missing. `gen/client.py` handles failures of servers. `--engine vllm` needs no server (`gen/sampler.py`), and
`--executor ray` sends the requests from the workers of a Ray cluster (`gen/ray.py`).

Not supported, on purpose: pipelines of several steps, structured output, tools, and starting the servers.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict

from gen.client import ServerError, check_servers
from gen.config import GenerateConfig
from gen.requests import Work, longest_prompt
from gen.sampler import EngineSampler
from gen.shards import ShardsFailed, of_shard, start_shards
from gen.store import Store, open_rows
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.files import disk_errors
from sft_core.run.hub import check_dataset_push, push_dataset
from sft_core.run.options import require
from sft_core.run.parent import die_with_parent


@disk_errors()
def main(argv: list[str] | None = None) -> None:
    """Generate with the options in `argv` (default: the command line).

    Exit code: 2 for bad input, 1 for a failure, 130 after Ctrl-C or SIGTERM. A run with failed prompts ends with 0 if
    it has any generation.
    """
    argv = sys.argv[1:] if argv is None else argv
    with distributed.usage_errors():
        (config,) = parse((GenerateConfig,), argv)
        if config.shard:
            die_with_parent()
        run = Run(config, open_rows(config))
    stop = distributed.StopSignal("stopping after the requests in flight")
    lost = ""
    try:
        try:
            run.work(stop, argv)
        except (ServerError, ShardsFailed) as error:
            lost = str(error)
        if config.shard:
            raise SystemExit(130 if stop.requested else 0)
        numbers = run.finish()
        if lost:
            raise SystemExit(f"error: {lost}. The finished generations are kept: run the same command to resume.")
        if not stop.requested:
            push_dataset(run.store.folder / "train.parquet", config.hf_output_dataset, config.private)
    except KeyboardInterrupt:
        print("stopped: run the same command to resume from the last complete file.", file=sys.stderr)
        raise SystemExit(130) from None
    if stop.requested:
        raise SystemExit(130)
    raise SystemExit(0 if numbers["generations"] else 1)


class Run:
    """A checked run that has locked its folder. Creating it raises ValueError for any bad input."""

    def __init__(self, config: GenerateConfig, rows: Dataset) -> None:
        self.config, self.store = config, Store(config, rows)
        self.sampler = None if config.engine == "server" else EngineSampler(config.engine, config.model)
        self.indices = of_shard(range(len(self.store.batch_rows)), config.shard)
        require(
            config.executor == "local" or find_spec("ray") is not None,
            "--executor ray needs Ray: run pip install -e '.[ray]'.",
        )
        if self.sampler is None:
            check_servers(config.urls, config.model, "--vllm-server-url")
        else:
            self.longest = longest_prompt(self.store, self.sampler, self.indices)
        if not config.shard:
            check_dataset_push(config.hf_output_dataset, config.private)
            self.store.open()

    def work(self, stop: Any, argv: list[str]) -> None:
        """Generate what is missing, until `stop.requested`."""
        config = self.config
        self.done = work = Work(self.store, stop, shown=config.shard in (None, "0/1"))
        if self.sampler is not None:
            copies = min(max(1, torch.cuda.device_count()), len(self.store.batch_rows))
            if copies > 1 and not config.shard:
                start_shards("gen.generate", argv, copies, stop=stop)
            else:
                work.sample_here(self.sampler, self.longest, self.indices)
        elif config.executor == "ray":
            from gen.ray import ask_on_ray

            ask_on_ray(work)
        else:
            asyncio.run(work.ask_servers(self.indices, config.at_once))

    def finish(self) -> dict[str, Any]:
        """Write the data set and print a summary of it."""
        seconds, asked = time.monotonic() - self.done.begin, self.done.counts
        self.done.bar.close()
        numbers = self.store.finish()
        shown = {**numbers, "seconds": f"{seconds:.1f}"}
        if asked["generations"]:
            shown["this run: generations"] = asked["generations"]
            shown["this run: tokens/s"] = f"{asked['tokens'] / seconds:.1f}"
        failed = self.store.folder / "failed.jsonl"
        if failed.exists():
            errors = Counter(json.loads(line)["error"] for line in open(failed, encoding="utf-8"))
            shown["failed prompts"] = f"{errors.total()} (in {failed}; the same command retries them)"
            shown["most common error"] = errors.most_common(1)[0][0]
        shown["prompts missing"] = self.store.num_rows - numbers["prompts"]
        shown["data set"] = self.store.folder / "train.parquet"
        print("\n".join(f"{name:24}{value}" for name, value in shown.items()))
        return numbers

    def result(self) -> "Distiset":
        file = self.store.folder / "train.parquet"
        if pq.read_metadata(file).num_rows:
            rows = Dataset.from_parquet(str(file), cache_dir=str(self.store.folder / ".cache"))
        else:
            rows = Dataset(pq.read_table(file))  # `from_parquet` fails for a file without rows
        return Distiset(default=DatasetDict(train=rows))


# ---------------------------------------------------------------------------------------------- distilabel's interface


class Distiset(dict):
    """{"default": DatasetDict(train=...)}, as in distilabel."""

    def push_to_hub(self, repo_id: str, private: bool = False, **options: Any) -> None:
        for name, splits in self.items():
            splits.push_to_hub(repo_id, config_name=name, private=private, **options)


@dataclass(frozen=True)
class Pipeline:
    """The result of `build_distilabel_pipeline`."""

    options: dict[str, Any]

    def run(
        self, dataset: Dataset | list[dict[str, Any]], dataset_batch_size: int | None = None, use_cache: bool = True
    ) -> Distiset:
        """Generate for `dataset`. Ctrl-C keeps the finished generations and raises KeyboardInterrupt.

        dataset_batch_size   ignored: rows are read when they are needed
        use_cache            resume from an earlier run of the same pipeline on the same rows, in data/generated;
                             if False, generate everything again in a new folder under /tmp

        Raises ValueError for bad input, ServerError when no server is left (the cache keeps the finished generations).
        """
        require(
            isinstance(dataset, Dataset | list),
            f"dataset must be a datasets.Dataset (not streamed) or a list, got {type(dataset).__name__}.",
        )
        rows = dataset if isinstance(dataset, Dataset) else Dataset.from_list(dataset)
        require(len(rows) > 0, "the data set has no rows: pass one with at least one row.")
        folder = None if use_cache else tempfile.mkdtemp(prefix="generated-")
        config = GenerateConfig(hf_dataset="(rows)", output_dir=folder, **self.options)
        stop = SimpleNamespace(requested=False)

        def work() -> Distiset:
            run = Run(config, rows)
            try:
                run.work(stop, [])
                run.finish()
                return run.result()
            finally:
                run.store.close()

        with ThreadPoolExecutor(1) as pool:  # a notebook already runs an event loop in this thread
            future = pool.submit(work)
            try:
                return future.result()
            except KeyboardInterrupt:
                stop.requested = True
                raise


def build_distilabel_pipeline(
    model: str,
    base_url: str = "http://localhost:8000/v1",
    prompt_column: str | None = None,
    prompt_template: str = "{{ instruction }}",
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 8192,
    num_generations: int = 1,
    input_batch_size: int = 64,
    client_replicas: int = 1,
    timeout: int = 900,
    retries: int = 0,
) -> Pipeline:
    """open-r1's function of this name. `prompt_column` defaults to `instruction`."""
    return Pipeline(
        {
            "model": model,
            "vllm_server_url": [base_url],
            "prompt_column": prompt_column or "instruction",
            "prompt_template": prompt_template,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "num_generations": num_generations,
            "input_batch_size": input_batch_size,
            "client_replicas": client_replicas,
            "timeout": timeout,
            "retries": retries,
        }
    )


if __name__ == "__main__":
    main()
