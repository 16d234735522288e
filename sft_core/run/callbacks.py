"""What a trainer class was handed, and transformers' callbacks among it.

`sft_core/trainer.py` and `grpo_core/trainer.py` make a `Handed`; a run from the command line has none. Left out on
purpose: hooks that have no place in the loops (`HOOKS` are those that do); a callback that needs one is named.
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
    """What a trainer has as objects where the command line has names."""

    train_dataset: Any
    eval_dataset: Any = None
    processing_class: Any = None  # a tokenizer; None: the model's own
    reward_funcs: tuple[Any, ...] = ()
    callbacks: "Callbacks | None" = None
    anew: bool = False  # begin at the first step, whatever stands in output_dir
    only_evaluates: bool = False  # a run of no steps
    write_model: Callable[[], None] | None = None  # makes the folder that the model's options name


class Callbacks:
    """Calls the hooks of transformers' TrainerCallbacks; `control` holds what they ask for."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.control = TrainerControl()
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise ValueError(f"callbacks must be transformers' TrainerCallbacks, got {callback!r:.80}.")
            hooks = [name for name in vars(TrainerCallback) if name.startswith("on_") and name not in HOOKS]
            unused = [n for n in hooks if getattr(type(callback), n) is not getattr(TrainerCallback, n)]
            if unused and is_first_rank():
                logger.warning("%s is never called at %s here.", type(callback).__name__, ", ".join(unused))

    def asked(self, device: Any) -> set[str]:
        """What any rank's callbacks ask for: logging, eval, save, stop. A collective.

        Raises:
            ValueError: the end of an epoch.
        """
        control = self.control
        asked = {"logging": control.should_log, "eval": control.should_evaluate, "save": control.should_save}
        asked |= {"stop": control.should_training_stop, "epoch": control.should_epoch_stop}
        reduced = reduce_metrics({f"{name}/max": float(value) for name, value in asked.items()}, device=device)
        require(
            not reduced["epoch/max"],
            "a callback sets control.should_epoch_stop, and an epoch has no end of its own here: set "
            "control.should_training_stop.",
        )
        return {name for name in asked if reduced[f"{name}/max"]}

    def __call__(self, hook: str, args: Any, state: TrainerState, **more: Any) -> None:
        """`args`: a run's own, resolved as transformers' are: which metric is best, and whether it is the greatest."""
        if hook == "on_train_begin":
            self.control = TrainerControl()
        if hook == "on_step_end":  # what was asked for at an earlier step
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        for callback in self.callbacks:
            self.control = getattr(callback, hook)(args, state, self.control, **more) or self.control
