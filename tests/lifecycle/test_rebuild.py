"""Storages that describe themselves, and a catalogue made again from what they say."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from dlm_cli.s3_server import S3Server
from dlm_core.catalogue import rebuild as rebuilding
from dlm_core.catalogue import recovery, schema
from dlm_core.catalogue.engine import make_engine
from dlm_core.catalogue.holds import Target, insert_hold
from dlm_core.catalogue.items import Terms
from dlm_core.errors import InvalidValueError, RestoreRefusedError, StorageUnavailableError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.description import newest_index
from dlm_core.lifecycle.export import export_storage
from dlm_core.lifecycle.ingest import set_metadata
from dlm_core.lifecycle.rebuild import Place, RebuildReport, rebuild
from dlm_core.lifecycle.register import Source, collection_id, register_tree
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind, new_id
from tests.backends import s3_config
from tests.site import Site, make_site

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
def back(other_database_url: str) -> str:
    """An empty catalogue."""
    return other_database_url


def rebuilt(site: Site, url: str) -> tuple[Site, RebuildReport]:
    where = places(site)
    again = lost(site, url)
    return again, rebuild(again.context, where)


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


def expire_item(site: Site, oid: Any) -> None:
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = 'x' WHERE oid = :oid",
        now=site.now,
        oid=oid,
    )


def test_nothing_goes_on_the_word_of_a_description(disks: Site, back: str) -> None:
    """After a rebuild copies go only beside others that were read since, and no item expires before
    a person has confirmed it; then both do."""
    disks.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    export_all(disks)
    again, _ = rebuilt(disks, back)
    one, two = item_of(again, "test:f1"), item_of(again, "test:f2")
    again.execute("UPDATE operation SET due_at = :later", later=again.now + timedelta(hours=5))
    again.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'x' WHERE uid = :uid",
        now=again.now,
        uid=again.replica(one, "a")["uid"],
    )
    expire_item(again, two)
    for _ in range(6):
        again.settle()
        assert b"1" in again.visible("a").values()
        again.advance(minutes=40)
    for _ in range(4):
        again.advance(hours=2)
        again.settle()
    assert again.replicas(one) == {"a": "DELETED", "b": "READY"}
    assert again.replicas(two) == {"a": "READY", "b": "READY"}
    again.context.transact(lambda c: recovery.confirm(c, "user:a", again.now))
    for _ in range(4):
        again.advance(hours=2)
        again.settle()
    assert again.replicas(two) == {"a": "DELETED", "b": "DELETED"}


def test_what_is_held_is_held_again(disks: Site, back: str) -> None:
    """Holds and retention locks come back; a lock still cannot be shortened, and one on an item
    that is not known any more is told."""
    ends = disks.now + timedelta(days=20000)

    def hold(target: Target, **options: Any) -> None:
        disks.context.transact(
            lambda c: insert_hold(c, target, reason="why", actor="user:x", now=disks.now, **options)
        )

    hold(Target(selector="test:f*"), ends_at=ends, locked=True)
    hold(Target(everything=True))
    hold(Target(uri="test:f1"))
    before = disks.query(HOLDS)
    export_all(disks)
    for name in ("a", "b"):
        drop_lines(disks, name, "test:f1")
    again, report = rebuilt(disks, back)
    assert report.holds == 2 and report.items == 4
    assert any("what it holds is not known here" in one for one in report.problems)
    assert again.query(HOLDS) == [row for row in before if row["oid"] is None]
    with pytest.raises(Exception, match="retention lock"):
        again.execute("UPDATE hold SET ends_at = now() WHERE locked")


def index_of(site: Site, name: str) -> Any:
    index, _ = newest_index(open_storage(name, "posix", str(site.folder / name), {}))
    assert index is not None
    return index


def drop_lines(site: Site, name: str, uri: str) -> None:
    """Damage the file that tells of ``uri`` and, so that nothing else goes, have it alone there."""
    prefix = site.query("SELECT left(uri_bucket, 1) AS p FROM data_item WHERE uri = :u", u=uri)
    file = index_of(site, name).files[prefix[0]["p"]]
    assert file.lines == 1
    path = site.folder / name / file.path(prefix[0]["p"])
    path.write_bytes(path.read_bytes()[:-5])


def test_a_damaged_file_is_told_and_left_out(disks: Site, back: str) -> None:
    """What one damaged file told comes from the other storage's description; on the damaged one it
    is registered again."""
    export_all(disks)
    drop_lines(disks, "a", "test:f1")
    again, report = rebuilt(disks, back)
    assert (report.items, report.replicas) == (5, 9)
    assert len(report.problems) == 1
    assert "what it tells was left out (1 lines)" in report.problems[0]
    found = register_tree(again.context, Source("a", "test"))
    assert (found.replicated, found.created, found.unchanged) == (1, 0, 4)
    drain(again.context, {OperationKind.ADMIT: execute_admit})
    again.settle()
    assert set(again.replicas(item_of(again, "test:f1")).values()) == {"READY"}
    assert again.query("SELECT count(*) AS n FROM replica WHERE state <> 'READY'") == [{"n": 0}]


def test_the_newest_description_is_believed(disks: Site, back: str) -> None:
    """Where an older description tells an item differently the newer one's word is taken, whatever
    the order they are named in, and how many were is told."""
    export_all(disks)
    set_metadata(disks.context, item_of(disks, "test:f1"), {"new": True})
    disks.advance(hours=1)
    export_storage(disks.context, "b")
    again, report = rebuilt(disks, back)
    assert again.item(item_of(again, "test:f1"))["metadata"] == {"new": True}
    assert report.differing == 1 and report.storages == ["b", "a"]


def test_other_bytes_under_one_uri_are_refused(
    disks: Site, empty_database_url: str, back: str, tmp_path: Path
) -> None:
    """Two catalogues gave one uri to different bytes: the newest keeps it, the other's copy is not
    taken over, and that is told; equal bytes under another key are one item."""
    schema.upgrade(empty_database_url)
    other = make_site(make_engine(empty_database_url), tmp_path / "other")
    other.folder.mkdir()
    other.now = disks.now - timedelta(days=1)
    other.add_storage("c", "elsewhere")
    other.add_item("f1", b"other bytes", on="c")
    other.add_item("f2", b"2", on="c")
    export_storage(other.context, "c")
    export_all(disks)
    again = lost(disks, back)
    report = rebuild(again.context, places(other) + places(disks))
    other.context.engine.dispose()
    assert report.left_out == {"in conflict": 1}
    assert "test:f1" in report.problems[0] and "has other bytes" in report.problems[0]
    again.settle()
    assert again.replicas(item_of(again, "test:f2")) == {"a": "READY", "b": "READY", "c": "READY"}
    assert again.replicas(item_of(again, "test:f1")) == {"a": "READY", "b": "READY"}


def test_trash_and_what_was_never_read_are_left_out(disks: Site, back: str) -> None:
    """Neither is made again, and both are told; the trash's bytes stay where they are."""
    expire_item(disks, item_of(disks, "test:f3"))
    disks.settle()
    (disks.folder / "a" / "announced").write_bytes(b"x")
    register_tree(disks.context, Source("a", "test"), "announced")
    export_all(disks)
    again, report = rebuilt(disks, back)
    assert dict(report.left_out) == {
        "in the trash: its bytes stay below .dlm/trash": 2,
        "announced but never read: register it again": 1,
    }
    assert report.items == 4 and len(again.private("a", "trash")) == 1


def test_an_item_whose_copies_are_all_gone_is_a_loss_that_is_seen(disks: Site, back: str) -> None:
    """What a description names and no storage has is CORRUPTED, with its copies MISSING."""
    export_all(disks)
    (disks.folder / "a" / "f1").unlink()
    (disks.folder / "b" / "test" / "f1").unlink()
    again, _ = rebuilt(disks, back)
    again.settle()
    one = item_of(again, "test:f1")
    assert again.replicas(one) == {"a": "MISSING", "b": "MISSING"}
    assert again.item(one)["state"] == "CORRUPTED"


def test_what_cannot_be_rebuilt_from_is_refused(disks: Site, back: str) -> None:
    """A catalogue that is not empty, a place without a description, one named twice, and one that
    is not there: nothing is changed."""
    export_storage(disks.context, "a")
    again = lost(disks, back)
    here, there = places(disks)
    with pytest.raises(RestoreRefusedError, match="is not empty"):
        rebuild(disks.context, [here])
    with pytest.raises(InvalidValueError, match="dlm storage export"):
        rebuild(again.context, [here, there])
    with pytest.raises(InvalidValueError, match="both say that they are a"):
        rebuild(again.context, [here, Place("posix", f"{here.root}/.")])
    with pytest.raises(StorageUnavailableError):
        rebuild(again.context, [Place("posix", f"{here.root}-not-there")])
    assert again.query("SELECT count(*) AS n FROM storage") == [{"n": 0}]


def test_a_storage_that_moved_is_found_at_its_new_place(disks: Site, back: str) -> None:
    """The place that is named counts, not the one that was described; the catalogue that comes out
    can be exported and lost again."""
    export_all(disks)
    where = places(disks)
    (disks.folder / "a").rename(disks.folder / "moved")
    again = lost(disks, back)
    rebuild(again.context, [Place("posix", str(disks.folder / "moved")), where[1]])
    again.settle()
    assert again.query("SELECT count(*) AS n FROM replica WHERE state = 'READY'") == [{"n": 10}]
    assert export_storage(again.context, "a").generation == 2


def test_collections_are_known_by_their_items_too(disks: Site, back: str) -> None:
    """Where the file of collections and holds is damaged, collections come back by name, and what
    was lost is told."""
    eb = collection_id(disks.context, "eb-1")
    disks.execute("UPDATE data_item SET collection_id = :c WHERE uri < 'test:f3'", c=eb)
    export_storage(disks.context, "a")
    index = index_of(disks, "a")
    (disks.folder / "a" / index.files["site"].path("site")).write_bytes(b"x")
    again = lost(disks, back)
    report = rebuild(again.context, places(disks)[:1])
    assert len(report.problems) == 1 and "was left out" in report.problems[0]
    found = again.query(
        "SELECT c.name, count(*) AS n FROM data_item JOIN collection c USING (collection_id) "
        "GROUP BY c.name"
    )
    assert found == [{"name": "eb-1", "n": 3}]


def test_an_item_whose_only_copy_has_anothers_place_stops_no_rebuild(disks: Site) -> None:
    """A description is no snapshot: of two items at one place the second is told of and left out,
    INITIALISED, and all else is made."""
    place, now = disks.storages["a"], disks.now

    def line(uri: str) -> str:
        told = {
            "uid": str(new_id()), "oid": str(new_id()), "uri": uri, "version": 1,
            "uri_bucket": "00000", "path": "p", "kind": "file", "size": 3,
            "digest": "sha256:" + hashlib.sha256(uri.encode()).hexdigest(), "target_phase": "GAS",
            "metadata": {}, "tags": {}, "created_at": str(now), "replica_created_at": str(now),
            "accessed_at": str(now),
        }  # fmt: skip
        return json.dumps(told)

    def merge(connection: Connection) -> list[Any]:
        return [
            rebuilding.merge_lines(connection, place, [line(uri)], "user:test", now).refused
            for uri in ("test:new", "test:old")
        ]

    assert disks.context.transact(merge) == [
        [], [("test:old", "p", "another copy has its place")],
    ]  # fmt: skip
    told = "SELECT uri, state FROM data_item WHERE uri IN ('test:new', 'test:old') ORDER BY uri"
    found = disks.query(told)
    assert [tuple(row.values()) for row in found] == [
        ("test:new", "READY"), ("test:old", "INITIALISED"),
    ]  # fmt: skip
