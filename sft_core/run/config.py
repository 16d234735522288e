"""The options of a run: flat dataclasses, one field per option, checked when they are made (`options.py`).

`ModelConfig` and `ScriptArguments` (of `model_config.py`) are shared by both trainers; `TrainingConfig` holds those of
any training run, `SFTConfig` adds those of supervised training (`grpo_core.config` adds those of GRPO). Names and
meanings follow Hugging Face's TrainingArguments, TRL and open-r1 wherever an option exists there; every step counted
here is an optimizer step. How they are read from YAML and the command line: `sft_core/run/cli.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sft_core.run.model_config import ModelConfig as ModelConfig
from sft_core.run.model_config import ScriptArguments as ScriptArguments
from sft_core.run.options import JsonDict, Options, option, require
from sft_core.run.process import OfTheProcess

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
)
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
)


@dataclass
class TrainingConfig(OfTheProcess, Options):
    output_dir: str = option("", "Folder for checkpoints, logs and the final model.")
    overwrite_output_dir: bool = option(
        False, "Move what another run left in output_dir aside instead of refusing (nothing is ever deleted)."
    )
    model_init_kwargs: JsonDict | None = option(
        None, "JSON; options of the model by the names of from_pretrained: dtype, revision, quantization_config ..."
    )
    seed: int = option(42, "Seed of the data order and of sampling.")
    num_train_epochs: float = option(1.0, "Passes over the training rows (used where max_steps is not given).")
    max_steps: int = option(-1, "Optimizer steps; -1: as many as num_train_epochs needs.")
    per_device_train_batch_size: int = option(8, "Sequences per device and accumulation step.", ge=1)
    gradient_accumulation_steps: int = option(
        1, "Accumulation steps; a step takes the product of the two x devices.", ge=1
    )
    max_tokens_per_micro_batch: int = option(
        8192, "Token budget of one packed forward and backward pass; bounds memory, never changes the gradient.", ge=1
    )
    learning_rate: float = option(2e-5, "Peak learning rate.", ge=0)
    lr_scheduler_type: str = option("linear", f"Schedule after the warm-up: {', '.join(SCHEDULES)}.", choices=SCHEDULES)
    lr_scheduler_kwargs: JsonDict | None = option(
        None,
        'JSON; what transformers gives the schedule, as {"min_lr_rate": 0.1} (or min_lr) to cosine_with_min_lr, '
        "num_cycles to cosine_with_restarts, power and lr_end to polynomial, num_decay_steps to warmup_stable_decay.",
    )
    warmup_ratio: float = option(0.0, "Share of the steps that warm up linearly.", ge=0, le=1)
    warmup_steps: float = option(
        0, "Warm-up steps; below 1: a share of all steps; above 0 it replaces warmup_ratio.", ge=0
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay (matrices only).", ge=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1.", ge=0, lt=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2.", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", ge=0)
    max_grad_norm: float = option(1.0, "Gradient norm clipped to this; 0: not clipped.", ge=0)
    bf16: bool | None = option(None, "Compute in bfloat16 (masters stay float32); default: on CUDA yes, on CPU no.")
    fp16: bool = option(False, "Refused: float16 needs loss scaling; use bf16.")
    gradient_checkpointing: bool = option(False, "Recompute each block's activations in the backward pass.")
    gradient_checkpointing_every: int = option(
        1, "Do so for every k-th block only: more memory, less recomputing.", ge=1
    )
    activation_offloading: bool = option(
        False, "Keep what checkpointed blocks save in host memory; needs gradient_checkpointing."
    )
    cpu_offload: bool = option(False, "Keep parameters, gradients and optimizer state in host memory (FSDP2's policy).")
    torch_compile: bool = option(False, "Compile the decoder blocks (torch.compile); the first steps take longer.")
    torch_compile_backend: Literal["inductor", "aot_eager"] | None = option(
        "inductor", "Of torch.compile; aot_eager traces the blocks and generates no code, for tests."
    )
    merge_adapter: bool = option(False, "Beside the adapter, write the merged model to output_dir/merged.")
    dry_run: bool = option(False, "Count the memory of a step, refuse what cannot fit, and end.")
    dry_run_gpus: int = option(8, "GPUs that dry_run plans for.", ge=1)
    dry_run_gpu_gib: float = option(80.0, "Memory of each of them [GiB].")
    optim: str = option(
        "adamw_torch", f"Always AdamW with float32 moments; known: {', '.join(OPTIMIZERS)}.", choices=OPTIMIZERS
    )
    logging_strategy: Literal["no", "steps", "epoch"] = option("steps", "Log every logging_steps, each epoch, or not.")
    logging_steps: float = option(1, "Steps between log lines; below 1: a share of all steps.", gt=0)
    logging_first_step: bool = option(False, "Log the first step too.")
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = option(
        "passive", "Verbosity of this program, datasets and transformers; passive: as they are set."
    )
    report_to: list[str] = option(
        ["tensorboard"],
        "Any of tensorboard, wandb and the other trackers that transformers integrates (mlflow, trackio, swanlab and "
        "more); all: those that are installed; or none.",
    )
    run_name: str | None = option(None, "Name of the run in wandb and other trackers.")
    wandb_entity: str | None = option(None, "wandb's team or user.")
    wandb_project: str | None = option(None, "wandb's project.")
    wandb_run_group: str | None = option(None, "wandb's group of runs.")
    project: str = option("huggingface", "trackio's project.")
    trackio_space_id: str | None = option(None, "trackio's Space on the Hub; default: its files on this machine.")
    trackio_bucket_id: str | None = option(None, "trackio's bucket on the Hub.")
    do_eval: bool = option(False, "Evaluate on the test split after training.")
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "Evaluate during training too: every eval_steps, or each epoch."
    )
    eval_steps: float | None = option(
        None, "Steps between evaluations; below 1: a share; default: logging_steps.", gt=0
    )
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    benchmarks: list[str] = option([], "Tasks of eval.run to measure the final model with; all: every one.")
    benchmark_kwargs: JsonDict | None = option(
        None, 'JSON; options of eval.run for the benchmarks, such as {"num_samples": 4, "limit": 100}.'
    )
    system_prompt: str | None = option(None, "System prompt of the benchmarks.")
    chat_template: str | None = option(
        None,
        "Jinja text, a file with it, or a model that has it, in place of the tokenizer's template.",
        alias="chat_template_path",
    )
    chat_template_kwargs: JsonDict | None = option(
        None,
        'JSON; what else the chat template gets, as {"enable_thinking": false}; a column chat_template_kwargs says it '
        "row by row, before this.",
    )
    save_strategy: Literal["no", "steps", "epoch"] = option(
        "steps", "Write checkpoints every save_steps, each epoch, or none."
    )
    save_steps: float = option(500, "Steps between checkpoints; below 1: a share of all steps.", gt=0)
    save_total_limit: int | None = option(None, "Checkpoints to keep, the best among them; older ones are removed.")
    save_only_model: bool = option(False, "Checkpoints hold the model alone: small, but no run resumes from them.")
    load_best_model_at_end: bool = option(
        False, "The final model is that of the best checkpoint; needs eval_strategy and save_strategy alike."
    )
    metric_for_best_model: str | None = option(
        None, "Which is best by this metric of its evaluation, with or without eval_; default: loss."
    )
    greater_is_better: bool | None = option(None, "... where it is greatest; default: unless its name ends with loss.")
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to go on from; default: the last one in output_dir."
    )
    callbacks: list[str] = option(
        [],
        "push_to_hub_revision: each checkpoint to a branch of its own, and benchmarks.",
        choices=("push_to_hub_revision",),
    )
    push_to_hub: bool = option(False, "Push the model and its card to the Hub.")
    hub_model_id: str | None = option(None, "Repository to push to; default: output_dir's name.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save", "When push_to_hub pushes: after training, or at each checkpoint too."
    )
    hub_always_push: bool = option(False, "Push a checkpoint even while the one before is still being pushed.")
    hub_private_repo: bool | None = option(None, "Make the repository private where it is new.")
    hub_model_revision: str = option("main", "Branch of push_to_hub_revision and its callback.")
    overwrite_hub_revision: bool = option(False, "Push there even if the branch holds a model.")
    push_to_hub_revision: bool = option(False, "Push the final model to hub_model_revision.")
    ddp_timeout: int = option(
        1800, "Seconds a collective or a phase may take before all stacks are dumped and it ends.", ge=1
    )

    def check_given(self) -> None:
        require(self.output_dir != "", "--output_dir is missing: give a folder for checkpoints, logs and the model.")

    def check(self) -> None:
        super().check()
        require(not self.fp16, "fp16 is not supported (it needs loss scaling): use --bf16 true.")
        require(
            str(self.resume_from_checkpoint).lower() != "false",
            "a run always goes on from its last checkpoint: to start anew give another --output_dir.",
        )
        require(
            self.gradient_checkpointing or not self.activation_offloading,
            "activation_offloading moves what checkpointed blocks save: give --gradient_checkpointing true too.",
        )
        require(
            self.gradient_checkpointing or self.gradient_checkpointing_every == 1,
            "gradient_checkpointing_every says which blocks are checkpointed: give --gradient_checkpointing true too.",
        )
        require(
            self.torch_compile or self.torch_compile_backend in (None, "inductor"),
            "torch_compile_backend says how blocks are compiled: give --torch_compile true too.",
        )
        require(
            not self.benchmark_kwargs or self.benchmarks != [], "benchmark_kwargs would do nothing: give --benchmarks."
        )
        require(
            self.warmup_steps < 1 or self.warmup_steps % 1 == 0,
            f"warmup_steps {self.warmup_steps} is neither a number of steps nor, below 1, a share of them.",
        )
        require(self.max_steps > 0 or self.num_train_epochs > 0, "give --max_steps or --num_train_epochs above 0.")
        if self.load_best_model_at_end:
            self._check_best()

    def _check_best(self) -> None:
        require(
            self.eval_strategy == self.save_strategy != "no",
            "load_best_model_at_end compares checkpoints by their evaluations: give --eval_strategy and "
            f"--save_strategy the same value, steps or epoch (they are {self.eval_strategy} and {self.save_strategy}).",
        )
        every, save = self.eval_steps or self.logging_steps, self.save_steps
        ratio = save / every
        require(
            self.save_strategy == "epoch" or (save < 1) == (every < 1) and round(ratio, 6) == max(1, round(ratio)),
            "load_best_model_at_end needs an evaluation at every checkpoint: make save_steps a multiple of eval_steps "
            f"(they are {save:g} and {every:g}).",
        )
        require(
            not self.save_only_model, "load_best_model_at_end needs whole checkpoints: leave out --save_only_model."
        )

    def resolve(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None:
            if self.greater_is_better is None:
                self.greater_is_better = not self.metric_for_best_model.endswith("loss")
            self.metric_for_best_model = f"eval_{self.metric_for_best_model.removeprefix('eval_')}"
        if str(self.resume_from_checkpoint).lower() == "true":  # the last one in output_dir, as without it
            self.resume_from_checkpoint = None

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run, for a data set that takes `steps_per_epoch` of them."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    @property
    def evaluates(self) -> bool:
        """Whether the run needs a test split."""
        return self.do_eval or self.eval_on_start or self.eval_strategy != "no"

    def due(self, what: Literal["logging", "save", "eval"], step: int, total: int, steps_per_epoch: float) -> bool:
        """Whether `what` is due after `step` of `total`: `<what>_strategy` and `<what>_steps` say so."""
        strategy, every = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps") or self.logging_steps
        if what == "logging" and (step == total or (step == 1 and self.logging_first_step)):
            return strategy != "no"
        if strategy == "epoch":
            done, before = (int(n / steps_per_epoch + 1e-9) for n in (step, step - 1))  # whole epochs
            return step == total or done > before
        between = int(every) if every >= 1 else max(1, math.ceil(every * total))
        return strategy == "steps" and step % between == 0


@dataclass
class SFTConfig(TrainingConfig):
    max_length: int | None = option(
        1024,
        "Longest row in tokens, and with packing the size of a bin; null: rows are as long as they are.",
        alias="max_seq_length",
        ge=2,
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = option(
        "keep_start", "What becomes of longer rows: their start or end is kept, or they are left out."
    )
    packing: bool = option(
        False,
        "A sequence of the batch size is a bin of max_length tokens, filled with whole rows, instead of one row; rows "
        "never see each other, and a batch of the same rows has the same loss.",
    )
    loss_type: Literal["nll", "chunked_nll", "dft"] = option(
        "nll",
        "nll (chunked_nll is its older name): -log p; dft: -p log p with p held constant, dynamic fine-tuning "
        "(arXiv:2508.05629).",
    )
    assistant_only_loss: bool = option(True, "In conversations train what the assistant says; false: everything.")
    completion_only_loss: bool | None = option(
        None,
        "With prompt and completion train the completion; false: the prompt too (or what the assistant says in it).",
    )
    dataset_text_field: str = option("text", "Column of plain text, trained whole.")
    dataset_num_proc: int | None = option(
        None,
        "Processes that tokenise, unless streaming; default: one a core, at most 16.",
        alias="preprocessing_num_workers",
        ge=1,
    )
    dataset_streaming: bool = option(
        False, "Read and tokenise the rows as they are needed, in the order of the files; needs max_steps."
    )
    eos_token: str | None = option(None, "Token that ends a turn; default: the chat template's.")

    def check(self) -> None:
        super().check()
        require(
            not self.dataset_streaming or self.max_steps > 0,
            "the length of a streamed data set is not known: say how long to train with --max_steps.",
        )
        require(
            not self.dataset_streaming
            or "epoch" not in (self.save_strategy, self.eval_strategy, self.logging_strategy),
            "a streamed data set has no epochs: use steps as strategy.",
        )
        require(
            self.max_length is not None or not (self.packing or self.dataset_streaming or self.dry_run),
            "packing, dataset_streaming and dry_run need to know the longest row: give --max_length.",
        )

    def resolve(self) -> None:
        super().resolve()
        self.loss_type = "dft" if self.loss_type == "dft" else "nll"
