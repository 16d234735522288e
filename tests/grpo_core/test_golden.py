"""Invariant 12: ten float32 steps on recorded rollouts give the committed losses.

They are exact on the CPU and the build of torch that wrote them, and within 1e-4 elsewhere. The rollouts are replayed,
since rounding differs between CPUs and may change a sampled token, and then everything after it. A commit that changes
the numbers must say why, and replace `golden/losses.json` with the output of this test.
"""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch

from tests.grpo_core.test_train import TRAIN, options
from tests.launch import metrics, run

GOLDEN = Path(__file__).with_name("golden")
SETTINGS = dict(max_steps=10, num_iterations=2, beta=0.1, loss_type="dapo", epsilon_high=0.28)


def machine() -> str:
    kind = re.findall(
        r"^(?:cpu family|model|model name|stepping|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M
    )
    digest = zlib.crc32(repr(sorted(set(kind))).encode())
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, processor {digest:08x}"


def test_ten_steps_give_the_committed_losses(tiny_model, problems, tmp_path):
    argv = options(tiny_model, problems, tmp_path / "out", rollouts_from=GOLDEN, **SETTINGS)
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 0, output
    found = {"machine": machine(), "losses": [row["loss"] for row in metrics(tmp_path / "out")]}
    golden = json.loads((GOLDEN / "losses.json").read_text())
    exact = golden["machine"] == found["machine"]
    expected = golden["losses"] if exact else pytest.approx(golden["losses"], rel=1e-4, abs=1e-6)
    assert found["losses"] == expected, json.dumps(found, indent=1)
    assert len(set(found["losses"])) == 10
