"""Reads weights shard by shard: each rank reads only its slices of the files, into a model sharded without values.

`sft_core.model.policy.load_policy` makes the policy on the meta device, `sft_core.model.parallel.shard` shards it there
and then fills the shards. So a rank never holds more of the model in host memory than its shards.

Not supported, on purpose: adapters, quantised models, custom code, and models whose weights transformers renames or
converts. These are loaded whole on every rank.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from sft_core.model.adapters import is_tied


def can_read_slices(folder: str) -> bool:
    """Whether `folder` holds a model of one of transformers' own classes, without quantisation."""
    if not Path(folder).is_dir() or not is_accelerate_available():
        return False
    config = AutoConfig.from_pretrained(folder)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "quantization_config", None) is None


def weight_files(model: Any, folder: str) -> dict[str, Path]:
    """The file of each parameter of a model on the meta device; also computes the model's buffers, which are in no
    file. Empty if the files do not hold exactly the model's parameters."""
    from accelerate import init_empty_weights

    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    files: dict[str, str] = {}
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
    elif single.is_file():
        with safe_open(single, "pt") as file:
            files = dict.fromkeys(file.keys(), single.name)
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    # A tied weight may be in the files twice with different values; loading the whole model detects that.
    twice = tied & files.keys() or model.config.tie_word_embeddings and not is_tied(model)
    if twice or not names <= files.keys():
        return {}
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        built = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    for module, source in zip(model.modules(), built.modules(), strict=True):
        if module._buffers.keys() - module._non_persistent_buffers_set:
            return {}
        module._buffers.update(source._buffers)
    return {name: Path(folder, files[name]) for name in names}


@torch.no_grad()
def read_slices(parameters: Iterable[tuple[str, Tensor]], files: dict[str, Path]) -> None:
    """Fill each parameter, or this rank's shard of it (dimension 0, as FSDP2 shards it), from the file of its name."""
    for name, parameter in parameters:
        local, start = parameter, 0
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            mesh = parameter.device_mesh
            start = mesh.get_local_rank() * math.ceil(len(parameter) / mesh.size())
        with safe_open(files[name], "pt") as file:  # mapped into memory until it is closed: one weight at a time
            if len(local):
                local.copy_(file.get_slice(name)[start : start + len(local)])
