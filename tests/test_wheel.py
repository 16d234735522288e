"""The wheel holds every module, template, table and guide of the packages."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "sft_core", "gen", "eval", "grpo_core")


def test_the_wheel_is_complete(tmp_path):
    tree = tmp_path / "tree"  # a copy: setuptools writes beside what it builds
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    there = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".jinja", ".json", ".md", ".yaml")
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in kinds]
    assert len(sources) > 90
    assert {str(path.relative_to(ROOT)) for path in sources} <= there
