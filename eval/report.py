"""Metrics of a run's samples: scores with intervals, and a table.

The metrics of a task are plain numbers:

    pass@1                    mean score over all samples
    pass@1_stderr             its standard error over problems, since samples of one problem are not independent
    pass@1_ci95_low, _high    its 95 % interval over problems, see `interval`
    pass@k                    share of problems solved in k attempts, unbiased (Chen et al., arXiv:2107.03374, eq. 1)
    maj@n                     score of the most frequent answer; all right answers count as one answer, others if they
                              print equally; ties are averaged; absent if the metric does not report extracted answers
    mean_length, cut_off      mean tokens per sample (null: no server reported them); share cut off by the length limit
    unparsed, unscored        share without an answer; share whose check was given up (both count as wrong)
    problems, samples         their numbers

Not supported, on purpose: an average over tasks.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_STRINGS = ("task", "query", "prompt", "gold", "completion", "finish_reason", "extracted", "parsed_gold", "error")
SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("problem", "sample", "seed", "length")]
    + [("score", pa.float64())]
    + [(name, pa.string()) for name in _STRINGS]
)
NEEDED = ["problem", "sample", "length", "score", "finish_reason", "extracted", "error"]  # columns for `summarise`


def read_rows(paths: list[Path], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The samples in these files as dicts, with these columns (None: all)."""
    return [row for path in paths for row in pq.read_table(path, columns=columns).to_pylist()]


def verdicts(row: dict[str, Any]) -> list[str]:
    """The labels of a sample: right or wrong, then cut and unparsed if they apply."""
    cut, unparsed = row["finish_reason"] == "length", row["extracted"] == ""
    return ["right" if row["score"] == 1.0 else "wrong"] + ["cut"] * cut + ["unparsed"] * unparsed


def pick(paths: list[Path], limit: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Pick at most `limit` of the samples in these files, equally many of each kind of verdict as far as possible. Also
    returns the number of samples by verdict and in all. Only the picked samples are kept in memory."""
    places, counts, kinds = [], Counter[str](), Counter[tuple[str, ...]]()
    for file, path in enumerate(paths):
        for i, row in enumerate(read_rows([path], ["score", "finish_reason", "extracted"])):
            kind = tuple(verdicts(row))
            kinds[kind] += 1
            counts.update(("all", *kind))
            places.append((kinds[kind], file, i))
    chosen = defaultdict(list)
    for _, file, i in sorted(places)[:limit]:
        chosen[file].append(i)
    tables = [pq.read_table(paths[file]).take(sorted(rows)) for file, rows in sorted(chosen.items())]
    return [row for table in tables for row in table.to_pylist()], counts


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of one task's samples. All problems must have the same number of samples."""
    groups: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row)
    scores = [[row["score"] or 0.0 for row in group] for group in groups.values()]
    n = len(scores[0])
    mean, error, low, high = interval([sum(group) / n for group in scores])
    lengths = [row["length"] for row in rows if row["length"] is not None]
    result: dict[str, Any] = {"pass@1": mean, "pass@1_stderr": error, "pass@1_ci95_low": low, "pass@1_ci95_high": high}
    for k in sorted({2**i for i in range(1, n.bit_length())} | ({n} if n > 1 else set())):
        result[f"pass@{k}"] = _mean([pass_at_k(n, sum(score > 0 for score in group), k) for group in scores])
    if n > 1 and any(row["extracted"] is not None for row in rows):
        result[f"maj@{n}"] = _mean([majority(group) for group in groups.values()])
    return result | {
        "mean_length": _mean(lengths) if lengths else None,
        "cut_off": _mean([row["finish_reason"] == "length" for row in rows]),
        "unparsed": _mean([row["extracted"] == "" for row in rows]),
        "unscored": _mean([row["score"] is None for row in rows]),
        "problems": len(groups),
        "samples": len(rows),
    }


def _mean(values: list) -> float:
    return sum(values) / len(values)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; 0 for a single value."""
    mean, count = _mean(values), len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)


def interval(means: list[float]) -> tuple[float, float, float, float]:
    """Mean, standard error, and 95 % interval (low, high) of the mean of `means`, one value in [0, 1] per problem.

    Samples of a problem are not independent, so the error is computed over problems. For the interval, one problem that
    is always solved and one that never is are added (as Agresti and Coull do for counts), and the quantile is that of
    Student's t. Else the interval would be empty if all problems fail, and too narrow if few of 30 are ever solved.
    """
    mean, error = mean_and_error(means)
    middle, wider = mean_and_error([*means, 0.0, 1.0])
    half = t_quantile(len(means) + 1) * wider
    return mean, error, max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, accurate to 1 % (Abramowitz and Stegun 26.7.5)."""
    if freedom == 1:
        return 12.706
    z, v = 1.959964, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + terms[0] / v + terms[1] / v**2 + terms[2] / v**3 + fourth / v**4


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, contain a correct one."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group: list[dict[str, Any]]) -> float:
    """Score of the most frequent answer; ties are averaged. Samples without an answer do not vote."""
    votes: dict[str, list[float]] = defaultdict(list)
    for row in group:
        if row["extracted"]:
            votes["" if row["score"] == 1.0 else _canonical(row["extracted"])].append(row["score"] or 0.0)
    most = max(map(len, votes.values()), default=0)
    return _mean([_mean(scores) for scores in votes.values() if len(scores) == most]) if votes else 0.0


def _canonical(answer: str) -> str:
    """A canonical form: 18.0000 and Eq(x, 18) become 18, 1/2 becomes 0.5."""
    answer = answer.removesuffix(")").rpartition(", ")[2] if answer.startswith("Eq(") else answer
    above, _, below = answer.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return answer
    return f"{value:.12g}" if abs(value) < 1e12 else answer


def shown_metrics(result: dict[str, Any]) -> dict[str, str]:
    """A task's line in the table: column -> text, with pass@k for the largest k only."""
    percent = {name: f"{100 * value:.1f} %" for name, value in result.items() if value is not None}
    more = [name for name in result if name.startswith(("pass@", "maj@")) and "_" not in name and name != "pass@1"]
    interval = f"{100 * result['pass@1_ci95_low']:.1f} to {100 * result['pass@1_ci95_high']:.1f}"
    return (
        {"pass@1": percent["pass@1"], "95 % interval": interval}
        | {name: percent[name] for name in more[-2:]}
        | {name: percent[name.replace(" ", "_")] for name in ("cut off", "unparsed", "unscored")}
        | {"mean length": "" if result["mean_length"] is None else f"{result['mean_length']:.0f}"}
        | {name: str(result[name]) for name in ("problems", "samples")}
    )


def table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The column names, and one row per task. Metrics that a task lacks (maj@n) are empty."""
    lines = [{"task": task} | shown_metrics(result) for task, result in results.items()]
    names = list(dict.fromkeys(name for line in lines for name in line))
    return names, [[line.get(name, "") for name in names] for line in lines]
