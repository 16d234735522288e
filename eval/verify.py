r"""The answer checker of the rewards: pure functions that decide whether a completion's answer equals the gold answer.

math-verify parses and compares values. This module finds the answer, separates mathematics from words, and decides how
values are compared. math-verify's own settings accept wrong answers (`3t` for 3, `2^{-99}` for `2^{-98}`, equations
without real solutions), and its timeouts (SIGALRM) cannot stop code that blocks in C. Run checks that may hang in an
`eval.workers.WorkerPool`.

Only the text after the last thought (`</think>`, `</thinking>`, `<|end_of_thought|>`) of a completion is searched for
its answer. `_spans` tries these places in order:
  1. `\boxed{...}`, `\fbox{...}` or `<answer>...</answer>`: of those that are closed, the one that opens last, which
     skips the boxes of intermediate results. Boxes separated only by `,`, "and" or "or" are one answer.
  2. The text after the last `####` (GSM8K), up to the end of its line.
  3. The text after "answer is", "answer would be", "answer:", a heading "Final Answer" or 答案: the last of them
     that is followed by a sentence, or a first clause, that can be parsed.
  4. The whole text, if it is one formula and nothing else (`63`, `$\frac12$`).
A number in prose ("so she has 63 left") is not an answer, since this would reward a model for listing numbers. A text
with more than 500 characters (the longest answer of MATH-500 has 53) or 20 nested brackets is not an answer, either.

`eval/notation.py` parses the answer. An answer with words is prose: its value is its only number or formula
(`63 apples`; not `5 or 6`) or the sum of its quantities (`5 hours 30 minutes`). Without words it is mathematics: `6xy`
is a product, and only known units right after a number are units. An answer that cannot be parsed is compared as text.

`_same` compares two values with math-verify, on exact numbers. Before that, equations are compared up to a factor,
inequalities are converted to sets, and `x=1, y=2` to the values of its names. A decimal with six or more digits may be
rounded (relative error 1e-6).
If both sides have a known unit, units are converted and compared: 120 minutes equal 2 hours, 3 m do not equal 3 km. If
one side has no unit, units are ignored (15 cm^2 equals 15, as in open-r1). Other words are always ignored (5 oranges
equal 5 apples), and so is "per hour" or "per day" after money. 12 % equals 12 and 0.12, but 0.4 % equals only 0.004.
The base of a number is treated as a unit.
Not supported: a gold of words without LaTeX ("Paris") cannot be parsed; `\text{Evelyn}` and single letters can.

    PYTHONPATH=. python -c "from eval.verify import check_answer; print(check_answer('63', r'so \boxed{63}'))"
"""

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import sympy
from math_verify import verify
from sympy.core.relational import Relational

from eval.notation import DEGREE, MAX_LENGTH, PERCENT, TEMPERATURES, Answer, has_words, read

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its timeouts are off

MAX_EXPONENT = 5000  # also for arguments of factorials; larger values are compared as text
_THOUGHT = re.compile(r"</think(?:ing)?>|<\|end_of_thought\|>")
_BRACES = r"\{(?:[^{}\\]|\\.)*+\}"
for _ in range(9):  # ++ and *+ do not backtrack, so that thousands of unclosed boxes take linear time
    _BRACES = rf"\{{(?:[^{{}}\\]|\\.|{_BRACES})*+\}}"
_BOX = re.compile(rf"\\(?:boxed|fbox)\s*+(?:{_BRACES}|(?<=\s)\w)", re.DOTALL)
_AND = re.compile(r"(?:[,;$\s}]|\\(?:text|mbox)\s*\{|\\q?quad|\\[ ,;]|and|or|\b[a-z]\s*=)+")
_ANCHOR = re.compile(
    r"(?i:\banswer\b|\bcorrect (?:option|choice)\b)[^.\n]{0,60}?(?:\b(?:is|(?:would|must|should|will) be)\b|[:=])[\s:]*"
    r"|(?im:^[#* ]{0,8}(?:final )?answer[*: ]{0,8}\n)[\s*]*|答案[是为：:\s]*"
)
_SENTENCE_END = r"(?<!\\)[.!?](?:\s|$)|\n"
_CLAUSE_END = rf"{_SENTENCE_END}|, (?!and\b|or\b)[a-z]{{2,}}| (?:because|since|as|so|for)\b| \((?=[a-z])"
_BRACKET = re.compile(r"[(\[]|\\\{")
_DECIMAL = re.compile(r"-?(\d*)\.(\d+)")


def _last_boxed(text: str) -> tuple[int, str]:
    r"""The start of the last closed `\boxed{...}`, and its content, joined with that of the boxes directly before it;
    (-1, "") if there is none. The content of a nested box takes precedence."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return -1, ""
    first = len(boxes) - 1
    while first and _AND.fullmatch(text[boxes[first - 1].end() : boxes[first].start()][:100]):
        first -= 1
    contents = [re.sub(r"^\\(?:boxed|fbox)\s*\{?|\}$", "", box[0]) for box in boxes[first:]]
    content = ", ".join(dict.fromkeys(contents))
    return boxes[-1].start(), _last_boxed(content)[1] or content


def _spans(text: str) -> Iterator[str]:
    """Candidate texts for the answer, the most likely first: the marked answer, then the sentence and the first clause
    after each anchor, from the last anchor to the first."""
    boxed_at, boxed = _last_boxed(text)
    # Not a regular expression: a lazy one takes quadratic time if many tags are not closed.
    before, opened, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
    tagged = tagged.partition("</answer>")[0]  # the tag may be closed twice
    if boxed_at >= (len(before) if opened else 0):
        yield boxed
        text = boxed
    elif opened:
        yield tagged
        text = tagged
    elif "####" in text:
        text = text.rpartition("####")[2].strip()
        if not _ANCHOR.match(text):
            yield text.partition("\n")[0]
    for anchor in list(_ANCHOR.finditer(text))[:-20:-1]:
        rest = re.sub(r"^(?:\$\$|\\\[)\s*", "$", text[anchor.end() :][:MAX_LENGTH])
        for end in _SENTENCE_END, _CLAUSE_END:
            yield re.split(end, rest, maxsplit=1)[0]


def _best(spans: list[str]) -> Answer | None:
    """The first span that is mathematics, else the first one that can be parsed."""
    answers = [answer for answer in map(read, spans) if answer]
    return next((answer for answer in answers if not isinstance(answer.value, str)), answers[0] if answers else None)


@lru_cache(maxsize=1024)  # the G completions of a prompt have the same gold
def parse_gold(text: str) -> Answer | None:
    """Parse a gold answer: a marked answer as in a completion, else the whole text as a number or formula (`63`,
    `x^2+1`), else the last formula in it. None if there is none."""
    spans = list(_spans(text))
    found = _best(spans or [text])
    if not spans and (not found or isinstance(found.value, str)):
        formulas = re.findall(r"\$([^$]+)\$", text)
        return read(formulas[-1]) if formulas else found if re.search(r"[\d\\]", text) else None
    return found


def gold_is_parseable(text: str) -> bool:
    """Whether completions can be compared with this gold; remove rows whose gold cannot be parsed. Parsing can hang, so
    call this in a `WorkerPool` on unknown data."""
    return bool(parse_gold(text))


def parse_answer(text: str) -> Answer | None:
    """Find and parse the answer of a completion, see the module docstring; None if there is none."""
    text = _THOUGHT.split(text)[-1].strip()
    return _best(list(_spans(text)) or ([] if has_words(text) else [text]))


def _equations(value: Any) -> dict:
    """{left side: right side} of an equation, a chain a = b = 5, or a list of equations; {} for anything else."""
    parts = list(getattr(value, "_unsorted_args", [value]))
    if not all(isinstance(part, sympy.Eq) for part in parts):
        return {}
    if isinstance(value, sympy.And):
        return {parts[0].lhs: parts[-1].rhs}
    if isinstance(parts[0].lhs, sympy.Tuple):  # (x, y) = (1, 2)
        return dict(zip(parts[0].lhs, parts[0].rhs.args, strict=False))
    found: dict = {}
    for part in parts:
        found.setdefault(part.lhs, []).append(part.rhs)
    return {name: sympy.FiniteSet(*values) if len(values) > 1 else values[0] for name, values in found.items()}


def _solutions(value: Any) -> Any:
    """Convert inequalities in one variable to the set of their solutions; return other values unchanged."""
    parts = list(getattr(value, "_unsorted_args", [value]))
    if all(isinstance(part, Relational | sympy.And) for part in parts) and len(value.free_symbols) == 1:
        sets = [sympy.And(part).as_set() for part in parts]
        both = sympy.Intersection(*sets)
        return sympy.Union(*sets) if both.is_empty else both
    return value


def _is_name(value: sympy.Expr) -> bool:
    """Whether an equation with this left side gives it a value: x, f(x), AB, dy/dx, a + b, 60 + 3; not xy or 2x."""
    names = [str(name) for name in value.free_symbols]
    has_number = not value.atoms(sympy.Number) <= {sympy.S.NegativeOne}
    return not names or not (has_number or (value.is_Mul and any(name.islower() and len(name) == 1 for name in names)))


def _same(gold: Any, answer: Any) -> bool:
    """Whether two parsed values are equal."""
    if isinstance(answer, sympy.FiniteSet) and len(getattr(answer, "_unsorted_args", ())) > len(answer):  # 8, 8: not 8
        return bool(gold == answer)
    named = [_equations(side) for side in (gold, answer)]
    if all(named):
        if named[0].keys() == named[1].keys():
            return all(_same(value, named[1][name]) for name, value in named[0].items())
        zeros = [sympy.fraction(sympy.together(a - b))[0] for equations in named for a, b in equations.items()]
        factor = sympy.simplify(zeros[0] / zeros[1])
        return bool(len(zeros) == 2 and factor.is_number and factor.is_finite and not factor.is_zero)
    plain = []
    for side, equations in zip((gold, answer), named, strict=True):
        if not all(map(_is_name, equations)):
            return False
        values = [equations[name] for name in sorted(equations, key=str)] or [side]
        value = _solutions(values[0]) if len(values) == 1 else sympy.Tuple(*values)
        plain.append(value if isinstance(value, sympy.FiniteSet) else value.doit())
    return verify(*plain, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)


def _is_rounded(exact: sympy.Expr, decimal: sympy.Expr, text: str, ratio: sympy.Expr) -> bool:
    """Whether `decimal`, which has six or more digits, is `exact` rounded (relative error 1e-6). `ratio` is the
    decimal's unit divided by the other's. An `exact` that terminates within these digits must match exactly."""
    match = _DECIMAL.fullmatch(text.removesuffix("%"))
    if not match or len((match[1] + match[2]).lstrip("0")) < 6 or not exact.is_number or exact.is_infinite:
        return False
    exact = exact / ratio
    return bool(abs(exact - decimal) <= abs(exact) / 10**6 and not (exact * 10 ** len(match[2])).is_integer)


def _is_too_big(value: Any) -> bool:
    """Whether the value contains a power or factorial that is too big to compute. Inner ones are checked first."""
    return any(
        isinstance(part, sympy.Pow | sympy.factorial) and part.args[-1].is_number and abs(part.args[-1]) > MAX_EXPONENT
        for part in sympy.postorder_traversal(value)
    )


def _comparable(gold: Answer, answer: Answer) -> bool:
    """Whether both are of the same kind: the same brackets, both ratios or neither, and units that convert into each
    other. Units are not compared if one side has none."""
    brackets = {match[0] for match in map(_BRACKET.match, (gold.text, answer.text)) if match}
    are_sets = isinstance(gold.value, sympy.FiniteSet) and isinstance(answer.value, sympy.FiniteSet)
    if len(brackets) > 1 and not are_sets:
        return False
    if (":" in gold.text) != (":" in answer.text):
        return False
    units = {gold.unit, answer.unit}
    is_temperature = DEGREE in units and units & TEMPERATURES  # 20° may be 20 °C
    return 1 in units or (answer.unit / gold.unit).is_number or bool(is_temperature)


def _said(text: str) -> str:
    """Normalise an answer that is not mathematics, or too big to compute: remove markup, case, articles, plurals and
    spaces."""
    plain = re.sub(r"\\text\{([^{}]*)\}|[$()]|\{(?=\w\})|(?<=\{\w)\}", r"\1", text)
    # This applies to words only: a single letter is a choice or a variable.
    words = r"\b(?:an?|the)\s+(?=[a-z]{2})|(?<=[a-z]{3} )solutions?\b|(?<=[a-z]{3})s\b"
    return "".join(re.sub(words, "", plain.lower()).split())


def _equal(gold: Answer, answer: Answer) -> bool:
    """Whether two comparable answers are equal."""
    is_text = isinstance(gold.value, str)
    if is_text != isinstance(answer.value, str):
        return False
    if is_text or _is_too_big(gold.value) or _is_too_big(answer.value):
        return _said(gold.text) == _said(answer.text)
    ratio = answer.unit / gold.unit
    try:
        if 1 not in (gold.unit, answer.unit):
            ratios = [ratio if ratio.is_number else 1]
        elif PERCENT in (gold.unit, answer.unit):
            # 40 % may be written as 0.4, or as 40 if a percentage is asked for; but 0.4 % is not 0.4
            plain = answer.value if gold.unit == PERCENT else gold.value
            ratios = [1, ratio] if plain.is_number and abs(plain) >= 1 else [ratio]
        else:
            ratios = [1]
        return any(
            _same(gold.value, answer.value if ratio == 1 else answer.value * ratio)
            or _is_rounded(gold.value, answer.value, answer.text, ratio)
            or _is_rounded(answer.value, gold.value, gold.text, 1 / ratio)
            for ratio in ratios
        )
    except (NotImplementedError, TypeError, ValueError):  # sympy cannot solve or compare them
        return False


def check_answer(gold: str, completion: str) -> float | None:
    """1.0 if the completion's answer equals the gold answer, 0.0 if it does not or is missing, None if the gold cannot
    be parsed. This may never return on malicious input: run it in a `WorkerPool`."""
    expected, given = parse_gold(gold), parse_answer(completion)
    if not expected:
        return None
    if not given:
        return 0.0
    return float(_comparable(expected, given) and _equal(expected, given))


class AnswerMetric:
    """`check_answer` as the metric of a task (`eval/tasks.py`); the score is None if the gold cannot be parsed."""

    reads_thoughts = True  # it handles thoughts itself, so that its verdicts equal the reward's

    def compute(self, doc: Any, predictions: list[str]) -> float:
        return max(self.judge(doc, text)[0] or 0.0 for text in predictions)

    def reads(self, doc: Any) -> bool:
        return gold_is_parseable(doc.get_golds()[0])

    def judge(self, doc: Any, prediction: str) -> tuple[float | None, Answer | None, list[Answer | None]]:
        gold = doc.get_golds()[0]
        return check_answer(gold, prediction), parse_answer(prediction), [parse_gold(gold)]
