r"""LightEval's answer metrics: its extraction rules on top of math-verify. They follow LightEval's verdicts.

A metric finds answers with regular expressions, each with a priority. The lowest number wins, and among its matches the
last one in the text. math-verify converts the match to sympy and compares it with the gold. Since math-verify was
derived from LightEval, only the rules that differ are here: a space before a colon, percentages, thousands, lists
joined by "and", choice letters. The names are LightEval's. Its questionable rules are kept (any number in the text is
an answer if nothing better is found), so that scores are comparable. Rewards use `eval.verify` instead.

Not supported, on purpose: languages other than English, and LightEval's timeouts (SIGALRM, which C code ignores); call
`judge` through an `eval.workers.WorkerPool` instead. This module does not import torch.

    PYTHONPATH=. python -c "from eval.metrics import *; from eval.tasks import Doc; \
        print(latex_gold_metric.compute(Doc(query='', choices=['\$1/2\$']), ['so \$0.5\$']))"
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from string import ascii_uppercase
from typing import Any
from unittest.mock import patch

import math_verify.parser
from latex2sympy2_extended import NormalizationConfig, math_normalization
from math_verify import verify
from math_verify.grader import is_equation, take_last_relation
from math_verify.parser import extract_target_from_pred, make_latex_env_pattern
from sympy import And, Symbol, UnevaluatedExpr

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its timeouts are off

# LightEval's parser removes units in \text only; math-verify's would also remove the t of 3t and the h of 2\pi h.
_NO_BARE_UNIT = re.compile(r"(?!)()")  # never matches; math-verify needs its group
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all")


class Language(Enum):
    """The supported languages of answers."""

    ENGLISH = "english"


@dataclass(frozen=True)
class ExprExtractionConfig(math_verify.parser.ExprExtractionConfig):
    """Plain numbers and arithmetic: `12`, `1,234.5`, `3/4`, `50%`."""


@dataclass(frozen=True)
class LatexExtractionConfig(math_verify.parser.LatexExtractionConfig):
    r"""LaTeX between delimiters, and `\boxed{}` with its own priority (0: before everything else; -1: never)."""

    boxed_match_priority: int = 55
    normalization_config: NormalizationConfig = field(default=_NORMALIZATION)


@dataclass(frozen=True)
class IndicesExtractionConfig:
    """The letters (or numbers) of a question's choices."""

    prefix_for_extraction: str = "NativeLetters"
    try_extract_without_anchor: bool = False

    def __post_init__(self) -> None:
        if self.prefix_for_extraction not in ("NativeLetters", "Letters", "Numbers"):
            raise ValueError(
                f"unknown prefix_for_extraction {self.prefix_for_extraction!r}: use NativeLetters, Letters or Numbers"
            )


Target = ExprExtractionConfig | LatexExtractionConfig | IndicesExtractionConfig
Patterns = list[tuple[re.Pattern[str], int]]
_CURRENCY = re.escape("$€£¥₹₽₪₩₫฿₡₢₣₤₥₦₧₨₭₮₯₰₱₲₳₴₵₶₷₸₺₻₼₾₿")


def _anchored(value: str, before: str = r"\s*") -> list[tuple[str, int]]:
    """Patterns, with priorities, for `value` after phrases that announce a final answer."""
    return [
        (rf"(?i:final answer is):?\s*{value}\.?\s?I hope", 0),
        (rf"(?i:final answer.{{0,100}}?)\s+is:?{before}{value}", 50),
    ]


@lru_cache
def _expr_patterns(config: ExprExtractionConfig) -> Patterns:
    digits = "[0-9]"  # not \d, which matches digits of other scripts that sympy refuses
    number = (
        rf"(?:(?P<integer1>-?{digits}{{1,3}}(?:[ ,]{digits}{{3}})+)(?P<decimal1>\.{digits}+)?"
        rf"|(?P<integer2>-?{digits}+)(?P<decimal2>[.,]{digits}+)|(?P<decimal3>\.{digits}+)|(?P<integer3>-?{digits}+))"
        r"(?P<percent>\s*(?:%|[Pp]ercent|\s*[Pp]ercentage|\s*[Pp]ct))?"
    )
    operators = r"\+\-\*×/\^\(\)÷"
    formula = rf"(?P<expr>-?\(?-?[0-9][0-9.\s{operators}]*[{operators}][0-9.\s{operators}]+\)?)"
    start = r"(?:^|\s|=)(?:\*\*)?"
    formula = rf"(?:{start}{formula}(?:\*\*)?(?:[.,\s)$]|\s?:|$))"
    number = rf"(?:{start}[{_CURRENCY}]?{number})"  # without an end, so that 100m2 is found
    value = rf"(?:{formula}|{number})"
    after = rf"(?:.{{0,100}}=\s*|.{{0,50}}?){value}(?!\s*=)"
    patterns = [*_anchored(value, ""), (rf"(?i:answer)\s?:{after}", 100), (rf"(?i:answer){after}", 200)]
    if config.try_extract_without_anchor:
        patterns += [(formula, 300), (number, 300)]
    return [(re.compile(pattern), priority) for pattern, priority in patterns]


@lru_cache
def _latex_patterns(config: LatexExtractionConfig) -> Patterns:
    def up_to_six(context: Any) -> str:
        return make_latex_env_pattern("first_", context) + "".join(
            rf"(?:\s*(?:and|or|,)\s*{make_latex_env_pattern(f'next{i}_', context)})?" for i in range(1, 6)
        )

    value = f"(?:{up_to_six('plain')})"
    after = rf".{{0,50}}?{value}"
    patterns = [*_anchored(value), (rf"(?i:answer)\s?:{after}", 100), (rf"(?i:answer){after}", 200)]
    if config.try_extract_without_anchor:
        patterns.append((value, 300))
    if config.boxed_match_priority >= 0:
        # The pattern `bare` matches the last box, and the boxes before it that only "and", "or" or a comma separates;
        # the normalisation finds its end. Without it, the normalisation would join any boxes with a comma between them.
        bare = r"(?P<first_latexBoxed>\\boxed{(?:(?!\\boxed).|\}\s*(?:and|or|,)\s*\\boxed)+})(?!.*\\boxed{.*})"
        patterns += [(up_to_six("boxed"), config.boxed_match_priority), (bare, config.boxed_match_priority)]
    return [(re.compile(pattern, re.DOTALL), priority) for pattern, priority in patterns]


@lru_cache
def _index_patterns(config: IndicesExtractionConfig, choices: int) -> Patterns:
    names = [str(i + 1) for i in range(choices)] if config.prefix_for_extraction == "Numbers" else ascii_uppercase
    value = rf"(?:(?P<bracket>\()?(?P<string_keys>{'|'.join(names[:choices])})(?(bracket)\)))"
    end = r"(?:\*\*)?(?:[., ]|\s?:|$)"
    alone = rf"(?:^| )(?:\*\*)?{value}{end}"
    patterns = [
        *_anchored(value),
        (rf"(?i:answer)\s?:.{{0,50}}?{alone}", 100),
        (rf"(?i:answer).{{0,50}}?{alone}", 150),
        (rf"^(?:\*\*)?{value}{end}", 200),
        (rf"\n(?:\*\*)?{value}{end}", 210),
    ]
    if config.try_extract_without_anchor:
        patterns += [(alone, 250), (value, 300)]
    return [(re.compile(pattern), priority) for pattern, priority in patterns]


# With this target math-verify returns the group `string_keys` unchanged.
_LETTERS = math_verify.parser.StringExtractionConfig(lowercase=False)


@dataclass(frozen=True)
class ExtractiveMatch:
    """A metric. Create it with `multilingual_extractive_match_metric` and call `compute(doc, predictions)`."""

    gold_extraction_target: tuple[Target, ...]
    pred_extraction_target: tuple[Target, ...]
    aggregation_function: Callable[[list[float]], float]
    fallback_mode: str
    extraction_mode: str
    precision: int

    def extract(self, text: str, targets: Iterable[Target], choices: int) -> list:
        """The answer in `text`: sympy objects and, as the last element, the matched text; [] if there is none."""
        found: list = []
        for target in sorted(targets, key=lambda t: (not isinstance(t, IndicesExtractionConfig), not _is_latex(t))):
            if isinstance(target, IndicesExtractionConfig):
                found.append((_index_patterns(target, choices), _LETTERS))
            else:
                found.append((_latex_patterns(target) if _is_latex(target) else _expr_patterns(target), target))
        with patch.object(math_normalization, "units_regex", _NO_BARE_UNIT):
            values = extract_target_from_pred(text, found, self.fallback_mode, self.extraction_mode)
        return [value if isinstance(value, str) else _as_lighteval(value) for value in values]

    def judge(self, doc: Any, prediction: str) -> tuple[float, list, list[list]]:
        """(1.0 or 0.0, what was extracted from the prediction, what was extracted from each gold answer)."""
        golds = self._golds(doc)
        if not all(golds):
            golds = [[gold] for gold in doc.get_golds()]
        answer = self.extract(prediction, self.pred_extraction_target, len(doc.choices))
        return float(any(self._equal(gold, answer) for gold in golds)), answer, golds

    def reads(self, doc: Any) -> bool:
        """Whether the metric can extract something from every right answer."""
        return all(self._golds(doc))

    def _golds(self, doc: Any) -> list[list]:
        return [self.extract(gold, self.gold_extraction_target, len(doc.choices)) for gold in doc.get_golds()]

    def _equal(self, gold: list, answer: list) -> bool:
        if _differ_in_case(gold, answer):
            return False
        if verify(gold, answer, float_rounding=self.precision, timeout_seconds=None):
            return True
        # Symbols may differ only in sympy's assumptions, like the i of `3 + 4i` and `3+4\\,i`.
        values = [[str(value) for value in side if not isinstance(value, str)] for side in (gold, answer)]
        return bool(set(values[0]) & set(values[1]))

    def compute(self, doc: Any, predictions: Sequence[str]) -> float:
        """Aggregate the scores of the predictions: 1.0 for a right one, 0.0 for a wrong one. This may never return on
        malicious input."""
        return self.aggregation_function([self.judge(doc, text)[0] for text in predictions])


def _as_lighteval(value: Any) -> Any:
    """Convert a percentage to its value (math-verify would also accept 15 % for 15), and `a = b = 5` to 5."""
    if isinstance(value, And) and is_equation(value):
        return take_last_relation(value).rhs
    return value.doit() if value.has(UnevaluatedExpr) else value


def _differ_in_case(gold: list, answer: list) -> bool:
    """Whether the answers differ only in case: x is not X. latex2sympy makes all symbols lower-case, so this compares
    the matched texts if they contain symbols. A word in \\text may be answered without \\text: `Even` (a product) for
    `\\text{even}` (a symbol)."""
    if not gold or not answer or not getattr(answer[0], "free_symbols", False):
        return False
    if isinstance(gold[0], Symbol) != isinstance(answer[0], Symbol):
        return False
    first, second = (re.sub(r"\\(?:text|mathrm|mbox)\b|[\s{}$\\]", "", str(side[-1])) for side in (gold, answer))
    return first != second and first.lower() == second.lower() != "e"


def _is_latex(target: Target) -> bool:
    return isinstance(target, LatexExtractionConfig)


def multilingual_extractive_match_metric(
    language: Language = Language.ENGLISH,
    gold_extraction_target: Sequence[Target] = (ExprExtractionConfig(),),
    pred_extraction_target: Sequence[Target] = (ExprExtractionConfig(), LatexExtractionConfig()),
    aggregation_function: Callable[[list[float]], float] = max,
    fallback_mode: str = "first_match",
    extraction_mode: str = "any_match",
    precision: int = 6,
) -> ExtractiveMatch:
    """LightEval's metric of that name.

    fallback_mode: with "first_match" the first matched text is also compared as text; with "no_fallback" it is not.
    extraction_mode: with "any_match" later matches are tried if the first one cannot be parsed; "first_match" stops.
    precision: number of decimals that two numbers must share if one of them is written as a decimal.
    """
    if getattr(language, "name", "").upper() != "ENGLISH":
        raise ValueError(f"answers can be extracted from English only, not {language}: use Language.ENGLISH")
    if fallback_mode not in ("first_match", "no_fallback") or extraction_mode not in ("first_match", "any_match"):
        raise ValueError(
            f"fallback_mode must be first_match or no_fallback, got {fallback_mode!r}, and extraction_mode first_match "
            f"or any_match, got {extraction_mode!r}"
        )
    return ExtractiveMatch(
        tuple(gold_extraction_target),
        tuple(pred_extraction_target),
        aggregation_function,
        fallback_mode,
        extraction_mode,
        precision,
    )


_EXPR_THEN_LATEX = (ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0))
latex_gold_metric = multilingual_extractive_match_metric(
    gold_extraction_target=(LatexExtractionConfig(),), pred_extraction_target=_EXPR_THEN_LATEX, precision=5
)
expr_gold_metric = multilingual_extractive_match_metric(
    gold_extraction_target=(ExprExtractionConfig(),), pred_extraction_target=_EXPR_THEN_LATEX, precision=5
)
gpqa_metric = multilingual_extractive_match_metric(
    gold_extraction_target=(IndicesExtractionConfig(prefix_for_extraction="NativeLetters"),),
    pred_extraction_target=(IndicesExtractionConfig(prefix_for_extraction="NativeLetters"),),
    precision=5,
)


# ------------------------------------------------------------------------------------- functions that the workers run


def without_thoughts(text: str) -> str:
    """The text without `<think>...</think>`, as in LightEval. An unclosed `<think>` is kept."""
    while True:
        before, _, rest = text.partition("<think>")
        _, closed, after = rest.partition("</think>")
        if not closed:
            return text
        text = before + after


def gold_is_read(item: tuple[Any, Any]) -> bool:
    """Whether the metric of (metric, doc) can read the doc's gold; True if the metric has no method `reads`."""
    metric, doc = item
    return metric.reads(doc) if hasattr(metric, "reads") else True


def judge(item: tuple[Any, Any, str]) -> dict[str, Any]:
    """Judge (metric, doc, text): {"score", "extracted": str ("": none), "parsed_gold": str}. A metric must have
    `compute`; without `judge`, only the score is known."""
    metric, doc, text = item
    if not hasattr(metric, "reads_thoughts"):
        text = without_thoughts(text)
    if hasattr(metric, "judge"):
        score, extracted, golds = metric.judge(doc, text)
        parsed = " or ".join(str(gold[0]) for gold in golds if gold)
        return {"score": score, "extracted": str(extracted[0]) if extracted else "", "parsed_gold": parsed}
    score = float(metric.compute(doc, [text]))
    if not 0 <= score <= 1:
        raise ValueError(f"compute must return a score between 0 and 1, got {score}: correct the metric")
    return {"score": score, "extracted": None}
