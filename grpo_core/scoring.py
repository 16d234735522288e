"""The step of the loop that scores completions: reward functions in killable worker processes, then their weighted sum.

What a reward function is, says `grpo_core/rewards.py`; what happens to a check that fails, `start_scoring` and, in the
workers, `eval/workers.py`. The next file is `advantage.py`.
"""

import asyncio
import copy
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

from eval.workers import Unscored, WorkerPool
from grpo_core.rewards import RewardFunction, gold_text, reward_name

# What a reward function gets as `trainer_state`: how far the run is, without transformers, which a worker lacks.
BEFORE = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0)


@dataclass(frozen=True)
class ToScore:
    """A completion, and what else the reward functions are given with it."""

    text: str
    token_ids: list[int]
    group: int  # completions of one prompt have the same
    prompt: Any  # as the data has it
    prompt_text: str  # as the chat template renders it, or its end: there a reward sees that `<think>` is open already
    columns: dict[str, Any]  # the data's other columns

    def arguments(self) -> dict[str, Any]:
        """By the names of a reward function's parameters, one value each.

        Raises:
            ValueError: a column has a name by which the functions are given something else.
        """
        ours = {
            "prompts": self.prompt,
            "prompt_texts": self.prompt_text,
            "completions": self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}],
            "completion_ids": self.token_ids,
            "group_ids": self.group,
        }
        if taken := {*ours, "trainer_state"} & self.columns.keys():
            raise ValueError(f"rename the data's column {min(taken)!r}: rewards are given something else by this name")
        return with_gold(self.columns) | ours


@dataclass(frozen=True)
class Scores:
    """Of n completions, in their order."""

    rewards: list[float]  # [n]; NaN: unscored
    values: list[list[float | None]]  # [n], one a function; None where it does not apply or failed
    gaps: list[tuple[str, str]]  # for each None: function and None or type of error; the error's text or ""


def with_gold(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns, and as `solution` the gold answer as the data has it: `solution`, else `answer` (of text GSM8K's
    part after `####`); where there is neither, the columns alone."""
    if "solution" in columns or "answer" not in columns:
        return columns
    answer = columns["answer"]
    return columns | {"solution": answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer}


def gold_answers(prompts: Sequence[Any]) -> list | None:
    """The gold answer of each prompt (`grpo_core.rollout.Prompt`); None if the first has no column for it."""
    golds = [with_gold(prompt.columns) for prompt in prompts]
    return [columns.get("solution") for columns in golds] if "solution" in golds[0] else None


def unparseable_golds(golds: Sequence, pool: WorkerPool) -> list[int]:
    """Indices of the gold answers that no completion can be compared with, because they are None or do not parse: rows
    of no signal, to be left out before training. Each distinct gold is parsed once. One that was not parsed in time
    counts as parseable, for what is left out must not depend on how busy a machine is.

    Raises:
        ValueError: one is neither text nor a number.
    """
    from eval.verify import gold_is_parseable  # loads math-verify, which only data with gold answers needs

    texts = [gold_text(gold) for gold in golds]
    distinct = list(dict.fromkeys(texts))
    parseable = dict(zip(distinct, pool.map(gold_is_parseable, distinct), strict=True))
    return [i for i, text in enumerate(texts) if parseable[text] is False]


def accepted(function: RewardFunction, names: Iterable[str]) -> set[str]:
    """Which of these arguments the function takes: all if it has `**kwargs`."""
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name for name in names if anything or name in parameters}


def _call(task: tuple[RewardFunction, dict[str, list], int]) -> list[float | None]:
    """In a worker: one reward function on one completion, or on one group. Rejects what is not a list of rewards."""
    function, arguments, count = task
    values = function(**copy.deepcopy(arguments))  # the next function is given the same objects
    values = _plain(_awaited(values) if inspect.isawaitable(values) else values)
    name = reward_name(function)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise TypeError(f"{name} must return a list of {count} rewards, it returned {values!r:.100}")
    values = [_plain(value) for value in values]
    for value in values:
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise TypeError(f"{name} must return finite numbers, or None where it does not apply, not {value!r:.100}")
    return [None if value is None else float(value) for value in values]


def _awaited(value: Awaitable) -> Any:
    """The result of a coroutine, in a thread of its own: this one may have a running loop, as a notebook's has."""

    async def result() -> Any:
        return await value

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, result()).result()


def _called_here(task: tuple[RewardFunction, dict[str, list], int]) -> list[float | None] | Unscored:
    try:
        return _call(task)
    except Exception as error:  # as in a worker
        return Unscored("exception", f"{type(error).__name__}: {error}")


def _plain(value: Any) -> Any:
    """numpy's and torch's arrays as lists, their scalars as numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def start_scoring(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    completions: Sequence[ToScore],
    pool: WorkerPool,
    trainer_state: SimpleNamespace = BEFORE,
) -> Callable[[], Scores]:
    """Have the pool's workers begin; the function returned waits for the result:
    R = sum over functions of weight * value, in float64.

    weights: one a function; None: all 1. A None value is left out of its completion's sum. A completion is unscored
    (NaN) if any of its checks failed (time-out, crash, exception) or every function gave None. A check may take
    `pool.timeout` seconds, one of a whole group as many times that as the group has completions.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward_funcs")
    names = [reward_name(function) for function in functions]
    assert len(set(names)) == len(names), f"reward functions of the same name: {names}"
    arguments = [completion.arguments() for completion in completions]
    known = list(arguments[0])
    assert all(row.keys() == arguments[0].keys() for row in arguments), "completions with different columns"
    wanted = [[name for name in known if name in accepted(function, known)] for function in functions]

    groups: dict[int, list[int]] = {}
    for row, completion in enumerate(completions):
        groups.setdefault(completion.group, []).append(row)
    # Rows outside, functions inside: a chunk of tasks then holds each text once for all its functions.
    calls: list[tuple[int, list[int]]] = []  # (function, rows)
    by_group = [getattr(function, "batch", False) for function in functions]
    for rows in groups.values():
        calls += [(j, [row]) for row in rows for j in range(len(functions)) if not by_group[j]]
        calls += [(j, rows) for j in range(len(functions)) if by_group[j]]
    states = [dict.fromkeys(accepted(function, ["trainer_state"]), trainer_state) for function in functions]
    here = [getattr(function, "in_process", False) for function in functions]
    calls.sort(key=lambda call: here[call[0]])
    sent = sum(not here[j] for j, _ in calls)
    tasks: list[Any] = [
        (
            functions[j] if here[j] else pool.share(functions[j]),
            {name: [arguments[row][name] for row in rows] for name in wanted[j]} | states[j],
            len(rows),
        )
        for j, rows in calls
    ]
    job = pool.submit(_call, tasks[:sent], [pool.timeout * len(rows) for _, rows in calls[:sent]])

    def wait() -> Scores:
        values: list[list[float | None]] = [[None] * len(functions) for _ in completions]
        failed: set[int] = set()
        gaps: list[tuple[str, str]] = []
        called_here = map(_called_here, tasks[sent:])
        for (j, rows), answer in zip(calls, chain(pool.wait(job), called_here), strict=True):
            if isinstance(answer, Unscored):
                failed.update(rows)
                kind = answer.error.partition(":")[0] if answer.reason == "exception" else answer.reason
                gaps += [(f"{names[j]} failed with {kind}", answer.error)] * len(rows)
                continue
            for row, value in zip(rows, answer, strict=True):
                values[row][j] = value
                if value is None:
                    gaps.append((f"{names[j]} gave None", ""))
        rewards = [math.nan if row in failed else weighted_sum(weights, values[row]) for row in range(len(values))]
        return Scores(rewards, values, gaps)

    return wait


def weighted_sum(weights: Sequence[float], values: Sequence[float | None]) -> float:
    """Over the values that are not None; NaN where all are."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(terms) if terms else math.nan
