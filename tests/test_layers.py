"""A package or sub-package imports only itself and those to its left in ORDER, and no file is long."""

import ast
from pathlib import Path

ORDER = [
    "kernels",
    "sft_core.run",
    "sft_core.data",
    "sft_core.model",
    "sft_core",
    "gen.engine",
    "gen",
    "eval",
    "grpo_core",
]
ROOT = Path(__file__).parents[1]


def package_of(module: str) -> str | None:
    """The longest name in ORDER that contains the module."""
    inside = [name for name in ORDER if f"{module}.".startswith(f"{name}.")]
    return max(inside, key=len, default=None)


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {package for name in names if (package := package_of(name))}


def test_imports_only_from_the_left():
    seen = set()
    for path in (path for name in ORDER if "." not in name for path in (ROOT / name).rglob("*.py")):
        package = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert package, path
        seen.add(package)
        allowed = set(ORDER[: ORDER.index(package) + 1])
        assert imported_packages(path) <= allowed, (path, imported_packages(path) - allowed)
    assert seen == set(ORDER)


def test_no_file_is_long():
    paths = [
        path
        for folder in ("kernels", "sft_core", "gen", "eval", "grpo_core", "tests", "recipes")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 100
    for path in paths:
        limit = 450 if path == ROOT / "grpo_core/nano.py" else 350  # it contains all of GRPO in one file
        assert len(path.read_text().splitlines()) <= limit, path
