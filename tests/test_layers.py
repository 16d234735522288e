"""The law of the house: a package imports only from those to its left."""

import ast
from pathlib import Path

import pytest

ORDER = ["kernels", "sft_core", "gen", "eval", "grpo_core"]
ROOT = Path(__file__).parents[1]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_only_from_the_left(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        allowed = set(ORDER[: ORDER.index(package) + 1])
        assert imported_packages(path) & set(ORDER) <= allowed, path


def test_no_file_is_long():
    paths = [path for folder in (*ORDER, "tests", "recipes") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        assert len(path.read_text().splitlines()) <= 350, path
