"""AdamW on float32 masters, the learning-rate schedules, and the guarded optimizer step.

Left out on purpose: 8-bit and second-order optimizers, per-layer learning rates, loss scaling (bfloat16 needs none).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sft_core.run.config import TrainingConfig


def make_optimizer(policy: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused; weight decay on matrices only, as is usual."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trainable), "master weights must be float32"
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    assert all(group["fused"] for group in optimizer.param_groups)
    return optimizer


def check_schedule(config: TrainingConfig) -> None:
    """Raise ValueError where lr_scheduler_kwargs do not fit lr_scheduler_type."""
    kind = config.lr_scheduler_type
    arguments: dict = config.lr_scheduler_kwargs or {}
    unknown = set(arguments) - ({"min_lr", "min_lr_rate"} if kind == "cosine_with_min_lr" else set())
    if unknown:
        raise ValueError(f"lr_scheduler_kwargs {sorted(unknown)} mean nothing to {kind}: remove them.")
    if kind == "cosine_with_min_lr" and len(arguments) != 1:
        raise ValueError(
            'cosine_with_min_lr needs one of min_lr, min_lr_rate: lr_scheduler_kwargs {"min_lr_rate": 0.1}.'
        )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> LambdaLR:
    """The schedule over `total_steps` optimizer steps, as transformers defines it under the same name."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps or math.ceil(config.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the global gradient norm (over all ranks) to `max_norm` (0: leave it) and return what it was, a scalar.

    The norm is the same number on every rank, so that a guard on it decides alike everywhere.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def guarded_step(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, loss: float, grad_norm: float) -> float:
    """Take the optimizer step and return the learning rate it used.

    Raises:
        RuntimeError: loss or gradient norm is not finite; nothing has been stepped. `loss` and `grad_norm` are totals
            over all ranks, so every rank raises together.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RuntimeError(
            f"loss {loss} or gradient norm {grad_norm} is not finite: nothing was stepped. Resume from the last "
            "checkpoint with a lower learning_rate, or replay the step's rollouts to find the cause."
        )
    learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return learning_rate
