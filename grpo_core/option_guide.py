"""The options in tables: README's section of them, and with --trl what becomes of TRL's and open-r1's: OPTIONS.md.

    python -m grpo_core.option_guide
    python -m grpo_core.option_guide --trl > grpo_core/OPTIONS.md

The names that TRL 1.16 and open-r1 have, and their defaults, are committed (`sft_core/run/trl_defaults.json`).
"""

import json
import sys

from eval.config import DecontaminateConfig, EvalConfig, PassRateConfig
from gen.config import GenerateConfig
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from kernels.tables import head, line
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, TRL_DEFAULTS
from sft_core.run.options import default_of, known_names, option_table

TRAINERS = {
    "GRPO": known_names(ModelConfig, GRPOScriptArguments, GRPOConfig),
    "SFT": known_names(ModelConfig, ScriptArguments, SFTConfig),
}
INTRODUCTION = """What becomes here of every option of GRPOConfig, SFTConfig, ModelConfig and ScriptArguments of TRL
1.16.0, of those that open-r1 adds, and of earlier ones (TRL 0.15 to 0.18, with the transformers of then). Written by
`python -m grpo_core.option_guide --trl`.
"""


def option_tables() -> str:
    """README's section of options, all of it."""
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


def defaults_there() -> dict[str, dict[str, str]]:
    """Of every name the default there, for GRPO and for SFT where it has the name."""
    found: dict[str, dict[str, str]] = {}
    for library in TRL_DEFAULTS.values():
        for kind, names in library.items():
            for trainer, other in (("GRPO", "SFT"), ("SFT", "GRPO")):
                for name, default in names.items() if other not in kind else ():
                    found.setdefault(name, {})[trainer] = json.dumps(default)
    return found


def what_becomes(name: str, trainer: str) -> str:
    """One line: an option, passed over, or refused."""
    if name in TRAINERS[trainer]:
        field = TRAINERS[trainer][name]
        return f"option `{field.name}`, default {json.dumps(default_of(field))}"
    if name in FOREIGN_KEYS:
        return f"passed over: {FOREIGN_KEYS[name]}"
    return f"refused, but for that default: {REFUSED_KEYS[name]}"


def guide() -> str:
    lines = ["# Options of TRL 1.16 and open-r1\n", INTRODUCTION, head("name", "default there", "here")]
    for name, defaults in defaults_there().items():
        here = {trainer: what_becomes(name, trainer) for trainer in defaults}
        lines.append(line(f"`{name}`", _of_both(defaults), _of_both(here)))
    return "\n".join(lines) + "\n"


def _of_both(texts: dict[str, str]) -> str:
    """One text where GRPO and SFT have the same."""
    if len(texts) == 2 and len(set(texts.values())) == 1:
        return texts["GRPO"]
    return "; ".join(f"{trainer}: {text}" for trainer, text in texts.items())


if __name__ == "__main__":
    print(guide() if "--trl" in sys.argv else option_tables() + "\n", end="")
