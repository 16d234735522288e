r"""The answer checker of the rewards: pure functions on top of math-verify, with open-r1's parsing policy.

math-verify's own time limits (SIGALRM) are off: they cannot stop code that blocks in C, fail outside the main thread,
and clash with a trainer's signals. What may hang runs in an `eval.workers.WorkerPool`.

Where the answer of a completion is looked for, first hit wins:
  0. Only the text after the last `</think>` is read; the whole text if there is none (open-r1 reads everything; a
     thought is no answer, and a value tried in thought must not win over the one given).
  1. `\boxed{...}` or `<answer>...</answer>`: of those that close, the one that opens last, so that an answer counts and
     not a box on the way to it. Boxes that only `,`, "and" or "or" separates are one answer of several values.
  2. what follows the last `####` (GSM8K), to the end of its line
  3. what follows the last "answer is", "answer:" or "answer =" (any case, at most 60 characters between)
  4. the whole text, if it is one formula and nothing else (`63`, `$\frac12$`)
A number in running prose ("so she has 63 left") is no answer: it would pay a model for listing numbers. Nor is anything
of more than 500 characters (the longest of MATH-500 has 53) or 20 nested brackets: math-verify takes quadratic time and
worse. A tower of powers is still for the time limit to stop.

Units are not compared, as in open-r1: 15 cm^2 is 15. The base of a number is, where both have one: 52_8 is not 52_9.
Left out: a gold of words without LaTeX ("Paris") is not parseable; `\text{Evelyn}` and single letters are.

    PYTHONPATH=. python -c "from eval.verify import check_answer; print(check_answer('63', r'so \boxed{63}'))"
"""

import logging
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its time limits are off

# open-r1's settings; a boxed expression beats every other.
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all")
_LATEX = LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION)
_LATEX_ANCHORED = LatexExtractionConfig(
    boxed_match_priority=0, normalization_config=_NORMALIZATION, try_extract_without_anchor=False
)
_EXPR, _EXPR_ANCHORED = ExprExtractionConfig(), ExprExtractionConfig(try_extract_without_anchor=False)

MAX_LENGTH = 500  # characters of an answer
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:[ ,]\d{3})+|\d+)?(?:\.\d+)?\s*%?")
_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[")
_LATEX_WORD = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_BASE = re.compile(r"[\da-zA-Z]+\s*_\s*\{?(\d+)\}?")
_SPACE = re.compile(r"\\(?:text|mbox)\s*\{|\\q?quad|\\[ ,;]|[\s$}]")
_AND = re.compile(r"[,;]|,?(?:and|or)")
_ANCHOR = re.compile(r"(?i:\banswer\b)[^.\n]{0,60}?(?:\bis\b|[:=])[\s:*]*")


def _is_too_much(text: str, longest: int = MAX_LENGTH) -> bool:
    """Longer than any answer, or brackets open more than 20 deep."""
    if len(text) > longest:
        return True
    steps = ((c in "([{") - (c in ")]}") for c in text)
    return max(accumulate(steps), default=0) > 20


def _is_formula(text: str) -> bool:
    """No words: no two letters in a row outside LaTeX commands; one line, unless it is a LaTeX environment."""
    one_line = "\n" not in text or "\\begin{" in text
    return bool(text) and one_line and not re.search(r"[^\W\d_]{2}", _LATEX_WORD.sub(" ", text))


def _parse_latex(text: str) -> list:
    return parse(text, [_LATEX], extraction_mode="first_match", parsing_timeout=None)


def _clean(text: str) -> str:
    """Without the full stop, bold marks and currency signs that math-verify would take for mathematics."""
    text = text.strip().strip("*").rstrip(". \n").replace("\\$", "").replace("\\%", "%")
    return text.replace("$", "") if text.count("$") == 1 else text


def _parse_value(text: str, longest: int = MAX_LENGTH) -> list:
    """Parse text that is a value or ends in one. A bare formula counts as LaTeX, else `2x+1` would be read as 2."""
    text = _clean(text)
    if _is_too_much(text, longest):
        return []
    if _is_formula(text) and not _DELIMITER.search(text) and not _NUMBER.fullmatch(text):
        return _parse_latex(f"${text.replace('%', chr(92) + '%')}$")
    return parse(text, [_LATEX, _EXPR], extraction_mode="first_match", parsing_timeout=None)


def _last_boxed(text: str) -> tuple[int, str]:
    r"""Where the last `\boxed{...}` whose braces close opens, and its content, joined to that of the boxes right before
    it; (-1, "") without one. One pass: cut text may hold thousands that do not close."""
    open_braces: list[tuple[int, int]] = []  # where `\boxed{` or `{` starts (a mere brace: -1), where it ends
    boxes: list[tuple[int, int, int]] = []  # the same, and where the content ends; a box in a box wins over it
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match.group()[-1] == "{" and match.group() != "\\{":
            open_braces.append((match.start() if match.group() != "{" else -1, match.end()))
        elif match.group() == "}" and open_braces:
            start, inside = open_braces.pop()
            if start > (boxes[-1][0] if boxes else -1):
                boxes.append((start, inside, match.start()))
    first = max(0, len(boxes) - 1)
    while first and _AND.fullmatch(_SPACE.sub("", text[boxes[first - 1][2] + 1 : boxes[first][0]][:100])):
        first -= 1
    return boxes[-1][0] if boxes else -1, ", ".join(text[inside:end] for _, inside, end in boxes[first:])


def _parse_marked(text: str) -> list | None:
    r"""Parse what `\boxed{}`, `<answer>` or `####` marks as the answer; None without such a mark."""
    boxed_at, boxed = _last_boxed(text)
    # Not a regular expression: a lazy one takes quadratic time on tags that never close.
    before, opened, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
    in_box = boxed_at >= (len(before) if opened else 0)
    if opened or in_box:
        content = boxed if in_box else tagged
        if _is_too_much(content):
            return []
        word = not re.search(r"\d", content) and not _DELIMITER.search(content)
        if word or (in_box and _is_formula(content.strip())):
            return _parse_latex(f"$\\boxed{{{content}}}$")
        return _parse_value(content)  # knows "63 apples"
    if "####" in text:
        return _parse_value(text.rpartition("####")[2].strip().partition("\n")[0])
    return None


@lru_cache(maxsize=1024)  # the G completions of a prompt share their gold
def parse_gold(text: str) -> list:
    """Parse a gold answer: a marked one as in a completion, else a bare number or formula (`63`, `x^2+1`), else the
    last formula or number of the text. Returns what `math_verify.verify` takes; [] when there is none."""
    marked = _parse_marked(text)
    return _parse_value(text, longest=4000) if marked is None else marked


def gold_is_parseable(text: str) -> bool:
    """Whether a completion can be compared with this gold; leave out the rows where it cannot. Parsing can
    hang like checking can: call it through a `WorkerPool` on data you have not seen."""
    return bool(parse_gold(text))


def parse_answer(text: str) -> list:
    """Parse the answer of a completion, looked for as the module docstring says; [] when there is none."""
    text = text.rpartition("</think>")[2].strip()
    marked = _parse_marked(text)
    if marked is not None:
        return marked
    *_, anchor = [None, *_ANCHOR.finditer(text)]
    if anchor:
        rest = text[anchor.end() :][:MAX_LENGTH]
        line = rest.partition("\n")[0]
        if _is_formula(_clean(line)) and not _DELIMITER.search(line):
            return _parse_value(line)
        sentence = f"The final answer is {rest}"
        targets = [_LATEX_ANCHORED, _EXPR_ANCHORED]
        return parse(sentence, targets, extraction_mode="first_match", parsing_timeout=None)
    return [] if _is_too_much(text) or not _is_formula(text) else _parse_value(text)


def check_answer(gold: str, completion: str) -> float | None:
    """1.0 if the completion's answer equals the gold one, 0.0 if it does not or there is none; None for a gold that
    cannot be parsed. May take for ever on hostile input: run it in a `WorkerPool`."""
    parsed_gold = parse_gold(gold)
    if not parsed_gold:
        return None
    answer = parse_answer(completion)
    bases = [_BASE.fullmatch(str(parsed[-1]).strip()) for parsed in (parsed_gold, answer) if parsed]
    if len(bases) == 2 and all(bases) and bases[0].group(1) != bases[1].group(1):  # type: ignore[union-attr]
        return 0.0  # math-verify reads 52_8 as 52
    # The order matters: `1 < x < 2` may be answered by `(1, 2)`, not the other way round.
    return float(verify(parsed_gold, answer, timeout_seconds=None))


class AnswerMetric:
    """`check_answer` as the metric of a task (`eval/tasks.py`): a score of None for a gold that cannot be parsed."""

    reads_thoughts = True  # itself, so that verdicts are the reward's

    def compute(self, doc: Any, predictions: list[str]) -> float:
        return max(self.judge(doc, text)[0] or 0.0 for text in predictions)

    def reads(self, doc: Any) -> bool:
        return gold_is_parseable(doc.get_golds()[0])

    def judge(self, doc: Any, prediction: str) -> tuple[float | None, list]:
        return check_answer(doc.get_golds()[0], prediction), parse_answer(prediction)
