"""Does GRPO here learn as TRL 1.16's GRPOTrainer does? The same model, prompts, rewards and options, three seeds each.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0
    python tests/beside/learning.py letters MODEL --trl_python /tmp/trl/bin/python
    python tests/beside/learning.py sums runs/quickstart/sft --data runs/quickstart/data/train.jsonl --trl_python ...
    python tests/beside/learning.py words runs/score/sft --data data/words/grpo_train.jsonl --trl_python ...

`letters` pays the share of the letter e in 12 tokens after a few words: every group has signal. `sums` and `words` pay
1 for the right answer to a word problem: `sums` is for the quickstart's model and data, `words` for a warm start and
its training problems from `python -m grpo_core.score`. Both sides compute in float32, without KL, and sample from a
transformers model without top-p or top-k. Each seed of a side has a process of its own. Steps are appended to
curves.jsonl beside this file; seeds that are there are not run again. Written last: curves.png, the mean reward of
each step with the range of the seeds, and a table.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CURVES = HERE / "curves.jsonl"
SIDES = ("grpo_core", "TRL")
TASKS: dict[str, dict[str, Any]] = {
    "letters": {"steps": 20, "prompts": 4, "max_completion_length": 12, "learning_rate": 5e-5},
    "sums": {"steps": 50, "prompts": 24, "max_completion_length": 32, "learning_rate": 3e-4, "adam_beta2": 0.95},
    "words": {"steps": 12, "prompts": 4, "max_completion_length": 20, "learning_rate": 3e-5},
}
GROUP = 8  # completions per prompt
SUBJECTS = ("The weather", "My sister", "A good book", "The old house", "Our teacher", "This city", "The train")
VERBS = ("is", "was", "has", "can", "will", "never", "often", "may")
METRICS = ("reward", "reward_std", "entropy", "grad_norm", "completions/mean_length", "frac_reward_zero_std")


def share_of_e(completions: list[str], **columns: Any) -> list[float]:
    return [text.count("e") / max(1, len(text)) for text in completions]


def right_answer(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
    """1 where the last number is the solution."""
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", completion[0]["content"]) for completion in completions]
    return [float(bool(n) and float(n[-1]) == float(s)) for n, s in zip(numbers, solution, strict=True)]


def train(side: str, task: str, model: str, seed: int, data: str | None) -> None:
    if side == "TRL":
        from trl import GRPOConfig, GRPOTrainer
    else:
        sys.path.insert(0, str(HERE.parents[1]))
        from grpo_core import GRPOConfig, GRPOTrainer
    from datasets import Dataset
    from transformers import TrainerCallback

    if task == "letters":
        rows: list[dict[str, Any]] = [{"prompt": f"{a} {b}"} for a, b in itertools.product(SUBJECTS, VERBS)]
    else:
        problems = [json.loads(line) for line in Path(data or "").read_text().splitlines()]
        texts = [row.get("problem") or row["prompt"] for row in problems]
        rows = [
            {"prompt": [{"role": "user", "content": text}], "solution": row["solution"]}
            for text, row in zip(texts, problems, strict=True)
        ]
    options = dict(TASKS[task])
    batch, max_steps = options.pop("prompts") * GROUP, options.pop("steps")

    class Record(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
            if "reward" in logs:
                row = {"task": task, "side": side, "seed": seed, "step": state.global_step}
                row |= {name: float(f"{float(logs[name]):.6g}") for name in METRICS if name in logs}
                print("STEP", json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=max_steps,
            num_generations=GROUP,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            per_device_train_batch_size=batch,
            beta=0.0,
            epsilon=0.2,
            temperature=1.0,
            loss_type="dapo",
            scale_rewards="group",
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            **options,
            **({"use_cpu": True} if side == "TRL" else {"engine": "torch", "max_prompt_length": 128}),
        )
        reward = share_of_e if task == "letters" else right_answer
        GRPOTrainer(model, reward, config, train_dataset=Dataset.from_list(rows), callbacks=[Record()]).train()


def curves(task: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(side, seed) -> its steps."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in CURVES.read_text().splitlines() if CURVES.exists() else []:
        row = json.loads(line)
        if row["task"] == task:
            found.setdefault((row["side"], row["seed"]), []).append(row)
    return found


def run(side: str, seed: int, python: str, argv: list[str]) -> None:
    """One seed of a side, in a process of its own; its steps are kept when it has ended well."""
    command = [python, __file__, *argv, "--side", side, "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        if line.startswith("STEP "):
            steps.append(line.removeprefix("STEP "))
            print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"{side}, seed {seed}: exit code {process.returncode}")
    with CURVES.open("a") as file:
        file.writelines(steps)


def summary(task: str, last: int = 5) -> str:
    """Reward of the first and the last steps of each side: mean over the seeds, and each seed's."""
    lines = [f"| {task} | reward, first {last} steps | last {last} | of each seed |", "|---|---|---|---|"]
    for side in SIDES:
        runs = [[row["reward"] for row in rows] for (name, _), rows in sorted(curves(task).items()) if name == side]
        if runs:
            first, ends = ([statistics.mean(run[part]) for run in runs] for part in (slice(last), slice(-last, None)))
            each = ", ".join(f"{end:.3f}" for end in ends)
            lines.append(f"| {side} | {statistics.mean(first):.3f} | {statistics.mean(ends):.3f} | {each} |")
    return "\n".join(lines)


def draw() -> None:
    """One panel per task: the mean reward of each step, and the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS if curves(task)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        for side, colour in zip(SIDES, ("tab:blue", "tab:orange"), strict=True):
            runs = [[row["reward"] for row in rows] for (name, _), rows in curves(task).items() if name == side]
            if runs:
                steps = range(1, len(runs[0]) + 1)
                by_step = list(zip(*runs, strict=True))
                axes.plot(steps, [statistics.mean(values) for values in by_step], colour, label=side)
                axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=colour, alpha=0.2)
        axes.set(xlabel="step", ylabel="mean reward", title=task)
        axes.legend()
    figure.savefig(HERE / "curves.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", help="folder of a chat model")
    parser.add_argument("--data", help="of sums and words: JSON lines with `problem` or `prompt`, and `solution`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task != "letters" and not (options.data and Path(options.data).is_file()):
        parser.error(f"{options.task} needs --data FILE with problems and solutions, got {options.data}")
    if options.side:
        return train(options.side, options.task, options.model, options.seed, options.data)
    for seed in options.seeds:
        for side in options.sides:
            if (side, seed) not in curves(options.task):
                run(side, seed, options.trl_python if side == "TRL" else sys.executable, sys.argv[1:])
    draw()
    print(summary(options.task))


if __name__ == "__main__":
    main()
