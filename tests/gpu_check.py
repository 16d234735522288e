"""`make gpu-check`: run the tests that need a GPU, then the benches that have aims, and print one table at the end.

    python -m tests.gpu_check [PART ...] [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--output build/gpu-check.md]

The parts run in the order given, each once. If one fails, the others still run, and the exit code is 1. The table is
rewritten whenever a part starts, measures an aim or ends. All output is in the file with the same name and .log.
Without a GPU this is a rehearsal: tests are skipped, benches use tiny shapes, and no aim is judged.
"""

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Only these files, since a machine may lack what other tests need; in parallel only if pytest-xdist is installed.
GPU_TESTS = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("tests/**/test_*.py"))
    if "pytest.mark.gpu" in path.read_text()
]
AT_ONCE = ["-n", "4", "--dist", "load"] if importlib.util.find_spec("xdist") else []
BLOCKS = "tests/sft_core/test_compile.py"  # in one process: inductor's processes do not work with those of pytest-xdist
OTHERS = [path for path in GPU_TESTS if path != BLOCKS]
COMPILED, TINY = ["--torch_compile", "--steps", "3"], ["--shape", "tiny", "--steps", "1"]


class Step(NamedTuple):
    part: str
    command: list[str]  # python -m ...
    seconds: int  # estimated (not measured) time on one H100; the timeout is three times that
    on_cpu: list[str] = []  # the command without a GPU, if it differs


STEPS = [
    Step("tests", ["pytest", "-m", "gpu", "-k", "not vllm", *AT_ONCE, *OTHERS], 70),  # five short SFT runs
    Step("tests", ["pytest", "-m", "gpu", BLOCKS], 40),
    # Alone, since vLLM fails if other processes free memory while it measures the free memory.
    Step("vllm", ["pytest", "-m", "gpu", "-k", "vllm", *GPU_TESTS], 100),  # three starts of a tiny model
    # 50 s of rounds, 20 of errors and memory, the rest compilation of the peers
    Step("kernels", ["tests.aims", "kernels.bench"], 130),
    Step(
        "update",
        ["tests.aims", "grpo_core.bench", *COMPILED],
        55,  # two shapes, 6 steps below 1 s each
        ["tests.aims", "grpo_core.bench", *TINY, "--tokens", "2048"],
    ),
    Step(
        "checkpointed",
        ["tests.aims", "grpo_core.bench", "--shape", "1.5b", "--gradient_checkpointing", *COMPILED],
        30,
        ["tests.aims", "grpo_core.bench", "--gradient_checkpointing", *TINY, "--tokens", "2048"],
    ),
    Step(
        "step",
        ["tests.e2e.beside_trl", "MODEL", "--steps", "3", "--torch_compile=true"],
        175,  # two starts of vLLM
        ["tests.e2e.beside_trl", "MODEL", *"--prompts 2 --completions 2 --tokens 16 --steps 1 --warm_up 1".split()],
    ),
    Step(
        "sft",
        ["sft_core.bench", "--shape", "1.5b", "--tokens", "16384", "--steps", "3"],
        40,
        ["sft_core.bench", *TINY, "--tokens", "256"],
    ),
]
PARTS = list(dict.fromkeys(step.part for step in STEPS))
PACKAGES = ("torch", "triton", "transformers", "vllm", "trl", "liger-kernel", "cut-cross-entropy")


def run(command: list[str], limit: float, log: Path, see: Callable[[str], None]) -> int:
    """Run a command and return its exit code (-9: timeout). Each line is printed, logged, and passed to `see`."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        text=True,
        errors="replace",
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    with log.open("a", buffering=1) as file:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            print(line, end="", flush=True)
            see(line.rstrip("\n"))
    code = process.wait()
    timer.cancel()
    return code


def table(head: str, aims: list[str], rows: list[list[str]]) -> str:
    """`rows`: command, seconds, result."""
    parts = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(
        [
            head,
            "",
            "| aim | what | value | bound |",
            "|---|---|---|---|",
            *aims,
            "",
            "| python -m | s | |",
            "|---|---|---|",
            *parts,
            "",
        ]
    )


def check(steps: list[Step], head: str, output: Path, on_gpu: bool = True) -> int:
    """Run the steps, write and print the table, and return 1 if one failed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    log, failed = output.with_suffix(".log"), False
    log.write_text(head + "\n")
    aims, rows = list[str](), [[" ".join(step.command), "", "not run yet"] for step in steps]

    def write() -> None:
        whole = output.with_suffix(".new")  # so that the table is complete at any time
        whole.write_text(table(head, aims, rows))
        whole.replace(output)

    for row, (part, command, expected, *_) in zip(rows, steps, strict=True):
        last = [""]

        def see(line: str, last: list[str] = last) -> None:
            last[:] = [line.strip("= ")]
            if line.startswith(("| met |", "| missed |", "| not measured |")):
                aims.append(line)
                write()

        row[2] = "running"
        write()
        print(f"\n=== {part}: python -m {' '.join(command)}", flush=True)
        start = time.perf_counter()
        code = run(command, 3 * expected, log, see)
        failed |= code != 0
        row[1], row[2] = f"{time.perf_counter() - start:.0f}", f"exit code {code}" if code else "ok"
        if not code and command[0] == "pytest":  # its last line: how many tests passed and were skipped
            row[2] = f"{'ok' if on_gpu else 'needs a GPU'}: {last[0]}"
        write()
    print(f"\n{output.read_text()}")
    return int(failed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument(
        "--model", help="model of the whole step; default: HuggingFaceTB/SmolLM2-135M-Instruct, or a tiny one"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    import torch

    from kernels.bench import machine
    from tests.tiny import write_tiny_model

    command = " ".join([Path(sys.executable).name, "-m", "tests.gpu_check", *sys.argv[1:]])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    head = f"{machine(*PACKAGES)}, CUDA {torch.version.cuda}, Python {platform.python_version()}\n"
    head += f"{time.strftime('%Y-%m-%d')}, commit {commit.strip() or 'unknown'}, `{command}`"
    on_gpu, model = torch.cuda.is_available(), options.model
    steps = chosen(options.parts or PARTS, on_gpu)
    if model is None and any("MODEL" in step.command for step in steps):
        tiny = options.output.parent / "tiny_model"
        model = "HuggingFaceTB/SmolLM2-135M-Instruct" if on_gpu else str(write_tiny_model(tiny))
    if model and Path(model).is_dir():
        model = str(Path(model).resolve())
    steps = [step._replace(command=[model if word == "MODEL" else word for word in step.command]) for step in steps]
    sys.exit(check(steps, head, options.output, on_gpu))


def chosen(parts: list[str], on_gpu: bool) -> list[Step]:
    """The steps of these parts in this order, each part once, with the commands for this machine."""
    steps = [step for part in dict.fromkeys(parts) for step in STEPS if step.part == part]
    return [step._replace(command=step.command if on_gpu else step.on_cpu or step.command) for step in steps]


if __name__ == "__main__":
    main()
