r"""The answer checker of the rewards: is a completion's answer equal to the gold one? Pure functions.

math-verify's parser (latex2sympy) reads LaTeX; where the answer is looked for, what is no mathematics in it, and when
two values are equal is decided here. math-verify's own settings pay for wrong answers (`3t` for 3, `2^{-99}` for
`2^{-98}`, equations without real solutions), and its time limits (SIGALRM) cannot stop code that blocks in C. What may
hang runs in an `eval.workers.WorkerPool`.

Where the answer of a completion is looked for (`_spans`), first hit wins:
  0. Only the text after the last thought (`</think>`, `</thinking>`, `<|end_of_thought|>`) is read.
  1. `\boxed{...}`, `\fbox{...}` or `<answer>...</answer>`: of those that close, the one that opens last, so that an
     answer counts and not a box on the way to it. Boxes that only `,`, "and" or "or" separates are one answer.
  2. what follows the last `####` (GSM8K), to the end of its line
  3. what follows the last "answer is", "answer would be", "answer:", a heading "Final Answer" or 答案: the last of them
     after which a sentence, or its first clause, can be read
  4. the whole text, if it is one formula and nothing else (`63`, `$\frac12$`)
A number in running prose ("so she has 63 left") is no answer: it would pay a model for listing numbers. Nor is anything
of more than 500 characters (the longest of MATH-500 has 53) or 20 nested brackets.

How it is read (`_read`): with words in it, it is prose and says the one number or formula that is in it (`63 apples`; not
`5 or 6`, not `5 hours 30 minutes`); without, it is mathematics (`6xy` is a product), of which only a listed unit right
after a number is dropped. What cannot be parsed is compared as text.

How two values are compared (`_same`): expressions at sample points to 30 digits, so exactly; a decimal of six or more
digits may be rounded (relative 1e-6); lists without, tuples with their order; equations up to a factor; inequalities as
sets. Units are not compared, as in open-r1: 15 cm^2 is 15. The base of a number is, where both have one.
Left out: a gold of words without LaTeX ("Paris") is not parseable; `\text{Evelyn}` and single letters are.

    PYTHONPATH=. python -c "from eval.verify import check_answer; print(check_answer('63', r'so \boxed{63}'))"
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

MAX_LENGTH = 500  # characters of an answer
MAX_EXPONENT = 20_000  # and argument of a factorial: beyond it, values are not computed
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=False, nits=False, boxed="none")
_CONVERSION = ConversionConfig(lowercase_symbols=False)

# ------------------------------------------------------------------------------------------------ finding the answer

_THOUGHT = re.compile(r"</think(?:ing)?>|<\|end_of_thought\|>")
_ANCHOR = re.compile(
    r"(?i:\banswer\b)[^.\n]{0,60}?(?:\b(?:is|(?:would|must|should|will) be)\b|[:=])[\s:*]*"
    r"|(?i:final answer)[\s*:]*\n[\s*]*|答案[是为：:\s]*"
)
_CLAUSE = re.compile(r", (?!and\b|or\b)[a-z]{2,}| (?:because|since|as|so|for)\b| \((?=[a-z])")
_SPACE = re.compile(r"\\(?:text|mbox)\s*\{|\\q?quad|\\[ ,;]|[\s$}]")
_AND = re.compile(r"[,;]|,?(?:and|or)")


def _is_too_much(text: str) -> bool:
    """Longer than any answer, or brackets open more than 20 deep."""
    if len(text) > MAX_LENGTH:
        return True
    steps = ((c in "([{") - (c in ")]}") for c in text)
    return max(accumulate(steps), default=0) > 20


def _last_boxed(text: str) -> tuple[int, str]:
    r"""Where the last `\boxed{...}` whose braces close opens, and its content, joined to that of the boxes right before
    it; (-1, "") without one. One pass: cut text may hold thousands that do not close."""
    open_braces: list[tuple[int, int]] = []  # where `\boxed{` or `{` starts (a mere brace: -1), where it ends
    boxes: list[tuple[int, int, int]] = []  # the same, and where the content ends; a box in a box wins over it
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\boxed (\w)|\\[{}]|[{}]", text):
        if match[1]:
            boxes.append((match.start(), *match.span(1)))
        elif match[0][-1] == "{" and match[0] != "\\{":
            open_braces.append((match.start() if match[0] != "{" else -1, match.end()))
        elif match[0] == "}" and open_braces:
            start, inside = open_braces.pop()
            if start > (boxes[-1][0] if boxes else -1):
                boxes.append((start, inside, match.start()))
    first = max(0, len(boxes) - 1)
    while first and _AND.fullmatch(_SPACE.sub("", text[boxes[first - 1][2] + 1 : boxes[first][0]][:100])):
        first -= 1
    return boxes[-1][0] if boxes else -1, ", ".join(text[inside:end] for _, inside, end in boxes[first:])


def _after_anchors(text: str) -> Iterator[str]:
    """Each anchor's sentence, then its first clause; the last anchor first."""
    for anchor in reversed(list(_ANCHOR.finditer(text))):
        line = text[anchor.end() :][:MAX_LENGTH].strip().partition("\n")
        if line[0] in ("$$", "\\["):  # displayed mathematics
            line = line[2].partition("\n")
        sentence = re.split(r"[.!?](?:\s|$)", line[0])[0]
        yield sentence
        yield _CLAUSE.split(sentence)[0]


def _spans(text: str) -> Iterator[str]:
    """The places of the answer in a text, the likeliest first. A mark is the only one."""
    boxed_at, boxed = _last_boxed(text)
    # Not a regular expression: a lazy one takes quadratic time on tags that never close.
    before, opened, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
    in_box = boxed_at >= (len(before) if opened else 0)
    marked = boxed if in_box else tagged
    if not opened and not in_box:
        if "####" not in text:
            yield from _after_anchors(text)
            return
        marked = text.rpartition("####")[2].strip()
        marked = marked if _ANCHOR.match(marked) else marked.partition("\n")[0]
    yield marked
    yield from _after_anchors(marked)


def _first_read(spans: Iterator[str]) -> list:
    """The first of the spans that is mathematics, else the first that can be read at all."""
    read = [value for value in map(_read, spans) if value]
    return next((value for value in read if not isinstance(value[0], str)), read[0] if read else [])


# ----------------------------------------------------------------------------------------------------- reading a value

_CHARACTERS = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width
    | {"。": ".", "、": ",", "∞": r"\infty ", "−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "π": r"\pi ", "√": r"\sqrt ", "°": r"^\circ ", "±": r"\pm "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "²": "^2 ", "³": "^3 ", "ℝ": r"\mathbb{R}"}
)  # fmt: skip
_BRACES = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})"
_TOKEN = r"([^\s{}\\\[]|\\[a-zA-Z]+)"
_DOTS = r"(?:\\[lc]?dots|\.{3}|…)"
_UNIT = (  # what may stand without \text, right after a number
    r"(?:[ckm]m|kg|km/h|[kmg]ph|m/s|ft|lbs?|oz|hrs?|mins?|secs?|rad|deg(?:rees?)?|units?|inch(?:es)?|feet|foot|miles?|yards?|"
    r"(?:centi|milli|kilo)?met(?:er|re)s?|dollars?|cents?|hours?|minutes?|seconds?|days?|points?)"
)
_SHORT_UNIT = r"(?:\\[,; ]|~)\s*[mgshLNJWVA]"  # one letter is a unit where TeX keeps it apart
_MULTIPLIER = {"dozen": "*12", "hundred": "*10^2", "thousand": "*10^3", "million": "*10^6",
               "billion": "*10^9", "trillion": "*10^{12}"}  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det"
_NAMES = f"{_FUNCTIONS}|pi|theta|alpha|beta|infty|infinity"
_TIDY = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"\\(?:color|textcolor)\s*\{\w*\}|\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])|`+", " "),
    (r"(?<!\\)\\[()\[\]]", "$"),
    (r"\\\\\s*\\end", r"\\end"),
    (r"\\text\{\s*percent\s*\}|(?<![a-z])percent(?![a-z])|\\%", "%"),
    (r"\*\*(.+?)\*\*", r"\1"),
    (r"^\*([^*]+)\*$", r"\1"),
    (r"\\\$|[€£¥]", ""),
    (r"(?<=\d)(?:,?\\[,!;:]|\{,\}|,\\!|~|\\ )\s*(?=\d{3}(?!\d))", ""),  # 1\,000
    (r"(?<![\d\\({,. ])(?<!\d )(\d{1,3}) (?=\d{3}(?!\d))", r"\1"),
    (r"\\math(?:bf|bb)\s*\{\s*([RZNQ])\s*\}(?!\w)", r"\\mathbb{\1}"),
    (r"\\(?:mathbf|boldsymbol|bm|hat|widehat|vec)\s*\{\s*\\?([a-z])(?:math)?\s*\}", r"\\vec{\1}"),
    (r"\\(?:math(?:rm|it|sf|bf)|text(?:bf|it|rm|normal)|mbox|textup)\s*\{", r"\\text{"),
    (r"\\text\{[\s,]*(?:and|or)\s*\}|,?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ", "),
    (r"\\text\{([a-zA-Z]|\d[\d.,]*)\}", r"\1"),
)]  # fmt: skip
_MATHEMATICS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\[!:;,>]|\\q?quad|~|\\ ", " "),
    (rf"(?<![\\a-zA-Z])({_NAMES})(?![a-zA-Z]{{2}})", r"\\\1"),
    (r"\\infinity", r"\\infty"),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"(?<=\d)\s*[eE]([+-]?\d+)", r"\\cdot 10^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"(\\sqrt(?:\[[^\]]*\])?)\s*{_TOKEN}", r"\1{\2}"),
    (r"\\[dtc]frac", r"\\frac"),
    (rf"\\(frac|binom)\s*{_TOKEN}", r"\\\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{_BRACES})\s*{_TOKEN}", r"\1{\3}"),
    (rf"\^\s*(\\(?:frac|sqrt)\s*{_BRACES}{_BRACES}?)", r"^{\1}"),
    (r"(?<![\d.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"^\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\})?\s*(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x > 2} says x > 2
    (r"\\degrees?(?![a-z])", r"^\\circ"),
    (r"\\varnothing", r"\\emptyset"),
    (_DOTS, r"\\text{dots}"),
)]  # fmt: skip
_SHORT_WORDS = {"no", "is", "of", "it", "he", "we"}
_BASE = re.compile(r"[\da-zA-Z.\\{}]+\s*_\s*\{?(\d+)\}?")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z][a-z]+(?![a-zA-Z({])|[\u4e00-\u9fff]+")
_NO_PROSE = re.compile(r"\b(?:and|or|to|not|than|least|most|between|over|under|nor)\b|[=<>^+\\{}]|,(?=\s*[\d$])")
_SAID = re.compile(r"\$[^$]*\$|(?<![\w^.])[-+]?(?:\d+:\d\d|\d[\d,]*(?:\.\d+)?(?: ?/ ?\d+)?|\.\d+)%?")
_NAMED = re.compile(r"(?:\\(?:angle|triangle|overline|frac)\s*)?[\w\s{}/\\'|]+(?:\([\w\s,]*\))?")


def _has_words(text: str) -> bool:
    """Whether there are letters that nobody writes as a product of variables: `apples`, not `6xy`, `abc` or `sin x`."""
    for word in _WORD.findall(re.sub(r"\\(?:begin|end|operatorname)\s*\{[a-z]+\*?\}", "", text)):
        ascending = all(a < b for a, b in zip(word, word[1:], strict=False))
        spoken = len(word) > 2 and not ascending and re.search("[aeiou]", word.lower())
        if ord(word[0]) > 0x4DFF or word.lower() in _SHORT_WORDS or (spoken and not re.fullmatch(_NAMES, word)):
            return True
    return False


def _repeating(match: re.Match) -> str:
    r"""`0.1\overline{6}` or `0.166\ldots` as a fraction."""
    whole, fixed, block = (part or "" for part in match.groups())
    nines = (10 ** len(block) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + block) - int(whole + fixed)}}}{{{nines}}}"


_REPEATING = [
    re.compile(r"(\d+)\.(\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}?"),
    re.compile(rf"(\d+)\.(\d*?)(\d+?)\3+\s*{_DOTS}"),
]


def _parse(text: str) -> Any:
    """A formula as a sympy object, or as text where it does not parse."""
    shown, text = text, text.removesuffix("%").strip()
    text = re.sub(rf"(?<=[\d}}])(?:(?:\\[,; ]|[~\s])*{_UNIT}|{_SHORT_UNIT})(?:\^?\{{?\d\}}?)?$", "", text)
    for pattern in _REPEATING:
        text = pattern.sub(_repeating, text)
    if r"\pm" in text:
        text = text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-")
    for pattern, replacement in _MATHEMATICS:
        text = pattern.sub(replacement, text)
    in_degrees = bool(re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text))
    if "(" not in text and "\\{" not in text:
        text = re.sub(r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda match: match[1].replace(",", ""), text)
    if not in_degrees:
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*[CF]?", "", text)
    if "\\int" not in text:
        text = re.sub(r"(?<![a-zA-Z\\])d(?=[\\\s])", "{d}", text)  # no differential
    if re.search(r"(?<![_^\d])\d+\s+\d|:.*:", text):
        return shown
    try:
        return latex2sympy(
            text, is_real=True, convert_degrees=in_degrees, normalization_config=None, conversion_config=_CONVERSION
        )
    except Exception:  # what latex2sympy raises for a syntax error
        return shown


def _quantity(said: str, words: str) -> Any:
    """The number that is said, times the "million" that follows; None if the words make it something else."""
    if _NO_PROSE.search(words):
        return None
    if ":" in said:
        return said
    factor = next((by for name, by in _MULTIPLIER.items() if re.match(rf"\W*{name}", words)), "")
    value = _parse(f"({said}){factor}" if factor else said)
    return None if isinstance(value, str) or value.free_symbols else value


def _read(text: str) -> list:
    """[value, text] of an answer: a sympy object, or a text where it is one or does not parse; [] for nothing."""
    if _is_too_much(text):
        return []
    text = text.strip().translate(_CHARACTERS)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^[\s*,;=]+|(?:[\s*.,;?]|\\[,;:! ])+$", "", text)
    if "\\begin" not in text:
        text = re.sub(r"\s*\n\s*", ", ", text)
    if text.count("$") == 1 or re.fullmatch(r"\$[^$]*\$", text):
        text = text.replace("$", "").strip()
    if whole := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text):
        return _read(whole[1])
    if choice := re.match(r"\(?([A-Z])[).:]\s+\S", text):
        text = choice[1]
    if not text:
        return []
    if time := re.fullmatch(r"(\d+)\s*:\s*(\d\d)\W*(?:[AaPp]\.?[Mm]\.?)?", text):
        return [f"{time[1]}:{time[2]}", text]
    before, *parts = re.split(r"\\text\s*\{([^{}]*)\}", text)
    value: Any = None
    if parts and before.strip():  # 63\text{ km}/\text{h}
        if re.fullmatch(r"[\s/^{}\d-]*", "".join(parts[1::2])) and not re.search(r"(?<![\^{-])\d", "".join(parts[1::2])):
            value = _quantity(before, " ".join(parts[::2]))
    elif len(parts) == 2 and re.search(r"(?:is|are|[:=])\s*$", parts[0]):
        value = _parse(parts[1])
    elif not parts:
        if not _has_words(text):
            value = _parse(text.replace("$", ""))
        elif len(said := _SAID.findall(text)) == 1:
            start = text.index(said[0])
            rest = re.sub(r"(?<=[a-z])\^?\d", "", text[start + len(said[0]) :])
            if not _NO_PROSE.search(text[:start]):
                value = _quantity(said[0].strip("$"), rest)
    return [text if value is None else value, text]


# ------------------------------------------------------------------------------------------------- comparing two values


def _exact(value: sympy.Expr) -> sympy.Expr:
    """Decimals as fractions, i as the imaginary unit, an unknown function's value as a symbol."""
    value = value.xreplace({part: sympy.Symbol(str(part)) for part in value.atoms(AppliedUndef)})
    value = value.xreplace({part: sympy.Rational(str(part)) for part in value.atoms(sympy.Float)})
    return value.xreplace({part: sympy.I for part in value.free_symbols if str(part) == "i"}).doit()


def _is_too_big(value: sympy.Basic) -> bool:
    """Powers and factorials that would take for ever to compute; inner ones are looked at first."""
    return any(
        isinstance(part, sympy.Pow | sympy.factorial) and part.args[-1].is_number and abs(part.args[-1]) > MAX_EXPONENT
        for part in sympy.postorder_traversal(value)
    )


def _samples(*values: sympy.Expr) -> Iterator[list]:
    """The values of expressions to 40 digits at points, positive, of both signs, and integers; where all are finite, and
    real unless they are complex by themselves."""
    names = sorted(set().union(*(value.free_symbols for value in values)), key=str)
    dice = random.Random(0)
    is_complex = any(value.has(sympy.I) for value in values) or not names
    for low, high, by in [(1, 900, 211)] * 4 + [(-900, 900, 211)] * 6 + [(1, 12, 1)] * 4 if names else [(1, 1, 1)]:
        point = {name: sympy.Rational(dice.randint(low, high), by) for name in names}
        found = [sympy.N(value.subs(point).doit(), 40) for value in values]
        if all(x.is_number and x.is_finite and (is_complex or x.is_real) for x in found):
            yield found


def _equal(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Two expressions: at each sample point to 30 digits, a decimal beside an exact number to six."""
    decimals = [value.atoms(sympy.Float) for value in (gold, answer)]
    digits = max([len(str(x).partition("e")[0].strip("-0.").replace(".", "")) for x in set().union(*decimals)], default=0)
    gold, answer = _exact(gold), _exact(answer)
    if gold == answer:
        return True
    exact = answer if decimals[0] else gold
    rounded = bool(decimals[0]) != bool(decimals[1]) and digits >= 6 and not (exact * 10**digits).is_integer
    if gold.is_infinite or answer.is_infinite or (gold.is_Rational and answer.is_Rational and not rounded):
        return False
    tolerance = sympy.Rational(1, 10 ** (6 if rounded and not gold.free_symbols else 30))
    pairs = list(_samples(gold, answer))
    return bool(pairs) and all(abs(x - y) <= tolerance * max(abs(x), abs(y)) for x, y in pairs)


def _proportional(gold: sympy.Expr, answer: sympy.Expr, positive: bool = False) -> bool:
    """Whether one is a constant times the other, so that both are zero (or positive) at the same places."""
    gold, answer = (sympy.fraction(sympy.together(_exact(value)))[0] if not positive else _exact(value)
                    for value in (gold, answer))  # fmt: skip
    ratios = [x / y for x, y in _samples(gold, answer) if y != 0]
    return (
        gold.free_symbols == answer.free_symbols != set()
        and len(ratios) > 2
        and all(abs(ratio - ratios[0]) < 1e-25 * abs(ratios[0]) for ratio in ratios)
        and (not positive or ratios[0] > 0)
    )


def _parts(value: Any) -> list:
    """The parts of a tuple, a pair or a list, as they were written."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, sympy.Interval):
        return [value.start, value.end] if value.is_open else []
    return list(getattr(value, "_unsorted_args", value.args))


def _value(value: Any) -> Any:
    """Equations of several names as {name: value}, several values of a name as their set, inequalities as sets."""
    if isinstance(value, sympy.And) and all(isinstance(part, sympy.Eq) for part in value.args):
        value = sympy.Eq(value._unsorted_args[0].lhs, value._unsorted_args[-1].rhs, evaluate=False)
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Tuple):
        return dict(zip(value.lhs, _parts(value.rhs), strict=False))
    if isinstance(value, sympy.Eq):
        return value.rhs if isinstance(value.rhs, sympy.Set | sympy.Tuple) else value
    relations = value.args if isinstance(value, sympy.FiniteSet) else [value]
    if all(isinstance(part, sympy.Eq) for part in relations):
        named = {part.lhs: part.rhs for part in _parts(value)}
        return sympy.FiniteSet(*(part.rhs for part in relations)) if len(named) == 1 < len(relations) else named
    if all(isinstance(part, Relational | sympy.And) for part in relations) and len(value.free_symbols) == 1:
        sets = [sympy.And(part).xreplace({x: sympy.Rational(str(x)) for x in part.atoms(sympy.Float)}).as_set() for part in relations]
        both = sympy.Intersection(*sets)
        return sympy.Union(*sets) if both is sympy.S.EmptySet else both
    if isinstance(value, sympy.FiniteSet) and len(value) == 1:
        return value.args[0]
    return value


def _is_name(value: sympy.Expr) -> bool:
    """What an equation may give a value to: x, f(x), AB, dy/dx; not xy, which is a product."""
    names = [str(name) for name in value.free_symbols]
    return bool(value.is_Symbol or isinstance(value, AppliedUndef | sympy.Derivative)
                or (not value.is_Add and all(len(name) > 1 or name.isupper() for name in names)))  # fmt: skip


def _same(gold: Any, answer: Any) -> bool:
    """Whether two parsed values say the same."""
    gold, answer = _value(gold), _value(answer)
    values = gold, answer

    def both(kind: Any) -> bool:
        return all(isinstance(value, kind) for value in values)

    if both(sympy.Eq):
        if gold.lhs == answer.lhs:
            return _same(gold.rhs, answer.rhs)
        return _proportional(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
    if isinstance(answer, sympy.Eq):
        return _same(gold, answer.rhs)
    if isinstance(gold, sympy.Eq):
        return _is_name(gold.lhs) and _same(gold.rhs, answer)
    if both(dict):
        return gold.keys() == answer.keys() and all(_same(gold[name], answer[name]) for name in gold)
    if both(Relational):
        return isinstance(gold, sympy.Ne) == isinstance(answer, sympy.Ne) and gold.func.is_strict == answer.func.is_strict
    if both(sympy.Interval):
        ends = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return ends and _same(gold.start, answer.start) and _same(gold.end, answer.end)
    if both(sympy.FiniteSet):
        rest = list(answer.args)
        for part in gold.args:
            found = next((i for i, other in enumerate(rest) if _same(part, other)), None)
            if found is None:
                return False
            rest.pop(found)
        return not rest
    if any(isinstance(value, dict | sympy.Tuple) for value in values) or (both(sympy.Interval | sympy.FiniteSet)):
        first, second = _parts(gold), _parts(answer)
        return len(first) == len(second) > 1 and all(map(_same, first, second))
    if both(sympy.Set):
        return gold.doit().symmetric_difference(answer.doit()) is sympy.S.EmptySet
    if both(sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_same, gold.flat(), answer.flat()))
    return both(sympy.Expr) and _equal(gold, answer)


def _as_text(text: str) -> str:
    text = re.sub(r"\\text|\\[,;! ]|[\s{}$().]", "", text)
    return text.casefold() if text.isalpha() and len(text) > 1 else text


def _bracket(value: Any, text: str) -> str:
    if isinstance(value, sympy.Tuple | sympy.Interval):
        return text[0] if text[0] in "([" else ""
    return "{" if isinstance(value, sympy.FiniteSet) and text.startswith("\\{") else ""


# -------------------------------------------------------------------------------------------------------- what is asked


@lru_cache(maxsize=1024)  # the G completions of a prompt share their gold
def parse_gold(text: str) -> list:
    """Parse a gold answer: a marked one as in a completion, else the text as a number or formula (`63`, `x^2+1`), else
    its last formula. Returns [value, text]; [] when there is none."""
    text = text.strip()
    found = _first_read(_spans(text)) or _read(text)
    if found and isinstance(found[0], str) and not re.search(r"[\d\\$]", text):
        found = []
    formulas = re.findall(r"\$([^$]+)\$", text)
    return found or (_read(formulas[-1]) if formulas else [])


def gold_is_parseable(text: str) -> bool:
    """Whether a completion can be compared with this gold; leave out the rows where it cannot. Parsing can
    hang like checking can: call it through a `WorkerPool` on data you have not seen."""
    return bool(parse_gold(text))


def parse_answer(text: str) -> list:
    """Parse the answer of a completion, looked for as the module docstring says; [] when there is none."""
    text = _THOUGHT.split(text)[-1].strip()
    spans = list(_spans(text))
    if spans:
        return _first_read(iter(spans))
    read = _read(text)
    return [] if _has_words(text) or (read and isinstance(read[0], str) and ":" not in read[0]) else read


def check_answer(gold: str, completion: str) -> float | None:
    """1.0 if the completion's answer equals the gold one, 0.0 if it does not or there is none; None for a gold that
    cannot be parsed. May take for ever on hostile input: run it in a `WorkerPool`."""
    parsed_gold = parse_gold(gold)
    if not parsed_gold:
        return None
    answer = parse_answer(completion)
    if not answer:
        return 0.0
    values = [parsed_gold[0], answer[0]]
    texts = [parsed_gold[-1], answer[-1]]
    if any(isinstance(value, str) or _is_too_big(value) for value in values):
        said = [value if isinstance(value, str) else text for value, text in zip(values, texts, strict=True)]
        return float(_as_text(said[0]) == _as_text(said[1]))
    bases = [match[1] for match in map(_BASE.fullmatch, texts) if match]
    if len(set(bases)) > 1:
        return 0.0  # latex2sympy reads 52_8 as 52
    brackets = {_bracket(value, text) for value, text in zip(values, texts, strict=True)} - {""}
    if len(brackets) > 1:
        return 0.0
    try:
        percents = [text.endswith("%") for text in texts]
        hundredths = [value / 100 if is_percent else value for value, is_percent in zip(values, percents, strict=True)]
        return float(_same(*values) or (percents[0] != percents[1] and _same(*hundredths)))
    except Exception:
        return 0.0


class AnswerMetric:
    """`check_answer` as the metric of a task (`eval/tasks.py`): a score of None for a gold that cannot be parsed."""

    reads_thoughts = True  # itself, so that verdicts are the reward's

    def compute(self, doc: Any, predictions: list[str]) -> float:
        return max(self.judge(doc, text)[0] or 0.0 for text in predictions)

    def reads(self, doc: Any) -> bool:
        return gold_is_parseable(doc.get_golds()[0])

    def judge(self, doc: Any, prediction: str) -> tuple[float | None, list]:
        return check_answer(doc.get_golds()[0], prediction), parse_answer(prediction)
