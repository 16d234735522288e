"""Logs a run: its options and plan before it starts, then the metrics of each step.

Metrics are reduced over the ranks once per step and written, with text samples, to TensorBoard, JSONL files, trackers
(`trackers.py`) and the console. Watch them with `tensorboard --logdir OUTPUT_DIR/runs`, or read `metrics.jsonl` and
`completions.jsonl`, which have one object per line.

Not supported, on purpose: averages over logging windows (a logged value is that of its step alone), and plots.
"""

import json
import logging
import math
import os
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sft_core.run.config import TrainingConfig
from sft_core.run.distributed import is_first_rank
from sft_core.run.files import write_atomically

logger = logging.getLogger(__name__)
OWN = {"tensorboard", "none"}  # `trackers.py` handles the others


def start_logging() -> None:
    """Print warnings and errors to stderr, with time and logger name."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.WARNING,
    )


def set_log_level(config: TrainingConfig) -> None:
    """Set `log_level` for this program, datasets and transformers; `passive` changes nothing."""
    import datasets  # imported only if rows are read

    if config.log_level == "passive":
        return
    level = getattr(logging, config.log_level.upper())
    for package in ("sft_core", "gen", "eval", "grpo_core"):
        logging.getLogger(package).setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    datasets.utils.logging.disable_propagation()  # it has a handler of its own
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()


def init_wandb_training(training_args: TrainingConfig) -> None:
    """open-r1's function: set wandb_entity, wandb_project and wandb_run_group for all uses of wandb in the process."""
    for name in ("entity", "project", "run_group"):
        if (value := getattr(training_args, f"wandb_{name}", None)) is not None:
            os.environ[f"WANDB_{name.upper()}"] = value


def announce(run: Any) -> None:
    """Print the plan on the first rank; log the options, and warnings about options that have no effect here.

    `run`: `sft_core.prepare.Base` with `config` and `summary`.
    """
    logger.info("Process rank: %d of %d, device: %s", run.rank, run.world_size, run.device)
    if run.rank != 0:
        return
    model, config = run.model, run.config
    dtype, ranks = "bfloat16" if run.bf16 else "float32", "rank" if run.world_size == 1 else "ranks"
    kind = torch.device(run.device).type
    print(f"{run.world_size} {ranks} on {kind}, computing in {dtype}, master weights in float32")
    logger.info("Model parameters %s", model)
    logger.info("Script parameters %s", run.data)
    logger.info("Training parameters %s", config)
    if model.attn_implementation in ("eager", "sdpa"):
        logger.warning("attn_implementation %s is ignored: attention is always packed.", model.attn_implementation)
    if config.optim not in ("adamw_torch", "adamw_torch_fused"):
        logger.warning("optim %s is replaced by AdamW with float32 moments, sharded over the ranks.", config.optim)
    if config.lr_scheduler_type == "constant" and (config.warmup_steps or config.warmup_ratio):
        logger.warning("lr_scheduler_type constant has no warm-up: use constant_with_warmup.")
    if getattr(config, "vllm_mode", "colocate") == "server":
        logger.warning("vllm_mode server is ignored: the engine runs inside the ranks (colocate), without a server.")
    print(run.summary)
    if run.checkpoint is not None:
        print(f"resuming from {run.checkpoint}")


def reduction(name: str) -> str:
    """How parts of a metric are combined over micro-batches and ranks. The last word of its name decides: minimum or
    maximum (`clip_ratio/low_min`, `peak_memory_gib/max`), else sum."""
    return {"min": "amin", "max": "amax"}.get(re.split("[/_]", name)[-1], "sum")


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the metrics of a step's micro-batches, which all have the same names."""
    return {name: getattr(torch, reduction(name))(torch.stack([part[name] for part in parts])) for name in parts[0]}


def reduce_metrics(values: Mapping[str, Tensor | float], *, device: torch.device | str = "cpu") -> dict[str, float]:
    """Reduce each metric over all ranks (see `reduction`), with ONE collective and one copy to the host.

    Values are scalars: tensors on `device`, or floats. Every rank passes the same names, in any order. They are packed
    as float64 and reduced in rank order, so that every rank gets the same bits. NaN stays NaN.
    """
    names = sorted(values)
    fingerprint = float(zlib.crc32(repr(names).encode()))
    shares = [fingerprint, *(values[name] for name in names)]
    local = torch.stack([torch.as_tensor(share, dtype=torch.float64, device=device).detach() for share in shares])
    gathered = local[None]  # [ranks, 1 + metrics]
    if dist.is_initialized() and dist.get_world_size() > 1:
        rows = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, local)
        gathered = torch.stack(rows)
    reduced = {kind: getattr(gathered, kind)(0) for kind in ("sum", "amin", "amax")}
    columns = [reduced[reduction(name)][i] for i, name in enumerate(names, 1)]
    difference, *found = torch.stack([(gathered[:, 0] - gathered[0, 0]).abs().sum(), *columns]).tolist()
    assert difference == 0, f"ranks reduce different metrics; this one has {names}"
    return dict(zip(names, found, strict=True))


class MetricsLogger:
    """Logs on the first rank; elsewhere the same calls do nothing.

    On resume, lines after `resume_step` are removed from the JSONL files and from TensorBoard, so that a step that is
    computed twice is logged once.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str] = ("tensorboard",),
        resume_step: int = 0,
        options: Mapping[str, Any] | None = None,
        console: Sequence[str] = (),
        total_steps: int | None = None,
    ) -> None:
        """`console`: the metrics of the console line, in order; absent ones are left out. `options`: the run's options,
        which are logged. Raises ValueError on every rank if a tracker's package is not installed.
        """
        report_to = check_report_to(report_to)
        self.console, self.total_steps = console, total_steps
        self._files: dict[str, TextIO] = {}
        self._tensorboard: SummaryWriter | None = None
        self._trackers: Any = None
        if not is_first_rank():
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "completions"):
            path = folder / f"{name}.jsonl"
            cut_back(path, resume_step or -1)  # an evaluation before the first step has step 0
            self._files[name] = open(path, "a", encoding="utf-8")
        options = options or {}
        if "tensorboard" in report_to:
            self._tensorboard = SummaryWriter(folder / "runs", purge_step=resume_step and resume_step + 1)
            lines = [
                f"    {key}: {value}" for key, value in options.items()
            ]  # indented, so that Markdown shows it as code
            self._tensorboard.add_text("config", "\n".join(lines), resume_step)
        if not set(report_to) <= OWN:
            from sft_core.run.trackers import Trackers

            self._trackers = Trackers(report_to, folder, options, resume_step, total_steps or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log floats under their names at `step`. When this returns, they survive kill -9."""
        if not self._files:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._append("metrics", [{"step": step, **finite}])
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._trackers is not None:
            self._trackers.log(step, values)
        shown = [f"{name} {values[name]:.4g}" for name in self.console if name in values]
        if shown:
            of_total = f"/{self.total_steps}" if self.total_steps else ""
            tqdm.write(f"step {step}{of_total} | " + " | ".join(shown))

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log sampled text to completions.jsonl and as text to TensorBoard. Each sample is one mapping, such as
        {prompt, completion, rewards..., advantage}."""
        if not self._files or not rows:
            return
        self._append("completions", [{"step": step, **row} for row in rows])
        if self._tensorboard is not None:
            self._tensorboard.add_text("completions", "\n\n---\n\n".join(map(_markdown, rows)), step)
            self._tensorboard.flush()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._files[name].write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._files[name].flush()

    def close(self, failed: bool = False) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files = {}
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._trackers is not None:
            self._trackers.close(failed)


def check_report_to(report_to: Sequence[str]) -> Sequence[str]:
    """The trackers to report to, with `all` expanded. Raises ValueError if one is unknown or not installed."""
    if set(report_to) <= OWN:
        return report_to
    from sft_core.run.trackers import named  # a slow import: transformers' trainer

    return named(report_to)


def cut_back(path: Path, step: int) -> None:
    """Keep only the lines of a JSONL file up to and including `step`, atomically; an incomplete line is removed too."""
    if not path.is_file():
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(kept))


def _markdown(row: Mapping[str, Any]) -> str:
    numbers = " | ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))
    texts = [f"**{key}**\n\n{textwrap.indent(text, '    ')}" for key, text in row.items() if isinstance(text, str)]
    return "\n\n".join([*texts, numbers])
