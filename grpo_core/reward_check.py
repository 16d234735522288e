"""Checks the reward functions before any weight is loaded: their columns, and a call of each as in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from eval.workers import WorkerPool
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.rewards import compares_with_gold, is_ours, reward_name
from grpo_core.rollout import Prompt, Sample, Scorer, prompt_column
from grpo_core.scoring import accepted, gold_answers
from sft_core.data.rows import json_lines, kind_of
from sft_core.prepare import Base
from sft_core.run.options import require

if TYPE_CHECKING:
    from datasets import Dataset


def check_columns(rows: Dataset, file: str, data: GRPOScriptArguments, functions: list[Callable]) -> None:
    """Refuse a column with values of several types if a reward has a parameter of its name; warn if rewards get it only
    by `**kwargs`. If the data is not JSON lines, all values of such a column are suspect: `datasets` may have converted
    text to numbers.

    Raises:
        ValueError: such a column; the message names it and the row.
    """
    users = [function for function in functions if not is_ours(function)]
    asked = {name for function in users for name in inspect.signature(function).parameters}
    if "solution" in asked or any(map(compares_with_gold, functions)):
        asked |= {"solution", "answer"}
    seen = asked.union(*(accepted(function, rows.column_names) for function in users))
    written = json_lines(file)
    for name in seen.intersection(rows.column_names) - {prompt_column(rows, data)}:
        values = [row.get(name) for row in written] or rows.with_format(None)[name][:]
        kinds = [kind_of(value) for value in values]
        first = next((kind for kind in kinds if kind != "NoneType"), "dict")
        wrong = [i for i, kind in enumerate(kinds) if kind not in (first, "NoneType")]
        if not written and "Json" in repr(rows.features[name]) and first not in ("dict", "list"):
            wrong.append(kinds.index(first))
        for i in wrong[:1]:
            text = (
                f"row {i + 1} of the data: `{name}` is {values[i]!r:.80} in a column of several types (the first is "
                f"{first}): write one type in every row, or save the data as .parquet."
            )
            require(name not in asked, text)
            print(f"warning: {text}", flush=True)


def dry_call(base: Base, config: GRPOConfig, prompts: list[Prompt], functions: list[Callable]) -> None:
    """Call each reward function twice in a worker process, as training does. The completion is the gold answer of the
    first prompt that has one; functions that score whole groups get a group of copies. The first call has a long
    timeout, because it may import modules. The second must finish within reward_timeout.

    Raises:
        ValueError: a reward function cannot be sent to a worker, raises, hangs, or does not return rewards.
    """
    golds = gold_answers(prompts) or [None]
    row = next((i for i, gold in enumerate(golds) if gold is not None), 0)
    prompt, gold = prompts[row], str(golds[row])
    sample = Sample(0, prompt.ids, base.tokenizer(gold, add_special_tokens=False)["input_ids"], [], "stop", 0)
    config = replace(config, reward_weights=None)
    for function in functions:
        if unread := {"log_extra", "log_metric"} & set(inspect.signature(function).parameters):
            names = " and ".join(sorted(unread))
            print(f"warning: {reward_name(function)} does not receive {names}, so it cannot log with them.", flush=True)
    with WorkerPool(1) as pool:
        for limit in (max(pool.START_LIMIT, config.reward_timeout), config.reward_timeout):
            pool.timeout = limit
            for function in functions:
                scorer = Scorer({0: prompt}, [function], config, base.tokenizer, pool)
                try:
                    scorer.begin([sample] * (config.num_generations if getattr(function, "batch", False) else 1))
                    gaps = scorer.begun[0][1]().gaps
                except Exception as error:  # custom code may raise anything
                    raise ValueError(
                        f"{reward_name(function)} cannot be called in a worker process: {error}; set in_process = True "
                        "on the function to run it in the trainer's process."
                    ) from error
                for cause, text in gaps:
                    require(
                        not text,
                        f"{cause} on a row of the data with the completion {gold!r:.50} ({text}): fix "
                        "it, or raise --reward_timeout if it is slow; its parameters may be completions, "
                        f"completion_ids, prompts, prompt_texts, group_ids, {', '.join(prompt.columns)}.",
                    )
        for function in functions:
            if not is_ours(function) and not getattr(function, "batch", False):
                check_one_at_a_time(base, config, prompt, function, pool)


def check_one_at_a_time(base: Base, config: GRPOConfig, prompt: Prompt, function: Callable, pool: WorkerPool) -> None:
    """Refuse a reward function that compares completions with each other, because it gets one completion per call.

    Raises:
        ValueError: three completions get different values in one call than in one call each, whose values repeat.
    """
    together = partial(function)
    in_process = getattr(function, "in_process", False)
    vars(together).update(batch=True, in_process=in_process, __name__=reward_name(function))
    samples = [
        Sample(0, prompt.ids, base.tokenizer(text, add_special_tokens=False)["input_ids"], [], "stop", 0)
        for text in ("4", "The answer is 4, I think.", "<think>\n2 + 2\n</think>\n<answer>\n5\n</answer>")
    ]

    def values(function: Callable) -> list[list[float | None]]:
        scorer = Scorer({0: prompt}, [function], config, base.tokenizer, pool)
        scorer.begin(samples)
        return scorer.begun[0][1]().values

    alone, joint = values(function), values(together)
    require(
        alone == joint or [None] in alone + joint or alone != values(function),
        f"{reward_name(function)} gives completions different values together than one at a time, as training calls "
        "it: set the attribute batch = True on it to have it called with the whole group of a prompt.",
    )
