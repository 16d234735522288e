r"""How well and how fast answers are checked: on labelled pairs, and on each gold answer of a data file.

A line of a file of pairs (JSON) is {"gold", "completion", "right": 0 or 1}. For these our verdicts, those of
math-verify as it comes, and those with the settings of open-r1's accuracy reward stand below each other. Golds are put
in a box for all three.

A line of a data file has `answer` and perhaps `solution`. The gold is the whole `solution`, else the whole `answer`
(GSM8K's ends in `#### 72`), as training has it. Each answer is checked in three notations and against five near-misses.
The notations mark it in different ways and write it in different ways (`\frac` or `\dfrac`, `1,234` or `1234`, `\left(`
or `(`); the near-misses change a number, the whole, or take the answer of another row. Left out: the prose around an
answer, and answers that are right in another form.

False + are wrong answers accepted, false - right ones refused. Unscored is what took too long or crashed the checker,
and our None for a gold that cannot be parsed; it accepts nothing. Pairs a second are by processor time, of one core.
The pairs that we misjudge are printed.

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
_SAME = re.compile(r"[\s$]|\\d?frac|^[a-z]=")  # spellings of one value: `x=5` in another row is no near-miss of 5


def notations(answer: str) -> list[str]:
    """A right answer, marked and written in three ways."""
    number = answer.replace(",", "").replace("\\!", "").replace(" ", "")
    other = answer
    if re.fullmatch(r"-?\d{4,}", number):
        other = f"{int(number):,}" if number == answer else number
    for pair in (r"\frac", r"\dfrac"), (r"\left", ""), (r"\right", ""), (r"\text", r"\mathrm"):
        other = other.replace(*pair)
    return [rf"So we get $\boxed{{{answer}}}$.", f"<answer>{other}</answer>", f"The final answer is ${answer}$."]


def near_misses(answer: str, others: list[str]) -> list[str]:
    """Five different wrong answers: changed integers, the whole plus one, then the answers of other rows."""
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
    """Each gold of a data file: 3 right notations, 5 wrong ones."""
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
    """Labelled pairs, each gold in a box."""
    pairs = []
    for row in _rows(path):
        gold = row["gold"].rpartition("####")[2].strip()  # GSM8K's mark, which math-verify does not know
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
    """How many pairs, right verdicts, false +, false -, unscored, pairs a second and core; the pairs it misjudges."""
    found: list[Any] = pool.map(_timed, [(checker, pair) for pair in pairs])
    results = [(None, 0.0) if isinstance(result, Unscored) else result for result in found]
    wrong = [pair for pair, (verdict, _) in zip(pairs, results, strict=True) if (verdict == 1.0) != pair[2]]
    refused = sum(is_right for _, _, is_right in wrong)
    unscored = sum(verdict is None for verdict, _ in results)
    speed = round(len(pairs) / max(sum(seconds for _, seconds in results), 1e-9))
    return [len(pairs), len(pairs) - len(wrong), len(wrong) - refused, refused, unscored, speed], wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="How well and how fast answers are checked.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--pairs", nargs="*", type=Path, default=[], metavar="FILE", help="labelled pairs, see above")
    args = parser.parse_args()
    if missing := [str(path) for path in args.files + args.pairs if not path.is_file()]:
        parser.error(f"no file {', '.join(missing)}")
    tasks = [(path, checker, read_pairs(path)) for path in args.pairs for checker in CHECKERS]
    tasks += [(path, "ours", read_golds(path)) for path in args.files]
    line = "{:20}{:>12}" + "{:>10}" * 6
    print(line.format("file", "checker", "pairs", "right", "false +", "false -", "unscored", "a second"))
    with WorkerPool(os.cpu_count() or 1) as pool:
        for path, checker, pairs in tasks:
            figures, wrong = judge(checker, pairs, pool)
            print(line.format(path.name, checker, *figures))
            for gold, text, is_right in wrong if checker == "ours" else ():
                print(f"{'right, refused' if is_right else 'wrong, accepted'}: {text!r} for {gold[-80:]!r}")


if __name__ == "__main__":
    from eval import bench  # the workers import its functions by name, and have another `__main__`

    bench.main()
