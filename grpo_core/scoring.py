"""The step of the loop that scores completions: reward functions in killable worker processes, then their weighted sum.

What a reward function is, says `grpo_core/rewards.py`; what happens to a check that fails, `start_scoring`.
"""

import copy
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.workers import Unscored, WorkerPool
from grpo_core.rewards import RewardFunction, gold_text, reward_name


@dataclass
class ScoreResult:
    rewards: np.ndarray  # [n] float64; NaN where unscored
    per_function: dict[str, list[float | None]]  # [n] each; None where it does not apply or failed
    gaps: list[tuple[str, str]]  # for each None: function and None or type of error; the error's text or ""


def gold_column(columns: dict[str, list]) -> list | None:
    """The gold answers as the data has them: column `solution`, else `answer` (of text GSM8K's part after `####`);
    None if there is neither."""
    if "solution" in columns:
        return columns["solution"]
    if "answer" in columns:
        return [g.rpartition("####")[2].strip() if isinstance(g, str) else g for g in columns["answer"]]
    return None


def gold_answers(prompts: Sequence[Any]) -> list | None:
    """`gold_column` of the prompts (`grpo_core.rollout.Prompt`)."""
    return gold_column({name: [prompt.columns.get(name) for prompt in prompts] for name in prompts[0].columns})


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
    values = _plain(function(**copy.deepcopy(arguments)))  # the next function is given the same objects
    name = reward_name(function)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise TypeError(f"{name} must return a list of {count} rewards and not be async, it returned {values!r:.100}")
    values = [_plain(value) for value in values]
    for value in values:
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise TypeError(f"{name} must return finite numbers, or None where it does not apply, not {value!r:.100}")
    return [None if value is None else float(value) for value in values]


def _plain(value: Any) -> Any:
    """numpy's and torch's arrays as lists, their scalars as numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def start_scoring(
    reward_funcs: Sequence[RewardFunction],
    reward_weights: Sequence[float] | None,
    *,
    completions: list[str],
    prompts: list,
    group_ids: list,
    completion_ids: list[list[int]],
    columns: dict[str, list],
    pool: WorkerPool,
    prompt_texts: list[str] | None = None,
) -> Callable[[], ScoreResult]:
    """Have the pool's workers begin; the function returned waits for the result:
    R = sum over functions of weight * value, in float64.

    completions: [n] texts; prompts [n], group_ids [n], completion_ids [n] and every column [n] go with them.
    prompt_texts: [n] the prompts as the chat template renders them, or their ends: the only place where a reward sees
    that the template has already opened `<think>`.
    reward_weights: one a function; None: all 1. A None value is left out of its row's sum. A row is unscored (NaN) if
    any of its checks failed (time-out, crash, exception) or every function gave None. A check may take `pool.timeout`
    seconds, one of a whole group as many times that as the group has completions.
    """
    n = len(completions)
    weights = [1.0] * len(reward_funcs) if reward_weights is None else list(reward_weights)
    if len(weights) != len(reward_funcs):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(reward_funcs)} reward_funcs")
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    gold = gold_column(columns)
    given: dict[str, list] = {
        "prompts": prompts,
        "completions": messages,
        "completion_ids": completion_ids,
        "group_ids": group_ids,
    }
    if prompt_texts is not None:
        given["prompt_texts"] = prompt_texts
    if taken := given.keys() & columns:
        raise ValueError(f"rename the data's column {min(taken)!r}: rewards are given something else by this name")
    fields = columns | ({} if gold is None else {"solution": gold}) | given
    for name, values in fields.items():
        assert len(values) == n, f"column {name} has {len(values)} rows for {n} completions"

    groups: dict[Any, list[int]] = {}
    for row, group in enumerate(group_ids):
        groups.setdefault(group, []).append(row)
    # Rows outside, functions inside: a chunk of tasks then holds each text once for all its functions.
    calls: list[tuple[int, list[int]]] = []  # (function, rows)
    for rows in groups.values():
        single = [j for j, function in enumerate(reward_funcs) if not getattr(function, "batch", False)]
        calls += [(j, [row]) for row in rows for j in single]
        calls += [(j, rows) for j in range(len(reward_funcs)) if j not in single]

    inputs = [{k: v for k, v in fields.items() if k in accepted(function, fields)} for function in reward_funcs]

    def task(j: int, rows: list[int]) -> tuple[RewardFunction, dict[str, list], int]:
        return reward_funcs[j], {name: [values[row] for row in rows] for name, values in inputs[j].items()}, len(rows)

    job = pool.submit(_call, [task(*call) for call in calls], [pool.timeout * len(rows) for _, rows in calls])
    names = [reward_name(function) for function in reward_funcs]
    assert len(set(names)) == len(names), f"reward functions of the same name: {names}"
    return lambda: _add_up(names, weights, calls, pool.wait(job), n)


def _add_up(
    names: list[str], weights: list[float], calls: list[tuple[int, list[int]]], answers: list, n: int
) -> ScoreResult:
    values_of: list[list[float | None]] = [[None] * n for _ in names]
    failed: set[int] = set()
    gaps: list[tuple[str, str]] = []
    for (j, rows), answer in zip(calls, answers, strict=True):
        if isinstance(answer, Unscored):
            failed.update(rows)
            kind = answer.error.partition(":")[0] if answer.reason == "exception" else answer.reason
            gaps += [(f"{names[j]} failed with {kind}", answer.error)] * len(rows)
            continue
        for row, value in zip(rows, answer, strict=True):
            values_of[j][row] = value
            if value is None:
                gaps.append((f"{names[j]} gave None", ""))

    rewards = np.full(n, np.nan)
    for row in range(n):
        terms = [weight * v[row] for weight, v in zip(weights, values_of, strict=True) if v[row] is not None]  # type: ignore[operator]
        if terms and row not in failed:
            rewards[row] = sum(terms)
    return ScoreResult(rewards, dict(zip(names, values_of, strict=True)), gaps)
