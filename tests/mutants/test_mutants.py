"""The list of mutants does not rot."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.mutant import table
from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_a_mutant_breaks_one_place_and_names_its_tests(mutant):
    """What it replaces is there once, it is another text, and the tests that kill it exist."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.breaks
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(file)


SCHEMA = sorted((ROOT / "schema" / "sql").glob("*.sql"))


@pytest.mark.parametrize(
    "mutant", [one for one in MUTANTS if one.file.endswith(".sql")], ids=lambda one: one.name
)
def test_a_mutant_of_the_schema_is_one_of_what_is_in_force(mutant):
    """What a later revision replaces may be broken as one likes: nothing would notice."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    before = text[: text.index(mutant.old) + len(mutant.old)]
    made = [*re.finditer(r"CREATE (?:OR REPLACE )?FUNCTION (\w+)\(", before)]
    if not made or "$$;" in before[made[-1].end() :]:
        return  # not within one
    name = re.compile(rf"CREATE (OR REPLACE )?FUNCTION {made[-1][1]}\(")
    newest = [file for file in SCHEMA if name.search(file.read_text(encoding="utf-8"))][-1]
    assert newest == ROOT / mutant.file


def test_every_mutant_has_a_name_of_its_own():
    """By which it can be run alone, and none is in the list twice."""
    assert len({one.name for one in MUTANTS}) == len(MUTANTS)
    assert len({(one.file, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)


def test_the_documented_table_is_the_list():
    """docs/mutants.md says which test kills which mutant."""
    assert table(MUTANTS) in (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
