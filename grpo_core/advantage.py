"""Group-relative advantages: how much better a completion scored than the others of its prompt.

`group_advantages` implements section 4.1.2 of DeepSeekMath (arXiv:2402.03300), with the variants of Dr. GRPO
(arXiv:2503.20783) and of a step-wide scale. `decoupled_advantages` implements GDPO (arXiv:2601.05242), which normalises
each reward function separately. Callers pass the rewards of whole groups; for `scale_rewards="batch"` and GDPO they
pass those of the whole step. Not in this module: calling and summing reward functions (`scoring.py`), and distributed
calls. Not supported, on purpose: value networks. Read `train.py` next, the loop that calls this module.

    group_advantages([1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1])    # [0.707, -0.707, 0, 0]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-4
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor | Sequence[float],  # [S], NaN = not scored
    group_ids: Tensor | Sequence[int],  # [S], any integers, in any order
    scale_rewards: str = "group",
) -> Tensor:  # [S] float64
    """(R - mean of the group's scored rewards) / (std + 1e-4), in float64, std with Bessel's correction.

    `scale_rewards` selects the rows for the std: those of the "group", of the "batch" (all scored rows given), or
    "none" for no division. An advantage is exactly 0 for unscored rows, in groups with one scored row, and in groups
    whose scored rewards are all equal.

    Raises ValueError for a group of fewer than two rows, an infinite reward, or an unknown scale.
    """
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards must be one of {', '.join(SCALES)}, got {scale_rewards!r}")
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    group_ids = torch.as_tensor(group_ids, device=rewards.device)
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"need rewards [S] and group_ids [S], got {tuple(rewards.shape)}, {tuple(group_ids.shape)}")
    if rewards.isinf().any():
        raise ValueError("a reward is infinite: rewards must be finite, or NaN for a row that was not scored")

    scored = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        in_group = group_ids == group
        if in_group.sum() < 2:
            raise ValueError(f"group {int(group)} has one completion: a group needs num_generations >= 2 to compare")
        rows = in_group & scored
        values = rewards[rows]
        # Compare the rewards themselves: the mean is rounded, so equal rewards could differ from it by 1e-17.
        if len(values) < 2 or values.min() == values.max():
            continue
        advantages[rows] = values - values.mean()
        if scale_rewards == "group":
            advantages[rows] /= values.std() + EPS
    if scale_rewards == "batch" and advantages.any():
        advantages /= rewards[scored].std() + EPS
    return advantages


def decoupled_advantages(
    values: Tensor | Sequence[Sequence[float]],  # [S, K] of K reward functions, NaN = does not apply
    group_ids: Tensor | Sequence[int],  # [S]
    weights: Sequence[float] | None = None,  # [K]; None: all 1
) -> Tensor:  # [S] float64
    """GDPO: `group_advantages` per reward function, then their weighted sum, normalised over all rows.

    Rows without any value are excluded and get 0. A sum of 0 equals the mean of all sums up to rounding, and its
    advantage is exactly 0.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    apart = torch.stack([group_advantages(column, group_ids) for column in values.T], dim=1)  # [S, K]
    sums = apart @ apart.new_tensor(weights or [1.0] * values.shape[1])
    sums[values.isnan().all(1)] = torch.nan
    return torch.where(sums == 0, 0.0, group_advantages(sums, torch.zeros_like(sums)))
