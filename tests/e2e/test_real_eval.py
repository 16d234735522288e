"""A real model's score on GSM8K with vLLM: it is the same when repeated, when killed and resumed, and from a server."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.eval.helpers import samples
from tests.servers import vllm_serve

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
    ),
]


def command(model: Path, shared: Path, output: Path, **options) -> list[str]:
    data = f"gsm8k={shared / 'data' / 'gsm8k_test.jsonl'}"
    options = {
        "model": model,
        "tasks": "gsm8k",
        "dataset": data,
        "limit": 50,
        "batch_size": 16,
        "dtype": "float32",
        "max_new_tokens": 256,
        "output_dir": output,
    } | options
    return [sys.executable, "-m", "eval.run", *(f"--{name}={value}" for name, value in options.items())]


def rows_in(output: Path) -> list[dict]:
    return samples(output, "gsm8k")


def result(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["results"]["gsm8k"]


def test_repeated_and_killed_in_the_middle(smollm2, shared, tmp_path):
    for name in ("once", "again"):
        subprocess.run(command(smollm2, shared, tmp_path / name), cwd=ROOT, check=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(smollm2, shared, killed), cwd=ROOT, start_new_session=True)
    while len(list(killed.glob("details/gsm8k/*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows_in(killed)) < 50 and not (killed / "results.json").exists()
    subprocess.run(command(smollm2, shared, killed), cwd=ROOT, check=True)
    once = rows_in(tmp_path / "once")
    assert [row["problem"] for row in once] == list(range(50))
    assert rows_in(tmp_path / "again") == once == rows_in(killed)
    assert result(tmp_path / "once") == result(tmp_path / "again") == result(killed)
    print(result(killed))


def test_a_server_says_the_same(smollm2, shared, tmp_path):
    """At temperature 0 in float32: where the texts differ, two tokens must be equally likely up to rounding."""
    greedy = {"temperature": 0}
    subprocess.run(command(smollm2, shared, tmp_path / "here", **greedy), cwd=ROOT, check=True)
    with vllm_serve(smollm2, tmp_path, max_model_len=1024) as url:
        subprocess.run(command(smollm2, shared, tmp_path / "http", base_url=url, **greedy), cwd=ROOT, check=True)
    pairs = list(zip(rows_in(tmp_path / "here"), rows_in(tmp_path / "http"), strict=True))
    parted = [(here, there) for here, there in pairs if here["completion"] != there["completion"]]
    print(f"{len(pairs) - len(parted)} of {len(pairs)} texts are the same")
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).float()
    for here, there in parted:
        ids = [tokenizer(row["completion"])["input_ids"] for row in (here, there)]
        common = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        prompt = tokenizer(here["prompt"], add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([prompt + ids[0][:common]])).logits[0, -1]
        gap = (logits[ids[0][common]] - logits[ids[1][common]]).abs().item()
        print(f"problem {here['problem']} parts at token {common}: logits {gap:.1e} apart")
        assert gap < 1e-3
    assert len(pairs) == 50 and len(parted) <= 2
