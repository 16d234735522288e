"""The memory plan compared with measurements, its remedies, and its verdicts from `main`."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

import grpo_core.train
import sft_core.model.memory_plan as costs
import sft_core.train
from grpo_core.config import GRPOConfig
from grpo_core.prepare import step_plan
from sft_core.model.flops import block_weights, saved_per_token, shape, tail_per_token
from sft_core.model.memory_plan import Plan, dry_run, memory, memory_plan
from sft_core.model.policy import count_parameters
from sft_core.run.config import ModelConfig, SFTConfig
from sft_core.run.distributed import GIB
from tests.launch import flags

QWEN_0_5B = dict(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
QWEN_1_5B = dict(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
QWEN_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)
QWEN_32B = dict(
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152064,
    tie_word_embeddings=False,
)
LLAMA_70B = dict(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def plan(info, *, model=None, rows=8, longest=8192, gpus=8, **config):
    config = SFTConfig(output_dir="out", **config)
    model = ModelConfig(model_name_or_path="model", **(model or {}))
    return Plan(info, model, config, count_parameters(info), gpus, rows, longest)


def gib(parts):
    return sum(parts.values()) / GIB


# --- sums against measurements -----------------------------------------------------------------------------------

# Forward and backward of a prototype, without optimizer, on one H100 80GB (torch 2.11): 8 documents of 2,048 tokens in
# one micro-batch, bf16 parameters and gradients, and a head that computes its logits once, 4,096 rows at a time, in
# float32, and their gradient in bf16. GiB: eager, compiled blocks, compiled and checkpointed.
MEASURED = {"0.5b": (QWEN_0_5B, (27.4, 21.2, 5.8)), "1.5b": (QWEN_1_5B, (53.9, 41.0, 8.9))}


@pytest.mark.parametrize("size", MEASURED)
def test_the_prototype_measured_on_a_gpu(size):
    sizes, measured_gib = MEASURED[size]
    info = Qwen2Config(**sizes)
    s, tokens, parameters = shape(info), 16384, count_parameters(info)
    weights = 2 * parameters
    head = (4 + 2) * 4096 * s.vocab + 4 * s.vocab * s.hidden
    end = tokens * tail_per_token(s) + head
    eager = weights + s.layers * tokens * saved_per_token(s) + end
    compiled = weights + s.layers * tokens * saved_per_token(s, compiled=True) + end
    checkpointed = weights + s.layers * tokens * 2 * s.hidden + end
    assert [eager / GIB, compiled / GIB, checkpointed / GIB] == pytest.approx(measured_gib, rel=0.02)


# --- verdicts ----------------------------------------------------------------------------------------------------


def verdict(info, capsys, **options):
    """The output of `dry_run`, and its refusal ('' if the plan fits)."""
    try:
        with pytest.raises(SystemExit) as stopped:
            dry_run(plan(info, **options))
    except ValueError as error:
        return capsys.readouterr().out, str(error)
    assert stopped.value.code == 0
    return capsys.readouterr().out, ""


def cells(printed: str) -> dict[str, str]:
    """The printed table, as {name: value}, one per line."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {name.strip(): value.strip() for name, value in lines}


def test_examples_of_the_readme(capsys):
    small, middle, large = Qwen2Config(**QWEN_7B), Qwen2Config(**QWEN_32B), LlamaConfig(**LLAMA_70B)
    for info, parameters in ((small, 7_615_616_512), (middle, 32_763_876_352), (large, 70_553_706_496)):
        assert count_parameters(info) == parameters
    printed, refusal = verdict(small, capsys, gradient_checkpointing=True)
    assert not refusal and cells(printed)["sum"] == "27.81 of 80.00" and cells(printed)["parameters"] == "3.55"
    _, refusal = verdict(middle, capsys, gradient_checkpointing=True)
    assert refusal == (
        "the run needs 84.1 GiB on each GPU and does not fit 8 GPUs of 80 GiB: use --activation_offloading "
        "true (takes 40 GiB of host memory over all ranks)."
    )
    assert not verdict(middle, capsys, gradient_checkpointing=True, activation_offloading=True)[1]
    _, refusal = verdict(large, capsys, gradient_checkpointing=True)
    assert "use --cpu_offload true (takes 1,051 GiB of host memory over all ranks)" in refusal
    printed, refusal = verdict(large, capsys, gradient_checkpointing=True, model={"use_peft": True})
    assert not refusal and cells(printed)["frozen model"] == "16.43"


QWEN = dict(info=Qwen2Config(**QWEN_7B), longest=2048)
CHECKPOINTED = QWEN | {"gradient_checkpointing": True}
LLAMA = dict(info=LlamaConfig(**LLAMA_70B), gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("options", "room_gib", "says"),
    [
        (QWEN, 60, "use --gradient_checkpointing true"),
        (CHECKPOINTED | {"gradient_checkpointing_every": 4}, 30, "use --gradient_checkpointing_every 1"),
        (CHECKPOINTED, 24, "use --max_tokens_per_micro_batch 4096"),
        (LLAMA | {"gpus": 24}, 70, "use --activation_offloading true (takes 240 GiB of host memory over all ranks)"),
        (CHECKPOINTED | {"gpus": 1}, 60, "use --cpu_offload true (takes 113 GiB of host memory over all ranks)"),
        (CHECKPOINTED | {"longest": 32768}, 24, "use --use_peft true"),
        (LLAMA | {"gpus": 1}, 77, "use --use_peft true --load_in_4bit true"),
        (
            QWEN | {"gpus": 1},
            40,
            "use --gradient_checkpointing true --cpu_offload true (takes 113 GiB of host memory over all ranks)",
        ),
        (
            QWEN | {"longest": 2**22},
            60,
            "use more GPUs, a smaller model or shorter sequences, since no memory option is enough",
        ),
    ],
)
def test_remedies(options, room_gib, says):
    step = plan(**options)
    assert gib(memory(step)) > room_gib
    assert costs.remedy(step, room_gib * GIB, 80 * GIB) == says


def test_parts_follow_the_options():
    info = Qwen2Config(**QWEN_7B)
    base = plan(info, gradient_checkpointing=True)
    parts = memory(base)
    state = base.parameters / 8 * 4
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (state, state, 2 * state)
    offloaded = memory(plan(info, gradient_checkpointing=True, cpu_offload=True))
    assert gib(parts) - gib(offloaded) == pytest.approx(4 * state / GIB)
    assert gib(memory(plan(info, gpus=16, gradient_checkpointing=True))) < gib(parts)
    half = memory(plan(info, gradient_checkpointing=True, gradient_checkpointing_every=2))
    assert half["activations"] == 8192 * (14 * 2 * 3584 + 14 * saved_per_token(shape(info)))
    compiled = memory(plan(info, torch_compile=True))
    assert compiled["activations"] == 8192 * 28 * saved_per_token(shape(info), compiled=True)
    quantised = memory(plan(info, gradient_checkpointing=True, model={"use_peft": True, "load_in_4bit": True}))
    assert quantised["quantised weights"] == block_weights(shape(info)) * (0.5 + 4 / 64)
    adapters = plan(info, model={"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "down_proj"]})
    assert adapters.trained == 28 * 8 * (3584 + 3584 + 18944 + 3584)
    everything = plan(info, model={"use_peft": True, "lora_target_modules": ["all-linear"]})
    assert everything.trained == 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))


def test_tokens_of_a_micro_batch():
    info = Qwen2Config(**QWEN_0_5B)
    for rows, longest, budget, tokens in ((8, 1024, 2048, 2048), (8, 1024, 512, 1024), (2, 1024, 8192, 2048)):
        assert plan(info, rows=rows, longest=longest, max_tokens_per_micro_batch=budget).tokens == tokens


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, 4),
        ({"steps_per_generation": 2}, 8),  # each mini-batch has 4 of each of 8 groups
        ({"max_tokens_per_micro_batch": 3000}, 4),
        ({"share_prompts": False}, 32),
    ],
)
def test_shared_prompts(options, computed):
    """For 32 sequences per rank: the number of computed prompts, and so the largest micro-batch."""
    sizes = {"max_prompt_length": 2000, "max_completion_length": 375, "prompts_per_step": 4, "num_generations": 8}
    config = GRPOConfig("out", **sizes | {"max_tokens_per_micro_batch": 16384} | options)
    found = step_plan(ModelConfig("model"), config, Qwen2Config(**QWEN_0_5B), 1, torch.bfloat16)
    assert (found.rows, found.shared) == (32, 2000 * (32 - computed))
    assert found.tokens == min(max(config.max_tokens_per_micro_batch, 2375), computed * 2000 + 32 * 375)


# --- a real start, and the command line --------------------------------------------------------------------------


def start(device="cuda", **options):
    """The plan of a real start: a model of 2**30 parameters on 4 ranks."""
    info = Qwen2Config(**QWEN_0_5B)
    config = SFTConfig(output_dir="out", gradient_checkpointing=True)
    options = dict(gpus=4, rows=1, longest=1024) | options
    step = Plan(info, ModelConfig(model_name_or_path="model"), config, 2**30, **options)
    return memory_plan(step, torch.device(device))


def test_the_line_of_a_real_start():
    line = start("cpu", reference_itemsize=2, engine_kv_bytes=2**31)
    for part in (
        "parameters 1.00",
        "gradients 1.00",
        "optimizer 2.00",
        "reference model 0.50",
        "engine weights 2.00",
        "engine KV cache 2.00",
        "activations 0.0",
        "workspace",
    ):
        assert part in line
    assert "engine" not in start("cpu") and "reference" not in start("cpu")


def test_a_real_start_is_refused_where_a_gpu_is_too_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 12 * GIB))
    assert "engine KV cache 1.00" in start(engine_share=0.25)
    # The engine sleeps during the update, so it needs room only next to parameters and optimizer: 4 of 10 GiB are left.
    assert "engine KV cache 3.00" in (line := start(engine_share=5 / 12, engine_sleeps=True)), line
    assert "activations" not in line
    with pytest.raises(ValueError, match=r"lower vllm_gpu_memory_utilization from 0.80 to at most 0.\d\d \(memory on"):
        start(engine_share=0.8)
    with pytest.raises(ValueError, match="cannot hold its weights of 2.0 GiB: raise vllm_gpu_memory_utilization"):
        start(engine_share=0.1)
    with pytest.raises(ValueError, match="not enough GPU memory: use --cpu_offload true"):
        start(gpus=1)


@pytest.fixture
def config_only(tmp_path):
    """A model folder with only a config.json."""
    folder = tmp_path / "model"
    Qwen2Config(**QWEN_7B).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


TRAINERS = [sft_core.train.main, grpo_core.train.main]


@pytest.mark.parametrize("main", TRAINERS)
def test_dry_run_by_command(main, config_only, tmp_path, capsys):
    """It needs no process group, tokenizer or data, and writes nothing."""
    argv = flags(
        model_name_or_path=config_only,
        dataset_name="no/such/data",
        output_dir=tmp_path / "out",
        dry_run="true",
        gradient_checkpointing="true",
        max_length=8192,
    )
    if main is grpo_core.train.main:
        argv = [text for text in argv if "max_length" not in text] + flags(max_completion_length=7680)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    printed, errors = capsys.readouterr()
    assert stopped.value.code == 0 and "error" not in errors
    assert "sum" in cells(printed)
    with_engine = {"engine KV cache", "reference model"} & set(cells(printed))
    assert len(with_engine) == (2 if main is grpo_core.train.main else 0)
    assert not torch.distributed.is_initialized() and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        main(argv + flags(dry_run_gpus=1))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: the run needs ") and "use --cpu_offload true" in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dry_run_gpus": 0}, "dry_run_gpus must be at least 1"),
        ({"dry_run_gpu_gib": 2}, "dry_run_gpu_gib must be above 3, got 2"),
        ({"model_name_or_path": "./nowhere"}, "no model folder at ./nowhere"),
    ],
)
def test_bad_values(change, says, config_only, tmp_path, capsys):
    argv = flags(model_name_or_path=config_only, dataset_name="x", output_dir=tmp_path / "out", dry_run="true")
    with pytest.raises(SystemExit) as stopped:
        sft_core.train.main(argv + flags(**change))
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_a_config_that_is_no_model(tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    argv = flags(model_name_or_path=folder, dataset_name="x", output_dir=tmp_path / "out", dry_run="true")
    with pytest.raises(SystemExit) as stopped:
        sft_core.train.main(argv)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
