"""Training from Python, in TRL's names: `SFTTrainer`, and the base of `grpo_core.trainer.GRPOTrainer`.

    trainer = SFTTrainer(model="HuggingFaceTB/SmolLM2-135M", args=SFTConfig(output_dir="out"), train_dataset=rows)
    trainer.train()

Thin over what the command line runs: `prepare` checks, the loop of `train.py` trains, `lifecycle.py` surrounds it.
`train()` begins anew (what stands in output_dir is moved aside), `train(resume_from_checkpoint=True)` or a checkpoint's
folder goes on. The model is loaded from a folder, so one that is handed over as an object is first written into
output_dir; when the training is complete the object has the trained weights. What is wrong is a ValueError; nothing is
armed, locked or joined when a call has ended, so that a notebook's cell can be run again.

Left out on purpose: `data_collator`, `compute_metrics`, optimizers of one's own, several evaluation sets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput

from sft_core import prepare, train
from sft_core.lifecycle import TrainingRun
from sft_core.model.adapters import has_adapters
from sft_core.model.trl_names import changed, quantised_options, with_init_kwargs, with_peft_config
from sft_core.run import distributed
from sft_core.run.callbacks import Callbacks, Handed
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.options import require
from sft_core.run.output_dir import GIVEN, checkpoints
from sft_core.trained import Loaded, Results

DATA = "the train_dataset"  # in place of a data set's name; no name on the Hub has a blank


class Trainer(Results):
    """What both trainers do; `algorithm`, `config_type`, `_prepare` and `_start` are theirs."""

    algorithm: str
    config_type: type[TrainingConfig]
    streams = False  # takes an IterableDataset

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
        """Names as in TRL.

        Raises:
            ValueError: what is handed over cannot be trained so.
        """
        kind = type(self).__name__
        unknown = [name for name, value in others.items() if value not in (None, (None, None))]
        require(not unknown, f"{kind} does not take {', '.join(unknown)}: leave it out.")
        self.handed_model = None if isinstance(model, str | os.PathLike) else model
        if self.handed_model is None:
            source = os.fspath(model)
        else:
            adapted = has_adapters(model) or getattr(model, "is_quantized", False)
            require(not adapted, "the model has adapters or is quantised: hand over its name, and a peft_config.")
            found = type(model).__name__
            require(isinstance(model, PreTrainedModel), f"model must be a name, a folder or a model, got a {found}.")
            source = model.config._name_or_path
        self.source = source  # of model (where it is no object) and tokenizer
        if args is None:
            args = self.config_type(output_dir=f"{Path(source).name}-{self.algorithm.upper()}")
        require(isinstance(args, self.config_type), f"args must be a {self.config_type.__name__}, got {args!r:.80}.")
        if args.output_dir == "":
            args.output_dir = "trainer_output"  # as transformers names it
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._check_data("train_dataset", (Dataset, IterableDataset) if self.streams else Dataset)
        if eval_dataset is not None:
            self._check_data("eval_dataset", Dataset)
        require(
            eval_dataset is not None or not dataclasses.replace(args, do_eval=False).evaluates,
            "the options ask for evaluations (eval_strategy, eval_on_start, load_best_model_at_end) and there is no "
            "eval_dataset: give one, or leave them out.",
        )
        require(
            processing_class is not None or source != "",
            "the model has no name from which its tokenizer could be loaded: give a processing_class.",
        )
        self._tokenizer = processing_class
        both = quantization_config is not None and "quantization_config" in (args.model_init_kwargs or {})
        require(not both, "quantization_config is given twice, to the trainer and in model_init_kwargs: give one.")
        options = with_peft_config(ModelConfig(model_name_or_path=source or "model"), peft_config)
        self._model_options = changed(options, quantised_options(quantization_config), "quantization_config")
        with_init_kwargs(self._model_options, args)
        self.callbacks = Callbacks(callbacks or [], args)
        self.state = TrainerState()
        self.accelerator = SimpleNamespace(
            is_main_process=args.process_index == 0,
            process_index=args.process_index,
            num_processes=args.world_size,
            device=args.device,
        )
        self._initial: Path | None = None  # where the model that was handed over was written
        self._known = ""  # what its weights were then, or after `train()`
        self._trained: TrainingRun | None = None  # the last one that was complete
        self._loaded: Loaded | None = None
        self.callbacks("on_init_end", self.state)

    # --- of the trainer's kind ---------------------------------------------------------------------------------------

    def _check_data(self, name: str, kinds: Any) -> None:
        data = getattr(self, name)
        require(
            isinstance(data, kinds),
            f"{name} must be a datasets.Dataset (of a DatasetDict one split, of a list Dataset.from_list), got "
            f"{type(data).__name__}.",
        )
        require(not isinstance(data, Dataset) or len(data) > 0, f"{name} has no rows.")
        require(
            not isinstance(data, Dataset) or data.format["type"] != "custom",
            f"{name} has a transform, whose rows would not be those that are trained: apply it with map().",
        )

    def _data(self) -> ScriptArguments:
        return ScriptArguments(dataset_name=DATA)

    def _prepare(self, model: ModelConfig, config: Any, handed: Handed) -> Any:
        raise NotImplementedError

    def _start(self, run: Any) -> tuple[TrainingRun, Callable[[Any, Any], None]]:
        """What surrounds the loop, and the loop."""
        raise NotImplementedError

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainOutput:
        """Train; `.metrics` of what is returned are those that the command line writes to train_results.json.

        `resume_from_checkpoint`: None begins anew, True goes on from the last checkpoint in output_dir, a folder from
        that checkpoint.

        Raises:
            ValueError: the input, in one sentence that names the remedy; before weights are loaded.
        """
        resume: Any = {"true": True, "false": None}.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        require(
            resume is not True or any(checkpoints(self.args.output_dir)),
            f"there is no checkpoint in {self.args.output_dir} to resume from: call train() to begin.",
        )
        config = dataclasses.replace(
            self.args,
            resume_from_checkpoint=None if resume in (None, True) else os.fspath(resume),
            do_eval=self.args.do_eval and self.eval_dataset is not None,
        )
        handed = self._handed(anew=resume is None, callbacks=self.callbacks if self.callbacks.callbacks else None)
        with self._running(self._model(), config, handed) as (training, loop):
            loop(training.run, training)
            training.finish(push=False)
        if training.stopping:
            raise KeyboardInterrupt("stopped by a signal: train(resume_from_checkpoint=True) goes on from there")
        self._trained, self._loaded, self.state = training, None, training.state()
        self._take_weights()
        results = training.results()
        return TrainOutput(self.state.global_step, results["train_loss"], results)

    def add_callback(self, callback: Any) -> None:
        self.callbacks = Callbacks([*self.callbacks.callbacks, callback], self.args)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the policy as it is now, on the eval_dataset."""
        require(self.eval_dataset is not None, "there is nothing to evaluate on: give the trainer an eval_dataset.")
        trained, folder = self._trained, Path(self.args.output_dir) / ".evaluation"
        if trained is not None and trained.progress.eval_step == trained.progress.step:
            if trained.run.handed.eval_dataset is self.eval_dataset:
                return dict(trained.progress.eval_metrics)  # weights and data are those that the run has measured
        model, resume = self._model(), None
        if trained is not None:
            if model.use_peft:
                resume = str(Path(self.args.output_dir) / f"checkpoint-{trained.progress.step}")
                require(Path(resume).is_dir(), f"adapters are evaluated from a checkpoint, and there is no {resume}.")
            else:
                model = dataclasses.replace(model, model_name_or_path=self.args.output_dir)
        config = dataclasses.replace(
            self.args,
            output_dir=str(folder),
            do_eval=True,
            eval_on_start=False,
            report_to=["none"],
            resume_from_checkpoint=resume,
        )
        with self._running(model, config, self._handed(only_evaluates=True)) as (training, loop):
            loop(training.run, training)
        if self.is_world_process_zero():
            shutil.rmtree(folder)
        metrics = training.progress.eval_metrics
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self.callbacks("on_evaluate", self.state, metrics=metrics)
        return dict(metrics)

    @contextmanager
    def _running(self, model: ModelConfig, config: Any, handed: Handed) -> Iterator[tuple[TrainingRun, Callable]]:
        """A run that has been checked, with all around it; whatever happens within, this process may begin another."""
        require(not config.dry_run, "dry_run is of the command line: python -m grpo_core.train, sft_core.train.")
        require(
            not dist.is_initialized(),
            "this process has a process group already: another run is going on, or the script made one; training "
            "makes its own.",
        )
        try:
            run = self._prepare(model, config, handed)
        except BaseException:
            distributed.shutdown()
            distributed.unlock_output_dir(config.output_dir)
            raise
        training, loop = self._start(run)
        with training:
            yield training, loop

    def _handed(self, **more: Any) -> Handed:
        tokenizer = self.processing_class if self.handed_model is not None else self._tokenizer
        write = self._write if self.handed_model is not None else None
        return Handed(self.train_dataset, self.eval_dataset, tokenizer, write_model=write, **more)

    # --- the model ---------------------------------------------------------------------------------------------------

    def _model(self) -> ModelConfig:
        """The model's options; of one that was handed over with a folder in output_dir, named after its weights."""
        model = self.handed_model
        if model is None:
            return self._model_options
        now = self._digest(model)
        written = self._initial is not None and (self._initial / "model.whole").is_file()
        if now != self._known or not written:  # new, or changed since by somebody else than `train()`
            digest = hashlib.sha256((model.config.to_json_string() + now).encode()).hexdigest()
            self._initial, self._known = Path(self.args.output_dir) / f"{GIVEN}{digest[:16]}", now
        return dataclasses.replace(self._model_options, model_name_or_path=str(self._initial))

    @staticmethod
    def _digest(model: PreTrainedModel) -> str:
        digest = hashlib.sha256()  # of the weights alone: to be written changes the configuration
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _write(self) -> None:
        """The model that was handed over as it was at first, into its folder, where it is not there yet."""
        assert self._initial is not None and self.handed_model is not None
        if not (self._initial / "model.whole").is_file():
            self.handed_model.save_pretrained(self._initial)
            (self._initial / "model.whole").touch()
            print(f"the model that was handed over is written to {self._initial}, from where it is trained", flush=True)

    def _take_weights(self) -> None:
        """The trained weights into the model that was handed over."""
        if self.handed_model is None:
            return
        if self._model_options.use_peft:
            print(f"the model that was handed over is as it was: the adapter is in {self.args.output_dir}", flush=True)
            return
        trained = AutoModelForCausalLM.from_pretrained(self.args.output_dir, dtype=self.handed_model.dtype)
        self.handed_model.resize_token_embeddings(trained.get_input_embeddings().num_embeddings)
        self.handed_model.load_state_dict(trained.state_dict())
        self._known = self._digest(self.handed_model)

    @cached_property
    def processing_class(self) -> Any:
        return self._tokenizer or AutoTokenizer.from_pretrained(self.source)

    @property
    def model(self) -> Any:
        """The model that was handed over, else that of output_dir, or before training the one that was named."""
        if self.handed_model is not None:
            return self.handed_model
        if self._loaded is None:
            self._loaded = Loaded(self.source if self._trained is None else self.args.output_dir, self.source)
        return self._loaded


class SFTTrainer(Trainer):
    """Supervised training: the data as in `sft_core/dataset.py`, loss and loop as in `sft_core/train.py`."""

    algorithm = "sft"
    config_type = SFTConfig
    streams = True

    def _prepare(self, model: ModelConfig, config: SFTConfig, handed: Handed) -> prepare.Run:
        if isinstance(self.train_dataset, IterableDataset):
            config = dataclasses.replace(config, dataset_streaming=True)
        return prepare.prepare(model, self._data(), config, handed)

    def _start(self, run: prepare.Run) -> tuple[TrainingRun, Callable[[Any, Any], None]]:
        return TrainingRun(run, train.Progress(), train.CONSOLE, run.samples), train.train


def get_callbacks(train_config: TrainingConfig, model_config: ModelConfig) -> list[Any]:
    """open-r1's: what `train_config.callbacks` names. None, for a run sees to these itself."""
    return []
