"""Invariant 10: README's option tables come from the dataclasses, and the files it names exist."""

import re
from pathlib import Path

from grpo_core.config import option_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_option_tables_are_those_of_the_dataclasses():
    assert option_tables() in README, "run `python -m grpo_core.config` and put its output into README.md"


def test_every_module_has_its_line():
    """Every module has its line, and every line its module."""
    named = set(re.findall(r"^([\w/]+\.py)  ", README, re.MULTILINE))
    packages = ["kernels", "sft_core", "gen", "eval", "grpo_core"]
    there = {str(f.relative_to(ROOT)) for p in packages for f in (ROOT / p).rglob("*.py") if f.name != "__init__.py"}
    assert named == there


def test_recipes_and_make_targets_that_are_named_exist():
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets
