"""The supervised trainer, and everything that any trainer of this project needs.

The other packages import this one first. Before anything heavy is imported, it exits with an error if another module
hides one of the project's packages. Two cases are known:

* The package `kernels` shares its import name with a Hub package that transformers looks for. If that one is installed,
  `import transformers` finds our folder instead and fails far from the cause.
* A file `eval.py` in the working folder hides our `eval`. (`python -m eval.run` in that folder runs only the user's
  file, so this check cannot catch it.)

From this import on, a command (`python -m`) is killed when the torchrun that started it ends, and Ctrl-C prints one
line instead of a traceback.
"""

import importlib.metadata
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

from sft_core.run.parent import end_with_launcher

# Turn off library messages that would confuse users: bitsandbytes also looks for the Hub's `kernels` and works without
# it; vLLM on the CPU needs no Triton, and warns that memory is bound to a NUMA node. Turn off the progress bars of
# `datasets`, and delay those of other libraries by ten seconds.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DELAY", "10")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def refuse(says: str) -> None:
    print(f"error: {says}", file=sys.stderr)
    raise SystemExit(2)


def refuse_foreign_kernels() -> None:
    """Exit with code 2 if the Hub's own `kernels` distribution is installed next to this project."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    refuse(
        f"the package `kernels` {version} is installed, which uses the same folder kernels/ as this project and "
        "breaks transformers: run `pip uninstall kernels` in this environment, then install this project again."
    )


def refuse_hidden_packages() -> None:
    """Exit with code 2 if another module of the same name hides one of the project's packages."""
    root = Path(__file__).parents[1]
    for name in ("kernels", "gen", "eval", "grpo_core"):
        origin = getattr(importlib.util.find_spec(name), "origin", None)
        if origin is not None and Path(origin).parent != root / name:
            refuse(f"{origin} hides this project's package `{name}`: rename it, or start from another folder.")


def report_interrupt(kind: Any, error: Any, trace: Any) -> None:
    """Print one line on the first rank for Ctrl-C, and a traceback for every other error."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("stopped by Ctrl-C; run the same command again: it resumes where it can.", file=sys.stderr)


refuse_foreign_kernels()
refuse_hidden_packages()
if sys.argv[0] == "-m":  # a command's package is being imported
    end_with_launcher()
    sys.excepthook = report_interrupt
