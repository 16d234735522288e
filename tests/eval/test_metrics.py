"""Verdicts compared with LightEval 0.13.0's, on MATH-500's solutions, and on malicious input."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval import metrics
from eval.metrics import IndicesExtractionConfig, judge, multilingual_extractive_match_metric, without_thoughts
from eval.report import interval, majority, pass_at_k, summarise
from eval.tasks import Doc
from eval.workers import Unscored, WorkerPool
from tests.eval.parity_pairs import constructed, from_data

BY_NAME = {"latex": metrics.latex_gold_metric, "expr": metrics.expr_gold_metric, "gpqa": metrics.gpqa_metric}
VERDICTS = json.loads((Path(__file__).parent / "lighteval_verdicts.json").read_text())
# (gold, an answer that only we accept): LightEval uses latex2sympy2 1.0.6 and its own comparison
OURS_IS_RIGHT = [
    (r"2\sqrt{3}", "3.46410"),  # equal to the 5 decimals that `precision` asks for; it rounds only against a number
    (r"\sqrt{51}", "7.14143"),
    (r"\pm 2", "2, -2"),  # both values, as a list or a set
    (r"\pm 2", r"2,-2\}"),
    ("40%", "40 percent"),  # written out inside a box
]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, timeout=20) as pool:
        yield pool


def verdicts(pool, quadruples) -> list:
    items = [(BY_NAME[m], Doc(query="", choices=c, gold_index=c.index(g)), text) for m, g, c, text in quadruples]
    return pool.map(judge, items)


def differences(pool, quadruples, theirs: str) -> list:
    assert len(quadruples) == len(theirs)
    ours = verdicts(pool, quadruples)
    assert not [verdict for verdict in ours if isinstance(verdict, Unscored)]
    return [
        (gold, text, ours["score"])
        for (_, gold, _, text), ours, his in zip(quadruples, ours, theirs, strict=True)
        if ours["score"] != float(his)
    ]


def test_constructed_pairs_as_lighteval(pool):
    quadruples = constructed()
    assert len(quadruples) >= 400 and 0.3 < VERDICTS["constructed"].count("1") / len(quadruples) < 0.7
    for gold, text, score in differences(pool, quadruples, VERDICTS["constructed"]):
        known = [answer for ours, answer in OURS_IS_RIGHT if f"{{{ours}}}" in gold or ours == gold]
        assert score == 1.0 and any(answer in text for answer in known), (gold, text, score)


def test_math_500_and_aime_as_lighteval(pool, shared):
    quadruples = from_data(shared / "data")
    assert len(quadruples) == 2120 and differences(pool, quadruples, VERDICTS["from_data"]) == []


def test_every_solution_of_math_500_is_right(pool, shared):
    rows = [json.loads(line) for line in (shared / "data" / "math_500.jsonl").read_text().splitlines()]
    scores = verdicts(pool, [("latex", row["solution"], [row["solution"]], row["solution"]) for row in rows])
    misses = [row["answer"] for row, verdict in zip(rows, scores, strict=True) if verdict["score"] != 1.0]
    print(f"\nMATH-500 solutions against themselves: {len(rows) - len(misses)} of {len(rows)}; misses {misses}")
    assert misses == []


HOSTILE = [
    r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    r"\boxed{9^{9^{9^{9}}}}",
    "The answer is 9^9^9^9 + 1 ",
    r"\boxed{" + "1+" * 50_000 + "1}",
    "$" * 100_000,
    r"\boxed{" * 14_000,
    "9" * 100_000,
    "answer " * 14_000,
    r"\frac{" * 10_000,
    r"\boxed{10000000!}",
]


def hostile_among(fair: list[tuple[Doc, str]], copies: int) -> tuple[list, list]:
    """The verdicts of `fair`, and of `copies` of the malicious answers that are mixed in."""
    items = [(metrics.latex_gold_metric, *pair) for pair in fair]
    doc, start, step = Doc(query="", choices=[r"so it is $\boxed{5}$"]), time.monotonic(), len(fair) // copies
    for i in range(copies):
        items[(step + 10) * i : (step + 10) * i] = [(metrics.latex_gold_metric, doc, text) for text in HOSTILE]
    with WorkerPool(2, timeout=3) as pool:
        found = pool.map(judge, items)
    hostile = [verdict for (_, _, text), verdict in zip(items, found, strict=True) if text in HOSTILE]
    given_up = Counter(verdict.reason for verdict in found if isinstance(verdict, Unscored))
    seconds = time.monotonic() - start
    print(f"\n{len(items)} answers, {len(hostile)} hostile, in {seconds:.0f} s: given up {dict(given_up)}")
    return [verdict for (_, _, text), verdict in zip(items, found, strict=True) if text not in HOSTILE], hostile


@pytest.mark.slow
def test_hostile_answers_cost_themselves_alone():
    doc = Doc(query="", choices=[r"so it is $\boxed{5}$"])
    fair, hostile = hostile_among([(doc, text) for text in [r"\boxed{5}", "5", r"it is \boxed{6}"] * 100], 1)
    assert [verdict["score"] for verdict in fair] == [1.0, 1.0, 0.0] * 100
    assert all(isinstance(verdict, Unscored) or verdict["score"] == 0.0 for verdict in hostile)


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("3t", "3", 0.0),
        ("3t", "3t", 1.0),
        ("6s", "6", 0.0),
        (r"2\pi h", r"2\pi", 0.0),
        ("9-2h", "7", 0.0),
        ("9-2h", "-2h+9", 1.0),
        ("4ab", "4ba", 1.0),
        ("4ab", "4", 0.0),
        ("a + b + c", "a+b+c", 1.0),
        ("y=3t", "y=3", 0.0),
        (r"12\text{ ft}", "12", 1.0),
        (r"\text{even}", "Even", 1.0),
        (r"\text{Yes}", "yes", 1.0),
        ("x", "X", 0.0),
    ],
)
def test_letters_are_no_units(gold, answer, score):
    doc = Doc(query="", choices=[rf"so it is $\boxed{{{gold}}}$."])
    assert judge((metrics.latex_gold_metric, doc, rf"\boxed{{{answer}}}"))["score"] == score


@pytest.mark.slow
def test_five_thousand_answers_with_a_hundred_hostile_ones(shared):
    rows = [json.loads(line) for line in (shared / "data" / "math_500.jsonl").read_text().splitlines()][:490]
    docs = [Doc(query="", choices=[row["solution"]]) for row in rows]
    fair, hostile = hostile_among([(doc, doc.choices[0]) for doc in docs] * 10, 10)
    assert len(fair) + len(hostile) == 5000 and all(verdict["score"] == 1.0 for verdict in fair)
    assert all(isinstance(verdict, Unscored) or verdict["score"] == 0.0 for verdict in hostile)


def test_compute_aggregates_over_texts():
    doc = Doc(query="", choices=["5"])
    assert metrics.expr_gold_metric.compute(doc, ["6", "the answer is 5"]) == 1.0  # max
    mean = multilingual_extractive_match_metric(aggregation_function=lambda scores: sum(scores) / len(scores))
    assert mean.compute(doc, ["6", "5", "7", "5.0"]) == 0.5
    assert isinstance(mean.compute(doc, ["5"]), float)
    numbers = (IndicesExtractionConfig("Numbers"),)
    third = multilingual_extractive_match_metric(gold_extraction_target=numbers, pred_extraction_target=numbers)
    assert third.compute(Doc(query="", choices=["1", "2", "3"], gold_index=2), ["Answer: 3"]) == 1.0
    with pytest.raises(ValueError, match="Language.ENGLISH"):
        multilingual_extractive_match_metric(language="french")


def test_thoughts_are_not_answers():
    assert without_thoughts("<think>a</think>b<think>c</think>d") == "bd"
    assert without_thoughts("<think>a") == "<think>a" and without_thoughts("a</think>b") == "a</think>b"


def rows(*problems: list[tuple[str, float]]) -> list[dict]:
    return [
        {"problem": p, "extracted": said, "score": score, "length": 10 * (p + 1), "finish_reason": "stop"}
        for p, samples in enumerate(problems)
        for said, score in samples
    ]


def test_figures_by_hand():
    found = rows([("5", 1.0), ("5", 1.0), ("6", 0.0), ("", 0.0)], [("1", 0.0), ("2", 1.0), ("1", 0.0), ("3", None)])
    found[-1]["finish_reason"] = "length"
    result = summarise(found)
    assert result["pass@1"] == (0.5 + 0.25) / 2
    assert result["pass@2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2) and result["pass@4"] == 1.0
    assert result["maj@4"] == 0.5 and result["mean_length"] == 15
    assert (result["unparsed"], result["unscored"], result["cut_off"]) == (1 / 8, 1 / 8, 1 / 8)
    assert majority(rows([("5", 1.0), ("6", 0.0)])) == 0.5 and majority(rows([("", 0.0)])) == 0.0
    money = [("18", 1.0), ("18.0000", 1.0), ("Eq(x, 18)", 1.0), ("20", 0.0), ("20.00", 0.0), ("Eq(y, 21)", 0.0)]
    assert majority(rows(money)) == 1.0 and majority(rows([*money, ("20", 0.0), ("20.0", 0.0)])) == 0.0
    assert majority(rows([("1/2", 0.0), ("0.5", 0.0), ("7", 1.0), ("1/0", 0.0), ("1/3", 0.0)])) == 0.0
    unknown = rows([("5", 1.0), ("5", 1.0)])
    assert "maj@2" not in summarise([row | {"extracted": None} for row in unknown])
    assert pass_at_k(10, 0, 3) == 0.0 and pass_at_k(10, 8, 3) == 1.0


def test_intervals():
    mean, error, low, high = interval([1.0] * 30 + [0.0] * 70)
    assert (low, high) == (pytest.approx(31 / 102 - 1.984 * 0.0457, abs=1e-3), pytest.approx(0.394, abs=1e-3))
    assert 0.08 < interval([0.0] * 30)[3] < interval([0.0] * 29 + [1 / 64])[3] < 0.12  # the interval is not empty
    assert interval([0.3] * 50 + [0.31] * 50)[1] < error / 20  # with equal problems, samples tell more


@pytest.mark.parametrize(
    "problems, samples, a, b", [(30, 64, 0.05, 2), (30, 16, 5, 0.2), (30, 16, 0.05, 0.5), (30, 4, 1, 1), (200, 1, 1, 3)]
)
def test_intervals_hold_the_truth(problems, samples, a, b):
    """For problems with difficulties from Beta(a, b), 95 % of the intervals contain its mean, tested with 1,000."""
    dice, held = np.random.default_rng(0), 0
    for _ in range(1000):
        means = dice.binomial(samples, dice.beta(a, b, problems)) / samples
        _, _, low, high = interval(means.tolist())
        held += low <= a / (a + b) <= high
    assert held >= 930, held
