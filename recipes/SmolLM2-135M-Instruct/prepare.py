"""Prepares the data of the warm start: maths problems with demonstrations in the format that GRPO's rewards require.

    python recipes/SmolLM2-135M-Instruct/prepare.py                       # GSM8K from the Hub, into data/think
    python recipes/SmolLM2-135M-Instruct/prepare.py --dataset_name gsm8k_train.jsonl problems.jsonl --output_dir D
    python recipes/SmolLM2-135M-Instruct/prepare.py --short --held_out 0.22 --dataset_name problems.jsonl --output_dir D
                                              --demonstrations 400        # fewer demonstrations than can be found

A data set (Hub id or .jsonl) has GSM8K's columns (`question`, and `answer` with worked steps and a last line `#### N`),
or `problem` and `answer`, a bare number. The script writes

    sft_train.jsonl, sft_heldout.jsonl      `messages`: GRPO's system prompt, the problem, <think> and <answer>
    grpo_train.jsonl, grpo_heldout.jsonl    all problems as `problem` and `solution`

With --short there is no system prompt, and a demonstration is the working only, which ends in \\boxed{answer}: cheap
to sample on a CPU. A hash of a problem's text decides whether it is held out, so its split does not depend on the other
data. A problem is left out and counted if it occurred before, if its answer cannot be parsed, or if the rewards
(`accuracy`, without --short also `format`) do not give 1 to its demonstration. GSM8K's calculator marks (`<<48/2=24>>`)
are removed. A bare number has no working. It gets one only if the problem has exactly two numbers and one operation on
them gives the answer. All other such problems are used for GRPO only, because demonstrating an answer without working
would teach guessing.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from eval.verify import check_answer
from grpo_core.config import SYSTEM_PROMPT
from grpo_core.rewards import format_reward
from sft_core.data.rows import load_rows
from sft_core.run import distributed
from sft_core.run.options import require


def read_problem(row: dict[str, Any]) -> tuple[str, str | None, str]:
    """Problem, thought (None: no working is known) and answer of a row of either format.

    Raises:
        ValueError: the row has neither format.
    """
    if {"question", "answer"} <= row.keys():
        steps, mark, answer = str(row["answer"]).rpartition("####")
        if not mark:
            raise ValueError(
                "an `answer` next to a `question` must end in a line `#### N`, but this one does not: "
                f"{str(row['answer'])[-80:]!r}."
            )
        return row["question"].strip(), re.sub(r"<<.*?>>", "", steps).strip(), answer.strip().replace(",", "")
    if {"problem", "answer"} <= row.keys():
        problem, answer = str(row["problem"]).strip(), str(row["answer"]).strip()
        return problem, operation(problem, answer), answer
    raise ValueError(
        f"a row needs `question` and `answer`, or `problem` and `answer`; this one has {', '.join(row)}: rename them."
    )


def operation(problem: str, answer: str) -> str | None:
    """The operation on the only two numbers of `problem` that gives `answer`; None unless there is exactly one.

    >>> operation("Ben has 7 pens and finds 2.", "9")
    '7 + 2 = 9'
    """
    numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", problem)
    if len(numbers) != 2 or not re.fullmatch(r"\d+(?:\.\d+)?", answer):
        return None
    a, b = (float(n.replace(",", "")) for n in numbers)
    x, y = numbers
    results = {f"{x} + {y}": a + b, f"{x} - {y}": a - b, f"{y} - {x}": b - a, f"{x} x {y}": a * b}
    results |= {f"{x} / {y}": a / b if b else -1.0, f"{y} / {x}": b / a if a else -1.0}
    found = [text for text, result in results.items() if abs(result - float(answer)) < 1e-9]
    return f"{found[0]} = {answer}" if len(found) == 1 else None


def demonstration(thought: str, answer: str, short: bool) -> str:
    if short:
        start = thought.removesuffix(answer) if thought.endswith(f"= {answer}") else f"{thought}\n"
        return f"{start}\\boxed{{{answer}}}"
    return f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"


def hash_of(text: str) -> float:
    """Between 0 and 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def is_paid(text: str, answer: str, short: bool) -> bool:
    return (short or format_reward([[{"content": text}]]) == [1.0]) and check_answer(answer, text) == 1.0


def prepare(
    names: list[str], folder: Path, short: bool = False, held_out: float = 0.05, demonstrations: int | None = None
) -> Counter[str]:
    """Write the four files. Returns the number of rows in each. Raises ValueError for bad input, in one sentence."""
    files: dict[str, list[dict[str, Any]]] = {f"{a}_{b}": [] for a in ("sft", "grpo") for b in ("train", "heldout")}
    left_out, seen = 0, set[str]()
    for name in names:
        for row in load_rows(name, "main" if name == "openai/gsm8k" else None):
            problem, thought, answer = read_problem(row)
            text = demonstration(thought or "?", answer, short)
            if problem in seen or not is_paid(text, answer, short):
                left_out += 1
                continue
            seen.add(problem)
            split = "heldout" if hash_of(problem) < held_out else "train"
            turns = [("system", SYSTEM_PROMPT), ("user", problem), ("assistant", text)]
            if thought is not None:
                messages = [{"role": role, "content": content} for role, content in turns[short:]]
                files[f"sft_{split}"].append({"messages": messages})
            files[f"grpo_{split}"].append({"problem": problem, "solution": answer})
    if demonstrations is not None:
        files["sft_train"] = sorted(files["sft_train"], key=lambda row: hash_of(json.dumps(row)))[:demonstrations]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Counter({name: len(rows) for name, rows in files.items()} | {"left out": left_out})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", nargs="+", default=["openai/gsm8k"], help="Hub ids or .jsonl files")
    parser.add_argument("--output_dir", type=lambda text: Path(text).expanduser(), default=Path("data/think"))
    parser.add_argument("--short", action="store_true", help="demonstrations without tags and system prompt")
    parser.add_argument("--held_out", type=float, default=0.05, help="share of the problems")
    parser.add_argument(
        "--demonstrations", type=int, help="how many sft_train.jsonl gets, chosen by hash (default: all)"
    )
    arguments = parser.parse_args()
    with distributed.usage_errors():
        require(0 < arguments.held_out < 1, f"--held_out is a share between 0 and 1, got {arguments.held_out}.")
        count = arguments.demonstrations
        require(count is None or count > 0, f"--demonstrations must be above 0, got {count}.")
        counts = prepare(arguments.dataset_name, arguments.output_dir, arguments.short, arguments.held_out, count)
    print(f"{arguments.output_dir}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
