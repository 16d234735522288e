"""AdamW on float32 masters, the learning-rate schedules, and the guarded optimizer step.

Not supported, on purpose: 8-bit and second-order optimizers, per-layer learning rates, loss scaling (bfloat16 needs
none).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sft_core.run.config import TrainingConfig


def make_optimizer(policy: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, with weight decay on matrices only, as usual."""
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


def check_schedule(config: TrainingConfig, total_steps: int) -> None:
    """Raise ValueError if lr_scheduler_kwargs do not fit lr_scheduler_type or `total_steps`."""
    kind, given = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs or {})
    if given and kind in ("constant", "constant_with_warmup"):  # transformers would ignore them silently
        raise ValueError(f"lr_scheduler_type {kind} takes no lr_scheduler_kwargs, got {given}: remove them.")
    warmup = warmup_steps(config, total_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        [factor] = make_scheduler(optimizer, config, total_steps).lr_lambdas
        last = factor(total_steps)
        stages = sum(given.get(name, 0) for name in ("num_decay_steps", "num_stable_steps"))
    except (TypeError, ValueError, KeyError) as error:  # raised by transformers
        raise ValueError(
            f"lr_scheduler_kwargs {given} do not fit {kind}: {error}; correct them (as numbers, not as texts)."
        ) from error
    if warmup + stages > max(warmup, total_steps) or not 0 <= last < math.inf:
        raise ValueError(
            f"lr_scheduler_kwargs {given} do not fit {kind} over {total_steps} steps with {warmup} warm-up steps: make "
            "its stages at most as long as the run, and its last learning rate at least 0."
        )


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """The number of warm-up steps, which options give as a number or as a share of all steps."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil((config.warmup_steps or config.warmup_ratio) * total_steps)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> LambdaLR:
    """The schedule over `total_steps` optimizer steps, as transformers defines it under the same name."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the global gradient norm (over all ranks) to `max_norm` (0: no clipping); returns the norm before clipping.

    The norm, a scalar, is the same number on every rank, so that all ranks decide alike whether to take the step.
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
        RuntimeError: loss or gradient norm is not finite; neither optimizer nor schedule was stepped. Both values are
            totals over all ranks, so all ranks raise together.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RuntimeError(
            f"loss {loss} or gradient norm {grad_norm} is not finite, so the step was not taken: resume from the last "
            "checkpoint with a lower learning_rate, or replay the step's rollouts to find the cause."
        )
    learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return learning_rate
