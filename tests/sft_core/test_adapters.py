"""Adapters: what is trained, frozen and written; merging changes no log-prob."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sft_core.train
from sft_core.model.policy import load_tokenizer
from sft_core.run.config import ModelConfig
from tests.launch import flags, metrics
from tests.processes import run_ranks
from tests.sft_core.test_train import train_any

TRAIN = "sft_core.train"
LORA = dict(use_peft="true", lora_r=4, lora_dropout=0.0)
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora, saved": {"use_rslora": True, "lora_modules_to_save": ["lm_head", "input_layernorm"]},
    "4bit": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "8bit": {"load_in_8bit": True},
}


def train(tiny_model, rows, out, ranks=1, **more):
    train_any(tiny_model, rows, out, ranks, **(LORA | {"max_steps": 4} | more))
    return load_file(out / "adapter_model.safetensors")


def losses(out):
    return [row["loss"] for row in metrics(out) if "loss" in row]


# --- formulas and files, without a trainer -----------------------------------------------------------------------


def written(model: str, kind: str, folder: str, bf16: bool = False) -> dict:
    """On each rank: export random adapters; return a sequence's log-probs by the policy and by the files."""
    from pathlib import Path

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft_core.data.packing import pack_sequences
    from sft_core.model.adapters import without_adapters
    from sft_core.model.export import export_model, full_weights, reshard, weight_names
    from sft_core.model.parallel import Sharding, make_mesh, shard
    from sft_core.model.policy import load_policy
    from sft_core.run import distributed

    config = ModelConfig(model, use_peft=True, lora_r=4, **KINDS[kind])
    device = distributed.init_distributed(60)[3]
    policy = load_policy(config, dtype=torch.bfloat16 if bf16 else torch.float32, seed=5)
    ids = [(7 * i) % 300 + 5 for i in range(30)]
    batch = pack_sequences([ids], [[True] * len(ids)], device)
    policy = shard(policy, make_mesh(device), Sharding(bf16, gradient_checkpointing=True))
    found = {"start": policy(batch)[0].detach(), "base": without_adapters(policy)(batch)[0].detach()}
    reshard(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(torch.distributed.tensor.distribute_tensor(noise, parameter.device_mesh))
    (-policy(batch)[0].sum()).backward()
    found["policy"], found["without"] = policy(batch)[0].detach(), without_adapters(policy)(batch)[0].detach()
    reshard(policy)
    grads = {name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.requires_grad}
    found["grads"] = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}
    tokenizer = AutoTokenizer.from_pretrained(model)
    export_model(policy, tokenizer, folder, torch.float32, merge_adapter=True)
    assert list(dict(full_weights(policy))) == weight_names(policy)
    if distributed.is_first_rank():
        with torch.no_grad():
            whole = AutoModelForCausalLM.from_pretrained(Path(folder) / "merged")
            parts = AutoPeftModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
            for name, loaded in (("merged", whole), ("peft", parts)):
                logps = loaded(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                found[name] = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert set(weight_names(policy)) == {name for name, _ in whole.named_parameters()}
    distributed.shutdown()
    grads = {name: grad.numpy().copy() for name, grad in found.pop("grads").items()}
    return {name: value.float().numpy().copy() for name, value in found.items()} | {"grads": grads}


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_and_files_say_what_the_policy_says(tiny_model, tmp_path, kind):
    """Also, new or disabled adapters change nothing, and two ranks agree with one."""
    [one] = run_ranks(1, written, tiny_model, kind, str(tmp_path / "one"))
    close(one["start"], one["base"])
    close(one["without"], one["base"])
    close(one["merged"], one["policy"], 3e-5)
    assert np.abs(one["policy"] - one["base"]).max() > 0.1
    if "load_in_4bit" not in KINDS[kind] and kind != "8bit":  # then peft's base is not the quantised one
        close(one["peft"], one["policy"], 3e-5)
    for found in run_ranks(2, written, tiny_model, kind, str(tmp_path / "two")):
        close(found["policy"], one["policy"], 2e-5)
        assert found["grads"].keys() == one["grads"].keys()
        for name, grad in one["grads"].items():  # both ranks have the whole batch, and gradients are summed
            assert np.linalg.norm(found["grads"][name] - 2 * grad) < 1e-4 * np.linalg.norm(grad) + 1e-6, name


# --- whole runs --------------------------------------------------------------------------------------------------


def test_learns_alike_on_two_ranks_and_leaves_the_model_alone(tiny_model, rows, tmp_path):
    whole = train(tiny_model, rows, tmp_path / "whole", merge_adapter="true", max_steps=6)
    found = losses(tmp_path / "whole")
    assert found[-1] < 0.9 * found[0]
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_model and config["r"] == 4
    before, merged = (load_file(f"{folder}/model.safetensors") for folder in (tiny_model, tmp_path / "whole/merged"))
    moved = {name.split(".")[-2] for name in before if (before[name] != merged[name]).any()}
    assert before.keys() == merged.keys() and moved == {"q_proj", "v_proj"}
    assert not (tmp_path / "whole" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(ValueError, match="holds an adapter, not a model: train it with --merge_adapter true"):
        load_tokenizer(ModelConfig(str(tmp_path / "whole")))
    two = train(tiny_model, rows, tmp_path / "two", ranks=2, max_steps=6, gradient_checkpointing="true")
    assert losses(tmp_path / "two") == pytest.approx(found, rel=1e-4)
    assert all((two[name] - whole[name]).norm() < 1e-3 * whole[name].norm() for name in whole)


RESUMED = {
    "lora": {},
    "4bit": {"load_in_4bit": "true", "use_dora": "true", "ranks": 2},
    "8bit": {"load_in_8bit": "true"},
}


@pytest.mark.parametrize("more", RESUMED.values(), ids=RESUMED)
def test_resumes_bitwise_with_dropout(tiny_model, rows, tmp_path, more):
    more = more | {"lora_dropout": 0.3, "lora_modules_to_save": ["embed_tokens"], "gradient_checkpointing": "true"}
    more |= dict(dataset_test_split=rows, eval_strategy="steps", eval_steps=2)
    whole = train(tiny_model, rows, tmp_path / "whole", **more)
    saving = dict(save_strategy="steps", save_steps=2)
    train(tiny_model, rows, tmp_path / "out", **(saving | more | {"max_steps": 2}))
    found = train(tiny_model, rows, tmp_path / "out", **saving, **more)
    assert all((found[name] == whole[name]).all() for name in whole)
    logged = [[row.get("loss", row.get("eval_loss")) for row in metrics(tmp_path / name)] for name in ("whole", "out")]
    assert logged[0] == logged[1]
    state = tmp_path / "out" / "checkpoint-4" / "state"
    assert sum(path.stat().st_size for path in state.iterdir()) < 2.5e6  # only the trained parameters and their moments
    if not {"ranks", "load_in_8bit"} & more.keys():
        train(tiny_model, rows, tmp_path / "without", **(more | {"lora_dropout": 0.0, "max_steps": 2}))
        assert losses(tmp_path / "without")[1] != losses(tmp_path / "whole")[1]  # B is zero at first


def test_four_bits_learn_alike_on_two_ranks(tiny_model, rows, tmp_path):
    for ranks in (1, 2):
        more = dict(load_in_4bit="true", lora_target_modules=["all-linear"], max_steps=3)
        train(tiny_model, rows, tmp_path / f"out{ranks}", ranks, **more)
    one, two = (losses(tmp_path / f"out{ranks}") for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-4) and one[-1] < one[0]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_target_modules": ["q_proj", "query"]}, "names 'query', which is not a module of the model"),
        ({"lora_modules_to_save": ["emb"]}, "lora_modules_to_save names 'emb'"),
        ({"lora_target_modules": ["norm"]}, "peft refuses lora_target_modules"),
        ({"lora_target_modules": ["lm_head"]}, "may not name the embedding or the head"),
        ({"use_peft": "false", "merge_adapter": "true"}, "merge_adapter needs adapters"),
        ({"use_peft": "false", "load_in_4bit": "true"}, "give --use_peft true with load_in_4bit"),
        ({"benchmarks": ["math_500"], "benchmark_kwargs": '{"engine": "torch"}'}, "give --merge_adapter true"),
        ({"activation_offloading": "true"}, "give --gradient_checkpointing true"),
        ({"missing": "peft"}, "use_peft needs peft, which is not installed: run pip install -e '.[adapters]'"),
        ({"missing": "bitsandbytes", "load_in_8bit": "true"}, "load_in_8bit needs bitsandbytes, which is not"),
    ],
)
def test_bad_options_are_said_before_weights_are_loaded(tiny_model, rows, tmp_path, capsys, monkeypatch, change, says):
    missing, find = change.get("missing"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    monkeypatch.setattr(sft_core.lifecycle, "load_policy", None)
    options = dict(model_name_or_path=tiny_model, dataset_name=rows, output_dir=tmp_path / "out") | LORA
    with pytest.raises(SystemExit) as stopped:
        sft_core.train.main(flags(**(options | {name: value for name, value in change.items() if name != "missing"})))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: ") and says in last, last
