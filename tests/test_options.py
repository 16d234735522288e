"""Every bound and every choice of an option is enforced, in Python and on the command line."""

import dataclasses
import math

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
OF_A_LIST = {
    "callbacks": ["push_to_hub_revision", "push_to_hub_revision"],
    "base_url": ["http://a/v1", "http://b/v1"],
    "vllm_server_url": ["http://a/v1", "http://b/v1"],
    "report_to": ["tensorboard", "none"],
    "reward_weights": ["1.0", "2.0"],
    "tasks": ["math_500", "aime24"],
}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps"}
BOUNDS = [
    (kind, field.name, bound, limit)
    for kind in REQUIRED
    for field in dataclasses.fields(kind)
    for bound, limit in field.metadata["bounds"].items()
    if limit != math.inf
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": "1e-5"}, "learning_rate must be a number, got '1e-5'"),
        ({"num_generations": 8.0}, "num_generations must be a whole number, got 8.0"),
        ({"max_steps": True}, "max_steps must be a whole number, got True"),
        ({"bf16": "yes"}, "bf16 must be true or false, got 'yes'"),
        ({"eval_strategy": "never"}, "eval_strategy must be one of no, steps, epoch, got 'never'"),
        ({"reward_weights": ["a"]}, "reward_weights must be a list in which each entry is a number"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs must be a JSON object, got 3"),
        ({"learning_rat": 1.0}, "GRPOConfig has no option `learning_rat`: did you mean `learning_rate`"),
        ({"use_vllm": True, "engine": "torch"}, "contradict"),
        ({"load_best_model_at_end": True}, "the same value, steps or epoch \\(they are no and steps\\)"),
        ({**BEST, "save_steps": 3, "eval_steps": 2}, "save_steps a multiple of eval_steps \\(they are 3 and 2\\)"),
        ({**BEST, "save_steps": 3, "eval_steps": 0.5}, "a multiple of eval_steps \\(they are 3 and 0.5\\)"),
        ({**BEST, "save_steps": 0.1, "eval_steps": 0.2}, "a multiple of eval_steps \\(they are 0.1 and 0.2\\)"),
        ({**BEST, "save_only_model": True}, "needs whole checkpoints: leave out --save_only_model"),
        ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model True would have no effect: it needs beta above 0"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps 5 would have no effect: it needs sync_ref_model"),
    ],
)
def test_from_python_as_from_the_command_line(options, says):
    """Bad options are refused when the config is created or, if they are assigned later, when a run copies it."""
    with pytest.raises(ValueError, match=says):
        GRPOConfig(output_dir="o", **options)

    @dataclasses.dataclass
    class Theirs(GRPOConfig):
        more: int = dataclasses.field(default=1, metadata={"help": "Theirs."})

    config = Theirs(output_dir="o", more=2)
    with pytest.raises(ValueError, match=says.replace("GRPOConfig", "Theirs")):
        for name, value in options.items():
            setattr(config, name, value)
        config.frozen()


def test_a_run_has_its_own_copy(caplog):
    config = GRPOConfig(output_dir="o", report_to="none", scale_rewards=False, max_steps=3)
    config.resume_from_checkpoint, config.use_vllm = True, False
    run = config.frozen()
    config.max_steps = 4
    assert (run.max_steps, run.report_to, run.scale_rewards) == (3, ["none"], "none")
    assert (run.resume_from_checkpoint, run.engine, config.engine) == (None, "torch", None)
    with pytest.raises(AttributeError, match="max_steps cannot be changed"):
        run.max_steps = 5
    assert SFTConfig(output_dir="o", max_seq_length=8).max_length == 8  # an alias, as in a recipe
    config.dataloader_num_workers = 4  # options of TRL without effect here cause warnings
    assert GRPOConfig(output_dir="o", padding_free=True) == GRPOConfig(output_dir="o")
    assert [record.args[0] for record in caplog.records] == ["dataloader_num_workers", "padding_free"]


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


def repeats(field) -> bool:
    return "commas" in field.metadata or "list[" in str(field.type)


@pytest.mark.parametrize(
    "kind, name", [(k, f.name) for k in REQUIRED for f in dataclasses.fields(k) if f.init and repeats(f)]
)
def test_an_option_given_again_adds_to_its_list(kind, name):
    """An option with several values keeps all that are given, without the default."""
    values = OF_A_LIST.get(name, ["a=1", "b=2"])
    flags = [text for key, value in REQUIRED[kind].items() if key != name for text in (f"--{key}", str(value))]
    (config,) = parse((kind,), [*flags, f"--{name}", values[0], f"--{name}={values[1]}"])
    found = getattr(config, name)
    assert (found.split(",") if isinstance(found, str) else [str(value) for value in found]) == values
