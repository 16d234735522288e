"""On a GPU: bf16 compute, NCCL, varlen attention, the head's float32 logits, vLLM with graphs. `make gpu-check`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.grpo_core.test_train import options, weights
from tests.launch import metrics

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_four_steps(tiny_model, problems, tmp_path, engine):
    """Two updates a rollout against a reference model, on as many ranks as there are GPUs."""
    argv = options(
        tiny_model, problems, tmp_path / "out", engine=engine, max_steps=4, num_iterations=2, beta=0.04,
        prompts_per_step=8, max_tokens_per_micro_batch=1000, gradient_checkpointing="true",
    )  # fmt: skip
    ranks = str(torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "-m", "grpo_core.train", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(tmp_path / "out")
    assert len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows)
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.05 for row in rows)
    before, after = weights(tiny_model), weights(tmp_path / "out")
    assert any((before[name].bfloat16() != after[name]).any() for name in before)
