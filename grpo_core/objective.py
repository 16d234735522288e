"""The options of the objective, under TRL's names, and the properties that follow from them.

The formulas are in `loss.py`. Not in this module: the options of a run (`config.py`, which also refuses options that
would have no effect).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Literal

import torch
from torch import Tensor

from grpo_core.user_code import import_function
from sft_core.run.options import Options, option, require

CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")  # the loss types that clip the ratio from both sides
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class ObjectiveOptions(Options):
    """Options that a run and `Objective` have in common. In an `Objective`, a vllm_importance_sampling_mode of None
    means that the sampler's mismatch is not corrected."""

    loss_type: str = option(
        "grpo", f"Objective and aggregation: {', '.join(LOSS_TYPES)}; or a custom per-token loss as module:function."
    )
    beta: float = option(
        0.04,
        "Weight of the KL to the reference model. With 0 no reference model is loaded, and groups whose advantages are "
        "all 0 get no forward and backward pass: they have no gradient, but count in the denominators (unless "
        "entropy_coef, use_adaptive_entropy, top_entropy_quantile or a custom loss_type needs the pass).",
        ge=0,
    )
    epsilon: float = option(0.2, "Lower clip of the ratio, at 1 - epsilon.", ge=0)
    epsilon_high: float | None = option(
        None, "Upper clip of the ratio, at 1 + epsilon_high (default: epsilon); for cispo the cap itself.", ge=0
    )
    delta: float | None = option(
        None, "Upper bound of the unclipped ratio (two-sided clipping); best above 1 + epsilon_high.", gt=1
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio per token, or per sequence (GSPO)."
    )
    use_bias_correction_kl: bool = option(
        False, "Multiply the KL by the ratio, which makes its gradient unbiased too (TRL's default is true)."
    )
    off_policy_mask_threshold: float | None = option(
        None, "Leave out sequences with A < 0 whose mean log(sampler / policy) is above this (DeepSeek-V3.2).", gt=0
    )
    top_entropy_quantile: float = option(
        1.0,
        "Apply the policy term only to this fraction of the step's tokens, those of highest entropy (0.2 in "
        "arXiv:2506.01939). Below 1 each update costs one more forward pass, so that the threshold is exact.",
        ge=0,
        le=1,
    )
    sapo_temperature_pos: float = option(1.0, "sapo: temperature where A > 0.", gt=0)
    sapo_temperature_neg: float = option(1.05, "sapo: temperature where A <= 0.", gt=0)
    vespo_k_pos: float = option(2.0, "vespo: exponent where A >= 0; it lowers the weight of ratios below 1.", ge=0)
    vespo_lambda_pos: float = option(3.0, "vespo: decay where A >= 0; it lowers the weight of ratios above 1.", ge=1e-4)
    vespo_k_neg: float = option(3.0, "vespo: exponent where A < 0.", ge=0)
    vespo_lambda_neg: float = option(2.0, "vespo: decay where A < 0.", ge=1e-4)
    vllm_importance_sampling_mode: str | None = option(
        "token_truncate",
        "Ratio policy / sampler of a token or a sequence, clamped to its bounds (truncate) or 0 outside them (mask).",
        choices=CORRECTIONS,
    )
    vllm_importance_sampling_clip_min: float | None = option(None, "Lower bound of that ratio.", ge=0)
    vllm_importance_sampling_clip_max: float | None = option(
        2.0, "Upper bound of that ratio (alias sampler_ratio_cap); inf: none.", alias="sampler_ratio_cap", le=inf
    )
    entropy_coef: float = option(
        0.0, "Weight of an entropy bonus, the mean over the kept tokens; with use_adaptive_entropy its initial value."
    )


@dataclass(unsafe_hash=True)
class Objective(ObjectiveOptions):
    """The objective's options. Raises ValueError for a value out of bounds, or options that contradict each other.

    `loss_type` may name a custom function, `module:function`, which is called as

        losses = function(logps, log_ratios, advantages, objective)    # losses and the first three arguments are [C]

    It replaces the policy term of each token, and is minimised. `logps` are the policy's log-probs, with gradient.
    `log_ratios` are logps - old_logps, or with importance_sampling_level "sequence" their mean over the sequence.
    `objective` is this object, whose options (such as epsilon) the function may read. A token's loss must not depend on
    other rows. Masks, the correction of the sampler's mismatch and the KL are added to it, and the loss is the mean
    over the step's tokens.
    """

    beta: float = option(0.0, "Weight of the KL to the reference log-probs.", ge=0)
    max_completion_length: int | None = option(None, "dr_grpo: the constant length to divide by.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self)["_frozen"] = True

    def check(self) -> None:
        super().check()
        loss, mode, prefix = self.loss_type, self.vllm_importance_sampling_mode, "vllm_importance_sampling"
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        require(
            loss in LOSS_TYPES or ":" in loss,
            f"loss_type must be one of {', '.join(LOSS_TYPES)} or a custom one as module:function, got {loss!r}",
        )
        require(
            loss != "cispo" or self.epsilon_high is not None,
            "loss_type=cispo needs epsilon_high, its cap on the ratio (the paper's is 5.0)",
        )
        require(
            loss != "cispo" or self.delta is None,
            "delta does not apply to loss_type=cispo, whose cap is epsilon_high: leave delta out",
        )
        require(
            loss != "vespo" or self.correction_by_token,
            f"loss_type vespo needs {prefix}_mode token_truncate or token_mask, not {mode}: it sums tokens' log-ratios",
        )
        require(
            loss != "dr_grpo" or self.max_completion_length is not None,
            "loss_type=dr_grpo needs max_completion_length: it divides by that constant length",
        )
        require(
            high is None or high > (low or 0),
            f"{prefix}_clip_max (sampler_ratio_cap) must be above 0 and {prefix}_clip_min, got {high} and {low}",
        )
        require(
            not str(mode).endswith("truncate") or (low, high) != (None, None),
            f"{prefix}_mode={mode} truncates at {prefix}_clip_min and {prefix}_clip_max: give one (inf for no bound)",
        )
        if ":" in loss:
            try_own(self)

    @property
    def own(self) -> Callable[..., Tensor] | None:
        """The custom function, if `loss_type` names one."""
        return import_function(self.loss_type, "loss_type") if ":" in self.loss_type else None

    @property
    def high(self) -> float:
        """How far above 1 a ratio may go; for "cispo" the largest ratio itself."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_by_token(self) -> bool:
        """Whether the ratio to the old policy is per token, not per sequence."""
        return self.importance_sampling_level == "token"

    @property
    def correction_by_token(self) -> bool:
        """Whether the ratio to the sampler is per token, not per sequence."""
        return not str(self.vllm_importance_sampling_mode).startswith("sequence")

    @property
    def by_token(self) -> bool:
        """Whether a token's loss depends on no other token's log-prob, so that the head can compute loss and gradient
        in one sweep. Otherwise all log-probs of the sequence are needed first."""
        whole = self.off_policy_mask_threshold is not None or self.loss_type == "vespo"
        return self.ratio_by_token and self.correction_by_token and not whole

    @property
    def by_advantage(self) -> bool:
        """Whether a token with advantage 0 has no gradient, as in the built-in policy terms without KL and bonus."""
        return not (self.beta or self.entropy_coef or self.own)


def check_own_losses(losses: Tensor, logps: Tensor, name: str) -> None:
    """Raise ValueError unless a custom function returned one loss for each of `logps`."""
    fits = isinstance(losses, Tensor) and losses.shape == logps.shape and losses.dtype == logps.dtype
    found = getattr(losses, "dtype", type(losses).__name__), tuple(getattr(losses, "shape", ()))
    require(fits, f"{name} must return losses {tuple(logps.shape)} of {logps.dtype}, not {found[0]} {found[1]}")


@cache  # by value: every step of a run makes an equal objective
def try_own(objective: Objective) -> None:
    """Call the custom function on a few tokens, all at once and each alone. Raises ValueError if it cannot be used."""
    function, name = objective.own, objective.loss_type
    assert function is not None
    logps = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    tokens = logps, logps - torch.tensor([-1.0, -2.0, -0.7]), torch.tensor([1.0, -0.5, -2.0])
    try:
        losses = function(*tokens, objective)
        alone = [function(*(values[i : i + 1] for values in tokens), objective) for i in range(3)]
    except Exception as error:  # custom code may raise anything
        raise ValueError(f"{name} must accept (logps, log_ratios, advantages, objective): {error!r}") from error
    for found, given in zip([losses, *alone], [logps, *logps[:, None]], strict=True):
        check_own_losses(found, given, name)
    require(losses.requires_grad, f"{name} must compute its losses from logps or log_ratios: they have no gradient")
    require(
        torch.allclose(torch.cat(alone), losses, equal_nan=True),
        f"{name} must compute each token's loss from that token alone: it changes with the other tokens of a call",
    )
