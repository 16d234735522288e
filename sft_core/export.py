"""The policy's weights for others: full tensors for an engine, and a Hugging Face folder for everybody.

Left out on purpose: adapters, quantised weights, and pushing to the Hub. Everything here is a collective: all ranks
call, parameter by parameter, so that no rank but the first ever holds the whole model twice.
"""

import copy
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from sft_core.files import flush_to_disk
from sft_core.guards import is_first_rank, on_first_rank

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def hf_name(name: str) -> str:
    """A parameter's name without what activation checkpointing and torch.compile put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones once, under the name that comes first."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def weight_names(policy: Any) -> list[str]:
    """The names that `full_weights` will yield, in its order, without any communication."""
    return [hf_name(name) for name, _ in _tensors(policy.model)]


@torch.no_grad()
def full_weights(policy: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of each parameter and persistent buffer of `policy.model`, on every rank.

    Shards are cast to `dtype` before they are gathered (half the traffic for bfloat16); None keeps the masters' dtype.
    Every rank must consume the whole iterator, in step with the others. With one rank and no cast a tensor may share
    the parameter's memory: copy what outlives the next optimizer step.
    """
    for name, tensor in _tensors(policy.model):
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        yield hf_name(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export_model(
    policy: Any,
    tokenizer: Any,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    stop_ids: Collection[int] = (),
) -> None:
    """Write `policy.model` and `tokenizer` into `folder` as transformers and vLLM load them. A collective.

    `stop_ids` are added to the generation config's EOS ids, with the tokenizer's own. `folder` may be the output_dir
    itself: everything is first complete in `.export.tmp`, then moved over file by file, `config.json` last, so that a
    folder that loads is never a mixture.
    """
    target = Path(folder)
    first = is_first_rank()
    state = {name: tensor.cpu() for name, tensor in full_weights(policy, dtype) if first}

    def write() -> None:
        temporary = target / ".export.tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        _write(policy.model, state, tokenizer, temporary, dtype, stop_ids)
        for path in temporary.iterdir():
            flush_to_disk(path)
        _replace(target, temporary)

    on_first_rank(write)


def _write(
    model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, dtype: torch.dtype, stop_ids: Collection[int]
) -> None:
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    try:
        # save_pretrained refuses sampling settings that contradict each other, as in some published models: not at the
        # end of a run. It also writes the masters' dtype into the config. Both files are written again below.
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    finally:
        model.config.dtype, model.generation_config = config.dtype, generation

    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    config.dtype = dtype
    config.use_cache = True  # training turns it off; nobody would find out why generation is slow
    config.save_pretrained(folder)

    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    ends = [tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else [eos]), *sorted(stop_ids)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.use_cache = True
    generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def _replace(target: Path, temporary: Path) -> None:
    (target / "config.json").unlink(missing_ok=True)  # from here until the end the folder does not load
    new = {path.name for path in temporary.iterdir()}
    stale = [*target.glob("model*.safetensors"), *target.glob("model.safetensors.index.json")]
    for old in stale:
        if old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda name: name == "config.json"):
        os.replace(temporary / name, target / name)
    temporary.rmdir()
    flush_to_disk(target)
