"""The option tables of the guides (README.md of each package), and OPTIONS.md, for TRL's and open-r1's options.

    python -m grpo_core.option_guide     # writes them all

The names that TRL 1.16 and open-r1 have, and their defaults, are committed (`sft_core/run/trl_defaults.json`).
"""

import json
from dataclasses import Field
from pathlib import Path

from eval.config import DecontaminateConfig, EvalConfig, PassRateConfig
from gen.config import GenerateConfig
from grpo_core.config import GRPOConfig, GRPOScriptArguments
from kernels.tables import head, line
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig, TrainingConfig
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, defaults_there
from sft_core.run.options import default_of, known_names, option_table

TRAINERS = {"GRPO": (ModelConfig, GRPOScriptArguments, GRPOConfig), "SFT": (ModelConfig, ScriptArguments, SFTConfig)}
BEGIN, END = "<!-- by python -m grpo_core.option_guide -->\n", "\n<!-- end of tables -->"
INTRODUCTION = """\
This page says what every option of TRL 1.16.0 (GRPOConfig, SFTConfig, ModelConfig, ScriptArguments) is here, and
every option that open-r1 or an earlier TRL (0.15 to 0.18, with the transformers of that time) adds. There are three
cases. It is an option here. Or it is ignored with one line on the console, because it cannot change what is
trained. Or it is refused with the reason, unless its value changes nothing here.

`python -m grpo_core.option_guide` writes this page.
"""


def option_tables() -> dict[str, str]:
    """Package -> the tables of options that its guide has."""
    tables: dict[str, list[tuple]] = {  # title, options, and options that another table has
        "sft_core": [
            ("Model (both trainers)", ModelConfig),
            ("Data (both trainers)", ScriptArguments),
            ("Training (both trainers)", TrainingConfig),
            ("SFT only", SFTConfig, TrainingConfig),
        ],
        "grpo_core": [
            ("GRPO only: data and rewards", GRPOScriptArguments, ScriptArguments),
            ("GRPO only: sampling, objective, engine", GRPOConfig, TrainingConfig),
        ],
        "eval": [
            ("eval.run", EvalConfig),
            ("eval.pass_rate (and those of eval.run but tasks)", PassRateConfig, EvalConfig),
            ("eval.decontaminate", DecontaminateConfig),
        ],
        "gen": [("gen.generate", GenerateConfig)],
    }
    return {
        package: "\n\n".join(f"### {title}\n\n{option_table(*types)}" for title, *types in rows)
        for package, rows in tables.items()
    }


def with_tables(text: str, tables: str) -> str:
    """The text of a guide, with these tables between the marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


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
        return f"ignored: {FOREIGN_KEYS[name]}"
    return f"refused unless it has that default: {REFUSED_KEYS[name]}"


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    (root / "grpo_core" / "OPTIONS.md").write_text(guide())
    for package, tables in option_tables().items():
        path = root / package / "README.md"
        path.write_text(with_tables(path.read_text(), tables))
