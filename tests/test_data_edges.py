"""Edge cases of configuration, paths, data files and modes: each is right, or refused in one sentence that names it."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from safetensors.torch import save_file
from torch import ones

from eval.config import DecontaminateConfig, EvalConfig, PassRateConfig
from gen.config import GenerateConfig
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from sft_core.data.rows import json_lines, load_rows, load_splits
from sft_core.model.export import _replace
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig
from sft_core.run.distributed import lock_output_dir, unlock_output_dir

TRAINING = (GRPOScriptArguments, GRPOConfig, ModelConfig)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_mode_that_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        _replace(tmp_path / "out", lambda folder: save_file({"w": ones(1)}, folder / "model.safetensors"))
        lock_output_dir(tmp_path / "out")
    finally:
        os.umask(before)
        unlock_output_dir(tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"model.safetensors": 0o666 & ~umask, ".lock": 0o666 & ~umask}


@pytest.mark.parametrize(
    ("recipe", "argv", "expected"),
    [
        ("lr_scheduler_kwargs: {min_lr: 1e-7}", [], {"lr_scheduler_kwargs": {"min_lr": 1e-7}}),
        (
            "lr_scheduler_kwargs: {min_lr: -1E+2, name: 1e7x}",
            [],
            {"lr_scheduler_kwargs": {"min_lr": -100.0, "name": "1e7x"}},
        ),
        (
            "dataset_mixture: {datasets: [{id: a, weight: 5e-1}]}",
            [],
            {"dataset_mixture": {"datasets": [{"id": "a", "weight": 0.5}]}},
        ),
        (
            "eval_strategy: no\nreport_to: no\ndataset_config: no\nrun_name: 1e-3\nmodel_revision: 12e5678",
            [],
            {"eval_strategy": "no", "report_to": ["no"], "dataset_config": "no"}
            | {"run_name": "1e-3", "model_revision": "12e5678"},
        ),
        (
            "bf16: off\nlog_completions: on\nshuffle_dataset: no",
            [],
            {"bf16": False, "log_completions": True, "shuffle_dataset": False},
        ),
        ("remove_unused_columns: no", [], {}),
        ("seed: 1", ["--reward_weights", "1", "-1e-3", "-.5", "-2."], {"reward_weights": [1.0, -1e-3, -0.5, -2.0]}),
        ("seed: 1", ["--cosine_min_value_wrong", "-1e-3"], {"cosine_min_value_wrong": -1e-3}),
        ("save_strategy: off", [], "save_strategy must be one of no, steps, epoch, got 'off'"),
        ("chat_template_kwargs: {enable_thinking: no}", [], {"chat_template_kwargs": {"enable_thinking": False}}),
        ("report_to: [no]", [], "report_to must be a list in which each entry is text, got [False]"),
        ("learning_rate: .inf", [], "learning_rate must be finite, got inf"),
        ("num_train_epochs: .inf", [], "num_train_epochs must be finite, got inf"),
        ("reward_weights: [.nan, 1]", [], "reward_weights must be finite, got [nan, 1]"),
        ("lr_scheduler_kwargs: {min_lr: .nan}", [], "lr_scheduler_kwargs must be finite, got {'min_lr': nan}"),
        ("seed: 1", ["--lr_scheduler_kwargs", '{"min_lr": Infinity}'], "lr_scheduler_kwargs must be finite"),
        ("lr_scheduler_kwargs: cosine", [], "lr_scheduler_kwargs must be a JSON object, got 'cosine'"),
        ("seed: 1", ["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs must be a JSON object, got '[1]'"),
        (
            "dataset_mixture: {datasets: [openai/gsm8k]}",
            [],
            "datasets must be a list in which each entry is a JSON object",
        ),
        ("dataset_mixture: {datasets: [{id: a, weight: half}]}", [], "weight must be a number, got 'half'"),
        ("dataset_mixture: {datasets: [{id: a, weight: .nan}]}", [], "dataset_mixture must be finite, got"),
        ("vllm_importance_sampling_clip_max: .inf", [], {"vllm_importance_sampling_clip_max": float("inf")}),
        ("3: 1", [], "unknown key `3` in recipe.yaml"),
        ("env: [A]", [], "`env` in recipe.yaml must hold `NAME: value` lines"),
        ("env: A", [], "`env` in recipe.yaml must hold `NAME: value` lines"),
        ("env: {A: [1]}", [], "`env` in recipe.yaml must hold `NAME: value` lines"),
        (b'run_name: "\xff"', [], "recipe.yaml is not valid YAML: unacceptable character #x00ff"),
    ],
)
def test_values_of_recipes(recipe, argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    argv = ["--config", "recipe.yaml", *argv]
    if isinstance(expected, str):
        with pytest.raises(ValueError) as refused:
            parse(TRAINING, argv)
        assert expected in str(refused.value)
        return
    found = {name: value for config in parse(TRAINING, argv) for name, value in vars(config).items()}
    assert {name: found[name] for name in expected} == expected


def test_the_environment_gets_what_is_written(tmp_path, monkeypatch):
    for name in ("EDGE_A", "EDGE_B"):
        monkeypatch.setenv(name, "")
    (tmp_path / "recipe.yaml").write_text("env: {EDGE_A: no, EDGE_B: 1e-7}")
    monkeypatch.setenv("HOME", str(tmp_path))
    parse(TRAINING, ["--config", "~/recipe.yaml"])
    assert (os.environ["EDGE_A"], os.environ["EDGE_B"]) == ("no", "1e-7")


@pytest.mark.parametrize(
    ("kind", "names", "more"),
    [
        (ModelConfig, ["model_name_or_path"], {}),
        (SFTConfig, ["output_dir", "resume_from_checkpoint", "chat_template"], {}),
        (GRPOConfig, ["output_dir", "resume_from_checkpoint", "save_rollouts", "rollouts_from"], {}),
        (ScriptArguments, ["dataset_name", "dataset_test_split"], {}),
        (EvalConfig, ["model", "output_dir", "custom_tasks"], {"tasks": "math_500"}),
        (PassRateConfig, ["model", "output_dir", "dataset_name"], {}),
        (DecontaminateConfig, ["dataset", "output_dir", "custom_tasks"], {}),
        (GenerateConfig, ["hf_dataset", "model", "output_dir"], {"engine": "torch"}),
    ],
)
def test_home_and_a_slash_at_the_end_of_every_path(kind, names, more, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = kind(**{name: f"~/{name}/" for name in names}, **more)
    assert [getattr(config, name) for name in names] == [f"/home/me/{name}" for name in names]


@pytest.mark.parametrize("text", ["model/", "{}/model/", "no/folder/", "/", "https://host/", "~"])
def test_only_a_folder_loses_its_slash(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    text = text.format(tmp_path)
    assert ModelConfig(text).model_name_or_path == (text[:-1] if text.endswith("model/") else text)


TEXT = "".join(json.dumps({"prompt": f"p{i}", "solution": str(i)}) + "\n" for i in range(3)).encode()
MANY = json.dumps({"prompt": "p" * 2**20, "solution": "1"}).encode() + b"\n"  # `datasets` infers types from 10 MiB


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.JSONL", TEXT, None),
        ("rows.jsonl.gz", gzip.compress(TEXT, mtime=0), None),
        ("Rows.JSON.GZ", gzip.compress(TEXT, mtime=0), None),
        ("rows.json", b"\xef\xbb\xbf" + TEXT, None),
        (
            "rows.csv",
            b"prompt,solution\n",
            "rows.csv (a folder, or one of .json, .jsonl, .json.gz, .jsonl.gz, .parquet)",
        ),
        ("rows.parquet.gz", b"", "rows.parquet.gz (a folder, or one of"),
        (
            "rows.jsonl",
            TEXT + b'{"prompt": "\xff"}\n',
            "cannot be read: line 4 is not a JSON object: 'utf-8' codec can't",
        ),
        (
            "rows.jsonl.gz",
            gzip.compress(TEXT, mtime=0)[:-9],
            "rows.jsonl.gz cannot be read as json: Compressed file ended before",
        ),
        (
            "late.jsonl",
            MANY * 11 + b'{"prompt": {"a": 1}, "solution": "1"}\n',
            "in line 12 `prompt` is {'a': 1}, above a str",
        ),
        ("late.jsonl", MANY * 11 + b'{"prompt": "p", "solution": 5}\n', "in line 12 `solution` is 5, above a str"),
    ],
)
def test_data_files(name, content, says, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    if says is None:
        assert load_rows(str(file))[:] == {"prompt": ["p0", "p1", "p2"], "solution": ["0", "1", "2"]}
        assert len(json_lines(str(file))) == 3 and len(list(load_rows(str(file), streaming=True))) == 3
        return
    with pytest.raises(ValueError) as refused:
        load_rows(str(file))
    assert says in str(refused.value)


@pytest.mark.parametrize("form", ['[{"m": [1]},\n {"m": ["a"]}]', '{\n"m": [1]}\n{\n"m": [2]}'])
def test_json_that_is_not_one_row_a_line(form, tmp_path):
    file = str(tmp_path / "rows.json")
    Path(file).write_text(form)
    assert load_rows(file)["m"][0] == [1] and json_lines(file) == []


def test_what_is_missing_or_cannot_be_written_is_named(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict(train=rows, val=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="it has train, val. Name one, or check --dataset_test_split"):
        load_splits(ScriptArguments(dataset_name=str(tmp_path / "saved")), test=True)
    mixture = {"datasets": [{"id": str(tmp_path / "saved"), "weight": 0.1}]}
    with pytest.raises(ValueError, match="weight 0.1 of .* leaves none of its 2 rows"):
        load_splits(ScriptArguments(dataset_mixture=mixture), test=False)
    with pytest.raises(ValueError, match=r"cannot write to the folder /dev/null/out.*another --output_dir"):
        lock_output_dir("/dev/null/out")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(TEXT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/cache")
    with pytest.raises(ValueError, match=r"cannot write to the folder /dev/null/cache.*set HF_HOME"):
        load_rows(str(file))
    assert len(load_rows(str(tmp_path / "saved"), split="val")) == 2  # it needs no cache
