"""The head's loss, forward and backward, beside its peers in one run: time, TFLOP/s, memory, error against float64.

    python -m kernels.bench [--shape 0.5b 1.5b 7b] [--tokens 8192] [--rounds 20] [--only NAME ...]

Everybody computes GRPO's clipped loss of the same tokens and its gradient by hidden states and weight, bf16 on a GPU.
The states are mixed with the rows of their targets, so that the softmax is peaked as a trained model's is: on plain
noise a peer that skips small gradients would skip them all. Rounds take the candidates in turn, with the L2 cache
cleared in between; shown is the median. TFLOP/s counts three products, 6 T D V, whoever makes more. Memory is what is
allocated beyond inputs at the peak, gradients [T, D] and [V, D] included. Errors are of the first 512 rows, relative
(Frobenius) for the gradients. Peers that are not installed are named and left out:

    pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0      (in an environment of their own)
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_logprob import linear_logprob
from kernels.linear_loss import linear_loss

SHAPES = {"tiny": (64, 1003), "0.5b": (896, 151936), "1.5b": (1536, 151936), "7b": (3584, 152064)}  # hidden, vocabulary
PEERS = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "trl": "trl"}
ERROR_ROWS, SEQUENCE = 512, 256
LOW, HIGH = 0.2, 0.28


@dataclass
class Case:
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    old_logps: Tensor  # [T]
    advantages: Tensor  # [T], the same for a sequence's tokens

    def first(self, rows: int) -> "Case":
        cut = [t[:rows].detach() for t in (self.hidden, self.targets, self.old_logps, self.advantages)]
        return Case(cut[0].clone().requires_grad_(), self.weight.detach().clone().requires_grad_(), *cut[1:])

    def loss(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Clipped, weighted by 1 / T. [C] -> [C]"""
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


# ------------------------------------------------------------------------- candidates: Case -> the loss [], or None


def products(case: Case) -> None:
    """The three products alone, on one gradient of the logits [C, V] that is there already: the floor."""
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


def compiled() -> Callable[[Case], Tensor]:
    @torch.compile
    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return lambda case: case.loss(logps(case.hidden, case.weight, case.targets)).sum()


def liger_cross_entropy() -> Callable[[Case], Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    nll = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return lambda case: case.loss(-nll(case.weight, case.hidden, case.targets)).sum()


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
        return fused(hidden, case.weight, case.targets.view(rows), mask, advantages,
                     old_per_token_logps=case.old_logps.view(rows))[0]  # fmt: skip

    return loss


def cut_cross_entropy() -> Callable[[Case], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda case: case.loss(
        -linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none", filter_eps=None)
    ).sum()


def trl_chunked() -> Callable[[Case], Tensor]:
    from trl.trainer.utils import _ChunkedLogProbFunction

    return lambda case: case.loss(
        _ChunkedLogProbFunction.apply(case.hidden, case.weight, case.targets, 1.0, 8192)[0]
    ).sum()


CANDIDATES: dict[str, tuple[str | None, Callable]] = {  # name -> package it needs, and itself or what makes it
    "bare products": (None, lambda: products),
    "linear_loss (here)": (None, lambda: one_sweep),
    "linear_logprob (here)": (None, lambda: log_probs),
    "plain torch": (None, lambda: naive),
    "torch.compile": (None, compiled),
    "Liger cross entropy": ("liger", liger_cross_entropy),
    "Liger GRPO": ("liger", liger_grpo),
    "cut cross entropy, unfiltered": ("cce", cut_cross_entropy),
    "TRL chunked": ("trl", trl_chunked),
}

# ----------------------------------------------------------------------------------------------------------- measuring


def step(candidate: Callable[[Case], Tensor | None], case: Case) -> Tensor | None:
    case.hidden.grad = case.weight.grad = None
    loss = candidate(case)
    if loss is not None:
        loss.backward()
    return loss


def milliseconds(candidate: Callable, case: Case, cache: Tensor | None) -> float:
    if cache is None:
        start = time.perf_counter()
        step(candidate, case)
        return 1e3 * (time.perf_counter() - start)
    cache.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step(candidate, case)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def extra_memory(candidate: Callable, case: Case) -> float:
    """GiB."""
    case.hidden.grad = case.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(candidate, case)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def errors(candidate: Callable, case: Case) -> str:
    """Of loss (absolute), dX and dW (relative) against float64."""
    part = case.first(ERROR_ROWS)
    exact = Case(part.hidden.detach().double().requires_grad_(), part.weight.detach().double().requires_grad_(),
                 part.targets, part.old_logps.double(), part.advantages.double())  # fmt: skip
    want = exact.loss(reference.linear_logprob(exact.hidden, exact.weight, exact.targets)[0]).sum()
    want.backward()
    loss = step(candidate, part)
    if loss is None:
        return "| | |"
    pairs = ((part.hidden.grad, exact.hidden.grad), (part.weight.grad, exact.weight.grad))
    relative = [f"{((got.double() - right).norm() / right.norm()).item():.1e}" for got, right in pairs]  # type: ignore
    return f"{abs(loss.item() - want.item()):.1e} | {' | '.join(relative)} |"


def bench(shape: str, tokens: int, rounds: int, only: list[str], device: torch.device) -> None:
    hidden, vocab = SHAPES[shape]
    case = make_case(hidden, vocab, tokens, device)
    cache = torch.empty(2**26, device=device) if device.type == "cuda" else None
    lines, made, taken = {}, {}, dict[str, list[float]]()
    for name, (package, make) in CANDIDATES.items():
        if only and name not in only:
            continue
        try:
            made[name] = make()
            lines[name] = errors(made[name], case)
            memory = f"{extra_memory(made[name], case):.1f}" if cache is not None else "-"
            lines[name] = f"{memory} | {lines[name]}"
            for _ in range(2):
                step(made[name], case)
            taken[name] = []
        except ImportError:
            lines[name] = f"{PEERS[package or '']} is not installed | | | |"
        except torch.cuda.OutOfMemoryError:
            lines[name] = "out of memory | | | |"
    for _ in range(rounds):
        for name in taken:
            taken[name].append(milliseconds(made[name], case, cache))
    print(f"\n| {shape}: T={tokens}, D={hidden}, V={vocab} | ms | TFLOP/s | x products | GiB | error loss | dX | dW |")
    print("|---|---|---|---|---|---|---|---|")
    floor = statistics.median(taken["bare products"]) if "bare products" in taken else float("nan")
    for name, rest in lines.items():
        figures = " | | "
        if name in taken:
            median = statistics.median(taken[name])
            figures = f"{median:.2f} | {6e-9 * tokens * hidden * vocab / median:.0f} | {median / floor:.2f}"
        print(f"| {name} | {figures} | {rest}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kernels.bench", description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b", "7b"] if on_gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192] if on_gpu else [1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=[])
    options = parser.parse_args(argv)
    if any(tokens < ERROR_ROWS or tokens % SEQUENCE for tokens in options.tokens) or options.rounds < 1:
        parser.error(f"--tokens must be multiples of {SEQUENCE} and at least {ERROR_ROWS}, --rounds at least 1")
    device = torch.device("cuda" if on_gpu else "cpu")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", *PEERS.values()) if name in found)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {versions}; median of {options.rounds} rounds")
    for shape in options.shape:
        for tokens in options.tokens:
            bench(shape, tokens, options.rounds, options.only, device)


if __name__ == "__main__":
    main()
