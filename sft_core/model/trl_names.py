"""Converts what TRL's users pass to a trainer for its model into options of `ModelConfig`, and back.

These are keyword arguments of from_pretrained, peft's LoraConfig and transformers' BitsAndBytesConfig. The functions of
TRL that make them from a ModelConfig are here too. Arguments without a counterpart are refused by name.
Not supported, on purpose: methods of peft other than LoRA, and other quantisation such as GPTQ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.options import require

C = TypeVar("C", bound=TrainingConfig)
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type", "use_rslora", "use_dora")
LORA = {name: name if name.startswith(("lora_", "use_")) else f"lora_{name}" for name in _LORA}
QUANTISED = {
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
}
PRECISION = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")  # set by the trainer's options here
INIT = {
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "torch_dtype": "dtype",
}


# --- arguments of a trainer -> ModelConfig -----------------------------------------------------------------------


def with_init_kwargs(model: ModelConfig, config: C) -> tuple[ModelConfig, C]:
    """`model` with the options of `config.model_init_kwargs`, and `config` without them.

    Raises:
        ValueError: an argument is not known, or contradicts an option or another argument.
    """
    found: dict[str, Any] = {}
    for name, value in (config.model_init_kwargs or {}).items():
        if name == "quantization_config":
            found |= quantised_options(value)
        elif name == "device_map":
            whole = value is None or value == "auto" or isinstance(value, Mapping) and list(value) == [""]
            require(whole, f"device_map {value!r} is not supported (models are sharded over the ranks): leave it out.")
        elif name in INIT:
            # torch.bfloat16 becomes "bfloat16"
            value = str(value).removeprefix("torch.") if value is not None and INIT[name] == "dtype" else value
            known = found.setdefault(INIT[name], value)
            require(known == value, f"model_init_kwargs give {name} as {value} and as {known}: give one of them.")
        else:
            require(
                name == "use_cache",  # not used in training, and on in the model that is written
                f"model_init_kwargs may not hold {name}: give only {', '.join(INIT)}, use_cache, device_map, "
                "quantization_config.",
            )
    found = {name: value for name, value in found.items() if value is not None}
    return changed(model, found, "model_init_kwargs"), dataclasses.replace(config, model_init_kwargs=None)


def with_peft_config(model: ModelConfig, peft_config: Any) -> ModelConfig:
    """`model` with the adapters that peft's LoraConfig describes.

    Raises:
        ValueError: peft_config is not a LoraConfig, or one of its fields has no counterpart here.
    """
    if peft_config is None:
        return model
    from peft import LoraConfig

    require(
        isinstance(peft_config, LoraConfig),
        f"peft_config is a {type(peft_config).__name__}, and LoRA is the only method here: give a LoraConfig.",
    )
    targets = peft_config.target_modules
    require(
        not isinstance(targets, str) or targets == "all-linear",
        f"target_modules {targets!r} is a pattern: list the modules, or give all-linear.",
    )
    known = {name: getattr(peft_config, name) for name in LORA}
    _refuse_others("peft_config", vars(peft_config), vars(LoraConfig(**known)))
    found = {ours: known[name] for name, ours in LORA.items()}
    found["lora_task_type"] = found["lora_task_type"] or "CAUSAL_LM"
    for name in ("lora_target_modules", "lora_modules_to_save"):
        value = found[name]
        found[name] = [value] if isinstance(value, str) else value and sorted(value)
    return changed(model, found | {"use_peft": True}, "peft_config")


def quantised_options(config: Any) -> dict[str, Any]:
    """Options of ModelConfig for a BitsAndBytesConfig, or a dict of its fields."""
    if config is None:
        return {}
    from transformers import BitsAndBytesConfig

    if isinstance(config, Mapping):
        config = BitsAndBytesConfig(**config)
    require(
        isinstance(config, BitsAndBytesConfig),
        f"quantization_config must be a BitsAndBytesConfig, got {type(config).__name__}.",
    )
    known = {name: getattr(config, name) for name in (*QUANTISED, *PRECISION)}
    _refuse_others("quantization_config", config.to_dict(), BitsAndBytesConfig(**known).to_dict())
    return {ours: known[name] for name, ours in QUANTISED.items()}


def _refuse_others(what: str, given: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Raise ValueError for fields of `given` that differ from `plain`, which has only fields with a counterpart."""
    others = [name for name, value in given.items() if value != plain.get(name)]
    require(not others, f"{what} sets {', '.join(others)}, which is not supported here: leave them at their defaults.")


def changed(model: ModelConfig, options: dict[str, Any], by: str) -> ModelConfig:
    """`model` with these options, which may not contradict options of `model` that differ from their defaults."""
    for name, value in options.items():
        default, now = getattr(ModelConfig(), name), getattr(model, name)
        require(now in (default, value), f"{by} gives {name} {value!r}, the options give {now!r}: give one of them.")
    return dataclasses.replace(model, **options)


# --- TRL's functions of a ModelConfig ----------------------------------------------------------------------------


def get_peft_config(model_args: ModelConfig) -> Any:
    """peft's LoraConfig for these options; None without use_peft."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    options = {name: getattr(model_args, ours) for name, ours in LORA.items()}
    if options["target_modules"] == ["all-linear"]:
        options["target_modules"] = "all-linear"
    return LoraConfig(**options)


def get_quantization_config(model_args: ModelConfig) -> Any:
    """transformers' BitsAndBytesConfig for these options; None without load_in_4bit and load_in_8bit."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{name: getattr(model_args, ours) for name, ours in QUANTISED.items()})


def get_callbacks(train_config: TrainingConfig, model_config: ModelConfig) -> list[Any]:
    """open-r1's function for `train_config.callbacks`. The list is empty, because a run makes these itself."""
    return []


def get_kbit_device_map() -> dict[str, int] | None:
    """The device map that puts all of a quantised model on this rank's GPU; None without a GPU."""
    import torch

    device = TrainingConfig().device
    return {"": device.index} if torch.cuda.is_available() else None
