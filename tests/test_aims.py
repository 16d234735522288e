"""The verdicts of the GPU check."""

import math
import sys

import pytest

from grpo_core.config import GRPOConfig
from kernels.bench import Measured
from kernels.bench_peers import CANDIDATES, NAIVE
from tests import aims


@pytest.mark.parametrize(
    ("figure", "at_least", "shown"),
    [
        (1.4, False, "met"),
        (1.5, False, "missed"),
        (1.45, True, "met"),
        (1, True, "missed"),
        (math.nan, False, "not measured"),
    ],
)
def test_an_aim_is_met_or_missed_or_not_measured(figure, at_least, shown):
    line = aims.verdict("time", figure, 1.45, at_least)
    assert line.startswith(f"| {shown} | time | {'-' if math.isnan(figure) else figure} |")
    assert line.endswith(f"{'>=' if at_least else '<='} 1.45 |")


def test_the_aims_of_a_shape():
    def figures(name):
        return Measured(30.0 if name == NAIVE else 10.0, 8.0, 1.0, 1.2, (1e-5, 2e-3, 2e-3), True)

    full = {name: figures(name) for name in CANDIDATES}
    lines = aims.of_the_head("1.5b", full, 0.5)
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "met",
        "met",
        "missed",
        "met",
        "met",
        "met",
        "missed",
        "missed",
        "met",
    ]
    assert lines[0] == "| met | 1.5b: one sweep, time over three bare GEMMs | 1.25 | <= 1.25 |"
    del full["Liger GRPO"]
    assert sum("not measured" in line for line in aims.of_the_head("1.5b", full, math.nan)) == 2
    assert all("not measured" in line for line in aims.of_the_head("7b", {}, math.nan))
    assert aims.of_the_head("tiny", full, 0.5) == []


def test_the_aims_of_the_update(capsys):
    config = GRPOConfig("none", max_tokens_per_micro_batch=16384)
    aims.judge_update("1.5b", config, 510.0, 450.0)
    aims.judge_update("1.5b", GRPOConfig("none", max_tokens_per_micro_batch=8192), 510.0, 450.0)
    aims.judge_update("tiny", config, 1.0, 1.0)
    shown = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    assert [cells[0] for cells in shown] == ["| met", "| missed"] and shown[1][2:] == ["450", ">= 460 |"]
    assert "410 | >= 400" in aims.of_the_update("1.5b", True, (410.0, 390.0))[0]


@pytest.mark.parametrize("argv", [["grpo_core.bench", "--shape", "tiny", "--tokens", "2048", "--steps", "1"]])
def test_no_aim_is_judged_without_a_gpu(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["aims", *argv])
    aims.main()
    printed = capsys.readouterr().out
    assert "| tiny | 2048 | " in printed
    assert "| met |" not in printed and "| missed |" not in printed and "not measured" not in printed
