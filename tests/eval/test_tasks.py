"""The documented tasks: their documented values, their prompts, and the names that find them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval import tasks
from eval.metrics import expr_gold_metric, gpqa_metric, latex_gold_metric
from eval.tasks import aime_prompt_fn, find_tasks, gpqa_prompt_fn, prompt_fn

ROOT = Path(__file__).parents[2]


def test_the_table():
    assert [task["name"] for task in tasks.TASKS_TABLE] == ["aime24", "aime25:part1", "math_500", "gpqa:diamond"]
    expected = {
        "aime24": ("HuggingFaceH4/aime_2024", "default", "train", aime_prompt_fn, expr_gold_metric),
        "aime25:part1": ("open-r1/aime_2025_1", "default", "train", aime_prompt_fn, expr_gold_metric),
        "math_500": ("HuggingFaceH4/MATH-500", "default", "test", prompt_fn, latex_gold_metric),
        "gpqa:diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train", gpqa_prompt_fn, gpqa_metric),
    }
    for task in tasks.TASKS_TABLE:
        repo, subset, split, function, metric = expected[task["name"]]
        assert (task["hf_repo"], task["hf_subset"], task["prompt_function"]) == (repo, subset, function)
        assert task["hf_avail_splits"] == task["evaluation_splits"] == [split] and task["suite"] == ["custom"]
        assert task["metric"] == [metric] and task["generation_size"] == 32768 and task["version"] == 1
        assert task["few_shots_split"] is None and task["few_shots_select"] is None
    assert tasks.gpqa_diamond["stop_sequence"] == [] and tasks.gpqa_diamond["trust_dataset"] is True
    assert not tasks.aime24["trust_dataset"]


def test_the_command_prints_names_and_number():
    done = subprocess.run([sys.executable, "-m", "eval.tasks"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['aime24', 'aime25:part1', 'math_500', 'gpqa:diamond']\n4\n"


def test_metrics_as_documented():
    assert latex_gold_metric.precision == expr_gold_metric.precision == gpqa_metric.precision == 5
    assert latex_gold_metric.aggregation_function is max and latex_gold_metric.fallback_mode == "first_match"
    expr, latex = expr_gold_metric.pred_extraction_target
    assert latex.boxed_match_priority == 0 and expr == expr_gold_metric.gold_extraction_target[0]
    assert latex_gold_metric.gold_extraction_target[0].boxed_match_priority == 55


def test_prompts():
    doc = prompt_fn({"problem": "P?", "solution": "so 1", "answer": "1"}, "math_500")
    assert (doc.query, doc.choices, doc.gold_index, doc.task_name) == ("P?", ["so 1"], 0, "math_500")
    assert aime_prompt_fn({"problem": "P?", "answer": 70}).get_golds() == ["70"]
    doc = tasks.gsm8k.prompt_function({"question": "Q?", "answer": "1+1=2\n#### 1,200"})
    assert (doc.query, doc.get_golds()) == ("Q?", ["1,200"])


def gpqa_row(i: int) -> dict:
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    return {"Question": f"Which particle is number {i}?", "Correct Answer": "right"} | wrong


def test_gpqa_puts_the_right_answer_where_the_row_says():
    docs = [gpqa_prompt_fn(gpqa_row(i), "gpqa:diamond") for i in range(200)]
    assert docs == [gpqa_prompt_fn(gpqa_row(i), "gpqa:diamond") for i in range(200)]
    counts = [sum(doc.gold_index == place for doc in docs) for place in range(4)]
    assert min(counts) > 25  # all four positions occur
    for doc in docs:
        [letter] = doc.get_golds()
        assert f"\n{letter}) right" in doc.query and doc.query == doc.instruction and doc.choices == list("ABCD")
    assert docs[0].query.startswith(
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
        "\n\nWhich particle is number 0?\n\nA) "
    )
    assert gpqa_metric.compute(docs[0], [f"thus\nAnswer: {docs[0].get_golds()[0]}"]) == 1.0


def test_names():
    names = [task.name for task in find_tasks("custom|math_500|0|0, aime25_part1,gpqa,aime25:part1,lighteval|gsm8k|0")]
    assert names == ["math_500", "aime25:part1", "gpqa:diamond", "gsm8k"]
    assert find_tasks("all") == tasks.TASKS_TABLE
    for bad, says in (("math", "did you mean math_500"), ("custom|aime24|3|0", "write 0"), ("", "no task is named")):
        with pytest.raises(ValueError, match=says):
            find_tasks(bad)


@pytest.mark.parametrize("splits", [[], ["validation", "test"]])
def test_a_task_is_of_one_split(splits):
    """A second split would be ignored."""
    with pytest.raises(ValueError, match="'math_500' cannot be run: evaluation_splits must name one split"):
        tasks.check_task(replace(tasks.math_500, evaluation_splits=splits))
