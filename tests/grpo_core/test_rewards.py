"""Reward functions: open-r1's documented cases, each defect fixed here, and properties that hold for any text."""

import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.workers import Unscored, WorkerPool
from grpo_core.rewards import (
    REWARD_FUNCS_REGISTRY,
    accuracy_reward,
    format_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_reward_funcs,
    get_soft_overlong_punishment,
    len_reward,
    reasoning_steps_reward,
    reward_name,
    tag_count_reward,
)


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# ------------------------------------------------------------------------------------------------ the functions


def test_accuracy_documented_cases():
    assert accuracy_reward(messages(r"\boxed{\frac{63}{400}}"), [r"\frac{63}{400}"]) == [1.0]
    assert accuracy_reward(messages(r"\boxed{\frac{64}{400}}"), solution=[r"\frac{63}{400}"]) == [0.0]
    both = messages(r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}")
    assert accuracy_reward(both, [r"\frac{63}{400}"] * 2, other=[1, 2]) == [1.0, 0.0]
    assert accuracy_reward(messages(r"\boxed{3}"), ["6"]) == [0.0]
    assert accuracy_reward(messages("63", "<answer>63</answer>", "64"), ["63", 63, "$63$"]) == [1.0, 1.0, 0.0]
    assert accuracy_reward(messages("whatever"), ["words only"]) == [None]


NOT_ITS_STRING = messages(r"\boxed{-5 + e}", r"\boxed{0.00001}", r"\boxed{10^{-5}}", r"\boxed{2}", r"\boxed{4/2}")


def test_a_gold_that_is_no_text():
    """A number counts by its value, not its Python notation. None means no gold. A list is no interval or number."""
    assert accuracy_reward(NOT_ITS_STRING, [1e-05] * 5) == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert (
        accuracy_reward(NOT_ITS_STRING, [2.0] * 5) == accuracy_reward(NOT_ITS_STRING, [2] * 5) == [0.0] * 3 + [1.0] * 2
    )
    huge = 10**30 + 1
    assert accuracy_reward(messages(rf"\boxed{{{huge}}}", r"\boxed{10^{30}}", "0"), [huge, 1e30, -0.0]) == [1.0] * 3
    gives = [accuracy_reward, get_cosine_scaled_reward(), len_reward]
    assert [reward(messages("1", "None"), [None, None]) for reward in gives] == [[None, None]] * 3
    for reward in gives:
        for gold in (["3", "4"], [3], {"value": 3}, True, b"3", (3, 4)):
            with pytest.raises(ValueError, match="a gold answer must be text or a number, not"):
                reward(messages("3"), [gold])


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
        # open-r1's pattern accepts these
        "<think>t</think><answer>a</answer>\njunk",
        "<think>t</think><answer>a</answer>\n<think>t</think><answer>a</answer>",
        "<think>t</think><answer>a</answer><answer>b</answer>",
        "<think><think>t</think></think><answer>a</answer>",
    ]
    assert format_reward(messages(*right)) == [1.0] * len(right)
    assert format_reward(messages(*wrong), solution=[""] * len(wrong)) == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, 0.0),
        ({"prompts": ["<|assistant|><think>\n"]}, 1.0),
        ({"prompts": [[{"role": "user", "content": "what is <think>"}]]}, 0.0),
        ({"prompts": [[{"role": "assistant", "content": "<think>"}]]}, 1.0),
        ({"prompts": [[{"role": "user", "content": "q"}]], "prompt_texts": ["q<|assistant|><think>\n"]}, 1.0),
        ({"prompts": ["<think>\n"], "prompt_texts": ["<think> t </think><|assistant|>"]}, 0.0),
    ],
)
def test_format_where_the_prompt_opened_the_thought(columns, expected):
    assert format_reward(messages("t</think><answer>a</answer>"), **columns) == [expected]


def test_format_where_the_template_closed_an_empty_thought():
    columns = {"prompt_texts": ["<|assistant|><think>\n\n</think>\n\n"]}
    assert format_reward(messages("<answer>a</answer>"), **columns) == [1.0]
    assert format_reward(messages("<think>t</think><answer>a</answer>"), **columns) == [0.0]


def test_tag_count():
    whole = "<think>\nt\n</think>\n<answer>\na\n</answer>"
    assert tag_count_reward(messages(whole, "", whole + whole)) == [1.0, 0.0, 0.0]
    for part in ("<think>\n", "\n</think>", "<answer>\n", "\n</answer>"):
        assert tag_count_reward(messages(whole.replace(part, ""))) == [0.75]
    rest = messages(whole.removeprefix("<think>\n"))
    assert tag_count_reward(rest) == [0.75]
    assert tag_count_reward(rest, prompt_texts=["<|assistant|><think>\n"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step 1: a\nStep 2: b\nStep 3: c", 1.0),
        ("First, a. Second, b. Next, c. Finally, d.", 1.0),
        ("Step 1: only this", 1 / 3),
        ("First, a.\nFinally, b.", 2 / 3),
        ("just text, 1. and 2.", 0.0),
        ("- a\n- b\n* c", 2 / 3),
        ("1. a\n2. b\n3. c", 1.0),  # open-r1 counts one
        ("it is\n1.5 m\n2.5 m\n3.5 m", 0.0),
    ],
)
def test_reasoning_steps(text, expected):
    assert reasoning_steps_reward(messages(text), solution=["1"]) == [expected]


RIGHT, WRONG, GOLD = r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}", r"\frac{63}{400}"


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        (RIGHT, 22, 0.943),
        (RIGHT, 80, 0.547),
        (WRONG, 22, -0.942),
        (WRONG, 80, -0.547),
        (RIGHT, 100, 0.5),
        (RIGHT, 200, 0.5),  # open-r1's wraps: 1.0
        (WRONG, 200, -0.5),
    ],
)
def test_cosine(text, length, expected):
    reward = get_cosine_scaled_reward(-1.0, -0.5, 0.5, 1.0, max_len=100)
    assert reward(messages(text.ljust(length)), [GOLD]) == pytest.approx([expected], abs=0.001)
    reward = get_cosine_scaled_reward(max_len=100, tokens=True)  # the defaults are the same
    ids = [[0] * length]
    assert reward(messages(text), solution=[GOLD], completion_ids=ids) == pytest.approx([expected], abs=0.001)


def test_cosine_edges():
    assert get_cosine_scaled_reward()(messages("whatever"), ["words only"]) == [None]
    with pytest.raises(ValueError, match="completion_ids"):
        get_cosine_scaled_reward(tokens=True)(messages(RIGHT), [GOLD])
    with pytest.raises(ValueError, match="cosine_max_len must be at least 1, got 0"):
        get_cosine_scaled_reward(max_len=0)


def test_length():
    def of(*texts, gold=GOLD, **columns):
        return len_reward(messages(*texts), [gold] * len(texts), **columns)

    assert of(RIGHT, RIGHT) == [0.0, 0.0]
    assert of(RIGHT, RIGHT + "x" * 10, RIGHT + "x" * 20) == [0.5, 0.0, -0.5]
    assert of(WRONG, WRONG + "x" * 10, WRONG + "x" * 20) == [0.0, 0.0, -0.5]
    assert of(RIGHT, WRONG, RIGHT + "x" * 10, WRONG + "x" * 10) == [0.5, 0.0, -0.5, -0.5]
    assert of("short", "a longer one", gold="words only") == [None, None]
    # only the completions of one prompt are compared; open-r1 compares whatever is in the batch
    assert of(RIGHT, RIGHT + "x" * 99, RIGHT + "x", RIGHT + "xx", group_ids=[3, 5, 3, 5]) == [0.5, -0.5, -0.5, 0.5]
    assert len_reward.batch


def test_soft_overlong():
    reward = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 80, 81, 90, 100, 101, 1000]
    assert reward(completion_ids=[[1] * n for n in lengths]) == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    assert get_soft_overlong_punishment(5, 0)(completion_ids=[[1] * 5, [1] * 6]) == [0.0, -1.0]
    with pytest.raises(ValueError, match="soft_punish_cache 20"):
        get_soft_overlong_punishment(10, 20)


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
    with pytest.raises(ValueError, match="must be at most 0"):
        get_repetition_penalty_reward(2, penalty)


# ------------------------------------------------------------------------------------------------ for any text


EVERY = SimpleNamespace(
    reward_funcs=list(REWARD_FUNCS_REGISTRY), cosine_min_value_wrong=-1.0, cosine_max_value_wrong=-0.5,
    cosine_min_value_correct=0.5, cosine_max_value_correct=1.0, cosine_max_len=1000, repetition_n_grams=3,
    repetition_max_penalty=-1.0, code_language="cpp", max_completion_len=40, soft_punish_cache=20,
)  # fmt: skip
RANGES = [(0, 1), (0, 1), (0, 1), (-1, 1), (-1, 0), (0, 1), (0, 1), (-0.5, 0.5), (-1, 0)]
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\n", "1. ", r"\boxed{", "}", "$", "63", "is "]
TEXTS = st.lists(
    st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, gold=st.sampled_from(["63", r"\frac{1}{2}", "words"]), data=st.data())
def test_range_and_order(texts, gold, data):
    order = data.draw(st.permutations(range(len(texts))))

    def call(function, texts):
        ids = [[0] * len(text) for text in texts]
        return function(completions=messages(*texts), solution=[gold] * len(texts), completion_ids=ids)

    for function, (low, high) in zip(get_reward_funcs(EVERY), RANGES, strict=True):
        rewards = call(function, texts)
        assert len(rewards) == len(texts) and all(r is None or low <= r <= high for r in rewards), function
        assert call(function, [texts[i] for i in order]) == [rewards[i] for i in order], function


def call_with(task):
    function, text = task
    return function(completions=messages(text), solution=["63"], completion_ids=[[0]], group_ids=[0])


@pytest.mark.slow
def test_a_megabyte_of_anything_is_scored_in_time():
    """This finds quadratic regular expressions, which would take hours for a million characters."""
    atoms = [
        "a", " ", "\n", "\U0001d518", "{", "$", "\\", "1", "1 ", "(", "<think>", "</think><answer>", "</answer>", "1.",
        "<answer>1</answer>", r"\boxed{", r"\boxed{1}, ", r"\boxed{1}" + " " * 1000, "answer is ", "#### ", "\nStep 1",
    ]  # fmt: skip
    texts = [atom * (10**6 // len(atom)) for atom in atoms]
    marked = [f"<answer>{text}</answer>" for text in texts] + [f"the answer is {text}" for text in texts]
    tasks = [(function, text) for function in get_reward_funcs(EVERY) for text in texts]
    tasks += [(accuracy_reward, text) for text in marked]
    with WorkerPool(2, timeout=30.0) as pool:
        results = pool.map(call_with, tasks)
    failed = [(task[1][:40], result) for task, result in zip(tasks, results, strict=True) if type(result) is Unscored]
    assert not failed


# ------------------------------------------------------------------------------------------------ by name


def test_names_are_those_that_open_r1_logs_and_all_of_them_pickle():
    functions = get_reward_funcs(EVERY)
    names = [
        "accuracy_reward", "format_reward", "reasoning_steps_reward", "cosine_scaled_reward",
        "repetition_penalty_reward", "tag_count_reward", "code_format_reward", "len_reward",
        "soft_overlong_punishment_reward",
    ]  # fmt: skip
    assert [reward_name(function) for function in functions] == [function.__name__ for function in functions] == names
    for function in functions:
        copy = pickle.loads(pickle.dumps(function))
        assert copy.__name__ == function.__name__
        assert call_with((copy, RIGHT)) == call_with((function, RIGHT))


def test_options_reach_their_reward():
    changed = SimpleNamespace(
        reward_funcs=["cosine", "repetition_penalty", "soft_overlong_punishment", "tests.rewards_for_tests:digits"],
        cosine_min_value_wrong=-9.0, cosine_max_value_wrong=-5.0, cosine_min_value_correct=3.0,
        cosine_max_value_correct=7.0, cosine_max_len=2, cosine_in_tokens=True, repetition_n_grams=1,
        repetition_max_penalty=-4.0, max_completion_len=6, soft_punish_cache=4,
    )  # fmt: skip
    cosine, repetition, overlong, own = get_reward_funcs(changed)
    ids = [[], [0], [0, 0]]
    assert cosine(messages(*[RIGHT] * 3), [GOLD] * 3, completion_ids=ids) == pytest.approx([7.0, 5.0, 3.0])
    assert cosine(messages(*[WRONG] * 3), [GOLD] * 3, completion_ids=ids) == pytest.approx([-9.0, -7.0, -5.0])
    assert repetition(messages("a a a a")) == [-3.0]
    assert overlong(completion_ids=[[0] * 3]) == [-0.25]
    assert own(messages("a1")) == [0.5]


def test_only_the_attributes_of_the_rewards_asked_for_are_read():
    (function,) = get_reward_funcs(SimpleNamespace(reward_funcs=["accuracy"]))
    assert function is accuracy_reward


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acuracy"], "unknown reward 'acuracy': did you mean 'accuracy'.*format, .*repetition_penalty"),
        (["no_module_of_this_name:f"], "cannot import"),
        (["tests.rewards_for_tests:no_function"], "no_function"),
        (["math:pi"], "not a function"),
        (["format", "format"], "both named 'format_reward'"),
        (["code"], "'code' is not supported.*sandboxes"),
        (["binary_code"], "'binary_code' is not supported"),
        (["ioi_code"], "'ioi_code' is not supported"),
        (["cf_code"], "'cf_code' is not supported"),
        (["accuracy", "code"], "'code' is not supported"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        get_reward_funcs(SimpleNamespace(reward_funcs=names))
