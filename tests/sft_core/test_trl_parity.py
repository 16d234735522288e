"""Our steps equal those of TRL's SFTTrainer, recorded by `trl_losses.py` with the same rows, order and options."""

import json

import pytest

from tests.launch import metrics, run
from tests.sft_core.trl_losses import CASES, FIXTURE, METRICS, case_rows, our_flags, write_rows

RECORDED = json.loads(FIXTURE.read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_trl(name, tiny_model, tmp_path):
    theirs, out = RECORDED[name], tmp_path / "out"
    assert theirs["options"] == CASES[name], "record again: python tests/sft_core/trl_losses.py --fixture"
    rows = write_rows(tmp_path / "rows.jsonl", case_rows(name))
    code, output = run("sft_core.train", our_flags(tiny_model, rows, out, CASES[name]), tmp_path / "log")
    assert code == 0, output
    ours = metrics(out)
    assert len(ours) == len(theirs["loss"]) == 20
    tolerance = {
        "loss": 1e-4 * min(1.0, theirs["loss"][0]),  # dft's losses are small
        "grad_norm": 1e-4,
        "mean_token_accuracy": 6e-3,  # one token, if two logits are that close on another CPU
    }
    for metric in METRICS:
        assert [row[metric] for row in ours] == pytest.approx(theirs[metric], rel=0, abs=tolerance[metric]), metric
