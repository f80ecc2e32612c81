"""What counts as a survivor when a copy is to go."""

import json
import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from dlm_core.catalogue import deletions
from dlm_core.lifecycle import survivors
from dlm_core.lifecycle.expire import trash
from dlm_core.lifecycle.verify import request_verification
from dlm_core.types import new_id
from tests.backends import s3_config
from tests.site import make_site


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    for name in "abc":
        site.add_storage(name, name.upper())
    return site


def also_on(site, oid, storage: str) -> None:
    """A READY replica of an item on another storage."""
    uid = new_id()
    site.execute(
        """INSERT INTO replica (uid, oid, storage_id, path, size, created_at, accessed_at)
           SELECT :uid, oid, :s, 'copy', size, :now, :now FROM data_item WHERE oid = :oid""",
        uid=uid, oid=oid, s=site.storages[storage], now=site.now,
    )  # fmt: skip
    site.execute(
        """UPDATE replica r SET state = 'READY', digest = i.digest, checked_at = :now
             FROM data_item i WHERE i.oid = r.oid AND r.uid = :uid""",
        uid=uid, now=site.now,
    )  # fmt: skip


def proof_of(site, oid, storage: str) -> deletions.Proof:
    uid = site.replica(oid, storage)["uid"]
    (proof,) = site.context.transact(lambda c: deletions.prove(c, [uid]))
    return proof


def trash_copy(site, oid, storage: str) -> None:
    uid = site.replica(oid, storage)["uid"]
    terms = {"actor": "user:test", "now": site.now, "valid_for": timedelta(hours=1)}
    site.context.transact(lambda c: trash(c, deletions.prove(c, [uid]), **terms))


def turn(*states: str):
    def change(site, oid) -> None:
        for state in states:
            site.execute(
                "UPDATE replica SET state = :s WHERE oid = :o AND path = 'copy'", s=state, o=oid
            )

    return change


DOUBTS = {
    "pending": turn("MISSING", "PENDING"),
    "suspect": turn("SUSPECT"),
    "corrupted": turn("SUSPECT", "CORRUPTED"),
    "missing": turn("MISSING"),
    "trashed": lambda site, oid: trash_copy(site, oid, "b"),
    "leaving": lambda site, oid: site.execute(
        "UPDATE replica SET expires_at = :n WHERE oid = :o AND path = 'copy'", o=oid, n=site.now
    ),
    "offline": lambda site, oid: site.set_storage("b", mode="offline"),
    "draining": lambda site, oid: site.set_storage("b", mode="draining"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_only_what_was_read_and_matched_is_a_survivor(site, doubt):
    """A copy that is doubted, gone, leaving or out of reach lets no other one go."""
    oid = site.add_item("x", b"1", "a", target_phase="LIQUID")
    also_on(site, oid, "b")
    assert proof_of(site, oid, "a").refusal is None
    DOUBTS[doubt](site, oid)
    proof = proof_of(site, oid, "a")
    assert proof.survivors == []
    assert proof.refusal is not None and "give 0 of the 2" in proof.refusal


def test_two_volumes_of_one_location_are_one_survivor(site):
    """What one fire takes counts once, however many disks it is on."""
    site.add_storage("b2", "B")
    oid = site.add_item("x", b"1", "a", target_phase="SOLID")
    also_on(site, oid, "b")
    also_on(site, oid, "b2")
    proof = proof_of(site, oid, "a")
    assert len(proof.survivors) == 2 and proof.survivor_weight == 2
    assert proof.refusal is not None and "give 2 of the 4" in proof.refusal
    also_on(site, oid, "c")
    assert proof_of(site, oid, "a").refusal is None


@pytest.mark.parametrize("registered", [True, False])
def test_a_survivor_that_was_changed_since_its_last_look_is_read_before_a_purge(site, registered):
    """Its size and its name are as they were: the storage's time of change says that it was
    written to, be it the owner's file or a copy that was made there."""
    oid = site.add_item("x", b"first", "a", target_phase="LIQUID")
    early = (site.now - timedelta(hours=1)).timestamp()
    for path in ("a/x", "b/copy"):
        (site.folder / path).write_bytes(b"first")
        os.utime(site.folder / path, (early, early))
    also_on(site, oid, "b")
    if registered:
        site.execute("UPDATE replica SET mtime = :m", m=early)
    (site.folder / "a" / "x").write_bytes(b"other")
    later = (site.now + timedelta(minutes=1)).timestamp()
    os.utime(site.folder / "a" / "x", (later, later))
    trash_copy(site, oid, "b")
    site.execute("UPDATE storage SET trash_grace = '0 s'")
    site.execute(
        """INSERT INTO operation (operation_id, kind, oid, uid, reason, actor, due_at)
           SELECT gen_random_uuid(), 'trash', oid, uid, 'test', 'test', :now FROM replica
            WHERE state = 'TRASHED'""",
        now=site.now,
    )
    site.advance(hours=1)
    site.settle()
    states = site.replicas(oid)
    assert states["a"] in ("READY", "SUSPECT", "CORRUPTED") and states["b"] == "READY", states
    held = [f.read_bytes() for f in site.folder.rglob("*") if f.is_file()]
    assert b"first" in held


def looks(site, monkeypatch, uid, times: int = 3) -> int:
    """How often a survivor is read whole in so many looks."""
    read: list[int] = []

    def counted(*arguments):
        read.append(1)
        return reads_well(*arguments)

    reads_well = survivors._reads_well
    monkeypatch.setattr(survivors, "_reads_well", counted)
    proof = SimpleNamespace(survivors=[uid])
    for _ in range(times):
        assert survivors.look_at_survivors(site.context, [proof]) == set()
    return len(read)


def test_a_survivor_that_was_touched_is_read_once(site, monkeypatch):
    """What was found is kept: the next purge need not read it again."""
    oid = site.add_item("x", b"first", "a")
    uid = site.replica(oid, "a")["uid"]
    site.execute("UPDATE replica SET mtime = 1.5")
    os.utime(site.folder / "a" / "x", (1e9, 1e9))
    site.advance(days=1)
    assert looks(site, monkeypatch, uid) == 1
    found = site.query("SELECT mtime, checked_at FROM replica")
    assert found == [{"mtime": 1e9, "checked_at": site.now}]


def test_what_s3_says_of_an_object_is_compared_with_what_it_said(site, s3, monkeypatch):
    """Not read while that is the same; read once when another object lies there."""
    root = f"{s3.bucket}/{new_id().hex}"
    site.add_storage("far", "D", interface="s3", root=root, config=json.dumps(s3_config(s3)))
    site.now = datetime.now(UTC) + timedelta(minutes=1)
    oid = site.add_item("x", b"first", "a")
    site.execute("UPDATE storage SET mode = 'read_only' WHERE name IN ('b', 'c')")
    site.settle()
    uid = site.replica(oid, "far")["uid"]
    site.context.transact(
        lambda c: request_verification(c, actor="t", now=site.now, storage_id=site.storages["far"])
    )
    site.work()
    assert site.query("SELECT told_stamp AS t FROM replica WHERE uid = :u", u=uid)[0]["t"]
    assert looks(site, monkeypatch, uid) == 0
    site.execute("UPDATE replica SET told_stamp = '5 another' WHERE uid = :u", u=uid)
    assert looks(site, monkeypatch, uid, times=1) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1.5, 1.5, True), (1.5, 1.25, False), (1.0, 1.75, True), (2.0, 1.75, False)],
)
def test_a_server_may_tell_whole_seconds(one, other, same):
    """Of one file, and parts of them in a listing."""
    assert survivors._same_time(one, other) is same


def test_what_is_written_to_after_its_look_is_read_by_the_next_one(site, monkeypatch):
    """Looks at many take hours: of each the time counts from which on nothing was read yet."""
    oid = site.add_item("x", b"first", "a")
    uid, begun = site.replica(oid, "a")["uid"], site.now
    os.utime(site.folder / "a" / "x", (begun.timestamp() + 1,) * 2)
    reads_well, read = survivors._reads_well, []

    def slow(*arguments):
        read.append(1)
        good = reads_well(*arguments)
        site.advance(hours=2)
        return good

    monkeypatch.setattr(survivors, "_reads_well", slow)
    site.advance(hours=1)
    proof = SimpleNamespace(survivors=[uid])
    assert survivors.look_at_survivors(site.context, [proof]) == set()
    assert site.replica(oid, "a")["checked_at"] == begun + timedelta(hours=1)
    late = (begun + timedelta(hours=2)).timestamp()  # while the others were read
    os.utime(site.folder / "a" / "x", (late, late))
    assert survivors.look_at_survivors(site.context, [proof]) == set()
    assert len(read) == 2
