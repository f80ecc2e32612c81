"""The migration, the SQLAlchemy tables and the documentation say the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.dialects.postgresql import base as dialect

from dlm_core.catalogue import schema, tables
from dlm_core.catalogue.engine import make_engine, rows
from dlm_core.errors import SchemaMismatchError
from dlm_core.types import Phase
from tests.schema.document import DOCUMENT, render

# what a server says of its own tables; partitions and Alembic's own table apart
_MINE = """
  SELECT c.oid, c.relname FROM pg_class c
   WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
     AND NOT c.relispartition AND c.relname <> 'alembic_version'"""
_COLUMNS = f"""
  WITH mine AS ({_MINE})
  SELECT m.relname, a.attname, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull,
         a.attgenerated, pg_get_expr(d.adbin, d.adrelid) AS value,
         (SELECT collname FROM pg_collation WHERE oid = a.attcollation) AS collation
    FROM mine m JOIN pg_attribute a ON a.attrelid = m.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = m.oid AND d.adnum = a.attnum
   ORDER BY 1, 2"""
_CONSTRAINTS = f"""
  WITH mine AS ({_MINE})
  SELECT m.relname, c.conname, pg_get_constraintdef(c.oid) AS body FROM mine m
    JOIN pg_constraint c ON c.conrelid = m.oid AND c.contype IN ('p', 'u', 'f')
     AND c.conparentid = 0
   ORDER BY 1, 2"""
_INDEXES = f"""
  WITH mine AS ({_MINE})
  SELECT m.relname, pg_get_indexdef(i.indexrelid) AS body FROM mine m
    JOIN pg_index i ON i.indrelid = m.oid ORDER BY 1, 2"""
_PARTITIONING = (
    f"WITH mine AS ({_MINE}) SELECT relname, pg_get_partkeydef(oid) AS key FROM mine ORDER BY 1"
)
_DOMAINS = """
  SELECT typname, format_type(typbasetype, typtypmod) AS base FROM pg_type
   WHERE typtype = 'd' AND typnamespace = 'public'::regnamespace ORDER BY 1"""


@pytest.fixture
def made_from_tables(empty_database_url: str) -> Any:
    """A database made by ``tables.metadata`` alone, on a server that has nothing of ours."""
    engine = make_engine(empty_database_url)
    tables.metadata.create_all(engine)
    yield engine
    engine.dispose()


def _differences(connection: Connection) -> list[Any]:
    partitions = {
        row["name"]
        for row in rows(connection, "SELECT relname AS name FROM pg_class WHERE relispartition")
    }

    def included(_: Any, name: str | None, kind: str, *__: Any) -> bool:
        return not (kind == "table" and (name in partitions or name == "alembic_version"))

    options = {"include_object": included, "compare_type": True}
    found = compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
    # comments are the migration's alone
    return [f for f in found if not _is_comment(f)]


def _is_comment(difference: Any) -> bool:
    first = difference[0] if isinstance(difference, list) else difference
    return str(first[0]).endswith("comment")


def test_alembic_finds_no_difference(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty database upgraded by the migration and the tables: Alembic would change nothing."""
    monkeypatch.setitem(dialect.ischema_names, "xid8", tables.Xid8)
    with engine.connect() as connection, warnings.catch_warnings():
        warnings.simplefilter("error")
        # PostgreSQL spells the expression its own way; test_…_the_same_everywhere compares it
        warnings.filterwarnings("ignore", "Computed default on")
        assert _differences(connection) == []


def test_alembic_would_find_a_difference(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is not blind: columns and indexes that are taken away are told."""
    monkeypatch.setitem(dialect.ischema_names, "xid8", tables.Xid8)
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE storage DROP COLUMN trash_grace")
        connection.exec_driver_sql("DROP INDEX replica_expiring")
        with warnings.catch_warnings(action="ignore"):
            found = sorted(difference[0] for difference in _differences(connection))
    assert found == ["add_column", "add_index"]


@pytest.mark.parametrize(
    "question", [_COLUMNS, _CONSTRAINTS, _INDEXES, _PARTITIONING, _DOMAINS],
    ids=["columns", "constraints", "indexes", "partitioning", "domains"],
)  # fmt: skip
def test_migration_and_tables_make_the_same_everywhere(
    engine: Engine, made_from_tables: Engine, question: str
) -> None:
    """Columns with types and defaults, keys, and indexes with their predicates, as the server
    itself tells them, are equal in a migrated database and in one made from the tables."""
    with engine.connect() as migrated, made_from_tables.connect() as made:
        assert rows(made, question) == rows(migrated, question)


def test_upgrading_twice_changes_nothing(engine: Engine, database_url: str) -> None:
    """A second upgrade finds the schema as it should be."""
    schema.upgrade(database_url)
    with engine.connect() as connection:
        assert schema.check(connection) == schema.expected_revision()


def test_a_migration_is_known_by_its_number() -> None:
    """The numbers of the files, which tell the revision without Alembic, are Alembic's chain."""
    scripts = ScriptDirectory.from_config(schema._config())
    walked = [script.revision for script in scripts.walk_revisions()][::-1]
    assert schema.known_revisions() == walked
    assert schema.expected_revision() == scripts.get_current_head()


def test_an_empty_database_is_told(empty_database_url: str) -> None:
    """No table of revisions is no error of the database."""
    engine = make_engine(empty_database_url)
    with engine.connect() as connection, pytest.raises(SchemaMismatchError, match="is at empty"):
        schema.check(connection)
    engine.dispose()


def test_the_documentation_lists_every_table_and_column(engine: Engine) -> None:
    """docs/schema.md is what the catalogue says of itself, and every column has a meaning."""
    with engine.connect() as connection:
        assert DOCUMENT.read_text(encoding="utf-8") == render(connection), (
            "run: python -m tests.schema.document"
        )


def test_phases_weigh_the_same_everywhere(engine):
    """PLASMA 0, GAS 1, LIQUID 2, SOLID 4: in the database and in the planner."""
    weights = {"PLASMA": 0, "GAS": 1, "LIQUID": 2, "SOLID": 4}
    with engine.connect() as connection:
        found = rows(
            connection,
            "SELECT p, phase_weight(p) AS w FROM unnest(CAST(:phases AS text[])) p",
            phases=[*weights],
        )
    assert {row["p"]: row["w"] for row in found} == weights
    assert {phase.value: phase.weight for phase in Phase} == weights
    reached = [Phase.from_weight(n).value for n in range(6)]
    assert reached == ["PLASMA", "GAS", "LIQUID", "LIQUID", "SOLID", "SOLID"]
