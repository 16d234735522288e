"""The picture of the quickstart's reward over its GRPO steps: writes reward.png next to this file.

    python -m grpo_core.quickstart.draw runs/quickstart

It needs matplotlib, which `make setup` installs (the extra `test`).
"""

import sys
from pathlib import Path

import pandas as pd


def draw(folder: Path, image: Path) -> None:
    """Draw the mean reward of each logged step in `folder`/grpo/metrics.jsonl."""
    rows = pd.read_json(folder / "grpo" / "metrics.jsonl", lines=True)
    labels = {"xlabel": "GRPO step", "ylabel": "mean reward", "legend": False}
    axes = rows.plot("step", "reward", ylim=(0, 1), marker="o", grid=True, figsize=(7, 3), **labels)
    axes.figure.savefig(image, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "grpo" / "metrics.jsonl").is_file():
        raise SystemExit(f"error: name a finished quickstart's folder, such as runs/quickstart, got {sys.argv[1:]}")
    draw(Path(sys.argv[1]), Path(__file__).with_name("reward.png"))
