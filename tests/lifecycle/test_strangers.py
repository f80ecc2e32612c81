"""Files of others where a replica was: the DLM moves and removes only what is its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dlm_core.catalogue import replicas
from dlm_core.catalogue.operations import retry_failed
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import plan_batch
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from tests.site import Site, make_site

STRANGER = b"somebody else's"


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    for name in "ab":
        site.add_storage(name, name.upper())
    return site


def two_copies(site: Site) -> Any:
    oid = site.add_item("x", b"good bytes", "a")
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    return oid


def let_go(site: Site, oid: Any, where: str = "") -> None:
    """The item's time is over, or that of its copy on a storage."""
    if not where:
        site.execute("UPDATE data_item SET expires_at = :n WHERE oid = :o", n=site.now, o=oid)
        return
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)
    site.execute(
        "UPDATE replica SET expires_at = :n WHERE oid = :o AND storage_id = :s",
        n=site.now, o=oid, s=site.storages[where],
    )  # fmt: skip


def to_the_end(site: Site) -> None:
    for _ in range(3):
        site.settle()
        site.advance(hours=2)


def put_a_stranger(site: Site) -> None:
    (site.folder / "a" / "x").write_bytes(STRANGER)


def test_a_restore_that_finds_a_stranger_leaves_it_alone(site):
    """The trash is empty against expectation and somebody's file lies in the place: the replica is
    MISSING, and the file is neither set aside nor trashed when the item goes."""
    oid = two_copies(site)
    let_go(site, oid)
    site.settle()
    (site.folder / "a" / ".dlm" / "trash" / str(site.replica(oid, "a")["uid"])).unlink()
    put_a_stranger(site)
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["a"], actor="user:test", now=site.now
        )
    )
    site.work(OperationKind.RESTORE)
    assert site.replicas(oid)["a"] == "MISSING"
    to_the_end(site)
    assert site.visible("a") == {"x": STRANGER}
    assert site.replicas(oid) == {"a": "DELETED", "b": "DELETED"}


def test_a_place_whose_copy_cannot_leave_the_trash_is_not_waited_for(site):
    """Its restore has FAILED, and the path is still its own: the item gets its copy elsewhere, and
    as long as there is nowhere else it is told why."""
    oid = two_copies(site)
    let_go(site, oid)
    site.settle()
    place = site.folder / "b" / site.replica(oid, "b")["path"]
    place.write_bytes(STRANGER)
    site.context.transact(
        lambda c: request_restore(c, oid=oid, storage_id=None, actor="user:test", now=site.now)
    )
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "TRASHED"}
    assert "b: its place test/x is that of its copy in the trash" in site.item(oid)["shortfall"]
    site.add_storage("c", "B")
    site.advance(hours=1)
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "TRASHED", "c": "READY"}
    assert site.item(oid)["shortfall"] is None
    assert place.read_bytes() == STRANGER


def test_a_restore_that_is_asked_for_again_takes_the_failed_ones_place(site):
    """Nothing of it is left to be retried once the copy is back."""
    oid = two_copies(site)
    let_go(site, oid)
    site.settle()
    place = site.folder / "b" / site.replica(oid, "b")["path"]
    place.write_bytes(STRANGER)
    failed = "SELECT kind, uid FROM operation WHERE state = 'FAILED'"
    ask = {"oid": oid, "storage_id": None, "actor": "user:test"}
    site.context.transact(lambda c: request_restore(c, **ask, now=site.now))
    site.settle()
    assert [row["kind"] for row in site.query(failed)] == ["restore"]
    place.unlink()
    site.context.transact(lambda c: request_restore(c, **ask, now=site.now))
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    assert site.query(failed) == []


@pytest.mark.parametrize("state", ["MISSING", "CORRUPTED"])
def test_a_lost_copy_that_goes_takes_no_strangers_file_with_it(site, state):
    """What is MISSING, or lies in quarantine, has nothing in its place: a file there is not its."""
    oid = two_copies(site)
    let_go(site, oid, "a")
    uid = site.replica(oid, "a")["uid"]
    put_a_stranger(site)
    for step in ("SUSPECT", state):
        site.context.transact(
            lambda c, step=step: replicas.mark_state(c, [uid], step, only_from=["READY", "SUSPECT"])
        )
    to_the_end(site)
    assert site.visible("a") == {"x": STRANGER}
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"}


def test_a_trashing_that_is_done_again_leaves_a_stranger_alone(site):
    """A crash came after the move; somebody's file in the place since is not trashed instead."""
    oid = two_copies(site)
    let_go(site, oid)
    site.context.transact(lambda c: plan_batch(c, site.context, 10))
    uid = str(site.replica(oid, "a")["uid"])
    (site.folder / "a" / ".dlm" / "trash").mkdir(parents=True, exist_ok=True)
    (site.folder / "a" / "x").rename(site.folder / "a" / ".dlm" / "trash" / uid)
    put_a_stranger(site)
    site.work(OperationKind.TRASH)
    assert site.visible("a") == {"x": STRANGER} and site.private("a", "trash") == [uid]
    assert (site.folder / "a" / ".dlm" / "trash" / uid).read_bytes() == b"good bytes"
    to_the_end(site)
    assert site.visible("a") == {"x": STRANGER} and site.private("a", "trash") == []


def test_a_lost_copy_that_is_back_in_its_place_goes_with_it(site):
    """The bytes tell: what is MISSING but lies there whole is trashed as its own."""
    oid = two_copies(site)
    let_go(site, oid, "a")
    uid = site.replica(oid, "a")["uid"]
    site.context.transact(lambda c: replicas.mark_state(c, [uid], "MISSING", only_from=["READY"]))
    to_the_end(site)
    assert site.visible("a") == {} and site.private("a", "trash") == []


def test_a_look_for_a_lost_copy_does_not_set_a_stranger_aside(site):
    """Other bytes where a MISSING copy was are somebody's file until they match."""
    oid = two_copies(site)
    (site.folder / "a" / "x").unlink()
    site.set_storage("a", mode="read_only")  # it is not made again yet
    for _ in range(2):
        site.context.transact(
            lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
        )
        site.work(OperationKind.VERIFY)
        assert site.replicas(oid)["a"] == "MISSING"
        site.set_storage("a", mode="draining")
        put_a_stranger(site)
    assert site.visible("a") == {"x": STRANGER} and site.private("a", "quarantine") == []
    (site.folder / "a" / "x").write_bytes(b"good bytes")
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid)["a"] == "READY"


def test_an_item_expires_with_a_copy_that_was_refused(site):
    """What was announced beside it has other bytes, so it was never let in: its record ends, and
    the file stays, for it is somebody else's."""
    oid = two_copies(site)
    site.add_storage("c", "C")
    (site.folder / "c" / "x").write_bytes(STRANGER)
    register_tree(site.context, Source("c", "test"), "x")
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert site.replicas(oid)["c"] == "PENDING"
    let_go(site, oid)
    to_the_end(site)
    assert set(site.replicas(oid).values()) == {"DELETED"} and site.item(oid)["state"] == "DELETED"
    assert site.visible("c") == {"x": STRANGER}
    assert site.query("SELECT FROM operation WHERE state IN ('QUEUED', 'RUNNING', 'FAILED')") == []


def test_a_file_that_went_does_not_take_a_folder_of_its_name_to_the_trash(site):
    """Somebody removed the copy unseen, and another item's was put below a folder of its name: the
    one goes, the other stays."""
    oid = two_copies(site)
    (site.folder / "a" / "x").unlink()
    other = site.add_item("x/y", b"another item's", "a")
    let_go(site, oid, "a")
    to_the_end(site)
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"}
    assert site.replicas(other)["a"] == "READY" and site.visible("a") == {"x/y": b"another item's"}


def registered(site: Site, path: str, *directories: str) -> Any:
    """The oid of what is let in where it lies on ``a``, and has a copy on ``b``."""
    register_tree(site.context, Source("a", "test", as_directory=directories), path)
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    (oid,) = [row["oid"] for row in site.query("SELECT oid FROM data_item")]
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    return oid


@pytest.mark.parametrize(
    ("written", "stays"), [(b"other bytes, more of them", True), (b"BAD bytes.", True),
                           (b"good bytes", False)],
)  # fmt: skip
def test_what_its_owner_made_of_a_registered_file_is_the_owners(site, written, stays):
    """Overwritten where it lies and not registered again: the item goes, the file does not, unless
    it was only touched."""
    file = site.folder / "a" / "x"
    file.write_bytes(b"good bytes")
    oid = registered(site, "x")
    file.write_bytes(written)
    os.utime(file, (1e9, 1e9))
    let_go(site, oid)
    to_the_end(site)
    assert set(site.replicas(oid).values()) == {"DELETED"} and site.item(oid)["state"] == "DELETED"
    assert site.visible("a") == ({"x": written} if stays else {})
    assert site.private("a", "trash") == [] and site.visible("b") == {}


def test_a_copy_made_again_in_its_place_is_known_by_its_size(site):
    """Its time of change is not that of the file that was registered there, and yet it goes."""
    file = site.folder / "a" / "x"
    file.write_bytes(b"good bytes")
    os.utime(file, (1e9, 1e9))
    oid = registered(site, "x")
    (site.folder / "a" / ".dlm").mkdir()  # as any in use has
    file.unlink()
    site.context.transact(lambda c: request_verification(c, actor="u", now=site.now, oid=oid))
    for _ in range(2):
        site.settle()
    assert site.replicas(oid)["a"] == "READY" and site.replica(oid, "a")["mtime"] is None
    let_go(site, oid)
    to_the_end(site)
    assert site.visible("a") == {} and site.item(oid)["state"] == "DELETED"


def test_files_of_others_in_a_directory_payload_do_not_go_with_it(site):
    """Its trashing says what is in its way, and nothing is moved; once that is gone it goes."""
    folder = site.folder / "a" / "x.ms"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data").write_bytes(b"good bytes")
    oid = registered(site, "", "*.ms")
    (folder / "sub" / "notes").write_bytes(STRANGER)
    let_go(site, oid)
    to_the_end(site)
    assert site.visible("a") == {"x.ms/sub/data": b"good bytes", "x.ms/sub/notes": STRANGER}
    (failed,) = site.query("SELECT * FROM operation WHERE state = 'FAILED'")
    assert "'x.ms/sub/notes' in it is not of the payload" in failed["error"]
    (folder / "sub" / "notes").unlink()
    site.context.transact(lambda c: retry_failed(c, site.now))
    to_the_end(site)
    assert site.visible("a") == {} and site.item(oid)["state"] == "DELETED"


@pytest.mark.parametrize(
    ("written", "stays"), [(b"other bytes, more of them", True), (b"BAD bytes.", True),
                           (b"good bytes", False)],
)  # fmt: skip
def test_what_its_owner_made_of_a_registered_directory_is_the_owners(site, written, stays):
    """As of a file by itself: the item goes, what was worked on where it lies does not, unless it
    was only touched."""
    folder = site.folder / "a" / "x.ms"
    (folder / "sub").mkdir(parents=True)
    (folder / "same").write_bytes(b"as it was")
    (folder / "sub" / "data").write_bytes(b"good bytes")
    oid = registered(site, "", "*.ms")
    (folder / "sub" / "data").write_bytes(written)
    let_go(site, oid)
    to_the_end(site)
    assert set(site.replicas(oid).values()) == {"DELETED"} and site.item(oid)["state"] == "DELETED"
    left = {"x.ms/same": b"as it was", "x.ms/sub/data": written}
    assert site.visible("a") == (left if stays else {})
    assert site.private("a", "trash") == [] and site.visible("b") == {}


def test_a_damaged_copy_of_ours_is_no_strangers(site):
    """A bad disk made it shorter, and nobody has looked: it goes with its item."""
    oid = two_copies(site)
    (file,) = site.visible("b")
    (site.folder / "b" / file).write_bytes(b"go")
    let_go(site, oid)
    to_the_end(site)
    assert site.visible("b") == {} and site.item(oid)["state"] == "DELETED"


def test_a_file_that_came_back_from_the_trash_is_ours(site):
    """Its storage may tell another time of change after that: it is not read for it, and goes."""
    file = site.folder / "a" / "x"
    file.write_bytes(b"good bytes")
    oid = registered(site, "x")
    let_go(site, oid)
    site.settle()
    site.context.transact(
        lambda c: request_restore(c, oid=oid, storage_id=None, actor="u", now=site.now)
    )
    site.work(OperationKind.RESTORE)
    assert site.replica(oid, "a")["mtime"] is None
    let_go(site, oid)
    to_the_end(site)
    assert site.visible("a") == {} and site.item(oid)["state"] == "DELETED"
