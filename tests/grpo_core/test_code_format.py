"""The rewards that open-r1 has in addition to those of February 2025: the format of code, and repetition in Chinese."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from grpo_core.rewards import get_code_format_reward, get_repetition_penalty_reward
from tests.grpo_core.test_rewards import messages

CHINESE = ("今天天气很好", "今天 今天 今天 今天", "我们 我们 去 去 我们 我们", "", "好", "abc abc abc abc")


def test_repetition_of_chinese_words(monkeypatch):
    """Repetition is computed over the splitter's words; the expected values are open-r1's for the same splitter."""
    jieba = ModuleType("jieba")
    jieba.__spec__, jieba.cut = ModuleSpec("jieba", None), lambda text: iter(list(text.replace(" ", "")))
    monkeypatch.setitem(sys.modules, "jieba", jieba)
    reward = get_repetition_penalty_reward(2, -1.0, language="zh")
    expected = [0.0, -0.7142857142857143, -0.4444444444444444, 0.0, 0.0, -0.7272727272727273]
    assert reward(messages(*CHINESE)) == pytest.approx(expected)
    assert reward(messages("Aa aa")) != get_repetition_penalty_reward(2, -1.0)(messages("Aa aa"))
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="run `pip install jieba`"):
        get_repetition_penalty_reward(2, -1.0, language="zh")
    with pytest.raises(ValueError, match="repetition_penalty must be en or zh, got 'fr'"):
        get_repetition_penalty_reward(2, -1.0, language="fr")


def in_form(answer, thought="t"):
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


CODE = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "language", "expected", "theirs"),
    [
        (in_form(CODE), "python", 1.0, 1.0),
        (in_form(f"First this:\n{CODE}\nthen this:\n{CODE}\nDone."), "python", 1.0, 1.0),
        (in_form("``` python\nx\n```"), "python", 0.0, 0.0),
        (in_form("```cpp\nint x;\n```"), "cpp", 1.0, 1.0),
        (in_form("```cpp\nint x;\n```"), "python", 0.0, 0.0),
        (in_form("print(1)"), "python", 0.0, 0.0),
        (in_form("```python\nprint(1)"), "python", 0.0, 0.0),
        (in_form("no", thought=CODE), "python", 0.0, 0.0),
        (f"<think>t</think><answer>{CODE}</answer>", "python", 0.0, 0.0),
        (CODE, "python", 0.0, 0.0),
        ("", "python", 0.0, 0.0),
        # fixed here
        (in_form(CODE) + "\njunk", "python", 0.0, 1.0),
        (in_form(CODE) + "\n" + in_form("no"), "python", 0.0, 1.0),
        (in_form("```javascript\nx\n```"), "java", 0.0, 1.0),
    ],
)
def test_code_format(text, language, expected, theirs):
    """`theirs`: the value of open-r1's function."""
    assert get_code_format_reward(language)(messages(text)) == [expected]
    assert get_code_format_reward()(messages(text), language=[language]) == [expected]  # the language of the row
    assert get_code_format_reward(language)(messages(text), language=[None]) == [expected]
    opened = text.removeprefix("<think>\n")
    if expected:
        assert get_code_format_reward(language)(messages(opened), prompt_texts=["<think>\n"]) == [expected] == [theirs]
