"""The evaluation tasks: their data, prompts and metrics. These are open-r1's four tasks, gsm8k and aime25.

`Doc` and `LightevalTaskConfig` have LightEval's names and fields. To port a file of custom tasks from LightEval, change
its imports; `load_custom_tasks` reads its TASKS_TABLE.

Not supported, on purpose: few-shot examples (open-r1's tasks have none) and log-likelihood tasks.

    python -m eval.tasks            prints the names of the tasks in TASKS_TABLE and their number
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
GPQA_QUERY = (  # the wording of simple-evals, since scores depend on it
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {0}\nB) {1}\nC) {2}\nD) {3}"
)


@dataclass
class Doc:
    """One question (`query`), its possible answers, and the indices of the right ones."""

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
    """A task. `prompt_function(row, task_name)` creates the Doc; the first entry of `metric` judges the answers."""

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
    r"""The unchanged problem; the right answer is in the `\boxed{}` of its solution."""
    return Doc(task_name=task_name, query=line["problem"], choices=[line["solution"]], gold_index=0)


def aime_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """The unchanged problem; the right answer is the number in `answer`."""
    return Doc(
        task_name=task_name, query=line["problem"], choices=["" if line["answer"] is None else str(line["answer"])]
    )


def gpqa_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """A question with four choices. The position of the right one is drawn with a seed that depends only on the
    question, so it is the same in every run (open-r1 draws it again in each run)."""
    gold_index = random.Random(zlib.crc32(line["Question"].encode())).randint(0, 3)
    choices = [line[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
    choices.insert(gold_index, line["Correct Answer"])
    query = GPQA_QUERY.format(*choices, question=line["Question"])
    return Doc(task_name=task_name, query=query, choices=list("ABCD"), gold_index=gold_index, instruction=query)


def gsm8k_prompt_fn(line: dict[str, Any], task_name: str | None = None) -> Doc:
    """The unchanged question; the right answer is the number after `####`."""
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
    """The TASKS_TABLE of a Python file. Its folder is added to sys.path, so that checking workers can import it, too.

    Raises:
        ValueError: the file does not exist, cannot be imported, or has no TASKS_TABLE.
    """
    path = Path(file).expanduser().resolve()
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"there is no Python file at {file}: check --custom_tasks.")
    sys.path.append(str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # a user's file may raise anything
        remedy = "import Doc and LightevalTaskConfig from eval.tasks, metrics from eval.metrics"
        raise ValueError(f"{file} cannot be imported ({type(error).__name__}: {error}): {remedy}.") from error
    if Path(module.__file__ or "") != path:
        raise ValueError(f"{file} has the name of another module ({module.__file__ or 'built in'}): rename it.")
    table = getattr(module, "TASKS_TABLE", None)
    if not isinstance(table, list):
        raise ValueError(f"{file} defines no list TASKS_TABLE: put its LightevalTaskConfigs into one.")
    return table


def check_task(task: LightevalTaskConfig) -> None:
    """Raise ValueError if the task cannot be run. This loads nothing."""
    wrong = None
    if not re.fullmatch(r"\w[\w:.-]*", task.name):
        wrong = "its name may contain only letters, digits, and _ : . -"
    elif not isinstance(task.metric, list) or not task.metric or not hasattr(task.metric[0], "compute"):
        wrong = f"metric must be a list whose first entry has compute(doc, predictions), not {task.metric!r:.80}"
    elif len(task.evaluation_splits) != 1:
        wrong = f"evaluation_splits must name one split, not {task.evaluation_splits}"
    else:
        try:
            pickle.dumps(task.metric[0])
        except Exception as error:
            wrong = f"its metric must pickle, so define it by name in the file, without lambda ({error})"
    if wrong:
        raise ValueError(f"task {task.name!r} cannot be run: {wrong}.")


def find_tasks(names: str, custom: Iterable[LightevalTaskConfig] = ()) -> list[LightevalTaskConfig]:
    """Find tasks by a comma-separated list of names or of LightEval's `suite|task|shots|truncate`.

    "all" means TASKS_TABLE and the custom tasks.

    Raises:
        ValueError: a name is unknown, or few-shot examples are requested.
    """
    known = {task.name: task for task in [*TASKS_TABLE, *MORE_TASKS, *custom]}
    found = []
    for text in filter(None, (part.strip() for part in names.split(","))):
        parts = text.split("|")
        name = parts[0] if len(parts) == 1 else parts[1]
        if len(parts) > 2 and parts[2] != "0":
            raise ValueError(f"{text} asks for {parts[2]} examples in the prompt, which is not supported: write 0.")
        name = ALIASES.get(name, name)
        if name not in known and name != "all":
            close = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown task {name!r}: {hint}Use one of {', '.join(known)}, or all.")
        found += [*TASKS_TABLE, *custom] if name == "all" else [known[name]]
    if not found:
        raise ValueError(f"no task is named: give --tasks one or more of {', '.join(known)}, or all.")
    return list({task.name: task for task in found}.values())


if __name__ == "__main__":
    print([task["name"] for task in TASKS_TABLE])
    print(len(TASKS_TABLE))
