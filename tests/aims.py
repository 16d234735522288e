"""The aims of the GPU check: run a bench and print, one line per aim, whether it was met, as soon as it is known.

python -m tests.aims kernels.bench [its options]           or grpo_core.bench
"""

import math
import sys

import torch

import grpo_core.bench
import kernels.bench
from grpo_core.config import GRPOConfig
from kernels import tables
from kernels.bench import Measured
from kernels.bench_peers import NAIVE, OURS

OVER_PRODUCTS = {"0.5b": 1.45, "1.5b": 1.25, "7b": 1.15}  # time over bare GEMMs, at 8,192 tokens on an H100
FASTER = {"Liger GRPO": 12.0, "cut cross entropy, unfiltered": 2.5, NAIVE: 1.35}
RATES = {  # (shape, checkpointing) -> TFLOP/s of the pass and of the whole step, for 16,384 tokens on one H100
    ("0.5b", False): (400.0,),
    ("1.5b", False): (500.0, 460.0),
    ("1.5b", True): (400.0,),
}


def verdict(what: str, figure: float, aim: float, at_least: bool = False) -> str:
    """A line that `make gpu-check` collects; NaN means that the value was not measured."""
    met = (figure >= aim) if at_least else (figure <= aim)
    shown = "not measured" if math.isnan(figure) else "met" if met else "missed"
    bound = f"{'>=' if at_least else '<='} {aim:.3g}"
    return tables.line(shown, what, f"{figure:.3g}", bound).replace("| nan", "| -")


def of_the_head(shape: str, found: dict[str, Measured], growth: float) -> list[str]:
    """`growth`: GiB of our workspace at the last --tokens minus that at the first."""
    if shape not in OVER_PRODUCTS:
        return []
    ours, naive = (found.get(name, Measured()) for name in (OURS, NAIVE))
    worst = max(mine / theirs for mine, theirs in zip(ours.errors[1:], naive.errors[1:], strict=True))
    rows = [
        ("one sweep, time over three bare GEMMs", ours.ratio, OVER_PRODUCTS[shape]),
        ("GiB beyond dX and the float32 dW", ours.workspace, 1.5),
        ("GiB more of that at the most tokens", growth, 0.01),
        ("error of dX and dW over plain torch's", worst, 1.1),
        ("largest error of a log-prob", ours.errors[0], 1e-4),
    ]
    lines = [verdict(f"{shape}: {what}", figure, aim) for what, figure, aim in rows]
    same = math.nan if ours.repeats is None else float(ours.repeats)
    lines.append(verdict(f"{shape}: same bits when repeated (1: yes)", same, 1.0, at_least=True))
    for name, aim in FASTER.items():
        faster = found.get(name, Measured()).ratio / ours.ratio
        lines.append(verdict(f"{shape}: times faster than {name}", faster, aim, at_least=True))
    return lines


def of_the_update(shape: str, checkpointing: bool, rates: tuple[float, float]) -> list[str]:
    """`rates`: TFLOP/s of the pass and of the whole step."""
    name = f"{shape} shape{', checkpointed' if checkpointing else ''}, 16k packed tokens, TFLOP/s: "
    aims = zip(("the pass", "with clipping and AdamW"), rates, RATES.get((shape, checkpointing), ()), strict=False)
    return [verdict(name + what, rate, aim, at_least=True) for what, rate, aim in aims]


def judge_head(*measured) -> None:
    print("", *of_the_head(*measured), sep="\n", flush=True)


def judge_update(shape: str, config: GRPOConfig, *rates: float) -> None:
    if config.max_tokens_per_micro_batch == 16384:
        print(*of_the_update(shape, config.gradient_checkpointing, rates), sep="\n", flush=True)


def main() -> None:
    program, *argv = sys.argv[1:]
    bench, judge = {
        "kernels.bench": (kernels.bench.main, judge_head),
        "grpo_core.bench": (grpo_core.bench.main, judge_update),
    }[program]
    bench(argv, judge if torch.cuda.is_available() else None)


if __name__ == "__main__":
    main()
