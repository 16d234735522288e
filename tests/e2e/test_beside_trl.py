"""The comparison with TRL, without TRL: our side on the CPU, and scripts in place of sides that report test values."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import ROOT, environment
from tests.e2e import beside_trl
from tests.launch import run

SMALL = ["--prompts", "2", "--completions", "4", "--tokens", "8", "--steps", "2", "--warm_up", "1"]


@pytest.mark.slow
def test_our_side_ignores_stops_and_tells_of_every_step(tiny_model, tmp_path):
    beside_trl.write_prompts(tmp_path / "prompts.jsonl", 6)
    argv = [tiny_model, *SMALL, "--folder", str(tmp_path), "--side", "ours", "--reward_num_workers", "1"]
    code, printed = run("tests.e2e.beside_trl", argv, tmp_path / "log")
    assert code == 0, printed
    told = [json.loads(line.removeprefix("RESULT ")) for line in printed.splitlines() if line.startswith("RESULT ")]
    head, *steps, last = told
    assert head["card"] == "CPU" and "torch 2" in head["versions"]
    assert len(steps) == 2 and all(step["seconds"] > 0 and step["gib"]["device"] == 0 for step in steps)
    assert last["lengths"] == [8, 8] and last["mismatch"] < 1e-3
    assert {"time/sync", "time/sample", "time/score", "time/train"} <= last["phases"].keys()
    assert 0 < sum(last["phases"].values()) < 1.2 * sum(step["seconds"] for step in steps) / 2


def script(path, *, seconds=(9, 2, 3), length=8, code=0, hangs=False, card="H100", absent=None, outside=8.0):
    """A script in place of a Python: it reports one warm-up step and the others, and then ends as given."""
    gib = {"outside": outside, "engine": 20.0, "device": 60.0}
    told = [{"card": card, "versions": "torch 2"}, *({"seconds": s, "gib": gib} for s in seconds)]
    told += [] if hangs else [{"lengths": [length] * (len(seconds) - 1), "dtype": "float32"}]
    told = [{"absent": absent}] if absent else told
    lines = [f"echo 'RESULT {json.dumps(found)}'" for found in told]
    lines += ["echo some words of its own", "echo the cause >&2", "sleep 600" if hangs else f"exit {code}"]
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return str(path)


def compare(monkeypatch, capsys, folder, ours, trl):
    """Run the comparison with two scripts, two steps and two warm-up steps; return its exit code and its output."""
    monkeypatch.setattr(beside_trl.sys, "executable", script(folder / "ours.sh", **ours))
    python = script(folder / "trl.sh", **trl) if trl is not None else str(folder / "nothing")
    argv = ["model", *SMALL, "--warm_up", "2", "--folder", str(folder / "made"), "--trl_python", python, "--bf16=true"]
    with pytest.raises(SystemExit) as ended:
        beside_trl.main(argv)
    return ended.value.code, capsys.readouterr().out


OURS_ROW = "| ours | 1.00 | 1.00 1.00 | 64 | 8.0 | 20.0 | 60.0 | float32 |  |"
TRL_ROW = "| TRL | 2.50 | 2.00 3.00 | 26 | 8.0 | 20.0 | 60.0 | float32 |  |"
MEMORY, TIME = "whole step, GiB outside vLLM's share", "whole step, our time over TRL's"
GOOD = {"seconds": (9, 1, 1)}
CASES = {  # our side, TRL's side, exit code, lines of the output
    "both": (GOOD, {}, 0, [OURS_ROW, TRL_ROW, f"| met | {MEMORY} | 8 | <= 12 |", f"| met | {TIME} | 0.4 | <= 0.4 |"]),
    "no aim without a GPU": (GOOD | {"card": "CPU"}, {"card": "CPU"}, 0, ["our time over TRL's: 0.400"]),
    "much memory": (GOOD | {"outside": 13.0}, {}, 0, [TRL_ROW, f"| missed | {MEMORY} | 13 | <= 12 |"]),
    "TRL fails in a step": (
        GOOD,
        {"seconds": (9, 2), "code": 3},
        1,
        [
            OURS_ROW,
            f"| met | {MEMORY} | 8 | <= 12 |",
            "TRL: step 3, 2.00 s",
            "the cause",
            "| TRL | 2.00 | 2.00 | 32 | 8.0 | 20.0 | 60.0 | float32 | failed: exit code 3; 1 of 2 steps |",
            "our time over TRL's: 0.500",
            f"| not measured | {TIME} | - | <= 0.4 |",
        ],
    ),
    "we fail in the warm-up": (
        {"seconds": (9,), "code": 1},
        {},
        1,
        [
            "| ours | - | - | - | 8.0 | 20.0 | 60.0 | float32 | failed: exit code 1; 0 of 2 steps |",
            TRL_ROW,
            "our time over TRL's: - (failed: exit code 1; 0 of 2 steps)",
            f"| not measured | {MEMORY} | - | <= 12 |",
            f"| not measured | {TIME} | - | <= 0.4 |",
        ],
    ),
    "TRL fails at its exit": (GOOD, {"code": 134}, 1, [f"| met | {TIME} | 0.4 | <= 0.4 |", "the cause"]),
    "short completions": (
        GOOD | {"length": 7.5},
        {},
        1,
        [
            TRL_ROW,
            "| ours | 1.00 | 1.00 1.00 | 64 | 8.0 | 20.0 | 60.0 | float32 | "
            "2 steps with a mean completion length of 7.5, not 8 |",
            f"| not measured | {TIME} | - | <= 0.4 |",
        ],
    ),
    "no TRL": (
        GOOD,
        {"absent": "trl is not installed"},
        0,
        [
            OURS_ROW,
            "| TRL | - | - | - | - | - | - | - | trl is not installed |",
            "our time over TRL's: - (trl is not installed)",
            f"| not measured | {TIME} | - | <= 0.4 |",
        ],
    ),
    "no Python": (GOOD, None, 1, [OURS_ROW, f"| not measured | {TIME} | - | <= 0.4 |"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_side_that_fails_costs_only_itself(name, tmp_path, monkeypatch, capsys):
    ours, trl, expected, lines = CASES[name]
    code, printed = compare(monkeypatch, capsys, tmp_path, ours, trl)
    assert code == expected, printed
    rows = printed.splitlines()
    assert rows[0].startswith("model: 2 x 4 completions of 8 tokens; 2 steps after 2;")
    assert rows[1] == "our own options: --bf16=true"
    assert set(lines) <= set(rows), printed
    judged = [row for row in rows if row.startswith(("| met |", "| missed |", "| not measured |"))]
    assert len(judged) == len(set(judged)) == (0 if ours.get("card") == "CPU" else 2)
    assert "some words of its own" in (tmp_path / "made" / "ours.log").read_text()


def test_what_is_killed_has_shown_one_side_and_the_steps_of_the_other(tmp_path):
    python = script(tmp_path / "trl.sh", seconds=(9, 2), hangs=True)
    command = [
        "-c",
        "import sys; from tests.e2e import beside_trl as b; sys.executable = sys.argv.pop(1); b.main()",
        script(tmp_path / "ours.sh", **GOOD),
        "model",
        *SMALL,
        "--warm_up",
        "2",
        "--folder",
        str(tmp_path),
        "--trl_python",
        python,
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, cwd=ROOT, env=environment(), start_new_session=True
        )
    deadline = time.time() + 60
    while "TRL: step 3" not in log.read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    printed = log.read_text().splitlines()
    assert {OURS_ROW, f"| met | {MEMORY} | 8 | <= 12 |", "TRL: step 2, 9.00 s, warm-up", "TRL: step 3, 2.00 s"} <= {
        *printed
    }
    assert '"seconds": 2' in (tmp_path / "TRL.log").read_text()


def test_turns_are_put_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beside_trl.sys, "executable", script(tmp_path / "ours.sh", **GOOD))
    python = script(tmp_path / "trl.sh")
    argv = ["model", *SMALL, "--warm_up", "2", "--folder", str(tmp_path), "--trl_python", python, "--turns", "2"]
    with pytest.raises(SystemExit) as ended:
        beside_trl.main([*argv, "--liger"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.count(f"| met | {TIME} |") == printed.count(f"| met | {MEMORY} |") == 1
    last = printed.split(beside_trl.HEADS)[-1].splitlines()
    assert [row.split(" | ")[2] for row in last[2:5]] == ["1.00 1.00 1.00 1.00", *["2.00 3.00 2.00 3.00"] * 2]
