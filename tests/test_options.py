"""Every bound and every choice that an option's field names is kept, in Python as on the command line."""

import dataclasses

import pytest

from eval.config import DecontaminateConfig, EvalConfig
from gen.config import GenerateConfig
from grpo_core.audit import AuditConfig
from grpo_core.config import GRPOConfig
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, SFTConfig

REQUIRED = {
    ModelConfig: {"model_name_or_path": "m"},
    SFTConfig: {"output_dir": "o"},
    GRPOConfig: {"output_dir": "o"},
    EvalConfig: {"model": "m", "tasks": "all", "output_dir": "o"},
    DecontaminateConfig: {"dataset": "d", "output_dir": "o"},
    GenerateConfig: {"hf_dataset": "d", "model": "m"},
    AuditConfig: {},
}
OUTSIDE = {"ge": lambda limit: limit - 1, "gt": lambda limit: limit, "le": lambda limit: limit + 1, "lt": lambda x: x}
BOUNDS = [
    (kind, field.name, bound, limit)
    for kind in REQUIRED
    for field in dataclasses.fields(kind)
    for bound, limit in field.metadata["bounds"].items()
]
CHOICES = [(kind, field) for kind in REQUIRED for field in dataclasses.fields(kind) if "choices" in field.metadata]


@pytest.mark.parametrize(("kind", "name", "bound", "limit"), BOUNDS)
def test_bounds(kind, name, bound, limit):
    value = OUTSIDE[bound](limit)
    says = f"{name} must be .* {limit}, got {value}"
    with pytest.raises(ValueError, match=says):
        kind(**REQUIRED[kind] | {name: value})
    with pytest.raises(ValueError, match=says):
        parse((kind,), [f"--{option}={given}" for option, given in (REQUIRED[kind] | {name: value}).items()])


@pytest.mark.parametrize(("kind", "field"), CHOICES)
def test_choices(kind, field):
    wrong = ["nothing"] if isinstance(field.type, type(list[str])) else "nothing"
    with pytest.raises(
        ValueError, match=f"{field.name} must be one of .*{field.metadata['choices'][0]}.*got 'nothing'"
    ):
        kind(**REQUIRED[kind] | {field.name: wrong})
    options = REQUIRED[kind] | {field.name: "nothing"}
    with pytest.raises(ValueError, match=f"{field.name}.*'nothing'.*{field.metadata['choices'][0]}"):
        parse((kind,), [f"--{option}={given}" for option, given in options.items()])


def test_there_are_some():
    assert len(BOUNDS) > 40 and len(CHOICES) >= 6


def test_a_value_that_must_be_there_and_a_recipe_given_twice(tmp_path):
    with pytest.raises(ValueError, match="learning_rate must have a value"):
        GRPOConfig(output_dir="out", learning_rate=None)
    assert GRPOConfig(output_dir="out", epsilon_high=None).epsilon_high is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("beta: 0.1\n")
    with pytest.raises(ValueError, match="--config is given 2 times"):
        parse((GRPOConfig,), ["--config", str(recipe), "--config", str(recipe)])
