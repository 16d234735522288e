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


def check_schedule(config: TrainingConfig, total_steps: int) -> None:
    """Raise ValueError where lr_scheduler_kwargs do not fit lr_scheduler_type, or not `total_steps`."""
    kind, given = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs or {})
    if given and kind in ("constant", "constant_with_warmup"):  # transformers would drop them in silence
        raise ValueError(f"lr_scheduler_kwargs {given} mean nothing to {kind}: remove them.")
    warmup = warmup_steps(config, total_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        [factor] = make_scheduler(optimizer, config, total_steps).lr_lambdas
        last = factor(total_steps)
        stages = sum(given.get(name, 0) for name in ("num_decay_steps", "num_stable_steps"))
    except (TypeError, ValueError, KeyError) as error:  # transformers' own words
        raise ValueError(
            f"lr_scheduler_kwargs {given} do not fit {kind}: {error} (YAML reads 1e-6 as text: write 1.0e-6)."
        ) from error
    if warmup + stages > max(warmup, total_steps) or not 0 <= last < math.inf:
        raise ValueError(
            f"lr_scheduler_kwargs {given} do not fit {kind} over {total_steps} steps, {warmup} of them to warm up: its "
            "stages must not be longer, and no learning rate below 0."
        )


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """A number of steps, or a share of them."""
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
