"""Bring the catalogue's schema up to date, and tell whether it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

from dlm_core.catalogue.engine import begin, make_engine
from dlm_core.errors import SchemaMismatchError

if TYPE_CHECKING:
    from alembic.config import Config

_PACKAGED = Path(__file__).resolve().parent.parent / "schema"
_CHECKOUT = Path(__file__).resolve().parents[2] / "schema"
#: advisory lock: two processes that upgrade at once take turns
_LOCK = 0x646C6D


def schema_folder() -> Path:
    """Where the migrations lie: in the package when installed, else in the checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def _config(connection: Connection | None = None) -> Config:
    # to be imported it takes as long as all else that a command does, and few commands migrate
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(schema_folder()))
    config.attributes["connection"] = connection
    return config


def expected_revision() -> str:
    """The revision that this software needs."""
    return known_revisions()[-1]


def known_revisions() -> list[str]:
    """The revisions that this software can upgrade from, oldest first."""
    # a migration's number is its revision, and each follows the one before it
    return sorted(path.name[:4] for path in (schema_folder() / "versions").glob("[0-9]*.py"))


def upgrade(url: str) -> None:
    """Upgrade the database at ``url`` to the newest schema, all or nothing.

    Raises
    ------
    CatalogueUnavailableError, CatalogueError
    SchemaMismatchError
        if newer software has upgraded it: there is no way back.
    """
    from alembic import command

    engine = make_engine(url, pool_size=1)
    try:
        with begin(engine, "dlm:upgrade") as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            found = _found(connection)
            if found is not None and found not in known_revisions():
                raise _mismatch(found)
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
    found = _found(connection)
    if found != expected_revision():
        raise _mismatch(found)
    return str(found)


def _found(connection: Connection) -> str | None:
    known = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar_one()
    query = text("SELECT version_num FROM alembic_version")
    return connection.execute(query).scalar() if known is not None else None


def _mismatch(found: str | None) -> SchemaMismatchError:
    older = found is None or found in known_revisions()
    return SchemaMismatchError(
        found=found or "empty",
        expected=expected_revision(),
        hint="run 'dlm db upgrade'" if older else "newer software has upgraded it: use that",
    )
