r"""Before any GPU hour is spent: would this recipe's data, prompt, limits and rewards give GRPO a signal?

    python -m grpo_core.audit --config recipe.yaml [--audit_prompts 32] [--audit_samples false] [--field value ...]

It reads a training recipe and looks at some prompts of its data: can their gold answers be parsed, do they fit, does
the completion that the prompt asks for get the full value of each reward, what do the rewards pay for text that
deserves nothing, and (with samples from the initial weights) how often is the model right, which groups have spread,
how many completions are cut. One process; it writes nothing and needs no output_dir. Exit code 0: there is a signal;
1: there is none, and why; 2: bad input, as in training.

Left out on purpose: any judgement of the data itself (duplicates, difficulty, leaks), and of rewards beyond probes.
"""

import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import mean

from eval.verify import parse_gold
from eval.workers import Unscored, WorkerPool
from gen.engine.base import Sampling, check_engine_available
from grpo_core.audit_probes import Report, audit_rewards, tell
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.metrics import effective_groups
from grpo_core.prepare import Run, check_lengths, start_engine
from grpo_core.rewards import accuracy_reward, compares_with_gold, get_reward_funcs, gold_text, reward_name
from grpo_core.rollout import Prompt, Sample, Scorer, advantages_of, load_prompts, sample_groups, sample_seed
from grpo_core.scoring import gold_answers, unparseable_golds
from sft_core.data.rows import row_order
from sft_core.model.policy import local_copy
from sft_core.prepare import prepare_base
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig
from sft_core.run.logging import start_logging
from sft_core.run.options import Options, option, require


@dataclass
class AuditConfig(Options):
    audit_prompts: int = option(32, "Prompts to look at: the first of the data in a seeded order.", ge=1)
    audit_samples: bool = option(
        True, "Sample num_generations completions of each; false: no model is loaded, only data and rewards are probed."
    )


def main(argv: list[str] | None = None) -> None:
    """Print the audit. SystemExit(1) where training would have no signal, SystemExit(2) for bad input."""
    report = Report()
    with distributed.usage_errors():
        run, samples = set_up(sys.argv[1:] if argv is None else argv)
        pool = WorkerPool(run.config.reward_num_workers, run.config.reward_timeout)
        tell("audited", f"{len(run.prompts)} of {len(run.rows)} prompts for {run.model.model_name_or_path}")
        usable, answer = audit_data(run, pool, report)
        audit_rewards(run, usable[0] if usable else run.prompts[0], answer, pool, report, decisive=not samples)
    if samples and usable:
        audit_samples(run, usable, pool, report)
    pool.close()
    distributed.shutdown()
    for text in report.advice:
        print(f"- {text}")
    if report.no_signal:
        print("NO SIGNAL: training would learn nothing.", *report.no_signal, sep="\n- ")
        raise SystemExit(1)
    print("Training would have a signal." if samples else "No obstacle found; without samples, spread is not known.")


def set_up(argv: list[str]) -> tuple[Run, bool]:
    """What training's `prepare` checks, without the run: its prompts are those to audit, too long ones among them.

    Raises:
        ValueError: the user's input, in one sentence that names the remedy.
    """
    require(os.environ.get("WORLD_SIZE", "1") == "1", "the audit is one process: start it with python, not torchrun.")
    types = (ModelConfig, GRPOScriptArguments, GRPOConfig, AuditConfig)
    start_logging()
    # An output_dir need not be given, for none is touched; nor is anything pushed, reported or evaluated.
    model, data, config, audit = (given.frozen() for given in parse(types, ["--output_dir=none", *argv]))
    config = replace(
        config,
        push_to_hub=False,
        push_to_hub_revision=False,
        callbacks=[],
        benchmarks=[],
        report_to=["none"],
        do_eval=False,
        eval_strategy="no",
        rollouts_from=None,
    )
    if audit.audit_samples:
        check_engine_available(config.engine or "vllm")
        require(
            config.vllm_tensor_parallel_size == 1,
            "the audit is one process: give --vllm_tensor_parallel_size 1, or --audit_samples false.",
        )
    functions = get_reward_funcs(data)
    base = prepare_base("grpo", model, data, config)
    check_lengths(base.model_info, config)
    order = row_order(len(base.rows), config.seed, 0, min(audit.audit_prompts, len(base.rows)))
    any_length = replace(config, max_prompt_length=10**9)
    needy = [reward_name(function) for function in functions if compares_with_gold(function)]
    prompts, _ = load_prompts(base.rows, data, any_length, base.tokenizer, data.dataset_name, order, needy)
    local = local_copy(model) if audit.audit_samples else model
    run = Run(**vars(base), config=config, local_model=local, reward_funcs=functions, prompts=prompts)
    return run, audit.audit_samples


def audit_data(run: Run, pool: WorkerPool, report: Report) -> tuple[list[Prompt], str]:
    """Lengths and gold answers. Returns the prompts that training would use, and the bare gold answer of the first:
    the shortest of them, a plain number where there is one."""
    n, limit = len(run.prompts), run.config.max_prompt_length
    lengths = [len(prompt.ids) for prompt in run.prompts]
    long = sum(length > limit for length in lengths)
    lengths_text = f"{mean(lengths):.0f} tokens on average, at most {max(lengths)}"
    tell("prompts", f"{lengths_text}; {long} of {n} are longer than max_prompt_length {limit} and left out")
    if long == n:
        report.no_signal.append(f"no prompt fits into max_prompt_length {limit}: raise it.")
    elif long > 0.1 * n:
        report.advice.append(f"{long / n:.0%} of the prompts are left out: raise max_prompt_length.")
    usable = [i for i, length in enumerate(lengths) if length <= limit]

    golds = gold_answers(run.prompts)
    if golds is None:
        tell("gold answers", "no column `solution` or `answer`; no reward here needs one")
        return [run.prompts[i] for i in usable], "42"
    unparseable = set(unparseable_golds(golds, pool))
    golds = [gold_text(gold) for gold in golds]
    example = "".join(f"; one that cannot: {golds[i][:60]!r}" for i in sorted(unparseable)[:1])
    tell("gold answers", f"{n - len(unparseable)} of {n} can be parsed{example}")
    assert isinstance(run.data, GRPOScriptArguments)
    if needy := sorted(reward_name(function) for function in run.reward_funcs if compares_with_gold(function)):
        if len(unparseable) == n:
            report.no_signal.append(
                f"no gold answer can be parsed, so {', '.join(needy)} pay nothing: "
                "check the column `solution` (or `answer`)."
            )
        elif unparseable and not run.data.drop_unparseable_golds:
            report.advice.append(
                f"{len(unparseable)} of {n} gold answers cannot be compared with: leave drop_unparseable_golds at true."
            )
        if run.data.drop_unparseable_golds:
            usable = [i for i in usable if i not in unparseable]
    usable.sort(key=lambda i: (i in unparseable, len(golds[i])))
    gold = golds[usable[0] if usable else 0]
    if re.search(r"boxed|\$|####|<answer>", gold):  # a marked answer, maybe at the end of a whole solution
        parsed = pool.map(parse_gold, [gold])[0]
        gold = gold if isinstance(parsed, Unscored) or not parsed else str(parsed[-1])
    return [run.prompts[i] for i in usable], gold


def audit_samples(run: Run, usable: list[Prompt], pool: WorkerPool, report: Report) -> None:
    """Lengths, pass rate and spread of groups sampled from the initial weights."""
    config, chosen = run.config, dict(enumerate(usable))
    engine = start_engine(run)
    assert engine is not None, "set-up has no recorded rollouts in its place"
    scorer = Scorer(chosen, run.reward_funcs, config, run.tokenizer, pool)
    sampling = Sampling(config.num_generations, config.max_completion_length, config.temperature, run.sampling_ends)
    seeds = [sample_seed(config.seed, 0, group) for group in chosen]
    samples = sample_groups(engine, chosen, sampling, seeds, scorer.begin)
    engine.close()
    failures = scorer.finish()
    lengths, limit = [len(sample.completion_ids) for sample in samples], config.max_completion_length
    cut = mean(sample.finish_reason == "length" for sample in samples)
    tell("sampled", f"{len(samples)} completions, {config.num_generations} a prompt")
    tell("completions", f"{mean(lengths):.0f} tokens on average; {cut:.0%} cut at max_completion_length {limit}")
    if cut > 0.1:
        report.advice.append(f"{cut:.0%} of the completions are cut before they end: raise max_completion_length.")

    for sample, advantage in zip(samples, advantages_of(samples, config), strict=True):
        sample.advantage = advantage
    effective = sum(effective_groups(samples))
    tell("groups with spread", f"{effective} of {len(chosen)} ({effective / len(chosen):.0%}): those with a gradient")
    reasons = [f"{failure}." for failure in failures]
    for j, name in enumerate(run.reward_names):
        values = [sample.rewards[j] for sample in samples if not math.isnan(sample.rewards[j])]
        told = f"{mean(values):.3g} on average, {min(values):.3g} to {max(values):.3g}" if values else "no value at all"
        tell(name, told)
        if values and min(values) == max(values):
            reasons.append(f"{name} gives {values[0]:.3g} to every completion: it tells none from another.")
    if any({"solution", "answer"} & set(prompt.columns) for prompt in usable):
        copies, plain = [replace(sample) for sample in samples], replace(config, reward_weights=None)
        scorer = Scorer(chosen, [accuracy_reward], plain, run.tokenizer, pool)
        scorer.begin(copies)
        scorer.finish()
        reasons += pass_rate(copies, cut)
    if effective == 0:
        report.no_signal += [f"no group of {len(chosen)} has spread in its rewards.", *reasons]
    else:
        report.advice += reasons


def pass_rate(samples: list[Sample], cut: float) -> list[str]:
    """Tell how often the gold answer was met; returns advice where most groups are all wrong or all right."""
    groups = defaultdict(list)
    for sample in samples:
        if not math.isnan(sample.reward):  # a check that failed
            groups[sample.group].append(sample.reward)
    wrong, right, n = sum(not any(g) for g in groups.values()), sum(all(g) for g in groups.values()), len(groups)
    rate = mean(value for group in groups.values() for value in group) if groups else math.nan
    tell("pass rate", f"{rate:.1%}; of {n} groups {wrong} are all wrong, {right} all right")
    advice = []
    if wrong > 0.8 * n:
        longer = ", a longer max_completion_length" if cut > 0.1 else ""
        advice.append(
            f"{wrong} of {n} groups are all wrong: take easier data, an SFT warm start{longer}, or have "
            "system_prompt show the answer's format."
        )
    if right > 0.8 * n:
        advice.append(f"{right} of {n} groups are all right: take harder data.")
    return advice


if __name__ == "__main__":
    main()
