"""A run of each trainer with everything around its loop: evaluation, state, resume, benchmarks, model card, the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerState

from tests.hub_server import HubServer
from tests.launch import flags, metrics

ROOT = Path(__file__).parents[2]


def run(module, argv, environment):
    command = [sys.executable, "-m", module, *argv]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def data(tmp_path):
    """Rows for both trainers, with a test split, and the problems of a benchmark."""
    train, test, bench = (tmp_path / name for name in ("train.jsonl", "test.jsonl", "bench.jsonl"))
    for path, count in ((train, 12), (test, 4)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Ben has {i} pens."}],
                "solution": str(i),
                "completion": [{"role": "assistant", "content": str(i)}],
            }
            for i in range(10, 10 + count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"problem": f"Ben has {i}.", "solution": f"\\boxed{{{i}}}", "answer": str(i)} for i in range(4)]
    bench.write_text("".join(json.dumps(row) + "\n" for row in problems))
    return train, test, bench


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_every_step_of_the_flow(algorithm, tiny_model, data, tmp_path):
    train, test, bench = data
    out = tmp_path / "out"
    kwargs = {"dataset": f"math_500={bench}", "engine": "torch", "max_new_tokens": 8, "batch_size": 4}
    options = dict(
        model_name_or_path=tiny_model,
        dataset_name=train,
        dataset_test_split=test,
        output_dir=out,
        log_level="info",
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    hub_options = dict(
        push_to_hub="true",
        hub_model_id="me/tiny",
        hub_strategy="end",
        callbacks=["push_to_hub_revision"],
        hub_model_revision="v1",
        benchmarks=["math_500"],
        benchmark_kwargs=json.dumps(kwargs),
    )
    if algorithm == "grpo":
        options |= dict(
            engine="torch",
            num_generations=2,
            max_completion_length=6,
            max_prompt_length=99,
            system_prompt="",
            reward_funcs=["accuracy", "tests.rewards_for_tests:digits"],
        )
    module = f"{algorithm}_core.train"
    with HubServer() as hub:
        code, first = run(module, flags(**options, max_steps=1), hub.environment())
        assert code == 0, first
        code, second = run(module, flags(**options | hub_options, max_steps=2), hub.environment())
        assert code == 0, second
        repository = hub.repos["me/tiny"]
        pushed, step = repository.files("main"), repository.files("v1-step-000000002")

    # The console: one line per process, and the parameters.
    assert "Process rank: 0 of 1" in first and "Training parameters" in first and "Model parameters" in first
    # After the resume: one line per step, and both evaluations.
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    key = "eval_loss" if algorithm == "sft" else "eval_reward"
    assert [row["step"] for row in rows if key in row] == [1, 2]
    # Results and state.
    everything = json.loads((out / "all_results.json").read_text())
    for split in ("train", "eval", "benchmarks"):
        assert json.loads((out / f"{split}_results.json").read_text()).items() <= everything.items()
    assert everything["train_samples"] == 12 and everything["eval_samples"] == 4 and everything["train_runtime"] > 0
    score = everything["benchmarks/math_500/pass@1"]
    assert 0 <= score <= 1
    state = TrainerState.load_from_json(str(out / "trainer_state.json"))
    assert state.global_step == 2 and [r["loss"] for r in state.log_history if "loss" in r] == [
        r["loss"] for r in rows if "loss" in r
    ]
    # TensorBoard has the benchmark at the last step, for the checkpoint and for the final model, which are the same.
    [*_, events] = sorted((out / "runs").glob("events*"), key=os.path.getmtime)
    board = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("benchmarks/math_500/pass@1")] == [(2, score)] * 2
    # The model card.
    card = ModelCard.load(out / "README.md")
    assert {"open-r1", "grpo_core"} <= set(card.data.tags) and card.data.to_dict()["library_name"] == "transformers"
    assert tiny_model in card.text and "math_500" in card.text and "learning_rate: 0.001" in card.text
    # The Hub has the final model, and a branch for the checkpoint.
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert pushed["README.md"] == (out / "README.md").read_bytes()
    assert not [name for name in pushed if name.startswith(("checkpoint", "state", "rank", "."))]
    assert step["model.safetensors"] == (out / "checkpoint-2" / "model.safetensors").read_bytes()
    assert "scheduler.pt" not in step
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoint-1")


def test_without_a_token_nothing_starts(tiny_model, data, tmp_path):
    train, *_ = data
    options = dict(model_name_or_path=tiny_model, dataset_name=train, output_dir=tmp_path / "out", push_to_hub="true")
    with HubServer() as hub:
        environment = hub.environment() | {"HF_TOKEN": ""}
        code, output = run("sft_core.train", flags(**options), environment)
    assert code == 2 and "HF_TOKEN" in output.splitlines()[-1], output
    assert not list(tmp_path.rglob("*.safetensors"))
