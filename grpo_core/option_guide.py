"""What becomes here of every option of TRL 1.16 and open-r1: `python -m grpo_core.option_guide > grpo_core/OPTIONS.md`.

The names and their defaults there are committed (`sft_core/run/trl_defaults.json`); a test holds the guide to them.
"""

import json

from grpo_core.config import GRPOConfig, GRPOScriptArguments
from kernels.tables import head, line
from sft_core.run.config import ModelConfig, ScriptArguments, SFTConfig
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, TRL_DEFAULTS
from sft_core.run.options import default_of, known_names

TRAINERS = {
    "GRPO": known_names(ModelConfig, GRPOScriptArguments, GRPOConfig),
    "SFT": known_names(ModelConfig, ScriptArguments, SFTConfig),
}


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
    lines = [f"# Options of TRL 1.16 and open-r1\n\n{(__doc__ or '').strip()}\n", head("name", "default there", "here")]
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
    print(guide(), end="")
