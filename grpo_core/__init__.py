"""GRPO: group sampling, rewards, advantages, the objective and the training loop.

The package exports the names that TRL's users import from `trl` and open-r1's scripts import from their helpers. Each
is imported on first access (PEP 562), so that `import grpo_core` is cheap.
"""

import importlib
from typing import Any

import sft_core  # noqa: F401 (first, because it refuses unsupported environments)

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
