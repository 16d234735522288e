r"""Benchmark of the answer checker: accuracy and speed on labelled pairs, and on the gold answers of a data file.

Each line of a file of pairs is JSON: {"gold", "completion", "right": 0 or 1}. Such a file is checked by three checkers:
ours, math-verify with its defaults, and math-verify with the settings of open-r1's accuracy reward. For all three, the
gold is put in \boxed{}.

Each line of a data file has `answer` and optionally `solution`. As in training, the gold is the whole `solution`, else
the whole `answer` (in GSM8K it ends in `#### 72`). Each gold is compared with three right and five wrong answers. The
right ones mark and write the answer in different ways (`\frac` or `\dfrac`, `1,234` or `1234`, `\left(` or `(`). The
wrong ones change a number or the whole answer, or are the answers of other rows. Not covered: prose around an answer,
and right answers in another form.

"false +" counts wrong answers that were accepted, "false -" right answers that were refused. "unscored" counts
timeouts, crashes of the checker, and golds that our checker cannot parse; an unscored pair is not accepted. "pairs/s"
is pairs per second of CPU time on one core. The pairs that our checker misjudges are printed.

    python -m eval.bench FILE...
    python -m eval.bench --pairs PAIRS.jsonl
"""

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from eval.verify import check_answer
from eval.workers import Unscored, WorkerPool

Pair = tuple[str, str, bool]  # gold, completion, whether its answer is the gold one
_SAME = re.compile(r"[\s$]|\\d?frac|^[a-z]=")  # removed before comparison: `x=5` is not a wrong answer for 5


def notations(answer: str) -> list[str]:
    """Three right answers that mark and write `answer` in different ways."""
    number = answer.replace(",", "").replace("\\!", "").replace(" ", "")
    other = answer
    if re.fullmatch(r"-?\d{4,}", number):
        other = f"{int(number):,}" if number == answer else number
    for pair in (r"\frac", r"\dfrac"), (r"\left", ""), (r"\right", ""), (r"\text", r"\mathrm"):
        other = other.replace(*pair)
    return [rf"So we get $\boxed{{{answer}}}$.", f"<answer>{other}</answer>", f"The final answer is ${answer}$."]


def near_misses(answer: str, others: list[str]) -> list[str]:
    """Five different wrong answers: changed integers, the answer plus one, then the answers of other rows."""
    integers = list(re.finditer(r"\d+", answer))
    misses = {_SAME.sub("", answer): answer}
    wrong = [
        f"{answer[: match.start()]}{int(match[0]) + delta}{answer[match.end() :]}"
        for match in integers[-1:] + integers[:1]
        for delta in (1, 10)
    ]
    for miss in wrong + [f"{answer} + 1"] * bool(integers) + others:
        misses.setdefault(_SAME.sub("", miss), miss)
    return list(misses.values())[1:6]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_golds(path: Path) -> list[Pair]:
    """The pairs of a data file: for each gold, 3 right answers and 5 wrong ones."""
    rows = _rows(path)
    answers = [str(row["answer"]).rpartition("####")[2].strip() for row in rows]
    pairs = []
    for i, row in enumerate(rows):
        gold = str(row.get("solution", row["answer"]))
        pairs += [(gold, text, True) for text in notations(answers[i])]
        misses = near_misses(answers[i], (answers[i + 1 :] + answers[:i])[:29])
        pairs += [(gold, notations(miss)[j % 3], False) for j, miss in enumerate(misses)]
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    r"""The pairs of a file of labelled pairs, each gold in \boxed{}."""
    pairs = []
    for row in _rows(path):
        gold = row["gold"].rpartition("####")[2].strip()  # GSM8K's marker, which math-verify does not know
        boxed = gold if r"\boxed" in gold else rf"\boxed{{{gold}}}"
        pairs.append((boxed, row["completion"], bool(row["right"])))
    return pairs


def _ours(pair: Pair) -> float | None:
    return check_answer(*pair[:2])


def _math_verify(pair: Pair) -> float:
    gold, answer = (parse(text, parsing_timeout=None) for text in pair[:2])
    return float(verify(gold, answer, timeout_seconds=None))


def _open_r1(pair: Pair) -> float:
    units = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True)
    target = LatexExtractionConfig(
        normalization_config=units, boxed_match_priority=0, try_extract_without_anchor=False
    )  # fmt: skip
    gold = parse(pair[0], extraction_mode="first_match", parsing_timeout=None)
    answer = parse(pair[1], [target], extraction_mode="first_match", parsing_timeout=None)
    return float(not gold or verify(gold, answer, timeout_seconds=None))


CHECKERS = {"ours": _ours, "math-verify": _math_verify, "open-r1": _open_r1}


def _timed(item: tuple[str, Pair]) -> tuple[float | None, float]:
    start = time.process_time()
    return CHECKERS[item[0]](item[1]), time.process_time() - start


def judge(checker: str, pairs: list[Pair], pool: WorkerPool) -> tuple[list[int], list[Pair]]:
    """[pairs, right verdicts, false +, false -, unscored, pairs per second per core], and the misjudged pairs."""
    found: list[Any] = pool.map(_timed, [(checker, pair) for pair in pairs])
    results = [(None, 0.0) if isinstance(result, Unscored) else result for result in found]
    wrong = [pair for pair, (verdict, _) in zip(pairs, results, strict=True) if (verdict == 1.0) != pair[2]]
    refused = sum(is_right for _, _, is_right in wrong)
    unscored = sum(verdict is None for verdict, _ in results)
    speed = round(len(pairs) / max(sum(seconds for _, seconds in results), 1e-9))
    return [len(pairs), len(pairs) - len(wrong), len(wrong) - refused, refused, unscored, speed], wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the answer checker.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--pairs", nargs="*", type=Path, default=[], metavar="FILE", help="labelled pairs")
    args = parser.parse_args()
    if missing := [str(path) for path in args.files + args.pairs if not path.is_file()]:
        parser.error(f"there is no file {', '.join(missing)}: check the names")
    tasks = [(path, checker, read_pairs(path)) for path in args.pairs for checker in CHECKERS]
    tasks += [(path, "ours", read_golds(path)) for path in args.files]
    line = "{:20}{:>12}" + "{:>10}" * 6
    print(line.format("file", "checker", "pairs", "right", "false +", "false -", "unscored", "pairs/s"))
    with WorkerPool(os.cpu_count() or 1) as pool:
        for path, checker, pairs in tasks:
            figures, wrong = judge(checker, pairs, pool)
            print(line.format(path.name, checker, *figures))
            for gold, text, is_right in wrong if checker == "ours" else ():
                print(f"{'right, refused' if is_right else 'wrong, accepted'}: {text!r} for {gold[-80:]!r}")


if __name__ == "__main__":
    from eval import bench  # workers import the functions by name, and their `__main__` is another module

    bench.main()
