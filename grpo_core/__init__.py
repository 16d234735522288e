"""GRPO: group sampling, rewards, advantages, the objective, the loop.

What users of TRL import from `trl`, and open-r1's scripts from their helpers, is here; it is imported when it is asked
for (PEP 562), so that `import grpo_core` costs little.
"""

import importlib
from typing import Any

import sft_core  # noqa: F401 (what it refuses is said before anything else is imported)

_EXPORTS = {
    "GRPOTrainer": "grpo_core.trainer",
    "GRPOConfig": "grpo_core.config",
    "SFTTrainer": "sft_core.trainer",
    "SFTConfig": "sft_core.run.config",
    "ModelConfig": "sft_core.run.config",
    "ScriptArguments": "sft_core.run.config",
    "TrlParser": "sft_core.run.cli",
    "get_peft_config": "sft_core.model.trl_names",
    "get_quantization_config": "sft_core.model.trl_names",
    "get_kbit_device_map": "sft_core.model.trl_names",
    "get_callbacks": "sft_core.model.trl_names",
    "init_wandb_training": "sft_core.run.logging",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
