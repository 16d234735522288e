"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: on a frozen model, quantised or not, and merged into it.

peft implements the layers and their formulas. This module adds what the trainers need:

* a check that the options fit the model, before any weight is loaded;
* adapters that are equal on every rank;
* dropout that is on only in SFT's training passes;
* forward passes of the frozen model alone, which is GRPO's reference model;
* merged weights under plain names, for engines and for the export.

Not supported, on purpose: other methods of peft, several adapters at once, and adapters on the embedding or the head
(log-probs are computed from the head's weight matrix; train those modules whole with lora_modules_to_save).
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from sft_core.run.config import ModelConfig, TrainingConfig
from sft_core.run.options import require

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # of activation checkpointing and torch.compile
ADAPTER = "default"  # peft's name for the only one


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


# --- before weights are loaded -----------------------------------------------------------------------------------


def check_adapters(config: ModelConfig, training: TrainingConfig, info: PretrainedConfig) -> None:
    """Raise ValueError if the adapters' options do not fit the model, the run or this machine.

    peft adds the adapters to the model of `info` on the meta device, and its own errors are reported.
    """
    if not config.use_peft:
        require(not training.merge_adapter, "merge_adapter needs adapters: give --use_peft true, or leave it out.")
        return
    quantised = "load_in_4bit" if config.load_in_4bit else "load_in_8bit" if config.load_in_8bit else ""
    for option, package in (("use_peft", "peft"), (quantised, "bitsandbytes")):
        require(
            not option or importlib.util.find_spec(package) is not None,
            f"{option} needs {package}, which is not installed: run pip install -e '.[adapters]'.",
        )
    for option in ("use_dora", "load_in_8bit"):  # peft reads a weight's type; bitsandbytes' layers change when used
        require(
            not (training.torch_compile and getattr(config, option)),
            f"{option} cannot be combined with torch_compile: leave out one of them.",
        )
    require(
        training.merge_adapter or not training.benchmarks,
        "benchmarks need a whole model: give --merge_adapter true with use_peft, or leave out --benchmarks.",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(info, trust_remote_code=config.trust_remote_code)
    names = [name for name, _ in model.named_modules()]
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    remedy = f"the linear modules of {config.model_name_or_path} are {', '.join(sorted(linear))}"
    for option in ("lora_target_modules", "lora_modules_to_save"):
        for entry in getattr(config, option) or []:
            found = any(name == entry or name.endswith(f".{entry}") for name in names)
            require(
                found or (option, entry) == ("lora_target_modules", "all-linear"),
                f"{option} names {entry!r}, which is not a module of the model: {remedy}.",
            )
    try:
        adapted = add_adapters(model, config, 0)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"peft refuses lora_target_modules or lora_modules_to_save ({reason}); {remedy}.") from error
    require(
        not any(_is_adapted(layer) for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings())),
        "lora_target_modules may not name the embedding or the head: train them whole with lora_modules_to_save; "
        f"{remedy}.",
    )


def describe(config: ModelConfig) -> dict[str, Any]:
    """The options that define the adapters, for a run's identity."""
    names = (
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    )
    return {"adapters": {name: getattr(config, name) for name in names}} if config.use_peft else {}


# --- making them -------------------------------------------------------------------------------------------------


def quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration of the frozen model, or None; `dtype` is the compute dtype."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
    )


def add_adapters(model: Any, config: ModelConfig, seed: int, known_as: str = "") -> Any:
    """peft's model around `model`, which becomes frozen. B is zero, so the outputs are still those of `model`.

    `seed`: for A, the same on every rank. `known_as`: the model's name in adapter_config.json.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=_saved_once(model, config.lora_modules_to_save),
        task_type=config.lora_task_type,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        revision=None if config.model_revision == "main" else config.model_revision,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings")  # `_saved_once` handles this
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora).eval()
    adapted.peft_config[ADAPTER].base_model_name_or_path = known_as or config.model_name_or_path
    for module in adapted.modules():
        # On a CPU bitsandbytes chooses its kernel by this flag. In training mode it multiplies the weights as they are;
        # in eval mode it repacks them or quantises the input, and the result would differ from the merged weights'.
        if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            module.training = True
    return adapted


def _embedding_names(model: Any) -> tuple[str, str]:
    """The module names of the embedding and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [next(name for name, module in model.named_modules() if module is end) for end in ends]
    return names[0], names[1]


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one parameter, even if peft trains a copy of the embedding."""
    embedding = model.get_input_embeddings()
    return model.get_output_embeddings().weight is getattr(embedding, "original_module", embedding).weight


def _saved_once(model: Any, names: list[str] | None) -> list[str] | None:
    """modules_to_save for peft. If it names a tied model's embedding or head, it keeps only the embedding, because peft
    would train two copies."""
    if names is None or not is_tied(model):
        return names
    embedding, head = _embedding_names(model)
    kept = [name for name in names if not (embedding.endswith(name) or head.endswith(name))]
    return kept if len(kept) == len(names) else [*kept, embedding]


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


# --- while training ----------------------------------------------------------------------------------------------


@contextmanager
def dropout(policy: nn.Module) -> Iterator[None]:
    """Turn on only the adapters' dropout inside the block; the backward pass must be inside too."""
    layers = [module for module in policy.modules() if hasattr(module, "lora_dropout")]
    switched = [*layers, *(drop for layer in layers for drop in layer.lora_dropout.values())]
    try:
        for module in switched:
            module.training = True
        yield
    finally:
        for module in switched:
            module.training = False


def without_adapters(policy: nn.Module) -> Callable[..., Any]:
    """The forward pass of the frozen model, through the policy's own module and its FSDP hooks.

    peft's own switch also turns `requires_grad` off and on again, and FSDP would keep the value it sees first.
    """
    switches = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]

    def forward(*args: Any) -> Any:
        try:
            for module in switches:
                module._disable_adapters = True
            return policy(*args)
        finally:
            for module in switches:
                module._disable_adapters = False

    return forward


# --- weights for engines and for the export ----------------------------------------------------------------------


def plain_name(name: str) -> str | None:
    """The Hugging Face name of a parameter of peft's model; None for a parameter that the base model does not have."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    if ".original_module." in name or ".lora_" in name:
        return None
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


def merge(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that returns the full tensor of a base parameter of `model`, in float32 if an adapter adds to it.

    All ranks must call the function in the same order. A quantised parameter is dequantised.
    """
    from peft.utils.integrations import dequantize_module_weight

    adapted = {id(layer.get_base_layer().weight): layer for layer in model.modules() if _is_adapted(layer)}  # type: ignore[operator]
    owners = {id(m._parameters.get("weight")): m for m in model.modules()}

    def merged(tensor: Tensor) -> Tensor:
        layer = adapted.get(id(tensor))
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            tensor = dequantize_module_weight(owners[id(tensor)])
        base = full(tensor.detach())
        if layer is None:
            return base
        base = base.float()
        total = base + full(layer.get_delta_weight(ADAPTER)).to(base)  # type: ignore[operator]
        if ADAPTER not in layer.lora_magnitude_vector:
            return total
        # DoRA (arXiv:2402.09353), equation 5; peft's layers keep one magnitude per output.
        magnitude = full(layer.lora_magnitude_vector[ADAPTER].weight).to(base)  # type: ignore[index,union-attr]
        return magnitude[:, None] * total / total.norm(dim=1, keepdim=True)

    return merged


def full(tensor: Tensor) -> Tensor:
    """The full tensor. Shards that are kept on the host are gathered on the mesh's device."""
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor


def write_adapter(model: Any, trained: dict[str, Tensor], folder: Any) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's format, from {name in `model`: full tensor}.

    peft makes the state from an empty copy of `model`, which has no shards and no wrappers in its names. A tied model's
    trained embedding is also written as its head, because peft loads the two separately.
    """
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    base, lora = model.get_base_model(), copy.deepcopy(model.peft_config[ADAPTER])
    embedding, head = _embedding_names(base)
    one, two = (f"base_model.model.{name}.modules_to_save.{ADAPTER}.weight" for name in (embedding, head))
    if is_tied(base) and one in trained:
        trained = trained | {two: trained[one].clone()}
        lora.modules_to_save = [*lora.modules_to_save, head]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # a save must not advance the random generators
        empty: Any = get_peft_model(empty_copy(base), copy.deepcopy(lora))
    state = get_peft_model_state_dict(empty, state_dict=trained, save_embedding_layers=False)
    assert len(state) == len(trained), "peft would not write every trained tensor"
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    lora.inference_mode = True
    lora.save_pretrained(folder)


def plain_config(base: Any) -> PretrainedConfig:
    """A copy of the model's configuration, without the quantisation."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_copy(base: Any) -> Any:
    """`base` without weights, adapters and quantisation, on the meta device."""
    with torch.device("meta"):
        empty = type(base)(plain_config(base))
    if hasattr(base, "_weight_conversions"):  # how transformers turned the names of the files into the model's
        empty._weight_conversions = base._weight_conversions
    return empty
