"""GRPO from Python, under TRL's names.

    def reward_len(completions, **kwargs):
        return [-abs(20 - len(c)) for c in completions]

    trainer = GRPOTrainer(model="org/name", reward_funcs=reward_len, train_dataset=rows)
    trainer.train()

The base class is in `sft_core/trainer.py`. Prompts are used unchanged: the chat template renders only lists
of messages, and no system prompt is added (args.system_prompt applies only to benchmarks). A reward function is
called with one completion at a time in a worker process. With the attribute `batch = True` it is called with a whole
group, and with `in_process = True` it runs in this process without a timeout (`grpo_core/scoring.py`).

Not supported, on purpose: reward models, tools, environments, custom rollout functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

from grpo_core import prepare, train
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.rewards import check_names, get_reward_funcs, reward_name
from sft_core.lifecycle import TrainingRun
from sft_core.run.callbacks import Handed
from sft_core.run.config import ModelConfig
from sft_core.run.options import require
from sft_core.trainer import DATA, Trainer


class GRPOTrainer(Trainer):
    algorithm = "grpo"
    config_type = GRPOConfig
    column = "prompt"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **more: Any,
    ) -> None:
        """`reward_funcs`: a function, the name of one of `grpo_core.rewards`, or a list of these. The other arguments
        are those of the base class.

        Raises:
            ValueError: the arguments cannot be used for training.
        """
        self.reward_funcs = reward_funcs
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **more)

    def _check(self) -> None:
        given = self.reward_funcs
        several = isinstance(given, Sequence) and not isinstance(given, str)
        require(given not in (None, [], ()), "reward_funcs is missing: pass a function, or several.")
        self.reward_funcs = [self._function(function) for function in (given if several else [given])]
        check_names(self.reward_funcs)
        super()._check()

    @staticmethod
    def _function(function: Any) -> Callable:
        if isinstance(function, str):
            return get_reward_funcs(GRPOScriptArguments(reward_funcs=[function]))[0]
        require(
            callable(function) and not isinstance(function, type),
            f"reward_funcs must be functions or names of rewards, got {function!r:.80}.",
        )
        return function

    def _handed(self, **more: Any) -> Handed:
        return super()._handed(reward_funcs=tuple(self.reward_funcs), **more)

    def _begin(
        self, model: ModelConfig, config: GRPOConfig, handed: Handed
    ) -> tuple[TrainingRun, Callable[[Any, Any], None]]:
        names = [reward_name(function) for function in self.reward_funcs]  # only recorded
        data = GRPOScriptArguments(dataset_name=DATA, dataset_prompt_column="prompt", reward_funcs=names)
        run = prepare.prepare(model, data, config, handed)
        return TrainingRun(run, train.Progress(), train.CONSOLE, len(run.prompts)), train.train
