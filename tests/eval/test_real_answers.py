"""Real gold answers compared with themselves in three notations and with five wrong answers, file by file.

pytest tests/eval/test_real_answers.py --log-cli-level=INFO     (prints the counts)
"""

import logging
import re

import pytest

from eval.bench import judge, near_misses, notations, read_golds
from eval.verify import check_answer
from eval.workers import WorkerPool


def check(pairs):
    assert sum(is_right for _, _, is_right in pairs) * 8 == len(pairs) * 3
    with WorkerPool(2, timeout=30.0) as pool:
        figures, wrong = judge("ours", pairs, pool)
    logging.getLogger(__name__).info("pairs, right, false +, false -, unscored, pairs/s: %s", figures)
    assert (figures[:-1], wrong) == ([len(pairs), len(pairs), 0, 0, 0], [])


@pytest.mark.parametrize("name", ["math_500.jsonl", "gsm8k_test.jsonl"])
def test_fifty_golds(shared, name):
    check(read_golds(shared / "data" / name)[: 50 * 8])


@pytest.mark.slow
def test_ten_thousand_checks(shared):
    pairs = [pair for name in ("math_500.jsonl", "gsm8k_test.jsonl") for pair in read_golds(shared / "data" / name)]
    check(pairs[:10_000])


def test_equations_of_worked_solutions(shared):
    """Operations that people wrote, such as `48/2=24`, with an x for times and commas in thousands."""
    text = (shared / "data" / "gsm8k_train.jsonl").read_text()
    pairs = []
    for left, right in re.findall(r"<<([-+*/().\d]+)=(\d+)>>", text)[::100]:
        left, result = (
            re.sub(r"(?<![\d.])\d{4,9}(?![\d.])", lambda found: f"{int(found[0]):,}", t) for t in (left, right)
        )
        spaced = re.sub(r"([-+*/])", r" \1 ", left).replace("*", "x")
        pairs += [(right, f"{spaced} = {result}", True), (str(int(right) + 1), f"{spaced} = {result}", False)]
    assert len(pairs) > 300
    wrong = [pair for pair in pairs if check_answer(*pair[:2]) != pair[2]]
    assert wrong == []


def test_what_is_checked():
    assert notations("1,234") == [
        r"So we get $\boxed{1,234}$.",
        "<answer>1234</answer>",
        "The final answer is $1,234$.",
    ]
    assert notations(r"\frac12")[1] == r"<answer>\dfrac12</answer>"
    assert near_misses(r"\frac{1}{2}", []) == [
        r"\frac{1}{3}",
        r"\frac{1}{12}",
        r"\frac{2}{2}",
        r"\frac{11}{2}",
        r"\frac{1}{2} + 1",
    ]
    assert near_misses("5", ["x=5", "5", "9", "9", "7"]) == ["6", "15", "5 + 1", "9", "7"]
