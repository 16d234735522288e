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
and our None for a gold that cannot be parsed; it accepts nothing. The last column counts pairs a second and core. The
pairs that we misjudge are printed.

    python -m eval.bench FILE...
    python -m eval.bench --pairs PAIRS.jsonl
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from eval.verify import check_answer
from eval.workers import Unscored, WorkerPool

_INTEGER = re.compile(r"\d+")
_SAME = re.compile(r"[\s$]|\\d?frac|^[a-z]=")  # spellings of one value: `x=5` in another row is no near-miss of 5
COLUMNS = ["file", "checker", "pairs", "right", "false +", "false -", "unscored", "a second"]


class Pair(NamedTuple):
    """A completion, and whether its answer is the gold one."""

    gold: str
    completion: str
    right: bool


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

    def changed() -> Iterator[str]:
        integers = list(_INTEGER.finditer(answer))
        for match in (integers[-1], integers[0]) if integers else ():
            for delta in (1, 10):
                yield f"{answer[: match.start()]}{int(match.group()) + delta}{answer[match.end() :]}"
        if integers:
            yield f"{answer} + 1"
        yield from others

    misses: dict[str, str] = {_SAME.sub("", answer): answer}
    for miss in changed():
        misses.setdefault(_SAME.sub("", miss), miss)
    return list(misses.values())[1:6]


def read_golds(path: Path) -> list[Pair]:
    """Each gold of a data file: 3 right notations, 5 wrong ones."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [str(row["answer"]).rpartition("####")[2].strip() for row in rows]
    pairs = []
    for i, row in enumerate(rows):
        gold = str(row.get("solution", row["answer"]))
        pairs += [Pair(gold, text, True) for text in notations(answers[i])]
        others = [answers[(i + shift) % len(answers)] for shift in range(1, 30)]
        for j, miss in enumerate(near_misses(answers[i], others)):
            pairs.append(Pair(gold, notations(miss)[j % 3], False))
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    boxed = [row["gold"] if r"\boxed" in row["gold"] else rf"\boxed{{{row['gold']}}}" for row in rows]
    return [Pair(gold, row["completion"], bool(row["right"])) for gold, row in zip(boxed, rows, strict=True)]


def _math_verify(gold: str, completion: str) -> float:
    sides = [parse(text, parsing_timeout=None) for text in (gold, completion)]
    return float(verify(*sides, timeout_seconds=None))


def _open_r1(gold: str, completion: str) -> float:
    units = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True)
    target = LatexExtractionConfig(
        normalization_config=units, boxed_match_priority=0, try_extract_without_anchor=False
    )  # fmt: skip
    parsed = parse(gold, extraction_mode="first_match", parsing_timeout=None)
    answer = parse(completion, [target], extraction_mode="first_match", parsing_timeout=None)
    return float(not parsed or verify(parsed, answer, timeout_seconds=None))


CHECKERS: dict[str, Callable[[str, str], float | None]] = {
    "ours": check_answer,
    "math-verify": _math_verify,
    "open-r1": _open_r1,
}


def _timed(item: tuple[str, Pair]) -> tuple[float | None, float]:
    checker, pair = item
    start = time.process_time()
    verdict = CHECKERS[checker](pair.gold, pair.completion)
    return verdict, time.process_time() - start


def judge(checker: str, pairs: list[Pair], pool: WorkerPool) -> tuple[list[int], list[str]]:
    """The figures of a checker, COLUMNS after its name, and a line for each pair that it misjudges."""
    found: list[Any] = pool.map(_timed, [(checker, pair) for pair in pairs])
    results = [(None, 0.0) if isinstance(result, Unscored) else result for result in found]
    wrong = [pair for pair, (verdict, _) in zip(pairs, results, strict=True) if (verdict == 1.0) != pair.right]
    false = [sum(not pair.right for pair in wrong), sum(pair.right for pair in wrong)]
    unscored = sum(verdict is None for verdict, _ in results)
    speed = len(pairs) / max(sum(seconds for _, seconds in results), 1e-9)
    return [len(pairs), len(pairs) - len(wrong), *false, unscored, round(speed)], [
        f"{'right, refused' if pair.right else 'wrong, accepted'}: {pair.completion!r} for {pair.gold[-80:]!r}"
        for pair in wrong
    ]


def _print(name: str, *columns: Any) -> None:
    print(f"{name:20}", *(f"{column:>11}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description="How well and how fast answers are checked.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--pairs", nargs="*", type=Path, default=[], metavar="FILE", help="labelled pairs, see above")
    args = parser.parse_args()
    if missing := [str(path) for path in args.files + args.pairs if not path.is_file()]:
        parser.error(f"no file {', '.join(missing)}")
    tasks = [(path, checker, read_pairs(path)) for path in args.pairs for checker in CHECKERS]
    tasks += [(path, "ours", read_golds(path)) for path in args.files]
    _print(*COLUMNS)
    with WorkerPool(os.cpu_count() or 1) as pool:
        for path, checker, pairs in tasks:
            figures, misjudged = judge(checker, pairs, pool)
            _print(path.name, checker, *figures)
            for line in misjudged if checker == "ours" else ():
                print(line)


if __name__ == "__main__":
    from eval import bench  # the workers import its functions by name, and have another `__main__`

    bench.main()
