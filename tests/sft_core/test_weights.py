"""Weights that do not match their model end with one sentence and exit code 2, wherever a model is loaded."""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import grpo_core.train
import sft_core.train
from gen.engine.base import EngineConfig, make_engine
from gen.engine.torch import TorchEngine
from sft_core.model.policy import load_whole
from tests.eval.helpers import stones, write
from tests.grpo_core.test_train import options
from tests.launch import flags, run


def edited(change):
    """Damage a model: edit the tensors of model.safetensors by name."""

    def damage(folder: Path) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def untied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "prefix": (
        edited(lambda t: {f"base_model.model.{k}": v for k, v in t.items()}),
        f"missing: lm_head.weight, {EMBEDDING}, .*not in the model: base_model.model.model.embed_t",
    ),
    "missing": (edited(lambda t: {k: v for k, v in t.items() if k != UP}), rf"\(missing: {UP}\)"),
    "no embedding": (edited(lambda t: {k: v for k, v in t.items() if k != EMBEDDING}), f"missing: lm_.*{EMBEDDING}"),
    "shape": (edited(lambda t: t | {UP: t[UP][:-1].clone()}), rf"of another shape: {UP} \[95, 64\] for \[96, 64\]"),
    "a bias": (edited(lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), "proj.bias"),
    "more layers": (edited(lambda t: t | {UP.replace("1", "2"): t[UP].clone()}), "not in the model: mod"),
    "two ends": (edited(lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1}), "tied but not equal"),
    "untied": (untied, r"\(missing: lm_head.weight\)"),
    "truncated": (truncated, "cannot be loaded: check that its files are complete"),
    "absent": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded.*no file named model.safet"),
    "no shard": (without_a_shard, "cannot be loaded.*model-00001-of-00002.safetensors"),
    "not fetched": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
        "are complete",
    ),
    "adapter": (adapter, "adapter"),
}
SOUND = {
    "value head": (edited(lambda t: t | {"v_head.summary.weight": torch.zeros(1, 64)}), "v_head.summary.weight"),
    "head alone": (edited(lambda t: {k.replace(EMBEDDING, "lm_head.weight"): v for k, v in t.items()}), ""),
    "no prefix": (edited(lambda t: {k.removeprefix("model."): v for k, v in t.items()}), ""),
}


@pytest.fixture
def damaged(tiny_model, tmp_path):
    def make(damage) -> str:
        shutil.copytree(tiny_model, tmp_path / "model")
        damage(tmp_path / "model")
        return str(tmp_path / "model")

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_that_do_not_fill_the_model(name, damaged):
    damage, says = DAMAGES[name]
    folder = damaged(damage)
    loads = [load_whole, lambda folder: TorchEngine(folder, max_model_len=8)]
    if find_spec("vllm") and name != "two ends":  # only the values show that
        loads.append(lambda folder: make_engine("vllm", EngineConfig(folder, max_model_len=8)))
    for load in loads:
        with pytest.raises(ValueError, match=says) as error:
            load(folder)
        assert folder in str(error.value)


@pytest.mark.parametrize("name", SOUND)
def test_weights_that_do(name, damaged, tiny_model, caplog):
    damage, left_out = SOUND[name]
    with caplog.at_level(logging.WARNING):
        found, whole = load_whole(damaged(damage)), load_whole(tiny_model)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in whole.state_dict().items())
    assert left_out in caplog.text and bool(caplog.records) == bool(left_out)


def refused(module: str, argv: list[str], tmp_path: Path, **more) -> str:
    code, log = run(module, argv, tmp_path / "log", **more)
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in log, log
    return lines[0]


@pytest.mark.parametrize("program", ["sft", "grpo", "eval", "gen"])
@pytest.mark.parametrize("name", ["missing", "truncated"])
def test_every_program_says_it(program, name, damaged, problems, rows, tmp_path):
    damage, says = DAMAGES[name]
    model, out = damaged(damage), tmp_path / "out"
    if program == "sft":
        argv = flags(model_name_or_path=model, dataset_name=rows, output_dir=out, max_steps=1, report_to=["none"])
    elif program == "grpo":
        argv = options(model, problems, out)
    elif program == "eval":
        data = write(tmp_path / "aime.jsonl", stones(["1", "2"]))
        argv = flags(
            model=model, tasks="aime24", engine="torch", dataset=[f"aime24={data}"], output_dir=out, max_new_tokens=8
        )
    else:
        argv = [
            "--hf-dataset",
            problems,
            "--prompt-column",
            "prompt",
            "--output-dir",
            str(out),
            "--model",
            model,
            "--engine",
            "torch",
            "--max-new-tokens",
            "8",
        ]
    module = {"sft": "sft_core.train", "grpo": "grpo_core.train", "eval": "eval.run", "gen": "gen.generate"}[program]
    assert says.strip(r"\()").split(":")[0] in refused(module, argv, tmp_path)


# --- before any weight is loaded ---------------------------------------------------------------------------------


LFM2 = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 640,
    "layer_types": ["conv", "full_attention"],
    "initializer_range": 0.2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 10,
}
CONFIGS = {  # the change in the tiny model's config.json, and the message
    "lfm2": (AutoConfig.for_model("lfm2", **LFM2).to_dict(), "its architecture, lfm2, is"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised already"),
    "longrope": ({"rope_parameters": LONGROPE}, "longrope changes its factors after 10: lower"),
    "softcap": ({"attn_logit_softcapping": 50.0}, "caps or scales its scores or logits (attn_logit_softcapping)"),
}


@pytest.mark.parametrize("trainer", ["sft", "grpo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_are_refused_from_their_config(trainer, name, tiny_model, problems, rows, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    change, says = CONFIGS[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    main, argv = (
        (sft_core.train.main, flags(model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "out"))
        if trainer == "sft"
        else (grpo_core.train.main, options(folder, problems, tmp_path / "out"))
    )
    for more in ([], flags(dry_run="true", max_length=200) if trainer == "sft" else flags(dry_run="true")):
        with pytest.raises(SystemExit) as stopped:
            main(argv + more)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error: ") and says in error


def test_a_tokenizer_with_more_tokens_than_the_embedding(tiny_model, problems, tmp_path, capsys):
    """GRPO refuses it, since its engine has the folder's embedding; SFT enlarges the embedding (`test_train.py`)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit) as stopped:
        grpo_core.train.main(options(folder, problems, tmp_path / "out"))
    says = f"has {len(tokenizer)} tokens, more than the model's embedding: train the model with sft_core.train first"
    assert stopped.value.code == 2 and says in capsys.readouterr().err
