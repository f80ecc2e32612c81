"""Storages that describe themselves, and a catalogue made again from what they say."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_cli.s3_server import S3Server
from dlm_core.catalogue import describe, recovery
from dlm_core.catalogue.engine import make_engine
from dlm_core.catalogue.holds import Target, insert_hold
from dlm_core.catalogue.items import Terms
from dlm_core.errors import (
    ExportRunningError,
    InvalidValueError,
    PayloadExistsError,
    RestoreRefusedError,
)
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.description import newest_index
from dlm_core.lifecycle.export import export_due, export_storage
from dlm_core.lifecycle.rebuild import Place, RebuildReport, rebuild
from dlm_core.lifecycle.register import Source, collection_id, register_tree, set_metadata
from dlm_core.lifecycle.work import drain
from dlm_core.storages.port import Storage
from dlm_core.types import OperationKind
from tests.backends import s3_config
from tests.fakes import Hooked
from tests.site import Site, make_site, reopen

ITEMS = """
SELECT i.oid, i.uri, i.version, i.state, i.kind, i.size, i.digest, i.content_type, i.target_phase,
       i.phase_weight, c.name AS collection, p.name AS above, i.owner, i.metadata, i.tags,
       i.created_at, i.expires_at, i.expiry_reason
  FROM data_item i LEFT JOIN collection c USING (collection_id)
  LEFT JOIN collection p ON p.collection_id = c.parent_id ORDER BY i.uri, i.version"""
REPLICAS = """
SELECT r.uid, r.oid, s.name, r.path, r.state, r.size, r.digest, r.mtime, r.expires_at
  FROM replica r JOIN storage s USING (storage_id) WHERE r.state <> 'DELETED' ORDER BY r.uid"""
FILES = "SELECT * FROM manifest_file ORDER BY oid, path"
STORAGES = """
SELECT s.storage_id, s.name, l.name AS location, l.country, s.interface, s.root, s.config, s.phase,
       s.mode, s.high_watermark, s.trash_grace FROM storage s JOIN location l USING (location_id)
 ORDER BY s.name"""
HOLDS = "SELECT * FROM hold ORDER BY hold_id"
ALL = (ITEMS, REPLICAS, FILES, STORAGES, HOLDS)


@pytest.fixture(params=["posix", "s3"])
def site(request: pytest.FixtureRequest, engine: Engine, tmp_path: Path) -> Site:
    """A folder and a folder or bucket at two locations; files, one of an odd name, and a directory
    payload, in nested collections, on both."""
    site = make_site(engine, tmp_path)
    site.add_storage("a", "here")
    if request.param == "posix":
        site.add_storage("b", "there")
    else:
        server: S3Server = request.getfixturevalue("s3")
        root = f"{server.bucket}/{uuid.uuid4().hex}"
        config = json.dumps(s3_config(server))
        site.add_storage("b", "there", interface="s3", root=root, config=config)
    fill(site)
    return site


def fill(site: Site) -> None:
    """Register a tree with all that an item may have."""
    tree = site.folder / "a"
    (tree / "scan.ms" / "sub").mkdir(parents=True)
    (tree / "scan.ms" / "table").write_bytes(b"table")
    (tree / "scan.ms" / "sub" / "data").write_bytes(b"data" * 100)
    for number in range(40):
        (tree / f"file {number}").write_bytes(b"%d" % number)
    inner = collection_id(site.context, "block")
    outer = collection_id(site.context, "set")
    site.execute("UPDATE collection SET parent_id = :p WHERE collection_id = :c", p=outer, c=inner)
    terms = Terms("SOLID", inner, "owner", {"k": "v"})
    register_tree(site.context, Source("a", "test", as_directory=["*.ms"], terms=terms))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    site.settle()


def item_of(site: Site, uri: str) -> Any:
    return site.query("SELECT oid FROM data_item WHERE uri = :uri", uri=uri)[0]["oid"]


def places(site: Site) -> list[Place]:
    """Where the storages are, as an operator would say it."""
    rows = site.query("SELECT interface, root, config FROM storage ORDER BY name")
    return [Place(row["interface"], row["root"], row["config"]) for row in rows]


def lost(site: Site, url: str) -> Site:
    """The same folders and buckets with another catalogue, an empty one."""
    other = make_site(make_engine(url), site.folder)
    other.now, other.storages = site.now, site.storages
    return other


@pytest.fixture
def back(postgres_home: Path, template_database: str) -> Any:
    """An empty catalogue."""
    from tests.conftest import _database

    with _database(postgres_home, template_database) as url:
        yield url


def rebuilt(site: Site, url: str) -> tuple[Site, RebuildReport]:
    where = places(site)
    again = lost(site, url)
    return again, rebuild(again.context, where)


def opened(site: Site, name: str) -> Storage:
    row = site.context.transact(site.context.storages.load)[site.storages[name]]
    return site.context.storages.open(row)


def export_all(site: Site) -> None:
    for name in ("a", "b"):
        export_storage(site.context, name)


def test_a_rebuilt_catalogue_is_what_was_lost(site: Site, back: str) -> None:
    """Items, replicas, digests, metadata, collections, storages and holds are what they were once
    the jobs have read every byte; before, no replica is READY."""
    set_metadata(site.context, item_of(site, "test:file%203"), {"band": [5, "ü"]})
    site.context.transact(
        lambda c: insert_hold(
            c, Target(uri="test:file%204"), reason="why", actor="user:x", now=site.now
        )
    )
    before = [site.query(query) for query in ALL]
    export_all(site)
    again, report = rebuilt(site, back)
    assert (report.items, report.replicas, report.problems) == (41, 82, [])
    assert (report.collections, report.holds, report.storages) == (2, 1, ["a", "b"])
    assert {row["state"] for row in again.query(REPLICAS)} == {"SUSPECT"}
    again.settle()
    again.advance(minutes=1)
    again.settle()
    assert [again.query(query) for query in ALL] == before
    assert again.query("SELECT count(*) AS n FROM operation WHERE kind = 'copy'") == [{"n": 0}]


def test_damage_is_not_counted(site: Site, back: str) -> None:
    """A copy damaged and one removed before the rebuild are found out by reading; the removed one
    is made again at once, the damaged one once a person has confirmed the rebuild."""
    export_all(site)
    (site.folder / "a" / "file 3").write_bytes(b"x")
    (site.folder / "a" / "file 4").unlink()
    again, _ = rebuilt(site, back)
    again.settle()
    three, four = item_of(again, "test:file%203"), item_of(again, "test:file%204")
    assert again.replicas(three) == {"a": "SUSPECT", "b": "READY"}
    assert again.item(three)["phase_weight"] == 2
    assert again.replicas(four) == {"a": "READY", "b": "READY"}
    assert (again.folder / "a" / "file 4").read_bytes() == b"4"
    again.context.transact(lambda c: recovery.confirm(c, "user:a", again.now))
    from dlm_core.lifecycle.verify import request_verification

    again.context.transact(
        lambda c: request_verification(c, actor="user:a", now=again.now, oid=three)
    )
    again.settle()
    again.advance(hours=1)
    again.settle()
    assert again.replicas(three) == {"a": "READY", "b": "READY"}
    assert (again.folder / "a" / "file 3").read_bytes() == b"3"
    assert len(again.private("a", "quarantine")) == 1


@pytest.fixture
def disks(engine: Engine, tmp_path: Path) -> Site:
    """Two folders at two locations with five files each of them has."""
    site = make_site(engine, tmp_path)
    for name, location in (("a", "here"), ("b", "there")):
        site.add_storage(name, location)
    for number in range(5):
        site.add_item(f"f{number}", b"%d" % number, on="a")
    site.settle()
    return site


def plain_copies(site: Site) -> int:
    return site.query("SELECT count(*) AS n FROM operation WHERE kind = 'copy'")[0]["n"]


def test_no_copies_are_made_while_looks_wait(disks: Site, back: str) -> None:
    """However long the looks of a rebuild take, nothing is copied to yet another storage before a
    look was tried; one that could not be taken is not waited for."""
    export_all(disks)
    again, _ = rebuilt(disks, back)
    again.add_storage("c", "elsewhere")
    again.execute(
        """UPDATE operation o SET due_at = :later FROM replica r JOIN storage s USING (storage_id)
            WHERE o.uid = r.uid AND s.name = 'b'""",
        later=again.now + timedelta(days=3),
    )
    for _ in range(4):
        again.settle()
        again.advance(hours=7)
    assert plain_copies(again) == 0
    again.execute("UPDATE operation SET attempts = 1 WHERE state = 'QUEUED'")
    again.settle()
    assert plain_copies(again) == 5
