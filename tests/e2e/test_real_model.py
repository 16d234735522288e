"""The recipe as a user runs it: a real model on real data with real vLLM, sharded over two ranks by torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import TORCHRUN
from tests.launch import flags, metrics

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/SmolLM2-135M-Instruct/grpo/config_cpu.yaml"
pytestmark = pytest.mark.slow


def test_recipe_on_two_ranks(smollm2, shared, tmp_path):
    out = tmp_path / "out"
    data = shared / "data" / "arith_word_problems.jsonl"
    command = [*TORCHRUN, "2", "-m", "grpo_core.train"]
    command += ["--config", RECIPE, *flags(model_name_or_path=smollm2, dataset_name=data, output_dir=out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)

    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    difference = max(row["sampling/sampling_logp_difference/mean"] for row in rows)
    print(f"mean absolute log-prob difference between vLLM and the policy: {difference:.2g}")
    assert difference < 0.1 and any(row["effective_groups"] > 0 for row in rows)
    before, after = load_file(smollm2 / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32 and (tensor != before[name].float()).any(), name

    prompt = AutoTokenizer.from_pretrained(out)("Two and two make", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_cache and model.generation_config.eos_token_id is not None
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    script = (
        "import sys; from gen.engine.base import EngineConfig, Sampling, make_engine; "
        f"engine = make_engine('vllm', EngineConfig({str(out)!r}, max_model_len=64, dtype='float32')); "
        f"[[c]] = engine.sample([{prompt['input_ids'][0].tolist()}], Sampling(1, 8, greedy=True), [0]); "
        "print('IDS', c.token_ids)"
    )
    served = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert f"IDS {expected}" in served.stdout, served.stdout + served.stderr


def test_warm_start_goes_on_into_grpo(smollm2, shared, tmp_path):
    """The recipes of the warm start, shortened: data, packed SFT that lowers the held-out loss, GRPO with vLLM."""
    folder = Path(RECIPE).parents[1]
    data = shared / "data"
    prepare = [sys.executable, folder / "prepare.py", "--output_dir", tmp_path, "--dataset_name"]
    subprocess.run([*prepare, data / "gsm8k_train.jsonl", data / "arith_word_problems.jsonl"], cwd=ROOT, check=True)
    heldout = tmp_path / "sft_heldout.jsonl"
    heldout.write_text("".join(heldout.read_text().splitlines(keepends=True)[:16]))
    small = dict(bf16="false", report_to=["none"], save_strategy="no", eval_strategy="no")
    supervised = dict(
        model_name_or_path=smollm2,
        dataset_name=tmp_path / "sft_train.jsonl",
        max_length=320,
        dataset_test_split=heldout,
        per_device_train_batch_size=1,
        eval_strategy="steps",
    )
    steps = [
        (
            "sft_core.train",
            "sft/config_warm_start.yaml",
            supervised | dict(max_steps=1, learning_rate=0, eval_steps=1, output_dir=tmp_path / "untrained"),
        ),
        (
            "sft_core.train",
            "sft/config_warm_start.yaml",
            supervised | dict(max_steps=16, eval_steps=8, output_dir=tmp_path / "sft"),
        ),
        (
            "grpo_core.train",
            "grpo/config_warm.yaml",
            dict(
                model_name_or_path=tmp_path / "sft",
                dataset_name=tmp_path / "grpo_train.jsonl",
                num_generations=4,
                prompts_per_step=3,
                max_completion_length=96,
                max_steps=2,
                output_dir=tmp_path / "grpo",
            ),
        ),
    ]
    for module, recipe, options in steps:
        command = [sys.executable, "-m", module, "--config", folder / recipe, *flags(**(small | options))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "chat template: OK" in done.stdout
    logged = metrics(tmp_path / "untrained") + metrics(tmp_path / "sft")
    before, between, after = (row["eval_loss"] for row in logged if "eval_loss" in row)
    print("held-out loss before, after 8 and after 16 steps:", before, between, after)
    assert after < between < before and after < 0.85 * before
    for row in metrics(tmp_path / "grpo"):
        assert row["sampling/sampling_logp_difference/mean"] < 0.01 and row["unscored"] == 0
