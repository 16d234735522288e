"""Group-relative advantages: how much better a completion scored than the others of its prompt.

DeepSeekMath (arXiv:2402.03300) 4.1.2, with the variants of Dr. GRPO (arXiv:2503.20783) and of a step-wide scale; and
GDPO (arXiv:2601.05242), which compares each reward function's values apart. Left out on purpose: calling and summing
reward functions (`scoring.py`), value networks, any notion of ranks: pass the rewards of whole groups, and for
`scale_rewards="batch"` and GDPO those of the whole step. Next: `train.py`, the loop that calls it.

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

    `scale_rewards` says over what the std is taken: "group"; "batch", all scored rows given; "none", no division.
    Exactly 0 for unscored rows, in groups with one scored row, and in groups whose scored rewards are all equal.

    Raises ValueError for a group of fewer than two rows, an infinite reward, an unknown scale.
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
        # By comparison: the rounding of a mean would leave a spread of 1e-17 where there is none.
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
    """GDPO: each function's `group_advantages`, their weighted sum, and of these sums the advantages over all rows.

    Rows without any value take no part. A sum of 0 is the mean of all sums, but for rounding: it stays exactly 0.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    apart = torch.stack([group_advantages(column, group_ids) for column in values.T], dim=1)  # [S, K]
    sums = apart @ apart.new_tensor(weights or [1.0] * values.shape[1])
    sums[values.isnan().all(1)] = torch.nan
    return torch.where(sums == 0, 0.0, group_advantages(sums, torch.zeros_like(sums)))
