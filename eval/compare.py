"""Compare two runs of `eval.run` problem by problem: is one model better than the other?

    python -m eval.compare A B            (folders that eval.run wrote)

Hard problems are usually hard for both models, so the difference of a problem's two scores varies less than the scores.
The interval printed is that of the mean difference: it can exclude zero even if the intervals of A and B overlap.
Problems are paired by their text. For each task it prints both scores, B minus A, the settings that differ, and the
problems that one run solved and the other did not.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from eval.report import mean_and_error, read_rows, t_quantile
from sft_core.run.distributed import usage_errors

SHOWN = 20  # flipped problems printed per task


def read_run(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Two dicts: task -> its options; and task -> (problem, right answer) -> mean score and the problem's number.
    Samples that no server has answered are excluded."""
    if not (folder / "results.json").exists():
        raise ValueError(f"there are no results in {folder}: name a folder that python -m eval.run has written.")
    config = json.loads((folder / "results.json").read_text())["config"]
    found: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    columns = ["task", "problem", "query", "gold", "score", "finish_reason"]
    for row in read_rows(sorted(folder.glob("details/*/*.parquet")), columns):
        if row["finish_reason"] is not None:
            found[row["task"]][row["query"], row["gold"]].append((row["score"] or 0.0, row["problem"]))
    return config, {
        task: {query: (sum(score for score, _ in s) / len(s), s[0][1]) for query, s in problems.items()}
        for task, problems in found.items()
        if task in config
    }


def compare(a: Path, b: Path) -> dict[str, dict]:
    """For each task: both models and scores, the difference (B - A), its standard error and 95 % interval, the settings
    that differ, with both values, and the flipped problems as [problem, A's score, B's score, its number in A].

    Raises:
        ValueError: a folder contains no results, or the two have no problem in common.
    """
    (config_a, tasks_a), (config_b, tasks_b) = read_run(a), read_run(b)
    result = {}
    for task in tasks_a.keys() & tasks_b.keys():
        first, second = tasks_a[task], tasks_b[task]
        pairs = [(q[0], first[q][0], second[q][0], first[q][1]) for q in first if q in second]
        if pairs:
            mean, error = mean_and_error([after - before for _, before, after, _ in pairs])
            half = t_quantile(len(pairs) - 1) * error if error > 0 else None  # None: all differences are equal
            options = [config_a[task], config_b[task]]
            result[task] = {
                "models": [side["model"] for side in options],
                "scores": [sum(pair[i] for pair in pairs) / len(pairs) for i in (1, 2)],
                "problems": len(pairs),
                "of": [len(first), len(second)],
                "difference": mean,
                "stderr": error,
                "ci95_low": None if half is None else mean - half,
                "ci95_high": None if half is None else mean + half,
                "settings": {
                    name: [value, options[1].get(name)]
                    for name, value in options[0].items()
                    if name not in ("model", "output_dir", "tasks") and value != options[1].get(name)
                },
                "flipped": [pair for pair in pairs if (pair[1] > 0.5) != (pair[2] > 0.5)],
            }
    if not result:
        raise ValueError(f"{a} and {b} have no problem in common: compare runs of the same task.")
    return dict(sorted(result.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("a", type=lambda text: Path(text).expanduser())
    parser.add_argument("b", type=lambda text: Path(text).expanduser())
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    with usage_errors():
        result = compare(arguments.a, arguments.b)
    if arguments.json:
        return print(json.dumps(result, indent=1))
    for task, r in result.items():
        between = "no interval: all differences are equal"
        if r["ci95_low"] is not None:
            between = f"95 % interval {100 * r['ci95_low']:+.1f} to {100 * r['ci95_high']:+.1f}"
        partly = "" if r["of"] == [r["problems"]] * 2 else f" in common, of {r['of'][0]} and {r['of'][1]}"
        both = [f"{model} {100 * score:.1f} %" for model, score in zip(r["models"], r["scores"], strict=True)]
        print(f"{task}: A {both[0]}, B {both[1]}, n = {r['problems']} problems{partly}")
        print(f"  B - A: {100 * r['difference']:+.1f} points ({between})")
        differ = "; ".join(f"{name} ({one}, {two})" for name, (one, two) in r["settings"].items())
        print(f"  settings that differ: {differ or 'none'}")
        for query, before, after, number in r["flipped"][:SHOWN]:
            sign = "solved" if after > before else "lost  "
            print(f"  {sign}  problem {number}: {before:.2f} -> {after:.2f}  {' '.join(query.split())[:80]}")
        if len(r["flipped"]) > SHOWN:
            print(f"  and {len(r['flipped']) - SHOWN} more: use --json to list all")


if __name__ == "__main__":
    main()
