"""Probes of the audit: what each reward gives to texts whose worth is known, before anything is sampled."""

import re
from dataclasses import dataclass, field

from eval.workers import WorkerPool
from grpo_core.config import GRPOScriptArguments
from grpo_core.prepare import Run
from grpo_core.rewards import compares_with_gold
from grpo_core.rollout import Prompt
from grpo_core.scoring import ToScore, start_scoring
from kernels.tables import table

IDEAL, EMPTY, TAGS = "what the prompt asks", "empty text", "tags repeated"
JUNK, HUGE = "trailing junk", "huge repetition"
NOTATIONS = {
    "gold, bare": "{}",
    "gold in $..$": "${}$",
    r"gold in \boxed{}": r"\boxed{{{}}}",
    "gold in <answer>": "<answer>{}</answer>",
    "the answer is gold": "The answer is {}.",
}
# Which probes a reward must not pay as much as the ideal completion: a right answer said twice is right, for accuracy.
REFUSED = {
    "format": (EMPTY, TAGS, JUNK, HUGE),
    "tag_count": (EMPTY, TAGS, JUNK, HUGE),
    "repetition_penalty": (TAGS, HUGE),
    "soft_overlong_punishment": (HUGE,),
}
REMEDY = {
    "reasoning_steps": "it counts marks, whatever they say; add repetition_penalty, or give it a small weight.",
    "soft_overlong_punishment": "it starts beyond max_completion_length; lower max_completion_len.",
}
THOUGHT = "First, I read the problem.\nSecond, I work it out.\nFinally, I check it."  # three steps, no repetition


@dataclass
class Report:
    advice: list[str] = field(default_factory=list)
    no_signal: list[str] = field(default_factory=list)  # why training would learn nothing


def ideal_completion(rendered: str, answer: str) -> tuple[str, list[str], str]:
    """The completion that a rendered prompt asks for, as far as it names tags and notations; those it names; and the
    thought that the prompt's end has opened ("<think>"), or opened and closed, or "".

    >>> ideal_completion("Your answer goes between <answer> and </answer> tags: <answer> 1 </answer>", "63")[0][-21:]
    '<answer> 63 </answer>'
    """
    match = re.search(r"<think>\s*(?:</think>\s*)?\Z", rendered)
    opened = match.group() if match else ""
    asked = rendered.removesuffix(opened)
    named = [mark for mark in ("<think>", "<answer>", r"\boxed", "####") if mark in asked]

    def block(tag: str, text: str) -> str:
        """`text` in these tags, with the white space of the last example that the prompt shows."""
        *_, shown = ["", *re.findall(rf"<{tag}>([^<]*)</{tag}>", asked)]
        before, after = shown[: len(shown) - len(shown.lstrip())], shown[len(shown.rstrip()) :]
        return f"<{tag}>{before}{text}{after}</{tag}>"

    if r"\boxed" in named:
        final = rf"\boxed{{{answer}}}"
    elif "####" in named:
        final = f"#### {answer}"
    else:
        final = answer if "<answer>" in named else f"The answer is {answer}."
    if "<answer>" in named:
        final = block("answer", final)
    if "</think>" in opened:
        return final, named, opened
    if opened or "<think>" in named:
        *_, between = ["\n", *re.findall(r"</think>(\s*)<answer>", asked)]
        thought = block("think", THOUGHT)
        return (thought.removeprefix("<think>").lstrip() if opened else thought) + between + final, named, opened
    return f"{THOUGHT}\n{final}", named, opened


def audit_rewards(run: Run, prompt: Prompt, answer: str, pool: WorkerPool, report: Report, decisive: bool) -> None:
    """How each reward answers to probes, in a table, and whether it agrees with the prompt.

    decisive: there are no samples, so a reward that has no value for any probe means no signal.
    """
    data = run.data
    assert isinstance(data, GRPOScriptArguments)
    rendered = run.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
    ideal, named, opened = ideal_completion(rendered, answer)
    tagged = f"<think>\n{THOUGHT}\n</think>\n<answer>\n{answer}\n</answer>\n"
    continued = tagged.removeprefix("<think>\n") if opened and "</think>" not in opened else tagged
    limit = run.config.max_completion_length  # no more tokens could be sampled, so a reward cannot see more
    probes = {
        IDEAL: ideal,
        EMPTY: "",
        TAGS: continued + 2 * tagged,
        JUNK: f"{ideal}\nThat was easy! Next one?",
        HUGE: f"{THOUGHT} " * max(1000, limit // 10),
    }
    probes |= {name: notation.format(answer) for name, notation in NOTATIONS.items()}
    only_ids = {"add_special_tokens": False, "truncation": True, "max_length": limit}
    # One group: the rewards that compare a group's completions compare these.
    ids = run.tokenizer(list(probes.values()), **only_ids)["input_ids"]
    completions = [
        ToScore(text, token_ids, 0, prompt.messages, rendered, prompt.columns)
        for text, token_ids in zip(probes.values(), ids, strict=True)
    ]
    scores = start_scoring(run.reward_funcs, run.config.reward_weights, completions, pool)()
    prefilled = f"; the chat template itself begins the completion with {opened!r}" if opened else ""
    tell("the prompt asks for", (", ".join(named) or "no tags, no notation") + prefilled)
    full = {
        "accuracy": 1.0,
        "format": 1.0,
        "tag_count": 1.0,
        "reasoning_steps": 1.0,
        "repetition_penalty": 0.0,
        "soft_overlong_punishment": 0.0,
        "length": 0.25,
        "cosine": data.cosine_min_value_correct,
    }
    columns = []
    for j, name in enumerate(data.reward_funcs):
        values = {probe: row[j] for probe, row in zip(probes, scores.values, strict=True)}
        paid, due = values[IDEAL], full.get(name)
        exploits: list[str] = []
        if all(value is None for value in values.values()):
            (report.no_signal if decisive else report.advice).append(f"{name} has no value for any probe.")
        elif due is not None and (paid is None or paid < due):
            report.advice.append(disagreement(name, paid, due, ideal, named))
        elif paid is not None:
            exploits = [p for p in REFUSED.get(name, (EMPTY, HUGE)) if (v := values[p]) is not None and v >= paid]
        if exploits:
            report.advice.append(
                f"{name} pays as much for {', '.join(exploits)} as for {IDEAL}: "
                + REMEDY.get(name, "see that another reward pays for the difference.")
            )
        if due is not None and compares_with_gold(run.reward_funcs[j]):
            accepted = [n for n in NOTATIONS if (v := values[n]) is not None and v >= due]
            tell(name, f"accepts {answer!r} in {len(accepted)} of {len(NOTATIONS)} notations")
        shown = {p: "-" if v is None else f"{v + 0.0:.3g}" + " !" * (p in exploits) for p, v in values.items()}
        columns.append(shown.values())
    report.advice += [f"a probe failed: {cause} ({text})." for cause, text in dict(scores.gaps).items() if text]
    print(table(["probe", *data.reward_funcs], zip(probes, *columns, strict=True)))


def disagreement(name: str, paid: float | None, due: float, ideal: str, named: list[str]) -> str:
    missing = [tag for tag in ("<think>", "<answer>") if tag not in named]
    if name in ("format", "tag_count") and missing:
        return (
            f"{name} pays for <think> and <answer>, but the prompt never asks for {' and '.join(missing)}: name "
            "them in system_prompt, or drop the reward."
        )
    text = f"{name} gives {paid} instead of {due:g} to what the prompt asks for, {ideal[:30]!r}...{ideal[-60:]!r}"
    if name == "tag_count":
        return f"{text}: it wants each tag on a line of its own; let system_prompt show it so."
    return f"{text}: prompt and reward disagree; mend one."


def tell(name: str, fact: str) -> None:
    print(f"{name:<22}{fact}")
