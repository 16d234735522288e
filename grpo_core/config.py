"""The options of a GRPO run, on top of those of any training run (`sft_core/run/config.py`).

The objective's defaults are those of the DeepSeekMath paper (arXiv:2402.03300): per-sequence means, KL with beta 0.04,
clipping at 0.2, one update per rollout. Later variants are options: DAPO (arXiv:2503.14476), Dr. GRPO (2503.20783),
GSPO (2507.18071), CISPO (2506.13585).
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from eval.config import DecontaminateConfig, EvalConfig, PassRateConfig
from gen.config import GenerateConfig
from gen.engine.base import ENGINES
from grpo_core.advantage import SCALES
from grpo_core.loss import LOSS_TYPES, Objective
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.options import option, option_table, require

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
    max_completion_len: int = option(16384, "soft_overlong_punishment: tokens from which the value is -1.")
    soft_punish_cache: int = option(4096, "soft_overlong_punishment: the last tokens before that, where it falls.")


@dataclass
class GRPOConfig(TrainingConfig):
    learning_rate: float = option(1e-6, "Peak learning rate.", ge=0)
    system_prompt: str | None = option(
        None, "System prompt; default: open-r1's <think>/<answer> prompt; '' for none. Benchmarks: only if given."
    )
    prompts_per_step: int | None = option(
        None,
        "Prompts a rollout; default: per_device_train_batch_size x gradient_accumulation_steps x ranks completions.",
        ge=1,
    )
    num_generations: int = option(8, "Completions per prompt: the group G.", ge=2)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; default: num_generations.", ge=1
    )
    num_iterations: int = option(1, "Optimizer steps taken on each rollout.", ge=1)
    max_prompt_length: int = option(512, "Prompts longer than this many tokens are left out and counted.", ge=1)
    max_completion_length: int = option(256, "Longest completion in tokens.", ge=1)
    temperature: float = option(1.0, "Sampling temperature; every log-prob of the trainer is taken at it too.", gt=0)
    top_p: float = option(1.0, "Refused below 1 in training: the trainer scores the whole distribution.")
    top_k: int = option(0, "Refused above 0 in training.")
    min_p: float | None = option(None, "Refused in training.")
    repetition_penalty: float = option(1.0, "Refused other than 1 in training.")
    loss_type: str = option("grpo", f"Aggregation and objective: {', '.join(LOSS_TYPES)}.")
    beta: float = option(0.04, "Weight of the KL to the reference model; 0: no reference model is loaded.")
    epsilon: float = option(0.2, "The ratio is clipped below at 1 - epsilon.")
    epsilon_high: float | None = option(
        None, "... and above at 1 + epsilon_high (default epsilon); cispo's cap itself."
    )
    delta: float | None = option(
        None, "Upper bound of the unclipped ratio (two-sided clipping); best above 1 + epsilon_high."
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio per token, or per sequence (GSPO)."
    )
    scale_rewards: str = option(
        "group", "What the advantage is divided by: the std of the group (true), of the batch, or none (false)."
    )
    old_logps: Literal["policy", "sampler"] = option(
        "policy", "Whose log-probs are `old`: the policy's, or the engine's (another algorithm)."
    )
    sampler_ratio_cap: float = option(
        2.0, "Truncation of the policy / sampler ratio that corrects the engine's mismatch."
    )
    mask_truncated_completions: bool = option(False, "Leave completions cut by length out of the loss and its counts.")
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.")
    reward_weights: list[float] | None = option(None, "One weight a reward function; default: all 1.")
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
    save_rollouts: str | None = option(None, "Folder to record every rollout in (parquet).")
    rollouts_from: str | None = option(None, "Train from the rollouts recorded in this folder, without an engine.")
    log_completions: bool = option(True, "Log samples to completions.jsonl and, as text, to TensorBoard.")
    num_completions_to_print: int = option(2, "Completions shown as text in each log entry.")

    def check(self) -> None:
        super().check()
        self.objective()  # checks its options
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

    @property
    def _scale(self) -> str:
        return {"true": "group", "false": "none"}.get(self.scale_rewards.lower(), self.scale_rewards)

    def prompts_a_rollout(self, world_size: int) -> int:
        """Prompts sampled together; open-r1's batch sizes are rounded up to whole groups."""
        if self.prompts_per_step is not None:
            return self.prompts_per_step
        completions = self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size
        return math.ceil(completions / self.num_generations)

    def completions_a_rank(self, world_size: int) -> int:
        """Of a rollout, on the rank that has most: a group is never split."""
        return self.num_generations * math.ceil(self.prompts_a_rollout(world_size) / world_size)

    def objective(self) -> Objective:
        """The options that `grpo_core.loss` knows."""
        return Objective(**{field.name: getattr(self, field.name) for field in fields(Objective)})


def option_tables() -> str:
    """README's section of options, all of it (`python -m grpo_core.config` prints it)."""
    tables = [
        ("Model (both trainers)", option_table(ModelConfig)),
        ("Data (both trainers)", option_table(ScriptArguments)),
        ("Training (both trainers)", option_table(TrainingConfig)),
        ("SFT only", option_table(SFTConfig, TrainingConfig)),
        ("GRPO only: data and rewards", option_table(GRPOScriptArguments, ScriptArguments)),
        ("GRPO only: sampling, objective, engine", option_table(GRPOConfig, TrainingConfig)),
        ("Evaluation (eval.run)", option_table(EvalConfig)),
        ("Generation (gen.generate)", option_table(GenerateConfig)),
        ("Data tools: eval.pass_rate, with eval.run's but tasks", option_table(PassRateConfig, EvalConfig)),
        ("Data tools: eval.decontaminate", option_table(DecontaminateConfig)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables)


if __name__ == "__main__":
    print(option_tables())
