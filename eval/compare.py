"""Is one model better than another? Two runs of `eval.run`, compared problem by problem.

    python -m eval.compare A B            (folders that eval.run wrote)

The same problems are hard for both, so the difference of a problem's two scores varies less than the scores do: the
interval is of the mean of these differences, and can exclude zero where those of A and B overlap. Problems are paired
by their text. Prints, task by task, both scores, B minus A, the settings that differ, and the problems that flipped.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from eval.report import mean_and_error, read_rows, t_quantile
from sft_core.run.distributed import usage_errors

SHOWN = 20  # flipped problems printed a task
NOT_COMPARED = {"model", "output_dir", "tasks"}  # named elsewhere, or of other tasks


class Run(NamedTuple):
    config: dict[str, dict]  # task -> its options, and the versions of what ran
    scores: dict[str, dict[tuple[str, str], float]]  # task -> (problem, right answer) -> mean score
    numbers: dict[str, dict[tuple[str, str], int]]  # the same -> number of the problem


def read_run(folder: Path) -> Run:
    if not (folder / "results.json").exists():
        raise ValueError(f"there are no results in {folder}: name a folder that python -m eval.run has written to.")
    content = json.loads((folder / "results.json").read_text())
    config = {task: content.get("versions", {}) | options for task, options in content.get("config", {}).items()}
    found: dict[str, dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    numbers: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for row in read_rows(sorted(folder.glob("details/*/*.parquet")), ["task", "problem", "query", "gold", "score"]):
        found[row["task"]][row["query"], row["gold"]].append(row["score"] or 0.0)
        numbers[row["task"]].setdefault((row["query"], row["gold"]), row["problem"])
    scores = {task: {q: sum(s) / len(s) for q, s in problems.items()} for task, problems in found.items()}
    return Run(config, scores, numbers)


def compare(a: Path, b: Path) -> dict[str, dict]:
    """Per task: both names and scores, the difference (B - A), its standard error and 95 % interval, the settings that
    differ with both values, and [problem, A's score, B's, the problem's number in A] of flips.

    Raises:
        ValueError: a folder holds no results, or the two have no problem in common.
    """
    one, two = read_run(a), read_run(b)
    result = {}
    for task in one.scores.keys() & two.scores.keys():
        first, second = one.scores[task], two.scores[task]
        common = [query for query in first if query in second]
        if common:
            options = [run.config.get(task, {}) for run in (one, two)]
            before, after = (sum(side[query] for query in common) / len(common) for side in (first, second))
            mean, error = mean_and_error([second[query] - first[query] for query in common])
            flips = [
                (query[0], first[query], second[query], one.numbers[task][query])
                for query in common
                if (first[query] > 0.5) != (second[query] > 0.5)
            ]
            half = t_quantile(len(common) - 1) * error if error > 0 else None  # all differ alike
            result[task] = {
                "names": [side.get("model", str(folder)) for side, folder in zip(options, (a, b), strict=True)],
                "scores": [before, after],
                "problems": len(common),
                "of": [len(first), len(second)],
                "difference": mean,
                "stderr": error,
                "ci95_low": None if half is None else mean - half,
                "ci95_high": None if half is None else mean + half,
                "settings": {
                    name: [side.get(name) for side in options]
                    for name in sorted({*options[0], *options[1]} - NOT_COMPARED)
                    if options[0].get(name) != options[1].get(name)
                },
                "flipped": flips,
            }
    if not result:
        raise ValueError(f"{a} and {b} have no problem in common: compare runs of the same task.")
    return dict(sorted(result.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("a", type=lambda text: Path(text).expanduser())
    parser.add_argument("b", type=lambda text: Path(text).expanduser())
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    with usage_errors():
        result = compare(arguments.a, arguments.b)
    if arguments.json:
        return print(json.dumps(result, indent=1))
    print(f"A: {arguments.a}\nB: {arguments.b}")
    for task, r in result.items():
        between = "no interval: all differ alike"
        if r["ci95_low"] is not None:
            between = f"95 % interval {100 * r['ci95_low']:+.1f} to {100 * r['ci95_high']:+.1f}"
        partly = "" if r["of"] == [r["problems"]] * 2 else f" in common, of {r['of'][0]} and {r['of'][1]}"
        sides = zip("AB", r["names"], r["scores"], strict=True)
        both = ", ".join(f"{side} ({name}) {100 * score:.1f} %" for side, name, score in sides)
        print(f"{task}: {both}")
        print(f"  B - A: {100 * r['difference']:+.1f} points ({between}), n = {r['problems']} problems{partly}")
        differ = "; ".join(f"{name} ({one}, {two})" for name, (one, two) in r["settings"].items())
        print(f"  settings that differ: {differ or 'none that were kept'}")
        for query, before, after, number in r["flipped"][:SHOWN]:
            sign = "solved" if after > before else "lost  "
            print(f"  {sign}  problem {number}: {before:.2f} -> {after:.2f}  {' '.join(query.split())[:80]}")
        if len(r["flipped"]) > SHOWN:
            print(f"  and {len(r['flipped']) - SHOWN} more: --json lists all")


if __name__ == "__main__":
    main()
