"""The options of a run: flat dataclasses, one field per option, checked when they are made (`options.py`).

Both trainers share `ModelConfig` and `ScriptArguments` (of `model_config.py`). `TrainingConfig` holds the options of
any training run, `SFTConfig` adds those of supervised training, and `grpo_core.config` adds those of GRPO. Names and
meanings follow Hugging Face's TrainingArguments, TRL and open-r1 if the option exists there. Every step counted here is
an optimizer step. `sft_core/run/cli.py` reads the options from YAML and the command line.
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
        False, "Move another run's files in output_dir aside instead of refusing to start (nothing is ever deleted)."
    )
    model_init_kwargs: JsonDict | None = option(
        None, "JSON; model options under their from_pretrained names: dtype, revision, quantization_config ..."
    )
    seed: int = option(42, "Seed of the data order and of sampling.")
    num_train_epochs: float = option(1.0, "Passes over the training rows; used if max_steps is not given.")
    max_steps: int = option(-1, "Optimizer steps; -1: num_train_epochs decides.")
    per_device_train_batch_size: int = option(8, "Sequences per device and accumulation step.", ge=1)
    gradient_accumulation_steps: int = option(
        1, "Accumulation steps; an optimizer step takes per_device_train_batch_size x this x devices sequences.", ge=1
    )
    max_tokens_per_micro_batch: int = option(
        8192, "Token budget of one packed forward and backward pass; bounds memory, never changes the gradient.", ge=1
    )
    learning_rate: float = option(2e-5, "Peak learning rate.", ge=0)
    lr_scheduler_type: str = option("linear", f"Schedule after the warm-up: {', '.join(SCHEDULES)}.", choices=SCHEDULES)
    lr_scheduler_kwargs: JsonDict | None = option(
        None,
        'JSON; arguments of the schedule: {"min_lr_rate": 0.1} (or min_lr) for cosine_with_min_lr, num_cycles for '
        "cosine_with_restarts, power and lr_end for polynomial, num_decay_steps for warmup_stable_decay.",
    )
    warmup_ratio: float = option(0.0, "Share of all steps used for a linear warm-up.", ge=0, le=1)
    warmup_steps: float = option(
        0, "Warm-up steps; below 1: a share of all steps; above 0 it replaces warmup_ratio.", ge=0
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay (matrices only).", ge=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1.", ge=0, lt=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2.", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", ge=0)
    max_grad_norm: float = option(1.0, "Clip the gradient norm to this value; 0: no clipping.", ge=0)
    bf16: bool | None = option(None, "Compute in bfloat16 (masters stay float32); default: true on CUDA, else false.")
    fp16: bool = option(False, "Not supported, since float16 needs loss scaling; use bf16.")
    gradient_checkpointing: bool = option(False, "Recompute each block's activations in the backward pass.")
    gradient_checkpointing_every: int = option(
        1, "Recompute only every k-th block: more memory, less recomputation.", ge=1
    )
    activation_offloading: bool = option(
        False, "Keep the saved inputs of checkpointed blocks in host memory; needs gradient_checkpointing."
    )
    cpu_offload: bool = option(False, "Keep parameters, gradients and optimizer state in host memory (FSDP2's policy).")
    torch_compile: bool = option(False, "Compile the decoder blocks (torch.compile); the first steps take longer.")
    torch_compile_backend: Literal["inductor", "aot_eager"] | None = option(
        "inductor", "Backend of torch.compile; aot_eager, for tests, traces the blocks and generates no code."
    )
    merge_adapter: bool = option(False, "Also write the merged model to output_dir/merged, next to the adapter.")
    dry_run: bool = option(False, "Print the planned memory of a step, fail if it does not fit, and exit.")
    dry_run_gpus: int = option(8, "Number of GPUs for dry_run.", ge=1)
    dry_run_gpu_gib: float = option(80.0, "Memory of each GPU for dry_run [GiB].")
    optim: str = option(
        "adamw_torch", f"Always AdamW with float32 moments; accepted: {', '.join(OPTIMIZERS)}.", choices=OPTIMIZERS
    )
    logging_strategy: Literal["no", "steps", "epoch"] = option("steps", "Log every logging_steps, each epoch, or not.")
    logging_steps: float = option(1, "Steps between log lines; below 1: a share of all steps.", gt=0)
    logging_first_step: bool = option(False, "Log the first step too.")
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = option(
        "passive", "Log level of this program, datasets and transformers; passive: unchanged."
    )
    report_to: list[str] = option(
        ["tensorboard"],
        "Trackers to log to: tensorboard, wandb and others that transformers integrates (mlflow, trackio, swanlab and "
        "more); all: every installed one; or none.",
    )
    run_name: str | None = option(None, "Name of the run in wandb and other trackers.")
    wandb_entity: str | None = option(None, "wandb's team or user.")
    wandb_project: str | None = option(None, "wandb's project.")
    wandb_run_group: str | None = option(None, "wandb's group of runs.")
    project: str = option("huggingface", "trackio's project.")
    trackio_space_id: str | None = option(None, "trackio's Space on the Hub; default: local files.")
    trackio_bucket_id: str | None = option(None, "trackio's bucket on the Hub.")
    do_eval: bool = option(False, "Evaluate on the test split after training.")
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "Evaluate during training too: every eval_steps, or each epoch."
    )
    eval_steps: float | None = option(
        None, "Steps between evaluations; below 1: a share; default: logging_steps.", gt=0
    )
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    benchmarks: list[str] = option([], "Tasks of eval.run on which to benchmark the final model; all: every task.")
    benchmark_kwargs: JsonDict | None = option(
        None, 'JSON; options of eval.run for the benchmarks, such as {"num_samples": 4, "limit": 100}.'
    )
    system_prompt: str | None = option(None, "System prompt of the benchmarks.")
    chat_template: str | None = option(
        None,
        "Replaces the tokenizer's chat template: Jinja text, a file with it, or a model whose tokenizer has it.",
        alias="chat_template_path",
    )
    chat_template_kwargs: JsonDict | None = option(
        None,
        'JSON; more variables of the chat template, such as {"enable_thinking": false}; a column chat_template_kwargs '
        "overrides them per row.",
    )
    save_strategy: Literal["no", "steps", "epoch"] = option(
        "steps", "Write checkpoints every save_steps, each epoch, or not."
    )
    save_steps: float = option(500, "Steps between checkpoints; below 1: a share of all steps.", gt=0)
    save_total_limit: int | None = option(None, "Checkpoints to keep, including the best; older ones are removed.")
    save_only_model: bool = option(False, "Save only the model in checkpoints; no run can resume from them.")
    load_best_model_at_end: bool = option(
        False, "Export the best checkpoint's model at the end; eval_strategy and save_strategy must be equal."
    )
    metric_for_best_model: str | None = option(
        None, "Evaluation metric that chooses the best checkpoint, with or without eval_; default: loss."
    )
    greater_is_better: bool | None = option(
        None, "Whether a greater metric_for_best_model is better; default: unless its name ends with loss."
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to resume from; default: the last one in output_dir."
    )
    callbacks: list[str] = option(
        [],
        "push_to_hub_revision: push each checkpoint to its own branch, and benchmark it.",
        choices=("push_to_hub_revision",),
    )
    push_to_hub: bool = option(False, "Push the model and its card to the Hub.")
    hub_model_id: str | None = option(None, "Repository to push to; default: output_dir's name.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save", "When push_to_hub pushes: only after training (end), or also at each checkpoint."
    )
    hub_always_push: bool = option(False, "Push a checkpoint even if the previous push is still running.")
    hub_private_repo: bool | None = option(None, "Make the repository private if it is new.")
    hub_model_revision: str = option("main", "Branch for push_to_hub_revision and its callback.")
    overwrite_hub_revision: bool = option(False, "Push to hub_model_revision even if the branch holds a model.")
    push_to_hub_revision: bool = option(False, "Push the final model to hub_model_revision.")
    ddp_timeout: int = option(
        1800, "Timeout of a collective or a phase [s]; then all stacks are printed and the run ends.", ge=1
    )

    def check_given(self) -> None:
        require(self.output_dir != "", "--output_dir is missing: give a folder for checkpoints, logs and the model.")

    def check(self) -> None:
        super().check()
        require(not self.fp16, "fp16 is not supported (it needs loss scaling): use --bf16 true.")
        require(
            str(self.resume_from_checkpoint).lower() != "false",
            "resume_from_checkpoint false is not supported, as a run always resumes from its last checkpoint: to start "
            "over, give another --output_dir.",
        )
        require(
            self.gradient_checkpointing or not self.activation_offloading,
            "activation_offloading needs checkpointed blocks: give --gradient_checkpointing true too.",
        )
        require(
            self.gradient_checkpointing or self.gradient_checkpointing_every == 1,
            "gradient_checkpointing_every selects checkpointed blocks: give --gradient_checkpointing true too.",
        )
        require(
            self.torch_compile or self.torch_compile_backend in (None, "inductor"),
            "torch_compile_backend has no effect without torch_compile: give --torch_compile true too.",
        )
        require(
            not self.benchmark_kwargs or self.benchmarks != [], "benchmark_kwargs has no effect: give --benchmarks too."
        )
        require(
            self.warmup_steps < 1 or self.warmup_steps % 1 == 0,
            f"warmup_steps {self.warmup_steps} must be a whole number of steps, or below 1 a share of all steps.",
        )
        require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            f"max_steps {self.max_steps} and num_train_epochs {self.num_train_epochs} give no step: set one above 0.",
        )
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
        if str(self.resume_from_checkpoint).lower() == "true":  # resume from the last one, as by default
            self.resume_from_checkpoint = None

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run, if one pass over the data takes `steps_per_epoch` steps."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    @property
    def evaluates(self) -> bool:
        """Whether the run needs a test split."""
        return self.do_eval or self.eval_on_start or self.eval_strategy != "no"

    def due(self, what: Literal["logging", "save", "eval"], step: int, total: int, steps_per_epoch: float) -> bool:
        """Whether `what` is due after `step` of `total`, by the options `<what>_strategy` and `<what>_steps`."""
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
        1024, "Longest row in tokens, and the size of a bin with packing; null: no limit.", alias="max_seq_length", ge=2
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = option(
        "keep_start", "How rows longer than max_length are handled: keep their start or end, or drop the row."
    )
    packing: bool = option(
        False,
        "Fill bins of max_length tokens with whole rows; the batch size then counts bins instead of rows. Rows never "
        "see each other, and a batch of the same rows has the same loss.",
    )
    loss_type: Literal["nll", "chunked_nll", "dft"] = option(
        "nll",
        "nll (older name chunked_nll): -log p; dft: -p log p with p held constant, dynamic fine-tuning "
        "(arXiv:2508.05629).",
    )
    assistant_only_loss: bool = option(
        True, "Train only on the assistant's messages of a conversation; false: on everything."
    )
    completion_only_loss: bool | None = option(
        None, "With prompt and completion, train only on the completion; false: also on the prompt (or its answers)."
    )
    dataset_text_field: str = option("text", "Column of plain text; the whole text is trained.")
    dataset_num_proc: int | None = option(
        None,
        "Processes for tokenisation without streaming; default: one per core, at most 16.",
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
            "the length of a streamed data set is not known: give the number of steps with --max_steps.",
        )
        require(
            not self.dataset_streaming
            or "epoch" not in (self.save_strategy, self.eval_strategy, self.logging_strategy),
            "a streamed data set has no epochs: set save_strategy, eval_strategy and logging_strategy to steps or no.",
        )
        require(
            self.max_length is not None or not (self.packing or self.dataset_streaming or self.dry_run),
            "packing, dataset_streaming and dry_run need a limit for the length of rows: give --max_length.",
        )

    def resolve(self) -> None:
        super().resolve()
        self.loss_type = "dft" if self.loss_type == "dft" else "nll"
