"""The supervised trainer, and everything that any trainer of this project needs.

Importing it, which the other packages do first, refuses an environment in which the project's packages are not its own,
before anything heavy is imported. The package `kernels` shares its import name with a Hub package that transformers
looks for: with that one installed, `import transformers` finds our folder instead and fails far from the cause. And a
file `eval.py` in the working folder takes the place of our `eval` (but `python -m eval.run` beside it runs none of our
code). A command (`python -m`) ends with the torchrun that started it, and at Ctrl-C in one line, from here on.
"""

import importlib.metadata
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

from sft_core.run.parent import end_with_launcher

# Lines of libraries that would only puzzle: bitsandbytes looks for the Hub's `kernels` and goes on without it, vLLM on
# the CPU needs no Triton and warns that memory is bound to a NUMA node. Progress bars appear after ten seconds.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
os.environ.setdefault("TQDM_DELAY", "10")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def refuse(says: str) -> None:
    print(f"error: {says}", file=sys.stderr)
    raise SystemExit(2)


def refuse_foreign_kernels() -> None:
    """Exit with code 2 where the Hub's own `kernels` distribution is installed beside this project."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    refuse(
        f"the package `kernels` {version} is installed, which owns the folder kernels/ as this project does "
        "and breaks transformers: run `pip uninstall kernels` in this environment, then install this project again."
    )


def refuse_hidden_packages() -> None:
    """Exit with code 2 where another module of the same name hides one of the project's packages."""
    root = Path(__file__).parents[1]
    for name in ("kernels", "gen", "eval", "grpo_core"):
        origin = getattr(importlib.util.find_spec(name), "origin", None)
        if origin is not None and Path(origin).parent != root / name:
            refuse(f"{origin} hides this project's package `{name}`: rename it, or start from another folder.")


def report_interrupt(kind: Any, error: Any, trace: Any) -> None:
    """Ctrl-C is no fault of the program: one line, of the first rank."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("stopped by Ctrl-C; the same command starts again, and goes on where it can.", file=sys.stderr)


refuse_foreign_kernels()
refuse_hidden_packages()
if sys.argv[0] == "-m":  # a command's package is being imported
    end_with_launcher()
    sys.excepthook = report_interrupt
