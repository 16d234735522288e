"""Sharding with FSDP2, applied to the policy from outside: one unit a block, then one for the rest.

Masters are float32 and sharded; each unit is gathered in the compute dtype for its forward and backward; gradients are
reduced in float32 and *summed*: the loss divides by the whole step's counts itself (see `grpo_core/loss.py`), so the
gradient does not depend on how many ranks share the work. Tensor and pipeline parallelism are left out on purpose.
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
    """All ranks in one line."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


@dataclass(frozen=True)
class Sharding:
    """How a policy computes and where it keeps what it needs: memory and time, never the gradient."""

    bf16: bool = False
    gradient_checkpointing: bool = False  # recompute each block in the backward pass,
    checkpointing_every: int = 1  # or every k-th alone
    activation_offloading: bool = False  # keep the inputs that such a block saves in host memory (pinned on CUDA)
    cpu_offload: bool = False  # keep shards, their gradients and so the optimizer's state in host memory
    compile_backend: str | None = None  # compile each block by torch.compile with this backend

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

    What is trained is stored as float32 masters, what is frozen in the compute dtype. Quantised parameters, which are
    no numbers to shard or sum, stay whole on every rank.

    Embedding, final norm and head stay in the root unit: it is gathered once a pass, the fused head runs inside the
    root's forward, and tied embeddings remain one parameter. On one rank blocks stay gathered from the forward to the
    backward pass: to gather is to copy there, and nothing is saved by doing it twice.
    """
    compute = torch.bfloat16 if sharding.bf16 else torch.float32
    backend, offloads = sharding.compile_backend, sharding.activation_offloading
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if sharding.cpu_offload else OffloadPolicy(),
        # None: all but the root
        "reshard_after_forward": False if mesh.size() == 1 and not sharding.cpu_offload else None,
        "ignored_params": {p for p in policy.parameters() if not p.is_floating_point()},
    }
    blocks = policy.blocks
    for i, block in enumerate(blocks):
        _cast(block, compute)  # one at a time: the float32 copy of a large model never stands whole on the host
        # Checkpoints are part of the graph, but where inputs are offloaded: the graph's weights would be so too.
        if backend and offloads:
            _compile(block, backend)
        if sharding.gradient_checkpointing and i % sharding.checkpointing_every == 0:
            drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=drops)
            if offloads:  # outside of the checkpoint, whose inputs are all that it then sees
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
    """Raise ValueError where blocks cannot be compiled on this machine."""
    needed = config.torch_compile and config.torch_compile_backend == "inductor" and device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    require(
        not needed or shutil.which(compiler) is not None,
        f"torch_compile needs a C++ compiler on a CPU and finds no {compiler}: install it, or leave torch_compile out.",
    )


def _compile(block: nn.Module, backend: str) -> None:
    """In place, so that no name changes, and the forward alone: FSDP's hooks stay outside. Blocks share their graphs.

    There is one for each combination of gradients on or off, adapters on or off, dropout on or off, and kind of block;
    lengths are symbols in it. What cannot be one graph raises an error, and so would more graphs than the limit.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.skip_fsdp_guards = False  # else a graph might outlive the switches of adapters and dropout
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=True)


def _cast(module: nn.Module, compute: torch.dtype) -> None:
    """Parameters only: the rotary frequencies, a buffer, stay float32."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute)


def _sum_gradients(module: FSDPModule) -> None:
    # Without the forced plain sum, gloo refuses the pre-multiplied one that FSDP2 chooses for a factor of one.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def mix(target: Policy, source: Policy, share: float) -> None:
    """`target` := share * `source` + (1 - share) * `target`, in place, each rank its shards of both."""
    reshard(target)
    reshard(source)
    for own, parameter in zip(target.parameters(), source.parameters(), strict=True):
        own.mul_(1 - share).add_(parameter, alpha=share)


def freeze(policy: Policy) -> Policy:
    """The same policy with no parameter trained (the reference model)."""
    return policy.requires_grad_(False)
