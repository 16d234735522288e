"""The metrics of a step, under TRL's names, and the completions to log."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_core.rollout import Sample, Summary
from sft_core.run.logging import reduce_metrics

DIFFERENCE = "sampling/sampling_logp_difference"  # TRL's name
MISMATCH = "sampling/mismatch"
TOKENS = f"{MISMATCH}/tokens"
FIRST_POSITIONS = (0, 32, 128, 512)  # starts of position ranges with separate means
MEANS = {  # a mean's name -> the name of its token count
    **dict.fromkeys((f"{DIFFERENCE}/mean", f"{MISMATCH}/k1", f"{MISMATCH}/k3", f"{MISMATCH}/outside"), TOKENS),
    **{f"{MISMATCH}/mean_abs_{first}": f"{TOKENS}_{first}" for first in FIRST_POSITIONS},
}
CONSOLE = (
    "reward",
    "eval_reward",
    "effective_groups",
    "unscored",
    "completions/mean_length",
    "kl",
    "clip_ratio/region_mean",
    "entropy",
    f"{DIFFERENCE}/mean",
    "tokens_per_second",
)


def rollout_metrics(summaries: Sequence[Summary], reward_names: Sequence[str]) -> dict[str, float]:
    """Metrics of one step's completions on all ranks.

    `reward` and `reward_std` are over all scored completions (the std with Bessel's correction).
    """
    rewards = np.array([s.reward for s in summaries])
    lengths = np.array([s.length for s in summaries], dtype=float)
    ended = np.array([s.finish_reason == "stop" for s in summaries])
    effective = effective_groups(summaries)
    metrics = {
        **_moments(rewards, mean="reward", std="reward_std"),
        "frac_reward_zero_std": 1 - sum(effective) / len(effective),
        "effective_groups": float(sum(effective)),
        "unscored": float(np.isnan(rewards).sum()),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - ended.mean(),
    }
    if ended.any():
        for name in ("mean", "min", "max"):
            metrics[f"completions/{name}_terminated_length"] = getattr(lengths[ended], name)()
    for i, name in enumerate(reward_names):
        values = np.array([s.rewards[i] for s in summaries])
        metrics |= _moments(values, mean=f"rewards/{name}/mean", std=f"rewards/{name}/std")
    return {name: float(value) for name, value in metrics.items()}


def effective_groups(samples: Sequence[Sample | Summary]) -> list[bool]:
    """For each group, whether the advantages of its scored samples differ, so that it has a gradient. In evaluation
    their rewards are compared."""
    found: dict[int, set[float]] = {}
    for s in samples:
        values = found.setdefault(s.group, set())
        if not math.isnan(s.reward):
            values.add(s.reward if s.advantage is None else s.advantage)
    return [len(values) > 1 for values in found.values()]


def _moments(values: np.ndarray, mean: str, std: str) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return {mean: math.nan, std: math.nan}
    return {mean: known.mean(), std: known.std(ddof=1) if len(known) > 1 else 0.0}


def reduce_step(shares: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """The step's metrics over all ranks, in one collective."""
    metrics = reduce_metrics(shares, device=device)
    return mismatch_means(metrics) if TOKENS in metrics else metrics


@torch.no_grad()
def mismatch_sums(policy_logps: Tensor, sampler_logps: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Compares the log-probs [N] of policy and sampler on the sampled tokens; `positions` [N] are indices in the
    completion. Returns float64 sums and token counts, which add up over micro-batches and ranks.

    With d = policy - sampler these are |d| and its maximum; the estimators k1 = -d and k3 = exp(d) - d - 1 of
    KL(sampler || policy) (Schulman, "Approximating KL divergence", 2020); the number of ratios exp(d) outside [0.5, 2];
    and |d| by position.
    """
    d = policy_logps.detach().double() - sampler_logps.double()
    size, ratios = d.abs(), d.exp()
    sums = {
        TOKENS: torch.full((), float(d.numel()), dtype=torch.float64, device=d.device),
        f"{DIFFERENCE}/mean": size.sum(),
        f"{DIFFERENCE}/max": size.max() if d.numel() else d.new_zeros(()),
        f"{MISMATCH}/k1": -d.sum(),
        f"{MISMATCH}/k3": (ratios - d - 1).sum(),
        f"{MISMATCH}/outside": ((ratios < 0.5) | (ratios > 2)).sum().double(),
    }
    for first, end in zip(FIRST_POSITIONS, (*FIRST_POSITIONS[1:], math.inf), strict=True):
        inside = (positions >= first) & (positions < end)
        sums[f"{MISMATCH}/mean_abs_{first}"] = torch.where(inside, size, 0.0).sum()
        sums[f"{TOKENS}_{first}"] = inside.sum().double()
    return sums


def mismatch_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics`, with the sums of `mismatch_sums` replaced by means per token. A mean over no token is left out."""
    means = {name: value for name, value in metrics.items() if not name.startswith((DIFFERENCE, MISMATCH))}
    if metrics[TOKENS]:
        means[f"{DIFFERENCE}/max"] = metrics[f"{DIFFERENCE}/max"]
    for name, tokens in MEANS.items():
        if metrics[tokens]:
            means[name] = metrics[name] / metrics[tokens]
    return means


def check_scores(metrics: Mapping[str, float], steps_unscored: int) -> int:
    """The number of consecutive rollout batches without a single scored completion. Raises RuntimeError at three."""
    steps_unscored = steps_unscored + 1 if math.isnan(metrics["reward"]) else 0
    if steps_unscored == 3:
        raise RuntimeError(
            "no completion of the last three rollout batches could be scored: fix the reward functions or the "
            "gold answers that the lines above name."
        )
    return steps_unscored


def check_mismatch(metrics: Mapping[str, float], limit: float) -> None:
    """Raise RuntimeError if log-probs of engine and policy differ by more than `limit` on average over the step's
    tokens, or if one of them is not finite."""
    mean = metrics.get(f"{DIFFERENCE}/mean", 0.0)
    if not math.isfinite(mean):
        raise RuntimeError(
            f"log-probs of the engine or the policy are not finite (they differ by {mean} on average), so the step was "
            "not taken: resume from the last checkpoint with a lower learning_rate, or replay the step's rollouts to "
            "find the cause."
        )
    if mean > limit:
        raise RuntimeError(
            f"the engine's log-probs differ from the policy's by {mean:.4g} on average, more than max_logp_difference "
            f"{limit:g}, so the engine does not sample from the trained policy: use the same precision for both, or "
            "raise max_logp_difference if you know the cause."
        )


def from_different_groups(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """`count` of the samples (None: all), from as many groups as possible."""
    seen: Counter[int] = Counter()
    ranked = []
    for sample in samples:
        ranked.append((seen[sample.group], sample))
        seen[sample.group] += 1
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])[:count]]


def completion_rows(
    samples: Sequence[Sample], reward_names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Completions as text including special tokens, with their rewards and advantages."""
    return [
        {
            "prompt": tokenizer.decode(sample.prompt_ids),
            "completion": tokenizer.decode(sample.completion_ids),
            **{name: None if math.isnan(v) else v for name, v in zip(reward_names, sample.rewards, strict=True)},
            "reward": None if math.isnan(sample.reward) else sample.reward,
            "advantage": sample.advantage,
            "finish_reason": sample.finish_reason,
        }
        for sample in samples
    ]
