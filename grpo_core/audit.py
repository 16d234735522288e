r"""Before any GPU hour is spent: would this recipe's data, prompt, limits and rewards give GRPO a signal?

    python -m grpo_core.audit --config recipe.yaml [--audit_prompts 32] [--audit_samples false] [--field value ...]

It reads a training recipe and looks at some prompts of its data: can their gold answers be parsed, do they fit, what do
the rewards pay for a right answer in several notations and for text that deserves nothing, and (with samples from the
initial weights) what do they pay, which groups have spread, how many completions are cut. One process; it writes
nothing and needs no output_dir. Exit code 0: there is a signal; 1: there is none, and why; 2: bad input.

Left out on purpose: any judgement of the data itself (duplicates, difficulty, leaks), and of rewards beyond probes.
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
NOTATIONS = {  # of a right answer
    TAGGED: f"<think>\n{THOUGHT}\n</think>\n<answer>\n{{}}\n</answer>",
    INLINE: f"<think>{THOUGHT}</think><answer>{{}}</answer>",
    "gold, bare": "{}",
    "gold in $..$": "${}$",
    r"gold in \boxed{}": r"\boxed{{{}}}",
    "the answer is gold": "The answer is {}.",
}


@dataclass
class AuditConfig(Options):
    audit_prompts: int = option(32, "Prompts to look at: the first of the data in a seeded order.", ge=1)
    audit_samples: bool = option(
        True, "Sample num_generations completions of each; false: no model is loaded, only data and rewards are probed."
    )


@dataclass
class Report:
    advice: list[str] = field(default_factory=list)
    no_signal: list[str] = field(default_factory=list)  # why training would learn nothing


def tell(name: str, fact: str) -> None:
    print(f"{name:<22}{fact}")


def main(argv: list[str] | None = None) -> None:
    """Print the audit. SystemExit(1) where training would have no signal, SystemExit(2) for bad input."""
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


def audit_data(run: Run, pool: WorkerPool, report: Report) -> tuple[list[Prompt], Prompt, str]:
    """Lengths and gold answers. Returns the prompts that training would use, and one of them with its bare gold answer:
    the shortest, a plain number where there is one."""
    n, limit = len(run.prompts), run.config.max_prompt_length
    lengths = [len(prompt.ids) for prompt in run.prompts]
    usable = [i for i, length in enumerate(lengths) if length <= limit]
    long = n - len(usable)
    tell("prompts", f"at most {max(lengths)} tokens; {long} of {n} are longer than max_prompt_length {limit}, left out")
    if long == n:
        report.no_signal.append(f"no prompt fits into max_prompt_length {limit}: raise it.")
    elif long > 0.1 * n:
        report.advice.append(f"{long / n:.0%} of the prompts are left out: raise max_prompt_length.")

    golds = gold_answers(run.prompts)
    if golds is None:
        tell("gold answers", "no column `solution` or `answer`; no reward here needs one")
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
    parsed = pool.map(parse_gold, [golds[shown]])[0]  # the answer may stand marked at the end of a whole solution
    answer = golds[shown] if isinstance(parsed, Unscored) or not parsed else str(parsed[-1])
    return [run.prompts[i] for i in usable], run.prompts[shown], answer


def audit_rewards(run: Run, prompt: Prompt, answer: str, pool: WorkerPool, report: Report) -> None:
    """What each reward gives to texts whose worth is known, in a table, and whether the prompt asks for it."""
    rendered = run.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
    limit = run.config.max_completion_length  # no more tokens could be sampled, so a reward cannot see more
    right = {name: notation.format(answer) for name, notation in NOTATIONS.items()}
    if opened := re.search(r"<think>\s*(</think>)?\s*\Z", rendered):  # by the chat template: a completion goes on there
        begun = opened[1] or "<think>"
        right |= {name: text.partition(begun)[2].lstrip() for name, text in right.items() if begun in text}
    probes = right | {EMPTY: "", HUGE: f"{THOUGHT} " * max(1000, limit // 10)}
    only_ids = {"add_special_tokens": False, "truncation": True, "max_length": limit}
    # One group: the rewards that compare a group's completions compare these.
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
            report.advice.append(f"{name} has no value for any probe.")
            continue
        best = max((value for probe, value in values.items() if probe in right), default=0.0)
        exploits = [probe for probe in (EMPTY, HUGE) if values.get(probe, -math.inf) >= best]
        # A reward that only takes away has 0 for nearly all texts.
        if exploits and (compares_with_gold(function) or max(values[probe] for probe in exploits) > 0):
            report.advice.append(
                f"{name} pays as much for {' and '.join(exploits)} as for {answer!r}: see that another reward pays for "
                "the difference."
            )
        if unasked and name in ("format_reward", "tag_count_reward"):
            report.advice.append(
                f"{name} pays for <think> and <answer>, but the prompt never asks for {unasked}: name "
                "them in system_prompt, or drop the reward."
            )
    if all(value is None for row in scores.values for value in row):
        report.no_signal.append("no reward has a value for any probe.")
    report.advice += [f"a probe failed: {cause} ({text})." for cause, text in dict(scores.gaps).items() if text]
    shown = [["-" if value is None else f"{value + 0.0:.3g}" for value in row] for row in scores.values]
    print(table(["probe", *run.reward_names], [[probe, *row] for probe, row in zip(probes, shown, strict=True)]))


def audit_samples(run: Run, usable: list[Prompt], pool: WorkerPool, report: Report) -> None:
    """Lengths, rewards and spread of groups sampled from the initial weights."""
    config, chosen = run.config, dict(enumerate(usable))
    engine = start_engine(run)
    assert engine is not None, "set-up has no recorded rollouts in its place"
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
    tell("groups with spread", f"{effective} of {n} ({effective / n:.0%}): those with a gradient")
    for j, name in enumerate(run.reward_names):
        values = [sample.rewards[j] for sample in samples if not math.isnan(sample.rewards[j])]
        told = f"{mean(values):.3g} on average, {min(values):.3g} to {max(values):.3g}" if values else "no value at all"
        tell(name, told)
        if values and min(values) == max(values):
            reasons.append(f"{name} gives {values[0]:.3g} to every completion: it tells none from another.")
    if effective < 0.2 * n:
        reasons.append(
            "few groups have spread: where rewards are low, take easier data, an SFT warm start or a system_prompt "
            "that shows the answer's format; where they are high, harder data."
        )
    if effective == 0:
        report.no_signal += [f"no group of {n} has spread in its rewards.", *reasons]
    else:
        report.advice += reasons


if __name__ == "__main__":
    main()
