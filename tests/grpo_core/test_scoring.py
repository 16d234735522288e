"""Scoring a step: columns by name, weights, failed checks, groups, rendered prompts, threads and forks."""

import datetime as dt
import math
import os
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from eval.workers import WorkerPool
from gen.engine.base import Completion, Sampling
from grpo_core.config import GRPOConfig
from grpo_core.rewards import (
    accuracy_reward,
    format_reward,
    get_reward_funcs,
    len_reward,
    reward_name,
    tag_count_reward,
)
from grpo_core.rollout import Prompt, Sample, Scorer, sample_groups
from grpo_core.scoring import ToScore, start_scoring, unparseable_golds, with_gold

USER_REWARDS = """
import os, time
def length(completions, **kwargs): return [float(len(c[0]["content"])) for c in completions]
def shown(completions, shows, **columns):
    return [float(repr(columns[shows[0]][0]) == columns["expected"][0])]
def gives(completions, value): return value[0]
def changes(completions, extra, **kwargs):
    completions[0][0]["content"] += "!"
    extra[0].append(1)
    return [float(len(extra[0]) == 2)]
def raises(completions, **kwargs): raise KeyError(completions[0][0]["content"])
def nothing(completions, **kwargs): return [None]
def named_only(completions, difficulty): return [d / 2 for d in difficulty]
def hang_on_x(completions, **kwargs):
    while completions[0][0]["content"] == "x": pass
    return [1.0]
def die_on_y(completions, **kwargs):
    if completions[0][0]["content"] == "y": os._exit(1)
    return [1]
def none_on_z(completions, **kwargs): return [None if completions[0][0]["content"] == "z" else 0.5]
def wrong_count(completions, **kwargs): return [1.0, 2.0]
def not_finite(completions, **kwargs): return [float("nan")]
def columns_seen(completions, prompts, group_ids, completion_ids, solution, answer):
    seen = prompts, group_ids, completion_ids, solution, answer
    return [float(seen == ([[{"role": "user", "content": "p"}]], [3], [[7, 8]], ["72"], ["a\\n#### 72"]))]
def rank_in_group(completions, **kwargs):
    texts = [c[0]["content"] for c in completions]
    return [float(sorted(texts).index(t)) for t in texts]
rank_in_group.batch = True
def clock(completions, **kwargs): return [time.time()]
def level_or_zero(completions, level, **kwargs): return [float(level[0] or 0)]
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "user_rewards.py").write_text(USER_REWARDS)
    sys.path.insert(0, str(folder))
    import user_rewards

    yield user_rewards
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(user):
    with WorkerPool(2, timeout=2.0) as pool:
        yield pool


def score(pool, functions, texts, weights=None, group_ids=None, prompt_texts=None, **columns):
    """Rewards, the values of each function by name, and the number of missing values."""
    n = len(texts)
    group_ids, prompt_texts = group_ids or [0] * n, prompt_texts or [""] * n
    rows = [{name: values[i] for name, values in columns.items()} for i in range(n)]
    prompt = [{"role": "user", "content": "p"}]
    completions = [ToScore(texts[i], [7, 8], group_ids[i], prompt, prompt_texts[i], rows[i]) for i in range(n)]
    scores = start_scoring(functions, weights, completions, pool)()
    by_function = zip(*scores.values, strict=True)
    per_function = {reward_name(f): list(values) for f, values in zip(functions, by_function, strict=True)}
    return SimpleNamespace(rewards=scores.rewards, per_function=per_function, gaps=scores.gaps)


def test_gold_column():
    for raw in (9, None, 0.5, ["3"], {"a": 1}):
        assert with_gold({"answer": raw})["solution"] == raw == with_gold({"solution": raw})["solution"]
    assert with_gold({"answer": "48/2 = 24\n#### 72"})["solution"] == "72"
    assert with_gold({"solution": r"\boxed{1}", "answer": "2"})["solution"] == r"\boxed{1}"
    assert with_gold({"problem": "p"}) == {"problem": "p"}


def test_score_weights_and_gold_from_gsm8k(pool):
    texts = ["<think>t</think><answer>72</answer>", "<answer>72</answer>", "word word word word", "73"]
    arguments = SimpleNamespace(
        reward_funcs=["accuracy", "format", "repetition_penalty"], repetition_n_grams=3, repetition_max_penalty=-1.0
    )
    functions = get_reward_funcs(arguments)
    result = score(pool, functions, texts, [2.0, 0.5, 1.0], answer=["so\n#### 72"] * 4)
    assert result.rewards == pytest.approx([2.5, 2.0, -0.5, 0.0])
    assert result.per_function == {
        "accuracy_reward": [1.0, 1.0, 0.0, 0.0],
        "format_reward": [1.0, 0.0, 0.0, 0.0],
        "repetition_penalty_reward": [0.0, 0.0, -0.5, 0.0],
    }
    assert result.gaps == []
    with pytest.raises(ValueError, match="reward_weights has 1"):
        score(pool, functions, texts, [1.0], answer=["1"] * 4)


def test_score_leaves_failed_checks_unscored_and_none_out(pool, user):
    functions = [user.hang_on_x, user.die_on_y, user.none_on_z]
    result = score(pool, functions, ["a", "x", "y", "z", "b"], [1.0, 1.0, 10.0])
    np.testing.assert_array_equal(result.rewards, [7.0, math.nan, math.nan, 2.0, 7.0])
    assert result.per_function["hang_on_x"] == [1.0, None, 1.0, 1.0, 1.0]
    assert result.per_function["die_on_y"] == [1.0, 1.0, None, 1.0, 1.0]
    assert result.per_function["none_on_z"] == [0.5, 0.5, 0.5, None, 0.5]
    assert sorted(cause for cause, _ in result.gaps) == [
        "die_on_y failed with crash",
        "hang_on_x failed with timeout",
        "none_on_z gave None",
    ]
    only_none = score(pool, [user.none_on_z], ["z", "a"])
    np.testing.assert_array_equal(only_none.rewards, [math.nan, 0.5])
    assert only_none.gaps == [("none_on_z gave None", "")]


def test_score_gives_columns_by_name(pool, user):
    result = score(pool, [user.columns_seen], ["t"], group_ids=[3], answer=["a\n#### 72"], difficulty=[5])
    assert result.rewards == [1.0], result.gaps
    assert score(pool, [user.named_only], ["t", "u"], difficulty=[5, 6], other=[1, 2]).rewards == [2.5, 3.0]


COLUMNS = [21, 2.5, 1e-05, True, None, "21", "1e-05", ["3", "4"], {"a": [1, None]}, dt.date(2026, 1, 1)]


def test_columns_reach_a_reward_as_they_are(pool, user):
    n = len(COLUMNS)
    for data, seen in (("solution", "solution"), ("answer", "answer"), ("answer", "solution"), ("level", "level")):
        columns = {data: COLUMNS, "shows": [seen] * n, "expected": [repr(value) for value in COLUMNS]}
        assert score(pool, [user.shown], ["t"] * n, **columns).per_function["shown"] == [1.0] * n


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.5,), 0.5),
        ([True], 1.0),
        ([None], None),
        ([Fraction(1, 2)], 0.5),
        ([2], 2.0),
        (np.array([0.5]), 0.5),
        (np.array([True]), 1.0),
        (np.array([None]), None),
        (np.array([2], dtype=np.int8), 2.0),
        ([np.float32(0.5)], 0.5),
        ([np.bool_(True)], 1.0),
        ([np.array(0.5)], 0.5),
        (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
        ([torch.tensor(0.5, requires_grad=True)], 0.5),
        *[
            (wrong, "must return a list of 1 rewards")
            for wrong in (
                0.5,
                None,
                "1",
                {0: 1.0},
                {1.0},
                [],
                [0.5, 0.5],
                np.array(0.5),
                np.array([0.5, 0.5]),
                torch.ones(2),
            )
        ],
        *[
            (wrong, "must return finite numbers, or None where it does not apply")
            for wrong in (
                ["1"],
                [b"1"],
                [[0.5]],
                [{"reward": 0.5}],
                [1j],
                np.array([[0.5]]),
                torch.ones(1, 1),
                np.array(["1"]),
                [math.nan],
                [math.inf],
                np.array([np.nan]),
                torch.tensor([-math.inf]),
            )
        ],
    ],
)
def test_what_a_reward_may_return(pool, user, given, expected):
    result = score(pool, [user.gives], ["t"], value=[given])
    if isinstance(expected, str):
        [(cause, text)] = result.gaps
        assert cause == "gives failed with TypeError" and expected in text and "gives" in text
    else:
        assert result.per_function["gives"] == [expected] and type(result.per_function["gives"][0]) in (
            float,
            type(None),
        )


def test_what_a_reward_changes_another_does_not_see(pool, user):
    result = score(pool, [user.changes, user.length], ["text"] * 8, extra=[[1]] * 8)
    assert result.per_function == {"changes": [1.0] * 8, "length": [4.0] * 8}


def test_failed_checks_are_counted_by_function_and_type_of_error(pool, user, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config, prompt = GRPOConfig("none", num_generations=2), Prompt([], [5], {})

    def lines(*functions, count):
        scorer = Scorer({0: prompt}, list(functions), config, tokenizer, pool)
        scorer.begin([Sample(0, [5], [i], [0.0], "stop", 0) for i in range(count)])
        return scorer.finish()

    with_text = lines(user.wrong_count, user.raises, user.length, count=3)
    assert len(with_text) == 3  # each error text has a different number
    assert "3 completions are unscored: wrong_count failed with TypeError, TypeError: wrong_count must" in with_text[0]
    assert "3 completions are unscored: raises failed with KeyError, KeyError: " in with_text[1]
    assert with_text[2] == (
        "no completion has a reward: wrong_count failed with TypeError 3 times, raises failed with KeyError 3 times"
    )
    assert lines(user.nothing, count=2) == ["no completion has a reward: nothing gave None 2 times"]
    assert lines(user.nothing, user.length, count=2) == []


def test_score_calls_a_batch_function_once_a_group(pool, user):
    texts, group_ids = ["b", "d", "a", "c", "e"], [0, 1, 0, 1, 0]
    result = score(pool, [user.rank_in_group, user.length], texts, group_ids=group_ids)
    assert result.per_function["rank_in_group"] == [1.0, 1.0, 0.0, 0.0, 2.0]
    assert result.rewards == [2.0, 2.0, 1.0, 1.0, 3.0]


def test_score_compares_lengths_within_a_group(pool):
    texts = [r"\boxed{1}", r"\boxed{1}" + " " * 10, r"\boxed{1}" + " " * 50, r"\boxed{2}" + " " * 1000]
    result = score(pool, [len_reward], texts, group_ids=[0, 0, 1, 1], solution=["1"] * 4)
    assert result.rewards == [0.5, -0.5, 0.5, -0.5]


def test_rewards_see_the_thought_that_the_chat_template_opened(pool):
    text = "\nt\n</think>\n<answer>\na\n</answer>"
    rendered = "<|system|>write <think> t </think>\n<|user|>q\n<|assistant|>\n"
    result = score(pool, [format_reward, tag_count_reward], [text] * 2, prompt_texts=[rendered + "<think>", rendered])
    assert result.per_function == {"format_reward": [1.0, 0.0], "tag_count_reward": [1.0, 0.75]}


def test_unparseable_golds(pool):
    """A gold that times out is kept, since the rows of a run must not depend on how busy the machine is."""
    endless = r"\binom{1000000000}{500000000}"
    golds = ["63", "words only", "63", "", endless, r"\frac{1}{2}", "words only"]
    assert unparseable_golds(golds, pool) == [1, 3, 6]
    assert unparseable_golds([63, None, 1e-05, 2.5, math.nan], pool) == [1, 4]
    with pytest.raises(ValueError, match=r"text or a number, not \['3', '4'\]: change the column"):
        unparseable_golds(["63", ["3", "4"]], pool)


def test_threads_and_forks_can_check():
    """math-verify's own timeout is a signal, which only works in the main thread and which a fork inherits."""
    golds, texts = ["63", "64"], [[{"content": r"\boxed{63}"}]] * 2
    found = []
    thread = threading.Thread(target=lambda: found.extend(accuracy_reward(texts, golds)))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]
    child = os.fork()
    if child == 0:
        os._exit(0 if accuracy_reward(texts, golds) == [1.0, 0.0] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_group_is_scored_while_others_are_sampled(pool, user, tiny_model):
    """The rewards equal those of scoring everything at once. Columns that a prompt lacks are None for it."""
    prompts = {3: Prompt([], [5], {"solution": "1"}), 8: Prompt([], [6], {"solution": "2", "level": 7})}
    config = GRPOConfig("none", num_generations=2, reward_weights=[1.0, 0.0, 0.0])
    tokenizer, told = AutoTokenizer.from_pretrained(tiny_model), {}

    def slow_sample(ids, sampling, seeds, finished):
        finished(1, [Completion([7, 8], [-1.0, -1.0], "length")] * 2)
        while pool._todo or any(worker.items for worker in pool._workers):
            pool._turn(0.1)  # like other groups would do
        told["scored by"] = time.time()
        finished(0, [Completion([9], [-1.0], "stop")] * 2)

    pool.map(user.clock, [[0]])
    engine = SimpleNamespace(version=4, sample=slow_sample)
    scorer = Scorer(prompts, [user.clock, user.length, user.level_or_zero], config, tokenizer, pool)
    rollouts = sample_groups(engine, prompts, Sampling(2, 2), [1, 2], scorer.begin)
    assert [r.group for r in rollouts] == [3, 3, 8, 8] and scorer.finish() == []
    assert max(r.reward for r in rollouts[2:]) <= told["scored by"] <= min(r.reward for r in rollouts[:2])
    assert [r.rewards[2] for r in rollouts] == [0.0, 0.0, 7.0, 7.0]
    begun, texts = [r.rewards[1] for r in rollouts], tokenizer.batch_decode([[9], [7, 8]])
    assert begun == [float(len(text)) for text in texts for _ in range(2)]
