"""`make gpu-check`: the tests that need a GPU, then the benches whose figures have an aim; one table of all, last.

    python -m tests.gpu_check [PART ...] [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--output build/gpu-check.md]

A part that fails keeps no other from running; the exit code is then 1. The table is written anew after each part, and
all that was printed to the same name with .log.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Their files alone, and on several processes only where pytest-xdist is: a machine may lack what the other tests need.
GPU_TESTS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))
             if "pytest.mark.gpu" in path.read_text()]  # fmt: skip
AT_ONCE = ["-n", "4", "--dist", "load"] if importlib.util.find_spec("xdist") else []
# python -m ..., and the seconds it should take on one H100: reckoned, not measured; three times that is its limit.
COMPILED = ["--torch_compile", "--steps", "3"]
PARTS = {
    "tests": (["pytest", "-m", "gpu", "-k", "not vllm", *AT_ONCE, *GPU_TESTS], 70),  # five short SFT runs
    # Alone: vLLM, while it measures free memory, does not bear that others give some back.
    "vllm": (["pytest", "-m", "gpu", "-k", "vllm", *GPU_TESTS], 100),  # three starts of a tiny model
    "kernels": (["kernels.bench"], 130),  # 40 of rounds, 20 of errors and memory, the rest compilation of the peers
    "update": (["grpo_core.bench", "--peer", *COMPILED], 55),  # two shapes, two ways, 6 steps below 1 s each
    "checkpointed": (["grpo_core.bench", "--shape", "1.5b", "--gradient_checkpointing", *COMPILED], 30),
    "step": (["tests.e2e.beside_trl", "MODEL", "--steps", "3", "--torch_compile=true"], 175),  # two starts of vLLM
    "sft": (["sft_core.bench", "--shape", "1.5b", "--tokens", "16384", "--peer", "--steps", "3"], 40),
}
PACKAGES = ("torch", "triton", "transformers", "vllm", "trl", "liger-kernel", "cut-cross-entropy")


def run(command: list[str], limit: float, log: Path) -> tuple[int, list[str]]:
    """Exit code (-9: it took too long) and the lines printed, which are shown and logged as they come."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    with log.open("a") as file:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            file.write(line)
            print(line, end="", flush=True)
    code = process.wait()
    timer.cancel()
    return code, lines


def table(head: str, ran: dict[str, tuple[list[str], int, float, list[str]]]) -> str:
    """`ran`: part -> command, exit code, seconds, lines printed."""
    aims = [line for *_, lines in ran.values() for line in lines
            if line.startswith(("| met |", "| missed |", "| not measured |"))]  # fmt: skip
    parts = [f"| {' '.join(command)} | {seconds:.0f} | {'ok' if code == 0 else f'exit code {code}'} |"
             for command, code, seconds, _ in ran.values()]  # fmt: skip
    return "\n".join([head, "", "| aim | what | figure | bound |", "|---|---|---|---|", *aims, "",
                      "| python -m | s | |", "|---|---|---|", *parts, ""])  # fmt: skip


def check(parts: dict[str, tuple[list[str], int]], head: str, output: Path) -> int:
    """Run the parts, write and show the table; 1 where one failed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    log.write_text(head + "\n")
    ran: dict[str, tuple[list[str], int, float, list[str]]] = {}
    for name, (command, expected) in parts.items():
        print(f"\n=== {name}: python -m {' '.join(command)}", flush=True)
        start = time.perf_counter()
        code, lines = run(command, 3 * expected, log)
        ran[name] = command, code, time.perf_counter() - start, lines
        output.write_text(table(head, ran))
    print(f"\n{output.read_text()}")
    return int(any(code for _, code, *_ in ran.values()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of the whole step")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU is found here")
    every = list(importlib.metadata.distributions())[::-1]  # of a name the first on the path counts
    found = {d.metadata["Name"].replace("_", "-"): d.version for d in every}
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    head = (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {versions}\n"
    )
    command = " ".join([Path(sys.executable).name, "-m", "tests.gpu_check", *sys.argv[1:]])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    head += f"{time.strftime('%Y-%m-%d')}, commit {commit.strip() or 'unknown'}, `{command}`"
    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    chosen = {name: ([model if word == "MODEL" else word for word in command], expected)
              for name, (command, expected) in PARTS.items() if not options.parts or name in options.parts}  # fmt: skip
    sys.exit(check(chosen, head, options.output))


if __name__ == "__main__":
    main()
