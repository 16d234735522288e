"""The trainer classes around their loops: objects that are passed in, resuming, callbacks, clean-up after a call."""

import faulthandler
import fcntl
import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from grpo_core import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config
from sft_core.model.trl_names import quantised_options, with_init_kwargs, with_peft_config
from sft_core.run import distributed
from sft_core.run.callbacks import Callbacks
from tests.hub_server import HubServer
from tests.launch import metrics, run

ROWS = Dataset.from_list([{"prompt": f"{i} and {i}", "completion": f" make {2 * i}."} for i in range(16)])


def config(folder, **more):
    base = dict(
        max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", save_steps=1, max_length=99
    )
    return SFTConfig(output_dir=str(folder), **base | more)


def nothing_is_left(folder):
    """Check that no process group, variable, lock, signal handler or watchdog of a run remains."""
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not dist.is_initialized() and "RANK" not in os.environ and not distributed._locks


class Recorder(TrainerCallback):
    """Records the calls; raises at the step `fails`, stops after the step `stops`."""

    def __init__(self, fails=None, stops=None):
        self.called, self.fails, self.stops = [], fails, stops

    def on_train_begin(self, args, state, control, **kwargs):
        self.called.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.called.append(f"step {state.global_step}")
        if state.global_step == self.fails:
            raise ZeroDivisionError("in a step")
        control.should_training_stop |= state.global_step == self.stops
        control.should_save = state.global_step == 1

    def on_log(self, args, state, control, logs, **kwargs):
        assert state.log_history[-1] == logs and args.output_dir
        self.called.append("log")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.called.append(f"evaluate {sorted(metrics)[0]}")

    def on_save(self, args, state, control, **kwargs):
        self.called.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.called.append("end")


class Elsewhere(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs): ...


def test_a_step_that_raises_leaves_nothing_and_the_same_process_goes_on(tiny_model, tmp_path, monkeypatch):
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *a, **k: armed.append(1))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)
    handler = lambda *a: None  # noqa: E731
    monkeypatch.setattr(signal, "default_int_handler", None)  # only the previous handler may be restored
    before = signal.signal(signal.SIGINT, handler)
    out, whole = tmp_path / "out", tmp_path / "whole"
    fails = Recorder(fails=2)
    trainer = SFTTrainer(tiny_model, config(out), train_dataset=ROWS, callbacks=[fails])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not armed and signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)
    nothing_is_left(out)
    fails.fails = None
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == 3 == trainer.state.global_step
    assert [row["step"] for row in trainer.state.log_history] == [1, 2, 3]
    assert fails.called == "begin,step 1,log,save,step 2,begin,step 2,log,save,step 3,log,save,end".split(",")

    unbroken = SFTTrainer(tiny_model, config(whole), train_dataset=ROWS)
    assert unbroken.train().metrics["train_loss"] == result.metrics["train_loss"]
    nothing_is_left(whole)
    again = unbroken.train(resume_from_checkpoint=out / "checkpoint-2")  # from another folder, but the same run
    assert again.metrics["train_loss"] == result.metrics["train_loss"]


def test_a_model_and_a_tokenizer_that_are_handed_over(tiny_model, tmp_path, capsys, caplog):
    """The object is trained, each `train()` starts from its original weights, and it is evaluated before and after."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config._name_or_path = ""  # as if it was created here
    with pytest.raises(ValueError, match="give a processing_class"):
        SFTTrainer(model, config(tmp_path), train_dataset=ROWS)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder = Recorder(stops=2)
    options = config(tmp_path / "out", max_steps=9, save_strategy="no")
    trainer = SFTTrainer(
        model,
        options,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        callbacks=[recorder, Elsewhere],
    )
    assert "Elsewhere defines on_epoch_end, which is never called here" in caplog.text
    losses = [trainer.evaluate()["eval_loss"]]
    result = trainer.train()
    assert result.global_step == 2 and len(metrics(tmp_path / "out")) == 2  # it was stopped
    assert recorder.called == ["evaluate epoch", "begin", "step 1", "log", "save", "step 2", "log", "end"]
    losses += [trainer.evaluate()["eval_loss"]]
    assert losses[1] < losses[0]
    assert all((model.state_dict()[name] != tensor).any() for name, tensor in first.items())
    trainer.save_model(tmp_path / "copy")
    for folder in ("out", "copy"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "copy")) == len(trainer.processing_class)

    one = result.metrics["train_loss"]
    done: list = []
    thread = threading.Thread(target=lambda: done.append(trainer.train()))  # no signal handlers here
    thread.start()
    thread.join()
    assert done[0].metrics["train_loss"] == one
    printed = capsys.readouterr().out
    assert printed.count("was written to") == 1 and printed.count("moved the content of") == 1
    with torch.no_grad():  # weights that the caller changes are those that the next call begins with
        model.get_input_embeddings().weight.mul_(0.5)
    trainer.args.do_eval = True
    assert trainer.train().metrics["train_loss"] != one
    measured = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = ROWS.select(range(3))  # not the rows that the run evaluated
    assert trainer.evaluate()["eval_loss"] != measured
    assert not (tmp_path / "out" / ".evaluation").exists()


def test_callbacks_see_options_as_transformers_resolves_them(tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append((args.metric_for_best_model, args.greater_is_better))

    for metric in (None, "accuracy"):
        options = config(
            tmp_path, load_best_model_at_end=True, eval_strategy="steps", metric_for_best_model=metric, eval_steps=1
        )
        Callbacks([Looks])("on_evaluate", options.frozen(), transformers.TrainerState())
        assert options.metric_for_best_model == metric
    assert seen == [("eval_loss", False), ("eval_accuracy", True)]


def test_a_transform_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="train_dataset has a transform.*map"):
        SFTTrainer(tiny_model, config(tmp_path), train_dataset=ROWS.with_transform(lambda rows: rows))


def test_adapters_and_a_stream(tiny_model, tmp_path):
    stream = ROWS.to_iterable_dataset()
    with pytest.raises(ValueError, match="the length of a streamed data set is not known"):
        SFTTrainer(tiny_model, config(tmp_path / "out", max_steps=-1), train_dataset=stream).train()
    options = config(tmp_path / "out", max_steps=1)
    trainer = SFTTrainer(
        tiny_model,
        options,
        train_dataset=stream,
        eval_dataset=ROWS,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and trainer.evaluate()["eval_loss"] < before
    trainer.model.config.use_cache = True
    assert trainer.model.peft_config["default"].r == 2  # the adapter of its model
    assert trainer._trained.run.model.lora_alpha == 8  # peft's default, not ours


def test_the_hub(tiny_model, tmp_path, monkeypatch):
    """The run pushes its checkpoint, and `push_to_hub` pushes the model with its card."""
    with HubServer() as hub:
        hub.take_over(monkeypatch)
        options = config(tmp_path / "out", max_steps=1, push_to_hub=True, hub_model_id="me/m")
        trainer = SFTTrainer(tiny_model, options, train_dataset=ROWS)
        trainer.train()
        before = set(hub.repos["me/m"].files())
        trainer.push_to_hub("Mine", dataset_name="their/rows", tags="a-tag")
        files, titles = hub.repos["me/m"].files(), [title for _, title in hub.repos["me/m"].history()]
    assert "model.safetensors" in before and "README.md" not in before
    assert b"their/rows" in files["README.md"] and b"a-tag" in files["README.md"]
    assert titles == ["Mine", "Training in progress, step 1", "initial commit"]


def stop_on_the_last_rank(argv):
    """On the ranks of a launcher, only the last rank's callback asks to stop."""
    model, folder = argv
    stops = 1 if os.environ.get("RANK") == "1" else None
    trainer = SFTTrainer(model, config(folder), train_dataset=ROWS, callbacks=[Recorder(stops=stops)])
    assert trainer.train().global_step == 1
    trainer.train(resume_from_checkpoint=True)  # the group is joined again


main = stop_on_the_last_rank


@pytest.mark.slow
def test_ranks_stop_together_and_join_again(tiny_model, tmp_path):
    code, output = run(__name__, [tiny_model, str(tmp_path / "out")], tmp_path / "log", ranks=2)
    assert code == 0, output
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"train_dataset": None}, "train_dataset must be a datasets.Dataset .*, got NoneType"),
        ({"train_dataset": [{"text": "a"}]}, "must be a datasets.Dataset .*, got list"),
        ({"train_dataset": {"train": ROWS}}, "one split of a DatasetDict, .*, got dict"),
        ({"train_dataset": ROWS.select([])}, "train_dataset has no rows"),
        ({"eval_dataset": ROWS.to_iterable_dataset()}, "eval_dataset must be .*, got IterableDataset"),
        ({"args": {"eval_strategy": "steps"}}, "there is no eval_dataset"),
        ({"model": 3}, "model must be a Hub id, a folder or a model"),
        ({"data_collator": print}, "SFTTrainer does not take data_collator"),
        ({"callbacks": [print]}, "must be transformers' TrainerCallbacks"),
        ({"peft_config": {"r": 3}}, "peft_config is a dict, .*: give a LoraConfig"),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            "cannot be trained whole: give --use_peft true",
        ),
        ({"args": {"model_init_kwargs": {"device_map": {"a": 0}}}}, "device_map .* is not supported"),
        ({"args": {"model_init_kwargs": {"low_cpu_mem_usage": True}}}, "may not hold low_cpu_mem_usage"),
        ({"args": {"model_init_kwargs": {"dtype": "auto", "torch_dtype": torch.float32}}}, "give one of them"),
        ({"args": {"model_init_kwargs": {"dtype": torch.float16}}}, "dtype must be one of auto"),
    ],
)
def test_what_cannot_be_trained_is_said_when_the_trainer_is_made(tiny_model, tmp_path, more, says):
    given = {"model": tiny_model, "train_dataset": ROWS} | more | {"args": config(tmp_path, **more.get("args", {}))}
    with pytest.raises(ValueError, match=says):
        SFTTrainer(**given)


def test_what_is_said_at_training(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)  # before a weight is loaded
    trainer = SFTTrainer(tiny_model, config(tmp_path / "out"), train_dataset=ROWS)
    with pytest.raises(ValueError, match="no checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="cannot resume from nowhere: manifest.json is missing"):
        trainer.train(resume_from_checkpoint="nowhere")
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        trainer.save_model()
    with pytest.raises(ValueError, match="give the trainer an eval_dataset"):
        trainer.evaluate()
    nothing_is_left(tmp_path / "out")
    monkeypatch.setattr(distributed.lock_output_dir, "__defaults__", (0.1,))
    with open(tmp_path / "out" / ".lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another run"):
            trainer.train()
    nothing_is_left(tmp_path / "out")
    distributed.init_distributed()
    with pytest.raises(ValueError, match="has a process group already"):
        trainer.train()
    distributed.shutdown()


# --- options of TRL ----------------------------------------------------------------------------------------------


def test_configurations_of_peft_and_bitsandbytes_there_and_back():
    model = ModelConfig("m", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], use_dora=True)
    assert with_peft_config(ModelConfig("m"), get_peft_config(model)) == model
    model = ModelConfig(
        "m", use_peft=True, lora_target_modules=["all-linear"], load_in_4bit=True, use_bnb_nested_quant=True
    )
    quantised = quantised_options(get_quantization_config(model))
    assert quantised == {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
    }
    kwargs = {"quantization_config": get_quantization_config(model), "revision": "main", "use_cache": False}
    start = with_peft_config(ModelConfig("m"), get_peft_config(model))
    got, rest = with_init_kwargs(start, SFTConfig("o", model_init_kwargs=kwargs | {"torch_dtype": torch.bfloat16}))
    assert (got.load_in_4bit, got.dtype, got.torch_dtype, rest.model_init_kwargs) == (
        True,
        "bfloat16",
        "bfloat16",
        None,
    )
    assert get_peft_config(ModelConfig()) is None and get_quantization_config(ModelConfig()) is None


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"bias": "all"}, "bias, which is not supported"),
        (
            {"layers_to_transform": [0], "init_lora_weights": "pissa"},
            "init_lora_weights, layers_to_transform|layers_to",
        ),
        ({"target_modules": ".*q_proj"}, "is a pattern"),
        ({"task_type": "SEQ_CLS"}, "lora_task_type must be one of CAUSAL_LM"),
    ],
)
def test_what_peft_offers_and_is_not_here_is_refused_by_name(lora, says):
    with pytest.raises(ValueError, match=says):
        with_peft_config(ModelConfig("m"), LoraConfig(**lora))
