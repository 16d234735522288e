"""Errors in a reward, or in the columns that it gets, are reported before any weights are loaded."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import grpo_core.prepare
import grpo_core.train
from grpo_core.train import OPTIONS
from sft_core.run import distributed
from sft_core.run.cli import parse
from tests.grpo_core.test_train import TRAIN, options
from tests.launch import flags, locks_released, metrics, refusal, run

OWN = """
import functools, os, threading, time
async def waits(completions, **kwargs): return [1.0 for _ in completions]
def yields(completions, **kwargs): yield from (1.0 for _ in completions)
def no_such_column(completions, difficulty): return [1.0]
def no_argument(): return [1.0]
def one_too_many(completions, **kwargs): return [1.0] * (len(completions) + 1)
def one_for_all(completions, **kwargs): return 1.0
def text(completions, **kwargs): return ["1.0" for _ in completions]
def nan(completions, **kwargs): return [float("nan") for _ in completions]
def raises(completions, **kwargs): return [1 / 0]
def exits(completions, **kwargs): raise SystemExit(3)
def dies(completions, **kwargs): __import__("os")._exit(1)
def slow(completions, **kwargs): time.sleep(2); return [1.0]
def square(completions, **kwargs): return __import__("numpy").ones((1, 1))
class Reward:
    def __init__(self): self.__name__ = "an_instance"
    def __call__(self, completions, **kwargs): return [1.0 for _ in completions]
class Locked(Reward):
    def __init__(self): self.lock = threading.Lock()
locked, instance = Locked(), Reward()
def relative(completions, **kwargs):
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [length - sum(lengths) / len(lengths) for length in lengths]
def whole_group(completions, **kwargs): return relative(completions)
whole_group.batch = True
def chance(completions, **kwargs): return [__import__("random").random() for _ in completions]
def logs(completions, log_metric=None, **kwargs): return [1.0]
nameless = lambda completions, **kwargs: [1.0]
closure = (lambda weight: lambda completions, **kwargs: [weight])(1.0)
def once(function):
    def inner(completions, **kwargs): return function(completions)
    return inner
@once
def undecorated(completions): return [1.0]
bound = functools.partial(no_such_column, difficulty=[1])
not_callable = 7
_first = []
def imports(completions, **kwargs):
    if not _first: time.sleep(3)  # as a first import does
    _first.append(1)
    return [1.0]
def group(completions, group_ids, prompts, prompt_texts, completion_ids, solution, **kwargs):
    assert len(completions) == 4 and len(set(group_ids)) == 1 and set(kwargs) == {"trainer_state"}, kwargs
    assert [c[0]["content"] for c in completions] == solution == ["10"] * 4 and len(set(map(len, completion_ids))) == 1
    return [1.0] * 4
group.batch = True
def reads_all(completions, **columns): return [1.0]
def prints(completions, **kwargs):
    print("first")
    os.write(1, b"second\\n" * 3)
    return [1.0]
def never(completions, **kwargs): return [None]
def sometimes(completions, **kwargs):
    if completions[0][0]["content"] != "10": raise ValueError(f"odd {completions}")
    return [1.0]
def draws(completions):
    import random, numpy
    return [random.random() + numpy.random.rand()]
def solution(completions, solution): return [None]
def single(completions): assert len(completions) == 1; return [None]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def reward(completions: return [1.0]\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('no licence')\n")
    elsewhere = "import os\nassert os.environ['PYTHONHASHSEED'] != '0'\ndef reward(completions): return [1.0]\n"
    (tmp_path / "here_only.py").write_text(elsewhere)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "1")

    def refuse(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    yield
    distributed.shutdown()
    for name in ("own", "broken", "fails", "here_only"):
        sys.modules.pop(name, None)


def accept(argv):
    """Prepare a run that must be accepted."""
    with locks_released():
        run = grpo_core.prepare.prepare(*parse(OPTIONS, argv))
    distributed.shutdown()
    return run


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("own:waits", None),
        ("own:yields", "yields must return a list of 1 rewards"),
        ("own:no_such_column", "missing 1 required positional argument: 'difficulty'): fix it"),
        ("own:no_such_column", "prompt_texts, group_ids, solution"),
        ("own:no_argument", None),
        ("own:one_too_many", "one_too_many must return a list of 1 rewards"),
        ("own:one_for_all", "one_for_all must return a list of 1 rewards"),
        ("own:text", "text must return finite numbers, or None where it does not apply, not '1.0'"),
        ("own:nan", "nan must return finite numbers, or None where it does not apply, not nan"),
        ("own:square", "square must return finite numbers"),
        ("own:raises", "raises failed with ZeroDivisionError on a row of the data with the completion"),
        ("own:exits", "exits failed with SystemExit on a row of the data"),
        ("own:dies", "dies failed with crash on a row of the data"),
        (
            "own:slow",
            "slow failed with timeout on a row of the data with the completion '10' (took too long): fix "
            "it, or raise --reward_timeout",
        ),
        ("own:Reward", "the reward 'own:Reward' is a type, not a function (name an instance of a class)"),
        ("own:not_callable", "the reward 'own:not_callable' is a int, not a function"),
        ("own:locked", "Locked cannot be called in a worker process: it cannot be sent to a worker"),
        ("own:relative", "relative gives completions different values together than one at a time"),
        ("own:whole_group", None),
        ("own:chance", None),
        ("own:logs", None),
        ("own:nameless", None),
        ("own:closure", None),
        ("own:undecorated", None),
        ("here_only:reward", "reward cannot be called in a worker process"),
        ("broken:reward", "cannot import the reward 'broken:reward' (it must be module:function): SyntaxError"),
        ("fails:reward", "cannot import the reward 'fails:reward' (it must be module:function): RuntimeError"),
        ("own:instance", None),
        ("own:bound", None),
        ("own:imports", None),
        ("own:group", None),
        ("own:single", None),
    ],
)
def test_a_dry_call_of_every_reward(own, tiny_model, problems, tmp_path, capsys, reward, says):
    argv = options(tiny_model, problems, tmp_path / "out", reward_funcs=[reward, "format"], reward_timeout=1)
    if says is None:
        accept(argv)
        assert ("logs does not receive log_metric" in capsys.readouterr().out) == (reward == "own:logs")
    else:
        assert says in refusal(grpo_core.train.main, argv, capsys)


def test_a_dry_call_leaves_nothing_behind(own, tiny_model, problems, tmp_path):
    """The random state is the same as if the rewards had not been called."""
    states = []
    for rollouts in (None, tmp_path):  # a replay does not call rewards
        argv = options(tiny_model, problems, tmp_path / "out", reward_funcs=["own:draws"])
        accept(argv + (flags(rollouts_from=rollouts) if rollouts else []))
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


def rows_file(folder, values, name="rows.jsonl", column="solution"):
    rows = [{"prompt": f"Ben has {i} stones.", column: value} for i, value in enumerate(values)]
    rows = [row if row[column] != BLOCK else row | {column: values[0], "unused": "x" * BLOCK} for row in rows]
    (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return folder / name


BLOCK = 10 << 20  # characters from which `datasets` infers the types


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["21", 3], "row 2 of the data: `solution` is 3 in a column of several types (the first is str): write one"),
        ([21, "x"], "row 2 of the data: `solution` is 'x' in a column of several types (the first is number)"),
        ([None, 21, None, 2.5, "21"], "row 5 of the data: `solution` is '21' in"),
        (["3", ["3", "4"]], "row 2 of the data: `solution` is ['3', '4'] in"),
        ([1, True], "row 2 of the data: `solution` is True in"),
        ([{"a": 1}, "1"], "row 2 of the data: `solution` is '1' in"),
        (["1", BLOCK, 3], "cannot be read: in line 3 `solution` is 3, above a str"),
        ([1, BLOCK, "3"], "cannot be read: in line 3 `solution` is '3', above a number"),
        ([["1"], ["2", 3]], None),
        ([{"a": "1"}, {"a": 2}], None),
        (["2024-01-01", "2024-01-02"], None),
        ([2**53 + 1, 0.5], None),
        (["21", "x", "", None], None),
        ([21, 2, None], None),
        ([21, 2.5, 1e-05, 1e300], None),
        ([None, None], None),
        ([["1"], [], None, ["2", "3"]], None),
        ([{"a": 1}, {"b": [2]}, None], None),
        ([True, False], None),
        ([1.5, math.nan], None),
    ],
)
def test_a_column_of_mixed_types_is_refused_where_a_reward_uses_it(own, tiny_model, tmp_path, capsys, values, says):
    paths = tiny_model, rows_file(tmp_path, values), tmp_path / "out"
    argv = options(*paths, reward_funcs=["own:solution"])
    if says is None:
        seen = [prompt.columns["solution"] for prompt in accept(argv).prompts]
        assert all(a == b or a != a and b != b for a, b in zip(seen, values, strict=True)) and [
            type(v) for v in seen if type(v) is not float
        ] == [type(v) for v, s in zip(values, seen, strict=True) if type(s) is not float]
    else:
        assert says in refusal(grpo_core.train.main, argv, capsys)
        if says.startswith("row"):
            accept(options(*paths, reward_funcs=["own:no_argument", "format"]))  # neither reads it


def test_of_a_column_that_a_reward_does_not_ask_for_it_is_only_said(own, tiny_model, tmp_path, capsys):
    """A reward with TRL's signature gets all columns."""
    data = rows_file(tmp_path, ["21", 3], column="created")
    run = accept(options(tiny_model, data, tmp_path / "out", reward_funcs=["own:prints"]))
    assert [prompt.columns["created"] for prompt in run.prompts] == ["21", 3]
    assert "warning: row 2 of the data: `created` is 3 in a column of several" in capsys.readouterr().out


def test_the_rows_of_a_mixture_keep_their_columns(own, tiny_model, tmp_path):
    """They are not the rows of one file, whatever file --dataset_test_split names."""
    data = rows_file(tmp_path, [str(i) for i in range(8)])
    mixture = json.dumps({"datasets": [{"id": str(data)}], "test_split_size": 3})
    argv = options(tiny_model, data, tmp_path / "out", dataset_mixture=mixture, do_eval="true", dataset_test_split=data)
    run = accept([text for text in argv if not text.startswith("--dataset_name")])
    for prompt in run.prompts + run.test_prompts:
        assert f"Ben has {prompt.columns['solution']} stones." in prompt.messages[-1]["content"]


def test_mixed_types_in_data_that_is_no_local_file_of_lines(own, tiny_model, tmp_path, capsys):
    """A folder, a list in .json, and a saved set, of which the written form is not known."""
    said = "of the data: `solution` is 21 in a column of several types (the first is number)"
    for values in (["21", 3], [21, "x"]):
        (folder := tmp_path / f"folder{values[1]}").mkdir()
        rows_file(folder, values)
        saved = Dataset.from_list([{"prompt": "p", "solution": value} for value in values], on_mixed_types="use_json")
        saved.save_to_disk(tmp_path / f"saved{values[1]}")
        for data in (folder, rows_file(tmp_path, values, "rows.json"), tmp_path / f"saved{values[1]}"):
            argv = options(tiny_model, data, tmp_path / "out", reward_funcs=["own:solution"])
            line = refusal(grpo_core.train.main, argv, capsys)
            assert said in line or "row 2 of the data: `solution` is 'x' in a column of several types" in line


def test_a_saved_set_keeps_its_values_whatever_format_it_was_saved_in(own, tiny_model, tmp_path):
    rows = Dataset.from_list([{"prompt": "p", "solution": 21, "list": [1.5]}]).with_format(
        "numpy", columns=["solution"]
    )
    rows.save_to_disk(tmp_path / "saved")
    run = accept(options(tiny_model, tmp_path / "saved", tmp_path / "out", dataset_prompt_column="prompt"))
    assert run.prompts[0].columns == {"solution": 21, "list": [1.5]}


@pytest.mark.parametrize("name", ["completions", "completion_ids", "prompts", "prompt_texts", "group_ids"])
def test_a_column_that_would_hide_behind_what_rewards_are_given(tiny_model, tmp_path, capsys, name):
    argv = options(tiny_model, rows_file(tmp_path, ["1"], column=name), tmp_path / "out")
    assert f"rename the data's column {name!r}" in refusal(grpo_core.train.main, argv, capsys)


@pytest.mark.parametrize("weights", [[0, 0], ["nan", 1], ["inf", 1], [1]])
def test_weights_that_would_teach_nothing(tiny_model, problems, tmp_path, capsys, weights):
    argv = options(tiny_model, problems, tmp_path / "out", reward_funcs=["accuracy", "format"], reward_weights=weights)
    said = refusal(grpo_core.train.main, argv, capsys)
    assert "give one weight each, finite and not all 0" in said or "reward_weights must be finite" in said


def test_what_a_run_says_of_its_rewards(own, tiny_model, problems, tmp_path):
    """It prints the output of one worker of rank 0, failures by type, steps without reward, and a missing gradient."""
    argv = options(tiny_model, problems, tmp_path / "out", max_steps=2, prompts_per_step=8, reward_funcs=["own:prints"])
    code, output = run(TRAIN, argv + flags(dataset_test_split=problems, do_eval="true"), tmp_path / "log", ranks=2)
    assert code == 0, output
    for step, most in (("step 1", 20), ("step 2", 20), ("evaluation", 60)):  # it uses 8 prompts at once
        lines = [line for line in output.splitlines() if f"{step}: a reward printed: " in line]
        assert len(lines) == most and "a reward printed: first" in lines[0] and "a reward printed: second" in lines[1]
    assert output.count("no group of this run had a gradient") == 1  # all rewards are equal
    assert (tmp_path / "out" / "model.safetensors").exists()

    argv = options(tiny_model, problems, tmp_path / "none", reward_funcs=["own:never", "own:sometimes"], seed=1)
    code, output = run(TRAIN, argv, tmp_path / "log2")
    assert code == 1 and "no completion of the last three rollout batches could be scored" in output
    for step in (1, 2, 3):
        assert f"step {step}: 12 completions are unscored: sometimes failed with ValueError, ValueError: odd" in output
        assert f"step {step}: no completion has a reward: never gave None 12 times, sometimes failed with" in output

    code, output = run(TRAIN, options(tiny_model, problems, tmp_path / "learns", max_steps=1), tmp_path / "log3")
    assert code == 0 and "had a gradient" not in output and "printed" not in output
    assert metrics(tmp_path / "learns")[0]["effective_groups"] > 0
