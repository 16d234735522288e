"""Invariant 12: ten float32 steps of a tiny run give the committed losses exactly.

The numbers belong to one build of torch and one instruction set; elsewhere they hold to 1e-4. A change that moves them
says why in its commit, and replaces the file by what this test prints.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.grpo_core.test_train import TRAIN, options
from tests.launch import metrics, run

GOLDEN = Path(__file__).with_name("golden_losses.json")
SETTINGS = dict(max_steps=10, num_iterations=2, beta=0.1, loss_type="dapo", epsilon_high=0.28)


def test_ten_steps_give_the_committed_losses(tiny_model, problems, tmp_path):
    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "out", **SETTINGS), tmp_path / "log")
    assert code == 0, output
    found = {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "losses": [row["loss"] for row in metrics(tmp_path / "out")],
    }
    golden = json.loads(GOLDEN.read_text())
    exact = all(golden[key] == found[key] for key in ("torch", "instructions"))
    expected = golden["losses"] if exact else pytest.approx(golden["losses"], rel=1e-4, abs=1e-6)
    assert found["losses"] == expected, json.dumps(found)
    assert len(set(found["losses"])) == 10
