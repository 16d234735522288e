"""Compares the head's loss and backward with other libraries: time, TFLOP/s, memory, error against float64.

    python -m kernels.bench [--shape 0.5b 1.5b 7b] [--tokens 8192 65536] [--rounds 20] [--only NAME ...]
                            [--chunk_elements N]         # size of the head's chunks, in logits

Candidates compute GRPO's clipped loss of the same tokens and its gradients w.r.t. hidden states and weight, in bf16 on
a GPU. The hidden states contain the weight rows of their targets, so that the softmax is as peaked as a trained
model's: on noise, a library that skips small gradients would skip them all.

Rounds run the candidate and the bare GEMMs in turn, each at most for about two seconds in all. The L2 cache is cleared
before each run. The table shows the candidate's median time and its ratio to that of the GEMMs. TFLOP/s counts three
GEMMs, 6 T D V, even if a candidate runs more. `peak` is the most memory allocated beyond the inputs, both gradients
included. `workspace` is `peak` minus dX [T, D] in the states' dtype and dW [V, D] in float32; it may be negative if a
candidate's dW is in half precision. Errors are those of the first 512 rows against float64: the largest error of a
log-prob, and the relative (Frobenius) errors of the gradients. `repeats`: a second run gives the same bits of loss and
gradients. For all --tokens but the first, only the memory of our loss is measured. Each line is printed once it is
measured. A candidate that fails gets a note in its line, and the exit code is 1. If it runs out of memory or is not
installed, it gets only the note: pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 (in a separate
environment)
"""

import argparse
import importlib.metadata
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import linear_logprob as head
from kernels import reference, tables
from kernels.bench_peers import CANDIDATES, OURS, SEQUENCE, Case, make_case, one_sweep, products

SHAPES = {"tiny": (64, 1003), "0.5b": (896, 151936), "1.5b": (1536, 151936), "7b": (3584, 151936)}  # hidden, vocabulary
PEERS = ("liger_kernel", "cut_cross_entropy", "trl")
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl")
ERROR_ROWS, PATIENCE = 512, 2000.0  # ms

show = partial(print, flush=True)  # a bench that is killed has printed its results so far


def machine(*packages: str) -> str:
    """The GPU's name, and the versions of those packages that are installed."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {name: list(importlib.metadata.distributions(name=name)) for name in packages}  # the first is imported
    return ", ".join([card, *(f"{name} {versions[0].version}" for name, versions in found.items() if versions)])


def failure(error: Exception) -> str:
    """The note in place of a candidate's metrics. It begins with "failed" for an error that sets exit code 1."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError) and error.name in PEERS:
        return f"{error.name} is not installed"
    traceback.print_exception(error)
    text = " ".join(str(error).split()).replace("|", "/")
    return f"failed: {type(error).__name__} {text[:60]}"


@dataclass
class Measured:
    """The results of one candidate at one shape; NaN: not measured."""

    ms: float = math.nan
    floor: float = math.nan  # ms of the bare GEMMs in the same rounds
    peak: float = math.nan  # GiB
    workspace: float = math.nan  # GiB
    errors: tuple[float, float, float] = (math.nan,) * 3  # of log-probs, dX, dW
    repeats: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ms / self.floor


def step(candidate: Callable[[Case], Tensor | None], case: Case) -> Tensor | None:
    case.hidden.grad = case.weight.grad = None
    case.seen.clear()
    loss = candidate(case)
    if loss is not None:
        loss.backward()
    return loss


def milliseconds(run: Callable, case: Case, cache: Tensor | None) -> float:
    if cache is None:
        start = time.perf_counter()
        run(case)
        return 1e3 * (time.perf_counter() - start)
    cache.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run(case)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def in_turn(runs: Sequence[Callable], case: Case, cache: Tensor | None, rounds: int) -> list[float]:
    """The median time of each in ms. They run alternately."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, taken, strict=True):
            if sum(times) < PATIENCE:
                times.append(milliseconds(run, case, cache))
    return [statistics.median(times) for times in taken]


def extra_memory(run: Callable, case: Case) -> tuple[float, float]:
    """GiB at the peak, and the part of it that is neither dX nor a float32 dW."""
    case.hidden.grad = case.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case)
    peak = torch.cuda.max_memory_allocated() - before
    return peak / 2**30, (peak - case.hidden.nbytes - 4 * case.weight.numel()) / 2**30


def exactly(part: Case) -> Case:
    """The first rows in float64, with their gradients, and with their log-probs in `seen`."""
    exact = part.first(ERROR_ROWS, torch.float64)
    exact.loss(reference.linear_logprob(exact.hidden, exact.weight, exact.targets)[0]).sum().backward()
    return exact


def errors(run: Callable, part: Case, exact: Case) -> tuple[float, float, float]:
    """The largest error of a log-prob (NaN if the candidate does not expose them) and the relative errors of dX and dW;
    infinite if a result is NaN."""
    if run(part) is None:
        return (math.nan,) * 3
    pairs = ((part.hidden.grad, exact.hidden.grad), (part.weight.grad, exact.weight.grad))
    found = [(got.double() - want).norm() / want.norm() for got, want in pairs]  # type: ignore[union-attr]
    if part.seen:
        found.insert(0, (torch.cat(part.seen) - exact.seen[0]).abs().max())
    *logps, dx, dw = [math.inf if error.isnan() else error.item() for error in found]
    return logps[0] if logps else math.nan, dx, dw


def repeats(run: Callable, case: Case) -> bool | None:
    """Whether two runs give the same bits."""
    results = []
    for _ in range(2):
        if (loss := run(case)) is None:
            return None
        results.append((loss.detach(), case.hidden.grad, case.weight.grad))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def bench(shape: str, options: argparse.Namespace, device: torch.device) -> dict[str, Measured]:
    """Print the table of a shape line by line. Returns its results."""
    (hidden, vocab), tokens = SHAPES[shape], options.tokens[0]
    columns = ("ms", "TFLOP/s", "x GEMMs", "GiB peak", "workspace", "log-prob", "dX", "dW", "repeats")
    show("\n" + tables.head(f"{shape}: T={tokens}, D={hidden}, V={vocab}", *columns))
    case = make_case(hidden, vocab, tokens, device)
    part = case.first(ERROR_ROWS)
    exact = exactly(part)
    cache = torch.empty(2**26, device=device) if device.type == "cuda" else None
    floor = partial(step, products)
    floor(case)
    found = {}
    for name in options.only or CANDIDATES:
        f = found[name] = Measured()
        try:
            run = partial(step, CANDIDATES[name]())
            f.errors = errors(run, part, exact)
            if cache is not None:
                f.peak, f.workspace = extra_memory(run, case)
            f.repeats = repeats(run, case)
            f.ms, f.floor = in_turn([run, floor], case, cache, options.rounds)
        except Exception as error:
            f.note = failure(error)
        cells = [
            f.note or f"{f.ms:.2f}",
            f"{6e-9 * tokens * hidden * vocab / f.ms:.4g}",
            f"{f.ratio:.2f}",
            f"{f.peak:.2f}",
            f"{f.workspace:.2f}",
            *(f"{error:.1e}" for error in f.errors),
            {True: "yes", False: "no", None: "-"}[f.repeats],
        ]
        show(tables.line(name, *cells).replace("| nan", "| -"))
    return found


@contextmanager
def tuned(device: torch.device, **constants: int) -> Iterator[None]:
    """Replace constants of `kernels.linear_logprob` (for this device type) and `kernels.rows_triton` temporarily."""
    with ExitStack() as stack:
        for name, value in constants.items():
            if by_device := getattr(head, name, None):
                stack.enter_context(patch.dict(by_device, {device.type: value}))
            else:
                stack.enter_context(patch(f"kernels.rows_triton.{name}", value))
        yield


def main(
    argv: list[str] | None = None, finished: Callable[[str, dict[str, Measured], float], None] | None = None
) -> None:
    """`finished` is called for each shape with its results, and with the growth of our workspace, in GiB, from the
    first to the last --tokens."""
    parser = argparse.ArgumentParser(prog="kernels.bench", description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "1.5b", "7b"] if on_gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 65536] if on_gpu else [1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES)
    parser.add_argument("--chunk_elements", type=int, default=head.CHUNK_ELEMENTS[device.type])
    options = parser.parse_args(argv)
    if any(tokens < ERROR_ROWS or tokens % SEQUENCE for tokens in options.tokens) or options.rounds < 1:
        parser.error(
            f"--tokens must be multiples of {SEQUENCE} and at least {ERROR_ROWS}, --rounds at least 1, got "
            f"{options.tokens} and {options.rounds}"
        )
    show(f"{machine(*PACKAGES)}; median of {options.rounds} rounds, chunks of {options.chunk_elements} logits")
    failed = False
    with tuned(device, CHUNK_ELEMENTS=options.chunk_elements):
        for shape in options.shape:
            found, growth = bench(shape, options, device), math.nan
            for tokens in options.tokens[1:] if on_gpu else []:
                peak, workspace = extra_memory(partial(step, one_sweep), make_case(*SHAPES[shape], tokens, device))
                growth = workspace - found.get(OURS, Measured()).workspace
                show(f"{OURS} at T={tokens}: {peak:.2f} GiB at the peak, workspace {workspace:.2f}")
            failed |= any(measured.note.startswith("failed") for measured in found.values())
            if finished is not None:
                finished(shape, found, growth)
    sys.exit(failed)


if __name__ == "__main__":
    main()
