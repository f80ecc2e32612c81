"""Bring the catalogue's schema up to date, and tell whether it is."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from dlm_core.catalogue.engine import begin, make_engine
from dlm_core.errors import SchemaMismatchError

_PACKAGED = Path(__file__).resolve().parent.parent / "schema"
_CHECKOUT = Path(__file__).resolve().parents[2] / "schema"
#: advisory lock: two processes that upgrade at once take turns
_LOCK = 0x646C6D


def schema_folder() -> Path:
    """Where the migrations lie: in the package when installed, else in the checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(schema_folder()))
    config.attributes["connection"] = connection
    return config


def expected_revision() -> str:
    """The revision that this software needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def known_revisions() -> list[str]:
    """The revisions that this software can upgrade from, oldest first."""
    walked = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in walked][::-1]


def upgrade(url: str) -> None:
    """Upgrade the database at ``url`` to the newest schema, all or nothing.

    Raises
    ------
    CatalogueUnavailableError, CatalogueError
    """
    engine = make_engine(url, pool_size=1)
    try:
        with begin(engine, "dlm:upgrade") as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            command.upgrade(_config(connection), "head")
            connection.execute(text("SELECT dlm_ensure_partitions(now(), 3)"))
    finally:
        engine.dispose()


def check(connection: Connection) -> str:
    """The revision of the catalogue.

    Raises
    ------
    SchemaMismatchError
        if it is not the one this software needs.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found != expected_revision():
        raise SchemaMismatchError(found=found or "empty", expected=expected_revision())
    return found
