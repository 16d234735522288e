"""Real vLLM on the CPU, in separate processes (the assertions are in tests/gen/vllm_checks.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, TORCHRUN, environment

CHECKS = str(Path(__file__).parent / "vllm_checks.py")

on_cpu = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM for the CPU"
)


def run(*command: str) -> None:
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


def torchrun(*arguments: str) -> None:
    run(*TORCHRUN, "2", CHECKS, *arguments)


@on_cpu
def test_one_process(tied_llama, untied_qwen):
    run(sys.executable, CHECKS, "single", tied_llama, untied_qwen)


@on_cpu
@pytest.mark.slow
def test_float32_logits_of_a_bfloat16_model(smollm2):
    run(sys.executable, CHECKS, "bfloat16", str(smollm2))


@on_cpu
@pytest.mark.slow
def test_two_ranks_with_an_engine_each(tied_llama):
    torchrun("ranks", "1", tied_llama)


@on_cpu
@pytest.mark.slow
def test_two_ranks_share_one_engine(tied_llama):
    torchrun("ranks", "2", tied_llama)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sleep(tied_llama):
    run(sys.executable, CHECKS, "sleep", tied_llama)
