"""Whole SFT runs: a run learns, does not depend on the split into micro-batches and ranks, and resumes bitwise."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from sft_core.train import token_losses
from tests import faults
from tests.e2e.test_kill import wait_for_step
from tests.launch import flags, metrics, run, start, wait

TRAIN = "sft_core.train"


def train_any(tiny_model, rows, out, ranks=1, **more):
    options = dict(
        model_name_or_path=tiny_model,
        dataset_name=rows,
        output_dir=out,
        max_steps=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8 // ranks,
        save_strategy="no",
        report_to=["none"],
    )
    code, output = run(TRAIN, flags(**(options | more)), out.parent / f"{out.name}.log", ranks=ranks)
    assert code == 0, output


def train(tiny_model, rows, out, ranks=1, **more):
    train_any(tiny_model, rows, out, ranks, **more)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_learns_alike_however_the_step_is_cut(tiny_model, rows, tmp_path, loss_type):
    whole = train(tiny_model, rows, tmp_path / "whole", loss_type=loss_type)
    logged = metrics(tmp_path / "whole")
    losses = [row["loss"] for row in logged]
    if loss_type == "nll":  # -p log p grows with p at first
        assert losses[-1] < 0.8 * losses[0]
        assert 0 <= logged[0]["mean_token_accuracy"] < logged[-1]["mean_token_accuracy"] <= 1
    cuts = {
        "one": {"max_tokens_per_micro_batch": 1},
        "two": {"ranks": 2, "max_tokens_per_micro_batch": 30},
        "acc": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true"},
        "four": {"ranks": 4},
    }
    for name, more in cuts.items() if loss_type == "nll" else [("two", cuts["two"])]:
        cut = train(tiny_model, rows, tmp_path / name, loss_type=loss_type, **more)
        for key in ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens", "epoch"):
            expected = [row[key] for row in logged]
            assert [row[key] for row in metrics(tmp_path / name)] == pytest.approx(expected, rel=1e-4), (name, key)
        assert all((cut[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)


def test_a_step_of_packed_rows_is_the_same_step(tiny_model, rows, tmp_path):
    """One step takes all rows, padded or packed: loss and gradient agree up to float32 rounding."""
    one_by_one = dict(max_steps=3, per_device_train_batch_size=20, max_tokens_per_micro_batch=1)
    whole = train(tiny_model, rows, tmp_path / "rows", **one_by_one)
    [bins] = re.findall(
        r"20 rows to train on in (\d+) bins, (?:9\d|100).\d % full", announced(tiny_model, rows, tmp_path)
    )
    packed = dict(max_steps=3, packing="true", max_length=80, per_device_train_batch_size=bins)
    for name, more in {"packed": {}, "ranks": {"ranks": 2, "per_device_train_batch_size": int(bins) // 2}}.items():
        found = train(tiny_model, rows, tmp_path / name, **(packed | more))
        for expected, row in zip(metrics(tmp_path / "rows"), metrics(tmp_path / name), strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert (row["num_tokens"], row["epoch"]) == (expected["num_tokens"], expected["epoch"])
        assert all((found[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)


def test_dft_weighs_each_token_by_its_probability():
    logps = torch.tensor([-0.1, -3.0], requires_grad=True)
    losses = token_losses(logps, loss_type="dft")
    assert losses.tolist() == pytest.approx([0.1 * math.exp(-0.1), 3 * math.exp(-3)])
    losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-math.exp(-0.1), -math.exp(-3)])


def announced(tiny_model, rows, tmp_path):
    """What a packed run prints before it starts."""
    options = dict(
        model_name_or_path=tiny_model,
        dataset_name=rows,
        output_dir=tmp_path / "said",
        max_steps=1,
        packing="true",
        max_length=80,
        report_to=["none"],
        save_strategy="no",
    )
    code, output = run(TRAIN, flags(**options), tmp_path / "said.log")
    assert code == 0 and "chat template: OK" in output, output
    return output


ORDERS = {
    "rows": {},
    "packed": {"packing": "true", "max_length": 40, "per_device_train_batch_size": 2},
    "streamed": {"dataset_streaming": "true", "packing": "true", "max_length": 40, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize(
    "order", ["packed", pytest.param("rows", marks=pytest.mark.slow), pytest.param("streamed", marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_a_pass_it_resumes_bitwise(tiny_model, rows, tmp_path, order):
    """Both ranks are killed twice. The rows come in windows of 6, and a step takes a part of one."""
    more = ORDERS[order] | {"per_device_train_batch_size": 1 + (order == "rows")}
    argv = flags(
        model_name_or_path=tiny_model,
        dataset_name=rows,
        learning_rate=1e-2,
        max_steps=6,
        report_to=["none"],
        save_strategy="steps",
        save_steps=1,
        **more,
    )
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        command = [*argv, f"--output_dir={folder}"]
        for step in (1, 3) if folder.name == "killed" else ():
            processes = start(TRAIN, command, tmp_path / "log", ranks=2, fault=faults.windows_of_six_rows)
            wait_for_step(folder, step)
            for process in processes:
                process.kill()
            wait(processes)
        code, output = run(TRAIN, command, tmp_path / "log", ranks=2, fault=faults.windows_of_six_rows)
        assert code == 0, output
    whole, killed = (load_file(folder / "model.safetensors") for folder in folders)
    assert all((killed[key] == whole[key]).all() for key in whole)
    timeless = [[{k: v for k, v in row.items() if k in KEPT} for row in metrics(folder)] for folder in folders]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 6


KEPT = {"step", "loss", "entropy", "mean_token_accuracy", "grad_norm", "learning_rate", "epoch", "num_tokens"}


def test_resumes_from_the_checkpoint_that_is_named(tiny_model, rows, tmp_path):
    """It may be in another folder. Each checkpoint is also a model folder, with a state that transformers can read."""
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


def test_other_rows_are_another_run(tiny_model, rows, tmp_path):
    """A state counts sequences, so it does not apply to other lengths or other trained tokens."""
    saving = dict(save_strategy="steps", save_steps=1, max_steps=1)
    train(tiny_model, rows, tmp_path / "out", **saving)
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=2)
    for change in ({"packing": "true"}, {"assistant_only_loss": "false"}, {"max_length": 12}):
        code, output = run(TRAIN, flags(**(options | change)), tmp_path / "log")
        assert code == 2 and "holds another run" in output and f"{next(iter(change))} is" in output


def test_checkpoints_of_the_model_alone(tiny_model, rows, tmp_path):
    argv = dict(save_strategy="steps", save_steps=3, save_only_model="true")
    train(tiny_model, rows, tmp_path / "out", **argv)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert not (tmp_path / "out" / "checkpoint-3" / "state").exists()
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out")
    code, output = run(TRAIN, flags(**options), tmp_path / "log")
    assert code == 2 and "checkpoint-6: it holds only the model (save_only_model)" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_the_loss_of_the_test_rows(tiny_model, rows, tmp_path, ranks):
    """With a learning rate of 0 and all rows in one step, training and evaluation give the same loss."""
    more = dict(
        max_steps=2,
        learning_rate=0,
        per_device_train_batch_size=20 // ranks,
        eval_strategy="steps",
        dataset_test_split=rows,
        max_tokens_per_micro_batch=50,
        eval_steps=2,
    )
    train(tiny_model, rows, tmp_path / "out", ranks, **more)
    first, second, evaluation = metrics(tmp_path / "out")
    assert evaluation["eval_loss"] == pytest.approx(first["loss"], rel=1e-6) and evaluation["step"] == 2
    assert evaluation["eval_entropy"] == pytest.approx(first["entropy"], rel=1e-6)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == results["train_samples"] == 20
    assert results["eval_loss"] == evaluation["eval_loss"] and results["train_loss"] == pytest.approx(first["loss"])


def test_the_best_checkpoint_is_the_final_model_and_outlives_the_limit(tiny_model, rows, tmp_path):
    """Here the greatest loss, that of the first checkpoint, is the best. A longer run resumes from the last one."""
    more = dict(eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=2, save_total_limit=1)
    more |= dict(dataset_test_split=rows, eval_on_start="true", load_best_model_at_end="true", greater_is_better="true")
    out = tmp_path / "out"
    for steps in (5, 6):  # 5 is not a multiple: the last checkpoint is compared, too
        final = train(tiny_model, rows, out, max_steps=steps, **more)
        evaluated = {row["step"]: row for row in metrics(out) if "eval_loss" in row}
        assert list(evaluated) == list(range(steps + 1)) and evaluated[1]["eval_loss"] > evaluated[2]["eval_loss"]
        state = TrainerState.load_from_json(out / "trainer_state.json")
        best = out / "checkpoint-2"
        assert (state.best_metric, state.best_global_step) == (evaluated[2]["eval_loss"], 2)
        assert state.best_model_checkpoint == str(best)
        assert {path.name for path in out.glob("checkpoint-*")} == {best.name, f"checkpoint-{steps}"}
        expected, last = (load_file(folder / "model.safetensors") for folder in (best, out / f"checkpoint-{steps}"))
        assert all((final[name] == expected[name]).all() for name in final)
        assert any((final[name] != last[name]).any() for name in final)
        assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == state.best_metric
    (best / "model.safetensors").unlink()
    argv = flags(model_name_or_path=tiny_model, dataset_name=rows, output_dir=out, max_steps=6, **more)
    code, output = run(TRAIN, argv, tmp_path / "log")
    assert code == 1 and "checkpoint-2 cannot be loaded (model.safetensors is missing): restore it" in output, output


def test_a_finished_run_without_checkpoints_is_not_trained_over(tiny_model, rows, tmp_path):
    before = train(tiny_model, rows, tmp_path / "out")
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out", max_steps=6)
    code, output = run(TRAIN, flags(**options), tmp_path / "log")
    assert code == 2 and "a finished model without a checkpoint to resume from" in output
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert len(metrics(tmp_path / "out")) == 6 and all((after[key] == before[key]).all() for key in before)


def test_the_model_is_safe_before_the_last_evaluation(tiny_model, rows, tmp_path):
    options = dict(
        model_name_or_path=tiny_model,
        dataset_name=rows,
        output_dir=tmp_path / "out",
        max_steps=1,
        save_strategy="no",
        do_eval="true",
        dataset_test_split=rows,
        report_to=["none"],
    )
    code, output = run(TRAIN, flags(**options), tmp_path / "log", fault=faults.break_the_evaluation)
    assert code == 1 and "no evaluation today" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_signal_leaves_something_to_resume_from_even_with_save_only_model(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole")
    options = dict(
        model_name_or_path=tiny_model,
        dataset_name=rows,
        output_dir=tmp_path / "out",
        max_steps=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_only_model="true",
        report_to=["none"],
        per_device_train_batch_size=8,
    )
    code, output = run(TRAIN, flags(**options), tmp_path / "log", fault=faults.terminate_in_the_second_step)
    assert code == 0 and "stopped by a signal after step 2: the same command resumes from there" in output
    code, output = run(TRAIN, flags(**options), tmp_path / "log1")
    assert code == 0, output
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all((found[key] == whole[key]).all() for key in whole)


def test_a_base_model_learns_chatml(tiny_model, rows, tmp_path):
    """Its embedding grows by two tokens, and the saved model stops at the end of turn."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    whole = train(base, rows, tmp_path / "whole", max_steps=2)
    two = train(base, rows, tmp_path / "two", max_steps=2, ranks=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert (tokenizer.eos_token, model.config.vocab_size) == ("<|im_end|>", len(tokenizer))
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id and "<|im_start|>" in tokenizer.chat_template
    assert all((two[key] - whole[key]).norm() < 1e-3 * whole[key].norm() for key in whole)
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    new = whole["model.embed_tokens.weight"][len(old) :]
    assert len(new) == 2 and (new - old.mean(0)).abs().max() < 0.05  # after two steps from their initial values
    options = dict(model_name_or_path=base, dataset_name=rows, output_dir=tmp_path / "out", use_peft="true")
    code, output = run(TRAIN, flags(**options), tmp_path / "log")
    assert code == 2 and "an adapter cannot hold the new tokens" in output
