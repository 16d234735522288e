"""The comparison of two runs, and the page, on handwritten samples; the page is also tested in a real browser."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter

import pytest

from eval.compare import compare, main
from eval.folder import write_rows
from eval.page import page, with_math
from eval.report import pick, summarise, verdicts


def row(problem: int, score: float | None, said: str = "5", **other) -> dict:
    empty = {"sample": 0, "seed": 0, "prompt": "", "gold": "5", "length": 3, "finish_reason": "stop", "error": None}
    empty |= {"parsed_gold": "5"}
    return (
        empty
        | {
            "task": "aime24",
            "problem": problem,
            "query": f"problem {problem}",
            "score": score,
            "completion": said,
            "extracted": said,
        }
        | other
    )


def write_run(folder, *scores: float):
    (folder / "details" / "aime24").mkdir(parents=True)
    options = {"model": f"model {folder.name}", "output_dir": folder.name, "seed": len(scores), "top_p": 1.0}
    (folder / "results.json").write_text(json.dumps({"config": {"aime24": options}}))
    write_rows(folder / "details" / "aime24" / "00000.parquet", [row(i, score) for i, score in enumerate(scores)])
    return folder


def test_paired_difference(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", 1, 0, 0, 1), write_run(tmp_path / "b", 1, 1, 0, 1, 1)
    result = compare(a, b)["aime24"]
    assert (result["problems"], result["difference"], result["stderr"]) == (4, 0.25, 0.25)
    assert result["flipped"] == [("problem 1", 0.0, 1.0, 1)]
    assert compare(b, a)["aime24"]["difference"] == -0.25 and compare(a, a)["aime24"]["ci95_high"] is None
    main([str(a), str(b), "--json"])
    assert json.loads(capsys.readouterr().out)["aime24"]["ci95_low"] == pytest.approx(0.25 - 3.182 * 0.25, rel=1e-2)
    main([str(a), str(b)])
    printed = capsys.readouterr().out
    assert "A model a 50.0 %, B model b 75.0 %" in printed and "n = 4 problems in common, of 4 and 5" in printed
    assert "95 % interval" in printed and "solved  problem 1: 0.00 -> 1.00" in printed
    assert "settings that differ: seed (4, 5)\n" in printed
    with pytest.raises(SystemExit) as stopped:
        main([str(a), str(tmp_path)])
    assert stopped.value.code == 2 and "no results in" in capsys.readouterr().err


ROWS = [
    row(0, 1.0, query=r"What is $\frac{1}{2}$ of <b>ten</b>, for $5 each?"),
    row(1, 0.0, "<script>alert(1)</script>", finish_reason="length"),
    row(2, 0.0, "dunno", extracted=""),
    row(3, None, "9^9^9", extracted=None, error="timeout: took too long"),
]


def test_page_shows_every_sample_and_runs_none_of_it():
    text = page("a model", {"aime24": summarise(ROWS)}, ROWS, Counter(all=4, right=1))
    classes = re.findall(r'<article class="([a-z ]+)">', text)
    assert classes == ["right", "wrong cut", "wrong unparsed", "wrong"]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "&lt;b&gt;ten" in text
    assert "timeout: took too long" in text and "25.0 %" in text
    assert ">right 1</button>" in text and "gold <code>5</code>, from 5" in text and 'name="viewport"' in text


def test_every_verdict_has_places_in_a_long_run(tmp_path):
    rows = [row(i, float(i % 10 == 0), extracted="" if i % 10 == 1 else "5") for i in range(100)]
    write_rows(tmp_path / "a.parquet", rows)
    shown, counts = pick([tmp_path / "a.parquet"], 30)
    assert Counter(map(tuple, map(verdicts, shown))) == {("right",): 10, ("wrong",): 10, ("wrong", "unparsed"): 10}
    assert counts == {"all": 100, "right": 10, "wrong": 90, "unparsed": 10}
    assert len(pick([tmp_path / "a.parquet"], 95)[0]) == 95  # places that one kind cannot fill go to others


def test_mathematics_of_pages():
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>" in with_math(r"half: $\frac{1}{2}$")
    assert with_math("at $5 each, $10 for two; 1 < 2").count("<") == 0  # prices
    assert with_math("\\begin{align*}\nx &= 1 \\\\\ny &= 2\n\\end{align*}").count("<mtr") == 2
    # Formulas that the converter copies or refuses are shown as written.
    for bad in (
        r"$\text{<img src=x onerror=alert(1)>}$",
        r"$\text{<mi onclick='x'>y</mi>}$",
        r"$\left(1$",
        "$a & b$",
        r"$\href{javascript:alert(1)}{x}$",
        "$" + "{" * 3000 + "}" * 3000 + "$",
    ):
        assert with_math(bad) == html.escape(bad)


def test_all_of_math_500_becomes_mathml(shared):
    rows = [json.loads(line) for line in (shared / "data" / "math_500.jsonl").read_text().splitlines()]
    shown = [with_math(row["problem"]) + with_math(row["solution"]) for row in rows]
    dollars = sum(re.sub(r"<math.*?</math>|\[asy\].*?\[/asy\]", "", text, flags=re.DOTALL).count("$") for text in shown)
    print(f"{sum(text.count('<math') for text in shown)} formulas; {dollars} dollar signs left")
    assert sum(text.count("<math") for text in shown) > 5000 and dollars < 100


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(tmp_path):
    """Filters hide other samples, fractions are typeset, answers can be shown as written, and no script runs."""
    hostile = row(4, 0.0, r"$\text{<img src=x onerror=document.title='broken'>}$ and <img src=x onerror=alert(1)>")
    rows = [*ROWS, hostile]
    text = page("a model", {"aime24": summarise(rows)}, rows, Counter(all=5))
    probe = (
        "<script>const height = element => element.getBoundingClientRect().height;"
        "const fraction = document.querySelector('mfrac');"
        "const [over, under] = [...fraction.children].map(part => part.getBoundingClientRect());"
        "document.body.dataset.stacked = over.bottom <= under.top && height(fraction) > 10;"
        "const pre = document.querySelector('article:not([hidden]) pre'); const before = height(pre);"
        "document.getElementById('written').click();"
        "document.body.dataset.written = before === 0 && height(pre) > 0;</script>"
    )
    (tmp_path / "report.html").write_text(text + probe)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    for name, shown in (("all", 5), ("right", 1), ("wrong", 4), ("cut", 1), ("unparsed", 1)):
        url = f"file://{tmp_path}/report.html#{name}"
        done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=120)
        articles = re.findall(r"<article [^>]*>", done.stdout)
        assert len([article for article in articles if "hidden" not in article]) == shown, name
        assert f"{shown} shown" in done.stdout and "<title>a model</title>" in done.stdout
        assert 'data-written="true"' in done.stdout
        assert ('data-stacked="true"' in done.stdout) == (name in ("all", "right"))
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", url], capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 5000
    print(picture)
