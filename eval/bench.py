r"""How well and how fast answers are checked: each gold answer of a data file in three notations and five near-misses.

A line of FILE (JSON) has `answer` and perhaps `solution`. The gold is the whole `solution`, else the whole `answer`
(GSM8K's ends in `#### 72`), as training has it. The notations mark the answer in different ways and write it in
different ways (`\frac` or `\dfrac`, `1,234` or `1234`, `\left(` or `(`); the near-misses change a number, the whole, or
take the answer of another row. Left out: the prose around an answer, and answers that are right in another form.

Those are in files of pairs, of lines {"kind", "gold", "completion", "right": 0 or 1}. For these our verdicts, those of
math-verify as it comes, and those with the settings of open-r1's accuracy reward are printed side by side: how many are
right, false positives (wrong answers accepted) and false negatives, by kind, and the pairs that we misjudge. Golds are
put in a box for all three; what takes too long, and our None for a gold that cannot be parsed, accepts nothing.

    python -m eval.bench FILE... [--limit ROWS] [--show]
    python -m eval.bench --pairs PAIRS.jsonl
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from eval.verify import check_answer
from eval.workers import Unscored, WorkerPool

_INTEGER = re.compile(r"\d+")
_SAME = re.compile(r"[\s$]|\\d?frac|^[a-z]=")  # spellings of one value: `x=5` in another row is no near-miss of 5


@dataclass
class Report:
    """What became of the checks of one file."""

    file: str
    golds: int
    right: int = 0  # checks of the gold answer itself
    right_accepted: int = 0
    wrong: int = 0  # checks of near-misses
    wrong_accepted: int = 0
    unscored: int = 0  # time-outs, crashes, exceptions, golds that do not parse
    cpu_seconds: float = 0.0  # of all checks, inside the workers
    misjudged: list[tuple[str, str, str]] = field(default_factory=list)  # (gold answer, completion, what was wrong)


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


def _timed_check(pair: tuple[str, str]) -> tuple[float | None, float]:
    start = time.process_time()
    verdict = check_answer(*pair)
    return verdict, time.process_time() - start


def judge(path: Path, pool: WorkerPool, limit: int | None = None) -> Report:
    """Check the golds of the first `limit` rows of a file: 3 + 5 checks each."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]
    answers = [str(row["answer"]).rpartition("####")[2].strip() for row in rows]
    report = Report(path.name, len(rows))
    checks: list[tuple[str, str, bool]] = []  # gold, completion, whether it is right
    for i, row in enumerate(rows):
        gold = str(row.get("solution", row["answer"]))
        others = [answers[(i + shift) % len(answers)] for shift in range(1, 30)]
        checks += [(gold, text, True) for text in notations(answers[i])]
        for j, miss in enumerate(near_misses(answers[i], others)):
            checks.append((gold, notations(miss)[j % 3], False))
    results = pool.map(_timed_check, [check[:2] for check in checks])
    for (gold, text, is_right), result in zip(checks, results, strict=True):
        verdict, seconds = (None, 0.0) if isinstance(result, Unscored) else result
        report.cpu_seconds += seconds
        accepted = verdict == 1.0
        report.right += is_right
        report.wrong += not is_right
        report.right_accepted += is_right and accepted
        report.wrong_accepted += accepted and not is_right
        report.unscored += verdict is None
        if verdict is None or accepted != is_right:
            what = str(result) if verdict is None else "right, refused" if is_right else "wrong, accepted"
            report.misjudged.append((gold[-80:], text, what))
    return report


def _ours(pair: tuple[str, str]) -> float | None:
    return check_answer(*pair)


def _math_verify(pair: tuple[str, str]) -> float:
    gold, answer = (parse(text, parsing_timeout=None) for text in pair)
    return float(verify(gold, answer, timeout_seconds=None))


def _open_r1(pair: tuple[str, str]) -> float:
    units = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True)
    target = LatexExtractionConfig(
        normalization_config=units, boxed_match_priority=0, try_extract_without_anchor=False
    )  # fmt: skip
    gold = parse(pair[0], extraction_mode="first_match", parsing_timeout=None)
    answer = parse(pair[1], [target], extraction_mode="first_match", parsing_timeout=None)
    return float(not gold or verify(gold, answer, timeout_seconds=None))


SYSTEMS = {"ours": _ours, "math-verify": _math_verify, "open-r1": _open_r1}


def pairs_table(path: Path, pool: WorkerPool) -> str:
    """The verdicts on a file of pairs, by kind, and those of ours that are wrong."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [(p["gold"] if r"\boxed" in p["gold"] else rf"\boxed{{{p['gold']}}}", p["completion"]) for p in pairs]
    said = {name: [verdict == 1.0 for verdict in pool.map(function, items)] for name, function in SYSTEMS.items()}
    lines = [f"{'right / false + / false -':27}{'pairs':>6}" + "".join(f"{name:>16}" for name in said)]
    for kind in ["all", *dict.fromkeys(p["kind"] for p in pairs)]:
        rows = [i for i, p in enumerate(pairs) if kind in ("all", p["kind"])]
        line = f"{kind:27}{len(rows):6}"
        for accepted in said.values():
            wrong = [accepted[i] for i in rows if accepted[i] != bool(pairs[i]["right"])]
            line += f"{f'{len(rows) - len(wrong)} / {sum(wrong)} / {wrong.count(False)}':>16}"
        lines.append(line)
    for accepted, p in zip(said["ours"], pairs, strict=True):
        if accepted != bool(p["right"]):
            lines.append(
                f"{'wrong, accepted' if accepted else 'right, refused'}: {p['completion']!r} for {p['gold']!r}"
            )
    return "\n".join(lines)


def table(reports: list[Report]) -> str:
    """The reports as text, a line a file."""
    lines = [f"{'file':20}{'golds':>7}{'checks':>8}{'right accepted':>17}{'wrong accepted':>17}{'unscored':>10}"
             f"{'checks/s per core':>19}"]  # fmt: skip
    for r in reports:
        right, wrong = f"{r.right_accepted} of {r.right}", f"{r.wrong_accepted} of {r.wrong}"
        speed = (r.right + r.wrong) / max(r.cpu_seconds, 1e-9)
        lines.append(f"{r.file:20}{r.golds:7}{r.right + r.wrong:8}{right:>17}{wrong:>17}{r.unscored:10}{speed:19.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How well and how fast answers are checked.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--pairs", nargs="*", type=Path, default=[], metavar="FILE", help="labelled pairs, see above")
    parser.add_argument("--limit", type=int, help="rows to take of each file")
    parser.add_argument("--show", action="store_true", help="print every check that was misjudged")
    args = parser.parse_args()
    if missing := [str(path) for path in args.files + args.pairs if not path.is_file()]:
        parser.error(f"no file {', '.join(missing)}")
    with WorkerPool(os.cpu_count() or 1) as pool:
        for path in args.pairs:
            print(pairs_table(path, pool))
        reports = [judge(path, pool, args.limit) for path in args.files]
    if reports:
        print(table(reports))
    for gold, text, what in [row for report in reports for row in report.misjudged] if args.show else ():
        print(f"{what}: {text!r} for {gold!r}")


if __name__ == "__main__":
    from eval import bench  # the workers import its functions by name, and have another `__main__`

    bench.main()
