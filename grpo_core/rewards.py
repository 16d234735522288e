"""Reward functions with open-r1's names and signatures. Docstrings say which errors of open-r1's versions are fixed.

A reward function is called as `f(completions, **columns) -> list[float | None]`. completions[i] is a conversation, with
its text in `completions[i][0]["content"]`. The data's columns, `prompts`, `prompt_texts`, `group_ids` and
`completion_ids` are passed by name, each as a list as long as completions. The gold answer is the column `solution`.
Values have the types of the data: a number stays a number, None stays None. A reward of None means "does not apply
here". The result may also be a numpy array, a tensor or a tuple.

A function that needs a whole group at once has the attribute `batch = True`. Every other function is called with one
completion at a time, so that a call that hangs affects only one completion (`grpo_core/scoring.py`). A function cannot
keep state between calls, because it is sent to the worker processes again with each batch of calls.

`REWARD_FUNCS_REGISTRY` names the functions of this module. A custom function is named `module:function`, receives the
columns that its parameters name (all, if it takes `**kwargs`), and runs in the worker processes too. The functions
here can be pickled, and have the `__name__` under which open-r1 logs them.

Not supported, on purpose: reward models, functions that need torch (workers do not import it), and those of open-r1's
code rewards that run a model's programs in remote sandboxes.

    python -m grpo_core.train --reward_funcs accuracy format my_rewards:brevity ...
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

from grpo_core.user_code import import_function

RewardFunction = Callable[..., list]
_TAG = re.compile(r"(</?(?:think|answer)>)")
_STEP = re.compile(r"Step \d+:|^\d+\.(?!\d)|\n-|\n\*|First,|Second,|Next,|Finally,", re.MULTILINE)
_FORM = ["<think>", "</think>", "<answer>", "</answer>"]
_CODE_FORM = re.compile(r"<think>\n.*?\n</think>\n<answer>\n(.*?)\n</answer>\s*", re.DOTALL)
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def _texts(completions: list, columns: dict[str, Any]) -> list[str]:
    """The text of the model's whole turn: each completion, preceded by `<think>` if its prompt already opened that.

    The column `prompt_texts` (rendered prompts, or their ends) shows whether it did, else the column `prompts` (texts,
    or conversations whose last message is the assistant's). A conversation does not show what a chat template adds.
    """
    prompts = columns.get("prompt_texts") or columns.get("prompts") or [""] * len(completions)
    texts = []
    for prompt, completion in zip(prompts, _contents(completions), strict=True):
        if not isinstance(prompt, str):
            prompt = str(prompt[-1]["content"]) if prompt and prompt[-1].get("role") == "assistant" else ""
        opened = _OPENED.search(prompt)
        texts.append((opened.group() if opened else "") + completion)
    return texts


def _contents(completions: list) -> list[str]:
    """The text of each completion; for a conversation, the text of its first message."""
    return [text if isinstance(text, str) else text[0]["content"] for text in completions]


def gold_text(gold: Any) -> str:
    """A gold answer as text, with a number written in digits; for None "", which does not parse.

    Raises:
        ValueError: the answer is neither text nor a number.

    >>> gold_text(1e-05), gold_text(2.0), gold_text(21), gold_text("1e-05"), gold_text(None)
    ('0.00001', '2', '21', '1e-05', '')
    """
    if gold is None or gold != gold:  # pandas writes a missing value as NaN
        return ""
    if isinstance(gold, float):
        return format(Decimal(str(gold)).normalize(), "f")
    if type(gold) not in (int, str):
        raise ValueError(f"a gold answer must be text or a number, not {gold!r:.80}: change the column.")
    return str(gold)


def accuracy_reward(completions: list, solution: list, **kwargs: Any) -> list[float | None]:
    r"""1.0 if the answer equals the gold one, else 0.0; `eval.verify` documents how an answer is found in the text.

    A gold that cannot be parsed gives None: leave such rows out of your data (`grpo_core.scoring.unparseable_golds`).
    Fixed: open-r1 gives 1.0 to every completion then. Also fixed: gold and answer are compared in the right order, a
    bare `63` is a gold, the content of `<answer>` is an answer, and nothing is printed.
    """
    from eval.verify import check_answer  # loads math-verify, which only rewards that compare answers need

    return [check_answer(gold_text(g), text) for g, text in zip(solution, _contents(completions), strict=True)]


def format_reward(completions: list, **kwargs: Any) -> list[float | None]:
    """1.0 for exactly `<think>...</think><answer>...</answer>`, with optional white space between and around, else 0.0.

    Fixed: open-r1's pattern also accepts text after any line end and repeated blocks, and never matches if the prompt
    opens `<think>`, as some chat templates do (see `_texts`).
    """
    rewards: list[float | None] = []
    for text in _texts(completions, kwargs):
        pieces = _TAG.split(text)  # before, tag, thought, tag, between, tag, answer, tag, after
        ordered = pieces[1::2] == _FORM
        rewards.append(float(ordered and not "".join(pieces[::4]).strip()))
    return rewards


@dataclass(frozen=True)
class CodeFormatReward:
    r"""1.0 for `<think>\n...\n</think>\n<answer>\n...\n</answer>` with a closed block of the language in the answer, as
    in "```python ... ```", else 0.0. A column `language` sets the language per row.
    Fixed: open-r1's pattern also accepts text after any line end, repeated tags, and "```javascript" for java."""

    language: str = "python"
    __name__ = "code_format_reward"

    def __call__(self, completions: list, language: list | None = None, **kwargs: Any) -> list[float | None]:
        rewards: list[float | None] = []
        for text, named in zip(_texts(completions, kwargs), language or [None] * len(completions), strict=True):
            form = _CODE_FORM.fullmatch(text) if _TAG.findall(text) == _FORM else None
            block = rf"```{re.escape(named or self.language)}(?!\w).*?```"
            rewards.append(float(form is not None and re.search(block, form[1], re.DOTALL) is not None))
        return rewards


def tag_count_reward(completions: list, **kwargs: Any) -> list[float | None]:
    r"""0.25 for each of `<think>\n`, `\n</think>\n`, `\n<answer>\n` and `\n</answer>` that occurs exactly once.

    Fixed: a `<think>` opened by the prompt counts.
    """
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(0.25 for tag in tags if text.count(tag) == 1) for text in _texts(completions, kwargs)]


def reasoning_steps_reward(completions: list, **kwargs: Any) -> list[float | None]:
    r"""min(1, n/3) for n step markers: `Step 1:`, `1.` at the start of a line, a list item with `-` or `*`, `First,`,
    `Second,`, `Next,`, `Finally,`.

    Fixed: `1.` counts on every line, not only on the first; a number such as `1.5` does not.
    """
    return [min(1.0, len(_STEP.findall(text)) / 3) for text in _texts(completions, kwargs)]


@dataclass(frozen=True)
class CosineScaledReward:
    """Accuracy scaled by length along half a cosine (Yeo et al. 2025, Demystifying Long Chain-of-Thought Reasoning).

    The value of a correct answer falls from max_value_correct (length 0) to min_value_correct (max_len and beyond).
    That of a wrong answer goes from min_value_wrong to max_value_wrong. Lengths are in characters, or with `tokens` in
    tokens. A gold that cannot be parsed gives None. Raises ValueError if max_len < 1. Fixed: open-r1's cosine rises
    again beyond max_len, so that a correct answer of twice that length gets the highest value; it compares answer and
    gold in the wrong order; the defaults of its script for wrong answers (0, -0.5) contradict its documentation.
    """

    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    max_len: int = 1000
    tokens: bool = field(default=False, kw_only=True)

    __name__ = "cosine_scaled_reward"

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise ValueError(f"cosine_max_len must be at least 1, got {self.max_len}")

    def __call__(
        self, completions: list, solution: list, completion_ids: list | None = None, **kwargs: Any
    ) -> list[float | None]:
        from eval.verify import check_answer

        if self.tokens and completion_ids is None:
            raise ValueError("the cosine reward counts tokens: pass completion_ids")
        rewards: list[float | None] = []
        for i, (text, gold) in enumerate(zip(_contents(completions), solution, strict=True)):
            score = check_answer(gold_text(gold), text)
            length = len(completion_ids[i]) if self.tokens and completion_ids is not None else len(text)
            cosine = math.cos(math.pi * min(1.0, length / self.max_len))
            # values at length 0 and at max_len: a short correct answer gets the most, a short wrong one the least
            short, long = self.min_value_wrong, self.max_value_wrong
            if score:
                short, long = self.max_value_correct, self.min_value_correct
            rewards.append(None if score is None else long + 0.5 * (short - long) * (1.0 + cosine))
        return rewards


@dataclass(frozen=True)
class RepetitionPenaltyReward:
    """max_penalty * (1 - distinct / all n-grams) of lower-case words (with language zh, of the words that jieba finds);
    0.0 for fewer than n words (as in open-r1, after Yeo et al. 2025, Demystifying Long Chain-of-Thought Reasoning).
    Raises ValueError if max_penalty > 0, ngram_size < 1, or jieba is needed and not installed."""

    ngram_size: int
    max_penalty: float
    language: str = "en"

    __name__ = "repetition_penalty_reward"

    def __post_init__(self) -> None:
        if self.max_penalty > 0:
            raise ValueError(f"repetition_max_penalty must be at most 0, got {self.max_penalty}: it is a penalty")
        if self.ngram_size < 1:
            raise ValueError(f"repetition_n_grams (ngram_size) must be at least 1, got {self.ngram_size}")
        if self.language not in ("en", "zh"):
            raise ValueError(f"language of repetition_penalty must be en or zh, got {self.language!r}")
        if self.language == "zh" and importlib.util.find_spec("jieba") is None:
            raise ValueError("repetition_penalty with language zh needs jieba: run `pip install jieba`")

    def _words(self, text: str) -> list[str]:
        return text.lower().split() if self.language == "en" else list(importlib.import_module("jieba").cut(text))

    def __call__(self, completions: list, **kwargs: Any) -> list[float | None]:
        rewards: list[float | None] = []
        for text in _contents(completions):
            words = self._words(text)
            ngrams = list(zip(*(words[i:] for i in range(self.ngram_size)), strict=False))
            rewards.append((1 - len(set(ngrams)) / len(ngrams)) * self.max_penalty if ngrams else 0.0)
        return rewards


def len_reward(
    completions: list, solution: list, *, group_ids: list | None = None, **kwargs: Any
) -> list[float | None]:
    """Higher values for completions that are shorter than others of their group (Kimi k1.5, arXiv:2501.12599, 2.3.3).

    lambda = 0.5 - (length - shortest) / (longest - shortest), in characters. A correct answer gets lambda, a wrong one
    min(0, lambda), and all get 0.0 if they are equally long. A gold that cannot be parsed gives None. Fixed: lengths
    are compared only among the completions of one prompt (equal `group_ids`), not over the whole batch. Without
    group_ids all completions are one group. A call that fails leaves its whole group unscored.
    """
    groups = defaultdict(list)
    lengths = [len(text) for text in _contents(completions)]
    for group, length in zip([0] * len(lengths) if group_ids is None else group_ids, lengths, strict=True):
        groups[group].append(length)
    right = accuracy_reward(completions, solution)
    rewards: list[float | None] = []
    for i, length in enumerate(lengths):
        of_group = groups[0 if group_ids is None else group_ids[i]]
        shortest, longest = min(of_group), max(of_group)
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(None if right[i] is None else value if right[i] else min(0.0, value))
    return rewards


len_reward.batch = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class SoftOverlongPunishment:
    """DAPO's penalty on length in tokens (arXiv:2503.14476, equation 13): 0.0 up to max_completion_len -
    soft_punish_cache, then linear down to -1.0 at max_completion_len, and -1.0 beyond."""

    max_completion_len: int
    soft_punish_cache: int

    __name__ = "soft_overlong_punishment_reward"

    def __post_init__(self) -> None:
        longest, cache = self.max_completion_len, self.soft_punish_cache
        if not 0 <= cache <= longest:
            raise ValueError(f"soft_punish_cache {cache} must be between 0 and max_completion_len={longest}")

    def __call__(self, completion_ids: list, **kwargs: Any) -> list[float | None]:
        longest, cache = self.max_completion_len, self.soft_punish_cache
        rewards: list[float | None] = []
        for ids in completion_ids:
            over = len(ids) - (longest - cache)
            rewards.append(-1.0 if len(ids) > longest else -over / cache if over > 0 else 0.0)
        return rewards


# The names of open-r1's functions that make rewards.
get_code_format_reward = CodeFormatReward
get_cosine_scaled_reward = CosineScaledReward
get_repetition_penalty_reward = RepetitionPenaltyReward
get_soft_overlong_punishment = SoftOverlongPunishment

# Name -> function that makes the reward from the script's arguments, of which it reads only those of this reward.
REWARD_FUNCS_REGISTRY: dict[str, Callable[[Any], RewardFunction]] = {
    "accuracy": lambda args: accuracy_reward,
    "format": lambda args: format_reward,
    "reasoning_steps": lambda args: reasoning_steps_reward,
    "cosine": lambda args: CosineScaledReward(
        args.cosine_min_value_wrong,
        args.cosine_max_value_wrong,
        args.cosine_min_value_correct,
        args.cosine_max_value_correct,
        args.cosine_max_len,
        tokens=getattr(args, "cosine_in_tokens", False),  # open-r1's arguments do not have it
    ),
    "repetition_penalty": lambda args: RepetitionPenaltyReward(args.repetition_n_grams, args.repetition_max_penalty),
    "tag_count": lambda args: tag_count_reward,
    "code_format": lambda args: CodeFormatReward(args.code_language),
    "length": lambda args: len_reward,
    "soft_overlong_punishment": lambda args: SoftOverlongPunishment(args.max_completion_len, args.soft_punish_cache),
}
_CODE_REWARDS = ("code", "binary_code", "ioi_code", "cf_code")


def get_reward_funcs(script_args: Any) -> list[RewardFunction]:
    """The functions that `script_args.reward_funcs` names, in order. script_args may be GRPOScriptArguments, open-r1's
    or any object: only the attributes that these functions need are read. Raises ValueError for an unknown name, or one
    given twice."""
    functions = []
    for name in script_args.reward_funcs:
        if ":" in name:
            functions.append(import_function(name, "reward"))
        elif name in REWARD_FUNCS_REGISTRY:
            functions.append(REWARD_FUNCS_REGISTRY[name](script_args))
        elif name in _CODE_REWARDS:
            raise ValueError(
                f"the reward {name!r} is not supported, because open-r1's code rewards run the model's programs "
                "in remote sandboxes (E2B, Morph, Piston): name a custom reward as module:function"
            )
        else:
            nearest = difflib.get_close_matches(name, REWARD_FUNCS_REGISTRY, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            known = ", ".join(REWARD_FUNCS_REGISTRY)
            raise ValueError(f"unknown reward {name!r}: {hint}Known: {known}; name a custom one as module:function")
    check_names(functions)
    return functions


def check_names(functions: Sequence[RewardFunction]) -> None:
    """Raise ValueError if two functions would be logged under one name."""
    names = [reward_name(function) for function in functions]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two reward functions are both named {twice[0]!r}: rename or drop one")


def is_ours(function: RewardFunction) -> bool:
    """Whether the function is one of this module's."""
    return (getattr(function, "__module__", None) or type(function).__module__) == __name__


def compares_with_gold(function: RewardFunction) -> bool:
    """Whether the function is one of this module's and needs a gold answer that can be parsed."""
    return is_ours(function) and "solution" in inspect.signature(function).parameters


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's rewards are logged."""
    if isinstance(function, partial) and not hasattr(function, "__name__"):
        return reward_name(function.func)
    return getattr(function, "__name__", None) or type(function).__name__
