"""The head's loss, forward and backward, beside its peers in one run: time, TFLOP/s, memory, error against float64.

    python -m kernels.bench [--shape 0.5b 1.5b 7b] [--tokens 8192 65536] [--rounds 20] [--only NAME ...]
    python -m kernels.bench --sweep          # the one sweep with other constants, beside the bare products
    python -m kernels.bench --profile        # what the one sweep launches, and how long that takes

Everybody computes GRPO's clipped loss of the same tokens and its gradient by hidden states and weight, bf16 on a GPU.
The states are mixed with the rows of their targets, so that the softmax is peaked as a trained model's is: on plain
noise a peer that skips small gradients would skip them all. Rounds take the candidates in turn, with the L2 cache
cleared in between; one that has used two seconds leaves. Shown is the median. TFLOP/s counts three products, 6 T D V,
whoever makes more. `peak` is what is allocated beyond the inputs at the worst moment, both gradients included;
`workspace` is that less dX [T, D] in the states' dtype and less dW [V, D] in float32, also of a peer that keeps dW in
half precision (its may be negative). Errors, against float64, are of the first 512 rows: the largest of a log-prob, the
relative (Frobenius) of the gradients. `repeats`: loss and gradients are the same bits in a second run. Of all --tokens
but the first only our memory is taken. Peers that are not installed are named and left out:

    pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0      (in an environment of their own)
"""

import argparse
import importlib.metadata
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import linear_logprob as head
from kernels import reference
from kernels.bench_peers import CANDIDATES, FLOOR, NAIVE, OURS, SEQUENCE, Case, make_case, one_sweep, products

SHAPES = {"tiny": (64, 1003), "0.5b": (896, 151936), "1.5b": (1536, 151936), "7b": (3584, 151936)}  # hidden, vocabulary
PEERS = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "trl": "trl"}
ERROR_ROWS, PATIENCE = 512, 2000.0  # ms
AIMS = {"0.5b": 1.45, "1.5b": 1.25, "7b": 1.15}  # time over bare products, at 8,192 tokens on an H100
FASTER = {"Liger GRPO": 12.0, "cut cross entropy, unfiltered": 2.5, NAIVE: 1.35}


@dataclass
class Figures:
    """Of one candidate at one shape; NaN: there is none."""

    ms: float = math.nan
    peak: float = math.nan  # GiB
    workspace: float = math.nan  # GiB
    errors: tuple[float, float, float] = (math.nan,) * 3  # of log-probs, dX, dW
    repeats: bool | None = None
    note: str = ""


def step(candidate: Callable[[Case], Tensor | None], case: Case, tf32: bool = False) -> Tensor | None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
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


def extra_memory(run: Callable, case: Case) -> tuple[float, float]:
    """GiB at the peak, and what of it is neither dX nor a float32 dW."""
    case.hidden.grad = case.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case)
    peak = torch.cuda.max_memory_allocated() - before
    return peak / 2**30, (peak - case.hidden.nbytes - 4 * case.weight.numel()) / 2**30


def exactly(part: Case) -> Case:
    """The same in float64, with log-probs in `seen`, and gradients."""
    exact = Case(part.hidden.detach().double().requires_grad_(), part.weight.detach().double().requires_grad_(),
                 part.targets, part.old_logps.double(), part.advantages.double())  # fmt: skip
    exact.loss(reference.linear_logprob(exact.hidden, exact.weight, exact.targets)[0]).sum().backward()
    return exact


def errors(run: Callable, part: Case, exact: Case) -> tuple[float, float, float]:
    """Largest of a log-prob (NaN where the candidate shows none), relative of dX and dW; infinite for a NaN found."""
    if run(part) is None:
        return (math.nan,) * 3
    pairs = ((part.hidden.grad, exact.hidden.grad), (part.weight.grad, exact.weight.grad))
    found = [(got.double() - want).norm() / want.norm() for got, want in pairs]  # type: ignore[union-attr]
    if part.seen:
        found.insert(0, (torch.cat(part.seen) - exact.seen[0]).abs().max())
    *logps, dx, dw = [math.inf if error.isnan() else error.item() for error in found]
    return logps[0] if logps else math.nan, dx, dw


def repeats(run: Callable, case: Case) -> bool | None:
    """Whether two runs end in the same bits."""
    results = []
    for _ in range(2):
        if (loss := run(case)) is None:
            return None
        results.append((loss.detach(), case.hidden.grad, case.weight.grad))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def bench(shape: str, tokens: int, rounds: int, only: list[str], device: torch.device) -> dict[str, Figures]:
    case = make_case(*SHAPES[shape], tokens, device)
    part = case.first(ERROR_ROWS)
    exact = exactly(part)
    cache = torch.empty(2**26, device=device) if device.type == "cuda" else None
    found, runs, taken = {}, {}, dict[str, list[float]]()
    for name, (package, make) in CANDIDATES.items():
        if only and name not in only:
            continue
        figures = found[name] = Figures()
        try:
            run = partial(step, make(), tf32="TF32" in name)
            figures.errors = errors(run, part, exact)
            if cache is not None:
                figures.peak, figures.workspace = extra_memory(run, case)
            figures.repeats = repeats(run, case)
            runs[name], taken[name] = run, []
        except ImportError:
            figures.note = f"{PEERS[package or '']} is not installed"
        except torch.cuda.OutOfMemoryError:
            figures.note = "out of memory"
        except Exception as error:
            if package is None:
                raise
            figures.note = f"failed: {str(error).splitlines()[0][:60]}"  # a peer's trouble is no reason to end
    del part, exact
    for _ in range(rounds):
        for name, times in taken.items():
            if sum(times) < PATIENCE:
                times.append(milliseconds(runs[name], case, cache))
    for name, times in taken.items():
        found[name].ms = statistics.median(times)
    return found


def table(shape: str, tokens: int, found: dict[str, Figures]) -> str:
    hidden, vocab = SHAPES[shape]
    lines = [
        f"\n| {shape}: T={tokens}, D={hidden}, V={vocab} | ms | TFLOP/s | x products | GiB peak | workspace | "
        "log-prob | dX | dW | repeats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    floor = found[FLOOR].ms if FLOOR in found else math.nan
    for name, f in found.items():
        cells = [f"{f.ms:.2f}", f"{6e-9 * tokens * hidden * vocab / f.ms:.4g}", f"{f.ms / floor:.2f}",
                 f"{f.peak:.2f}", f"{f.workspace:.2f}", *(f"{error:.1e}" for error in f.errors),
                 {True: "yes", False: "no", None: "-"}[f.repeats]]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join([f.note or cells[0], *cells[1:]]).replace("nan", "-") + " |")
    return "\n".join(lines)


def verdict(what: str, figures: Sequence[float], aims: Sequence[float], at_least: bool = False) -> str:
    """A line for `make gpu-check` to gather: met only if every figure is; NaN is a figure that was not taken."""
    met = all((figure >= aim) if at_least else (figure <= aim) for figure, aim in zip(figures, aims, strict=True))
    shown = "not measured" if any(map(math.isnan, figures)) else "met" if met else "missed"
    columns = [" / ".join(f"{x:.3g}".replace("nan", "-") for x in values) for values in (figures, aims)]
    return f"| {shown} | {what} | {columns[0]} | {'>=' if at_least else '<='} {columns[1]} |"


def verdicts(full: dict[str, dict[str, Figures]], growth: dict[str, float]) -> list[str]:
    """Of the shapes that have aims. `growth`: GiB of our workspace at the last --tokens less that at the first."""
    shapes, none = [shape for shape in full if shape in AIMS], Figures()
    if not shapes:
        return []

    def figures(shape: str) -> list[float]:
        ours, floor, naive = (full[shape].get(name, none) for name in (OURS, FLOOR, NAIVE))
        worst = max(mine / theirs for mine, theirs in zip(ours.errors[1:], naive.errors[1:], strict=True))
        repeats = math.nan if ours.repeats is None else float(ours.repeats)
        faster = [full[shape].get(name, none).ms / ours.ms for name in FASTER]
        return [
            ours.ms / floor.ms,
            ours.workspace,
            growth.get(shape, math.nan),
            worst,
            ours.errors[0],
            repeats,
            *faster,
        ]

    at = f", D = {' / '.join(str(SHAPES[shape][0]) for shape in shapes)}"
    same = {"GiB beyond dX and the float32 dW": 1.5, "GiB more of that at the most tokens": 0.01,
            "error of dX and dW over plain torch's": 1.1, "largest error of a log-prob": 1e-4}  # fmt: skip
    rows = [("one sweep, time over three bare products" + at, [AIMS[shape] for shape in shapes], False)]
    rows += [(what + at, [aim] * len(shapes), False) for what, aim in same.items()]
    rows += [("same bits when repeated (1: yes)" + at, [1.0] * len(shapes), True)]
    rows += [(f"times faster than {name}" + at, [aim] * len(shapes), True) for name, aim in FASTER.items()]
    columns = zip(*map(figures, shapes), strict=True)
    return [verdict(what, found, aims, up) for (what, aims, up), found in zip(rows, columns, strict=True)]


@contextmanager
def tuned(device: torch.device, **constants: int) -> Iterator[None]:
    """Other constants of `kernels.linear_logprob` (for this kind of device) and `kernels.rows_triton` meanwhile."""
    with ExitStack() as stack:
        for name, value in constants.items():
            if by_device := getattr(head, name, None):
                stack.enter_context(patch.dict(by_device, {device.type: value}))
            else:
                stack.enter_context(patch(f"kernels.rows_triton.{name}", value))
        yield


def sweep(shape: str, tokens: int, rounds: int, device: torch.device) -> None:
    """One line for each choice of constants."""
    case, on_gpu = make_case(*SHAPES[shape], tokens, device), device.type == "cuda"
    cache = torch.empty(2**26, device=device) if on_gpu else None
    vocab = SHAPES[shape][1]
    grid = {"CHUNK_ELEMENTS": [rows * vocab for rows in ((256, 512, 1024) if on_gpu else (128, 512))]}
    if on_gpu:
        from kernels import rows_triton

        grid |= {"CHUNKS_IN_BLOCK": [4, 8, 16], "BLOCK": [1024, 2048, 4096], "WARPS": [4, 8, 16]}
        grid = {name: tries for name, tries in grid.items() if hasattr(head, name) or hasattr(rows_triton, name)}
    floor = statistics.median(milliseconds(partial(step, products), case, cache) for _ in range(rounds))
    print(f"\n| {shape}: {' | '.join(grid)} | ms | x products | workspace |\n|{'---|' * (len(grid) + 3)}")
    for constants in itertools.product(*grid.values()):
        with tuned(device, **dict(zip(grid, constants, strict=True))):
            step(one_sweep, case)
            workspace = extra_memory(partial(step, one_sweep), case)[1] if on_gpu else math.nan
            ours = statistics.median(milliseconds(partial(step, one_sweep), case, cache) for _ in range(rounds))
        print(f"| {' | '.join(map(str, constants))} | {ours:.2f} | {ours / floor:.3f} | {workspace:.2f} |")


def profiled(run: Callable[[], Any], device: torch.device) -> str:
    """What a second run takes, by kernel (on a CPU by operation)."""
    run()
    with torch.profiler.profile() as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=16, max_name_column_width=80)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kernels.bench", description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(AIMS) if on_gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 65536] if on_gpu else [1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=[])
    parser.add_argument("--chunk_elements", type=int, default=head.CHUNK_ELEMENTS[device.type])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    if any(tokens < ERROR_ROWS or tokens % SEQUENCE for tokens in options.tokens) or options.rounds < 1:
        parser.error(f"--tokens must be multiples of {SEQUENCE} and at least {ERROR_ROWS}, --rounds at least 1")
    every = list(importlib.metadata.distributions())[::-1]  # of a name the first on the path counts
    found = {d.metadata["Name"].replace("_", "-"): d.version for d in every}
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", *PEERS.values()) if name in found)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {versions}; median of {options.rounds} rounds, "
          f"chunks of {options.chunk_elements} logits")  # fmt: skip
    first, *more = options.tokens
    full, growth = {}, {}
    for shape in options.shape:
        if options.sweep:
            sweep(shape, first, options.rounds, device)
            continue
        with tuned(device, CHUNK_ELEMENTS=options.chunk_elements):
            if options.profile:
                case = make_case(*SHAPES[shape], first, device)
                print(f"\n{shape}, {first} tokens\n{profiled(partial(step, one_sweep, case), device)}")
                continue
            full[shape] = bench(shape, first, options.rounds, options.only, device)
            print(table(shape, first, full[shape]))
            for tokens in more if on_gpu else []:
                case = make_case(*SHAPES[shape], tokens, device)
                peak, workspace = extra_memory(partial(step, one_sweep), case)
                growth[shape] = workspace - full[shape].get(OURS, Figures()).workspace
                print(f"{OURS} at T={tokens}: {peak:.2f} GiB at the peak, workspace {workspace:.2f}")
    if on_gpu:
        print("\n".join(["", *verdicts(full, growth)]))


if __name__ == "__main__":
    main()
