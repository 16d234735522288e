"""Every option of TRL 1.16 and open-r1 is an option here, ignored where it changes nothing, or refused."""

import json
from pathlib import Path

import pytest
import yaml

from grpo_core import option_guide
from grpo_core.config import GRPOConfig
from grpo_core.option_guide import TRAINERS as TYPES
from sft_core.dataset import KEPT, fit
from sft_core.run import open_r1_keys
from sft_core.run.cli import parse
from sft_core.run.config import SFTConfig
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, TRL_DEFAULTS, defaults_there
from sft_core.run.options import known_names

TRAINERS = {trainer: known_names(*kinds) for trainer, kinds in TYPES.items()}
NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
PLACES = [(name, trainer) for trainer, kinds in TYPES.items() for kind in kinds for name in defaults_there(kind)]


def recipe(path, content):
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


def test_each_is_in_exactly_one_class():
    assert len(PLACES) > 400 and not set(FOREIGN_KEYS) & set(REFUSED_KEYS)
    keys = [key for part in ("passed_over", "refused") for group in open_r1_keys._KEYS[part] for key in group["keys"]]
    assert len(keys) == len(set(keys))
    taken = [name in TRAINERS[trainer] or name in FOREIGN_KEYS or name in REFUSED_KEYS for name, trainer in PLACES]
    assert all(taken), [place for place, one in zip(PLACES, taken, strict=True) if not one]
    # An option has no entry there, but where it is one of one trainer or, in Python, of another class.
    both = set(TRAINERS["GRPO"]) & set(TRAINERS["SFT"])
    assert both & set(keys) == {"trust_remote_code"}


def test_the_guide_is_that_of_the_classes():
    text = (Path(option_guide.__file__).parent / "OPTIONS.md").read_text()
    assert option_guide.guide() == text, "run `python -m grpo_core.option_guide`"


@pytest.mark.parametrize("library", TRL_DEFAULTS)
@pytest.mark.parametrize("trainer", TYPES)
def test_their_defaults_can_be_pasted(trainer, library, tmp_path, caplog):
    """All of them together, in a recipe and in Python, and each alone: there is no error and no warning."""
    pasted = dict(NEEDED)
    for kind in TYPES[trainer]:
        names = defaults_there(kind, [library])
        needed = {key: value for key, value in NEEDED.items() if key in known_names(kind)}
        kind(**names | needed)
        for name, default in names.items():
            kind(**{name: default} | needed)
        pasted = names | pasted
    parse(TYPES[trainer], recipe(tmp_path / "recipe.yaml", pasted))
    assert not caplog.records


OTHERS = {  # non-default values for options that are not texts
    "average_tokens_across_devices": False,
    "dataset_configs": ["one", "two"],
    "deepspeed_config": {"gradient_clipping": 1.0, "zero_stage": 3},
    "mixed_precision": "fp16",
}


def moot(keys, trainer):
    return {name: OTHERS.get(name, "another") for name in keys if name not in TRAINERS[trainer]}


@pytest.mark.parametrize("trainer", TYPES)
def test_what_is_passed_over_gets_one_line(trainer, tmp_path, caplog):
    keys, kind = moot(FOREIGN_KEYS, trainer), TYPES[trainer][2]
    expected = [(name, FOREIGN_KEYS[name]) for name in keys]
    argv = [f"--{key}={needed}" for key, needed in NEEDED.items()]
    config = kind(output_dir="o")
    for paste in (
        lambda: parse(TYPES[trainer], argv + recipe(tmp_path / "recipe.yaml", keys)),
        lambda: parse(TYPES[trainer], argv + [f"--{name}={value}" for name, value in keys.items()]),
        lambda: kind(output_dir="o", **keys),
        lambda: [setattr(config, name, value) for name, value in keys.items()],
    ):
        caplog.clear()
        paste()
        assert sorted(record.args for record in caplog.records) == sorted(expected)
    assert config == kind(output_dir="o")


@pytest.mark.parametrize("trainer", TYPES)
def test_what_is_refused_says_why(trainer, tmp_path):
    argv, kind = [f"--{key}={needed}" for key, needed in NEEDED.items()], TYPES[trainer][2]
    for name, value in moot(REFUSED_KEYS, trainer).items():
        for paste in (
            lambda name, value: parse(TYPES[trainer], argv + recipe(tmp_path / "recipe.yaml", {name: value})),
            lambda name, value: kind(output_dir="o", **{name: value}),
            lambda name, value: setattr(kind(output_dir="o"), name, value),
        ):
            with pytest.raises(ValueError) as refused:
                paste(name, value)
            assert str(refused.value) == f"`{name}: {value}` is not supported: {REFUSED_KEYS[name]}."


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--packing_strategy", "wrapped"], "`packing_strategy: wrapped` is not supported"),
        (["--packing_strategy=bfd", "--fp16=false"], None),
        (["--padding_free", "--train_sampling_strategy", "sequential"], "is not supported: rows are shuffled"),
        (["--label_smoothing_factor", "0"], None),
        (["--neftune_noise_alpha", "none"], None),
        (["--include_for_metrics", "inputs", "loss", "--max_lenght=3"], "unknown flag `--max_lenght=3`: did you mean"),
        (["--fsdp", "{"], "argument --fsdp: invalid .* value: '{'"),
        (["stray"], "unknown flag `stray`"),
        (["--max_length", "none", "--packing=true"], "need a limit for the length of rows: give --max_length"),
        (["--max_length", "none", "--seed", "null"], "seed must have a value"),
        (["--warmup_steps", "2.5"], "warmup_steps 2.5 must be a whole number of steps"),
        (["--benchmark_kwargs", '{"limit": 3}'], "give --benchmarks"),
    ],
)
def test_on_the_command_line(flags, says):
    argv = [f"--{key}={needed}" for key, needed in NEEDED.items()] + flags
    if says is None:
        parse(TYPES["SFT"], argv)
    else:
        with pytest.raises(ValueError, match=says):
            parse(TYPES["SFT"], argv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: [1, 2]", r"seed must be a whole number, got \[1, 2\]"),
        ("seed: [1]", "seed must be a whole number"),
        ("run_name: {a: 1}", "run_name must be text, got {'a': 1}"),
        ("lr_scheduler_kwargs: [min_lr, 1]", "lr_scheduler_kwargs must be a JSON object"),
        ("seed: 1\nseed: 2", "the recipe has `seed` twice"),
        ("lr_scheduler_kwargs: {min_lr: 1, min_lr: 2}", "the recipe has `min_lr` twice"),
        ("max_length: 4\nmax_seq_length: 8", "max_length is given twice, under two of its names"),
        ("env: [A]", "must hold `NAME: value` lines"),
        ("learning_rate: .nan", "learning_rate must be finite, got nan"),
        ("dataset_mixture: {datasets: {id: a}}", "datasets must be a list in which each entry is a JSON object"),
        ("dataset_mixture: {datasets: [{path: a}]}", "DatasetConfig has no option `path`"),
        ("dataset_mixture: {datasets: [{id: a, weight: half}]}", "weight must be a number, got 'half'"),
        ("dataset_mixture: {datasets: [{id: a, split: [a, b]}]}", "split must be text"),
        ("dataset_mixture: {datasets: [{id: a}], seed: x}", "seed must be a whole number"),
    ],
)
def test_nothing_in_a_recipe_is_lost(text, says, tmp_path):
    needed = {"output_dir": "o", "model_name_or_path": "m"}
    needed |= {} if "mixture" in text else {"dataset_name": "d"}
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=says):
        parse(TYPES["SFT"], [*(f"--{key}={value}" for key, value in needed.items()), "--config", str(path)])


def test_what_they_mean():
    sft = SFTConfig(output_dir="o", loss_type="chunked_nll", max_length=None, preprocessing_num_workers=3).frozen()
    assert (sft.loss_type, sft.max_length, sft.dataset_num_proc) == ("nll", None, 3)
    row = ([1] * 5000, [True] * 5000)
    assert fit(row, sft) == (row, KEPT)
    assert SFTConfig(output_dir="o", lr_scheduler_kwargs='{"min_lr": 0.1}').lr_scheduler_kwargs == {"min_lr": 0.1}
    with pytest.raises(ValueError, match="max_length is given twice"):
        SFTConfig(output_dir="o", max_length=3, max_seq_length=4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop_token_ids": [3]}, None),
        ({"temperature": 1.0}, "would change what is sampled"),
        ({"do_sample": False}, "would change what is sampled"),
        ({"presence_penalty": 0.5}, "would change what is sampled"),
        ({"stop_token_ids": ["a"]}, "must be a list of token ids"),
    ],
)
def test_generation_kwargs(given, says):
    options = {"output_dir": "o", "temperature": 0.7, "max_completion_length": 9, "generation_kwargs": given}
    if says is None:
        GRPOConfig(**options)
    else:
        with pytest.raises(ValueError, match=says):
            GRPOConfig(**options)


@pytest.mark.parametrize("trainer", TYPES)
def test_parse_only_says_which_defaults_are_others(trainer, capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(TYPES[trainer], ["--parse_only", *(f"--{key}={value}" for key, value in NEEDED.items())])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("#")]
    there = {"num_train_epochs": (1.0, 3.0)}
    there |= {"beta": (0.04, 0.0)} if trainer == "GRPO" else {"assistant_only_loss": (True, False)}
    for name, (ours, theirs) in there.items():
        assert f"#   {name}: {json.dumps(ours)} instead of {json.dumps(theirs)}" in lines
    assert not any("learning_rate" in line or "output_dir" in line for line in lines)
    (tmp_path / "again.yaml").write_text(text)
    assert parse(TYPES[trainer], ["--config", str(tmp_path / "again.yaml")])
