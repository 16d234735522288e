r"""The notation of answers: `read` converts the text of an answer to a sympy object and its unit.

Tables of rules rewrite the different notations of a value to one that latex2sympy (math-verify's parser) reads
correctly: characters, markup, numbers, units, words, operators, in this order. Each rule is applied to the result of
the previous one. If the result contains words, it is prose: its answer is its only number or formula with its unit, as
in `63 apples` or `63\text{ km}/\text{h}`, but not in `5 or 6`. Quantities of the same kind are added, as in
`5\text{ hours }30\text{ minutes}`. Without words it is mathematics, where `6xy` is a product. Decimals become
fractions, so that values are exact. An answer that does not parse is kept and compared as text.

    PYTHONPATH=. python -c "from eval.notation import read; print(read(r'2\frac12\text{ cm}'))"
"""

import re
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

MAX_LENGTH = 500  # characters of an answer
PERCENT = sympy.Rational(1, 100)

# One rule per line: pattern => replacement. ␣ is a space; ARG a group in braces; TOK an argument without braces as TeX
# reads it; SPACE any TeX space; NUM a number; UNIT a unit that needs no \text.

# Characters. Input: any text. Output: only characters that latex2sympy reads, and currency signs (¤ for the dollar).
_CHARACTERS = r"""
    ∞ => \\infty␣
    √ => \\sqrt␣
    · => \\cdot␣
    [–—] => -
    ° => ^\\circ␣
    ² => ^2
    ³ => ^3
    ½ => ␣1/2
    ¼ => ␣1/4
    ¾ => ␣3/4
    ∈ => \\in␣
    。 => .
    、 => ,
    \{:\} => :
    \\\$ => ¤
    (\d\.\d+)(?:\.{3}|…) => \1\\ldots␣
    ¢ => ␣cents
"""
# Markup. Output: no Markdown, sizes, colours, formula delimiters or surrounding punctuation; \text for all fonts.
_MARKUP = r"""
    \\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.? =>
    \\(?:text)?color\s*\{\w*\}|\\(?:display|text)style(?![a-zA-Z])|` =>
    \*\*(.+?)\*\* => \1
    (?<!\\)\\[()\[\]] => $
    ^\$([^$]*)\$$ => \1
    ^([^$]*)\$(?=\d)([^$]*)$ => \1¤\2
    ^([^$]*)\$([^$]*)$ => \1\2
    ^[\s*,;=]+|(?:[\s*.,;?]|\\[,;:!␣])+$ =>
    \s*\n\s*(?!.*\\end) => ,␣
    \\(?:math(?:rm|it|sf)|text(?:bf|it|rm|normal)|mbox|textup)\s*\{ => \\text{
    ^\\(?:text|mathbf)\s*\{([^{}]*)\}$ => \1
"""
# Numbers. Output: digits without separators, \overline for repeating decimals, powers of ten for words, % for percent.
_NUMBERS = r"""
    (?<=\d)(?:,?\\[,!;:␣]|\{,\}|~)\s*(?=\d{3}(?!\d)) =>
    (?<![\d\\({,.␣])(?<!\d␣)(\d{1,3})␣(?=\d{3}(?!\d)) => \1
    (?<![\d,({])(\d{1,3}),(\d{3}),(\d{3})(?![\d,]|[^({]*\)) => \1\2\3
    (?<![\d,({])(\d{1,3}),(\d{3})(?![\d,])(?=[^(){},]*(?:,\d{3}\b[^(){},]*)*=) => \1\2
    (=\s*\d{1,3}),(\d{3})$ => \1\2
    (\d+\.\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}? => \1\\overline{\2}
    (\d+\.\d*?)(\d+?)\2+\s*\\[lc]?dots => \1\\overline{\2}
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
    (?<=[\d)])\s+[xX]\s+(?=[\d.]|\([^a-zA-Z()]*\)) => \\times␣
    (?<![\d.])(\d+)␣(\d+)/(\d+) => \1\\frac{\2}{\3}
"""
# Units. Output: the unit of the whole answer in words or \text. Degrees in a formula are removed, or converted to
# radians in sin and cos. One letter is a unit if a TeX space separates it. 52_8 becomes 52 with the unit base^8, since
# latex2sympy would read it as 52.
_UNITS = r"""
    (\\?(?:sin|cos|tan|cot|sec|csc)\s*\(?)\s*([\d.]+)\s*\^\s*\{?\\circ\s*\}? => \1{\\frac{\2\\pi}{180}}
    (?<=[\d}])\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?)\s*(?:\\text\s*\{)?\s*([CF]?)\}?$ => \\text{␣degrees␣\1}
    \^\s*\{?\s*\\circ\s*\}?\s*[CF]?|\\degrees?(?![a-z]) =>
    ^([^¤=]*)¤\s*(NUM)((?:␣[^¤=\\]*)?)$ => \1\2␣dollars\3
    ^([^€=]*)€\s*(NUM)((?:␣[^€=\\]*)?)$ => \1\2␣euros\3
    ^([^£=]*)£\s*(NUM)((?:␣[^£=\\]*)?)$ => \1\2␣sterling\3
    ^([^¥=]*)¥\s*(NUM)((?:␣[^¥=\\]*)?)$ => \1\2␣yuan\3
    [¤€£¥] =>
    (?<=[\d}])\s*(?:\\text\s*\{\s*)?([AaPp])\.\s?[Mm]\.?\s*\}?$ => \\text{␣\1m}
    ^(\d[\dA-F.]*)\s*_\s*\{?(\d+)\}?$ => \1\\text{␣base}^{\2}
    (?:\bsq(?:uare)?\b|平方)\.?\s*([a-z]+|CHINESE) => \1^2
    (?:\bcu(?:bic)?\b|立方)\.?\s*([a-z]+|CHINESE) => \1^3
    (?<=[\d}])SPACE*(UNIT)(?:\^?\{?(\d)\}?)?$ => \\text{␣\1}^{\2}
    (?<=[\d}])\s*(?:\\[,;␣]|~)\s*([mgshLNJWVA])(?:\^?\{?(\d)\}?)?$ => \\text{␣\1}^{\2}
"""
# Words. Output: one letter or word for a choice, yes or no, or a time; commas for "and" and "or"; no TeX spaces; a
# backslash before functions and Greek letters; I for the imaginary unit.
_WORDS = r"""
    ^\(?([A-Z])[).:]\s+(?!and\b|or\b|\()\S.*$ => \1
    ^(\d+)(?:\\!)?\s*:(?:\\!)?\s*(\d\d)\W*(?:\\text\W*)?([AaPp])\W?[Mm]\W*$ => \1:\2\\text{␣\3m}
    ^(\d+)(?:\\!)?\s*:(?:\\!)?\s*(\d\d)$ => \1:\2
    (?i)^(yes|no|true|false)\b[,.].*$ => \1
    ,?\s*\\text\{\s*(?:for␣(?:all|any|some)|where)\b[^\d]*$ =>
    [,(]\s*[kmn]\s*\\in\s*(?:\\mathbb\s*)?\{?Z\}?\s*\)?$ =>
    \\(?:mathbf|boldsymbol|bm|hat|widehat|vec)\s*\{\s*\\?([a-z])(?:math)?\s*\} => \\vec{\1}
    \\mathbf\s*\{ => \\text{
    (?:,\s*)?\\text\{[\s,]*(?:and|or)[\s,]*\}|(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) => ,␣
    ^\\text\s*\{[^{}]*(?:\bis|\bare|[:=])\s*\} =>
    (^|[-+=(^{]|(?<!\\),)\s*\\text\{\s*\(?([a-zA-Z]|\d[\d.,]*)\)?\s*\} => \1\2
    \\text\{([ie])\} => \1
    SPACE+ => ␣
    (?<![\\a-zA-Z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc)(?![a-zA-Z]{2}) => \\\1
    (?<![\\a-zA-Z])(log|ln|exp|sqrt|max|min|gcd|lcm|pi|theta|alpha|beta|infty)(?![a-zA-Z]{2}) => \\\1
    (?<!vec\{)(?<![a-zA-Z\\_])i(?![a-zA-Z=]) => I
"""
# Operators. Output: arguments in braces, sets without the name of their element, names for signs that do not parse.
_OPERATORS = r"""
    \\varnothing => \\emptyset
    \*\* => ^
    \^\s*\(([^()]*)\)|\^\s*(\d*\.\d+) => ^{\1\2}
    \\sqrt\s*\(([^()]*)\) => \\sqrt{\1}
    (\\sqrt(?:\[[^\]]*\])?)\s*TOK => \1{\2}
    \\[dtc]frac => \\frac
    \\(frac|binom)\s*TOK => \\\1{\2}
    (\\(?:frac|binom)\s*ARG)\s*TOK => \1{\2}
    \^\s*(\\(?:frac|sqrt)\s*ARG(?:ARG)?) => ^{\1}
    ^\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\})?\s*(?:\\mid|\||:)(?:\s*\w\s*\\in\s*\\mathbb\{R\}\s*,)?(.*)\\\}$ => \1
    (?<=[a-zA-Z])'(?![a-z]) => _{\\prime}
    \\[lc]?dots => \\tilde{z}
    (?<![a-zA-Z\\])d(?=[\\\s])(?!.*\\int) => {d}
"""
# Values of units. Each line is "value: names"; plurals in s are recognised, too.
_WORTH = """
    m: m meter metre 米
    1000*m: km kilometer kilometre 千米 公里
    m/100: cm centimeter centimetre 厘米
    m/1000: mm millimeter millimetre 毫米
    127*m/5000: in inch inche
    381*m/1250: ft foot feet
    1143*m/1250: yd yard
    201168*m/125: mi mile
    10**4*m**2: hectare 公顷
    m**3/1000: l L liter litre 升
    m**3/10**6: ml mL milliliter millilitre cc 毫升
    3785411784*m**3/10**12: gal gallon
    946352946*m**3/10**12: qt quart
    473176473*m**3/10**12: pt pint
    g: g gram 克
    1000*g: kg kilogram 千克 公斤
    g/1000: mg milligram
    10**6*g: tonne 吨
    45359237*g/10**5: lb pound
    45359237*g/16/10**5: oz ounce
    45359237*g/50: ton
    s: s sec second 秒
    60*s: min minute 分钟
    3600*s: h hr hour 小时
    86400*s: day 天
    604800*s: week 周
    month: month 月
    12*month: yr year 年
    1609344*m/3600000/s: mph
    5*m/18/s: kph kmh
    dollar: dollar USD usd
    dollar/100: cent
    euro: euro EUR
    sterling: sterling GBP
    yuan: yuan RMB 元
    radian: rad radian
    pi*radian/180: deg degree 度
    celsius: C celsius
    fahrenheit: F fahrenheit
    newton: N newton
    joule: J joule
    watt: W watt
    volt: V volt
    ampere: A amp ampere
    base: base
    am: am Am
    pm: pm Pm
"""
_UNIT = {
    name: sympy.sympify(value)
    for value, _, names in (line.partition(": ") for line in _WORTH.splitlines())
    for name in names.split()
}
DEGREE, TEMPERATURES = _UNIT["degree"], {_UNIT["celsius"], _UNIT["fahrenheit"]}
_CHINESE = "|".join(name for name in sorted(_UNIT, key=len)[::-1] if not name.isascii())
_UNIT_WORD = re.compile(
    r"(\b(?:per|an?)\b|/|每)?\W*"
    rf"({_CHINESE}|\b(?!in [a-z])[a-zA-Z]+|[\u4e00-\u9fff])[\s^{{}}]*(-?\d{{1,2}})?"
)


_NUMBER = r"[-+]?(?:\d*\\frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:␣?/␣?\d+)?|\.\d+)(?:\\cdot␣10\^\{\d+\}␣)?%?"
_SHORT_FOR = {
    "ARG": r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}",
    "TOK": r"([^\s{}\\\[]|\\[a-zA-Z]+)",
    "SPACE": r"(?:\s|(?<!\\)\\[!:;,>␣]|\\q?quad(?![a-zA-Z])|~)",
    "NUM": _NUMBER,
    "CHINESE": f"(?:{_CHINESE})",
    "UNIT": "(?:[ckm]m|ft|(?<=␣)in|kg|m[lL]|km/h|[km]ph|m/s|lbs?|oz|hrs?|mins?|secs?|rad|units?|inch|feet)",
    "␣": " ",
}


def _written_out(text: str) -> str:
    for short, long in _SHORT_FOR.items():
        text = text.replace(short, long)
    return text


_RULES = _CHARACTERS + _MARKUP + _NUMBERS + _UNITS + _WORDS + _OPERATORS
_COMPILED = [
    (re.compile(_written_out(old), re.DOTALL), _written_out(new.strip()))
    for old, arrow, new in (line.strip().partition(" =>") for line in _RULES.splitlines())
    if arrow
]
_FULL_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)}


class Answer(NamedTuple):
    """A parsed answer: its value (a sympy object, or a text if it is one or does not parse), its unit (1: none), and
    the text that was parsed."""

    value: Any
    unit: sympy.Expr
    text: str


def unit_of(phrase: str) -> sympy.Expr:
    r"""The unit at the beginning of a phrase, in metres, grams, seconds, dollars...; 1 if it is not a known unit."""
    unit, sign = sympy.S.One, 1
    for per, name, power in _UNIT_WORD.findall(re.sub(r"\\text|\\cdot", " ", phrase)):
        known = _UNIT.get(name) or _UNIT.get(name.lower().removesuffix("s"))
        # 5 dollars per hour may be written as 5 dollars, or as 5 per hour
        if not known or (per and (unit == 1 or unit.has(_UNIT["dollar"]))):
            break
        sign = -1 if per else sign
        unit *= known ** (sign * int(power or 1))
    temperature = unit / DEGREE  # degrees Celsius
    return temperature if temperature in TEMPERATURES else unit


_PLAIN = r"[^\d$\\=<>^+{}*]"  # a character that is not mathematics
_SENTENCE = re.compile(
    rf"({_PLAIN}*?)(\$[^$]+\$|(?<![\w^]){_written_out(_NUMBER)})"
    rf"((?! (?:is|are) )(?:{_PLAIN}|(?<=[a-z\u4e00-\u9fff])\^?\d)*)"
)
_WITH_TEXT = re.compile(
    r"()((?:(?!\\text).)+?)((?:\\text\s*\{(?:[^{}\d]|\^\{?-?\d\}?)*\}|\^\s*\{?-?\d*\}?|[\s/.,]|\\[,;:]|\\cdot\b)+)"
)
_CHANGES_IT = re.compile(
    r"(?i)\b(?:and|or|to|not|than|least|most|between|over|under|nor|half|twice|minus|plus|times|squared|negative"
    r"|january|february|march|april|may|june|july|august|september|october|november|december)\b"
    r"|,\s*(?:more|less|fewer|greater)"
)
_WORD = re.compile(r"(?<![\\a-zA-Z\d])[a-zA-Z][a-z]+(?![a-zA-Z({])|[\u4e00-\u9fff]")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?) *((?<= )[a-z]\b|[a-zA-Z]{2,})")
_UNREADABLE = re.compile(r"(?<![_^\d])\d+\s+\d|:.*:|^\d+:\d\d$")


def is_too_much(text: str) -> bool:
    """Whether the text is too long for an answer, or its brackets are nested more than 20 deep."""
    steps = ((c in "([{") - (c in ")]}") for c in text[:MAX_LENGTH])
    return len(text) > MAX_LENGTH or max(accumulate(steps), default=0) > 20


def has_words(text: str) -> bool:
    """Whether the text contains words, not just products of variables: `apples`, but not `6xy`, `abc` or `AB`."""
    for word in _WORD.findall(re.sub(r"\\(?:begin|end|operatorname)\s*\{[a-z]+\*?\}", "", text)):
        spoken = len(word) > 2 and re.search("[aeiou]", word.lower()) and [*word.lower()] != sorted({*word.lower()})
        if spoken or word in "No|no|is|of" or not word.isascii():
            return True
    return False


def _parse(text: str) -> Any:
    def as_fraction(match: re.Match) -> str:
        whole, digits, period = match.groups(default="")
        value, scale = int(whole + digits + period), 10 ** len(digits)
        if period:
            value, scale = value - int("0" + whole + digits), scale * (10 ** len(period) - 1)
        return rf"\frac{{{value}}}{{{scale}}}"

    if _UNREADABLE.search(text):
        return text
    formula = re.sub(r"(\d*)\.(\d*)(?:(?<=\d)|(?=\\o))(?:\\overline\{(\d+)\})?", as_fraction, text.removesuffix("%"))
    try:
        conversion = ConversionConfig(lowercase_symbols=False)
        return latex2sympy(formula, is_real=True, normalization_config=None, conversion_config=conversion)
    except Exception:  # latex2sympy raises many types for syntax errors
        return text


def _total(text: str) -> Answer | None:
    """The sum, in the first unit, of quantities of the same kind in decreasing units, such as `2 hours and 15
    minutes`. None for other texts, such as the list `3 cm and 4 cm`."""
    plain = re.sub(r"\\(?:text|mathrm|mbox)|\\[,;:! ()]|\band\b|\*\*|[{}$~,]|\.$", " ", text)
    parts = _QUANTITY.findall(plain)
    if len(parts) < 2 or _QUANTITY.sub("", plain).strip():
        return None
    units = [unit_of(name) for _, name in parts]
    ratios = [smaller / larger for larger, smaller in pairwise(units)]
    if units[0] == 1 or not all(ratio.is_number and ratio < 1 for ratio in ratios):
        return None
    total = sum(sympy.Rational(number) * unit for (number, _), unit in zip(parts, units, strict=True)) / units[0]
    return Answer(total, units[0], text)


def read(text: str) -> Answer | None:
    """Parse the text of an answer; None if it contains none."""
    if is_too_much(text):
        return None
    text = text.strip().translate(_FULL_WIDTH)
    if total := _total(text):
        return total
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = text.strip()
    formula, phrase = text.replace("$", ""), ""
    if "\\text" in text or has_words(text):
        match = (_WITH_TEXT if "\\text" in text else _SENTENCE).fullmatch(text)
        if not match or _CHANGES_IT.search(match[1] + match[3]):
            return Answer(text, sympy.S.One, text)
        formula, phrase = match[2].strip("$ "), match[3]
    value, unit = _parse(formula), PERCENT if formula.endswith("%") else unit_of(phrase)
    return Answer(value, unit, formula) if text else None
