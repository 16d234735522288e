"""Whole SFT runs: it learns, the split does not matter, and it resumes bit for bit."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState

from tests import faults
from tests.launch import flags, metrics, run

TRAIN = "sft_core.train"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(20):
            turns = [("user", f"Ben has {10 + i} pens."), ("assistant", f"{10 + i}" * (1 + i % 3))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


def train(tiny_model, rows, out, ranks=1, **more):
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=out, max_steps=6, learning_rate=1e-2,
                   lr_scheduler_type="constant", per_device_train_batch_size=8 // ranks, save_strategy="no",
                   report_to=["none"])  # fmt: skip
    code, output = run(TRAIN, flags(**(options | more)), out.parent / f"{out.name}.log", ranks=ranks)
    assert code == 0, output
    return load_file(out / "model.safetensors")


def test_learns_alike_however_the_step_is_cut(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    losses = [row["loss"] for row in metrics(tmp_path / "whole")]
    assert losses[-1] < 0.7 * losses[0]
    for name, more in {"one": {"max_tokens_per_micro_batch": 1}, "two": {"ranks": 2}, "acc": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true",
    }}.items():  # fmt: skip
        cut = train(tiny_model, rows, tmp_path / name, **more)
        assert [row["loss"] for row in metrics(tmp_path / name)] == pytest.approx(losses, rel=1e-4)
        assert all((cut[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)


def test_resumes_bitwise(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    saving = dict(save_strategy="steps", save_steps=2)
    train(tiny_model, rows, tmp_path / "out", max_steps=4, **saving)
    found = train(tiny_model, rows, tmp_path / "out", **saving)
    assert all((found[key] == whole[key]).all() for key in whole)
    assert [r["loss"] for r in metrics(tmp_path / "out")] == [r["loss"] for r in metrics(tmp_path / "whole")]


def test_resumes_from_the_checkpoint_that_is_named(tiny_model, rows, tmp_path):
    """Of another folder too; each checkpoint is also a model folder, with a state that transformers reads."""
    saving = dict(save_strategy="steps", save_steps=2)
    whole = train(tiny_model, rows, tmp_path / "whole", **saving)
    named = tmp_path / "whole" / "checkpoint-2"
    found = train(tiny_model, rows, tmp_path / "other", resume_from_checkpoint=named, **saving)
    assert all((found[key] == whole[key]).all() for key in whole)
    assert [row["step"] for row in metrics(tmp_path / "other")] == [3, 4, 5, 6]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6").state_dict()
    assert all((last[key] == whole[key]).all() for key in whole)
    state = TrainerState.load_from_json(str(tmp_path / "whole" / "checkpoint-4" / "trainer_state.json"))
    assert (state.global_step, state.max_steps, len(state.log_history)) == (4, 6, 4)
    assert state.log_history[-1]["loss"] == metrics(tmp_path / "whole")[3]["loss"]


def test_checkpoints_of_the_model_alone(tiny_model, rows, tmp_path):
    argv = dict(save_strategy="steps", save_steps=3, save_only_model="true")
    train(tiny_model, rows, tmp_path / "out", **argv)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert not (tmp_path / "out" / "checkpoint-3" / "state").exists()
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out")
    code, output = run(TRAIN, flags(**options), tmp_path / "log")
    assert code == 2 and "checkpoint-6: it holds the model alone (save_only_model)" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_the_loss_of_the_test_rows(tiny_model, rows, tmp_path, ranks):
    """With a learning rate of 0 and all rows in a step, training and evaluation see the same."""
    more = dict(max_steps=2, learning_rate=0, per_device_train_batch_size=20 // ranks, eval_strategy="steps",
                dataset_test_split=rows, max_tokens_per_micro_batch=50, eval_steps=2)  # fmt: skip
    train(tiny_model, rows, tmp_path / "out", ranks, **more)
    first, second, evaluation = metrics(tmp_path / "out")
    assert evaluation["eval_loss"] == pytest.approx(first["loss"], rel=1e-6) and evaluation["step"] == 2
    assert evaluation["eval_entropy"] == pytest.approx(first["entropy"], rel=1e-6)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == results["train_samples"] == 20
    assert results["eval_loss"] == evaluation["eval_loss"] and results["train_loss"] == pytest.approx(first["loss"])


def test_a_finished_run_without_checkpoints_is_not_trained_over(tiny_model, rows, tmp_path):
    before = train(tiny_model, rows, tmp_path / "out")
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=6)
    code, output = run(TRAIN, flags(**options), tmp_path / "log")
    assert code == 2 and "a finished model without a checkpoint to go on from" in output
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert len(metrics(tmp_path / "out")) == 6 and all((after[key] == before[key]).all() for key in before)


def test_the_model_is_safe_before_the_last_evaluation(tiny_model, rows, tmp_path):
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=1,
                   save_strategy="no", do_eval="true", dataset_test_split=rows, report_to=["none"])  # fmt: skip
    code, output = run(TRAIN, flags(**options), tmp_path / "log", fault=faults.break_the_evaluation)
    assert code == 1 and "no evaluation today" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_signal_leaves_something_to_resume_from_even_with_save_only_model(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=6,
                   learning_rate=1e-2, lr_scheduler_type="constant", save_only_model="true", report_to=["none"],
                   per_device_train_batch_size=8)  # fmt: skip
    code, output = run(TRAIN, flags(**options), tmp_path / "log", fault=faults.terminate_in_the_second_step)
    assert code == 0 and "stopped by a signal after step 2: the same command goes on from there" in output
    code, output = run(TRAIN, flags(**options), tmp_path / "log1")
    assert code == 0, output
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all((found[key] == whole[key]).all() for key in whole)
