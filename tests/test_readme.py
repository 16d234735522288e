"""Invariant 10: README is short, its links and those of the guides resolve, and what they list is what the code has."""

import ast
import re
from pathlib import Path

import pytest

from grpo_core.option_guide import option_tables, with_tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGES = ("kernels", "sft_core", "gen", "eval", "grpo_core")
GUIDES = {package: ROOT / package / "README.md" for package in PACKAGES}
PAGES = [README, *GUIDES.values(), ROOT / "grpo_core" / "OPTIONS.md"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
by_package = pytest.mark.parametrize("package", PACKAGES)


def prose(page):
    """The lines outside code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()


def anchors(page):
    """What GitHub calls the headings of a page in links."""
    headings = [line.lstrip("#").strip() for line in prose(page) if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    text = README.read_bytes()
    assert text.count(b"\n") <= 250 and len(text) <= 20_000


@by_page
def test_no_paragraph_is_long(page):
    assert [line for line in prose(page) if len(line) > 900 and not line.startswith("|")] == []


@by_page
def test_links_resolve(page):
    """To files and headings; a link to a heading names one that is there."""
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))
    assert links or page.name == "OPTIONS.md"
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(path), link


def test_every_guide_is_linked_from_readme():
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    assert {f"{package}/README.md" for package in PACKAGES} <= set(links)


def test_option_tables_are_those_of_the_dataclasses():
    for package, tables in option_tables().items():
        text = GUIDES[package].read_text()
        assert with_tables(text, tables) == text, "run `python -m grpo_core.option_guide`"


@by_package
def test_the_file_map_is_that_of_the_package(package):
    """Every module has its line, and every line its module."""
    section = GUIDES[package].read_text().split("\n## Files\n")[1]
    named = re.findall(r"^([\w/]+\.py) {2,}\S", section, re.MULTILINE)
    assert len(named) == len(set(named))
    there = {str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}
    assert set(named) == there


def test_recipes_and_make_targets_that_are_named_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    recipes = re.findall(r"recipes/[\w./-]+\.(?:yaml|py|ipynb)", text)
    assert len(recipes) > 3
    for recipe in recipes:
        assert (ROOT / recipe).is_file(), recipe
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE))
    assert {first or second for first, second in named} <= targets


def definitions(source):
    """Names of functions, classes and methods (`Class.method`)."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {node.name: node} | {f"{node.name}.{n.name}": n for n in inner if isinstance(n, ast.FunctionDef)}
    return found


def check_named(cell, folder, kind):
    """A cell of `file:name`s, the file in the folder or by its path from the root; both must exist."""
    assert re.fullmatch(r"`[\w/.:]+`(, `[\w/.:]+`)*", cell), cell
    for file, _, name in (named.partition(":") for named in re.findall(r"`(.+?)`", cell)):
        path = next((base / file for base in (folder, ROOT) if (base / file).is_file()), None)
        assert path is not None, (cell, file)
        assert path.name.startswith("test_") == (kind == "test"), (cell, file)
        assert not name or name in definitions(path.read_text()), (cell, file, name)


def rows_of(page, heading):
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")][1:]


def test_what_is_tested_names_functions_and_tests_that_exist():
    """A row of a guide: what holds, `file:function` of the code, `file:test`; both by name, at least a file."""
    rows = [(package, *row) for package, guide in GUIDES.items() for row in rows_of(guide, "What is tested")]
    assert len(rows) > 50
    for package, _, code, tests in rows:
        check_named(code, ROOT / package, "code")
        check_named(tests, ROOT / "tests" / package, "test")


def test_why_to_trust_it_names_tests_that_exist():
    rows = rows_of(README, "Why to trust it")
    assert len(rows) > 8
    for _, tests in rows:
        check_named(tests, ROOT, "test")
