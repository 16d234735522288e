"""The supervised trainer, and everything that any trainer of this project needs.

The package `kernels` of this project shares its import name with a Hub package that transformers looks for. With that
one installed, `import transformers` finds our folder instead and fails far from the cause, so it is refused here,
before anything imports transformers.
"""

import importlib.metadata
import logging
import sys

# bitsandbytes looks for that package too and goes on without it; its warning would only puzzle.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def refuse_foreign_kernels() -> None:
    """Exit with code 2 where the Hub's own `kernels` distribution is installed beside this project."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    print(
        f"error: the package `kernels` {version} is installed and hides behind this project's own kernels/ folder, "
        "which breaks transformers: run `pip uninstall kernels` in this environment.",
        file=sys.stderr,
    )
    raise SystemExit(2)


refuse_foreign_kernels()
