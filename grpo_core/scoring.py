"""Scores completions: calls reward functions in worker processes with a timeout, then takes their weighted sum.

`grpo_core/rewards.py` documents reward functions. `start_scoring` and `eval/workers.py` document what happens if a call
fails. Read `advantage.py` next.
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

# `trainer_state` for reward functions before the first step. A plain object, because workers lack transformers.
BEFORE = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0)


@dataclass(frozen=True)
class ToScore:
    """A completion, with everything else that reward functions can receive about it."""

    text: str
    token_ids: list[int]
    group: int  # the same for all completions of a prompt
    prompt: Any  # text or messages
    prompt_text: str  # the rendered prompt, or its end, which shows whether the template already opened `<think>`
    columns: dict[str, Any]  # the data's other columns

    def arguments(self) -> dict[str, Any]:
        """This completion's arguments for reward functions, by parameter name.

        Raises:
            ValueError: a column has the name of another argument.
        """
        ours = {
            "prompts": self.prompt,
            "prompt_texts": self.prompt_text,
            "completions": self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}],
            "completion_ids": self.token_ids,
            "group_ids": self.group,
        }
        if taken := {*ours, "trainer_state"} & self.columns.keys():
            raise ValueError(f"rename the data's column {min(taken)!r}: rewards get another argument of this name")
        return with_gold(self.columns) | ours


@dataclass(frozen=True)
class Scores:
    """The scores of n completions, in their order."""

    rewards: list[float]  # [n]; NaN: unscored
    values: list[list[float | None]]  # [n], one per function; None if it does not apply or failed
    gaps: list[tuple[str, str]]  # for each None: the function with the kind of failure, and the error's text or ""


def with_gold(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns, with the gold answer as `solution`: the column `solution`, else `answer` (if it is text, the part
    after `####`, as in GSM8K). If the data has neither, the columns are unchanged."""
    if "solution" in columns or "answer" not in columns:
        return columns
    answer = columns["answer"]
    return columns | {"solution": answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer}


def gold_answers(prompts: Sequence[Any]) -> list | None:
    """The gold answer of each prompt (`grpo_core.rollout.Prompt`); None if the data has no column of gold answers."""
    golds = [with_gold(prompt.columns) for prompt in prompts]
    return [columns.get("solution") for columns in golds] if "solution" in golds[0] else None


def unparseable_golds(golds: Sequence, pool: WorkerPool) -> list[int]:
    """Indices of the gold answers that are None or cannot be parsed. Their rows give no signal and should be left out
    before training. Each distinct gold is parsed once. A gold that was not parsed in time counts as parseable, because
    the selection of rows must not depend on the machine's load.

    Raises:
        ValueError: a gold is neither text nor a number.
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
    """Call one reward function on one completion or on one group. Rejects results that are not a list of rewards."""
    function, arguments, count = task
    values = function(**copy.deepcopy(arguments))  # a copy, because the next function gets the same objects
    values = _plain(_awaited(values) if inspect.isawaitable(values) else values)
    name = reward_name(function)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise TypeError(f"{name} must return a list of {count} rewards, but it returned {values!r:.100}")
    values = [_plain(value) for value in values]
    for value in values:
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise TypeError(f"{name} must return finite numbers, or None where it does not apply, not {value!r:.100}")
    return [None if value is None else float(value) for value in values]


def _awaited(value: Awaitable) -> Any:
    """The result of a coroutine, run in a new thread: this one may have a running event loop, as in a notebook."""

    async def result() -> Any:
        return await value

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, result()).result()


def _called_here(task: tuple[RewardFunction, dict[str, list], int]) -> list[float | None] | Unscored:
    try:
        return _call(task)
    except Exception as error:  # a worker does the same
        return Unscored("exception", f"{type(error).__name__}: {error}")


def _plain(value: Any) -> Any:
    """Converts arrays of numpy and torch to lists, and their scalars to numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def start_scoring(
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    completions: Sequence[ToScore],
    pool: WorkerPool,
    trainer_state: SimpleNamespace = BEFORE,
) -> Callable[[], Scores]:
    """Start to score in the pool's workers. Returns a function that waits for the result:
    R = sum over functions of weight * value, in float64.

    weights: one per function; None: all 1. A value of None is left out of its completion's sum. A completion is
    unscored (NaN) if any of its calls failed (timeout, crash, exception) or every function gave None. The timeout of a
    call is `pool.timeout` seconds per completion that it scores.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward_funcs: give one each")
    names = [reward_name(function) for function in functions]
    assert len(set(names)) == len(names), f"reward functions of the same name: {names}"
    arguments = [completion.arguments() for completion in completions]
    known = list(arguments[0])
    assert all(row.keys() == arguments[0].keys() for row in arguments), "completions with different columns"
    wanted = [[name for name in known if name in accepted(function, known)] for function in functions]

    groups: dict[int, list[int]] = {}
    for row, completion in enumerate(completions):
        groups.setdefault(completion.group, []).append(row)
    # With functions in the inner loop, a chunk of tasks contains each text once for all its functions.
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
    """The weighted sum of the values that are not None; NaN if all are None."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(terms) if terms else math.nan
