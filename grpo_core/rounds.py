"""Dynamic sampling (DAPO, arXiv:2503.14476, 3.2): rounds of prompts, until enough of their groups have spread.

Which groups are used follows from prompts and rewards alone, not from what was ready first, nor from the ranks. Left
out on purpose: to keep what is over for the next step, whose policy is another.
"""

from collections import defaultdict
from dataclasses import replace

from grpo_core.config import GRPOConfig
from grpo_core.rollout import Sample, Summary, advantages_of, gather_summaries


class Rounds:
    """The rounds of one rollout batch: its number of prompts each. Without dynamic_sampling one, all of it used."""

    def __init__(self, prompts: int, config: GRPOConfig) -> None:
        self.prompts, self.config = prompts, config
        self.most = prompts * (config.dynamic_sampling_max_batches if config.dynamic_sampling else 1)
        self.sampled = 0  # prompts; the groups of the next round are numbered from here
        self.samples: list[Sample] = []  # this rank's
        self.summaries: list[Summary] = []  # all ranks', with the advantages that they have in their groups alone
        self.used: list[int] = []  # groups, in the order of prompts

    @property
    def go_on(self) -> bool:
        """Whether another round is needed and allowed; the same on every rank."""
        return self.sampled < self.most and len(self.used) < self.prompts

    def add(self, samples: list[Sample]) -> None:
        """This rank's samples of a round, scored. A collective.

        A group has spread if not all its advantages are 0: these are so where its rewards are exactly equal, by
        comparison (`advantage.py`), not by a mean or a std.
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
        """This rank's samples of the groups that are used, which are numbered anew.

        Raises:
            RuntimeError: there is none.
        """
        if not self.used:
            raise RuntimeError(
                f"none of {self.sampled} groups sampled for a step has rewards that differ: there is nothing to learn "
                "from. Take harder or easier data, or raise num_generations or dynamic_sampling_max_batches "
                "(`python -m grpo_core.audit` says more)."
            )
        numbers = {group: number for number, group in enumerate(self.used)}
        return [replace(s, group=numbers[s.group]) for s in self.samples if s.group in numbers]

    def metrics(self) -> dict[str, float]:
        counts = {"rounds": self.sampled / self.prompts, "groups_sampled": self.sampled, "groups_used": len(self.used)}
        return {f"dynamic_sampling/{name}": count for name, count in counts.items()}
