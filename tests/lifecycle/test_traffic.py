"""Limits hold for all drainers together, and change at any time; nothing waits for what is slow."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlm_core.catalogue import traffic as catalogue
from dlm_core.catalogue.traffic import share_of
from dlm_core.lifecycle import traffic
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.verify import execute_verify, request_verification
from dlm_core.lifecycle.work import Context, Report, drain
from dlm_core.storages.open import open_storage
from dlm_core.storages.rclone import RcloneStorage
from dlm_core.storages.sftp import SftpStorage
from dlm_core.types import OperationKind
from tests.fakes import Hooked
from tests.site import Site, make_site, reopen

_MB = 1 << 20
_COPY = {OperationKind.COPY: execute_copy}


@pytest.fixture
def site(engine, tmp_path, monkeypatch) -> Site:
    """Two storages at two places; drainers look at limits ten times a second."""
    monkeypatch.setattr(traffic, "_BEAT_SECONDS", 0.1)
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    return site


class Going:
    """A drainer in a thread of its own."""

    def __init__(self, context: Context, executors: Any = _COPY) -> None:
        self.report = Report()
        self.context = replace(context)
        self.thread = threading.Thread(target=self._run, args=(executors,))
        self.begun = time.monotonic()
        self.thread.start()

    def _run(self, executors: Any) -> None:
        self.report = drain(self.context, executors)

    def join(self) -> float:
        """Seconds that it took."""
        self.thread.join(120)
        assert not self.thread.is_alive()
        return time.monotonic() - self.begun


def until(condition: Any, seconds: float = 60.0) -> Any:
    """What ``condition()`` gives as soon as it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def running(site: Site) -> list[dict[str, Any]]:
    return site.context.transact(lambda c: catalogue.list_running(c, site.now))


def test_bytes_and_places_are_shared_evenly():
    """Three drainers get a third each; nobody gets a place that another still has."""
    limits = {"max_bytes_per_second": 90, "max_concurrency": 8}
    assert share_of(limits, [2, 2]) == catalogue.Share(30.0, 3)
    assert share_of(limits, [8]) == catalogue.Share(45.0, 0)
    assert share_of(limits, [5]) == catalogue.Share(45.0, 3)
    assert share_of(dict.fromkeys(limits), [5]) == catalogue.Share(None, None)


@pytest.mark.parametrize("where", ["a", "b", "link"])
def test_a_copy_keeps_the_limit_of_each_end_and_of_the_link(site: Site, where: str) -> None:
    """4 MB at 4 MB/s take a second, whichever of the three it is that has the limit; the read-back
    of a limited destination counts too."""
    if where == "link":
        site.context.transact(
            lambda c: catalogue.set_link(c, "a", "b", {"max_bytes_per_second": 4 * _MB})
        )
    else:
        site.set_storage(where, max_bytes_per_second=4 * _MB)
    site.add_item("x", b"x" * 4 * _MB, "a")
    plan_replication(site.context)
    took = Going(site.context).join()
    assert took >= (1.7 if where == "b" else 0.9)
    assert site.query("SELECT * FROM drainer") == []


def test_a_limit_that_changes_reaches_a_big_file_on_its_way(site: Site) -> None:
    """At a megabyte in ten seconds it would take minutes; set free in the middle of it, it ends at
    once. Meanwhile it is told how far it is."""
    site.set_storage("a", max_bytes_per_second=_MB // 10)
    oid = site.add_item("x", b"x" * 20 * _MB, "a")
    plan_replication(site.context)
    drainer = Going(site.context)
    (told,) = until(lambda: site.query("SELECT uses FROM drainer"))
    assert len(told["uses"]) == 3
    time.sleep(0.3)
    site.set_storage("a", max_bytes_per_second=None)
    assert drainer.join() < 60
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}


def test_progress_is_told_while_it_lasts(site: Site) -> None:
    """An operation at work is listed with its bytes, rate, worker and beginning; then no more."""
    site.set_storage("b", max_bytes_per_second=2 * _MB)
    site.add_item("x", b"x" * 12 * _MB, "a")
    plan_replication(site.context)
    drainer = Going(site.context)
    (seen,) = until(lambda: running(site))
    assert (seen["kind"], seen["uri"], seen["storage"]) == ("copy", "test:x", "b")
    assert seen["total_bytes"] == 12 * _MB
    assert 0 < seen["done_bytes"] <= 12 * _MB
    assert seen["worker"] == site.context.worker
    later = until(lambda: [r for r in running(site) if r["done_bytes"] > seen["done_bytes"]])
    assert later[0]["since"] == seen["since"]
    site.set_storage("b", max_bytes_per_second=None)
    drainer.join()
    assert running(site) == []


def test_two_drainers_share_a_limit(site: Site) -> None:
    """What two read together is no more than the storage's limit, and each has its part."""
    site.set_storage("a", max_bytes_per_second=4 * _MB)
    for name in "wxyz":
        site.add_item(name, name.encode() * 2 * _MB, "a")
    plan_replication(site.context)
    both = threading.Barrier(2)

    def copy(context: Context, claim: Any) -> Report:
        both.wait(60)  # until the other has a claim too
        return execute_copy(context, claim)

    settings = site.context.settings.model_copy(update={"batch_size": 2, "links_at_once": 1})
    pair = [
        Going(replace(site.context, settings=settings, worker=w), {OperationKind.COPY: copy})
        for w in ("one", "two")
    ]
    took = max(one.join() for one in pair)
    assert [one.report.done["copy"] for one in pair] == [2, 2]
    assert 1.7 <= took < 30


class Counted:
    """Counts the files that are open at once."""

    def __init__(self) -> None:
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def opened(self, row: Any) -> Any:
        def hook(call: str, path: str) -> None:
            if call == "write":
                with self.lock:
                    self.now += 1
                    self.most = max(self.most, self.now)
                time.sleep(0.02)
                with self.lock:
                    self.now -= 1

        inner = open_storage(row["name"], row["interface"], row["root"], row["config"])
        inner.concurrency = 8
        return Hooked(inner, hook) if row["name"] == "b" else inner


@pytest.mark.parametrize("drainers", [1, 2])
def test_no_more_files_at_once_than_the_limit(site: Site, drainers: int) -> None:
    """However many threads and drainers there are, two files are written at a time."""
    counted = Counted()
    reopen(site, counted.opened)
    site.set_storage("b", max_concurrency=2)
    for n in range(24):
        site.add_item(f"x{n}", b"x", "a")
    plan_replication(site.context)
    settings = site.context.settings.model_copy(update={"batch_size": 12})
    going = [
        Going(replace(site.context, settings=settings, storages=site.context.storages, worker=w))
        for w in ("one", "two")[:drainers]
    ]
    for one in going:
        one.join()
    assert sum(one.report.done["copy"] for one in going) == 24
    assert counted.most <= 2


def test_files_that_go_in_one_request_are_at_work_at_once(
    site: Site, tmp_path: Path, sshd: Any, monkeypatch: Any
) -> None:
    """rclone takes them so, SFTP writes them so: not where files at once are limited."""
    together: list[int] = []

    def counting(adapter: Any, call: str) -> None:
        inner = getattr(adapter, call)

        def counted(self: Any, first: Any, *rest: Any) -> Any:
            together.append(len(first if call == "write_many" else rest[0]))
            return inner(self, first, *rest)

        monkeypatch.setattr(adapter, call, counted)

    counting(RcloneStorage, "take_many")
    counting(SftpStorage, "write_many")
    folder = tmp_path / "far"
    folder.mkdir()
    for name, interface, root, config in (
        ("c", "rclone", str(tmp_path / "b"), {"type": "local"}),
        ("d", "sftp", sshd.root(folder), sshd.config()),
    ):
        for other in site.storages:
            site.set_storage(other, mode="read_only")
        site.add_storage(name, name.upper())
        site.set_storage(
            name, interface=interface, root=root, config=json.dumps(config), max_concurrency=1
        )
        for n in range(8):
            site.add_item(f"{name}{n}", b"x", "a")
        plan_replication(site.context)
        assert drain(site.context, _COPY).done["copy"] == 8
    assert max(together, default=1) == 1


def test_a_source_that_is_held_back_gives_no_files_in_one_request(
    site: Site, tmp_path: Path, monkeypatch: Any
) -> None:
    """rclone would read them as fast as it can."""
    taken: list[Any] = []
    monkeypatch.setattr(RcloneStorage, "take_many", lambda *a: taken.append(a) or {})
    for other in site.storages:
        site.set_storage(other, mode="read_only")
    site.set_storage("a", max_bytes_per_second=10**6)
    site.add_storage("c", "C")
    site.set_storage("c", interface="rclone", config=json.dumps({"type": "local"}))
    for n in range(8):
        site.add_item(f"{n}", b"x", "a")
    plan_replication(site.context)
    assert drain(site.context, _COPY).done["copy"] == 8 and taken == []


def test_a_lost_drainers_share_is_the_others(site: Site) -> None:
    """What a drainer that is gone had is free for the others once it has told nothing for long."""
    site.set_storage("b", max_concurrency=1)
    site.add_item("x", b"x", "a")
    site.execute(
        """INSERT INTO drainer (drainer_id, worker, beat_at, uses)
           VALUES (gen_random_uuid(), 'lost', :at, jsonb_build_object(CAST(:key AS text), 1))""",
        at=site.now - catalogue.LOST_AFTER / 2, key=str(site.storages["b"]),
    )  # fmt: skip
    plan_replication(site.context)
    drainer = Going(site.context)
    time.sleep(0.5)
    assert site.visible("b") == {}
    site.now += catalogue.LOST_AFTER
    drainer.join()
    assert site.visible("b") == {"test/x": b"x"}
    assert site.query("SELECT * FROM drainer") == []


def test_verification_keeps_the_limit_of_its_storage(site: Site) -> None:
    """4 MB at 4 MB/s are read in a second."""
    site.set_storage("a", max_bytes_per_second=4 * _MB)
    site.add_item("x", b"x" * 4 * _MB, "a")
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))
    assert Going(site.context, {OperationKind.VERIFY: execute_verify}).join() >= 0.9


class Gate:
    """Writes to one storage, or of large files, wait until it is opened."""

    def __init__(self, site: Site, storage: str = "", above: int = 1 << 60) -> None:
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.storage, self.above = storage, above
        reopen(site, self._opened)

    def _opened(self, row: Any) -> Any:
        gate = self
        inner = open_storage(row["name"], row["interface"], row["root"], row["config"])

        class Held(Hooked):
            def write(self, path: str, source: Any, size: int) -> Any:
                if row["name"] == gate.storage or size > gate.above:
                    gate.waiting.set()
                    assert gate.gate.wait(120)
                return self.inner.write(path, source, size)

        return Held(inner, lambda *_: None)


def ready_copies(site: Site, storage: str) -> int:
    found = site.query(
        "SELECT count(*) AS n FROM replica WHERE state = 'READY' AND storage_id = :s",
        s=site.storages[storage],
    )
    return found[0]["n"]


@pytest.fixture
def small_is_little(monkeypatch) -> None:
    """More than a hundred kilobytes are large."""
    monkeypatch.setattr("dlm_core.lifecycle.copying.LARGE", 100_000)
    monkeypatch.setattr("dlm_core.lifecycle.work.LARGE", 100_000)


def test_small_files_do_not_wait_for_a_huge_one(site: Site, small_is_little: None) -> None:
    """While one large copy hangs, the small ones of its claim are recorded, and so are those of the
    claims after it, large ones among them; then it ends too."""
    site.context = replace(
        site.context, settings=site.context.settings.model_copy(update={"batch_size": 4})
    )
    gate = Gate(site, above=100_000)
    huge = [site.add_item(f"huge{n}", b"x" * 200_000, "a") for n in range(5)]
    for n in range(40):
        site.add_item(f"s{n}", b"x", "a")
    plan_replication(site.context)
    # one huge at the head of each of the first claims
    site.execute("UPDATE operation SET priority = -1 WHERE oid = ANY(:oids)", oids=huge)
    drainer = Going(site.context)
    assert gate.waiting.wait(60)
    until(lambda: ready_copies(site, "b") == 40)
    gate.gate.set()
    drainer.join()
    assert drainer.report.done["copy"] == 45


def test_a_slow_storage_holds_up_only_what_goes_there(site: Site) -> None:
    """While copies to one storage hang, those to another are made, of this claim and of later
    ones, and no more is claimed for the one that hangs."""
    site.context = replace(
        site.context, settings=site.context.settings.model_copy(update={"batch_size": 10})
    )
    site.add_storage("c", "C", phase="GAS")
    site.set_storage("b", phase="GAS")
    gate = Gate(site, storage="c")
    for n in range(20):
        site.add_item(f"s{n}", b"x", "a")
    plan_replication(site.context)
    drainer = Going(site.context)
    assert gate.waiting.wait(60)
    until(lambda: ready_copies(site, "b") == 20)
    found = site.query(
        """SELECT count(*) AS n FROM operation o JOIN replica r USING (uid)
            WHERE o.state = 'RUNNING' AND r.storage_id = :s""",
        s=site.storages["c"],
    )
    assert found[0]["n"] <= 10
    gate.gate.set()
    drainer.join()
    assert ready_copies(site, "c") == 20


def test_an_error_of_one_claim_ends_the_drainer_with_it(site: Site, tmp_path: Path) -> None:
    """What an executor raises comes out of the drainer, whose other work has then ended."""

    def fail(context: Context, claim: Any) -> Report:
        raise ZeroDivisionError

    site.add_item("x", b"x", "a")
    plan_replication(site.context)
    with pytest.raises(ZeroDivisionError):
        drain(site.context, {OperationKind.COPY: fail})
    assert not site.context.stop.is_set()
    assert site.query("SELECT state FROM operation") == [{"state": "QUEUED"}]
