r"""The HTML page of a run's answers: it shows problem, answer, extracted answer and verdict, and can filter by verdict.

The page is one file that needs no network. Formulas are shown as MathML, or as written if they cannot be converted. The
button "as written" shows the answers unchanged. Of a long answer, only the end is shown. `report.html#wrong` opens the
page with the filter "wrong". The samples as data are in details/.

Model output must not run in the reader's browser, so a converted formula is used only if it is pure MathML.

Not supported, on purpose: more than `LIMIT` samples, which browsers cannot handle; each verdict gets its share of them.
"""

import html
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert

from eval.report import table, verdicts

LIMIT, LONGEST = 1000, 4000  # samples shown; characters of an answer
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|(\\begin\{(align|equation|gather)(\*?)\}.+?\\end\{\4\5\})"  # displayed formulas
    r"|\\\((.+?)\\\)|(?<!\\)\$(?=\S)((?:\\.|[^$\\\n]|\n(?!\n))+?)(?<=\S)\$(?!\d)",  # inline formulas, as in pandoc
    re.DOTALL,
)
_NAMESPACE = "http://www.w3.org/1998/Math/MathML"
_ELEMENTS = set(
    "math mrow mi mo mn mtext ms mfrac msqrt mroot msup msub msubsup mover munder munderover mtable mtr mtd mspace "
    "mstyle mpadded mphantom menclose".split()
)
_ATTRIBUTES = set(
    "display displaystyle scriptlevel mathvariant mathsize mathcolor mathbackground stretchy fence separator form "
    "accent accentunder largeop movablelimits symmetric lspace rspace minsize maxsize width height depth voffset "
    "linethickness bevelled notation columnalign rowalign columnspacing rowspacing columnlines rowlines frame "
    "framespacing".split()
)
ElementTree.register_namespace("", _NAMESPACE)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
nav { position: sticky; top: 0; z-index: 1; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ccc }
button { font: inherit; padding: .2rem .8rem } button.on { background: #234; color: #fff }
article { border-left: .3rem solid #b33; margin: 1.5rem 0; padding: .1rem 1rem; content-visibility: auto;
  contain-intrinsic-size: auto 20rem } article.right { border-color: #2a7 }
pre, .said { background: #f5f5f2; padding: .8rem; margin: .8rem 0; max-height: 30rem; overflow: auto }
pre { white-space: pre-wrap; font-size: 14px } body.written .said, body:not(.written) pre { display: none }
td, th { text-align: right; padding: .1rem .8rem } td:first-child, th:first-child { text-align: left }
.wide { overflow-x: auto } article { overflow-wrap: break-word } article > div { overflow-x: auto }
menclose { border: 1px solid #555; padding: .1rem .3rem }
.is { color: #555 } code { background: #f5f5f2; padding: 0 .3rem }
"""
_SCRIPT = """
const filters = document.querySelectorAll('[data-show]');
document.getElementById('written').onclick = event => {
  event.target.classList.toggle('on', document.body.classList.toggle('written'));
};
for (const button of filters) button.onclick = () => {
  for (const other of filters) other.classList.toggle('on', other === button);
  let shown = 0;
  for (const article of document.querySelectorAll('article'))
    shown += !(article.hidden = button.dataset.show !== 'all' && !article.classList.contains(button.dataset.show));
  document.getElementById('shown').textContent = shown + ' shown';
};
document.querySelector(`[data-show=${location.hash.slice(1) || 'all'}]`).click();
"""


def page(title: str, results: dict[str, dict[str, Any]], rows: list[dict[str, Any]], counts: Counter[str]) -> str:
    """The page of a run: its table of results and these samples. `counts`: number of samples, by verdict and in all."""
    rows = sorted(rows, key=lambda row: (row["task"], row["problem"], row["sample"]))
    names, lines = table(results)
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    buttons = "".join(
        f'<button data-show="{name}">{name} {counts[name]}</button> '
        for name in ("all", "right", "wrong", "cut", "unparsed")
    )
    left_out = f" of {counts['all']}; the others are in details/" if counts["all"] > len(rows) else ""
    return (
        f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><div class=wide><table><tr>{head}</tr>{body}</table></div>"
        f'<nav>{buttons}<button id="written">as written</button> <span id="shown"></span>{left_out}</nav>'
        f"{''.join(map(_article, rows))}<script>{_SCRIPT}</script>"
    )


def _article(row: dict[str, Any]) -> str:
    classes, said, gold = verdicts(row), row["completion"] or "", row["gold"]
    said = "[...] " + said[-LONGEST:] if len(said) > LONGEST else said
    tokens = [] if row["length"] is None else [f"{row['length']} tokens"]
    facts = [*tokens, *(["cut off"] * ("cut" in classes)), *([row["error"]] if row["error"] else [])]
    extracted = "nothing" if "unparsed" in classes else row["extracted"] or "not known"
    parsed = html.escape((row.get("parsed_gold") or "not known")[:500])
    gold = with_math(gold) if len(gold) <= 80 else f"<details><summary>solution</summary>{with_math(gold)}</details>"
    return (
        f'<article class="{" ".join(classes)}"><h3>{html.escape(row["task"])} {row["problem"]}, '
        f"sample {row['sample']}: {classes[0]}</h3><div>{with_math(row['query'])}</div>"
        f"<div class=said>{with_math(said)}</div><pre>{html.escape(said)}</pre>"
        f"<div>extracted <code>{html.escape(extracted[:500])}</code>, gold <code>{parsed}</code>, from {gold}"
        f" <span class=is>{html.escape(', '.join(facts))}</span></div></article>"
    )


def with_math(text: str) -> str:
    """The text as HTML, with its formulas as MathML if they can be converted."""
    parts, done = [], 0
    for match in _MATH.finditer(text):
        block = match[1] or match[2] or match[3]
        formula = _mathml(block or match[6] or match[7], "block" if block else "inline")
        parts += [_plain(text[done : match.start()]), formula or _plain(match[0])]
        done = match.end()
    return "".join(parts) + _plain(text[done:])


def _plain(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _mathml(tex: str, display: str) -> str | None:
    """The MathML of a formula; None if the converter fails or its output is not pure MathML (it copies `\\text`)."""
    try:
        formula = ElementTree.fromstring(convert(tex, display=display))
    except Exception:  # the converter fails on much valid TeX, with many types of errors
        return None
    for element in formula.iter():
        if not _ATTRIBUTES.issuperset(element.attrib) or element.tag.removeprefix(f"{{{_NAMESPACE}}}") not in _ELEMENTS:
            return None
    return ElementTree.tostring(formula, encoding="unicode")
