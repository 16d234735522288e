"""Reward functions against open-r1's documented cases, and the scoring of a step."""

import math
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.workers import WorkerPool
from grpo_core.rewards import (
    REWARD_FUNCS_REGISTRY,
    accuracy_reward,
    format_reward,
    get_repetition_penalty_reward,
    get_reward_funcs,
    reward_name,
)
from grpo_core.scoring import gold_column, score_completions

USER_REWARDS = """
import os, time
def length(completions, **kwargs): return [float(len(c[0]["content"])) for c in completions]
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
    return [float(seen == (["p"], [3], [[7, 8]], ["72"], ["a\\n#### 72"]))]
def rank_in_group(completions, **kwargs):
    texts = [c[0]["content"] for c in completions]
    return [float(sorted(texts).index(t)) for t in texts]
rank_in_group.batch = True
"""


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


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


def score(pool, functions, texts, weights=None, group_ids=None, **columns):
    n = len(texts)
    return score_completions(
        functions, weights, completions=texts, prompts=["p"] * n, group_ids=group_ids or [0] * n,
        completion_ids=[[7, 8]] * n, columns=columns, pool=pool,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the functions


def test_accuracy_documented_cases():
    assert accuracy_reward(messages(r"\boxed{\frac{63}{400}}"), [r"\frac{63}{400}"]) == [1.0]
    assert accuracy_reward(messages(r"\boxed{\frac{64}{400}}"), solution=[r"\frac{63}{400}"]) == [0.0]
    both = messages(r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}")
    assert accuracy_reward(both, [r"\frac{63}{400}"] * 2, other=[1, 2]) == [1.0, 0.0]
    assert accuracy_reward(messages(r"\boxed{3}"), ["6"]) == [0.0]
    assert accuracy_reward(messages("63", "<answer>63</answer>", "64"), ["63", 63, "$63$"]) == [1.0, 1.0, 0.0]
    assert accuracy_reward(messages("whatever"), ["words only"]) == [1.0]


def test_format_documented_cases():
    right = [
        "<think>Some reasoning</think><answer>The answer</answer>",
        "<think>\nMultiple\nlines\n</think>\n<answer>\nof\nanswer\n</answer>",
        "<think>\n1 < 2\n</think>\n<answer>\n2\n</answer>\n",
    ]
    wrong = [
        "<think>Only thinking</think>",
        "<answer>Only answer</answer>",
        "No tags at all",
        "<think>Missing closing</think><answer>Missing closing",
        "<think>Wrong order</answer><answer>Wrong order</think>",
        "<answer>a</answer><think>t</think>",
        "",
        # open-r1's pattern pays these
        "<think>t</think><answer>a</answer>\njunk",
        "<think>t</think><answer>a</answer>\n<think>t</think><answer>a</answer>",
        "<think>t</think><answer>a</answer><answer>b</answer>",
        "<think><think>t</think></think><answer>a</answer>",
    ]
    assert format_reward(messages(*right)) == [1.0] * len(right)
    assert format_reward(messages(*wrong), solution=[""] * len(wrong)) == [0.0] * len(wrong)


def test_format_where_the_template_opened_the_thought():
    text = messages("t</think><answer>a</answer>")
    assert format_reward(text) == [0.0]
    assert format_reward(text, prompts=["<|assistant|><think>\n"]) == [1.0]
    assert format_reward(text, prompts=[[{"role": "user", "content": "q"}]]) == [0.0]
    assert format_reward(text, prompts=[[{"role": "assistant", "content": "<think>"}]]) == [1.0]


@pytest.mark.parametrize(
    ("n", "penalty", "text", "expected"),
    [
        (2, -1.0, "this is a test sentence", 0.0),
        (2, -1.0, "this this this this this", -0.75),
        (2, -1.0, "this is a this is a test", -1 / 3),
        (3, -0.5, "this is a test", 0.0),
        (3, -0.5, "test test test test", -0.25),
        (2, -1.0, "", 0.0),
        (3, -2.0, "this is a this is a test", -0.4),
        (3, -1.0, "word", 0.0),
        (3, -1.0, "word word", 0.0),
        (3, -1.0, "word word word", 0.0),
        (3, -1.0, "word word word word", -0.5),
        (3, -1.0, "one two three four", 0.0),
        (3, -1.0, "one two three four five", 0.0),
        (3, -1.0, "one two three one two three", -0.25),
        (3, -1.0, "a b c d e f g h a b c d e f g", -5 / 13),
        (3, -1.0, "a b c d e f g h i j k l m n o", 0.0),
        (3, 0.0, "word word word word", 0.0),
    ],
)
def test_repetition_documented_cases(n, penalty, text, expected):
    reward = get_repetition_penalty_reward(n, penalty)
    assert reward(messages(text)) == pytest.approx([expected])
    assert reward(messages(text.upper(), text), solution=["", ""]) == pytest.approx([expected] * 2)
    assert pickle.loads(pickle.dumps(reward))(messages(text)) == reward(messages(text))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_repetition_refuses_a_positive_penalty(penalty):
    with pytest.raises(ValueError, match="should not be positive"):
        get_repetition_penalty_reward(2, penalty)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60) | st.text("ab <>/think\n", max_size=60), min_size=1, max_size=6),
    n=st.integers(1, 5),
    penalty=st.floats(-10, 0),
    data=st.data(),
)
def test_properties(texts, n, penalty, data):
    order = data.draw(st.permutations(range(len(texts))))
    for function, low, high in ((format_reward, 0, 1), (get_repetition_penalty_reward(n, penalty), penalty, 0)):
        rewards = function(messages(*texts))
        assert all(low <= reward <= high for reward in rewards)
        assert function(messages(*[texts[i] for i in order])) == [rewards[i] for i in order]


# ------------------------------------------------------------------------------------------------ by name


def args(*names):
    return SimpleNamespace(reward_funcs=list(names), repetition_n_grams=3, repetition_max_penalty=-1.0)


def test_names(user):
    functions = get_reward_funcs(args(*REWARD_FUNCS_REGISTRY, "user_rewards:length"))
    names = [reward_name(function) for function in functions]
    assert names == ["accuracy_reward", "format_reward", "repetition_penalty_reward", "length"]
    assert functions[2](messages("word word word word")) == [-0.5]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acuracy"], "unknown reward 'acuracy': did you mean 'accuracy'.*format, repetition_penalty"),
        (["no_module_of_this_name:f"], "cannot import"),
        (["user_rewards:no_function"], "no_function"),
        (["user_rewards:os"], "not a function"),
        (["format", "format"], "both named 'format_reward'"),
    ],
)
def test_bad_names(user, names, message):
    with pytest.raises(ValueError, match=message):
        get_reward_funcs(args(*names))


def test_gold_column():
    assert gold_column({"answer": ["48/2 = 24\n#### 72", 9]}) == ["72", "9"]
    assert gold_column({"solution": [r"\boxed{1}"], "answer": ["2"]}) == [r"\boxed{1}"]
    assert gold_column({"problem": ["p"]}) is None


# ------------------------------------------------------------------------------------------------ a step


def test_score_weights_and_gold_from_gsm8k(pool):
    texts = ["<think>t</think><answer>72</answer>", "<answer>72</answer>", "word word word word", "73"]
    functions = get_reward_funcs(args("accuracy", "format", "repetition_penalty"))
    result = score(pool, functions, texts, [2.0, 0.5, 1.0], answer=["so\n#### 72"] * 4)
    assert result.rewards.dtype == np.float64
    assert result.rewards == pytest.approx([2.5, 2.0, -0.5, 0.0])
    assert result.per_function == {
        "accuracy_reward": [1.0, 1.0, 0.0, 0.0],
        "format_reward": [1.0, 0.0, 0.0, 0.0],
        "repetition_penalty_reward": [0.0, 0.0, -0.5, 0.0],
    }
    assert (result.unscored, result.errors) == (0, {})
    with pytest.raises(ValueError, match="reward_weights has 1"):
        score(pool, functions, texts, [1.0], answer=["1"] * 4)


def test_score_leaves_failed_checks_unscored_and_none_out(pool, user):
    functions = [user.hang_on_x, user.die_on_y, user.none_on_z]
    result = score(pool, functions, ["a", "x", "y", "z", "b"], [1.0, 1.0, 10.0])
    np.testing.assert_array_equal(result.rewards, [7.0, math.nan, math.nan, 2.0, 7.0])
    assert result.per_function["hang_on_x"] == [1.0, None, 1.0, 1.0, 1.0]
    assert result.per_function["die_on_y"] == [1.0, 1.0, None, 1.0, 1.0]
    assert result.per_function["none_on_z"] == [0.5, 0.5, 0.5, None, 0.5]
    assert result.unscored == 2
    assert {key.partition(":")[0]: count for key, count in result.errors.items()} == {"hang_on_x": 1, "die_on_y": 1}
    only_none = score(pool, [user.none_on_z], ["z", "a"])
    np.testing.assert_array_equal(only_none.rewards, [math.nan, 0.5])
    assert (only_none.unscored, only_none.errors) == (1, {})


def test_score_gives_columns_by_name(pool, user):
    result = score(pool, [user.columns_seen], ["t"], group_ids=[3], answer=["a\n#### 72"], difficulty=[5])
    assert result.rewards.tolist() == [1.0], result.errors
    assert score(pool, [user.named_only], ["t", "u"], difficulty=[5, 6], other=[1, 2]).rewards.tolist() == [2.5, 3.0]


def test_score_counts_what_a_function_got_wrong(pool, user):
    result = score(pool, [user.wrong_count, user.not_finite], ["t", "u"])
    assert np.isnan(result.rewards).all() and result.unscored == 2
    assert sorted(result.errors.values()) == [2, 2]
    assert any("must return a list of 1 rewards" in key for key in result.errors)


def test_score_calls_a_batch_function_once_a_group(pool, user):
    texts, group_ids = ["b", "d", "a", "c", "e"], [0, 1, 0, 1, 0]
    result = score(pool, [user.rank_in_group, user.length], texts, group_ids=group_ids)
    assert result.per_function["rank_in_group"] == [1.0, 1.0, 0.0, 0.0, 2.0]
    assert result.rewards.tolist() == [2.0, 2.0, 1.0, 1.0, 3.0]
