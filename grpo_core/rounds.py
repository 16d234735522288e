"""Dynamic sampling (DAPO, arXiv:2503.14476, 3.2) samples rounds of prompts until enough groups have unequal rewards.

The selection of groups depends only on prompts and rewards, not on which group is ready first or on the number of
ranks. Not supported, on purpose: keeping surplus groups for the next step, whose policy is a different one.
"""

from collections import defaultdict
from dataclasses import replace

from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample, Summary, advantages_of, gather_summaries


class Rounds:
    """The rounds of one rollout batch. Each samples as many prompts as the batch has. Without dynamic_sampling there is
    one round, and all its groups are used."""

    def __init__(self, prompts: int, config: GRPOConfig) -> None:
        self.prompts, self.config = prompts, config
        self.most = prompts * (config.dynamic_sampling_max_batches if config.dynamic_sampling else 1)
        self.sampled = 0  # prompts so far; the next round numbers its groups from here
        self.samples: list[Sample] = []  # of this rank
        self.summaries: list[Summary] = []  # of all ranks, with advantages computed within each group
        self.used: list[int] = []  # groups to use, in the order of prompts

    @property
    def go_on(self) -> bool:
        """Whether another round is needed and allowed; the same on every rank."""
        return self.sampled < self.most and len(self.used) < self.prompts

    def add(self, samples: list[Sample]) -> None:
        """Add this rank's scored samples of a round. A collective.

        A group counts unless all its advantages are 0. They are 0 if its rewards are exactly equal: `advantage.py`
        compares the rewards, not their std.
        """
        self.sampled += self.prompts
        self.samples += samples
        groups = defaultdict(list)
        for summary in gather_summaries(samples):
            groups[summary.group].append(summary)
        for group, summaries in sorted(groups.items()):
            advantages = advantages_of(summaries, self.config)
            self.summaries += [replace(s, advantage=a) for s, a in zip(summaries, advantages, strict=True)]
            if not self.config.dynamic_sampling or any(advantages) and len(self.used) < self.prompts:
                self.used.append(group)

    def rollouts(self) -> list[Sample]:
        """This rank's samples of the groups to use, with new group numbers.

        Raises:
            RuntimeError: no group can be used.
        """
        if not self.used:
            raise RuntimeError(
                f"none of {self.sampled} groups sampled for a step has rewards that differ, so there is nothing to "
                "learn: use harder or easier data, or raise num_generations or dynamic_sampling_max_batches "
                "(`python -m grpo_core.audit` shows more)."
            )
        numbers = {group: number for number, group in enumerate(self.used)}
        return [replace(s, group=numbers[s.group]) for s in self.samples if s.group in numbers]

    def metrics(self) -> dict[str, float]:
        counts = {"rounds": self.sampled / self.prompts, "groups_sampled": self.sampled, "groups_used": len(self.used)}
        return {f"dynamic_sampling/{name}": count for name, count in counts.items()}
