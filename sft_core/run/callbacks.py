"""The objects passed to a trainer class, among them transformers' callbacks.

`sft_core/trainer.py` and `grpo_core/trainer.py` make a `Handed`; a run from the command line has none. Not supported,
on purpose: hooks that have no place in the loops. `HOOKS` are the supported ones; callbacks with others get a warning.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_core.run.distributed import is_first_rank
from sft_core.run.logging import reduce_metrics
from sft_core.run.options import require

logger = logging.getLogger(__name__)
HOOKS = ("on_init_end", "on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


@dataclass(frozen=True)
class Handed:
    """The objects of a trainer class; the command line has names instead."""

    train_dataset: Any
    eval_dataset: Any = None
    processing_class: Any = None  # a tokenizer; None: the model's own
    reward_funcs: tuple[Any, ...] = ()
    callbacks: "Callbacks | None" = None
    anew: bool = False  # start from step 0, never from a checkpoint
    only_evaluates: bool = False  # a run without training steps
    write_model: Callable[[], None] | None = None  # makes the folder that the model's options name


class Callbacks:
    """Calls the hooks of transformers' TrainerCallbacks; `control` holds their requests."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.control = TrainerControl()
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise ValueError(f"callbacks must be transformers' TrainerCallbacks, got {callback!r:.80}.")
            hooks = [name for name in vars(TrainerCallback) if name.startswith("on_") and name not in HOOKS]
            unused = [n for n in hooks if getattr(type(callback), n) is not getattr(TrainerCallback, n)]
            if unused and is_first_rank():
                logger.warning("%s defines %s, which is never called here.", type(callback).__name__, ", ".join(unused))

    def asked(self, device: Any) -> set[str]:
        """What callbacks of any rank ask for: logging, eval, save, stop. A collective.

        Raises:
            ValueError: a callback asks for the end of an epoch.
        """
        control = self.control
        asked = {"logging": control.should_log, "eval": control.should_evaluate, "save": control.should_save}
        asked |= {"stop": control.should_training_stop, "epoch": control.should_epoch_stop}
        reduced = reduce_metrics({f"{name}/max": float(value) for name, value in asked.items()}, device=device)
        require(
            not reduced["epoch/max"],
            "a callback sets control.should_epoch_stop, which is not supported here: set control.should_training_stop "
            "instead.",
        )
        return {name for name in asked if reduced[f"{name}/max"]}

    def __call__(self, hook: str, args: Any, state: TrainerState, **more: Any) -> None:
        """Call the hook of every callback. `args`: the run's configuration, resolved (metric_for_best_model, ...)."""
        if hook == "on_train_begin":
            self.control = TrainerControl()
        if hook == "on_step_end":  # requests of an earlier step
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        for callback in self.callbacks:
            self.control = getattr(callback, hook)(args, state, self.control, **more) or self.control
