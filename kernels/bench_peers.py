"""The candidates of `kernels/bench.py`: one GRPO loss of the same tokens, implemented here and by other libraries.

A candidate takes a `Case` and returns its loss [], differentiable in hidden states and weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.linear_logprob import linear_logprob
from kernels.linear_loss import linear_loss

SEQUENCE = 256  # tokens that share an advantage
LOW, HIGH = 0.2, 0.28
OURS, FLOOR, NAIVE = "linear_loss (here)", "bare GEMMs", "plain torch"


@dataclass
class Case:
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    old_logps: Tensor  # [T]
    advantages: Tensor  # [T], the same for a sequence's tokens
    seen: list[Tensor] = field(default_factory=list)  # the log-probs passed to `loss`

    def first(self, rows: int, dtype: torch.dtype | None = None) -> "Case":
        dtype = dtype or self.hidden.dtype
        hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.hidden[:rows], self.weight))
        return Case(hidden, weight, self.targets[:rows], self.old_logps[:rows], self.advantages[:rows])

    def loss(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """The clipped loss per token, weighted by 1 / T. [C] -> [C]"""
        self.seen.append(logps.detach())
        ratio, advantages = (logps - self.old_logps[rows]).exp(), self.advantages[rows]
        clipped = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
        return -clipped / self.targets.shape[0]


def make_case(hidden: int, vocab: int, tokens: int, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = noise(vocab, hidden) * hidden**-0.5
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
    states = weight[targets] * (12 + 3 * noise(tokens, 1)) + noise(tokens, hidden)
    states, weight = states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    with torch.no_grad():
        logps = linear_logprob(states, weight, targets)[0]
    advantages = noise(-(-tokens // SEQUENCE)).repeat_interleave(SEQUENCE)[:tokens]
    return Case(states, weight, targets, logps + 0.15 * noise(tokens), advantages)


def products(case: Case) -> None:
    """The three GEMMs alone, with a given gradient of the logits [C, V]: the lower bound of the time."""
    chunk = min(4096, len(case.targets))
    hidden, weight = case.hidden.detach(), case.weight.detach()
    gradient = torch.empty(chunk, weight.shape[0], dtype=weight.dtype, device=weight.device).normal_()
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        torch.mm(part, weight.T)
        torch.mm(gradient[: len(part)], weight)
        torch.mm(gradient[: len(part)].T, part)


def one_sweep(case: Case) -> Tensor:
    return linear_loss(case.hidden, case.weight, case.targets, lambda logps, _, rows: case.loss(logps, rows))[0]


def log_probs(case: Case) -> Tensor:
    return case.loss(linear_logprob(case.hidden, case.weight, case.targets)[0]).sum()


def naive(case: Case) -> Tensor:
    logits = (case.hidden @ case.weight.T).float()
    return case.loss(logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]).sum()


def liger_grpo() -> Callable[[Case], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=LOW, epsilon_high=HIGH, loss_type="dapo", temperature=1.0
    )

    def loss(case: Case) -> Tensor:
        rows = (-1, SEQUENCE)
        hidden = case.hidden.view(*rows, case.hidden.shape[-1])
        mask = torch.ones_like(case.targets.view(rows))
        advantages = case.advantages.view(rows)[:, 0]
        return fused(
            hidden,
            case.weight,
            case.targets.view(rows),
            mask,
            advantages,
            old_per_token_logps=case.old_logps.view(rows),
        )[0]

    return loss


def cut_cross_entropy() -> Callable[[Case], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda case: case.loss(
        -linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none", filter_eps=None)
    ).sum()


def trl_chunked() -> Callable[[Case], Tensor]:
    """As the GRPOTrainer of TRL 1.16 calls it, including the entropies that it logs."""
    from trl.kernels import ChunkedLogProbFunction

    how = (1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    return lambda case: case.loss(
        ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.targets, *how)[0]
    ).sum()


CANDIDATES: dict[str, Callable] = {  # name -> function that makes the candidate
    FLOOR: lambda: products,
    OURS: lambda: one_sweep,
    "linear_logprob (here)": lambda: log_probs,
    NAIVE: lambda: naive,
    "Liger GRPO": liger_grpo,
    "cut cross entropy, unfiltered": cut_cross_entropy,
    "TRL chunked": trl_chunked,
}
