"""Exports the policy's weights: full tensors for an engine, and a folder that transformers or peft loads.

Everything here is a collective. Parameters are gathered one by one, so that only the first rank ever holds a second
copy of the whole model. Not supported, on purpose: writing quantised weights, and pushing to the Hub (`run/hub.py`).
"""

import copy
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sft_core.model.adapters import (
    WRAPPERS,
    empty_copy,
    full,
    has_adapters,
    merge,
    plain_config,
    plain_name,
    write_adapter,
)
from sft_core.run.distributed import is_first_rank, on_first_rank
from sft_core.run.files import flush_to_disk, open_to_readers

CONFIGS = ("config.json", "adapter_config.json")


def hf_name(name: str) -> str:
    """A parameter's name without the prefixes of activation checkpointing and torch.compile."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the model by Hugging Face name. Tied ones appear once, under the first name.

    With adapters these are the base model's tensors, or the trained copy for modules that are trained whole.
    """
    name_of = plain_name if has_adapters(model) else hf_name
    buffers: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                buffers.setdefault(id(buffer), (f"{prefix}.{name}" if prefix else name, buffer))
    for name, tensor in (*model.named_parameters(), *buffers.values()):
        if (plain := name_of(name)) is not None:
            yield plain, tensor


def weight_names(policy: Any) -> list[str]:
    """The names that `full_weights` will yield, in the same order, without any communication."""
    return [name for name, _ in named_tensors(policy.model)]


def reshard(policy: nn.Module) -> None:
    """Free the parameters that FSDP keeps gathered, in the compute dtype, after a forward pass without a backward pass:
    those of the root unit, and on one rank all."""
    for module in policy.modules() if isinstance(policy, FSDPModule) else ():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def full_weights(policy: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of each parameter and persistent buffer of `policy.model`, on every rank.

    Adapters are merged, in float32, and quantised weights are dequantised. Without adapters, shards are cast to `dtype`
    before they are gathered, which halves the traffic for bfloat16; None keeps the masters' dtype. Every rank must
    consume the whole iterator, in step with the others. With one rank and no cast a tensor may share the parameter's
    memory: copy tensors that must outlive the next optimizer step.
    """
    reshard(policy)
    merged = merge(policy.model) if has_adapters(policy.model) else None
    for name, tensor in named_tensors(policy.model):
        if merged is not None:
            tensor = merged(tensor)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.detach().to(dtype)
        yield name, full(tensor.detach())


def export_model(
    policy: Any,
    tokenizer: Any,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    stop_ids: Collection[int] = (),
    merge_adapter: bool = False,
) -> None:
    """Write `policy.model` and `tokenizer` into `folder`, which transformers and vLLM can load. A collective.

    With adapters, the adapter is written in peft's format (float32), and with `merge_adapter` also the merged model, in
    `folder`/merged. `stop_ids` and the tokenizer's EOS are added to the generation config's EOS ids. `folder` may be
    the output_dir itself: all files are first written to `.export.tmp`, then moved over one by one, the configuration
    last. So a folder that loads never mixes two models.
    """
    model, first = policy.model, is_first_rank()
    reshard(policy)
    if has_adapters(model):
        trained = {hf_name(name): full(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
        trained = {name: tensor.cpu() for name, tensor in trained.items()} if first else {}
        on_first_rank(lambda: _replace(Path(folder), lambda to: _write_adapter(model, trained, tokenizer, to)))
        if not merge_adapter:
            return
        folder, model = Path(folder) / "merged", model.get_base_model()
    state = {name: tensor.cpu() for name, tensor in full_weights(policy, dtype) if first}
    on_first_rank(lambda: _replace(Path(folder), lambda to: _write(model, state, tokenizer, to, dtype, stop_ids)))


def _write_adapter(model: Any, trained: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    write_adapter(model, trained, folder)
    tokenizer.save_pretrained(folder)


def _write(
    model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, dtype: torch.dtype, stop_ids: Collection[int]
) -> None:
    config, generation = plain_config(model), copy.deepcopy(model.generation_config)
    # An empty copy of the model writes the weights, because it has no quantisation and a default generation config.
    # save_pretrained refuses the contradictory generation configs of some published models, and must not do so at the
    # end of a run. Both configurations are written again below.
    empty_copy(model).save_pretrained(folder, state_dict=state, max_shard_size="5GB")

    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    config.dtype = dtype
    config.use_cache = True  # training turns it off, which would make generation slow
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


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Replace the model in `target` by the files that `write` puts into the folder it gets."""
    temporary = target / ".export.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    write(temporary)
    open_to_readers(temporary)
    for path in temporary.iterdir():
        flush_to_disk(path)
    for name in CONFIGS:
        (target / name).unlink(missing_ok=True)  # from here until the end the folder does not load
    new = {path.name for path in temporary.iterdir()}
    stale = [*target.glob("model*.safetensors"), *target.glob("model.safetensors.index.json")]
    for old in [*stale, *target.glob("adapter_model*.safetensors")]:
        if old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda name: name in CONFIGS):
        os.replace(temporary / name, target / name)
    temporary.rmdir()
    flush_to_disk(target)
