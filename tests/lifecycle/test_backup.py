"""Backups of the catalogue, and what a restored one may and may not do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue import backup, schema
from dlm_core.catalogue.engine import make_engine
from dlm_core.errors import (
    CatalogueError,
    InvalidValueError,
)
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Engine, tmp_path: Path) -> Site:
    """Two storages at two locations, one item on both."""
    site = make_site(engine, tmp_path)
    site.add_storage("a", "here")
    site.add_storage("b", "there")
    site.add_item("one", b"first", on="a", metadata='{"band": 5}')
    site.settle()
    return site


@pytest.fixture
def back(empty_database_url: str) -> Iterator[str]:
    """Where to restore to."""
    yield empty_database_url


def reopened(site: Site, url: str) -> Site:
    """The same site on another catalogue."""
    other = make_site(make_engine(url), site.folder)
    other.now, other.storages = site.now, site.storages
    return other


def restored(site: Site, made: backup.Backup, url: str, **options: Any) -> Site:
    """A site on the catalogue that a backup gives back at the site's present."""
    found = backup.read_backup(made.path)
    backup.restore(url, found, actor="user:test", now=site.now, **options)
    return reopened(site, url)


def test_a_backup_is_whole_private_and_told(site: Site, database_url: str, tmp_path: Path) -> None:
    """A folder gets a file named after the time, readable by its owner alone, with a manifest that
    has schema, digest and counts; nothing temporary stays."""
    folder = tmp_path / "backups"
    folder.mkdir()
    made = backup.back_up(database_url, folder, now=site.now)
    assert sorted(f.name for f in folder.iterdir()) == [
        "dlm-20260601T000000Z.dump", "dlm-20260601T000000Z.dump.json",
    ]  # fmt: skip
    told = json.loads((folder / "dlm-20260601T000000Z.dump.json").read_text())
    assert told["schema"] == schema.expected_revision()
    assert (told["items"], told["replicas"]) == (1, 2)
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert backup.read_backup(made.path).manifest == told
    with pytest.raises(InvalidValueError, match="nothing is overwritten"):
        backup.back_up(database_url, made.path, now=site.now)


def test_a_restored_catalogue_is_the_same(site: Site, database_url: str, back: str) -> None:
    """All tables hold what they held, the recovery apart, and the schema keeps its rules."""
    made = backup.back_up(database_url, site.folder / "x.dump", now=site.now)
    again = restored(site, made, back)
    for table in ("data_item", "replica", "event", "operation", "storage", "tally"):
        query = f"SELECT t::text AS row FROM {table} t ORDER BY 1"
        assert again.query(query) == site.query(query)
    with pytest.raises(CatalogueError, match="never changed"):
        again.execute("DELETE FROM replica")
    assert again.context.transact(schema.check) == schema.expected_revision()
