"""Which objective: the options of `loss.py` under TRL's names, and what follows from them.

The mathematics is in `loss.py`. Left out on purpose: what an option means to a run (`config.py` refuses those that
would have no effect there).
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
    """Those of a run and of `Objective`. In an objective a vllm_importance_sampling_mode of None says that the
    sampler's mismatch is not corrected."""

    loss_type: str = option(
        "grpo", f"Aggregation and objective: {', '.join(LOSS_TYPES)}; or your own per-token one as module:function."
    )
    beta: float = option(
        0.04,
        "Weight of the KL to the reference model; 0: no reference model is loaded, and groups whose advantages are all "
        "0 get no forward and backward pass: they have no gradient, and count in its denominators (but not where "
        "entropy_coef, use_adaptive_entropy, top_entropy_quantile or a loss_type of your own needs them).",
        ge=0,
    )
    epsilon: float = option(0.2, "The ratio is clipped below at 1 - epsilon.", ge=0)
    epsilon_high: float | None = option(
        None, "... and above at 1 + epsilon_high (default epsilon); cispo's cap itself.", ge=0
    )
    delta: float | None = option(
        None, "Upper bound of the unclipped ratio (two-sided clipping); best above 1 + epsilon_high.", gt=1
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio per token, or per sequence (GSPO)."
    )
    use_bias_correction_kl: bool = option(
        False, "Multiply the KL by the ratio, through which its gradient is unbiased too (TRL's default is true)."
    )
    off_policy_mask_threshold: float | None = option(
        None, "Leave out sequences with A < 0 whose mean log(sampler / policy) is above this (DeepSeek-V3.2).", gt=0
    )
    top_entropy_quantile: float = option(
        1.0,
        "Policy term of this share of the step's tokens alone, those of highest entropy (0.2 in arXiv:2506.01939); "
        "below 1 each update costs one more pass without gradient, for a threshold that is exact over all ranks.",
        ge=0,
        le=1,
    )
    sapo_temperature_pos: float = option(1.0, "sapo's temperature where A > 0.", gt=0)
    sapo_temperature_neg: float = option(1.05, "... where A <= 0.", gt=0)
    vespo_k_pos: float = option(2.0, "vespo's exponent where A >= 0: how much ratios below 1 count less.", ge=0)
    vespo_lambda_pos: float = option(3.0, "... and its decay: how much ratios above 1 do.", ge=1e-4)
    vespo_k_neg: float = option(3.0, "vespo's exponent where A < 0.", ge=0)
    vespo_lambda_neg: float = option(2.0, "... and its decay.", ge=1e-4)
    vllm_importance_sampling_mode: str | None = option(
        "token_truncate",
        "The ratio policy / sampler of a token or of the whole sequence, truncated at the bounds, or 0 beyond (mask).",
        choices=CORRECTIONS,
    )
    vllm_importance_sampling_clip_min: float | None = option(None, "Its lower bound.", ge=0)
    vllm_importance_sampling_clip_max: float | None = option(
        2.0, "Its upper bound (also named sampler_ratio_cap); inf: none.", alias="sampler_ratio_cap", le=inf
    )
    entropy_coef: float = option(
        0.0, "Weight of an entropy bonus, the mean over the tokens kept; with use_adaptive_entropy its first value."
    )


@dataclass(unsafe_hash=True)
class Objective(ObjectiveOptions):
    """The objective's options. ValueError for a value out of bounds, or options that contradict each other.

    `loss_type` may be a function of the user's own, `module:function`, called as

        losses = function(logps, log_ratios, advantages, objective)    # each of the first three [C], as losses is

    It takes the place of the policy term of each token, to be minimised: `logps` are the policy's, with gradient,
    `log_ratios` their difference from the old ones (or its mean over the sequence, as `importance_sampling_level` says)
    and `objective` is this one, whose epsilon and the like it may use. A token's loss must not depend on other rows.
    Masks, the correction of the sampler's mismatch and the KL come on top, and the mean is over the step's tokens.
    """

    beta: float = option(0.0, "Weight of the KL to the reference log-probs.", ge=0)
    max_completion_length: int | None = option(None, "dr_grpo divides by it.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self)["_frozen"] = True

    def check(self) -> None:
        super().check()
        loss, mode, prefix = self.loss_type, self.vllm_importance_sampling_mode, "vllm_importance_sampling"
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        require(
            loss in LOSS_TYPES or ":" in loss,
            f"loss_type must be one of {', '.join(LOSS_TYPES)} or your own as module:function, got {loss!r}",
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
            f"loss_type vespo takes {prefix}_mode token_truncate or token_mask, not {mode}: it sums over the tokens",
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
        """The user's function, if `loss_type` names one."""
        return import_function(self.loss_type, "loss_type") if ":" in self.loss_type else None

    @property
    def high(self) -> float:
        """How far above 1 a ratio may go; of "cispo" the largest ratio itself."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_by_token(self) -> bool:
        """Whether each token has a ratio of its own to the old policy."""
        return self.importance_sampling_level == "token"

    @property
    def correction_by_token(self) -> bool:
        """Whether each token has a ratio of its own to the sampler."""
        return not str(self.vllm_importance_sampling_mode).startswith("sequence")

    @property
    def by_token(self) -> bool:
        """Whether a token's loss depends on no other token's log-prob, so that the head can take the loss with it in
        one sweep; else all log-probs of the sequence are needed first."""
        whole = self.off_policy_mask_threshold is not None or self.loss_type == "vespo"
        return self.ratio_by_token and self.correction_by_token and not whole

    @property
    def by_advantage(self) -> bool:
        """Whether a token without advantage has no gradient, as in the built-in policy terms alone."""
        return not (self.beta or self.entropy_coef or self.own)


def check_own_losses(losses: Tensor, logps: Tensor, name: str) -> None:
    """ValueError where a user's function returned something else than a loss for each of `logps`."""
    fits = isinstance(losses, Tensor) and losses.shape == logps.shape and losses.dtype == logps.dtype
    found = getattr(losses, "dtype", type(losses).__name__), tuple(getattr(losses, "shape", ()))
    require(fits, f"{name} must return {tuple(logps.shape)} losses, {logps.dtype}, but returns {found[0]} {found[1]}")


@cache  # by value: a run makes the same objective in each step
def try_own(objective: Objective) -> None:
    """Call the user's function on a few tokens, all at once and each alone; ValueError where it cannot be used."""
    function, name = objective.own, objective.loss_type
    assert function is not None
    logps = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    tokens = logps, logps - torch.tensor([-1.0, -2.0, -0.7]), torch.tensor([1.0, -0.5, -2.0])
    try:
        losses = function(*tokens, objective)
        alone = [function(*(values[i : i + 1] for values in tokens), objective) for i in range(3)]
    except Exception as error:  # of a user's function anything
        raise ValueError(f"{name} cannot be called as (logps, log_ratios, advantages, objective): {error!r}") from error
    for found, given in zip([losses, *alone], [logps, *logps[:, None]], strict=True):
        check_own_losses(found, given, name)
    require(losses.requires_grad, f"{name} returns losses that do not depend on logps or log_ratios")
    require(
        torch.allclose(torch.cat(alone), losses, equal_nan=True),
        f"{name} must give each token a loss of its own: it gives another with other tokens beside it",
    )
