"""`grpo_core.score`: its numbers come from the models' answers, a part ends in time, and bad input is refused."""

import json
import math
import os
from pathlib import Path

import pytest

from grpo_core import comparison, heldout, score
from tests.eval.helpers import called, refused

PROBLEMS = [{"problem": f"Ben has {i} pens and finds 2.", "solution": str(i + 2)} for i in range(6)]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstration(problem, answer):
    return {"messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def data(tmp_path):
    lines(tmp_path / "data" / "sft_train.jsonl", [demonstration(f"{i} + 2", str(i + 2)) for i in range(8)])
    lines(tmp_path / "data" / "grpo_train.jsonl", [{"problem": f"{i} + 3", "solution": str(i + 3)} for i in range(8)])
    lines(tmp_path / "data" / "grpo_heldout.jsonl", PROBLEMS)
    return tmp_path / "data"


def arguments(tiny_model, folder, **more):
    given = {"model": tiny_model, "data": folder, "output_dir": folder.parent / "out", "engine": "torch"} | more
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize(
    ("more", "rows", "says"),
    [
        ({"model": "nowhere"}, None, "--model nowhere does not exist"),
        ({"grpo": "no.yaml"}, None, "--grpo no.yaml does not exist"),
        ({"data": Path("nothing")}, None, "prepare.py"),
        ({"minutes": 0}, None, "--minutes must be above 0"),
        ({"minutes": "nan"}, None, "--minutes must be above 0"),
        ({"output_dir": "data"}, None, "is not empty: name a new folder"),
        ({"scores": "/proc/scores/s.jsonl"}, None, "--scores"),
        ({}, [{"problem": "0 + 2", "solution": "2"}, PROBLEMS[0]], "1 problems of"),
        ({}, [{"problem": "3 + 3", "solution": "6"}, PROBLEMS[0]], "are trained on: remove them, such as ['3 + 3']"),
        ({}, [PROBLEMS[0], {"problem": "What?", "solution": ""}], "row 2 needs `problem` and `solution`"),
        ({}, PROBLEMS[:1], "needs two problems or more"),
        ({}, [PROBLEMS[0], {"problem": "Where?", "solution": "It depends"}], "the answer of row 2 cannot be parsed"),
        ({"grpo": score.RECIPES / "grpo" / "config_warm.yaml"}, None, "set system_prompt: '' in the recipe"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny_model, data, more, rows, says, monkeypatch, capfd):
    monkeypatch.chdir(data.parent)
    if rows is not None:
        lines(data / "grpo_heldout.jsonl", rows)
    refused(score.main, arguments(tiny_model, data, **more), capfd, says)
    assert not (data.parent / "out").exists()


def compare(folder, data=None, options=(), **heldout):
    """A comparison without an engine, whose SFT has these options."""
    files = {"sft": data and data / "sft_train.jsonl"}
    return comparison.Comparison(folder, files, {"sft": list(options)}, heldout, {"sft": 1})


def test_a_part_ends_with_the_first_step_after_its_time_and_is_not_run_again(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--per_device_train_batch_size=4", "--save_strategy=no", "--report_to=none", "--max_steps=1000000"]
    (tmp_path / "before").symlink_to(tiny_model)
    compared = compare(tmp_path, data, options)
    compared.train("sft", "before", 1.0)
    steps = json.loads((tmp_path / "sft" / "trainer_state.json").read_text())["global_step"]
    assert 1 <= steps < 1000000
    written = (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns
    seconds = compared.seconds("sft")
    compared.train("sft", "before", 1.0)
    assert compared.seconds("sft") == seconds > 1
    assert (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns == written


def test_scores_are_those_of_the_answers_and_no_model_folder_changes(tiny_model, data, tmp_path):
    model = tmp_path / "before"
    model.symlink_to(tiny_model)
    there = sorted(os.listdir(tiny_model))
    file = str(data / "grpo_heldout.jsonl")
    asked = {"file": file, "length": 8, "engine": "torch", "samples": 2, "dtype": "float32"}
    compare(tmp_path, **asked).evaluate("before")
    assert sorted(os.listdir(tiny_model)) == there
    shares = heldout.read(model)
    assert {mode: len(values) for mode, values in shares.items()} == {"greedy": 6, "pass@1": 6}
    assert set(shares["greedy"]) <= {0, 1} and set(shares["pass@1"]) <= {0, 0.5, 1}


def test_the_interval_is_paired_and_the_line_holds_what_was_printed(tiny_model, data, tmp_path, capsys):
    """Two models that differ by 0.5 on half of 100 problems: 25 points, and the interval of the differences."""
    base = [i % 5 == 0 for i in range(100)]
    after = [float(value) if i % 2 else min(1.0, value + 0.5) for i, value in enumerate(base)]
    for name in comparison.MODELS:
        values = after if name == "grpo" else [float(value) for value in base]
        (tmp_path / f"{name}-heldout.json").write_text(json.dumps(dict.fromkeys(heldout.MODES, values)))
        (tmp_path / f"{name}-seconds.json").write_text("60.0" if name == "sft" else "120.0")
    differences = [b - a for a, b in zip(base, after, strict=True)]
    mean = sum(differences) / 100
    half = 1.96 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 99 / 100)
    assert heldout.difference(tmp_path / "control", tmp_path / "grpo", "greedy") == pytest.approx(
        (100 * mean, 100 * half)
    )
    (tmp_path / "all.jsonl").write_text("{}\n")
    score.report(compare(tmp_path), tmp_path / "all.jsonl", 300.0)
    row = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[1])
    assert row["percent_and_half_95"]["grpo - control"]["greedy"] == pytest.approx([100 * mean, 100 * half])
    assert row["problems"] == 100 and row["minutes"] == {"sft": 1.0, "grpo": 2.0, "control": 2.0, "all": 5.0}
    printed = capsys.readouterr().out
    assert f"+{100 * mean:.1f} ± {100 * half:.1f} %" in printed and "5.0 minutes in all" in printed
    assert (tmp_path / "score.png").stat().st_size > 1000


def test_too_few_minutes_are_said_with_how_many_it_takes(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "run", lambda command: None)
    code, output = called(score.main, arguments(tiny_model, data, minutes=1))
    assert code == 1 and "--minutes 1 is too short on this machine: give 3 or more" in output
