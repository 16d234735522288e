"""Is one model better than another? Two runs of `eval.run`, compared problem by problem.

    python -m eval.compare A B            (folders that eval.run wrote)

The same problems are hard for both, so the difference of a problem's two scores varies less than the scores do: the
interval is of the mean of these differences, and can exclude zero where those of A and B overlap. Problems are paired
by their text. Prints, task by task, B minus A, and the problems that flipped.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from eval.report import mean_and_error, read_rows, t_quantile
from sft_core.run.distributed import usage_errors

SHOWN = 20  # flipped problems printed a task


def scores_of(folder: Path) -> dict[str, dict[tuple[str, str], float]]:
    """task -> (problem, right answer) -> mean score."""
    if not (folder / "results.json").exists():
        raise ValueError(f"there are no results in {folder}: name a folder that python -m eval.run has written to.")
    found: dict[str, dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(sorted(folder.glob("details/*/*.parquet")), ["task", "query", "gold", "score"]):
        found[row["task"]][row["query"], row["gold"]].append(row["score"] or 0.0)
    return {task: {q: sum(s) / len(s) for q, s in problems.items()} for task, problems in found.items()}


def compare(a: Path, b: Path) -> dict[str, dict]:
    """Per task: difference (B - A), its standard error and 95 % interval, and [problem, A's score, B's] of flips.

    Raises:
        ValueError: a folder holds no results, or the two have no problem in common.
    """
    first, second = scores_of(a), scores_of(b)
    result = {}
    for task in first.keys() & second.keys():
        common = [query for query in first[task] if query in second[task]]
        if common:
            pairs = [(query[0], first[task][query], second[task][query]) for query in common]
            mean, error = mean_and_error([after - before for _, before, after in pairs])
            flips = [pair for pair in pairs if (pair[1] > 0.5) != (pair[2] > 0.5)]
            half = t_quantile(len(common) - 1) * error if error > 0 else None  # all differ alike
            result[task] = {
                "problems": len(common),
                "of": [len(first[task]), len(second[task])],
                "difference": mean,
                "stderr": error,
                "ci95_low": None if half is None else mean - half,
                "ci95_high": None if half is None else mean + half,
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
    for task, r in result.items():
        between = "no interval: all differ alike"
        if r["ci95_low"] is not None:
            between = f"{100 * r['ci95_low']:+.1f} to {100 * r['ci95_high']:+.1f}"
        partly = "" if r["of"] == [r["problems"]] * 2 else f" in common, of {r['of'][0]} and {r['of'][1]}"
        print(f"{task}: {100 * r['difference']:+.1f} points ({between}), {r['problems']} problems{partly}")
        for query, before, after in r["flipped"][:SHOWN]:
            sign = "solved" if after > before else "lost  "
            print(f"  {sign}  {before:.2f} -> {after:.2f}  {' '.join(query.split())[:80]}")
        if len(r["flipped"]) > SHOWN:
            print(f"  and {len(r['flipped']) - SHOWN} more: --json lists all")


if __name__ == "__main__":
    main()
