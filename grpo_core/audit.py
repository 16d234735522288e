r"""Check, before any GPU time is spent, whether a recipe's data, prompt, limits and rewards give GRPO a signal.

    python -m grpo_core.audit --config recipe.yaml [--audit_prompts 32] [--audit_samples false] [--field value ...]

The audit reads a training recipe and looks at some of its prompts. It reports whether they fit into max_prompt_length,
whether their gold answers can be parsed, and what the rewards give to a correct answer in several notations and to
worthless text. It then samples from the initial weights, and reports the rewards, the number of groups whose rewards
differ, and the share of completions that were cut. It runs as one process, writes nothing and needs no output_dir.
Exit codes: 0, there is a signal; 1, there is none, and the output says why; 2, bad input.

Not supported, on purpose: judging the data itself (duplicates, difficulty, leaks), or rewards beyond these probes.
"""

import math
import os
import re
import sys
from dataclasses import dataclass, field, replace
from statistics import mean

from eval.verify import parse_gold
from eval.workers import Unscored, WorkerPool
from gen.engine.base import Sampling, check_engine_available
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from grpo_core.metrics import effective_groups
from grpo_core.prepare import Run, check_lengths, start_engine
from grpo_core.rewards import compares_with_gold, get_reward_funcs, gold_text, reward_name
from grpo_core.rollout import Prompt, Scorer, advantages_of, load_prompts, sample_groups, sample_seed
from grpo_core.scoring import ToScore, gold_answers, start_scoring, unparseable_golds
from kernels.tables import table
from sft_core.data.rows import row_order
from sft_core.model.policy import local_copy
from sft_core.prepare import prepare_base
from sft_core.run import distributed
from sft_core.run.cli import parse
from sft_core.run.config import ModelConfig
from sft_core.run.logging import start_logging
from sft_core.run.options import Options, option, require

THOUGHT = "First, I read the problem.\nSecond, I work it out.\nFinally, I check it."  # three steps, no repetition
TAGGED, INLINE = "gold in tags, by line", "gold in tags, inline"
EMPTY, HUGE = "empty text", "huge repetition"
NOTATIONS = {  # a correct answer as models write it
    TAGGED: f"<think>\n{THOUGHT}\n</think>\n<answer>\n{{}}\n</answer>",
    INLINE: f"<think>{THOUGHT}</think><answer>{{}}</answer>",
    "gold, bare": "{}",
    "gold in $..$": "${}$",
    r"gold in \boxed{}": r"\boxed{{{}}}",
    "the answer is gold": "The answer is {}.",
}


@dataclass
class AuditConfig(Options):
    audit_prompts: int = option(32, "Prompts to audit: the first ones in a seeded order of the data.", ge=1)
    audit_samples: bool = option(
        True, "Sample num_generations completions of each prompt; false: load no model, check only data and rewards."
    )


@dataclass
class Report:
    advice: list[str] = field(default_factory=list)
    no_signal: list[str] = field(default_factory=list)  # why training would learn nothing


def tell(name: str, fact: str) -> None:
    print(f"{name:<22}{fact}")


def main(argv: list[str] | None = None) -> None:
    """Print the audit. Raises SystemExit(1) where training would have no signal, SystemExit(2) for bad input."""
    report = Report()
    with distributed.usage_errors():
        run, samples = set_up(sys.argv[1:] if argv is None else argv)
        pool = WorkerPool(run.config.reward_num_workers, run.config.reward_timeout)
        tell("audited", f"{len(run.prompts)} of {len(run.rows)} prompts for {run.model.model_name_or_path}")
        usable, prompt, answer = audit_data(run, pool, report)
        audit_rewards(run, prompt, answer, pool, report)
    if samples and usable:
        audit_samples(run, usable, pool, report)
    pool.close()
    distributed.shutdown()
    for text in report.advice:
        print(f"- {text}")
    if report.no_signal:
        print("NO SIGNAL: training would learn nothing.", *report.no_signal, sep="\n- ")
        raise SystemExit(1)
    print("Training would have a signal." if samples else "No obstacle found. Without samples, spread is unknown.")


def set_up(argv: list[str]) -> tuple[Run, bool]:
    """Run the checks of training's `prepare`. The prompts to audit include those that are too long.

    Raises:
        ValueError: bad input, in one sentence that names the remedy.
    """
    require(os.environ.get("WORLD_SIZE", "1") == "1", "the audit is one process: start it with python, not torchrun.")
    types = (ModelConfig, GRPOScriptArguments, GRPOConfig, AuditConfig)
    start_logging()
    # No output_dir is needed, because nothing is written, pushed, reported or evaluated.
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
            "the audit is one process: set --vllm_tensor_parallel_size 1 or --audit_samples false.",
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


def audit_data(run: Run, pool: WorkerPool, report: Report) -> tuple[list[Prompt], Prompt, str]:
    """Print lengths and gold answers. Returns the prompts that training would use, the prompt with the shortest gold
    answer (preferably one that parses), and that answer without the text around it."""
    n, limit = len(run.prompts), run.config.max_prompt_length
    lengths = [len(prompt.ids) for prompt in run.prompts]
    usable = [i for i, length in enumerate(lengths) if length <= limit]
    long = n - len(usable)
    tell("prompts", f"at most {max(lengths)} tokens; {long} of {n} exceed max_prompt_length {limit} and are left out")
    if long == n:
        report.no_signal.append(f"no prompt fits into max_prompt_length {limit}: raise it.")
    elif long > 0.1 * n:
        report.advice.append(f"{long / n:.0%} of the prompts are too long and left out: raise max_prompt_length.")

    golds = gold_answers(run.prompts)
    if golds is None:
        tell("gold answers", "the data has no column `solution` or `answer`, and no reward in use needs one")
        return [run.prompts[i] for i in usable], run.prompts[0], "42"
    unparseable = set(unparseable_golds(golds, pool))
    golds = [gold_text(gold) for gold in golds]
    example = "".join(f"; one that cannot: {golds[i][:60]!r}" for i in sorted(unparseable)[:1])
    tell("gold answers", f"{n - len(unparseable)} of {n} can be parsed{example}")
    assert isinstance(run.data, GRPOScriptArguments)
    needy = any(map(compares_with_gold, run.reward_funcs))
    if needy and len(unparseable) == n:
        report.no_signal.append("no gold answer can be parsed: check the column `solution` (or `answer`).")
    if needy and run.data.drop_unparseable_golds:
        usable = [i for i in usable if i not in unparseable]
    shown = min(usable or range(n), key=lambda i: (i in unparseable, len(golds[i])))
    parsed = pool.map(parse_gold, [golds[shown]])[0]  # the gold may be a whole solution that ends in the answer
    answer = golds[shown] if isinstance(parsed, Unscored) or not parsed else str(parsed[-1])
    return [run.prompts[i] for i in usable], run.prompts[shown], answer


def audit_rewards(run: Run, prompt: Prompt, answer: str, pool: WorkerPool, report: Report) -> None:
    """Print a table of what each reward gives to texts of known quality, and check what the prompt asks for."""
    rendered = run.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
    limit = run.config.max_completion_length  # probes are not longer than a sampled completion can be
    right = {name: notation.format(answer) for name, notation in NOTATIONS.items()}
    if opened := re.search(r"<think>\s*(</think>)?\s*\Z", rendered):  # the chat template begins the completion
        begun = opened[1] or "<think>"
        right |= {name: text.partition(begun)[2].lstrip() for name, text in right.items() if begun in text}
    probes = right | {EMPTY: "", HUGE: f"{THOUGHT} " * max(1000, limit // 10)}
    only_ids = {"add_special_tokens": False, "truncation": True, "max_length": limit}
    # All probes form one group, for rewards that compare the completions of a group.
    ids = run.tokenizer(list(probes.values()), **only_ids)["input_ids"]
    completions = [
        ToScore(text, token_ids, 0, prompt.messages, rendered, prompt.columns)
        for text, token_ids in zip(probes.values(), ids, strict=True)
    ]
    scores = start_scoring(run.reward_funcs, run.config.reward_weights, completions, pool)()
    unasked = " and ".join(tag for tag in ("<think>", "<answer>") if tag not in rendered)
    for name, function, paid in zip(run.reward_names, run.reward_funcs, zip(*scores.values, strict=True), strict=True):
        values = {probe: value for probe, value in zip(probes, paid, strict=True) if value is not None}
        if not values:
            report.advice.append(f"{name} gave no value to any probe: check it, or drop it from reward_funcs.")
            continue
        best = max((value for probe, value in values.items() if probe in right), default=0.0)
        exploits = [probe for probe in (EMPTY, HUGE) if values.get(probe, -math.inf) >= best]
        # A pure penalty gives 0 to nearly all texts.
        if exploits and (compares_with_gold(function) or max(values[probe] for probe in exploits) > 0):
            report.advice.append(
                f"{name} pays as much for {' and '.join(exploits)} as for {answer!r}: add a reward that pays more for "
                "the correct answer."
            )
        if unasked and name in ("format_reward", "tag_count_reward"):
            report.advice.append(
                f"{name} pays for <think> and <answer>, but the prompt never asks for {unasked}: name "
                "them in system_prompt, or drop the reward."
            )
    if all(value is None for row in scores.values for value in row):
        report.no_signal.append("no reward gave a value to any probe: check reward_funcs.")
    report.advice += [
        f"a probe failed: {cause} ({text}); correct it." for cause, text in dict(scores.gaps).items() if text
    ]
    shown = [["-" if value is None else f"{value + 0.0:.3g}" for value in row] for row in scores.values]
    print(table(["probe", *run.reward_names], [[probe, *row] for probe, row in zip(probes, shown, strict=True)]))


def audit_samples(run: Run, usable: list[Prompt], pool: WorkerPool, report: Report) -> None:
    """Sample groups from the initial weights; print their lengths, their rewards and how many have a gradient."""
    config, chosen = run.config, dict(enumerate(usable))
    engine = start_engine(run)
    assert engine is not None, "set_up leaves rollouts_from out, so there is an engine"
    scorer = Scorer(chosen, run.reward_funcs, config, run.tokenizer, pool)
    sampling = Sampling(config.num_generations, config.max_completion_length, config.temperature, run.sampling_ends)
    seeds = [sample_seed(config.seed, 0, group) for group in chosen]
    samples = sample_groups(engine, chosen, sampling, seeds, scorer.begin)
    engine.close()
    reasons = [f"{failure}." for failure in scorer.finish()]
    cut = mean(sample.finish_reason == "length" for sample in samples)
    average = mean(len(sample.completion_ids) for sample in samples)
    limit = config.max_completion_length
    tell("sampled", f"{len(samples)} completions of {average:.0f} tokens on average; {cut:.0%} are cut at {limit}")
    if cut > 0.1:
        report.advice.append(f"{cut:.0%} of the completions are cut before they end: raise max_completion_length.")
    for sample, advantage in zip(samples, advantages_of(samples, config), strict=True):
        sample.advantage = advantage
    effective, n = sum(effective_groups(samples)), len(chosen)
    tell("groups with spread", f"{effective} of {n} ({effective / n:.0%}) have rewards that differ, hence a gradient")
    for j, name in enumerate(run.reward_names):
        values = [sample.rewards[j] for sample in samples if not math.isnan(sample.rewards[j])]
        told = f"{mean(values):.3g} on average, {min(values):.3g} to {max(values):.3g}" if values else "no value at all"
        tell(name, told)
        if values and min(values) == max(values):
            reasons.append(f"{name} gives {values[0]:.3g} to every completion, so it cannot rank them.")
    if effective < 0.2 * n:
        reasons.append(
            "few groups have spread: if rewards are low, use easier data, an SFT warm start or a system_prompt "
            "that shows the answer's format; if they are high, use harder data."
        )
    if effective == 0:
        report.no_signal += [f"no group of {n} has rewards that differ.", *reasons]
    else:
        report.advice += reasons


if __name__ == "__main__":
    main()
