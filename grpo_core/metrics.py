"""The figures of a step, under the names that TRL's users know, and samples of what was written."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gen.engine.weight_sync import mismatch_summary
from grpo_core.rollout import Rollout, Summary
from sft_core.run.logging import reduce_metrics

CONSOLE = (
    "reward",
    "eval_reward",
    "effective_groups",
    "unscored",
    "completions/mean_length",
    "kl",
    "clip_ratio/region_mean",
    "entropy",
    "sampling/sampling_logp_difference/mean",
    "tokens_per_second",
)
MISMATCH_NAMES = {
    "mean_abs": "sampling/sampling_logp_difference/mean",
    "abs_max": "sampling/sampling_logp_difference/max",
}


def rollout_metrics(summaries: Sequence[Summary], reward_names: Sequence[str]) -> dict[str, float]:
    """Figures of one step's completions on all ranks.

    `reward` and `reward_std` are over all scored completions (the std with Bessel's correction); a group is effective
    when its scored rewards differ, so that it has a gradient.
    """
    rewards = np.array([s.reward for s in summaries])
    lengths = np.array([s.length for s in summaries], dtype=float)
    ended = np.array([s.finish_reason == "stop" for s in summaries])
    groups: dict[int, list[float]] = {}
    for s in summaries:
        groups.setdefault(s.group, []).append(s.reward)
    spread = [len({r for r in values if not math.isnan(r)}) > 1 for values in groups.values()]
    metrics = {
        **_moments(rewards, mean="reward", std="reward_std"),
        "frac_reward_zero_std": 1 - sum(spread) / len(spread),
        "effective_groups": float(sum(spread)),
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


def _moments(values: np.ndarray, mean: str, std: str) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return {mean: math.nan, std: math.nan}
    return {mean: known.mean(), std: known.std(ddof=1) if len(known) > 1 else 0.0}


def reduce_step(figures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """The step's figures over all ranks, in one collective: sums, but for names that end in min or max.

    What `weight_sync.mismatch_stats` counted (under `gap/`) becomes the distance of the engine from the policy.
    """
    mins = {name: value for name, value in figures.items() if name.endswith("min")}
    maxes = {name: value for name, value in figures.items() if name.endswith("max")}
    sums = {name: value for name, value in figures.items() if name not in mins | maxes}
    metrics = reduce_metrics(sums, maxes, mins, device=device)
    gap = {name.removeprefix("gap/"): metrics.pop(name) for name in list(metrics) if name.startswith("gap/")}
    for name, value in (mismatch_summary(gap) if gap else {}).items():
        metrics[MISMATCH_NAMES.get(name, f"sampling/mismatch/{name}")] = value
    return metrics


def check_scores(figures: Mapping[str, float], steps_unscored: int) -> int:
    """Rollouts in a row in which nothing could be scored; the third raises RuntimeError: that is not bad luck."""
    steps_unscored = steps_unscored + 1 if math.isnan(figures["reward"]) else 0
    if steps_unscored == 3:
        raise RuntimeError(
            "no completion of the last three rollouts could be scored: mend the reward functions or the "
            "gold answers; the lines above say which gave none."
        )
    return steps_unscored


def check_mismatch(metrics: Mapping[str, float], limit: float) -> None:
    """Raise RuntimeError where engine and policy differ by more than `limit` on average over the step's tokens, or
    where a log-prob of either is no number."""
    mean = metrics.get(MISMATCH_NAMES["mean_abs"], 0.0)
    if not math.isfinite(mean):
        raise RuntimeError(
            f"log-probs of the engine or the policy are not finite (they differ by {mean} on average): nothing was "
            "stepped. Resume from the last checkpoint with a lower learning_rate, or replay the step's rollouts to "
            "find the cause."
        )
    if mean > limit:
        raise RuntimeError(
            f"the engine's log-probs differ from the policy's by {mean:.4g} on average, more than max_logp_difference "
            f"{limit:g}: what is sampled is not what is trained. Look for an engine in another precision, or raise the "
            "limit if you know why."
        )


def spread(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """`count` of the rollouts, from different groups as far as there are."""
    seen: Counter[int] = Counter()
    ranked = []
    for rollout in rollouts:
        ranked.append((seen[rollout.group], rollout))
        seen[rollout.group] += 1
    return [rollout for _, rollout in sorted(ranked, key=lambda pair: pair[0])[:count]]


def completion_rows(
    rollouts: Sequence[Rollout], reward_names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Completions as text, special tokens shown, with their rewards and advantages."""
    return [
        {
            "prompt": tokenizer.decode(r.prompt_ids),
            "completion": tokenizer.decode(r.completion_ids),
            **{name: None if math.isnan(v) else v for name, v in zip(reward_names, r.rewards, strict=True)},
            "reward": None if math.isnan(r.reward) else r.reward,
            "advantage": r.advantage,
            "finish_reason": r.finish_reason,
        }
        for r in rollouts
    ]
