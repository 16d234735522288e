"""Sharding with FSDP2, applied to the policy from outside: one unit per block, and a root unit for the rest.

Masters are float32 and sharded. Each unit is gathered in the compute dtype for its forward and backward pass. Gradients
are reduced in float32 and *summed*: the loss already divides by the whole step's counts (see `grpo_core/loss.py`), so
the gradient does not depend on the number of ranks. Not supported, on purpose: tensor and pipeline parallelism.
"""

import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from sft_core.model.export import hf_name, reshard
from sft_core.model.policy import Policy
from sft_core.model.weight_files import read_slices
from sft_core.run.config import TrainingConfig
from sft_core.run.options import require


def make_mesh(device: torch.device) -> DeviceMesh:
    """A one-dimensional mesh of all ranks."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


@dataclass(frozen=True)
class Sharding:
    """How a policy computes and where it keeps its tensors. This changes memory and time, but not the gradient."""

    bf16: bool = False
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass
    checkpointing_every: int = 1  # recompute every k-th one
    activation_offloading: bool = False  # keep the inputs of these blocks in host memory (pinned on CUDA)
    cpu_offload: bool = False  # keep shards, gradients and optimizer state in host memory
    compile_backend: str | None = None  # compile each block with torch.compile and this backend

    @classmethod
    def of(cls, config: TrainingConfig, bf16: bool) -> "Sharding":
        return cls(
            bf16,
            config.gradient_checkpointing,
            config.gradient_checkpointing_every,
            config.activation_offloading,
            config.cpu_offload,
            config.torch_compile_backend if config.torch_compile else None,
        )


def shard(policy: Policy, mesh: DeviceMesh, sharding: Sharding) -> Policy:
    """Turn `policy`'s parameters into shards over `mesh`, in place; they move to the mesh's device.

    Trained parameters are stored as float32 masters, frozen ones in the compute dtype. Quantised parameters cannot be
    sharded and stay whole on every rank.

    Embedding, final norm and head are in the root unit: it is gathered once per pass, the fused head runs inside the
    root's forward, and tied embeddings remain one parameter. On one rank blocks stay gathered from the forward to the
    backward pass, because gathering is only a copy there and doing it twice would save nothing.
    """
    compute = torch.bfloat16 if sharding.bf16 else torch.float32
    backend, offloads = sharding.compile_backend, sharding.activation_offloading
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if sharding.cpu_offload else OffloadPolicy(),
        # None: reshard all units but the root
        "reshard_after_forward": False if mesh.size() == 1 and not sharding.cpu_offload else None,
        "ignored_params": {p for p in policy.parameters() if not p.is_floating_point()},
    }
    blocks = policy.blocks
    for i, block in enumerate(blocks):
        _cast(block, compute)  # one at a time, so that the host never holds a whole float32 copy of a large model
        # Checkpointing is compiled into the graph, except with offloading, which would offload the graph's weights too.
        if backend and offloads:
            _compile(block, backend)
        if sharding.gradient_checkpointing and i % sharding.checkpointing_every == 0:
            drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=drops)
            if offloads:  # around the checkpoint wrapper, so that it offloads only the block's inputs
                blocks[i] = offload_wrapper(blocks[i])
        if backend and not offloads:
            _compile(blocks[i], backend)
        fully_shard(blocks[i], **options)
    _cast(policy, compute)
    fully_shard(policy, **options)
    if policy.files:
        device = torch.device("cpu") if sharding.cpu_offload else torch.device(mesh.device_type)
        policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        read_slices(((hf_name(name), p) for name, p in policy.model.named_parameters()), policy.files)
    for module in policy.modules():
        if isinstance(module, FSDPModule) and mesh.size() > 1:
            _sum_gradients(module)
    return policy


def check_compile(config: TrainingConfig, device: torch.device) -> None:
    """Raise ValueError if blocks cannot be compiled on this machine."""
    needed = config.torch_compile and config.torch_compile_backend == "inductor" and device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    require(
        not needed or shutil.which(compiler) is not None,
        f"torch_compile needs a C++ compiler on a CPU, and there is no {compiler}: install it, or drop torch_compile.",
    )


def _compile(block: nn.Module, backend: str) -> None:
    """Compile a block's forward in place, so that parameter names stay the same and FSDP's hooks stay outside.

    Blocks share their graphs. There is one graph for each kind of block and each combination of gradients, adapters and
    dropout on or off; lengths are symbolic. A block that is not a single graph raises an error, and so do more graphs
    than the limit.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.skip_fsdp_guards = False  # else a graph could be reused after adapters or dropout are switched
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)


def _cast(module: nn.Module, compute: torch.dtype) -> None:
    """Cast parameters only; the rotary frequencies, which are a buffer, stay float32."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)


def _sum_gradients(module: FSDPModule) -> None:
    # For a factor of 1 FSDP2 would choose a pre-multiplied sum, which gloo does not support, so a plain sum is forced.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def mix(target: Policy, source: Policy, share: float) -> None:
    """`target` := share * `source` + (1 - share) * `target`, in place; each rank mixes its own shards."""
    reshard(target)
    reshard(source)
    for own, parameter in zip(target.parameters(), source.parameters(), strict=True):
        own.mul_(1 - share).add_(parameter, alpha=share)


def freeze(policy: Policy) -> Policy:
    """Freeze all parameters of the policy and return it (the reference model)."""
    return policy.requires_grad_(False)
