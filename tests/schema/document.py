"""Write docs/schema.md from what a migrated catalogue says of itself."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sqlalchemy import Connection

from dlm_core.catalogue import embedded, schema
from dlm_core.catalogue.engine import make_engine, rows

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "schema.md"

_HEAD = """\
# The catalogue's tables

Written from the catalogue's own comments by `python -m tests.schema.document`; a test compares it
with the schema. CHECKs, triggers and functions: `schema/sql/`. Words: [glossary](glossary.md).
A `moment` is a `timestamptz` between the years 2000 and 2200.
"""

_TABLES = """
  SELECT c.relname AS name, obj_description(c.oid, 'pg_class') AS meaning FROM pg_class c
   WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
     AND NOT c.relispartition AND c.relname <> 'alembic_version' ORDER BY c.oid"""
_COLUMNS = """
  SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS needed,
         col_description(a.attrelid, a.attnum) AS meaning
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
   WHERE c.relname = :name AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0
     AND NOT a.attisdropped ORDER BY a.attnum"""


def render(connection: Connection) -> str:
    """The document; a table or column without a comment is an error."""
    parts = [_HEAD]
    for table in rows(connection, _TABLES):
        assert table["meaning"], f"table {table['name']} has no comment"
        parts.append(f"\n## {table['name']}\n{table['meaning']}\n")
        parts.append("| column | type | | meaning |\n|---|---|---|---|")
        for column in rows(connection, _COLUMNS, name=table["name"]):
            assert column["meaning"], f"{table['name']}.{column['name']} has no comment"
            needed = "required" if column["needed"] else ""
            meaning = column["meaning"].replace("|", "\\|").replace("<", "&lt;")
            parts.append(f"| `{column['name']}` | {column['type']} | {needed} | {meaning} |")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the document, with a server of its own that is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="dlm-schema-"))
    try:
        url = embedded.ensure_running(home, durable=False)
        schema.upgrade(url)
        engine = make_engine(url)
        with engine.connect() as connection:
            DOCUMENT.write_text(render(connection), encoding="utf-8")
        engine.dispose()
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
