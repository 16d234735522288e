"""The options of a GRPO run, in addition to those of any training run (`sft_core/run/config.py`).

The objective's defaults are those of the DeepSeekMath paper (arXiv:2402.03300): per-sequence means, KL with beta 0.04,
clipping at 0.2, one update per rollout batch. Later variants are options under TRL's names; `loss.py` lists them with
their papers.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from gen.engine.base import ENGINES
from grpo_core.advantage import SCALES
from grpo_core.objective import CLIPPED, Objective, ObjectiveOptions
from sft_core.run.config import ScriptArguments, TrainingConfig
from sft_core.run.open_r1_keys import TRL_DEFAULTS
from sft_core.run.options import JsonDict, is_a, option, require

SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>"
)


@dataclass
class GRPOScriptArguments(ScriptArguments):
    dataset_prompt_column: str | None = option(
        None, "Column of the prompt; default: `prompt` if the data has it, else `problem`."
    )
    reward_funcs: list[str] = option(["accuracy", "format"], "Rewards by name, or custom ones as module:function.")
    drop_unparseable_golds: bool = option(
        True, "Leave out (and count) rows whose gold answer cannot be parsed: they give no signal."
    )
    cosine_min_value_wrong: float = option(-1.0, "cosine: value for a wrong answer of length 0.")
    cosine_max_value_wrong: float = option(-0.5, "cosine: value for a wrong answer of cosine_max_len or longer.")
    cosine_min_value_correct: float = option(0.5, "cosine: value for a correct answer of cosine_max_len or longer.")
    cosine_max_value_correct: float = option(1.0, "cosine: value for a correct answer of length 0.")
    cosine_max_len: int = option(1000, "cosine: length from which the value is constant, in characters.")
    cosine_in_tokens: bool = option(False, "cosine: count lengths in tokens.")
    repetition_n_grams: int = option(3, "repetition_penalty: n of the n-grams.")
    repetition_max_penalty: float = option(-1.0, "repetition_penalty: value if every n-gram is a repetition.")
    code_language: str = option(
        "python",
        "code_format: language of the code block that an answer must have, if the data has no column `language`.",
        choices=("python", "javascript", "r", "java", "bash", "cpp"),
    )
    max_completion_len: int = option(16384, "soft_overlong_punishment: length in tokens from which the value is -1.")
    soft_punish_cache: int = option(
        4096, "soft_overlong_punishment: number of tokens before that length over which the value falls from 0."
    )

    def check(self) -> None:
        super().check()
        require(self.reward_funcs != [], "reward_funcs is empty: leave it out for accuracy and format.")


@dataclass
class GRPOConfig(ObjectiveOptions, TrainingConfig):
    learning_rate: float = option(1e-6, "Peak learning rate.", ge=0)
    system_prompt: str | None = option(
        None, "System prompt; default: open-r1's <think>/<answer> prompt; '' for none. Benchmarks use it only if given."
    )
    prompts_per_step: int | None = option(
        None,
        "Prompts per optimizer step; default: as many as give per_device_train_batch_size x "
        "gradient_accumulation_steps x ranks completions.",
        ge=1,
    )
    num_generations: int = option(8, "Completions per prompt (the group size G).", ge=2)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; default: num_generations.", ge=1
    )
    steps_per_generation: int | None = option(
        None,
        "Accumulation steps per rollout batch, as TRL counts them: k x gradient_accumulation_steps means k optimizer "
        "steps on each rollout batch. It has the prompts of k steps, and each step takes an equal part of every group; "
        "default: gradient_accumulation_steps.",
        ge=1,
    )
    generation_batch_size: int | None = option(
        None, "Instead of steps_per_generation: completions per rollout batch, over all ranks.", ge=1
    )
    dynamic_sampling: bool = option(
        False,
        "Sample rounds of prompts until the rollout batch is full of groups whose rewards differ (DAPO, "
        "arXiv:2503.14476). Surplus groups are dropped. num_train_epochs assumes one round per rollout batch.",
    )
    dynamic_sampling_max_batches: int = option(
        10, "Maximum number of rounds; then a step takes fewer groups, or the run stops if there is none.", ge=1
    )
    num_iterations: int = option(1, "Passes over each rollout batch.", ge=1)
    max_prompt_length: int = option(512, "Prompts longer than this many tokens are left out and counted.", ge=1)
    max_completion_length: int = option(256, "Longest completion in tokens.", ge=1)
    shuffle_dataset: bool = option(True, "Shuffle the prompts before every pass; false: keep the order of the data.")
    temperature: float = option(1.0, "Sampling temperature; the trainer also computes all log-probs at it.", gt=0)
    top_p: float = option(1.0, "Must be 1 in training: the trainer scores the whole distribution.")
    top_k: int = option(0, "Must be 0 in training.")
    min_p: float | None = option(None, "Must be left out in training.")
    repetition_penalty: float = option(1.0, "Must be 1 in training.")
    generation_kwargs: JsonDict | None = option(
        None,
        'JSON with the only key {"stop_token_ids": [...]}, tokens that also end a completion; other options of the '
        "sampler are refused, because they would change what is sampled.",
    )
    sync_ref_model: bool = option(False, "Move the reference model towards the policy (TR-DPO, arXiv:2404.09656).")
    ref_model_mixup_alpha: float = option(
        0.6, "sync_ref_model: the reference becomes alpha x policy + (1 - alpha) x reference, in float32.", gt=0, le=1
    )
    ref_model_sync_steps: int = option(512, "sync_ref_model: optimizer steps between two such updates.", ge=1)
    scale_rewards: str = option(
        "group", "Divide advantages by the std of the group (or true), of the batch, or by nothing: none (or false)."
    )
    old_logps: Literal["policy", "sampler"] = option(
        "policy", "Which log-probs are the old ones: the policy's, or the sampler's (another algorithm)."
    )
    vllm_importance_sampling_correction: bool = option(
        True, "Correct the mismatch between policy and sampler by their ratio, for any engine."
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that were cut at max_completion_length out of the loss and its denominators."
    )
    use_adaptive_entropy: bool = option(
        False,
        "After each step increase entropy_coef by entropy_coef_delta if the entropy is at most entropy_target, else "
        "decrease it; while the entropy is above the target no bonus is applied (Skywork-OR1, arXiv:2505.22312).",
    )
    entropy_coef_min: float = option(0.0, "use_adaptive_entropy: smallest entropy_coef.")
    entropy_coef_max: float = option(1.0, "use_adaptive_entropy: largest entropy_coef.")
    entropy_coef_delta: float = option(0.005, "use_adaptive_entropy: change of entropy_coef per step.", gt=0)
    entropy_target: float = option(
        0.2, "use_adaptive_entropy: target of the mean entropy of the kept tokens, in nats.", ge=0
    )
    reward_weights: list[float] | None = option(None, "One weight per reward function; default: all 1.")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize",
        "normalize_then_sum: normalise each reward function within the group, then their sum over the step (GDPO, "
        "arXiv:2601.05242).",
    )
    reward_num_workers: int = option(2, "Worker processes per rank that score completions.", ge=1)
    reward_timeout: float = option(
        5.0, "Seconds a reward may take per completion; then its worker is killed and the completion unscored.", gt=0
    )
    engine: str | None = option(
        None,
        f"Inference engine: {', '.join(ENGINES)} (plain torch: slow, exact); default: vllm, unless use_vllm is false.",
        choices=ENGINES,
    )
    use_vllm: bool | None = option(None, "true: engine vllm, false: engine torch (TRL's name for the choice).")
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "The engine runs in the training processes; server is treated as colocate, with a warning."
    )
    vllm_gpu_memory_utilization: float = option(0.3, "Fraction of GPU memory for the engine.", gt=0, lt=1)
    vllm_enable_sleep_mode: bool = option(
        False, "Free the engine's GPU memory during the update; it receives the weights again before it samples."
    )
    vllm_tensor_parallel_size: int = option(1, "Ranks that share one engine; must divide the number of ranks.", ge=1)
    max_logp_difference: float = option(
        0.1, "Stop the run if log-probs of engine and policy differ by more than this on average."
    )
    share_prompts: bool = option(
        True, "Compute a prompt once for all completions of its group in a micro-batch; the gradient is the same."
    )
    save_rollouts: str | None = option(None, "Folder in which to record every rollout batch (parquet).")
    rollouts_from: str | None = option(None, "Train from the rollouts recorded in this folder, without an engine.")
    log_completions: bool = option(True, "Log completions to completions.jsonl and, as text, to TensorBoard.")
    num_completions_to_print: int | None = option(
        2, "Completions written as text to each log entry; null: all completions of the rank."
    )

    def check(self) -> None:
        super().check()
        self._check_objective()
        require(self._scale in SCALES, f"unknown scale_rewards {self.scale_rewards!r}: give group, batch or none.")
        chosen = "torch" if self.use_vllm is False else "vllm"
        require(
            self.use_vllm is None or self.engine in (None, chosen),
            f"engine {self.engine} and use_vllm {self.use_vllm} contradict each other: leave one out, or "
            f"give --use_vllm {str(chosen == 'torch').lower()}.",
        )
        require(
            self.engine != "torch" or self.vllm_tensor_parallel_size == 1,
            "engine torch has no tensor parallelism: leave out --vllm_tensor_parallel_size.",
        )
        require(
            self.steps_per_generation is None or self.generation_batch_size is None,
            "steps_per_generation and generation_batch_size set the same thing: give only one of them.",
        )
        require(
            (self.steps_per_generation or 0) % self.gradient_accumulation_steps == 0,
            f"steps_per_generation {self.steps_per_generation} counts accumulation steps and must be a multiple of "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}: leave it out for one optimizer step per "
            "rollout batch.",
        )
        self._check_generation_kwargs()
        neutral = self.top_p == 1.0 and self.top_k <= 0 and not self.min_p and self.repetition_penalty == 1.0
        require(
            neutral,
            f"top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}, repetition_penalty {self.repetition_penalty} "
            "would change what is sampled but not what is scored: leave them out in training (temperature is allowed).",
        )

    def resolve(self) -> None:
        super().resolve()
        self.scale_rewards = self._scale
        self.engine = self.engine or ("torch" if self.use_vllm is False else "vllm")

    def _check_generation_kwargs(self) -> None:
        ids, others = self.more_stop_ids, set(self.generation_kwargs or {}) - {"stop_token_ids"}
        require(is_a(ids, list[int]), f"generation_kwargs stop_token_ids must be a list of token ids, got {ids!r}.")
        require(
            not others,
            f"generation_kwargs {sorted(others)} would change what is sampled but not what is scored: leave them out "
            "(use the options temperature and max_completion_length).",
        )

    @property
    def more_stop_ids(self) -> list[int]:
        return dict(self.generation_kwargs or {}).get("stop_token_ids", [])

    @property
    def _scale(self) -> str:
        return {"true": "group", "false": "none"}.get(self.scale_rewards.lower(), self.scale_rewards)

    def _check_objective(self) -> None:
        objective, loss = self.objective(), self.loss_type  # checks its options
        low, high, adaptive = self.entropy_coef_min, self.entropy_coef_max, self.use_adaptive_entropy
        require(
            not adaptive or low <= self.entropy_coef <= high < math.inf,
            f"entropy_coef {self.entropy_coef} must lie between entropy_coef_min, {low}, and entropy_coef_max, {high}.",
        )
        own, policy = objective.own is not None, self.old_logps == "policy"
        corrected = policy and self.vllm_importance_sampling_correction
        clipped, bounds = own or loss in CLIPPED, f"loss_type {', '.join(CLIPPED)}"
        summed = self.multi_objective_aggregation == "sum_then_normalize"
        needs = {  # prefix of option names: (whether these options have an effect, what they need for one)
            "epsilon_high": (clipped or loss == "cispo", f"{bounds}, cispo"),
            "epsilon": (clipped, bounds),
            "delta": (clipped, bounds),
            "sapo_": (own or loss == "sapo", "loss_type sapo"),
            "vespo_": (own or loss == "vespo", "loss_type vespo"),
            "importance_sampling_level": (loss != "vespo", "another loss_type (vespo always uses sequence ratios)"),
            "use_bias_correction_kl": (self.beta > 0, "beta above 0"),
            "sync_ref_model": (self.beta > 0, "beta above 0"),
            "ref_model_": (self.sync_ref_model, "sync_ref_model"),
            "vllm_importance_sampling_correction": (policy, "old_logps policy"),
            "vllm_importance_sampling_": (corrected, "vllm_importance_sampling_correction and old_logps policy"),
            "dynamic_sampling_": (self.dynamic_sampling, "dynamic_sampling"),
            "entropy_coef_": (adaptive, "use_adaptive_entropy"),
            "entropy_target": (adaptive, "use_adaptive_entropy"),
            "scale_rewards": (summed or self._scale == "group", "multi_objective_aggregation sum_then_normalize"),
        }
        there = TRL_DEFAULTS["trl 1.16.0"]["GRPOConfig"]  # accepted: a full TRL configuration lists its defaults too
        for field in fields(self):
            value = getattr(self, field.name)
            has_effect, needed = next((n for name, n in needs.items() if field.name.startswith(name)), (True, ""))
            require(
                has_effect or value in (field.default, there.get(field.name)),
                f"{field.name} {value} would have no effect: it needs {needed}; set that, or leave it out.",
            )

    def completions_a_step(self, world_size: int) -> int:
        if self.prompts_per_step is not None:
            return self.prompts_per_step * self.num_generations
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def mini_batches(self, world_size: int) -> int:
        """Optimizer steps per pass over a rollout batch.

        Raises:
            ValueError: generation_batch_size does not fit the other batch sizes.
        """
        size, of_step = self.generation_batch_size, self.completions_a_step(world_size)
        if size is None:
            return (self.steps_per_generation or self.gradient_accumulation_steps) // self.gradient_accumulation_steps
        require(
            size % of_step == 0 and size % self.num_generations == 0,
            f"generation_batch_size {size} must be a multiple of num_generations {self.num_generations} and of the "
            f"{of_step} completions that an optimizer step takes: give {math.lcm(of_step, self.num_generations)}, or "
            "change the batch sizes.",
        )
        return size // of_step

    def prompts_a_rollout(self, world_size: int) -> int:
        """Prompts per rollout batch. Batch sizes in completions, as in open-r1, are rounded up to whole groups."""
        completions = self.completions_a_step(world_size) * self.mini_batches(world_size)
        return math.ceil(completions / self.num_generations)

    def completions_a_rank(self, world_size: int) -> int:
        """Completions of a rollout batch on the rank that samples most of them. A group is sampled by one rank."""
        return self.num_generations * math.ceil(self.prompts_a_rollout(world_size) / world_size)

    @property
    def skips_groups(self) -> bool:
        """Whether groups without advantages get no forward and backward pass: they have no gradient, and their
        entropies are only needed for a logged mean."""
        return self.objective().by_advantage and self.top_entropy_quantile == 1 and not self.use_adaptive_entropy

    def objective(self) -> Objective:
        """The options of the objective, for `grpo_core.loss`."""
        values = {field.name: getattr(self, field.name) for field in fields(Objective)}
        if not self.vllm_importance_sampling_correction:
            values["vllm_importance_sampling_mode"] = None
        return Objective(**values)
