"""linear_logprob under FSDP2, on two ranks."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from kernels.linear_logprob import linear_logprob
from sft_core.run import distributed
from tests.processes import run_ranks

VOCAB, DIM, ROWS = 51, 16, 20


class Head(nn.Linear):
    def forward(self, hidden, targets):
        self.used = self.weight.data  # shares the storage of the gathered parameter, even after FSDP2 replaces it
        return linear_logprob(hidden, self.weight, targets, temperature=0.9, chunk_size=3)


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.body = nn.Linear(DIM, DIM)
        self.head = Head(DIM, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, targets):
        return self.head(torch.tanh(self.body(self.embed(ids))), targets)


def loss_of(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logps, entropies, _ = model(ids, targets)
    return (logps * torch.linspace(-1, 1, len(logps))).sum() + 0.1 * entropies.sum()


def check(tied: bool, rank: int) -> None:
    torch.manual_seed(0)
    alone, sharded = Model(tied), Model(tied)
    sharded.load_state_dict(alone.state_dict())
    ids, targets = torch.randint(0, VOCAB, (2, ROWS)), torch.randint(0, VOCAB, (2, ROWS))

    for unit in [[sharded.embed, sharded.head]] if tied else [sharded.embed, sharded.head]:
        fully_shard(unit, reshard_after_forward=True)
    fully_shard(sharded.body, reshard_after_forward=True)
    fully_shard(sharded)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    loss = loss_of(sharded, ids[rank], targets[rank])
    assert sharded.head.used.untyped_storage().size() == 0, "the gathered weight was kept: this run would prove nothing"
    loss.backward()
    sum(loss_of(alone, ids[r], targets[r]) for r in range(2)).backward()

    wanted = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, parameter in sharded.named_parameters():
        error = (parameter.grad.full_tensor() - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-5, f"{name}: {error}"
    with torch.no_grad():
        got, want = sharded(ids[rank], targets[rank]), alone(ids[rank], targets[rank])
    torch.testing.assert_close(got, want)


def on_a_rank() -> None:
    rank, *_ = distributed.init_distributed(60)
    for tied in (True, False):
        check(tied, rank)
    distributed.shutdown()


def test_two_sharded_ranks_give_the_gradient_of_one_process():
    """With a tied and an untied head; FSDP2 frees the gathered weight between forward and backward."""
    run_ranks(2, on_a_rank)
