"""Compare every step of TRL's SFTTrainer and ours on one model, with the same rows, order and options.

TRL is not a dependency: it has a separate environment, which runs the first of the two commands.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 transformers==5.19.0 trl==1.16.0
    /tmp/trl/bin/python tests/sft_core/trl_losses.py MODEL ROWS.jsonl OUT.json [--max_length 128 ...]   # TRL's steps
    python tests/sft_core/trl_losses.py MODEL ROWS.jsonl OUT.json --ours                                # our steps

MODEL is a folder, and ROWS are as in training; rows of `question` and `answer` (GSM8K) become prompt and completion.
The options are those below, with names that both trainers know; the second command reads them from OUT.json. Both run
in float32 on the CPU, without packing. This command writes `trl_sft_losses.json`, which `test_trl_parity.py` reads:

    /tmp/trl/bin/python tests/sft_core/trl_losses.py --fixture
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).with_name("trl_sft_losses.json")
METRICS = ("loss", "grad_norm", "mean_token_accuracy")
OPTIONS: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "loss_type": "nll",
    "seed": 42,
}
TINY = OPTIONS | {"per_device_train_batch_size": 4, "max_length": 72, "learning_rate": 5e-3, "warmup_steps": 3}
CASES = {
    "messages": TINY | {"assistant_only_loss": True},
    "prompt_completion": TINY | {"lr_scheduler_type": "constant"},
    "dft": TINY | {"assistant_only_loss": True, "loss_type": "dft"},
    "whole_conversation": TINY | {"assistant_only_loss": False},
    "whole_prompt_completion": TINY | {"completion_only_loss": False},
    "text": TINY | {"assistant_only_loss": False},
}


def case_rows(name: str) -> list[dict[str, Any]]:
    """100 arithmetic problems with solutions, as conversations of one or two turns, prompt and completion, or one text.

    Ten are longer than the case's max_length, and some of these have no trained tokens left.
    """
    from grpo_core.quickstart.task import make_splits, write_demonstration

    rng = random.Random(0)
    problems = make_splits(0, {"rows": 150})["rows"]
    rows: list[dict[str, Any]] = []
    for i, problem in enumerate(problems[:100]):
        text = problem.text if i % 10 else " ".join(p.text for p in problems[i : i + 2 + i // 25])
        answer = write_demonstration(problem, rng, slips=0.0)
        if name.endswith("prompt_completion"):
            rows.append({"prompt": text, "completion": answer})
            continue
        if name == "text":
            rows.append({"text": text + answer})
            continue
        turns = [("user", text), ("assistant", answer)]
        if i % 3 == 0:
            turns += [("user", "How many?"), ("assistant", str(problem.answer))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def read_rows(path: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if "question" in rows[0]:
        return [{"prompt": row["question"].strip() + "\n", "completion": row["answer"].strip()} for row in rows]
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trl_steps(model: str, rows: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradient norm and accuracy, in float32, of every step that TRL takes.

    TRL logs the plain mean of its micro-batches' accuracies. Here they are weighted by their tokens, like ours.
    """
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    sys.path.append(str(ROOT))
    from sft_core.data.rows import row_order

    accuracies: list[tuple[float, int]] = []  # per micro-batch, with its number of trained tokens

    class Recorder(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            accuracies.append((self._metrics["train"]["mean_token_accuracy"][-1], tokens))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", rows)
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            packing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataset_num_proc=None,
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": "float32"},
            **options,
        )
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        trainer = Recorder(model=model, args=config, train_dataset=data)
        kept = len(trainer.train_dataset)  # TRL removes rows without trained tokens
        wanted = options["max_steps"] * options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        trainer.train_dataset = trainer.train_dataset.select(row_order(kept, options["seed"], 0, wanted))
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps: dict[str, list[float]] = {name: [entry[name] for entry in log] for name in METRICS[:2]}
    steps["mean_token_accuracy"] = []
    for start in range(0, len(accuracies), options["gradient_accumulation_steps"]):
        micro = accuracies[start : start + options["gradient_accumulation_steps"]]
        steps["mean_token_accuracy"].append(sum(a * n for a, n in micro) / sum(n for _, n in micro))
    return {"options": options, "rows": len(rows), "rows_with_something_to_learn": kept, **steps}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("trl", "transformers", "torch")}


def write_fixture() -> None:
    sys.path.append(str(ROOT))
    from tests.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder)))
        cases = {name: trl_steps(model, case_rows(name), options) for name, options in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    FIXTURE.write_text(f'{{"versions": {json.dumps(versions())}, "cases": {{\n{lines}\n}}}}\n')


def our_flags(model: str, rows: Path, out: Path, options: dict[str, Any]) -> list[str]:
    """The same options for `sft_core.train`."""
    same = {"model_name_or_path": model, "dataset_name": rows, "output_dir": out, "bf16": False} | options
    return [f"--{name}={value}" for name, value in same.items()] + ["--save_strategy=no", "--report_to=none"]


def compare(model: str, rows: list[dict[str, Any]], theirs: dict[str, Any]) -> None:
    """Train with our trainer and print the steps next to TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        argv = our_flags(model, write_rows(Path(folder) / "rows.jsonl", rows), out, theirs["options"])
        subprocess.run([sys.executable, "-m", "sft_core.train", *argv], cwd=ROOT, check=True)
        ours = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    print("step" + "".join(f"{f'{who} {name}':>28}" for name in METRICS for who in ("TRL", "ours")))
    for i, row in enumerate(ours):
        print(f"{i + 1:4}" + "".join(f"{theirs[name][i]:28.7f}{row[name]:28.7f}" for name in METRICS))
    for name in METRICS:
        largest = max(abs(a - row[name]) for a, row in zip(theirs[name], ours, strict=True))
        print(f"largest difference of {name}: {largest:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="MODEL ROWS.jsonl OUT.json")
    parser.add_argument("--ours", action="store_true", help="train with ours and compare with OUT.json")
    parser.add_argument("--fixture", action="store_true", help="write trl_sft_losses.json")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    if arguments.fixture:
        return write_fixture()
    if len(arguments.paths) != 3:
        parser.error("give MODEL ROWS.jsonl OUT.json, or --fixture")
    model, file, out = arguments.paths
    rows = read_rows(file)
    if arguments.ours:
        return compare(str(Path(model).resolve()), rows, json.loads(Path(out).read_text()))
    options = {name: getattr(arguments, name) for name in OPTIONS}
    result = {"versions": versions(), **trl_steps(model, rows, options)}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
