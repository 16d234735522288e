"""The warm start's data: demonstrations get GRPO's full rewards, and contain no held-out problem."""

import importlib.util
import json
from pathlib import Path

import pytest

from grpo_core.config import SYSTEM_PROMPT
from grpo_core.rewards import accuracy_reward, format_reward, tag_count_reward
from tests.eval import helpers

SCRIPT = Path(__file__).parents[1] / "recipes" / "SmolLM2-135M-Instruct" / "prepare.py"
GSM8K = [
    {
        "question": "Ann has 48 pens and buys half as many. How many now?",
        "answer": "She buys 48/2 = <<48/2=24>>24 pens.\nThat makes 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": " A car costs $1,200 and a van 4 < 5 times that. Both? ", "answer": "Both: $7,200.\n#### 7,200"},
    {"question": "What is half of 5?", "answer": "5 / 2 = <<5/2=2.5>>2.5\n#### 2.5"},
    {"question": "Who owes 3 dollars more than 1?", "answer": "1 - 3 = -2\n#### -2"},
]
ARITHMETIC = [
    {"problem": "Ben has 7 pens and finds 2. How many now?", "answer": "9", "source": "x"},
    {"problem": "Ben has 2 pens and finds 2. How many now?", "answer": "4", "source": "x"},  # 2 + 2 or 2 x 2
    {"problem": "Seven apples and two. How many?", "answer": "9", "source": "x"},
    {"problem": "1,000 seats in 8 rows. How many a row?", "answer": "125", "source": "x"},
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, rows):
    return str(helpers.write(path, rows))


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def check_pay(folder):
    """Check that every demonstration gets the full rewards; return the numbers of demonstrations and of problems."""
    count = everything = 0
    for split in ("train", "heldout"):
        shown, asked = read(folder, f"sft_{split}"), read(folder, f"grpo_{split}")
        pairs = {(row["problem"], row["solution"]) for row in asked}
        assert len({problem for problem, _ in pairs}) == len(asked)
        assert all([m["role"] for m in row["messages"]] == ["system", "user", "assistant"] for row in shown)
        assert all(row["messages"][0]["content"] == SYSTEM_PROMPT for row in shown)
        completions = [row["messages"][2:] for row in shown]
        golds = [row["messages"][2]["content"].split("\n")[-2] for row in shown]
        assert {(row["messages"][1]["content"], gold) for row, gold in zip(shown, golds, strict=True)} <= pairs
        ones = [1.0] * len(shown)
        assert (
            accuracy_reward(completions, golds) == format_reward(completions) == tag_count_reward(completions) == ones
        )
        assert not any("<<" in completion[0]["content"] for completion in completions)
        count += len(shown)
        everything += len(asked)
    assert not {row["problem"] for row in read(folder, "grpo_train")} & {row["problem"] for row in asked}
    return count, everything


def test_rows_earn_what_the_rewards_pay(script, tmp_path):
    names = [write(tmp_path / "gsm8k.jsonl", GSM8K), write(tmp_path / "arithmetic.jsonl", ARITHMETIC)]
    counts = script.prepare(names, tmp_path / "out")
    assert check_pay(tmp_path / "out") == (6, 8) and counts["left out"] == 0
    rows = read(tmp_path / "out", "sft_train") + read(tmp_path / "out", "sft_heldout")
    shown = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows}
    assert shown[GSM8K[0]["question"]] == (
        "<think>\nShe buys 48/2 = 24 pens.\nThat makes 48+24 = 72.\n</think>\n<answer>\n72\n</answer>"
    )
    thoughts = [shown.get(row["problem"], "\nNone").split("\n")[1] for row in ARITHMETIC]
    assert thoughts == ["7 + 2 = 9", "None", "None", "1,000 / 8 = 125"]


@pytest.mark.slow
def test_all_rows_of_the_real_sets(script, shared, tmp_path):
    names = [str(shared / "data" / f"{name}.jsonl") for name in ("gsm8k_train", "arith_word_problems")]
    script.prepare(names, tmp_path / "out")
    shown, everything = check_pay(tmp_path / "out")
    assert everything == 7473 + 3868 and shown == everything - 2256  # no working is known, and none made up
    assert 0.04 < len(read(tmp_path / "out", "grpo_heldout")) / everything < 0.06


def test_short_demonstrations_are_the_working_with_a_boxed_end(script, tmp_path):
    rows = [*ARITHMETIC, ARITHMETIC[0] | {"answer": "10"}, {"problem": "8 rows of 7 seats. How many?", "answer": "56"}]
    names = [write(tmp_path / "gsm8k.jsonl", GSM8K), write(tmp_path / "arithmetic.jsonl", rows)]
    counts = script.prepare(names, tmp_path / "out", short=True, held_out=0.5)
    shown = read(tmp_path / "out", "sft_train") + read(tmp_path / "out", "sft_heldout")
    asked = read(tmp_path / "out", "grpo_train") + read(tmp_path / "out", "grpo_heldout")
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in shown}
    assert len(asked) == 9 and counts["left out"] == 1 and len(answers) == len(shown) == 7
    assert answers[ARITHMETIC[3]["problem"]] == "1,000 / 8 = \\boxed{125}"
    assert answers[rows[-1]["problem"]] == "8 x 7 = \\boxed{56}"
    assert answers[GSM8K[0]["question"]] == "She buys 48/2 = 24 pens.\nThat makes 48+24 = 72.\n\\boxed{72}"
    golds = {row["problem"]: row["solution"] for row in asked}
    completions = [[{"role": "assistant", "content": text}] for text in answers.values()]
    assert set(accuracy_reward(completions, [golds[problem] for problem in answers])) == {1.0}
    assert len(read(tmp_path / "out", "grpo_heldout")) > 1


def test_a_problem_stays_on_its_side_whatever_else_there_is(script, tmp_path):
    rows = [{"problem": f"Ben has {i} pens and finds 3.", "answer": str(i + 3)} for i in range(100)]
    script.prepare([write(tmp_path / "all.jsonl", rows)], tmp_path / "all")
    script.prepare([write(tmp_path / "part.jsonl", rows[:49:-1])], tmp_path / "part")
    whole, part = ({row["problem"] for row in read(tmp_path / name, "grpo_heldout")} for name in ("all", "part"))
    assert part and part == whole & {row["problem"] for row in rows[50:]}


def test_fewer_demonstrations_are_chosen_by_hash_and_no_problem_is_lost(script, tmp_path):
    rows = [{"problem": f"Ben has {i} pens and finds 3.", "answer": str(i + 3)} for i in range(40)]
    script.prepare([write(tmp_path / "all.jsonl", rows)], tmp_path / "all", short=True)
    script.prepare([write(tmp_path / "same.jsonl", rows[::-1])], tmp_path / "few", short=True, demonstrations=5)
    script.prepare([write(tmp_path / "same.jsonl", rows)], tmp_path / "more", short=True, demonstrations=9)
    whole, few, more = (read(tmp_path / name, "sft_train") for name in ("all", "few", "more"))
    assert len(few) == 5 and len(more) == 9 and few == more[:5] and all(row in whole for row in more)
    assert len(read(tmp_path / "few", "grpo_train")) == len(read(tmp_path / "all", "grpo_train")) > 30


def test_what_the_rewards_would_not_pay_is_left_out(script, tmp_path):
    rows = [*GSM8K, {"question": "Which tag?", "answer": "It is <answer>.\n#### 3"}]
    rows += [{"question": "Where?", "answer": "In Paris.\n#### Paris"}]
    counts = script.prepare([write(tmp_path / "rows.jsonl", rows)], tmp_path / "out")
    assert counts["left out"] == 2 and check_pay(tmp_path / "out") == (4, 4)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"question": "What?", "answer": "No mark, 3"},
            "must end in a line `#### N`, but this one does not: 'No mark, 3'",
        ),
        ({"text": "What?"}, "this one has text"),
        (None, "there is no data file at"),
    ],
)
def test_bad_input_is_one_sentence(script, row, sentence, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "rows.jsonl", [row]) if row else str(tmp_path / "none.jsonl")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--dataset_name", file, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        script.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ") and sentence in error
