"""Order and packing of training rows; schedules; options from YAML."""

import json
from itertools import zip_longest

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from sft_core.data.packing import balance, pack
from sft_core.data.rows import fingerprint, load_rows, load_splits, row_order, without_format
from sft_core.model.optim import check_schedule, make_scheduler
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig


@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 120), st.integers(1, 120))
def test_order_is_one_sequence_wherever_it_is_cut(rows, start, first, second):
    whole = row_order(rows, 7, start, first + second)
    assert whole == row_order(rows, 7, start, first) + row_order(rows, 7, start + first, second)
    assert row_order(rows, None, start, first) == [row % rows for row in range(start, start + first)]
    epoch = row_order(rows, 7, rows * (start // rows), rows)
    assert sorted(epoch) == list(range(rows))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
def test_packing_takes_every_sequence_once_and_keeps_the_budget(lengths, budget):
    bins = pack(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(len(members) == 1 or sum(lengths[i] for i in members) <= budget for members in bins)
    if lengths and max(lengths) <= budget:  # no two bins can be merged
        fills = sorted(sum(lengths[i] for i in members) for members in bins)
        assert len(fills) < 2 or fills[0] + fills[1] > budget


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 50), st.integers(1, 5))
def test_micro_batches_are_balanced_over_the_ranks(lengths, budget, ranks):
    shares = balance(lengths, [length + 0.05 * length**2 for length in lengths], budget, ranks)
    assert len({len(own) for own in shares}) == 1 and len(shares) == ranks
    everything = [members for own in shares for members in own]
    assert sorted(i for members in everything for i in members) == list(range(len(lengths)))
    assert all(len(members) == 1 or sum(lengths[i] for i in members) <= budget for members in everything)
    for own in shares:  # empty micro-batches come last on each rank
        assert sorted(own, key=lambda members: not members) == own
    cost = [[sum(lengths[i] + 0.05 * lengths[i] ** 2 for i in members) for members in own] for own in shares]
    assert all(a >= b - 1e-9 for own in cost for a, b in zip(own, own[1:], strict=False))


def test_rows_just_over_half_the_budget_are_told_at_once():
    """No two rows fit together, so there are as many micro-batches as rows; smaller numbers are not tried."""
    shares = balance([5000] * 2048, [1.0] * 2048, 8192, 8)
    assert [len(own) for own in shares] == [256] * 8


def test_ranks_that_go_in_step_wait_little_for_each_other():
    """With lengths like those of reasoning data, the slowest rank of a step takes little more than an even share."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(2000, generator=generator) + 7).exp().clamp(20, 32768).int().tolist()
    shares = balance(lengths, [length + 1e-4 * length**2 for length in lengths], 32768, 8)

    def waited(shares):
        cost = [[sum(lengths[i] + 1e-4 * lengths[i] ** 2 for i in members) for members in own] for own in shares]
        slowest = sum(max(step) for step in zip_longest(*cost, fillvalue=0.0))
        return slowest / (sum(map(sum, cost)) / 8) - 1

    own = [range(rank, 2000, 8) for rank in range(8)]
    packed_apart = [[[rows[i] for i in b] for b in pack([lengths[i] for i in rows], 32768)] for rows in own]
    assert waited(shares) < 0.06 and waited(packed_apart) > 0.2


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("constant", {}, {0: 1, 5: 1, 10: 1}),
        ("constant_with_warmup", {"warmup_steps": 4}, {0: 0, 2: 0.5, 4: 1, 10: 1}),
        ("linear", {"warmup_ratio": 0.2}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
        ("cosine", {}, {0: 1, 5: 0.5, 10: 0}),
        ("linear", {"warmup_steps": 0.2}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}, {0: 1, 5: 0.55, 10: 0.1}),
        ("cosine_with_restarts", {"lr_scheduler_kwargs": '{"num_cycles": 2}'}, {0: 1, 5: 1, 10: 0}),
        ("polynomial", {"lr_scheduler_kwargs": '{"power": 2.0, "lr_end": 0.2}'}, {0: 1, 5: 0.4, 10: 0.2}),
        (
            "warmup_stable_decay",
            {"lr_scheduler_kwargs": '{"num_decay_steps": 4}', "warmup_steps": 2},
            {0: 0, 1: 0.5, 2: 1, 6: 1, 8: 0.5, 10: 0},
        ),
    ],
)
def test_schedules(kind, more, expected):
    argv = [f"--{name}={value}" for name, value in ({"lr_scheduler_type": kind} | more).items()]
    [config] = parse((SFTConfig,), [*argv, "--output_dir=x", "--learning_rate=1.0"])
    check_schedule(config, 10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = make_scheduler(optimizer, config, total_steps=10)
    for step in range(11):
        if step in expected:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected[step])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        ("polynomial", {"lr_end": 2.0}, "lr_end .* must be smaller"),
        ("polynomial", {"lr_end": "1e-6"}, "as numbers, not as texts"),
        ("polynomial", {"min_lr": 0.1}, "do not fit polynomial: .* unexpected keyword argument 'min_lr'"),
        ("constant", {"min_lr": 0.1}, "constant takes no lr_scheduler_kwargs, got .*: remove"),
        ("constant_with_warmup", {"min_lr": 0.1}, "constant_with_warmup takes no lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": "2"}, "do not fit warmup_stable_decay: .*str"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("polynomial", {"lr_end": -1.0}, "last learning rate at least 0"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 9},
            "do not fit warmup_stable_decay over 10 steps with 2 warm-up steps",
        ),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "fast"}, "Unknown decay type: fast"),
    ],
)
def test_a_schedule_that_cannot_be(kind, given, says):
    config = SFTConfig(
        output_dir="o", learning_rate=1.0, lr_scheduler_type=kind, lr_scheduler_kwargs=given, warmup_steps=0.2
    )
    with pytest.raises(ValueError, match=says):
        check_schedule(config, 10)


def test_command_line_over_yaml_over_defaults(tmp_path, monkeypatch):
    monkeypatch.delenv("OF_A_RECIPE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": "o",
        "learning_rate": "1e-3",
        "report_to": ["none"],
        "save_total_limit": None,
        "max_steps": 7,
        "bf16": True,
        "lr_scheduler_kwargs": {"min_lr": 0.5},
        "env": {"OF_A_RECIPE": 1},
    }
    recipe.write_text(yaml.safe_dump(content))
    types = (ModelConfig, ScriptArguments, SFTConfig)
    model, data, config = parse(types, ["--max_steps", "9", "--config", str(recipe), "--seed=3"])
    assert (model.model_name_or_path, data.dataset_name, config.learning_rate) == ("m", "d", 1e-3)
    assert (config.max_steps, config.seed, config.bf16, config.max_length) == (9, 3, True, 1024)
    assert config.report_to == ["none"] and config.lr_scheduler_kwargs == {"min_lr": 0.5}
    import os

    assert os.environ["OF_A_RECIPE"] == "1"


def test_when_something_is_due():
    """Every n steps, at shares of all steps, or at the ends of 2.5-step epochs (3, 5, 8, 10); the last is logged."""
    [config] = parse(
        (SFTConfig,), ["--output_dir=x", "--save_steps=0.25", "--eval_strategy=epoch", "--logging_steps=4"]
    )
    due = {
        what: [step for step in range(1, 11) if config.due(what, step, 10, 2.5)] for what in ("save", "eval", "logging")
    }
    assert due == {"save": [3, 6, 9], "eval": [3, 5, 8, 10], "logging": [4, 8, 10]}
    assert config.total_steps(12.3) == 13


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_mixture_takes_its_shares_and_splits(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "solution": str(i), "extra": i} for i in range(40)])
    second = jsonl(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "solution": str(i)} for i in range(20)])
    sets = [{"id": first, "columns": ["prompt", "solution"], "weight": 0.5}, {"id": second}]
    mixture = {"datasets": sets, "seed": 3, "test_split_size": 0.1}
    train, test = load_splits(ScriptArguments(dataset_mixture=mixture), test=True)
    every = train["prompt"][:] + test["prompt"][:]
    assert (len(train), len(test), len(set(every))) == (36, 4, 40)
    assert sum(text.startswith("a") for text in every) == 20
    again, _ = load_splits(ScriptArguments(dataset_mixture=mixture), test=True)
    assert again["prompt"][:] == train["prompt"][:]
    other, _ = load_splits(ScriptArguments(dataset_mixture=mixture | {"seed": 4}), test=True)
    assert other["prompt"][:] != train["prompt"][:]
    assert load_splits(ScriptArguments(dataset_mixture=mixture), test=False)[1] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"datasets": []}, "has no `datasets`: give a list"),
        ({"fraction": 1}, "has no option `fraction`"),
        ({"datasets": [{"id": "A", "weight": 1.5}]}, "weight must be at most 1, got 1.5"),
        ({"datasets": [{"id": "A", "weight": 0.5}]}, "weight 0.5 of .* leaves none of its 1 rows"),
        ({"datasets": [{"id": "A", "columns": ["answer"]}]}, r"has no columns \['answer'\]; it has"),
        ({"datasets": [{"id": "A"}, {"id": "B"}]}, "must have the same columns"),
        ({}, "give the mixture a test_split_size"),
    ],
)
def test_a_mixture_that_cannot_be_made(change, says, tmp_path):
    files = {"A": jsonl(tmp_path / "a.jsonl", [{"x": 1}]), "B": jsonl(tmp_path / "b.jsonl", [{"y": 1}])}
    mixture = {"datasets": [{"id": "A"}]} | change
    mixture["datasets"] = [entry | {"id": files[entry["id"]]} for entry in mixture["datasets"]]
    with pytest.raises(ValueError, match=says):
        load_splits(ScriptArguments(dataset_mixture=mixture), test=True)


def test_the_test_split_of_undivided_data(tmp_path):
    """It is never the training rows themselves."""
    train, test = jsonl(tmp_path / "a.jsonl", [{"x": 1}] * 3), jsonl(tmp_path / "b.jsonl", [{"x": 1}] * 2)
    Dataset.from_list([{"x": 1}] * 3).save_to_disk(tmp_path / "saved")
    for name in (train, str(tmp_path / "saved")):
        with pytest.raises(ValueError, match="has no splits: name .* --dataset_test_split FILE"):
            load_splits(ScriptArguments(dataset_name=name), test=True)
        both = load_splits(ScriptArguments(dataset_name=name, dataset_test_split=test), test=True)
        assert [len(rows) for rows in both] == [3, 2]


@pytest.mark.parametrize("option", ["dataset_config", "dataset_train_split", "dataset_test_split"])
def test_options_of_parts_that_the_data_does_not_have_are_warned_of(tmp_path, caplog, option):
    file = jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    for data in ({"dataset_name": file}, {"dataset_mixture": {"datasets": [{"id": file}]}}):
        for more in ({}, {option: "all"}):
            caplog.clear()
            with caplog.at_level("WARNING"):
                load_splits(ScriptArguments(**data, **more), test=False)
            ignored = bool(more) and (option != "dataset_test_split" or "dataset_mixture" in data)
            assert (f"--{option} all is not used" in caplog.text) == ignored


def test_a_saved_set_and_a_split_of_it_can_be_streamed(tmp_path):
    rows = Dataset.from_list([{"x": i} for i in range(3)])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "parts")
    for name in ("one", "parts"):
        assert [row["x"] for row in load_rows(str(tmp_path / name), streaming=True)] == [0, 1, 2]
    with pytest.raises(ValueError, match="has no split 'test': it has train"):
        load_rows(str(tmp_path / "parts"), split="test", streaming=True)


def test_a_format_selects_columns_and_changes_no_value():
    rows = Dataset.from_dict({"prompt": ["1", "2"], "completion": ["a", "b"], "tools": [[1], [2]]})
    rows.set_format("numpy", columns=["prompt", "tools"])
    plain = without_format(rows)
    assert plain[:] == {"prompt": ["1", "2"], "tools": [[1], [2]]}
    assert fingerprint(plain) == fingerprint(Dataset.from_dict({"prompt": ["1", "2"], "tools": [[1], [2]]}))
    assert without_format(None) is None


def messy(count):
    """Rows with empty fields, nested ones and texts of all lengths."""
    calls = [{"name": "add", "arguments": {"a": 1, "b": None}}]
    messages = [{"role": "user", "content": "é" * i, "tool_calls": calls if i % 3 else None} for i in range(5)]
    return [{"messages": messages[: 1 + i % 5], "n": i if i % 4 else None, "ok": i % 2 == 0} for i in range(count)]


def test_the_fingerprint_is_of_every_value_and_of_nothing_else(tmp_path):
    rows = messy(2345)
    data = Dataset.from_list(rows)
    known = fingerprint(data)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    backwards = list(range(len(data)))[::-1]
    same = [
        load_from_disk(tmp_path / "saved"),
        concatenate_datasets([data.select(range(77)), data.skip(77)]),
        data.select(backwards).select(backwards),
        Dataset.from_list(rows),
    ]
    assert [fingerprint(other) for other in same] == [known] * 4  # whatever its memory layout
    changed = [
        data.select(backwards),
        data.select(range(2344)),
        data.rename_column("n", "m"),
        data.remove_columns("ok"),
    ]
    for row in (1, 1233, 2344):
        for change in ({"n": 7}, {"ok": None}, {"messages": rows[row]["messages"] * 2}):
            changed.append(Dataset.from_list([*rows[:row], rows[row] | change, *rows[row + 1 :]]))
    found = [fingerprint(other) for other in changed]
    assert len({known, *found}) == 1 + len(changed)
