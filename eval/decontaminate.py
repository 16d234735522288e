r"""Find training problems that are in the evaluation sets, by shared word n-grams; report them, or remove them.

    python -m eval.decontaminate --dataset D --output_dir O [--cleanup --ngram_size 8 --eval_dataset task=file ...]

A row is flagged if it shares an n-gram, `ngram_size` consecutive words, with a problem of an evaluation set, as in
open-r1. Before that, `words` removes notation: `$\frac{1}{2}x^2$`, `\dfrac12 x^{2}` and `1/2 x²` all become `1 2 x 2`.
A problem with fewer words matches a row with exactly the same words; open-r1 never finds such problems. N-grams that
occur in three or more problems are stock phrases ("where m and n are relatively prime positive integers", GPQA's
instructions) and are ignored, unless a problem has no others: copies are found by their other n-grams.

It writes these files to O; the same command resumes with the missing chunks:

    report.json, report.txt    the number of rows that each evaluation set flags, and the first of them
    matches.jsonl              one line per row and set: the problem, a shared n-gram, how many n-grams are shared
    rows.parquet               the rows that are not flagged (--cleanup), else all with columns contaminated_<task>
    verdicts/*.json            the matches of a chunk of rows

Not supported, on purpose: paraphrases, translations, and the same words with other numbers (finding them takes a
model), open-r1's LiveCodeBench, and data that does not fit on the disk.
"""

import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from eval.config import DecontaminateConfig
from eval.data import TEXT, load, load_docs, places_of
from eval.tasks import find_tasks, load_custom_tasks
from gen.folder import Batch, batches_by_content, digest, open_folder
from kernels.tables import table
from sft_core.run.cli import parse
from sft_core.run.distributed import usage_errors
from sft_core.run.files import disk_errors, whole_file, write_atomically
from sft_core.run.hub import check_dataset_push, push_dataset

CHUNK = 1000  # rows
STOCK = 3  # an n-gram that occurs in this many problems is a stock phrase
SHOWN = 20  # matches printed
Place = tuple[str, int]  # (task name, number of the problem)

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau "
    "upsilon phi chi psi omega"
).split()
_NAMES = {ord("α") + i: f" {name} " for i, name in enumerate(_GREEK)} | {ord("√"): " sqrt "}
_FUNCTIONS = "sin cos tan cot sec csc log ln exp lim max min gcd lcm det dim deg arcsin arccos arctan sqrt".split()
_KEPT = {*_GREEK, *_FUNCTIONS}  # commands that plain text writes as words; all others are notation

_RAISED = re.compile(r"[²³¹⁰-ⁿ]+|[₀-ₜ]+|[¼-¾⅐-⅞]")  # NFKC would join x10² to x102, and ₀¹ to 01
_PICTURE = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]|\\(?:begin|end)\s*\{[^{}]*\}(?:\{[lcr|\s]*\})?", re.DOTALL)
_BARE_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9a-z])\s*([0-9a-z])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|,)(?=\d{3}(?!\d))")
_COMMAND = re.compile(r"\\(?:var)?([a-z]+)")
_WORD = re.compile(r"[^\W\d_]+|\d+")


def words(text: str) -> list[str]:
    r"""The words of a text without notation: lower-case words, and numbers.

    It removes braces, dollar signs, spacing, operators, punctuation, and all LaTeX commands but functions and Greek
    letters. These keep their names, which also replace the characters (`\pi`, π). It separates digits from letters
    (`2x` becomes `2 x`).

    >>> words(r"Find $\dfrac12x^{10}$ for $x=1{,}000$.") == words("find 1/2 x¹⁰ for x = 1000")
    True
    """
    text = unicodedata.normalize("NFKC", _RAISED.sub(r" \g<0> ", text)).casefold().translate(_NAMES)
    text = _BARE_FRACTION.sub(r" \1 \2 ", _THOUSANDS.sub("", _PICTURE.sub(" ", text)))
    return _WORD.findall(_COMMAND.sub(lambda found: f" {found[1]} " if found[1] in _KEPT else " ", text))


def runs(text: str, size: int) -> list[str]:
    """The different n-grams of `size` words in a text; if the text is shorter, all of its words as one."""
    found = words(text)
    return list(dict.fromkeys(" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1)) if found))


class Index:
    """An index from n-grams to the problems of the evaluation sets ({task: problems}) that contain them."""

    def __init__(self, sets: dict[str, list[str]], size: int) -> None:
        self.size = size
        self.places: dict[str, list[Place]] = defaultdict(list)
        self.runs_of: dict[Place, int] = {}
        runs_of = {(task, i): runs(text, size) for task, texts in sets.items() for i, text in enumerate(texts)}
        count = Counter(run for found in runs_of.values() for run in found)
        for place, found in runs_of.items():
            said = [run for run in found if count[run] < STOCK] or found
            for run in said:
                self.places[run].append(place)
            self.runs_of[place] = len(said)

    def matches(self, text: str) -> list[dict[str, Any]]:
        """For each set that shares an n-gram with `text`: the problem with the largest share, an n-gram, and counts."""
        shared: dict[Place, list[str]] = defaultdict(list)
        for run in runs(text, self.size):
            for place in self.places.get(run, ()):
                shared[place].append(run)
        best: dict[str, Place] = {}
        for place in sorted(shared, key=lambda place: len(shared[place]) / self.runs_of[place]):
            best[place[0]] = place
        return [
            {
                "set": task,
                "problem": place[1],
                "ngram": shared[place][0],
                "shared": len(shared[place]),
                "of": self.runs_of[place],
            }
            for task, place in sorted(best.items())
        ]


@disk_errors()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with usage_errors():
        # --config names the configuration of the data set, as in open-r1
        argv = [re.sub(r"^--config(?=$|=)", "--dataset_config", text) for text in argv]
        (config,) = parse((DecontaminateConfig,), argv)
        sets = load_sets(config)
        columns = {"problem_column": (config.problem_column, TEXT)}
        rows = load(config.dataset, config.dataset_config, config.split, columns)
        settings: dict[str, Any] = {name: getattr(config, name) for name in ("problem_column", "ngram_size")}
        check_dataset_push(config.new_dataset_name, config.private)
        settings["sets"] = {task: digest(problems) for task, problems in sets.items()}
        open_folder(config.output_dir, settings, "verdicts/*.json")
    folder = Path(config.output_dir)
    batches = batches_by_content(folder / "verdicts", ".json", rows, [config.problem_column], CHUNK)
    index = Index(sets, config.ngram_size)
    texts = rows.select_columns([config.problem_column])
    with tqdm(total=len(rows), desc="decontaminate", disable=None) as bar:
        for path, part in batches:
            if not path.exists():
                found = zip(part, texts[part.start : part.stop][config.problem_column], strict=True)
                matches = [{"row": i} | match for i, text in found for match in index.matches(text or "")]
                write_atomically(path, json.dumps(matches))
            bar.update(len(part))
    flagged = report(config, batches, rows, sets)
    with whole_file(folder / "rows.parquet") as temporary:
        with_verdicts(rows, flagged, config.cleanup).to_parquet(temporary)
    push_dataset(folder / "rows.parquet", config.new_dataset_name, config.private)


def load_sets(config: DecontaminateConfig) -> dict[str, list[str]]:
    """{task: its questions}."""
    tasks = find_tasks(config.tasks, load_custom_tasks(config.custom_tasks) if config.custom_tasks else ())
    places = places_of(tasks, config.eval_dataset, "--eval_dataset")
    sets = {}
    for task in tasks:
        try:
            docs = load_docs(task, places[task.name], option="--eval_dataset")
        except ValueError as error:
            remedy = f"give its rows as --eval_dataset {task.name}=FILE, or choose other sets with --tasks"
            raise ValueError(f"evaluation set {task.name} cannot be loaded: {remedy}. {error}") from error
        sets[task.name] = [doc.query for doc in docs]
    return sets


def report(
    config: DecontaminateConfig, batches: list[Batch], rows: Dataset, sets: dict[str, list[str]]
) -> dict[str, set[int]]:
    """Write matches.jsonl, report.json and report.txt, print report.txt, and return {evaluation set: flagged rows}."""
    flagged: dict[str, set[int]] = {task: set() for task in sets}
    shown: list[str] = []
    folder = Path(config.output_dir)
    with whole_file(folder / "matches.jsonl") as temporary, open(temporary, "w") as file:
        for path, _ in batches:
            for match in json.loads(path.read_text()):
                task, problem = match["set"], match["problem"]
                flagged[task].add(match["row"])
                texts = {"problem_text": sets[task][problem], "row_text": rows[match["row"]][config.problem_column]}
                file.write(json.dumps(match | texts) + "\n")
                if len(shown) < SHOWN:
                    shared = f'{match["shared"]} of {match["of"]} n-grams, "{match["ngram"]}"'
                    shown.append(f"row {match['row']}: {task} {problem}, {shared}")
    total, matches = len(set().union(*flagged.values())), sum(map(len, flagged.values()))
    lines = [[task, len(problems), len(flagged[task])] for task, problems in sets.items()]
    text = table(["evaluation set", "problems", "rows flagged"], lines)
    text += "\n".join(["", f"{total} of {len(rows)} rows flagged, {len(rows) - total} are not.", *shown, ""])
    if matches > SHOWN:
        text += f"and {matches - SHOWN} more: matches.jsonl lists all\n"
    content = {
        "dataset": config.dataset,
        "rows": len(rows),
        "flagged": total,
        "ngram_size": config.ngram_size,
        "sets": {task: {"problems": problems, "rows_flagged": count} for task, problems, count in lines},
    }
    write_atomically(folder / "report.json", json.dumps(content, indent=1))
    write_atomically(folder / "report.txt", text)
    print(text, end="")
    return flagged


def with_verdicts(rows: Dataset, flagged: dict[str, set[int]], cleanup: bool) -> Dataset:
    """The rows that are not flagged (`cleanup`), or all rows with one bool column per evaluation set."""
    if cleanup:
        found = set().union(*flagged.values())
        return rows.select([row for row in range(len(rows)) if row not in found])
    columns = {f"contaminated_{task.replace(':', '_')}": found for task, found in flagged.items()}
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, found in columns.items():
        rows = rows.add_column(name, [row in found for row in range(len(rows))])
    return rows


if __name__ == "__main__":
    main()
