r"""A page to read a run's answers on: problem, answer, what was extracted, verdict; filters for what went wrong.

One file that needs nothing else and no network. Mathematics between `$`, `\(` and `\[` in problems is shown as MathML
where the package latex2mathml is installed, else as it was written; answers are always shown word for word, a long
one by its end. `report.html#wrong` opens with that filter on. The samples as data are in details/.

Left out on purpose: more than `LIMIT` samples, where a browser gives up; wrong ones come first.
"""

import html
import importlib.util
import re
from typing import Any

LIMIT, LONGEST = 2000, 6000  # samples shown; characters of an answer
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d])\$([^$\n]+?)\$", re.DOTALL)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
nav { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ccc }
button { font: inherit; padding: .2rem .8rem } button.on { background: #234; color: #fff }
article { border-left: .3rem solid #b33; margin: 1.5rem 0; padding: .1rem 1rem } article.right { border-color: #2a7 }
pre { white-space: pre-wrap; background: #f5f5f2; padding: .8rem; max-height: 30rem; overflow: auto; font-size: 14px }
td, th { text-align: right; padding: .1rem .8rem } td:first-child, th:first-child { text-align: left }
.is { color: #555 } code { background: #f5f5f2; padding: 0 .3rem }
"""
_SCRIPT = """
for (const button of document.querySelectorAll('button')) button.onclick = () => {
  for (const other of document.querySelectorAll('button')) other.classList.toggle('on', other === button);
  let shown = 0;
  for (const article of document.querySelectorAll('article'))
    shown += !(article.hidden = button.dataset.show !== 'all' && !article.classList.contains(button.dataset.show));
  document.getElementById('shown').textContent = shown + ' shown';
};
document.querySelector(`[data-show=${location.hash.slice(1) || 'all'}]`).click();
"""


def page(title: str, results: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> str:
    """The page of a run: its table and its samples."""
    chosen = sorted(rows, key=lambda row: row["score"] == 1.0)[:LIMIT]
    chosen.sort(key=lambda row: (row["task"], row["problem"], row["sample"]))
    columns = ("pass@1", "pass@1_ci95_low", "pass@1_ci95_high", "cut_off", "unparsed")
    head = "".join(f"<th>{name}</th>" for name in ("task", *columns, "mean length", "problems", "samples"))
    body = "".join(
        f"<tr><td>{html.escape(task)}</td>"
        + "".join(f"<td>{100 * r[name]:.1f} %</td>" for name in columns)
        + f"<td>{r['mean_length']:.0f}</td><td>{r['problems']}</td><td>{r['samples']}</td></tr>"
        for task, r in results.items()
    )
    buttons = "".join(
        f'<button data-show="{name}">{name}</button> ' for name in ("all", "right", "wrong", "cut", "unparsed")
    )
    left_out = f" of {len(rows)}; the rest is in details/" if len(rows) > len(chosen) else ""
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><table><tr>{head}</tr>{body}</table>"
        f'<nav>{buttons}<span id="shown"></span>{left_out}</nav>'
        f"{''.join(map(_article, chosen))}<script>{_SCRIPT}</script>"
    )


def _article(row: dict[str, Any]) -> str:
    right = row["score"] == 1.0
    cut, unparsed = row["finish_reason"] == "length", row["extracted"] == ""
    classes = ["right" if right else "wrong"] + ["cut"] * cut + ["unparsed"] * unparsed
    said, gold = row["completion"], row["gold"]
    said = "[...] " + said[-LONGEST:] if len(said) > LONGEST else said
    facts = [f"{row['length']} tokens", *(["cut off"] * cut), *([row["error"]] if row["error"] else [])]
    extracted = "nothing" if unparsed else row["extracted"] or "not known"
    gold = with_math(gold) if len(gold) <= 80 else f"<details><summary>solution</summary>{with_math(gold)}</details>"
    return (
        f'<article class="{" ".join(classes)}"><h3>{html.escape(row["task"])} {row["problem"]}, '
        f"sample {row['sample']}: {'right' if right else 'wrong'}</h3><div>{with_math(row['query'])}</div>"
        f"<pre>{html.escape(said)}</pre><div>extracted <code>{html.escape(extracted[:500])}</code>, gold {gold}"
        f" <span class=is>{html.escape(', '.join(facts))}</span></div></article>"
    )


def with_math(text: str) -> str:
    """Text as HTML, its mathematics as MathML where that can be made."""
    if importlib.util.find_spec("latex2mathml") is None:
        return html.escape(text).replace("\n", "<br>")
    from latex2mathml.converter import convert

    parts, done = [], 0
    for match in _MATH.finditer(text):
        display = "block" if match[1] or match[2] else "inline"
        try:
            formula = convert(next(filter(None, match.groups())), display=display)
        except Exception:  # it refuses much that TeX takes, with errors of many kinds: shown as written
            formula = html.escape(match[0])
        parts += [html.escape(text[done : match.start()]).replace("\n", "<br>"), formula]
        done = match.end()
    return "".join(parts) + html.escape(text[done:]).replace("\n", "<br>")
