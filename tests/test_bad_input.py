"""Invariant 9: bad input ends with one clear sentence and exit code 2 before weights are loaded; no files are lost."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset

import grpo_core.train
import sft_core
import sft_core.train
from tests.grpo_core.test_train import TRAIN, options, weights
from tests.launch import flags, refusal, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """No test of this module may load weights."""

    def refuse(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


BEST = {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lerning_rate": 1}, "did you mean `learning_rate`?"),
        ({"learning_rate": "fast"}, "invalid float value"),
        ({"model_name_or_path": "./no/such/folder"}, "no model folder at ./no/such/folder"),
        ({"dataset_name": "./nothing.jsonl"}, "no data file at ./nothing.jsonl"),
        ({"dataset_name": "./no/folder"}, "no data set at ./no/folder"),
        ({"dataset_prompt_column": "question"}, "it has prompt, solution: name one with --dataset_prompt_column"),
        ({"reward_funcs": ["acuracy"]}, "did you mean 'accuracy'?"),
        ({"reward_funcs": ["no_such_module:reward"]}, "cannot import the reward"),
        ({"reward_weights": [1, 2]}, "give one weight each"),
        ({"engine": "sglang"}, "--engine: invalid choice: 'sglang'"),
        ({"vllm_tensor_parallel_size": 2}, "engine torch has no tensor parallelism"),
        ({"reward_num_workers": 0}, "reward_num_workers must be at least 1"),
        ({"reward_timeout": 0}, "reward_timeout must be above 0"),
        ({"output_dir": "/dev/null/out"}, "Choose another --output_dir"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, dapo"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"loss_type": "cispo"}, "cispo needs epsilon_high"),
        ({"top_p": 0.9}, "leave them out in training"),
        ({"top_k": 50}, "leave them out in training"),
        ({"min_p": 0.1}, "leave them out in training"),
        ({"generation_kwargs": '{"stop_token_ids": [1, 9999]}'}, "stop_token_ids [9999] are not tokens"),
        (
            {"chat_template_kwargs": '{"thinking": true}'},
            "row 1 of the data: the chat template does not use `thinking`",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required positional argument: 'num_decay_steps'"),
        ({"repetition_penalty": 1.1}, "leave them out in training"),
        ({"max_completion_length": 200}, "the model has 256 positions: lower --max_prompt_length"),
        ({"max_prompt_length": 3}, "all 24 prompts are longer than max_prompt_length 3: raise it"),
        ({"fp16": "true"}, "use --bf16 true"),
        ({"lr_scheduler_type": "sawtooth"}, "invalid choice: 'sawtooth'"),
        ({"lr_scheduler_kwargs": '{"min_lr": 1}'}, "got an unexpected keyword argument 'min_lr'"),
        ({"report_to": ["mlfow"]}, "mlfow is not supported, only azure_ml, "),
        ({"report_to": ["comet_ml"]}, "Run `pip install comet-ml>="),
        ({"generation_batch_size": 10}, "must be a multiple of num_generations 4 and of the 12 completions"),
        ({"sync_ref_model": "true", "use_peft": "true"}, "which never changes: leave out --sync_ref_model"),
        (BEST, "metric_for_best_model loss is not a metric of the evaluation: give one of reward, reward_std"),
        (BEST | {"metric_for_best_model": "eval_rewards/digit/mean"}, "of reward, reward_std, frac_reward_zero_std"),
        ({"save_steps": 0}, "save_steps must be above 0"),
        ({"engine": "vllm", "vllm_tensor_parallel_size": 3}, "must divide the number of ranks, 1"),
        ({"rollouts_from": "./no/rollouts"}, "no folder of rollouts at ./no/rollouts"),
        ({"rollouts_from": "tests", "dynamic_sampling": "true"}, "a replay of rollouts samples nothing"),
        ({"output_dir": ""}, "--output_dir is missing"),
        ({"benchmarks": ["math500"]}, "benchmarks: unknown task 'math500': did you mean math_500?"),
        ({"benchmarks": ["math_500"], "benchmark_kwargs": '{"limits": 3}'}, "did you mean `limit`?"),
        ({"benchmarks": ["math_500"], "benchmark_kwargs": '{"model": "x"}'}, "may not hold model"),
        ({"callbacks": ["early_stopping"]}, "--callbacks: invalid choice: 'early_stopping'"),
        ({"chat_template": "chat.jinja"}, "'chat.jinja' is neither Jinja text nor a file"),
        ({"torch_dtype": "float16"}, "invalid choice: 'float16'"),
        ({"do_eval": "true"}, "has no splits: name another file with --dataset_test_split FILE"),
        ({"num_generations_eval": 0}, "num_generations_eval must be at least 1"),
        ({"scale_rewards": "maybe"}, "unknown scale_rewards 'maybe': give group, batch or none"),
        ({"load_in_4bit": "true"}, "a quantised model cannot be trained whole: give --use_peft true"),
        ({"reward_funcs": ["cf_code"]}, "sandbox"),
        ({"optim": "adafactor"}, "invalid choice: 'adafactor'"),
        ({"resume_from_checkpoint": "./nowhere"}, "cannot resume from ./nowhere: manifest.json is missing"),
        ({"resume_from_checkpoint": "false"}, "to start over, give another --output_dir"),
    ],
)
def test_bad_options(change, says, tiny_model, problems, tmp_path, capsys):
    argv = options(tiny_model, problems, tmp_path / "out") + flags(**change)
    assert says in refusal(grpo_core.train.main, argv, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_data_without_an_answer_names_its_columns(tiny_model, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1+1?", "reply": "2"}) + "\n")
    argv = options(tiny_model, data, tmp_path / "out", reward_funcs=["accuracy"])
    assert "needs a column `solution` or `answer`" in (line := refusal(grpo_core.train.main, argv, capsys))
    assert "has prompt, reply" in line
    argv = flags(model_name_or_path=tiny_model, dataset_name=data, output_dir=tmp_path / "out")
    line = refusal(sft_core.train.main, argv, capsys)
    assert "needs a column `messages`, or `prompt` and `completion`, or `text`" in line and "has prompt, reply" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{oops\n", "cannot be read as json"),
        ("", "rows.jsonl"),
        (
            '{"prompt": null, "solution": "1"}\n',
            "row 1 of the data: `prompt` must be text or a list of messages, and is empty",
        ),
        (
            '{"prompt": "1+1?"}\n{"prompt": 2}\n',
            "row 2 of the data: `prompt` must be text or a list of messages, and is 2",
        ),
        (
            '{"prompt": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n',
            "row 1 of the data: `prompt` ends with an assistant message",
        ),
    ],
)
def test_damaged_data(text, says, tiny_model, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    assert says in refusal(grpo_core.train.main, options(tiny_model, data, tmp_path / "out"), capsys)


CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.mark.parametrize(
    ("text", "change", "says"),
    [
        (CHAT * 3 + CHAT[:40], {}, "line 4 is not a JSON object: the file ends in the middle of it"),
        (CHAT + CHAT[:40] + "\n" + CHAT, {}, "line 2 is not a JSON object"),
        ("[1]\n", {}, "row 1 of the data: `text` must be text and is int"),
        (CHAT.replace("assistant", "bot"), {}, "row 1 of the data: unknown role 'bot' in `messages`"),
        (CHAT + CHAT.replace('"ho"', "null"), {}, "row 2 of the data: a message of the assistant in `messages` is not"),
        (CHAT.replace("assistant", "user"), {}, "none of the 1 rows has a trained token within max_length 1024"),
        (CHAT, {"max_length": 3}, "none of the 1 rows has a trained token within max_length 3"),
        (CHAT.replace('"ho"', '"' + "ho " * 300 + '"'), {}, "has 256 positions: lower --max_length to 256"),
        (
            CHAT,
            {"chat_template": "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"},
            "neither {% generation %} markers nor a generation prompt",
        ),
        (CHAT, {"eos_token": "<nothing>"}, "eos_token '<nothing>' is not in the tokenizer's vocabulary"),
        ('{"story": "x"}\n', {}, "or `text`, and it has story: rename its columns"),
        (CHAT, {"dataset_streaming": "true"}, "give the number of steps with --max_steps"),
        (CHAT, {"dataset_streaming": "true", "max_steps": 2}, "take 1024 tokens, but the model has 256 positions"),
        (CHAT.replace("assistant", "bot"), {"dataset_streaming": "true", "max_steps": 2}, "row 1 of the data: unknown"),
        (CHAT * 3 + CHAT[:40], {"dataset_streaming": "true", "max_steps": 2}, "line 4 is not a JSON object: the file"),
        (CHAT, {"gradient_checkpointing_every": 2}, "give --gradient_checkpointing true too"),
        (CHAT, {"chat_template": "{% for"}, "the chat template is not valid Jinja"),
        ("", {"dataset_streaming": "true", "max_steps": 2}, "rows.jsonl cannot be read as json: no rows"),
        (
            CHAT,
            {"dataset_streaming": "true", "max_steps": 2, "save_strategy": "epoch"},
            "has no epochs: set save_strategy",
        ),
        ('{"text": "a", "completion": "b"}\n', {"max_length": 1}, "max_length must be at least 2"),
        (CHAT, {"dry_run": "true"}, "a row may take 1024 tokens, but the model has 256 positions"),
        (CHAT, {"dry_run": "true", "max_length": 200, "use_peft": "true", "lora_target_modules": ["w"]}, "names 'w'"),
        (CHAT, {"loss_type": "mse"}, "invalid choice: 'mse'"),
        (CHAT, {"truncation_mode": "middle"}, "invalid choice: 'middle'"),
        (CHAT, {"dataset_num_proc": 0}, "dataset_num_proc must be at least 1"),
    ],
)
def test_rows_and_options_of_supervised_training(text, change, says, tiny_model, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    argv = flags(model_name_or_path=tiny_model, dataset_name=data, output_dir=tmp_path / "out", **change)
    assert says in refusal(sft_core.train.main, argv, capsys)


def test_a_saved_set_without_rows(tiny_model, tmp_path, capsys):
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    argv = flags(model_name_or_path=tiny_model, dataset_name=tmp_path / "saved", output_dir=tmp_path / "out")
    assert "saved has no rows" in refusal(sft_core.train.main, argv, capsys)


def test_unknown_key_in_a_recipe(tiny_model, problems, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"learning_rate": "1e-6", "num_generation": 4}))
    argv = ["--config", str(recipe), *options(tiny_model, problems, tmp_path / "out")]
    assert f"unknown key `num_generation` in {recipe}: did you mean `num_generations`?" in refusal(
        grpo_core.train.main, argv, capsys
    )
    assert "no recipe at nowhere.yaml" in refusal(grpo_core.train.main, ["--config=nowhere.yaml"], capsys)


def test_vllm_asked_for_but_absent(tiny_model, problems, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    argv = options(tiny_model, problems, tmp_path / "out", engine="vllm")
    assert "use --engine torch" in refusal(grpo_core.train.main, argv, capsys)


def test_bf16_where_impossible(monkeypatch):
    from sft_core.model.policy import compute_in_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="use --bf16 false"):
        compute_in_bf16(True, None, torch.device("cuda"))
    assert compute_in_bf16(None, "auto", torch.device("cuda")) is False


def test_the_hubs_kernels_package_in_the_way(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1")
    with pytest.raises(SystemExit) as stopped:
        sft_core.refuse_foreign_kernels()
    assert stopped.value.code == 2 and "run `pip uninstall kernels`" in capsys.readouterr().err


@pytest.mark.slow
def test_the_folder_of_another_run(tiny_model, problems, tmp_path):
    """It is refused, or moved aside as a whole. The run's own command resumes and reports what has changed."""
    out = tmp_path / "out"
    argv = options(tiny_model, problems, out, max_steps=1, save_strategy="steps", save_steps=1)
    assert run(TRAIN, argv, tmp_path / "log")[0] == 0
    before = weights(out)
    other = Path(problems).read_text().replace("and finds 23 more", "and finds 32 more")  # the last row
    (tmp_path / "other.jsonl").write_text(other)
    code, output = run(TRAIN, argv + flags(dataset_name=tmp_path / "other.jsonl"), tmp_path / "log0")
    assert code == 2 and "(data is '" in output, output
    code, output = run(TRAIN, argv + flags(max_steps=2, beta=0.5, system_prompt="Add."), tmp_path / "log2")
    warning = [line for line in output.splitlines() if line.startswith("warning: options differ")]
    assert code == 0 and warning == [
        "warning: options differ from those of the interrupted run: max_steps is 1 there, 2 here; "
        "system_prompt is '' there, 'Add.' here; beta is 0.04 there, 0.5 here"
    ], output
    before = weights(out)
    code, output = run(TRAIN, argv + flags(seed=7), tmp_path / "log1")
    assert code == 2 and "seed is 42 there, 7 here" in output and "--overwrite_output_dir" in output
    assert "options" not in output
    assert all((weights(out)[name] == before[name]).all() for name in before)
    code, output = run(TRAIN, argv + flags(seed=7, overwrite_output_dir="true"), tmp_path / "log3")
    assert code == 0, output
    assert all((weights(out / "previous-1")[name] == before[name]).all() for name in before)
    assert (out / "previous-1" / "checkpoint-1" / "manifest.json").exists()


def test_the_exit_code_of_a_real_command(tmp_path):
    command = [sys.executable, "-m", "grpo_core.train", "--model_name_or_path=./nowhere", "--dataset_name=x.jsonl"]
    command.append(f"--output_dir={tmp_path}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: there is no model folder at ./nowhere" in done.stderr
    assert "Traceback" not in done.stderr
