"""Changes between the calls of a trainer, and requests of callbacks, are obeyed or refused."""

import os
import signal

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from grpo_core import GRPOTrainer, SFTTrainer
from sft_core.lifecycle import TrainingRun
from sft_core.run.logging import MetricsLogger
from tests.grpo_core.test_trainer import ROWS as PROMPTS
from tests.grpo_core.test_trainer import config as grpo_config
from tests.launch import metrics
from tests.rewards_for_tests import digits
from tests.sft_core.test_trainer import ROWS, config, nothing_is_left


def trainer_of(model, folder, callbacks=(), peft_config=None, **more):
    options = config(folder, **{"max_steps": 1} | more)
    given = {"train_dataset": ROWS, "eval_dataset": ROWS, "callbacks": list(callbacks), "peft_config": peft_config}
    return SFTTrainer(model, options, processing_class=AutoTokenizer.from_pretrained(folder.parent / "tokens"), **given)


@pytest.fixture
def out(tiny_model, tmp_path):
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tokens")
    return tmp_path / "out"


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_what_the_model_holds_now_is_evaluated(tiny_model, out, named, monkeypatch):
    """Either the model object, or the one that `model` has loaded."""
    trainer = trainer_of(tiny_model if named else AutoModelForCausalLM.from_pretrained(tiny_model), out, do_eval=True)
    trainer.train()
    runs = []
    monkeypatch.setattr(SFTTrainer, "_running", lambda *a, run=SFTTrainer._running: runs.append(a) or run(*a))
    trained = trainer.evaluate()["eval_loss"]
    trainer.model.config.use_cache = True  # as in open-r1's scripts; it does not affect the evaluation
    assert trainer.evaluate()["eval_loss"] == trained and not runs  # the run has measured it
    trainer.args.max_length = 4
    assert trainer.evaluate()["eval_loss"] != trained and len(runs) == 1
    trainer.args.max_length = 99
    trainer.save_model(out / "copy")

    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(0.5)
    for name in ("save_model", "create_model_card", "push_to_hub"):  # these use output_dir
        with pytest.raises(ValueError, match="output_dir does not hold the model"):
            getattr(trainer, name)()
    changed = [trainer.evaluate()["eval_loss"]]
    trainer.model.save_pretrained(out / "changed")
    assert changed == [trainer_of(str(out / "changed"), out.parent / "other").evaluate()["eval_loss"]]
    assert abs(changed[0] - trained) > 1e-3
    assert trainer._model().model_name_or_path.startswith(str(out / ".given-"))  # and the next training starts from it


def test_adapters_are_evaluated_as_the_best_checkpoint_has_them(tiny_model, out):
    """The adapters of output_dir are evaluated, not those of the last step."""
    more = dict(max_steps=3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True)
    trainer = trainer_of(tiny_model, out, peft_config=LoraConfig(r=2, target_modules="all-linear"), **more)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-1")
    best = [row["eval_loss"] for row in trainer.state.log_history if row["step"] == 1 and "eval_loss" in row]
    trainer.eval_dataset = ROWS.select(range(len(ROWS)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-6)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).add_(1)
    with pytest.raises(ValueError, match="has adapters .* made or changed outside train"):
        trainer.evaluate()


def test_after_a_run_that_failed_the_object_is_evaluated(tiny_model, out):
    """Then output_dir does not contain the first run's model, and the second run starts from the original weights."""
    fails = Asks("on_step_end", 2, "ZeroDivisionError")
    trainer = trainer_of(AutoModelForCausalLM.from_pretrained(tiny_model), out, [fails], do_eval=True)
    trainer.train()
    trained = trainer.evaluate()["eval_loss"]
    trainer.args.max_steps = 2
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] == trained
    with pytest.raises(ValueError, match="output_dir does not hold the model"):
        trainer.save_model(out / "copy")
    fails.step = 0
    assert trainer.train(resume_from_checkpoint=True).global_step == 2


# --- what is assigned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("args.eval_strategy", "steps", "there is no eval_dataset"),
        ("args.output_dir", "", "output_dir is missing"),
        ("args", None, "args must be a (SFT|GRPO)Config"),
        ("train_dataset", [{"text": "a"}], "train_dataset must be a datasets.Dataset .*, got list"),
        ("eval_dataset", ROWS.to_iterable_dataset(), "eval_dataset must be .*, got IterableDataset"),
        ("processing_class", "a name", "processing_class must be a tokenizer, got "),
        ("train_dataset", PROMPTS.rename_column("prompt", "problem"), "no column `prompt`"),
        ("reward_funcs", [digits, 7], "reward_funcs must be functions or names of rewards, got 7"),
        ("reward_funcs", [], "reward_funcs is missing"),
    ],
)
def test_what_is_assigned_is_checked_as_what_is_handed_over(tiny_model, tmp_path, name, value, says):
    if name == "reward_funcs" or "prompt" in says:
        trainer = GRPOTrainer(tiny_model, digits, grpo_config(tmp_path), train_dataset=PROMPTS)
    else:
        trainer = SFTTrainer(tiny_model, config(tmp_path), train_dataset=ROWS)
    target, _, field = name.rpartition(".")
    setattr(trainer.args if target else trainer, field, value)
    with pytest.raises(ValueError, match=says):
        trainer.train()


def test_a_subclass_that_overrides_what_is_never_called_is_refused(tiny_model, tmp_path):
    class Own(SFTTrainer):
        def helper(self): ...

    class Other(Own):
        def compute_loss(self, model, inputs): ...

    class Another(GRPOTrainer):
        def _calculate_rewards(self): ...

    assert Own(tiny_model, config(tmp_path), train_dataset=ROWS).helper() is None
    with pytest.raises(ValueError, match="Other defines compute_loss, which would never be called here"):
        Other(tiny_model, config(tmp_path), train_dataset=ROWS)
    with pytest.raises(ValueError, match="Another defines _calculate_rewards"):
        Another(tiny_model, digits, grpo_config(tmp_path), train_dataset=PROMPTS)


@pytest.mark.parametrize(
    ("option", "argument", "resumes"),
    [("true", None, True), (None, "true", True), ("true", False, False), ("folder", None, True), (None, None, False)],
)
def test_args_resume_from_checkpoint_and_an_assigned_tokenizer_are_taken(
    tiny_model, tmp_path, option, argument, resumes, monkeypatch
):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    handed = []

    def begin(trainer, model, config, given):
        handed.append((config.resume_from_checkpoint, given.anew, given.processing_class))
        raise ValueError("seen")

    monkeypatch.setattr(SFTTrainer, "_begin", begin)
    options = config(tmp_path, resume_from_checkpoint=str(folder) if option == "folder" else option)
    trainer = SFTTrainer(tiny_model, options, train_dataset=ROWS)
    trainer.processing_class = tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="seen"):
        trainer.train(resume_from_checkpoint=argument)
    assert handed == [(str(folder) if option == "folder" else None, not resumes, tokenizer)]


# --- what callbacks ask for ------------------------------------------------------------------------------------------


class Asks(TrainerCallback):
    """Sets fields of `control` in a hook of a step."""

    def __init__(self, hook, step, *fields):
        self.hook, self.step, self.fields = hook, step, fields
        setattr(self, hook, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for field in self.fields:
                setattr(control, field, True)
            if "ZeroDivisionError" in self.fields:
                raise ZeroDivisionError
            if "signal" in self.fields:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_evaluate"])
def test_a_stop_that_is_asked_for_before_the_first_step_takes_none(tiny_model, out, hook):
    trainer = trainer_of(tiny_model, out, [Asks(hook, 0, "should_training_stop")], eval_on_start=True)
    assert trainer.train().global_step == 0 and (out / "model.safetensors").is_file()


def test_the_end_of_an_epoch_cannot_be_asked_for(tiny_model, out):
    trainer = trainer_of(tiny_model, out, [Asks("on_step_end", 1, "should_epoch_stop")])
    with pytest.raises(ValueError, match="should_epoch_stop, .*: set control.should_training_stop"):
        trainer.train()
    nothing_is_left(out)


def test_what_on_log_asks_for_is_done_at_its_step(tiny_model, out):
    trainer = trainer_of(tiny_model, out, [Asks("on_log", 1, "should_evaluate")], max_steps=2, do_eval=True)
    trainer.train()
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [1, 2]


BEST = dict(max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True)


@pytest.mark.parametrize(
    ("asked", "greater", "best"),
    [
        ((1, "should_save"), True, 1),
        ((3, "should_save", "should_training_stop"), False, 3),
        ((1, "signal"), True, 2),  # after step 2, where an evaluation is due
        ((3, "signal"), False, 4),  # after the last step
    ],
)
def test_every_checkpoint_competes_for_the_best(tiny_model, out, asked, greater, best):
    """It does not matter who asked for it. The loss falls with each step, so the greatest is that of the first."""
    trainer = trainer_of(tiny_model, out, [Asks("on_step_end", *asked)], **BEST, greater_is_better=greater)
    if "signal" in asked:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.callbacks.callbacks.clear()
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train()
    evaluated = {row["step"]: row["eval_loss"] for row in metrics(out) if "eval_loss" in row}
    assert sorted(evaluated, key=evaluated.get, reverse=True) == sorted(evaluated)
    assert set(evaluated) == {int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")}
    assert trainer.state.best_model_checkpoint == str(out / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == evaluated[best]


# --- failures before the loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [TrainingRun, MetricsLogger])
def test_what_fails_before_the_loop_leaves_nothing_and_loads_no_weights(tiny_model, out, where, monkeypatch):
    """One such failure is that of a tracker during its set-up."""
    trainer = trainer_of(tiny_model, out)

    def fail(*args, **more):
        raise RuntimeError("not today")

    monkeypatch.setattr(where, "__init__", fail)
    monkeypatch.setattr("sft_core.lifecycle.load_policy", None)
    with pytest.raises(RuntimeError, match="not today"):
        trainer.train()
    nothing_is_left(out)
