"""Training from Python with TRL's names: `SFTTrainer`, and the base class of `grpo_core.trainer.GRPOTrainer`.

    trainer = SFTTrainer(model="HuggingFaceTB/SmolLM2-135M", args=SFTConfig(output_dir="out"), train_dataset=rows)
    trainer.train()

A trainer runs the same code as the command line: the checks of `prepare`, the loop of `train.py`, and `lifecycle.py`.
`train()` starts from step 0 and moves earlier results in output_dir aside. `train(resume_from_checkpoint=True)` resumes
from the last checkpoint; a checkpoint's folder is accepted too. Models are loaded from a folder, so a model object is
first written into output_dir. When the training is complete, the object has the trained weights. If other code then
changes its weights or configuration, the next call starts from the changed object. Bad input raises ValueError. When a
call has ended, no lock, watchdog, signal handler or process group is left, so a notebook cell can be run again.

Not supported, on purpose: `data_collator`, `compute_metrics`, custom optimizers, several evaluation sets, overriding
the methods of transformers' Trainer.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_utils import TrainOutput

from sft_core import prepare, train
from sft_core.lifecycle import TrainingRun
from sft_core.model.adapters import has_adapters
from sft_core.model.policy import architecture, load_tokenizer, local_copy
from sft_core.model.trl_names import changed, quantised_options, with_init_kwargs, with_peft_config
from sft_core.run import distributed
from sft_core.run.callbacks import Callbacks, Handed
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.files import open_to_readers
from sft_core.run.options import require
from sft_core.run.output_dir import GIVEN, checkpoints
from sft_core.trained import Results

DATA = "the train_dataset"  # stands for a data set's name; no name on the Hub has a blank
WHOLE = "model.whole"  # a file that marks the folder of a model object as completely written
# Methods of TRL's trainers; those of transformers' Trainer are read from the class
NEVER_CALLED = ("_compute_loss", "_generate_and_score_completions", "_calculate_rewards")


class Trainer(Results, ABC):
    """The base class of both trainers, which define `algorithm`, `config_type` and `_begin`."""

    algorithm: str
    config_type: type[TrainingConfig]
    streams = False  # takes an IterableDataset
    column: str | None = None  # required in the data

    def __init__(
        self,
        model: Any,
        args: TrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> None:
        """The arguments have the same names as in TRL.

        Raises:
            ValueError: an argument is not supported, or the arguments do not fit each other.
        """
        kind = type(self).__name__
        unknown = [name for name, value in others.items() if value not in (None, (None, None))]
        require(not unknown, f"{kind} does not take {', '.join(unknown)}: leave it out.")
        self._check_methods()
        self._named = isinstance(model, str | os.PathLike)
        require(
            self._named or isinstance(model, PreTrainedModel),
            f"model must be a Hub id, a folder or a model of transformers, got a {type(model).__name__}.",
        )
        self._object: Any = None if self._named else model  # the model object passed in, or loaded by `model`
        self._known = ""  # the object's digest when it was written, loaded or trained
        self._trained: TrainingRun | None = None  # the last complete run, whose model is in output_dir
        name = os.fspath(model) if self._named else model.config._name_or_path
        if args is None:
            args = self.config_type(output_dir=f"{Path(name).name}-{self.algorithm.upper()}")
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self._check()
        if args.output_dir == "":
            args.output_dir = "trainer_output"  # as transformers names it
        options = with_peft_config(ModelConfig(model_name_or_path=name), peft_config)
        # The options of the model that `train()` starts from
        self._options = changed(options, quantised_options(quantization_config), "quantization_config")
        require(
            processing_class is not None or name != "",
            "the model has no name to load its tokenizer from: give a processing_class.",
        )
        options, _ = with_init_kwargs(self._options, args)
        self.processing_class = processing_class or load_tokenizer(options)[1]
        self.callbacks = Callbacks(callbacks or [])
        self.state = TrainerState()
        self.accelerator = SimpleNamespace(is_main_process=self.is_world_process_zero())
        self.callbacks("on_init_end", args.frozen(), self.state)

    def _check_methods(self) -> None:
        """Refuse a subclass that overrides methods which only TRL's and transformers' trainers call."""
        own = [kind for kind in type(self).__mro__[:-1] if not kind.__module__.startswith(("sft_core.", "grpo_core."))]
        if own:
            from transformers import Trainer as Theirs  # slow

            names = {name for kind in own for name in vars(kind) if not hasattr(Trainer, name)}
            unused = sorted(name for name in names if hasattr(Theirs, name) or name in NEVER_CALLED)
            require(
                not unused,
                f"{own[0].__name__} defines {', '.join(unused)}, which would never be called here: use a callback or a "
                "custom loss_type, or change the loop in train.py.",
            )

    def _check(self) -> None:
        """Check the attributes that a user may assign to; called when the trainer is made and before each run."""
        args = self.args
        require(isinstance(args, self.config_type), f"args must be a {self.config_type.__name__}, got {args!r:.80}.")
        self._check_data("train_dataset", (Dataset, IterableDataset) if self.streams else Dataset)
        if self.eval_dataset is not None:
            self._check_data("eval_dataset", Dataset)
        require(
            self.eval_dataset is not None or not (args.eval_on_start or args.eval_strategy != "no"),
            "the options ask for evaluations (eval_strategy, eval_on_start, load_best_model_at_end) and there is no "
            "eval_dataset: give one, or leave these options out.",
        )
        require(
            isinstance(self.processing_class, PreTrainedTokenizerBase | None),
            f"processing_class must be a tokenizer, got {self.processing_class!r:.80}.",
        )

    def _check_data(self, name: str, kinds: Any) -> None:
        data = getattr(self, name)
        require(
            isinstance(data, kinds),
            f"{name} must be a datasets.Dataset (one split of a DatasetDict, Dataset.from_list of a list), got "
            f"{type(data).__name__}.",
        )
        if isinstance(data, IterableDataset):
            return
        require(len(data) > 0, f"{name} has no rows: give a data set with rows.")
        require(
            data.format["type"] != "custom",
            f"{name} has a transform, which training would not apply: apply it with map() first.",
        )
        require(
            self.column in (None, *data.column_names),
            f"{name} has no column `{self.column}`, it has {', '.join(data.column_names)}: rename a column.",
        )

    @abstractmethod
    def _begin(self, model: ModelConfig, config: Any, handed: Handed) -> tuple[TrainingRun, Callable[[Any, Any], None]]:
        """Check a run; returns its `TrainingRun` and its loop."""

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainOutput:
        """Train. The result's `.metrics` are those that the command line writes to train_results.json.

        `resume_from_checkpoint`: True resumes from the last checkpoint in output_dir, a folder from that checkpoint,
        False starts from step 0. None uses args.resume_from_checkpoint, and starts from step 0 without it.

        Raises:
            ValueError: the input is wrong; one sentence names the problem and the remedy, before weights are loaded.
        """
        self._check()
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume: Any = {"true": True, "false": None}.get(str(given).lower(), given)
        require(
            resume is not True or any(checkpoints(self.args.output_dir)),
            f"there is no checkpoint in {self.args.output_dir} to resume from: leave out resume_from_checkpoint.",
        )
        config = dataclasses.replace(
            self.args,
            resume_from_checkpoint=None if resume in (None, True) else os.fspath(resume),
            do_eval=self.args.do_eval and self.eval_dataset is not None,
        )
        model, inputs, self._trained = self._model(), self._inputs(), None
        handed = self._handed(anew=resume is None, callbacks=self.callbacks if self.callbacks.callbacks else None)
        with self._running(model, config, handed) as (training, loop):
            loop(training.run, training)
            training.finish(push=False)
        if training.stopping:
            raise KeyboardInterrupt("stopped by a signal: train(resume_from_checkpoint=True) resumes from there")
        self._trained, self._trained_with, self.state = training, inputs, training.state()
        self._take_weights()
        results = training.results()
        return TrainOutput(self.state.global_step, results["train_loss"], results)

    def add_callback(self, callback: Any) -> None:
        self.callbacks = Callbacks([*self.callbacks.callbacks, callback])

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model as it is now on the eval_dataset; returns the metrics."""
        self._check()
        require(self.eval_dataset is not None, "there is nothing to evaluate on: give the trainer an eval_dataset.")
        model, resume, trained = self._model(), None, self._trained
        if trained is None and self._object is not None:
            model = self._as_object()
        if trained is not None:
            progress = trained.progress
            if progress.eval_step == progress.step and self._inputs() == self._trained_with:
                return dict(progress.eval_metrics)  # the run has computed these already
            if model.use_peft:
                best = trained.config.load_best_model_at_end and progress.best_checkpoint
                resume = best or str(Path(trained.config.output_dir) / f"checkpoint-{progress.step}")
                require(Path(resume).is_dir(), f"adapters are evaluated from {resume}, which is gone: train again.")
            else:
                model = dataclasses.replace(model, model_name_or_path=trained.config.output_dir)
        folder = Path(self.args.output_dir) / ".evaluation"
        config = dataclasses.replace(
            self.args, output_dir=str(folder), do_eval=True, report_to=["none"], resume_from_checkpoint=resume
        )
        with self._running(model, config, self._handed(only_evaluates=True)) as (training, loop):
            loop(training.run, training)
        if self.is_world_process_zero():
            shutil.rmtree(folder)
        metrics = training.progress.eval_metrics | {"epoch": self.state.epoch or 0.0}
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self.callbacks("on_evaluate", self.args.frozen(), self.state, metrics=metrics)
        return dict(metrics)

    @contextmanager
    def _running(self, model: ModelConfig, config: Any, handed: Handed) -> Iterator[tuple[TrainingRun, Callable]]:
        """Check and open a run. After it ends or fails, another one can start."""
        require(not config.dry_run, "dry_run works on the command line only: leave it out, or use the command line.")
        require(
            not dist.is_initialized(),
            "this process has a process group already, and training makes its own: end the other run, or destroy the "
            "script's process group first.",
        )
        folder = Path(model.model_name_or_path)
        if folder.name.startswith(GIVEN):
            handed = dataclasses.replace(handed, write_model=partial(self._write, folder))
        with ExitStack() as refused:
            refused.callback(distributed.unlock_output_dir, config.output_dir)
            refused.callback(distributed.shutdown)
            training, loop = self._begin(model, config, handed)
            refused.pop_all()  # from here on `training` unlocks and shuts down
        with training:
            yield training, loop

    def _handed(self, **more: Any) -> Handed:
        return Handed(self.train_dataset, self.eval_dataset, self.processing_class, **more)

    def _inputs(self) -> tuple[TrainingConfig, Handed, str | None]:
        """What an evaluation depends on besides the model, for a later comparison."""
        return copy.deepcopy(self.args), self._handed(), getattr(self.processing_class, "chat_template", None)

    # --- the model ---------------------------------------------------------------------------------------------------

    def _model(self) -> ModelConfig:
        """The options of the model that `train()` starts from: those of the model object if it is new or was changed
        outside `train()`, else the same as before."""
        model, begun = self._object, Path(self._options.model_name_or_path)
        gone = begun.name.startswith(GIVEN) and not (begun / WHOLE).is_file()
        if model is not None and ((digest := self._digest(model)) != self._known or gone):
            require(
                not (has_adapters(model) or getattr(model, "is_quantized", False)),
                "the model object has adapters or quantised weights and was made or changed outside train(): pass the "
                "model's name and a peft_config instead (the object's save_pretrained writes it as it is).",
            )
            self._known, self._trained = digest, None
            self._options = self._as_object()
        return self._options

    def _as_object(self) -> ModelConfig:
        """Options for the model object, in a folder of output_dir that is named after the object's digest."""
        folder = Path(self.args.output_dir) / f"{GIVEN}{self._known[:16]}"
        return dataclasses.replace(self._options, model_name_or_path=str(folder))

    @staticmethod
    def _digest(model: PreTrainedModel) -> str:
        config = copy.copy(model.config)
        config.architectures = None  # set when the model is written
        digest = hashlib.sha256(architecture(config).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _write(self, folder: Path) -> None:
        """Write the model object into its folder, unless it is there already."""
        if not (folder / WHOLE).is_file():
            self._object.save_pretrained(folder)
            open_to_readers(folder)
            (folder / WHOLE).touch()
            print(f"the model object was written to {folder} and is loaded from there", flush=True)

    def _take_weights(self) -> None:
        """Load the trained weights into the model object."""
        if self._object is None:
            return
        if self._options.use_peft:
            print(f"the model object is unchanged: the trained adapter is in {self.args.output_dir}", flush=True)
            if self._named:
                self._object = None  # `model` loads it with its adapter
            return
        trained = AutoModelForCausalLM.from_pretrained(self.args.output_dir, dtype=self._object.dtype)
        self._object.resize_token_embeddings(trained.get_input_embeddings().num_embeddings)
        self._object.load_state_dict(trained.state_dict())
        self._known = self._digest(self._object)

    @property
    def model(self) -> Any:
        """The model object that was passed in; without one, the model in output_dir, or before training the named one.
        An adapter is loaded together with its base model."""
        if self._object is None:
            options, _ = with_init_kwargs(self._options, self.args)
            trained = self._trained and self._trained.config.output_dir
            self._object = AutoModelForCausalLM.from_pretrained(
                trained or local_copy(options).model_name_or_path,
                dtype="auto",
                trust_remote_code=options.trust_remote_code,
            )
            self._known = self._digest(self._object)
        return self._object


class SFTTrainer(Trainer):
    """Supervised training with the data of `sft_core/dataset.py` and the loss and loop of `sft_core/train.py`."""

    algorithm = "sft"
    config_type = SFTConfig
    streams = True

    def _begin(
        self, model: ModelConfig, config: SFTConfig, handed: Handed
    ) -> tuple[TrainingRun, Callable[[Any, Any], None]]:
        if isinstance(self.train_dataset, IterableDataset):
            config = dataclasses.replace(config, dataset_streaming=True)
        run = prepare.prepare(model, ScriptArguments(dataset_name=DATA), config, handed)
        return TrainingRun(run, train.Progress(), train.CONSOLE, run.samples), train.train
