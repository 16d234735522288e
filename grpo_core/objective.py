"""Which objective: the options of `loss.py` under TRL's names, and what follows from them.

The mathematics is in `loss.py`. Left out on purpose: what an option means to a run (`config.py` refuses those that
would have no effect there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from grpo_core.user_code import import_function
from sft_core.run.options import require

CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")  # the loss types that clip the ratio from both sides
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
AT_LEAST = {
    "epsilon": 0,
    "epsilon_high": 0,
    "beta": 0,
    "vllm_importance_sampling_clip_min": 0,
    "top_entropy_quantile": 0,
    "vespo_k_pos": 0,
    "vespo_lambda_pos": 1e-4,
    "vespo_k_neg": 0,
    "vespo_lambda_neg": 1e-4,
}
ABOVE = {"delta": 1, "off_policy_mask_threshold": 0, "sapo_temperature_pos": 0, "sapo_temperature_neg": 0}


@dataclass(frozen=True)
class Objective:
    """The objective's options. ValueError for a value out of bounds, or options that contradict each other.

    `loss_type` may be a function of the user's own, `module:function`, called as

        losses = function(logps, log_ratios, advantages, objective)    # each of the first three [C], as losses is

    It takes the place of the policy term of each token, to be minimised: `logps` are the policy's, with gradient,
    `log_ratios` their difference from the old ones (or its mean over the sequence, as `importance_sampling_level` says)
    and `objective` is this one, whose epsilon and the like it may use. A token's loss must not depend on other rows.
    Masks, the correction of the sampler's mismatch and the KL come on top, and the mean is over the step's tokens.
    """

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon; "cispo", which has no other bound, needs one
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: str = "token"
    max_completion_length: int | None = None
    use_bias_correction_kl: bool = False
    vllm_importance_sampling_mode: str | None = "token_truncate"  # None: the sampler's mismatch is not corrected
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 2.0
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0  # share of the step's tokens that is kept
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    sampler_ratio_cap: InitVar[float | None] = None  # another name of vllm_importance_sampling_clip_max

    def __post_init__(self, sampler_ratio_cap: float | None) -> None:
        if sampler_ratio_cap is not None:
            object.__setattr__(self, "vllm_importance_sampling_clip_max", sampler_ratio_cap)
        loss, mode, prefix = self.loss_type, self.vllm_importance_sampling_mode, "vllm_importance_sampling"
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        for name, least in (AT_LEAST | ABOVE).items():
            value, words = getattr(self, name), "above" if name in ABOVE else "at least"
            if value is not None or getattr(Objective, name) is not None:
                fits = least <= value < math.inf and (name not in ABOVE or value > least)
                require(fits, f"{name} must be {words} {least} and finite, got {value}")
        level = self.importance_sampling_level
        require(level in ("token", "sequence"), f"importance_sampling_level must be token or sequence, got {level!r}")
        require(mode is None or mode in CORRECTIONS, f"{prefix}_mode must be one of {CORRECTIONS}, got {mode!r}")
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
            loss != "dr_grpo" or (self.max_completion_length or 0) >= 1,
            "loss_type=dr_grpo needs max_completion_length >= 1: it divides by that constant length",
        )
        share = self.top_entropy_quantile
        require(share <= 1, f"top_entropy_quantile is the share of tokens kept, at most 1 (all), got {share}")
        require(math.isfinite(self.entropy_coef), f"entropy_coef must be finite, got {self.entropy_coef}")
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

    @cached_property
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
