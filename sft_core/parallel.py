"""Sharding with FSDP2, applied to the policy from outside: one unit a block, then one for the rest.

Masters are float32 and sharded; each unit is gathered in the compute dtype for its forward and backward; gradients are
reduced in float32 and *summed*: the loss divides by the whole step's counts itself (see `grpo_core/loss.py`), so the
gradient does not depend on how many ranks share the work. Tensor and pipeline parallelism are left out on purpose.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from sft_core.model import Policy


def make_mesh(device: torch.device) -> DeviceMesh:
    """All ranks in one line."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(policy: Policy, mesh: DeviceMesh, *, bf16: bool, gradient_checkpointing: bool = False) -> Policy:
    """Turn `policy`'s parameters into float32 shards over `mesh`, in place; they move to the mesh's device.

    A frozen policy has no masters: its shards are in the compute dtype.

    Embedding, final norm and head stay in the root unit: it is gathered once a pass, the fused head runs inside the
    root's forward, and tied embeddings remain one parameter.
    """
    compute = torch.bfloat16 if bf16 else torch.float32
    stored = torch.float32 if any(p.requires_grad for p in policy.parameters()) else compute
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = policy.blocks
    for i, block in enumerate(blocks):
        _cast(block, stored)  # one at a time: the float32 copy of a large model never stands whole on the host
        if gradient_checkpointing:
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)
        fully_shard(blocks[i], mesh=mesh, mp_policy=precision)
    _cast(policy, stored)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)
    return policy


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: the rotary frequencies, a buffer, stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _sum_gradients(module: FSDPModule) -> None:
    # Without the forced plain sum, gloo refuses the pre-multiplied one that FSDP2 chooses for a factor of one.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def freeze(policy: Policy) -> Policy:
    """The same policy with no parameter trained (the reference model)."""
    return policy.requires_grad_(False)
