"""How tests start child processes."""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The number of processes follows. Each job gets its own port, so that jobs of several tests do not collide.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def environment(place: Path = ROOT, **more: str) -> dict[str, Any]:
    """This process's environment, with `place` before the entries of PYTHONPATH, which may be needed, too."""
    places = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)} | more
