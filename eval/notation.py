r"""How answers are written: `read` takes what a box, a tag or a sentence says to a sympy object.

With words in it, an answer is prose and says the one number or formula that is in it: `63 apples`,
`63\text{ km}/\text{h}`; not `5 or 6`, nor `5\text{ hours }30\text{ minutes}`. Without, it is mathematics, `6xy` a
product, of which only a listed unit right after a number is dropped. Rules rewrite the many ways to write one thing to
those that latex2sympy (math-verify's parser) reads rightly. Decimals become fractions, so that values are exact. What
does not parse is its text, and is compared as that.

    PYTHONPATH=. python -c "from eval.notation import read; print(read(r'2\frac12\text{ cm}'))"
"""

import re
from itertools import accumulate
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

MAX_LENGTH = 500  # characters of an answer

# One rule a line, applied in order: pattern, =>, replacement; ␣ is a space, ARG a group in braces, TOK what TeX takes
# for an argument without braces, UNIT a unit that may stand without \\text.
_RULES = r"""
    ∞ => \\infty␣
    ≤ => \\le␣
    ≥ => \\ge␣
    ≠ => \\ne␣
    π => \\pi␣
    √ => \\sqrt␣
    × => \\times␣
    · => \\cdot␣
    ÷ => /
    [−–] => -
    ± => \\pm␣
    ∪ => \\cup␣
    ∈ => \\in␣
    ∅|\\varnothing => \\emptyset␣
    ° => ^\\circ␣
    ² => ^2␣
    ³ => ^3␣
    。 => .
    、 => ,
    \\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.? =>
    \\(?:text)?color\s*\{\w*\}|\\(?:display|text)style(?![a-zA-Z])|` =>
    \*\*(.+?)\*\* => \1
    ^\*([^*]+)\*(?=\W*$) => \1
    (?<!\\)\\[()\[\]] => $
    \\\$|[€£¥] =>
    ^[\s*,;=]+|(?:[\s*.,;?]|\\[,;:!␣])+$ =>
    ^\$([^$]*)\$$|^([^$]*)\$([^$]*)$ => \1\2\3
    ^[\s*,;=]+|(?:[\s*.,;?]|\\[,;:!␣])+$ =>
    \s*\n\s*(?!.*\\end) => ,␣
    \\(?:math(?:rm|it|sf)|text(?:bf|it|rm|normal)|mbox|textup)\s*\{ => \\text{
    ^\\(?:text|mathbf)\s*\{([^{}]*)\}$ => \1
    ^\(?([A-Z])[).:]\s+(?!and\b|or\b|\()\S.*$ => \1
    ^(\d+)(?:\\!)?\s*:(?:\\!)?\s*(\d\d)\W*(?:\\text\W*)?(?:[AaPp]\W?[Mm]\W*)?$ => \1:\2
    (?i)^(yes|no|true|false)\b[,.].*$ => \1
    # numbers
    (?<=\d)(?:,?\\[,!;:␣]|\{,\}|~)\s*(?=\d{3}(?!\d)) =>
    (?<![\d\\({,.␣])(?<!\d␣)(\d{1,3})␣(?=\d{3}(?!\d)) => \1
    (?<![\d,({])(\d{1,3}),(\d{3}),(\d{3})(?![\d,]|[^({]*\)) => \1\2\3
    (?<![\d,({])(\d{1,3}),(\d{3})(?![\d,]|[^({]*\)) => \1\2
    (\d+)\.(\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}? => \1.\2\3\3\3\3\3\3\3\3\3\3\3\3
    (\d+)\.(\d*?)(\d+?)\3+\s*(?:\\[lc]?dots|\.{3}|…) => \1.\2\3\3\3\3\3\3\3\3\3\3\3\3
    (?<=\d)\s*(?:e|E|\\text\{e\})([+-]?\d+) => \\cdot␣10^{\1}
    (?<=\d)\s*(?:\\text\{\s*)?dozen\b\s*\}? => \\cdot␣12␣
    (?<=\d)\s*(?:\\text\{\s*)?hundred\b\s*\}? => \\cdot␣10^{2}␣
    (?<=\d)\s*(?:\\text\{\s*)?thousand\b\s*\}? => \\cdot␣10^{3}␣
    (?<=\d)\s*(?:\\text\{\s*)?million\b\s*\}? => \\cdot␣10^{6}␣
    (?<=\d)\s*(?:\\text\{\s*)?billion\b\s*\}? => \\cdot␣10^{9}␣
    (?<=\d)\s*(?:\\text\{\s*)?trillion\b\s*\}? => \\cdot␣10^{12}␣
    (?<=\d)\s*(\\text\{)?\s*万 => \\cdot␣10^{4}␣\1
    (?<=\d)\s*(\\text\{)?\s*亿 => \\cdot␣10^{8}␣\1
    (?<=[\d}])\s*(?:\\text\{\s*percent\s*\}|percent\b|\\%) => %
    (?<![\d.])(\d+)␣(\d+)/(\d+) => \1\\frac{\2}{\3}
    # units right after a number; one letter is a unit where TeX keeps it apart
    (?<=[\d}])(?:\\[,;␣]|[~\s])*UNIT(?:\^?\{?\d\}?)?$ =>
    (?<=[\d}])\s*(?:\\[,;␣]|~)\s*[mgshLNJWVA](?:\^?\{?\d\}?)?$ =>
    # letters and words
    \\math(?:bf|bb)\s*\{\s*([RZNQ])\s*\} => \\mathbb{\1}
    \\(?:mathbf|boldsymbol|bm|hat|widehat|vec)\s*\{\s*\\?([a-z])(?:math)?\s*\} => \\vec{\1}
    \\mathbf\s*\{ => \\text{
    (?:,\s*)?\\text\{[\s,]*(?:and|or)[\s,]*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) => ,␣
    ^\\text\s*\{[^{}]*(?:\bis|\bare|[:=])\s*\} =>
    (^|[-+=(^{]|(?<!\\),)\s*\\text\{\s*\(?([a-zA-Z]|\d[\d.,]*)\)?\s*\} => \1\2
    \\text\{([ie])\} => \1
    (?<!\\)\\[!:;,>␣]|\\q?quad(?![a-zA-Z])|~ => ␣
    (?<![\\a-zA-Z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc)(?![a-zA-Z]{2}) => \\\1
    (?<![\\a-zA-Z])(log|ln|exp|sqrt|max|min|gcd|lcm|pi|theta|alpha|beta|infty)(?![a-zA-Z]{2}) => \\\1
    (?<!vec\{)(?<![a-zA-Z\\_])i(?![a-zA-Z=]) => I
    # operators
    \*\* => ^
    \* => \\cdot␣
    \^\s*\(([^()]*)\)|\^\s*(\d*\.\d+) => ^{\1\2}
    \\sqrt\s*\(([^()]*)\) => \\sqrt{\1}
    (\\sqrt(?:\[[^\]]*\])?)\s*TOK => \1{\2}
    \\[dtc]frac => \\frac
    \\(frac|binom)\s*TOK => \\\1{\2}
    (\\(?:frac|binom)\s*ARG)\s*TOK => \1{\2}
    \^\s*(\\(?:frac|sqrt)\s*ARG(?:ARG)?) => ^{\1}
    (\\(?:sin|cos|tan|cot|sec|csc)\s*\(?)\s*([\d.]+)\s*\^\s*\{?\\circ\s*\}? => \1{\\frac{\2\\pi}{180}}
    \^\s*\{?\s*\\circ\s*\}?\s*[CF]?|\\degrees?(?![a-z]) =>
    ^\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\})?\s*(?:\\mid|\||:)(.*)\\\}$ => \1
    ^(.*)\\pm(.*)$ => \1+\2,␣\1-\2
    (?<=[a-zA-Z])'(?![a-z]) => _{\\prime}
    \\[lc]?dots => \\tilde{z}
    \\\\\s*\\end => \\end
    (?<![a-zA-Z\\])d(?=[\\\s])(?!.*\\int) => {d}
"""
_SHORT_FOR = {
    "␣": " ",
    "ARG": r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}",
    "TOK": r"([^\s{}\\\[]|\\[a-zA-Z]+)",
    "UNIT": "(?:[ckm]m|kg|km/h|[km]ph|m/s|ft|lbs?|oz|hrs?|mins?|secs?|rad|units?|inch|feet)",
}


def _written_out(text: str) -> str:
    for short, long in _SHORT_FOR.items():
        text = text.replace(short, long)
    return text


_COMPILED = [
    (re.compile(_written_out(old), re.DOTALL), _written_out(new.strip()))
    for old, arrow, new in (line.strip().partition(" =>") for line in _RULES.splitlines())
    if arrow
]
_FULL_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)}

_PLAIN = r"[^\d$\\=<>^+{}*]"  # no mathematics
_NUMBER = r"[-+]?(?:\d*\\frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:␣?/␣?\d+)?|\.\d+)(?:\\cdot␣10\^\{\d+\}␣)?%?".replace(
    "␣", " "
)
_SENTENCE = re.compile(rf"({_PLAIN}*?)(\$[^$]+\$|(?<![\w^]){_NUMBER})((?! (?:is|are) )(?:{_PLAIN}|(?<=[a-z])\^?\d)*)")
_WITH_TEXT = re.compile(r"()((?:(?!\\text).)+?)((?:\\text\s*\{[^{}\d]*\}|\^\s*\{?-?\d\}?|[\s/.,]|\\[,;:])+)")
_CHANGES_IT = re.compile(
    r"(?i)\b(?:and|or|to|not|than|least|most|between|over|under|nor|half|twice|minus|plus|times|squared|negative)\b|,\s*(?:more|less|fewer|greater)"
)
_WORD = re.compile(r"(?<![\\a-zA-Z\d])[a-zA-Z][a-z]+(?![a-zA-Z({])|[\u4e00-\u9fff]")
_UNREADABLE = re.compile(r"(?<![_^\d])\d+\s+\d|:.*:|^\d+:\d\d$")


def is_too_much(text: str) -> bool:
    """Longer than any answer, or brackets open more than 20 deep."""
    steps = ((c in "([{") - (c in ")]}") for c in text[:MAX_LENGTH])
    return len(text) > MAX_LENGTH or max(accumulate(steps), default=0) > 20


def has_words(text: str) -> bool:
    """Whether there are letters that nobody writes as a product of variables: `apples`, not `6xy`, `abc` or `AB`."""
    for word in _WORD.findall(re.sub(r"\\(?:begin|end|operatorname)\s*\{[a-z]+\*?\}", "", text)):
        spoken = len(word) > 2 and re.search("[aeiou]", word.lower()) and [*word.lower()] != sorted({*word.lower()})
        if spoken or word in "No|no|is|of" or not word.isascii():
            return True
    return False


def _parse(text: str) -> Any:
    def as_fraction(match: re.Match) -> str:
        return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"

    if _UNREADABLE.search(text):
        return text
    formula = re.sub(r"(\d*)\.(\d+)", as_fraction, text.removesuffix("%"))
    try:
        conversion = ConversionConfig(lowercase_symbols=False)
        return latex2sympy(formula, is_real=True, normalization_config=None, conversion_config=conversion)
    except Exception:  # what latex2sympy raises for a syntax error
        return text


def read(text: str) -> list:
    """[value, text] of an answer; the value is a sympy object, or a text where it is one or does not parse; [] for an
    answer that says nothing."""
    if is_too_much(text):
        return []
    text = text.strip().translate(_FULL_WIDTH)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if "\\text" not in text and not has_words(text):
        return [_parse(text.replace("$", "")), text] if text else []
    match = (_WITH_TEXT if "\\text" in text else _SENTENCE).fullmatch(text)
    if not match or _CHANGES_IT.search(match[1] + match[3]):
        return [text, text]
    value = _parse(match[2].strip("$ "))
    return [text if isinstance(value, str) or value.free_symbols else value, match[2]]
