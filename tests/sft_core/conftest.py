"""Rows for the tests of supervised training."""

import json

import pytest


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """20 conversations of about a dozen tokens each."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(20):
            turns = [("user", f"Ben has {10 + i} pens."), ("assistant", f"{10 + i}" * (1 + i % 3))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path
