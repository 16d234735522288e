"""Pass rates of a model's samples and of existing generations: verdicts, files, kills, bad input."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eval.pass_rate import main
from sft_core.data.rows import load_rows
from tests import launch
from tests.eval.helpers import killed_after_a_file, refused, stones, times, write

HANGS = r"\boxed{\binom{10^9}{5\cdot 10^8}}"


def run(*argv: str) -> None:
    with launch.locks_released():
        main([*argv])


def rows_of(output: Path, name: str = "scored") -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def test_generations_that_are_there(tmp_path, capsys, monkeypatch):
    right, wrong = "so \\boxed{7}", "<think>\\boxed{7}</think> the answer is 8"
    cases = [  # gold, generations, correct, pass rate
        ("7", [right, right, wrong, wrong], [True, True, False, False], 0.5),
        ("7", [right] * 4, [True] * 4, 1.0),
        ("7", [wrong] * 4, [False] * 4, 0.0),
        ("x #### 7", [right, HANGS, wrong, right], [True, None, False, True], 2 / 3),
        ("words alone", [right, "so 7 it is"], [None, None], None),
        ("7", [None, right], [None, True], 1.0),
        ("7", [], [], None),
        (None, None, [], None),
        ("7", [right] + [wrong] * 9, [True] + [False] * 9, 0.1),  # the range excludes its ends
    ]
    file = write(
        tmp_path / "rows.jsonl",
        [{"solution": gold, "generation": texts, "id": i} for i, (gold, texts, _, _) in enumerate(cases)],
    )
    argv = ["--dataset", str(file), "--generations-column", "generation", "--check_timeout", "1", "--output_dir"]
    run(*argv, str(tmp_path / "out"))
    found = rows_of(tmp_path / "out")
    assert [row["correct"] for row in found] == [correct for _, _, correct, _ in cases]
    assert [row["pass_rate"] for row in found] == [rate for _, _, _, rate in cases]
    assert [row["generation"] for row in found] == [texts for _, texts, _, _ in cases]
    assert [row["id"] for row in rows_of(tmp_path / "out", "filtered")] == [0, 3]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    wanted = {"rows": 9, "generations": 30, "correct": 10, "checks_given_up": 1, "rows_with_unparseable_gold": 1}
    wanted |= {
        "generations_missing": 1,
        "without_an_answer": 1,
        "rows_without_generations": 2,
        "rows_with_pass_rate": 6,
        "rows_in_filtered_set": 2,
    }
    assert {name: report[name] for name in wanted} == wanted
    assert {name: count for name, count in report["histogram"].items() if count} == {
        "0": 1,
        "0.1 to 0.2": 1,
        "0.5 to 0.6": 1,
        "0.6 to 0.7": 1,
        "1": 2,
    }
    assert "checks given up: 1" in capsys.readouterr().out
    # another range in the same folder checks nothing again
    [details] = (tmp_path / "out" / "details" / "pass_rate").glob("*.parquet")
    when = details.stat().st_mtime_ns
    run(*argv, str(tmp_path / "out"), "--pass_rate_min", "0", "--pass_rate_max", "0.6")
    assert [row["id"] for row in rows_of(tmp_path / "out", "filtered")] == [0, 8]
    assert details.stat().st_mtime_ns == when
    # another version of the checker checks again
    for name, value in (("CHECKERS", ("math-verify",)), ("RULES", ("verify.py",))):
        when = details.stat().st_mtime_ns
        monkeypatch.setattr(f"eval.folder.{name}", value)
        run(*argv, str(tmp_path / "out"))
        assert details.stat().st_mtime_ns > when and rows_of(tmp_path / "out") == found
    # the output can be scored again; its old verdicts are replaced
    run("--dataset", str(tmp_path / "out" / "filtered.parquet"), *argv[2:], str(tmp_path / "again"))
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out", "filtered")


def test_killed_and_continued(shared, tmp_path):
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k_test.jsonl").read_text().splitlines()[:600]]
    texts = [f"\\boxed{{{row['answer'].rpartition('####')[2].strip()}}}" for row in rows]
    made = [
        {"q": row["question"], "solution": row["answer"], "generation": texts[i - i % 2]} for i, row in enumerate(rows)
    ]
    write(tmp_path / "rows.jsonl", made)
    argv = ["--dataset", str(tmp_path / "rows.jsonl"), "--generations_column=generation", "--output_dir"]
    killed, files = [*argv, str(tmp_path / "killed")], "killed/details/pass_rate/*.parquet"
    done = killed_after_a_file("eval.pass_rate", killed, tmp_path, files, tmp_path / "log.txt")
    assert 1 <= len(done) < 3 and not (tmp_path / "killed" / "report.json").exists()
    for name in ("killed", "whole"):
        run(*argv, str(tmp_path / name))
    for name in ("scored.parquet", "filtered.parquet", "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert done.items() <= times(tmp_path, files).items()
    assert [row["pass_rate"] for row in rows_of(tmp_path / "whole")][::2] == [1.0] * 300
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["checks_given_up"] == 0


@pytest.fixture
def problems(tmp_path) -> list[dict]:
    return [row | {"id": i} for i, row in enumerate(stones(["123456"] * 12, "solution"))]


def sampling(model: str, data: Path, output: Path, **options) -> list[str]:
    options = {"engine": "torch", "max_new_tokens": 24, "num_generations": 4, "batch_size": 16} | options
    return ["--model", model, "--dataset", str(data), "--output_dir", str(output), *launch.flags(**options)]


def test_samples_of_a_model(tiny_model, problems, tmp_path, capfd):
    """The golds are set to the model's answers in some samples, so that the pass rates are known."""
    run(*sampling(tiny_model, write(tmp_path / "rows.jsonl", problems), tmp_path / "first", max_new_tokens=100))
    first = rows_of(tmp_path / "first")
    assert [len(set(row["generation"])) > 1 for row in first] == [True] * 12 and {
        row["pass_rate"] for row in first
    } == {0}
    assert rows_of(tmp_path / "first", "filtered") == []
    assert load_rows(str(tmp_path / "first" / "scored.parquet")).column_names == [
        "problem",
        "solution",
        "id",
        "generation",
        "correct",
        "pass_rate",
    ]
    # a batch is lost: the same command generates it again
    expected = (tmp_path / "first" / "scored.parquet").read_bytes()
    (tmp_path / "first" / "details" / "pass_rate" / "00004.parquet").unlink()
    run(*sampling(tiny_model, tmp_path / "rows.jsonl", tmp_path / "first", max_new_tokens=100))
    assert (tmp_path / "first" / "scored.parquet").read_bytes() == expected
    # the same samples, checked as a column
    again = ["--dataset", str(tmp_path / "first" / "scored.parquet"), "--generations_column", "generation"]
    run(*again, "--output_dir", str(tmp_path / "again"))
    keys = ("id", "generation", "correct", "pass_rate")
    assert [[row[k] for k in keys] for row in rows_of(tmp_path / "again")] == [[row[k] for k in keys] for row in first]
    for argv in (again, sampling(tiny_model, tmp_path / "rows.jsonl", tmp_path)):
        # neither command accepts a folder of the other
        argv = [*argv, "--output_dir", str(tmp_path / ("first" if argv is again else "again"))]
        refused(main, argv, capfd, "results of another kind")


@pytest.mark.slow
def test_processes_side_by_side(tiny_model, problems, tmp_path):
    data = write(tmp_path / "rows.jsonl", problems)
    run(*sampling(tiny_model, data, tmp_path / "one"))
    run(*sampling(tiny_model, data, tmp_path / "two", data_parallel_size=2))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "give either --model to sample answers, or --generations_column"),
        ({"model": "m", "generations_column": "generation"}, "give either --model"),
        ({"model": "m", "pass_rate_min": 0.9, "pass_rate_max": 0.1}, "must be below pass_rate_max (0.1)"),
        ({"generations_column": "answers"}, "no column 'answers': it has problem, solution, id, generation."),
        ({"generations_column": "id"}, "column 'id' of"),
        ({"generations_column": "generation", "solution_column": "gold"}, "Choose one with --solution_column"),
        ({"generations_column": "generation", "check_timeout": 3}, "check_timeout (10.0, now 3.0). Choose another"),
        ({"model": "m", "prompt_column": "prompt"}, "no column 'prompt'"),
        ({"model": "/no/such/folder", "engine": "torch"}, "no model folder at /no/such/folder"),
        ({"model": "m", "temperature": 0}, "--num_samples (or --num_generations) to 1"),
        ({"model": "m", "tasks": "math_500"}, "unknown flag `--tasks=math_500`"),
        ({"model": "m", "dataset": "/nowhere.jsonl"}, "no data file at /nowhere.jsonl"),
    ],
)
def test_bad_input(options, says, problems, tmp_path, capfd):
    data = write(tmp_path / "rows.jsonl", [row | {"generation": ["\\boxed{1}"]} for row in problems[:1]])
    start = ["--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    if "check_timeout" in options:
        run(*start, "--generations_column", "generation")
    with launch.locks_released():
        refused(main, [*start, *launch.flags(**options)], capfd, says)
    assert (tmp_path / "out").exists() == ("check_timeout" in options)
