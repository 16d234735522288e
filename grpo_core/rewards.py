"""Reward functions, and the step of the loop that scores completions with them in killable worker processes.

A reward function has open-r1's face: `f(completions, **columns) -> list[float | None]`. completions[i] is a
conversation, its text `completions[i][0]["content"]`; the data's columns, `prompts`, `group_ids` and `completion_ids`
reach it by name, each a list as long as completions; the gold answer is the column `solution`. None means "does not
apply here". A function that must see a whole group at once carries the attribute `batch = True`; every other is called
with one completion at a time, so that a check that hangs costs one completion. `REWARD_FUNCS_REGISTRY` names the
functions here; any other is named `module:function`, gets the columns that it names (all, if it takes `**kwargs`),
and runs in the workers too.

Left out: reward models, and whatever needs torch. This file imports none, so that a worker does not either.

    python -m grpo_core.train --reward_funcs accuracy format my_rewards:brevity ...
"""

import difflib
import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from eval.verify import Unscored, WorkerPool, check_answer

RewardFunction = Callable[..., list]
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


# ------------------------------------------------------------------------------------------------ reward functions


def accuracy_reward(completions: list, solution: list, **kwargs: Any) -> list[float | None]:
    r"""1.0 where the answer equals the gold one, else 0.0; see `eval.verify` for where an answer is looked for.

    A gold that cannot be parsed gives 1.0 to every completion, as in open-r1: no spread, so no gradient from this
    reward, but leave such rows out of your data (`eval.verify.gold_is_parseable`). Mended: gold and answer are compared
    in this order, a bare `63` is a gold, the content of `<answer>` is an answer.
    """
    scores = [check_answer(str(g), c[0]["content"]) for g, c in zip(solution, completions, strict=True)]
    return [1.0 if score is None else score for score in scores]


def format_reward(completions: list, **kwargs: Any) -> list[float | None]:
    """1.0 for exactly `<think>...</think><answer>...</answer>`, white space between and around allowed, else 0.0.

    Mended: open-r1's pattern also takes text after any line end, and blocks twice. Where `prompts` are texts (or end in
    a message) that already opened `<think>`, as some chat templates do, the completion need not.
    """
    prompts = kwargs.get("prompts") or [""] * len(completions)
    rewards: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion[0]["content"]
        opened = prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""
        if opened.rstrip().endswith("<think>"):
            text = "<think>" + text
        match = _FORMAT.fullmatch(text)
        rewards.append(float(match is not None and not any(_TAG.search(inner) for inner in match.groups())))
    return rewards


def repetition_penalty_reward(
    completions: list, *, ngram_size: int, max_penalty: float, **kwargs: Any
) -> list[float | None]:
    """max_penalty * (1 - distinct / all n-grams) over lower-case words; 0.0 for fewer than n words (as in open-r1,
    after Yeo et al. 2025, Demystifying Long Chain-of-Thought Reasoning)."""
    rewards: list[float | None] = []
    for completion in completions:
        words = completion[0]["content"].lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        rewards.append((1 - len(set(ngrams)) / len(ngrams)) * max_penalty if ngrams else 0.0)
    return rewards


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float) -> RewardFunction:
    """`repetition_penalty_reward` with its two numbers bound; picklable. ValueError if max_penalty > 0 or n < 1."""
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive: it is what full repetition costs")
    if ngram_size < 1:
        raise ValueError(f"ngram_size {ngram_size} should be at least 1")
    return partial(repetition_penalty_reward, ngram_size=ngram_size, max_penalty=max_penalty)


# Name -> how to make it from the script's arguments.
REWARD_FUNCS_REGISTRY: dict[str, Callable[[Any], RewardFunction]] = {
    "accuracy": lambda args: accuracy_reward,
    "format": lambda args: format_reward,
    "repetition_penalty": lambda args: get_repetition_penalty_reward(
        args.repetition_n_grams, args.repetition_max_penalty
    ),
}


def get_reward_funcs(script_args: Any) -> list[RewardFunction]:
    """The functions that `script_args.reward_funcs` names, in order; also reads `.repetition_n_grams` and
    `.repetition_max_penalty`. ValueError for a name nobody knows, or one given twice."""
    functions = []
    for name in script_args.reward_funcs:
        if ":" in name:
            functions.append(_import_function(name))
        elif name in REWARD_FUNCS_REGISTRY:
            functions.append(REWARD_FUNCS_REGISTRY[name](script_args))
        else:
            nearest = difflib.get_close_matches(name, REWARD_FUNCS_REGISTRY, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            known = ", ".join(REWARD_FUNCS_REGISTRY)
            raise ValueError(f"unknown reward {name!r}: {hint}Known: {known}; your own is named module:function")
    names = [reward_name(function) for function in functions]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two reward functions are both named {twice[0]!r}: rename one or drop it")
    return functions


def _import_function(path: str) -> RewardFunction:
    module, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import the reward {path!r} (it must be module:function): {error}") from error
    if not callable(function):
        raise ValueError(f"the reward {path!r} is a {type(function).__name__}, not a function")
    return function


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's rewards are logged."""
    if isinstance(function, partial):
        return reward_name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


# ------------------------------------------------------------------------------------------------ scoring a step


@dataclass
class ScoreResult:
    rewards: np.ndarray  # [n] float64; NaN where unscored
    per_function: dict[str, list[float | None]]  # [n] each; None where it does not apply or failed
    unscored: int  # rows of rewards that are NaN
    errors: dict[str, int] = field(default_factory=dict)  # failed checks, by "function: reason: text"


def gold_column(columns: dict[str, list]) -> list[str] | None:
    """The gold answers of the data as text: column `solution`, else `answer` (GSM8K's part after `####`); None if
    there is neither."""
    if "solution" in columns:
        return [str(gold) for gold in columns["solution"]]
    if "answer" in columns:
        return [str(gold).rpartition("####")[2].strip() for gold in columns["answer"]]
    return None


def _accepted(function: RewardFunction, names: Iterable[str]) -> set[str]:
    """Which of these arguments the function takes: all if it has `**kwargs`."""
    parameters = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name for name in names if anything or name in parameters}


def _call(task: tuple[RewardFunction, dict[str, list]]) -> list[float | None]:
    """In a worker: one reward function on one completion, or on one group. Rejects what is not a list of rewards."""
    function, arguments = task
    values = function(**arguments)
    count = len(arguments["completions"])
    if not isinstance(values, list) or len(values) != count:
        raise TypeError(f"{reward_name(function)} must return a list of {count} rewards, not {values!r:.100}")
    rewards = [None if value is None else float(value) for value in values]
    if any(reward is not None and not math.isfinite(reward) for reward in rewards):
        raise ValueError(f"{reward_name(function)} returned a reward that is not finite: {values!r:.100}")
    return rewards


def score_completions(
    reward_funcs: Sequence[RewardFunction],
    reward_weights: Sequence[float] | None,
    *,
    completions: list[str],
    prompts: list,
    group_ids: list,
    completion_ids: list[list[int]],
    columns: dict[str, list],
    pool: WorkerPool,
) -> ScoreResult:
    """R = sum over functions of weight * value, in float64.

    completions: [n] texts; prompts [n], group_ids [n], completion_ids [n] and every column [n] go with them.
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
    fields = columns | ({} if gold is None else {"solution": gold})
    fields |= {"prompts": prompts, "completions": messages, "completion_ids": completion_ids, "group_ids": group_ids}
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

    inputs = [{k: v for k, v in fields.items() if k in _accepted(function, fields)} for function in reward_funcs]

    def task(j: int, rows: list[int]) -> tuple[RewardFunction, dict[str, list]]:
        return reward_funcs[j], {name: [values[row] for row in rows] for name, values in inputs[j].items()}

    answers = pool.map(_call, [task(*call) for call in calls], timeouts=[pool.timeout * len(rows) for _, rows in calls])

    names = [reward_name(function) for function in reward_funcs]
    assert len(set(names)) == len(names), f"reward functions of the same name: {names}"
    values_of: list[list[float | None]] = [[None] * n for _ in reward_funcs]
    failed: set[int] = set()
    errors: Counter[str] = Counter()
    for (j, rows), answer in zip(calls, answers, strict=True):
        if isinstance(answer, Unscored):
            failed.update(rows)
            errors[f"{names[j]}: {answer.reason}: {answer.error}"] += 1
            continue
        for row, value in zip(rows, answer, strict=True):
            values_of[j][row] = value

    rewards = np.full(n, np.nan)
    for row in range(n):
        terms = [weight * v[row] for weight, v in zip(weights, values_of, strict=True) if v[row] is not None]  # type: ignore[operator]
        if terms and row not in failed:
            rewards[row] = sum(terms)
    unscored = int(np.isnan(rewards).sum())
    return ScoreResult(rewards, dict(zip(names, values_of, strict=True)), unscored, dict(errors))
