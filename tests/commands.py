"""How tests start processes of their own."""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Then their number. A port of its own: jobs of several tests at once, or one before that lingers, do not meet.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def environment(place: Path = ROOT, **more: str) -> dict[str, Any]:
    """This process's, with `place` before what PYTHONPATH holds: packages may lie there alone."""
    places = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)} | more
