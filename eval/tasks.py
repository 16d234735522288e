"""The evaluation tasks: which rows, what is asked, what is right. open-r1's four, with gsm8k and aime25 beside them.

`Doc` and `LightevalTaskConfig` have LightEval's names and fields, so that a file of custom tasks written for it is
ported by changing its imports; `load_custom_tasks` reads its TASKS_TABLE.

Left out on purpose: few-shot examples (the documented tasks have none) and log-likelihood tasks.

    python -m eval.tasks            prints the names of the table and how many there are
"""

import difflib
import importlib
import pickle
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.metrics import expr_gold_metric, gpqa_metric, latex_gold_metric

MAX_NEW_TOKENS = 32768
GPQA_QUERY = (  # simple-evals' words: a score depends on them
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {0}\nB) {1}\nC) {2}\nD) {3}"
)


@dataclass
class Doc:
    """One question: what is asked (`query`), the possible answers, and which of them is right."""

    query: str
    choices: list[str]
    gold_index: int | list[int] = 0
    task_name: str | None = None
    instruction: str | None = None

    def get_golds(self) -> list[str]:
        """The right answers."""
        indices = self.gold_index if isinstance(self.gold_index, list) else [self.gold_index]
        return [self.choices[i] for i in indices]


@dataclass
class LightevalTaskConfig:
    """A task. `prompt_function(row, task_name)` makes the Doc; `metric` a list whose first decides right or wrong."""

    name: str
    prompt_function: Callable[..., Doc]
    hf_repo: str  # a Hub id, or a local file
    hf_subset: str = "default"
    metric: list[Any] = field(default_factory=list)
    suite: list[str] = field(default_factory=lambda: ["custom"])
    hf_avail_splits: list[str] = field(default_factory=lambda: ["train"])
    evaluation_splits: list[str] = field(default_factory=lambda: ["train"])
    few_shots_split: str | None = None
    few_shots_select: str | None = None
    generation_size: int = MAX_NEW_TOKENS
    stop_sequence: list[str] | None = None
    trust_dataset: bool = False
    version: int = 1

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    r"""The problem as it stands; right is what its worked solution ends in (`\boxed{}`)."""
    return Doc(task_name=task_name, query=line["problem"], choices=[line["solution"]], gold_index=0)


def aime_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """The problem as it stands; right is the number in `answer`."""
    return Doc(
        task_name=task_name, query=line["problem"], choices=["" if line["answer"] is None else str(line["answer"])]
    )


def gpqa_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """A question with four choices. Where the right one stands is drawn from a seed of the row's own: it is the same
    in every run (open-r1 draws anew), and knows nothing of other rows."""
    gold_index = random.Random(zlib.crc32(line["Question"].encode())).randint(0, 3)
    choices = [line[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
    choices.insert(gold_index, line["Correct Answer"])
    query = GPQA_QUERY.format(*choices, question=line["Question"])
    return Doc(task_name=task_name, query=query, choices=list("ABCD"), gold_index=gold_index, instruction=query)


def gsm8k_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """The question as it stands; right is the number after `####`."""
    gold = line["answer"].rpartition("####")[2].strip()
    return Doc(task_name=task_name, query=line["question"], choices=[gold], gold_index=0)


def _math_task(name: str, repo: str, split: str, prompt_function: Callable[..., Doc], metric: Any, **fields: Any):
    return LightevalTaskConfig(
        name=name,
        prompt_function=prompt_function,
        hf_repo=repo,
        metric=[metric],
        hf_avail_splits=[split],
        evaluation_splits=[split],
        **fields,
    )


aime24 = _math_task("aime24", "HuggingFaceH4/aime_2024", "train", aime_prompt_fn, expr_gold_metric)
aime25_part1 = _math_task("aime25:part1", "open-r1/aime_2025_1", "train", aime_prompt_fn, expr_gold_metric)
math_500 = _math_task("math_500", "HuggingFaceH4/MATH-500", "test", prompt_fn, latex_gold_metric)
gpqa_diamond = LightevalTaskConfig(
    name="gpqa:diamond",
    prompt_function=gpqa_prompt_fn,
    hf_repo="Idavidrein/gpqa",
    hf_subset="gpqa_diamond",
    metric=[gpqa_metric],
    stop_sequence=[],
    trust_dataset=True,
)
TASKS_TABLE = [aime24, aime25_part1, math_500, gpqa_diamond]

aime25 = _math_task("aime25", "yentinglin/aime_2025", "train", aime_prompt_fn, expr_gold_metric)
gsm8k = _math_task("gsm8k", "openai/gsm8k", "test", gsm8k_prompt_fn, expr_gold_metric, hf_subset="main")
MORE_TASKS = [aime25, gsm8k]
ALIASES = {"aime25_part1": "aime25:part1", "gpqa": "gpqa:diamond", "gpqa_diamond": "gpqa:diamond"}


def load_custom_tasks(file: str) -> list[LightevalTaskConfig]:
    """The TASKS_TABLE of a Python file. Its folder joins sys.path, so that checking workers can import it too.

    Raises:
        ValueError: no such file, or no table in it.
    """
    path = Path(file).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"there is no Python file at {file}: check --custom_tasks.")
    sys.path.append(str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # of a user's file anything
        remedy = "Doc and LightevalTaskConfig are in eval.tasks here, metrics in eval.metrics"
        raise ValueError(f"{file} cannot be imported ({type(error).__name__}: {error}): {remedy}.") from error
    if Path(module.__file__ or "") != path:
        raise ValueError(f"{file} has the name of another module ({module.__file__ or 'built in'}): rename it.")
    table = getattr(module, "TASKS_TABLE", None)
    if not isinstance(table, list):
        raise ValueError(f"{file} defines no list TASKS_TABLE: collect its LightevalTaskConfigs in one.")
    return table


def check_task(task: LightevalTaskConfig) -> None:
    """Raise ValueError for a task that cannot be run, before anything is loaded."""
    wrong = None
    if not re.fullmatch(r"\w[\w:.-]*", task.name):
        wrong = "a name is of letters, digits, and _ : . -"
    elif not isinstance(task.metric, list) or not task.metric or not hasattr(task.metric[0], "compute"):
        wrong = "metric must be a list whose first entry has compute(doc, predictions)"
    elif len(task.evaluation_splits) != 1:
        wrong = f"evaluation_splits must name one split, not {task.evaluation_splits}"
    else:
        try:
            pickle.dumps(task.metric[0])
        except Exception as error:
            wrong = f"its metric must pickle, so define it in the file by name, without lambda ({error})"
    if wrong:
        raise ValueError(f"task {task.name!r} cannot be run: {wrong}.")


def find_tasks(names: str, custom: Iterable[LightevalTaskConfig] = ()) -> list[LightevalTaskConfig]:
    """The tasks of a comma-separated list of names or of LightEval's `suite|task|shots|truncate`; "all": the table.

    Raises:
        ValueError: a name is unknown, or few-shot examples are asked for.
    """
    known = {task.name: task for task in [*TASKS_TABLE, *MORE_TASKS, *custom]}
    found = []
    for text in filter(None, (part.strip() for part in names.split(","))):
        parts = text.split("|")
        name = parts[0] if len(parts) == 1 else parts[1]
        if len(parts) > 2 and parts[2] != "0":
            raise ValueError(f"{text} asks for {parts[2]} examples in the prompt, the tasks here have none: write 0.")
        name = ALIASES.get(name, name)
        if name not in known and name != "all":
            close = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown task {name!r}: {hint}Known are {', '.join(known)}, and all.")
        found += [*TASKS_TABLE, *custom] if name == "all" else [known[name]]
    if not found:
        raise ValueError(f"no task is named: give --tasks one or more of {', '.join(known)}, or all.")
    return list({task.name: task for task in found}.values())


if __name__ == "__main__":
    print([task["name"] for task in TASKS_TABLE])
    print(len(TASKS_TABLE))
