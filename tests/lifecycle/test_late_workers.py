"""A worker that wakes up after its lease: others did its work, and more has happened since."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dlm_core.lifecycle import verify
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import plan_batch
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import StoragePool, _open_row, drain, end_lost_leases
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind
from tests.backends import s3_config
from tests.fakes import Hooked, Misreading
from tests.payloads import get
from tests.site import ALL, Site, make_site

GOOD = b"good bytes"


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    for name in "ab":
        site.add_storage(name, name.upper())
    return site


def sleeper(site: Site, kind: OperationKind, action: Callable[[], Any], call: str) -> None:
    """Let a worker do one kind of work, and ``action`` happen once while it sleeps: when it has
    chosen its work ('open'), or just before a storage call."""
    left = [action]

    def sleep(made: str, _: str = "") -> None:
        if made == call and left:
            left.pop()()

    def opened(row: Any) -> Any:
        sleep("open")
        return Hooked(_open_row(row), sleep)

    drain(replace(site.context, storages=StoragePool(opened)), {kind: ALL[kind]})
    assert not left, "nothing happened while it slept"


def the_others(site: Site, *kinds: OperationKind) -> None:
    """The lease is over; another worker does the work."""
    site.advance(seconds=site.context.settings.lease_seconds + 1)
    drain(replace(site.context, worker="another"), {kind: ALL[kind] for kind in kinds})


def two_copies(site: Site) -> Any:
    """The one on b lies where a copy made again would lie too."""
    oid = site.add_item("x", GOOD, "a")
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    return oid


def let_b_go(site: Site, oid: Any) -> None:
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)
    site.execute(
        "UPDATE replica SET expires_at = :n WHERE oid = :o AND storage_id = :s AND state = 'READY'",
        n=site.now, o=oid, s=site.storages["b"],
    )  # fmt: skip


def expire_only(site: Site) -> None:
    """Queue the trashing, and nothing more."""
    site.context.transact(lambda c: plan_batch(c, site.context, 10))


def wanted_again(site: Site, oid: Any) -> None:
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
    plan_replication(site.context)
    the_others(site, OperationKind.COPY)


def copies_are_where_they_should_be(site: Site, oid: Any) -> None:
    for name, path in (("a", "x"), ("b", "test/x")):
        there = site.visible(name) == {path: GOOD}
        assert there == (site.replicas(oid).get(name) == "READY"), name


def nothing_was_moved(site: Site) -> bool:
    """Good bytes that were set aside would have come back, and the log would tell."""
    return not site.query("SELECT FROM event WHERE action = 'brought_back'")


@pytest.mark.parametrize("call", ["open", "rename"])
def test_a_late_trashing_does_not_take_a_newer_copy(site, call):
    """The copy is trashed by another worker and made again in the same place."""
    oid = two_copies(site)
    let_b_go(site, oid)
    expire_only(site)

    def meanwhile() -> None:
        the_others(site, OperationKind.TRASH)
        wanted_again(site, oid)

    sleeper(site, OperationKind.TRASH, meanwhile, call)
    copies_are_where_they_should_be(site, oid)
    site.advance(hours=1)
    site.settle()
    wanted_again(site, oid)
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    copies_are_where_they_should_be(site, oid)


def in_the_trash(site: Site) -> Any:
    oid = two_copies(site)
    let_b_go(site, oid)
    expire_only(site)
    site.work(OperationKind.TRASH)
    return oid


def ask_for_b(site: Site, oid: Any) -> None:
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["b"], actor="user:test", now=site.now
        )
    )


@pytest.mark.parametrize("call", ["open", "rename"])
def test_a_late_restore_does_not_undo_a_newer_trashing(site, call):
    """The copy came back by another worker and was trashed anew: it stays in the trash."""
    oid = in_the_trash(site)
    ask_for_b(site, oid)

    def meanwhile() -> None:
        the_others(site, OperationKind.RESTORE)
        let_b_go(site, oid)
        expire_only(site)
        the_others(site, OperationKind.TRASH)

    sleeper(site, OperationKind.RESTORE, meanwhile, call)
    copies_are_where_they_should_be(site, oid)
    assert len(site.private("b", "trash")) == (site.replicas(oid)["b"] == "TRASHED")


@pytest.mark.parametrize("call", ["open", "remove"])
def test_a_late_purge_does_not_take_what_was_trashed_anew(site, call):
    """Its lease ran out, the copy was needed and came back, and went to the trash again: there it
    lies until the new grace is over."""
    oid = in_the_trash(site)
    site.advance(hours=2)

    def meanwhile() -> None:
        site.advance(seconds=site.context.settings.lease_seconds + 1)
        site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
        the_others(site, OperationKind.PURGE, OperationKind.RESTORE)
        if site.replicas(oid)["b"] == "READY":
            let_b_go(site, oid)
            expire_only(site)
            the_others(site, OperationKind.TRASH)

    # the survivors are looked at before: that is another open
    sleeper(site, OperationKind.PURGE, meanwhile, call)
    state = site.replicas(oid)["b"]
    assert len(site.private("b", "trash")) == (state == "TRASHED"), state
    copies_are_where_they_should_be(site, oid)


def test_a_late_look_does_not_set_a_newer_copy_aside(site, monkeypatch):
    """Another worker has set the damaged bytes aside and the copy was made again in their place."""
    oid = two_copies(site)
    (site.folder / "b" / "test" / "x").write_bytes(b"evil bytes")
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, oid=oid, storage_id=site.storages["b"]
        )
    )
    site.work(OperationKind.VERIFY)  # both looks
    assert site.replicas(oid)["b"] == "CORRUPTED"
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    (site.folder / "b" / "test" / "x").write_bytes(b"evil bytes")
    judge, slept = verify._judge, []

    def meanwhile(*arguments: Any) -> None:
        row = next(iter(arguments[3].values()))
        if row["state"] == "SUSPECT" and not slept:
            slept.append(True)
            the_others(site, OperationKind.VERIFY)
            plan_replication(site.context)
            the_others(site, OperationKind.COPY)
            assert site.replicas(oid)["b"] == "READY"
            # somebody doubts it: the state alone would not tell it from the old one
            uid = site.replica(oid, "b")["uid"]
            site.execute("UPDATE replica SET state = 'SUSPECT' WHERE uid = :u", u=uid)
        judge(*arguments)

    monkeypatch.setattr(verify, "_judge", meanwhile)
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, oid=oid, storage_id=site.storages["b"]
        )
    )
    site.work(OperationKind.VERIFY)
    assert slept and nothing_was_moved(site)
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    copies_are_where_they_should_be(site, oid)


def test_a_look_does_not_set_aside_what_lies_where_a_trashed_copy_was(site, monkeypatch):
    """Its lease holds, but the copy was trashed and made again while it was read."""
    oid = two_copies(site)
    (site.folder / "b" / "test" / "x").write_bytes(b"evil bytes")
    let_b_go(site, oid)
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, oid=oid, storage_id=site.storages["b"]
        )
    )
    judge, slept = verify._judge, []

    def meanwhile(*arguments: Any) -> None:
        row = next(iter(arguments[3].values()))
        if row["state"] == "SUSPECT" and not slept:
            slept.append(True)
            expire_only(site)
            site.work(OperationKind.TRASH)
            site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
            plan_replication(site.context)
            site.work(OperationKind.COPY)
            assert site.visible("b") == {"test/x": GOOD}
        judge(*arguments)

    monkeypatch.setattr(verify, "_judge", meanwhile)
    site.work(OperationKind.VERIFY)
    assert slept and nothing_was_moved(site)
    copies_are_where_they_should_be(site, oid)


@pytest.mark.parametrize("since", [["SUSPECT"], ["MISSING", "PENDING"]])
def test_a_late_look_does_not_end_a_newer_doubt(site, monkeypatch, since):
    """Read while they were good, the bytes went bad before the result was written: somebody has
    noticed, or a new copy is on its way. It is no survivor, and what is doubted is looked at."""
    oid = two_copies(site)
    uid = site.replica(oid, "b")["uid"]
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, oid=oid, storage_id=site.storages["b"]
        )
    )
    judge, slept = verify._judge, []

    def meanwhile(*arguments: Any) -> None:
        if not slept:
            slept.append(True)
            (site.folder / "b" / "test" / "x").write_bytes(b"evil bytes")
            for state in since:
                site.execute("UPDATE replica SET state = :s WHERE uid = :u", s=state, u=uid)
        judge(*arguments)

    monkeypatch.setattr(verify, "_judge", meanwhile)
    site.work(OperationKind.VERIFY)
    assert slept
    assert site.replicas(oid)["b"] == {"SUSPECT": "CORRUPTED"}.get(since[-1], since[-1])


def test_a_late_copy_does_not_take_back_files_that_another_found_there(site, s3):
    """On an object store files are visible one by one. Who slept, reads one of a directory's
    wrongly, and would clear the others away: they are part of a good copy by now."""
    root = f"{s3.bucket}/{uuid.uuid4().hex}"
    config = json.dumps(s3_config(s3))
    site.add_storage("c", "cloud", interface="s3", root=root, config=config)
    for name, data in (("one", b"1"), ("two", b"22")):
        (site.folder / "a" / "d.ms").mkdir(exist_ok=True)
        (site.folder / "a" / "d.ms" / name).write_bytes(data)
    site.set_storage("b", mode="read_only")
    register_tree(site.context, Source("a", "test", as_directory=("*.ms",)))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    plan_replication(site.context)

    bucket, left = open_storage("c", "s3", root, s3_config(s3)), ["sleep"]

    def opened(row: Any) -> Any:
        if row["name"] != "a":
            return _open_row(row)
        wrong = Misreading(_open_row(row))
        wrong.left = []

        def sleep(call: str, path: str) -> None:
            if (call, path) == ("open_read", "d.ms/two") and left:
                while bucket.stat("test/d.ms/one") is None:
                    time.sleep(0.01)
                left.pop()
                the_others(site, OperationKind.COPY)
                wrong.left = [None]

        return Hooked(wrong, sleep)

    drain(replace(site.context, storages=StoragePool(opened)), {OperationKind.COPY: execute_copy})
    assert not left and site.query("SELECT state FROM replica WHERE state <> 'READY'") == []
    found = {e.path: get(bucket, e.path) for e in bucket.walk("test")}
    assert found == {"test/d.ms/one": b"1", "test/d.ms/two": b"22"}


def test_the_leases_of_a_process_that_is_gone_end_when_services_start_again(site):
    """Those of others, on another machine, in a container beside us or at work here, run out by
    themselves only."""
    two_copies(site)
    gone = subprocess.Popen(["true"])
    gone.wait()
    host, _, pid = site.context.worker.rpartition(":")
    assert (host.partition("/")[0], pid) == (socket.gethostname(), str(os.getpid()))
    workers = [f"{host}:{gone.pid}", f"{host}:{pid}", f"elsewhere:{gone.pid}", f"{host}:x",
               f"{host}/4026532001:{gone.pid}"]  # fmt: skip
    for worker in workers:
        site.execute(
            """INSERT INTO operation (operation_id, kind, state, oid, uid, reason, actor, due_at,
                                      lease_token, lease_until, worker)
               SELECT gen_random_uuid(), 'verify', 'RUNNING', oid, uid, 'r', 'a', :now,
                      gen_random_uuid(), CAST(:now AS timestamptz) + interval '300 s', :worker
                 FROM replica LIMIT 1""",
            now=site.now,
            worker=worker,
        )
    assert end_lost_leases(site.context) == 2
    found = site.query(
        "SELECT worker FROM operation WHERE lease_until < :now ORDER BY worker", now=site.now
    )
    assert {row["worker"] for row in found} == {workers[0], workers[3]}
    assert end_lost_leases(site.context) == 2  # until somebody claims them
    site.work(OperationKind.VERIFY)
    assert end_lost_leases(site.context) == 0
