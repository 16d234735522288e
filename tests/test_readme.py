"""Invariant 10: README's option tables come from the dataclasses, and the files it names exist."""

import ast
import re
from pathlib import Path

from grpo_core.option_guide import option_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_option_tables_are_those_of_the_dataclasses():
    assert option_tables() in README, "run `python -m grpo_core.option_guide` and put its output into README.md"


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


def definitions(source):
    """Names of functions, classes and methods (`Class.method`)."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {node.name: node} | {f"{node.name}.{n.name}": n for n in inner if isinstance(n, ast.FunctionDef)}
    return found


def test_what_is_held_names_functions_and_tests_that_exist():
    """A row of the table: what holds, `file:function` of the code, `file:test`; both by name, at least a file."""
    section = README.split("## What is held, and where\n")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 30
    for what, code, tests in rows:
        for column, folder in ((code, "grpo_core"), (tests, "tests/grpo_core")):
            assert re.fullmatch(r"`[\w/.:]+`(, `[\w/.:]+`)*", column), (what, column)
            for file, _, name in (named.partition(":") for named in re.findall(r"`(.+?)`", column)):
                path = ROOT / ("" if "/" in file else folder) / file
                assert path.is_file(), (what, file)
                assert path.name.startswith("test_") == (column is tests), (what, file)
                assert not name or name in definitions(path.read_text()), (what, file, name)
