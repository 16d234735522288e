"""The options in tables: README's section of them, and with --trl what becomes of TRL's and open-r1's: OPTIONS.md.

    python -m grpo_core.option_guide
    python -m grpo_core.option_guide --trl > grpo_core/OPTIONS.md

The names that TRL 1.16 and open-r1 have, and their defaults, are committed (`sft_core/run/trl_defaults.json`).
"""

import json
import sys
from dataclasses import Field

from eval.config import DecontaminateConfig, EvalConfig, PassRateConfig
from gen.config import GenerateConfig
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from kernels.tables import head, line
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, defaults_there
from sft_core.run.options import default_of, known_names, option_table

TRAINERS = {"GRPO": (ModelConfig, GRPOScriptArguments, GRPOConfig), "SFT": (ModelConfig, ScriptArguments, SFTConfig)}
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


def guide() -> str:
    text = f"# Options of TRL 1.16 and open-r1\n\n{INTRODUCTION}"
    for trainer, kinds in TRAINERS.items():
        text += f"\n## {trainer}\n\n{head('name', 'default there', 'here')}\n"
        options = known_names(*kinds)
        for kind in kinds:
            for name, default in defaults_there(kind).items():
                text += line(f"`{name}`", json.dumps(default), what_becomes(name, options)) + "\n"
    return text


def what_becomes(name: str, options: dict[str, Field]) -> str:
    if name in options:
        return f"option `{options[name].name}`, default {json.dumps(default_of(options[name]))}"
    if name in FOREIGN_KEYS:
        return f"passed over: {FOREIGN_KEYS[name]}"
    return f"refused, but for that default: {REFUSED_KEYS[name]}"


if __name__ == "__main__":
    print(guide() if "--trl" in sys.argv else option_tables() + "\n", end="")
