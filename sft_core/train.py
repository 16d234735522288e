"""Supervised fine-tuning of a causal language model on conversations, in one loop.

    torchrun --nproc_per_node 8 -m sft_core.train --config recipe.yaml [--field value ...]
    python -m sft_core.train --model_name_or_path M --dataset_name rows.jsonl --output_dir runs/sft

The loss is the mean negative log-likelihood of the step's trained tokens (the assistant's messages, including the
end-of-turn token). Rows are packed end to end without padding and cannot attend to each other. The mean is over the
whole optimizer step on all ranks, so the gradient does not depend on the number of micro-batches or ranks. The same
command resumes from the last complete checkpoint. GRPO (`grpo_core/train.py`) is this loop plus rollouts.

`dataset.py` tokenises the rows, `sampler.py` chooses the rows of a step, `data/packing.py` packs them into
micro-batches, and `lifecycle.py` has everything around the loop (resume, log, save, close).
Not supported, on purpose: padding, NEFTune, dropout other than the adapters' own, sequences split over ranks.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sft_core import lifecycle
from sft_core.data.packing import PackedSequences, balance, idle_sequences, pack, pack_sequences, step_counts
from sft_core.dataset import Example
from sft_core.lifecycle import TrainingRun
from sft_core.model.adapters import dropout
from sft_core.model.flops import attention_share, peak_flops, training_flops
from sft_core.model.optim import clip_gradients, guarded_step
from sft_core.model.policy import Policy
from sft_core.prepare import EVAL_METRICS, Run, prepare
from sft_core.run import distributed
from sft_core.run.callbacks import Callbacks, Handed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig
from sft_core.run.files import disk_errors
from sft_core.run.logging import reduce_metrics, start_logging

OPTIONS = (ModelConfig, ScriptArguments, SFTConfig)
CONSOLE = ("loss", "eval_loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "tokens_per_second")


@dataclass
class Progress(lifecycle.Progress):
    order: dict[str, Any] = field(default_factory=dict)  # which rows come next: the state of `run.source`


@disk_errors()
def main(argv: list[str] | None = None, callbacks: Sequence[Any] = ()) -> None:
    """Train with the options in `argv` (default: the command line) and transformers' TrainerCallbacks.

    Bad input exits with code 2 before weights are loaded.
    """
    start_logging()
    with distributed.usage_errors():
        run = prepare(*parse(OPTIONS, sys.argv[1:] if argv is None else argv))
    if callbacks:
        run = replace(run, handed=Handed(None, callbacks=Callbacks(callbacks)))
    with TrainingRun(run, Progress(), CONSOLE, run.samples) as training:
        train(run, training)
        training.finish()


def train(run: Run, training: TrainingRun[Progress]) -> None:
    """The training loop."""
    config, device, progress, phases = run.config, run.device, training.progress, training.phases
    policy = training.load_policy(vocab_size=len(run.tokenizer))
    torch.manual_seed(config.seed + run.rank)  # for the dropout of adapters
    trained = training.resume(policy)
    if run.checkpoint is not None:
        run.source.resume(progress.order)
    training.start()

    def save() -> None:
        training.save(trained)

    def measure() -> dict[str, float]:
        with phases("eval", watchdog_s=0):
            return evaluate(policy, run)

    training.evaluate_first(measure)
    peak_rate, quadratic = peak_flops(device), attention_share(run.model_info)
    while training.goes_on:
        start = time.perf_counter()
        # 1 batch: take the step's rows, and pack this rank's share into micro-batches
        with phases("batch"):
            with training.bad_input():  # streamed rows are first read and checked here
                examples = run.source.take(run.sequences_per_step)
            lengths = [len(ids) for ids, _ in examples]
            cost = [length + quadratic * length**2 for length in lengths]
            shares = balance(lengths, cost, config.max_tokens_per_micro_batch, run.world_size)
            batches = [pack_rows([examples[i] for i in members], device) for members in shares[run.rank] if members]
        # 2 denominator: count the step's trained tokens over all ranks, before the first backward pass
        counts = step_counts(batches, device)
        # 3 forward and backward
        with phases("train"), dropout(policy):
            sums = {name: torch.zeros((), device=device) for name in ("loss", "entropy", "mean_token_accuracy")}
            weight = 1 / counts.num_tokens
            losses = partial(token_losses, loss_type=config.loss_type, weight=weight)
            # Every rank makes the same number of passes, so that the collectives match.
            for batch in batches + [idle_sequences(device)] * (counts.micro_batches - len(batches)):
                loss, logps, entropies, best_logps = policy(batch, token_loss=losses)
                loss.backward()
                sums["loss"] += loss.detach()
                sums["entropy"] += weight * entropies.sum()
                sums["mean_token_accuracy"] += weight * (logps >= best_logps).sum()
            grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)
            sums["peak_memory_gib/max"] = distributed.peak_memory_gib(device)
            sums["stop/max"] = float(training.stop.requested)
            metrics = reduce_metrics(sums, device=device)
            training.stopping = bool(metrics.pop("stop/max"))
            # 4 step, unless the loss or the gradient norm is not finite
            learning_rate = guarded_step(trained.optimizer, trained.scheduler, metrics["loss"], float(grad_norm))
        progress.samples += len(examples)
        progress.order = run.source.state()
        timing = training.count_step(start, sum(lengths), metrics["loss"])
        # 5 log, evaluate, save
        if training.due("logging"):
            flops = training_flops(run.model_info, lengths) / timing["step_time"] / run.world_size
            metrics |= timing | run.source.metrics()
            metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
            metrics["tflops"] = flops / 1e12  # per device
            if peak_rate is not None and not run.model.use_peft:  # with adapters a part of these FLOPs is not computed
                metrics["mfu"] = flops / peak_rate
            training.log(progress.step, metrics)
        training.end_step(save, measure)
    training.end(policy, save, measure)


def token_losses(
    logps: Tensor, entropies: Tensor | None = None, rows: Any = None, *, loss_type: str, weight: float = 1.0
) -> Tensor:  # [N], unused -> [N]
    """nll: -log p. dft: -p log p with p detached (arXiv:2508.05629), so that unlikely tokens weigh less."""
    return -weight * (logps if loss_type == "nll" else logps.detach().exp() * logps)


def pack_rows(rows: list[Example], device: torch.device) -> PackedSequences:
    return pack_sequences([ids for ids, _ in rows], [mask for _, mask in rows], device)


@torch.no_grad()
def evaluate(policy: Policy, run: Run) -> dict[str, float]:
    """Means over the trained tokens of the test rows: loss, entropy [nats] and token accuracy. A collective."""
    assert run.test_examples is not None
    bins = pack(run.test_examples.lengths.tolist(), run.config.max_tokens_per_micro_batch)
    names = (*EVAL_METRICS, "tokens")
    sums = {name: torch.zeros((), device=run.device, dtype=torch.float64) for name in names}
    for start in range(0, len(bins), run.world_size):  # the same number of passes on every rank
        own = bins[start + run.rank] if start + run.rank < len(bins) else None
        rows = run.test_examples.rows[own] if own else None
        batch = pack_sequences(rows["input_ids"], rows["loss_mask"], run.device) if rows else idle_sequences(run.device)
        logps, entropies, best_logps = policy(batch)
        sums["eval_loss"] += token_losses(logps, loss_type=run.config.loss_type).sum()
        sums["eval_entropy"] += entropies.sum()
        sums["eval_mean_token_accuracy"] += (logps >= best_logps).sum()
        sums["tokens"] += len(logps)
    totals = reduce_metrics(sums, device=run.device)
    tokens = totals.pop("tokens")
    return {name: value / tokens for name, value in totals.items()} | {
        "eval_samples": float(len(run.test_examples.lengths))
    }


if __name__ == "__main__":
    main()
