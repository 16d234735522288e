"""The comparison with TRL, without TRL: our side on the CPU, and the report of invented figures."""

import argparse
import json

from tests.e2e.beside_trl import report, write_prompts
from tests.launch import run

SMALL = ["--prompts", "2", "--completions", "4", "--tokens", "8", "--steps", "2", "--warm_up", "1"]


def test_our_side_ignores_stops_and_times_every_step(tiny_model, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 6)
    argv = [tiny_model, *SMALL, "--folder", str(tmp_path), "--side", "ours", "--reward_num_workers", "1"]
    code, printed = run("tests.e2e.beside_trl", argv, tmp_path / "log")
    assert code == 0, printed
    result = json.loads(printed.split("RESULT ")[1])
    assert result["length"] == 8 and len(result["seconds"]) == 2 and result["mismatch"] < 1e-3
    phases = result["phases"]
    assert {"time/sync", "time/sample", "time/score", "time/train"} <= phases.keys()
    assert 0 < sum(phases.values()) < 1.2 * sum(result["seconds"]) / 2


def test_the_report_compares_medians_and_names_what_is_missing():
    options = argparse.Namespace(prompts=32, completions=8, tokens=256)
    more = {"card": "H100", "versions": "torch 2", "length": 256, "phases": {"time/train": 0.5}, "mismatch": 0.01}
    found = {
        side: [{"seconds": [s, 9 * s, s], "gib": {"outside": gib, "engine": 20.0, "device": 60.0}} | more]
        for side, s, gib in (("ours", 1.5, 8.0), ("TRL", 4.5, 44.7))
    }
    lines = report(found, options, ["--torch_compile=true"]).splitlines()
    assert "our own options: --torch_compile=true" in lines
    assert any(line.startswith("| TRL | 4.50 | 4.50 40.50 4.50 | 14,564 | 44.7 | 20.0 | 60.0 |") for line in lines)
    assert lines[-2:] == ["| met | whole step, our time over TRL's | 0.333 | <= 0.4 |",
                          "| met | whole step, GiB outside vLLM's share | 8 | <= 12 |"]  # fmt: skip
    del found["TRL"]
    assert "| not measured | whole step, our time over TRL's | - | <= 0.4 |" in report(found, options, [])
