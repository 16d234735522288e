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
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from eval.verify import check_answer

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
