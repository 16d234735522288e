"""Copies of evaluation problems are found in other notation, reported and removed; kills; bad input."""

import json
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eval.decontaminate import Index, main, runs, words
from eval.tasks import GPQA_QUERY
from sft_core.data.rows import load_rows
from tests import launch
from tests.eval.helpers import killed_after_a_file, refused, times, write
from tests.hub_server import HubServer


@pytest.mark.parametrize(
    "a, b",
    [
        (r"$\frac{1}{2}$", "1/2"),
        (r"\dfrac12 x", "½x"),
        (r"2\tfrac{1}{2}", "2½"),
        (r"\[x^{2}+y_{1}\]", "x² + y₁"),
        (r"10^{2}", "10²"),
        (r"\int_{0}^{1} x_1^2", "∫₀¹ x₁²"),
        (r"$1,\!000{,}000$", "1000000"),
        (r"\left(\pi r^2\right)", "(π r^2)"),
        (r"\sqrt{2}\cdot\sin\theta", "sqrt(2) * sin Θ"),
        ("Janet’s  “big”\u00a0dog—ran", "janet's big dog ran"),
        (r"5\text{ cm}", "5 cm"),
        (r"\varphi + \mathbb{R}", "φ + ℝ"),
        (r"\begin{array}{cc}1&2\\3&4\end{array}", "1, 2; 3, 4"),
        ("The square[asy]\ndraw((0,0)--(1,0));\n[/asy] shown", "the square shown"),
    ],
)
def test_notation_does_not_count(a, b):
    assert words(a) == words(b) != []


def test_what_is_said_does():
    assert words(r"\frac{1}{23}") != words(r"\frac{12}{3}") and words("x^10") != words("x^1 0")
    assert words(r"\sin 2x") != words(r"\cos 2x") and words(r"\alpha") != words(r"\beta")
    assert words("$$ \\, {}") == [] and runs("", 8) == [] and runs("a b", 8) == ["a b"]
    start = time.process_time()
    words("[asy]" * 50_000 + r"\begin{" * 50_000 + r"\frac " * 50_000 + "{,}" * 50_000 + " " * 50_000)
    assert time.process_time() - start < 2


def test_runs_of_words():
    index = Index({"long": ["one two three four", "three four five six"], "short": [r"$x+1$"]}, size=3)
    assert [m["set"] for m in index.matches("X + 1.")] == ["short"]  # too short for an n-gram: the whole text is equal
    assert index.matches("what is x + 1") == [] == index.matches("one two") == index.matches("")
    [match] = index.matches("zero two three four five six")
    assert match == {"set": "long", "problem": 1, "ngram": "three four five", "shared": 2, "of": 2}
    form = Index({"t": [f"answer the question with a letter {w} and {w} so" for w in ("red", "green", "blue")]}, size=4)
    assert form.matches("answer the question with a letter please") == []
    assert form.matches("a letter green and green so")[0]["problem"] == 1


# -------------------------------------------------------------------------------------------------------- real data


def disguise(text: str, i: int) -> str:
    """Rewrite a problem as another source would write it."""
    text = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\dfrac\1\2" if i % 2 else r"\1/\2", text)
    text = re.sub(r"\^(\d)", r"^{\1}", re.sub(r"\\(left|right)\b|[.?!]", " ", text))
    text = text.replace("$", r"\(") if i % 3 == 0 else text.replace("$", " $ ")
    return text.upper().replace("\\DFRAC", "\\dfrac") if i % 5 == 0 and "\\" not in text else text


def plain(text: str, size: int = 8) -> set[tuple]:
    """open-r1's n-grams: lower-case words separated by white space."""
    found = text.lower().split()
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}


@pytest.fixture
def planted(shared, tmp_path):
    """1,000 problems of GSM8K, of which one in twenty is replaced by a rewritten problem of MATH-500 or AIME 2024."""
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:1000]]
    math = [json.loads(line)["problem"] for line in (shared / "data" / "math_500.jsonl").read_text().splitlines()]
    aime = [json.loads(line)["problem"] for line in (shared / "data" / "aime_2024.jsonl").read_text().splitlines()]
    expected = {i: ("aime24", i % 30) if i % 100 == 0 else ("math_500", i // 2) for i in range(0, 1000, 20)}
    for i, (task, k) in expected.items():
        rows[i]["question"] = disguise((aime if task == "aime24" else math)[k], i)
    file = write(tmp_path / "rows.jsonl", rows)
    seen = set().union(*(plain(text) for text in math + aime))
    print(f"\nopen-r1's words would find {sum(bool(plain(row['question']) & seen) for row in rows)} of {len(expected)}")
    return file, expected


def arguments(shared: Path, data: Path, output: Path, *more: str) -> list[str]:
    sets = [f"aime24={shared}/data/aime_2024.jsonl", f"math_500={shared}/data/math_500.jsonl"]
    return [
        "--dataset",
        str(data),
        "--problem-column",
        "question",
        "--output_dir",
        str(output),
        "--tasks",
        "aime24,math_500",
        "--eval_dataset",
        *sets,
        *more,
    ]


def run(argv: list[str]) -> None:
    with launch.locks_released():
        main(argv)


def matches(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "matches.jsonl").read_text().splitlines()]


def test_exactly_the_planted_rows_are_found(shared, planted, tmp_path, capsys):
    file, expected = planted
    run(arguments(shared, file, tmp_path / "out", "--cleanup"))
    found = matches(tmp_path / "out")
    print(capsys.readouterr().out)
    assert {m["row"] for m in found} == set(expected)
    copies = [m for m in found if m["shared"] >= 0.6 * m["of"]]  # row 780 also has a phrase of an AIME problem
    assert {(m["row"], m["set"], m["problem"]) for m in copies} == {(i, *place) for i, place in expected.items()}
    assert len(found) <= len(copies) + 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["flagged"] == 50 and report["sets"]["aime24"] == {"problems": 30, "rows_flagged": 11}
    left, before = load_rows(str(tmp_path / "out" / "rows.parquet")), load_rows(str(file))
    assert left.features == before.features
    assert left.to_list() == [row for i, row in enumerate(before) if i not in expected]
    # with the same folder and without --cleanup, nothing is searched again
    when = next((tmp_path / "out" / "verdicts").glob("00000-*.json")).stat().st_mtime_ns
    run(arguments(shared, file, tmp_path / "out"))
    assert next((tmp_path / "out" / "verdicts").glob("00000-*.json")).stat().st_mtime_ns == when
    marked = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    assert [i for i, row in enumerate(marked) if row["contaminated_math_500"] or row["contaminated_aime24"]] == [
        *expected
    ]


def test_a_row_that_changes_is_looked_at_again(tmp_path):
    """This also holds if the fingerprint of a large data set does not change."""
    problem = "Find the number of red balls that must be left in the large urn at the end of the game."
    exam, data = write(tmp_path / "exam.jsonl", [{"problem": problem, "answer": "7"}]), tmp_path / "rows.jsonl"
    rows = [{"problem": f"Row {i} says nothing of interest.", "answer": "1"} for i in range(2500)]
    argv = ["--dataset", str(data), "--tasks", "aime24", "--eval_dataset", f"aime24={exam}", "--cleanup"]
    for flagged in (0, 1):
        write(data, rows)
        run([*argv, "--output_dir", str(tmp_path / "out")])
        assert json.loads((tmp_path / "out" / "report.json").read_text())["flagged"] == flagged
        rows[1]["problem"] = problem.upper()
    assert [match["row"] for match in matches(tmp_path / "out")] == [1]


def test_killed_and_continued(shared, tmp_path):
    data = shared / "data" / "gsm8k_train.jsonl"
    argv, files = arguments(shared, data, tmp_path / "killed"), "killed/verdicts/*.json"
    done = killed_after_a_file("eval.decontaminate", argv, tmp_path, files, tmp_path / "log.txt")
    assert 1 <= len(done) < 8 and not (tmp_path / "killed" / "report.json").exists()
    for name in ("killed", "whole"):
        run(arguments(shared, data, tmp_path / name))
    for name in ("matches.jsonl", "report.json", "rows.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert done.items() <= times(tmp_path, files).items()


def test_the_instructions_of_a_task_are_no_match(tmp_path):
    """All GPQA queries begin with the same words; these words alone do not make a row a copy."""
    subjects = [
        "electron in a box of width two",
        "enzyme that cuts sugar at low heat",
        "star that loses its outer shell",
    ]
    wrong = {f"Incorrect Answer {i}": f"{i} units" for i in (1, 2, 3)}
    asked = [f"Which of these describes best the {subject} when light falls on it?" for subject in subjects]
    gpqa = [{"Question": text, "Correct Answer": "none"} | wrong for text in asked]
    write(tmp_path / "gpqa.jsonl", gpqa)
    form = GPQA_QUERY.replace("{question}", "{}").replace("{0}", "red").replace("{1}", "blue").replace("{2}", "a")
    texts = [form.replace("{3}", "b").format(text) for text in ("What is the colour of a clear sky?", asked[1])]
    write(tmp_path / "rows.jsonl", [{"problem": text} for text in texts])
    run(
        [
            "--dataset",
            str(tmp_path / "rows.jsonl"),
            "--tasks",
            "gpqa:diamond",
            "--eval_dataset",
            f"gpqa={tmp_path}/gpqa.jsonl",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    assert [(m["row"], m["problem"]) for m in matches(tmp_path / "out")] == [(1, 1)]


def test_pushed(tmp_path, monkeypatch):
    rows = [{"problem": f"what is {i} and {i}?", "id": i} for i in range(5)]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "aime.jsonl", [{"problem": "What is $3$ and 3", "answer": "6"}])
    argv = [
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--tasks",
        "aime24",
        "--eval_dataset",
        f"aime24={tmp_path}/aime.jsonl",
        "--output_dir",
        str(tmp_path / "out"),
        "--cleanup",
        "--new_dataset_name",
        "me/clean",
        "--private",
    ]
    with HubServer() as hub:
        hub.take_over(monkeypatch)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        run(argv)
        files = hub.repos["me/clean"].files()
        assert hub.repos["me/clean"].private and "README.md" in files
        [parquet] = [data for name, data in files.items() if name.endswith(".parquet")]
        (tmp_path / "pushed.parquet").write_bytes(parquet)
        assert [row["id"] for row in load_rows(str(tmp_path / "pushed.parquet"))] == [0, 1, 2, 4]
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(SystemExit) as stopped:
            run(argv)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    "more, says",
    [
        (
            ["--problem_column", "problem"],
            "no column 'problem': it has question, answer. Choose one with --problem_col",
        ),
        (["--ngram_size", "0"], "ngram_size must be at least 1"),
        (["--ngram_size", "9"], "ngram_size (8, now 9). Choose another --output_dir."),
        (["--tasks", "math_501"], "did you mean math_500?"),
        (["--eval_dataset", "aime24"], "--eval_dataset takes task=file"),
        (["--eval_dataset", "aime24=/nowhere.jsonl"], "give its rows as --eval_dataset aime24=FILE"),
        (["--dataset", "/nowhere.jsonl"], "no data file at /nowhere.jsonl"),
        (["--ngramsize", "7"], "did you mean `ngram_size`?"),
        (["--output_dir="], "--output_dir is missing"),
    ],
)
def test_bad_input(more, says, shared, tmp_path, capfd):
    data = write(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "3"}])
    argv = arguments(shared, data, tmp_path / "out", "--config=main")
    if "9" in more[-1]:
        run(argv)
    refused(run, [*argv, *more], capfd, says)
    assert (tmp_path / "out").exists() == ("9" in more[-1])
