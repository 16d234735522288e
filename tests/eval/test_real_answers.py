"""Real gold answers against themselves in three notations and five near-misses: the verdicts, file by file.

pytest tests/eval/test_real_answers.py --log-cli-level=INFO     (prints the table)
"""

import logging

import pytest

from eval.bench import judge, near_misses, notations, table
from eval.workers import WorkerPool

# Units are not compared, as in open-r1, so the near-miss that changes a unit's exponent is taken.
KNOWN = {r"\boxed{864 \mbox{ inches}^3}", r"\boxed{15\mbox{ cm}^3}"}


def check(path, rows):
    with WorkerPool(2, timeout=30.0) as pool:
        report = judge(path, pool, rows)
    logging.getLogger(__name__).info("\n%s", table([report]))
    assert report.right == report.right_accepted == 3 * report.golds
    assert report.wrong == 5 * report.golds and report.unscored == 0
    taken = {text for _, text, _ in report.misjudged}
    assert all(any(known in text for known in KNOWN) for text in taken), taken - KNOWN
    return report


@pytest.mark.parametrize("name", ["math_500.jsonl", "gsm8k_test.jsonl"])
def test_fifty_golds(shared, name):
    assert check(shared / "data" / name, 50).golds == 50


@pytest.mark.slow
def test_ten_thousand_checks(shared):
    reports = [
        check(shared / "data" / name, rows) for name, rows in (("math_500.jsonl", None), ("gsm8k_test.jsonl", 750))
    ]
    assert sum(r.right + r.wrong for r in reports) == 10_000
    assert sum(r.wrong_accepted for r in reports) == len(KNOWN)


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
