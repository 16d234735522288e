"""Evaluates the policy on the test split during training: samples and scores as training does, without an update."""

import math
from types import SimpleNamespace

from tqdm import tqdm

from eval.workers import WorkerPool
from gen.engine.base import Engine, Sampling
from grpo_core.metrics import rollout_metrics
from grpo_core.prepare import Run
from grpo_core.rollout import Sample, Scorer, gather_summaries, sample_groups, sample_seed

STEP = -1  # for the seeds of sampling: all evaluations use the same ones, so they differ only by the policy


def evaluate_policy(
    engine: Engine | None, run: Run, pool: WorkerPool, trainer_state: SimpleNamespace
) -> dict[str, float]:
    """Metrics of `num_generations_eval` completions per test prompt, sampled from the engine's current weights. They
    are those of a training step with the prefix `eval_`, as in TRL. A collective.
    """
    assert engine is not None, "prepare refuses an evaluation without an engine"
    config = run.config
    n = config.num_generations_eval or config.num_generations
    at_once = max(1, run.max_batch // n) * run.world_size  # prompts; the engine queues those that do not fit
    samples: list[Sample] = []
    sampling = Sampling(n, config.max_completion_length, config.temperature, run.sampling_ends)
    for start in tqdm(range(0, len(run.test_prompts), at_once), desc="evaluate", disable=None, leave=False):
        groups = range(start + run.rank, min(start + at_once, len(run.test_prompts)), run.world_size)
        chosen = {group: run.test_prompts[group] for group in groups}
        scorer = Scorer(chosen, run.reward_funcs, config, run.tokenizer, pool, trainer_state)
        seeds = [sample_seed(config.seed, STEP, group) for group in groups]
        samples += sample_groups(engine, chosen, sampling, seeds, scorer.begin)
        for line in scorer.finish():
            tqdm.write(f"evaluation: {line}")
    metrics = rollout_metrics(gather_summaries(samples), run.reward_names)
    known = {f"eval_{name}": value for name, value in metrics.items() if not math.isnan(value)}
    return known | {"eval_samples": float(len(run.test_prompts))}
