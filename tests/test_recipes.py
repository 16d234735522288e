"""Our recipes parse; open-r1's of February and May 2025 load unchanged, with warnings for options without effect."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.rewards import get_reward_funcs
from sft_core.run.cli import as_yaml, parse
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig

GRPO = (ModelConfig, GRPOScriptArguments, GRPOConfig)
SFT = (ModelConfig, ScriptArguments, SFTConfig)
RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

# The keys and values of open-r1's recipes.
COMMON = {
    "model_revision": "main",
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "bf16": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "log_level": "info",
    "logging_strategy": "steps",
    "max_steps": -1,
    "overwrite_output_dir": True,
    "push_to_hub": True,
    "seed": 42,
    "report_to": ["wandb"],
    "hub_strategy": "every_save",
    "num_train_epochs": 1,
    "output_dir": "data/out",
}
GRPO_FEBRUARY = COMMON | {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dataset_name": "AI-MO/NuminaMath-TIR",
    "dataset_configs": ["all"],
    "num_processes": 7,
    "use_vllm": True,
    "vllm_device": "auto",
    "vllm_gpu_memory_utilization": 0.7,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "gradient_accumulation_steps": 16,
    "hub_model_id": "Qwen2.5-1.5B-Open-R1-GRPO",
    "learning_rate": 2.0e-05,
    "log_completions": True,
    "logging_first_step": True,
    "logging_steps": 1,
    "lr_scheduler_type": "cosine",
    "max_prompt_length": 512,
    "max_completion_length": 1024,
    "num_generations": 7,
    "per_device_eval_batch_size": 32,
    "per_device_train_batch_size": 16,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "warmup_ratio": 0.1,
}
GRPO_MAY = COMMON | {
    "model_name_or_path": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "dataset_name": "open-r1/verifiable-problems",
    "dataset_prompt_column": "prompt",
    "system_prompt": "Think in <think>\n...\n</think>.",
    "callbacks": ["push_to_hub_revision"],
    "benchmarks": ["math_500"],
    "beta": 0.0,
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "do_eval": False,
    "eval_strategy": "no",
    "use_vllm": True,
    "vllm_mode": "server",
    "gradient_accumulation_steps": 32,
    "hub_model_id": "open-r1/Qwen2.5-Coder-7B-GRPO",
    "hub_model_revision": "v01.00",
    "learning_rate": 1.0e-06,
    "log_completions": True,
    "logging_first_step": True,
    "logging_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "max_grad_norm": 0.2,
    "max_prompt_length": 2000,
    "max_completion_length": 8192,
    "num_generations": 16,
    "per_device_train_batch_size": 4,
    "reward_funcs": ["accuracy", "format", "tag_count"],
    "reward_weights": [1.0, 0.5, 0.5],
    "save_strategy": "steps",
    "save_steps": 0.05,
    "save_total_limit": 1,
    "temperature": 0.7,
    "wandb_entity": "huggingface",
    "wandb_project": "open-r1",
    "wandb_run_group": "g",
    "warmup_ratio": 0.1,
    "mask_truncated_completions": True,
    "code_language": "cpp",
    "code_eval_test_batch_size": -1,
    "code_eval_scoring_mode": "weighted_sum",
    "use_liger_kernel": False,
    "wandb_log_unique_prompts": True,
    "num_completions_to_print": 0,
}
SFT_FEBRUARY = COMMON | {
    "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dataset_name": "open-r1/s1K-1.1",
    "dataset_configs": ["all"],
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "dataset_num_proc": 48,
    "do_eval": False,
    "eval_strategy": "no",
    "gradient_accumulation_steps": 1,
    "learning_rate": 1.0e-05,
    "logging_steps": 1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "packing": True,
    "max_seq_length": 32768,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "use_liger": True,
    "warmup_ratio": 0.05,
}
SFT_MAY = COMMON | {
    "model_name_or_path": "open-r1/Qwen2.5-Math-7B-RoPE-300k",
    "dataset_name": "open-r1/Mixture-of-Thoughts",
    "dataset_config": "all",
    "dataset_num_proc": 12,
    "eos_token": "<|im_end|>",
    "do_eval": False,
    "eval_strategy": "no",
    "gradient_accumulation_steps": 8,
    "learning_rate": 4.0e-05,
    "logging_steps": 1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "packing": False,
    "max_grad_norm": 0.2,
    "max_length": 32768,
    "num_train_epochs": 5,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 1,
    "save_only_model": True,
    "optim": "paged_adamw_8bit",
    "use_liger_kernel": True,
    "warmup_ratio": 0.03,
}
OPEN_R1 = [
    (GRPO, GRPO_FEBRUARY, {"num_processes", "per_device_eval_batch_size"}),
    (GRPO, GRPO_MAY, {"code_eval_test_batch_size"}),
    (SFT, SFT_FEBRUARY, {"per_device_eval_batch_size", "use_liger"}),
    (SFT, SFT_MAY, {"per_device_eval_batch_size", "use_liger_kernel"}),
]
# Keys that change nothing here and need no warning.
AS_IT_IS = {
    "dataset_configs",
    "vllm_device",
    "code_eval_scoring_mode",
    "use_liger_kernel",
    "wandb_log_unique_prompts",
    "gradient_checkpointing_kwargs",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_our_recipes_parse_without_a_warning(recipe, caplog):
    types = SFT if recipe.parent.name == "sft" else GRPO
    configs = parse(types, ["--config", str(recipe), "--output_dir", "somewhere"])
    assert not caplog.records
    if types is GRPO:
        weights = configs[2].reward_weights
        assert weights is None or len(weights) == len(get_reward_funcs(configs[1]))


@pytest.mark.parametrize(("types", "recipe", "moot"), OPEN_R1, ids=["GRPO Feb", "GRPO May", "SFT Feb", "SFT May"])
def test_recipes_of_open_r1_load_unchanged(types, recipe, moot, tmp_path, caplog):
    """Every key sets a value under either name, or causes exactly one warning, or describes what is done anyway."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with caplog.at_level(logging.WARNING):
        configs = [config.frozen() for config in parse(types, ["--config", str(path)])]
    moot = moot | {"gradient_checkpointing_kwargs"}
    assert sorted(record.args[0] for record in caplog.records) == sorted(moot)
    moot |= AS_IT_IS
    values = yaml.safe_load(as_yaml(configs))
    values |= {"torch_dtype": values["dtype"], "max_seq_length": values.get("max_length")}
    values["scale_rewards"] = values.get("scale_rewards") != "none"
    assert {key: values[key] for key in recipe if key not in moot} == {
        key: value for key, value in recipe.items() if key not in moot
    }
    (tmp_path / "resolved.yaml").write_text(as_yaml(configs))
    assert list(parse(types, ["--config", str(tmp_path / "resolved.yaml")])) == configs


def test_parse_only_prints_what_it_resolved(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GRPO_FEBRUARY))
    with pytest.raises(SystemExit) as exit:
        parse(GRPO, ["--config", str(path), "--learning_rate", "1e-3", "--torch_dtype=float32", "--parse_only"])
    assert exit.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["learning_rate"], printed["dtype"], printed["num_generations"]) == (1e-3, "float32", 7)
    with pytest.raises(ValueError, match="unknown flag `--learning_rat=1`: did you mean `learning_rate`"):
        parse(GRPO, ["--config", str(path), "--parse_only", "--learning_rat=1"])


@pytest.mark.parametrize(
    ("flags", "engine"), [([], "vllm"), (["--use_vllm=false"], "torch"), (["--engine=torch"], "torch")]
)
def test_use_vllm_chooses_the_engine(flags, engine):
    [config] = parse((GRPOConfig,), ["--output_dir=o", *flags])
    assert config.frozen().engine == engine
    with pytest.raises(ValueError, match="engine torch and use_vllm True contradict"):
        parse((GRPOConfig,), ["--output_dir=o", "--use_vllm=true", "--engine=torch"])


def test_empty_values(tmp_path):
    """An empty list means none. A key without a value is null, which is refused for options that need a value."""
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: o\nenv:\nbenchmarks: []\nreport_to: []\nsave_total_limit:\nhub_model_id:\n")
    [config] = parse((GRPOConfig,), ["--config", str(path)])
    assert (config.benchmarks, config.report_to, config.save_total_limit) == ([], [], None)
    path.write_text("output_dir: o\nmax_prompt_length:\n")
    with pytest.raises(ValueError, match="max_prompt_length must have a value"):
        parse((GRPOConfig,), ["--config", str(path)])


def test_what_a_recipe_gives_has_the_options_type(tmp_path):
    """This also holds for a user's class with a required field that the recipe sets."""

    @dataclasses.dataclass
    class Theirs:
        path: str
        share: float = 0.5

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "path: p\nshare: 1e-1\noutput_dir: o\nlearning_rate: 1e-6\nbf16: 'no'\nreport_to: wandb\n"
        "reward_weights: 0.5\nlr_scheduler_kwargs: {num_cycles: 2}\nbenchmarks: aime\n"
        "benchmark_kwargs: '{\"limit\": 3}'\n"
    )
    theirs, config = parse((Theirs, GRPOConfig), ["--config", str(path), "--learning_rate=1e-5"])
    assert theirs == Theirs("p", 0.1)
    given = {"report_to": ["wandb"], "reward_weights": [0.5], "benchmarks": ["aime"], "bf16": False}
    given |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "benchmark_kwargs": {"limit": 3}, "learning_rate": 1e-5}
    assert config == GRPOConfig(output_dir="o", **given)
    path.write_text("output_dir: o\nreward_weights: [a]\n")
    with pytest.raises(ValueError, match=r"reward_weights must be a list in which each entry is a number, got \['a'\]"):
        parse((GRPOConfig,), ["--config", str(path)])
    path.write_text("reward_funcs: []\ndataset_name: d\n")
    with pytest.raises(ValueError, match="reward_funcs"):
        parse((GRPOScriptArguments,), ["--config", str(path)])
