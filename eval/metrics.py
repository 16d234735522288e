r"""Is this text's answer the gold one, as LightEval would say: its extraction rules on top of math-verify.

A metric looks for answers by regular expressions, each with a priority; the lowest number wins, in it the rightmost
match. math-verify turns what is found into sympy and compares; it grew out of LightEval, so only the rules that differ
are here: a space before a colon, percentages, thousands, lists joined by "and", choice letters. The names are
LightEval's, and so are its habits that one would do otherwise (any number in the text is an answer if nothing better
is there): a score is to be comparable. Rewards do not use this, see `eval.verify`.

Left out on purpose: languages other than English, LightEval's time limits (SIGALRM, which C code ignores): call
`judge` through an `eval.workers.WorkerPool`. Nothing here imports torch.

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

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its time limits are off

# LightEval's parser drops units in \text alone; the one here would also drop letters: the t of 3t, the h of 2\pi h.
_NO_BARE_UNIT = re.compile(r"(?!)()")  # never matches; its group is asked for
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all")


class Language(Enum):
    """Languages that answers are looked for in."""

    ENGLISH = "english"


@dataclass(frozen=True)
class ExprExtractionConfig(math_verify.parser.ExprExtractionConfig):
    """Plain numbers and arithmetic: `12`, `1,234.5`, `3/4`, `50%`."""


@dataclass(frozen=True)
class LatexExtractionConfig(math_verify.parser.LatexExtractionConfig):
    r"""LaTeX between delimiters, and `\boxed{}` at a priority of its own (0: before all else; -1: never)."""

    boxed_match_priority: int = 55
    normalization_config: NormalizationConfig = field(default=_NORMALIZATION)


@dataclass(frozen=True)
class IndicesExtractionConfig:
    """Letters (or numbers) of the choices of a question."""

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
    """`value` where English announces an answer, with priorities."""
    return [
        (rf"(?i:final answer is):?\s*{value}\.?\s?I hope", 0),
        (rf"(?i:final answer.{{0,100}}?)\s+is:?{before}{value}", 50),
    ]


@lru_cache
def _expr_patterns(config: ExprExtractionConfig) -> Patterns:
    digits = "[0-9]"  # no other scripts' digits: sympy refuses them
    number = (
        rf"(?:(?P<integer1>-?{digits}{{1,3}}(?:[ ,]{digits}{{3}})+)(?P<decimal1>\.{digits}+)?"
        rf"|(?P<integer2>-?{digits}+)(?P<decimal2>[.,]{digits}+)|(?P<decimal3>\.{digits}+)|(?P<integer3>-?{digits}+))"
        r"(?P<percent>\s*(?:%|[Pp]ercent|\s*[Pp]ercentage|\s*[Pp]ct))?"
    )
    operators = r"\+\-\*×/\^\(\)÷"
    formula = rf"(?P<expr>-?\(?-?[0-9][0-9.\s{operators}]*[{operators}][0-9.\s{operators}]+\)?)"
    start = r"(?:^|\s|=)(?:\*\*)?"
    formula = rf"(?:{start}{formula}(?:\*\*)?(?:[.,\s)$]|\s?:|$))"
    number = rf"(?:{start}[{_CURRENCY}]?{number})"  # no end is asked for, so that 100m2 is found
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
        # Bare: the last box, with those before it that only "and", "or" or a comma keeps apart; where it ends, the
        # normalisation finds out. Left alone, that joins any boxes that a comma stands between.
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


# Tells math-verify to take the group `string_keys` as it is.
_LETTERS = math_verify.parser.StringExtractionConfig(lowercase=False)


@dataclass(frozen=True)
class ExtractiveMatch:
    """A metric; make it by `multilingual_extractive_match_metric`. `compute(doc, predictions)` is its face."""

    gold_extraction_target: tuple[Target, ...]
    pred_extraction_target: tuple[Target, ...]
    aggregation_function: Callable[[list[float]], float]
    fallback_mode: str
    extraction_mode: str
    precision: int

    def extract(self, text: str, targets: Iterable[Target], choices: int) -> list:
        """What `text` answers: sympy objects and, last, the text as it was found; [] where nothing is found."""
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
        """(1.0 or 0.0, what was extracted from the prediction, what from each gold answer)."""
        golds = self._golds(doc)
        if not all(golds):
            golds = [[gold] for gold in doc.get_golds()]
        answer = self.extract(prediction, self.pred_extraction_target, len(doc.choices))
        return float(any(self._equal(gold, answer) for gold in golds)), answer, golds

    def reads(self, doc: Any) -> bool:
        """Whether something is found in every right answer."""
        return all(self._golds(doc))

    def _golds(self, doc: Any) -> list[list]:
        return [self.extract(gold, self.gold_extraction_target, len(doc.choices)) for gold in doc.get_golds()]

    def _equal(self, gold: list, answer: list) -> bool:
        if _differ_in_case(gold, answer):
            return False
        if verify(gold, answer, float_rounding=self.precision, timeout_seconds=None):
            return True
        # Symbols that differ only in what sympy assumes of them, like the i of `3 + 4i` and `3+4\\,i`.
        values = [[str(value) for value in side if not isinstance(value, str)] for side in (gold, answer)]
        return bool(set(values[0]) & set(values[1]))

    def compute(self, doc: Any, predictions: Sequence[str]) -> float:
        """The aggregate over the predictions of 1.0 for a right one, 0.0 for a wrong one. May take for ever on
        hostile input."""
        return self.aggregation_function([self.judge(doc, text)[0] for text in predictions])


def _as_lighteval(value: Any) -> Any:
    """A percentage is its hundredth (math-verify would also let 15 % pass for 15), and `a = b = 5` says 5."""
    if isinstance(value, And) and is_equation(value):
        return take_last_relation(value).rhs
    return value.doit() if value.has(UnevaluatedExpr) else value


def _differ_in_case(gold: list, answer: list) -> bool:
    """x is not X: latex2sympy has made all symbols small, so what was written is looked at, where symbols are in it. A
    word in \\text may be answered without, `Even` (a product) for `\\text{even}` (a symbol)."""
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

    fallback_mode: "first_match" also compares the first found text as text; "no_fallback" does not.
    extraction_mode: "any_match" goes on where the first match cannot be parsed; "first_match" does not.
    precision: decimals that two numbers share, where one is written as a decimal.
    """
    if getattr(language, "name", "").upper() != "ENGLISH":
        raise ValueError(f"answers can be extracted from English only, not {language}: use Language.ENGLISH")
    if fallback_mode not in ("first_match", "no_fallback") or extraction_mode not in ("first_match", "any_match"):
        raise ValueError("fallback_mode is first_match or no_fallback, extraction_mode is first_match or any_match")
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


# ------------------------------------------------------------------------------------------- what a worker is asked


def without_thoughts(text: str) -> str:
    """The text without its `<think>...</think>`, as LightEval scores it; a thought that does not end stays."""
    while True:
        before, _, rest = text.partition("<think>")
        _, closed, after = rest.partition("</think>")
        if not closed:
            return text
        text = before + after


def gold_is_read(item: tuple[Any, Any]) -> bool:
    """Whether the metric finds something to compare with, of (metric, doc); True for one that does not tell."""
    metric, doc = item
    return metric.reads(doc) if hasattr(metric, "reads") else True


def judge(item: tuple[Any, Any, str]) -> dict[str, Any]:
    """{"score", "extracted": str, "" for none, "parsed_gold": str} of (metric, doc, text); a metric needs `compute`
    alone, and then no more than the score is known."""
    metric, doc, text = item
    if not hasattr(metric, "reads_thoughts"):
        text = without_thoughts(text)
    if hasattr(metric, "judge"):
        score, extracted, golds = metric.judge(doc, text)
        parsed = " or ".join(str(gold[0]) for gold in golds if gold)
        return {"score": score, "extracted": str(extracted[0]) if extracted else "", "parsed_gold": parsed}
    score = float(metric.compute(doc, [text]))
    if not 0 <= score <= 1:
        raise ValueError(f"a score lies between 0 and 1, the metric gave {score}")
    return {"score": score, "extracted": None}
