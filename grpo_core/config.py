"""The options of a GRPO run, on top of those of any training run (`sft_core/run/config.py`).

The objective's defaults are those of the DeepSeekMath paper (arXiv:2402.03300): per-sequence means, KL with beta 0.04,
clipping at 0.2, one update per rollout. Later variants are options (`loss.py` lists them with their papers), each under
TRL's name.
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
        None, "Column of the prompt; default: `prompt` if there, else `problem`."
    )
    reward_funcs: list[str] = option(["accuracy", "format"], "Rewards by name, or your own as module:function.")
    drop_unparseable_golds: bool = option(
        True, "Leave out (and count) rows whose gold answer cannot be parsed: they give no signal."
    )
    cosine_min_value_wrong: float = option(-1.0, "cosine's value for a wrong answer of no length.")
    cosine_max_value_wrong: float = option(-0.5, "... of cosine_max_len: a long wrong answer costs less.")
    cosine_min_value_correct: float = option(0.5, "cosine's value for a right answer of cosine_max_len.")
    cosine_max_value_correct: float = option(1.0, "... of no length: a short right answer gains most.")
    cosine_max_len: int = option(1000, "Length at which cosine stays where it is, in characters.")
    cosine_in_tokens: bool = option(False, "Count cosine's lengths in tokens.")
    repetition_n_grams: int = option(3, "n of the n-grams that repetition_penalty counts.")
    repetition_max_penalty: float = option(-1.0, "repetition_penalty's value where every n-gram repeats.")
    code_language: str = option(
        "python",
        "code_format: language of the block that an answer must have, where the data has no column `language`.",
        choices=("python", "javascript", "r", "java", "bash", "cpp"),
    )
    max_completion_len: int = option(16384, "soft_overlong_punishment: tokens from which the value is -1.")
    soft_punish_cache: int = option(4096, "soft_overlong_punishment: the last tokens before that, where it falls.")

    def check(self) -> None:
        super().check()
        require(self.reward_funcs != [], "reward_funcs names no reward: leave it out for accuracy and format.")


@dataclass
class GRPOConfig(ObjectiveOptions, TrainingConfig):
    learning_rate: float = option(1e-6, "Peak learning rate.", ge=0)
    system_prompt: str | None = option(
        None, "System prompt; default: open-r1's <think>/<answer> prompt; '' for none. Benchmarks: only if given."
    )
    prompts_per_step: int | None = option(
        None,
        "Prompts an optimizer step; default: per_device_train_batch_size x gradient_accumulation_steps x ranks "
        "completions.",
        ge=1,
    )
    num_generations: int = option(8, "Completions per prompt: the group G.", ge=2)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; default: num_generations.", ge=1
    )
    steps_per_generation: int | None = option(
        None,
        "Accumulation steps whose completions are sampled together, as TRL counts them: k x "
        "gradient_accumulation_steps are k optimizer steps on each rollout, which has the prompts of k steps, and "
        "each takes an equal part of every group; default: gradient_accumulation_steps.",
        ge=1,
    )
    generation_batch_size: int | None = option(
        None, "The same said otherwise: completions a rollout, over all ranks.", ge=1
    )
    dynamic_sampling: bool = option(
        False,
        "Sample rounds of prompts until the rollout is full of groups whose rewards differ, the first in the order of "
        "prompts (DAPO, arXiv:2503.14476); what is over is dropped (num_train_epochs plans one round each).",
    )
    dynamic_sampling_max_batches: int = option(
        10, "Most rounds; then it takes fewer groups, or ends without one.", ge=1
    )
    num_iterations: int = option(1, "Passes over each rollout.", ge=1)
    max_prompt_length: int = option(512, "Prompts longer than this many tokens are left out and counted.", ge=1)
    max_completion_length: int = option(256, "Longest completion in tokens.", ge=1)
    shuffle_dataset: bool = option(True, "A new order of the prompts in every pass; false: that of the data.")
    temperature: float = option(1.0, "Sampling temperature; every log-prob of the trainer is taken at it too.", gt=0)
    top_p: float = option(1.0, "Refused below 1 in training: the trainer scores the whole distribution.")
    top_k: int = option(0, "Refused above 0 in training.")
    min_p: float | None = option(None, "Refused in training.")
    repetition_penalty: float = option(1.0, "Refused other than 1 in training.")
    generation_kwargs: JsonDict | None = option(
        None,
        'JSON; of the sampler\'s own options {"stop_token_ids": [...]}, which end a completion too; others, which '
        "would change what is sampled, are refused.",
    )
    sync_ref_model: bool = option(False, "The reference model follows the policy (TR-DPO, arXiv:2404.09656).")
    ref_model_mixup_alpha: float = option(
        0.6, "... it becomes alpha x the policy + (1 - alpha) x itself, in float32,", gt=0, le=1
    )
    ref_model_sync_steps: int = option(512, "... after every so many optimizer steps.", ge=1)
    scale_rewards: str = option(
        "group", "What the advantage is divided by: the std of the group (true), of the batch, or none (false)."
    )
    old_logps: Literal["policy", "sampler"] = option(
        "policy", "Whose log-probs are `old`: the policy's, or the engine's (another algorithm)."
    )
    vllm_importance_sampling_correction: bool = option(
        True, "Correct the engine's mismatch by the ratio policy / sampler, of any engine."
    )
    mask_truncated_completions: bool = option(False, "Leave completions cut by length out of the loss and its counts.")
    use_adaptive_entropy: bool = option(
        False,
        "After each step move entropy_coef by entropy_coef_delta, up where the entropy is at most entropy_target, else "
        "down; it applies where the last step's entropy was at most the target (Skywork-OR1, arXiv:2505.22312).",
    )
    entropy_coef_min: float = option(0.0, "Least entropy_coef then.")
    entropy_coef_max: float = option(1.0, "Greatest entropy_coef then.")
    entropy_coef_delta: float = option(0.005, "By how much it moves then.", gt=0)
    entropy_target: float = option(0.2, "The mean entropy of the tokens kept (in nats) that it steers to then.", ge=0)
    reward_weights: list[float] | None = option(None, "One weight a reward function; default: all 1.")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize",
        "normalize_then_sum: each reward function within the group, then their sum over the step (GDPO, "
        "arXiv:2601.05242).",
    )
    reward_num_workers: int = option(2, "Processes per rank that score completions.", ge=1)
    reward_timeout: float = option(
        5.0, "Seconds a check may take; then it is killed and the completion not scored.", gt=0
    )
    engine: str | None = option(
        None,
        f"What samples: {', '.join(ENGINES)} (plain torch: slow, exact); default: vllm, unless use_vllm is false.",
        choices=ENGINES,
    )
    use_vllm: bool | None = option(None, "true: engine vllm, false: engine torch (TRL's name for the choice).")
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "The engine lives in the ranks; server is taken for colocate, with a warning."
    )
    vllm_gpu_memory_utilization: float = option(0.3, "Share of GPU memory for the engine.", gt=0, lt=1)
    vllm_enable_sleep_mode: bool = option(
        False, "The engine gives its GPU memory back during the update, and gets weights anew before it samples."
    )
    vllm_tensor_parallel_size: int = option(1, "Ranks that share one engine; must divide the number of ranks.", ge=1)
    max_logp_difference: float = option(
        0.1, "The run stops when engine and policy log-probs differ by more on average."
    )
    share_prompts: bool = option(
        True, "Compute a prompt once for the completions of its group in a micro-batch; the gradient is the same."
    )
    save_rollouts: str | None = option(None, "Folder to record every rollout in (parquet).")
    rollouts_from: str | None = option(None, "Train from the rollouts recorded in this folder, without an engine.")
    log_completions: bool = option(True, "Log samples to completions.jsonl and, as text, to TensorBoard.")
    num_completions_to_print: int | None = option(
        2, "Completions shown as text in each log entry; null: all of the rank's."
    )

    def check(self) -> None:
        super().check()
        self._check_objective()
        require(self._scale in SCALES, f"unknown scale_rewards {self.scale_rewards!r}: group, batch or none.")
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
            "steps_per_generation and generation_batch_size say the same: give one of them.",
        )
        require(
            (self.steps_per_generation or 0) % self.gradient_accumulation_steps == 0,
            f"steps_per_generation {self.steps_per_generation} counts accumulation steps and must be a multiple of "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}: leave it out for one optimizer step on "
            "each rollout.",
        )
        self._check_generation_kwargs()
        neutral = self.top_p == 1.0 and self.top_k <= 0 and not self.min_p and self.repetition_penalty == 1.0
        require(
            neutral,
            "top_p, top_k, min_p and repetition_penalty change what is sampled but not what is scored: "
            "leave them out in training (temperature is fine).",
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
            f"generation_kwargs {sorted(others)} would change what is sampled, but not what is scored: leave that out "
            "(give temperature and max_completion_length as options of their own).",
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
        needs = {  # the beginning of options' names: whether they have an effect, and what they need for one
            "epsilon_high": (clipped or loss == "cispo", f"{bounds}, cispo"),
            "epsilon": (clipped, bounds),
            "delta": (clipped, bounds),
            "sapo_": (own or loss == "sapo", "loss_type sapo"),
            "vespo_": (own or loss == "vespo", "loss_type vespo"),
            "importance_sampling_level": (loss != "vespo", "another loss_type: vespo takes sequences' ratios itself"),
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
        there = TRL_DEFAULTS["trl 1.16.0"]["GRPOConfig"]  # with a whole configuration, which says nothing by them
        for field in fields(self):
            value = getattr(self, field.name)
            has_effect, needed = next((n for name, n in needs.items() if field.name.startswith(name)), (True, ""))
            require(
                has_effect or value in (field.default, there.get(field.name)),
                f"{field.name} {value} would have no effect: it needs {needed}; leave it out.",
            )

    def completions_a_step(self, world_size: int) -> int:
        if self.prompts_per_step is not None:
            return self.prompts_per_step * self.num_generations
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def mini_batches(self, world_size: int) -> int:
        """Optimizer steps of one pass over a rollout.

        Raises:
            ValueError: generation_batch_size does not fit the others.
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
        """Prompts sampled together; open-r1's batch sizes are rounded up to whole groups."""
        completions = self.completions_a_step(world_size) * self.mini_batches(world_size)
        return math.ceil(completions / self.num_generations)

    def completions_a_rank(self, world_size: int) -> int:
        """Of a rollout, on the rank that has most: a group is never split."""
        return self.num_generations * math.ceil(self.prompts_a_rollout(world_size) / world_size)

    @property
    def skips_groups(self) -> bool:
        """Whether groups without advantages get no pass: they have no gradient, and nothing else is made of their
        entropies than their mean."""
        return self.objective().by_advantage and self.top_entropy_quantile == 1 and not self.use_adaptive_entropy

    def objective(self) -> Objective:
        """The options that `grpo_core.loss` knows."""
        values = {field.name: getattr(self, field.name) for field in fields(Objective)}
        if not self.vllm_importance_sampling_correction:
            values["vllm_importance_sampling_mode"] = None
        return Objective(**values)
