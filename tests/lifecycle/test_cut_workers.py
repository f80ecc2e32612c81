"""A worker whose connection is cut in the middle of its renames, and that goes on much later: its
locks are gone, others did its work, and what it would move or remove now is newer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.holds import Target, insert_hold
from dlm_core.errors import CatalogueUnavailableError
from dlm_core.lifecycle import fence
from dlm_core.lifecycle.expire import plan_batch
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.trash import execute_trash, request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import StoragePool, _open_row, drain
from dlm_core.types import OperationKind, new_id
from tests.fakes import Wrapped
from tests.site import ALL, Site, make_site

_CUT = """
  SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
   WHERE datname = current_database() AND state = 'idle in transaction' AND pid <> pg_backend_pid()
"""


class AfterTheFirst(Wrapped):
    """Does ``meanwhile`` once, after the first call of a kind."""

    def __init__(self, inner: Any, call: str, meanwhile: list[Callable[[], None]]) -> None:
        super().__init__(inner)
        self.call, self.meanwhile = call, meanwhile

    def __getattr__(self, attribute: str) -> Any:
        found = super().__getattr__(attribute)

        def call(*arguments: Any) -> Any:
            result = found(*arguments)
            if self.meanwhile:
                self.meanwhile.pop()()
            return result

        return call if attribute == self.call else found


@pytest.fixture
def site(engine, tmp_path) -> Site:
    """One file at a time, so that there is a second one to be late for."""
    site = make_site(engine, tmp_path)
    for name in "ab":
        site.add_storage(name, name.upper(), concurrency=1)
    return site


def late(
    site: Site,
    kind: OperationKind,
    call: str,
    *others: OperationKind,
    first: Callable[[], None] = lambda: None,
    then: Callable[[], None],
) -> None:
    """A worker is cut off and stopped after its first ``call``; when its lease is over and
    ``first`` has happened others do the work, then ``then`` happens, and the worker goes on."""

    def meanwhile() -> None:
        site.query(_CUT)
        site.advance(seconds=site.context.settings.lease_seconds + 1)
        first()
        drain(replace(site.context, worker="another"), {one: ALL[one] for one in (kind, *others)})
        then()

    left = [meanwhile]
    pool = StoragePool(lambda row: AfterTheFirst(_open_row(row), call, left))
    with pytest.raises(CatalogueUnavailableError, match="locks"):
        drain(replace(site.context, storages=pool), {kind: ALL[kind]})
    assert not left


def two_items(site: Site) -> list[Any]:
    oids = [site.add_item(path, path.encode() * 5, "a") for path in "xy"]
    make_copies(site)
    return oids


def make_copies(site: Site) -> None:
    site.execute("UPDATE data_item SET target_phase = 'SOLID'")
    plan_replication(site.context)
    site.work(OperationKind.COPY)


def let_b_go(site: Site) -> None:
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.execute(
        "UPDATE replica SET expires_at = :n WHERE storage_id = :s AND state = 'READY'",
        n=site.now, s=site.storages["b"],
    )  # fmt: skip
    site.context.transact(lambda c: plan_batch(c, site.context, 10))


def ask_for_b(site: Site, oids: list[Any]) -> None:
    for oid in oids:
        site.context.transact(
            lambda c, oid=oid: request_restore(
                c, oid=oid, storage_id=site.storages["b"], actor="user:test", now=site.now
            )
        )


def look_at_b(site: Site) -> None:
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, storage_id=site.storages["b"]
        )
    )


def both() -> dict[str, bytes]:
    return {f"test/{path}": path.encode() * 5 for path in "xy"}


def test_a_trashing_that_was_cut_does_not_take_newer_copies(site):
    """Others trashed the copies and made them again in the same places: there they stay."""
    oids = two_items(site)
    let_b_go(site)
    late(site, OperationKind.TRASH, "rename", then=lambda: make_copies(site))
    assert site.visible("b") == both()
    assert [site.replicas(oid)["b"] for oid in oids] == ["READY"] * 2
    assert len(site.private("b", "trash")) == 2


def test_a_purge_that_was_cut_does_not_take_what_was_trashed_anew(site):
    """What was not purged yet was needed again, came back, and went to the trash once more: that is
    another grace."""
    two_items(site)
    let_b_go(site)
    site.work(OperationKind.TRASH)
    site.advance(hours=2)

    def needed() -> None:
        site.execute("UPDATE data_item SET target_phase = 'SOLID'")

    def again() -> None:
        assert len(site.visible("b")) == 1
        let_b_go(site)
        site.work(OperationKind.TRASH)

    late(site, OperationKind.PURGE, "remove", OperationKind.RESTORE, first=needed, then=again)
    assert site.visible("b") == {} and len(site.private("b", "trash")) == 1


def test_a_restore_that_was_cut_does_not_undo_a_newer_trashing(site):
    """Others brought the copies back, and they were trashed anew: they stay in the trash."""
    oids = two_items(site)
    let_b_go(site)
    site.work(OperationKind.TRASH)
    ask_for_b(site, oids)

    def again() -> None:
        let_b_go(site)
        site.work(OperationKind.TRASH)

    late(site, OperationKind.RESTORE, "rename", then=again)
    assert site.visible("b") == {} and len(site.private("b", "trash")) == 2
    assert [site.replicas(oid)["b"] for oid in oids] == ["TRASHED"] * 2


def test_a_look_that_was_cut_does_not_set_newer_copies_aside(site):
    """Others set the damaged bytes aside and good copies were made in their places."""
    oids = two_items(site)
    for path in "xy":
        (site.folder / "b" / "test" / path).write_bytes(b"evil!")
    look_at_b(site)
    late(site, OperationKind.VERIFY, "rename", then=lambda: make_copies(site))
    assert site.visible("b") == both()
    assert [site.replicas(oid)["b"] for oid in oids] == ["READY"] * 2
    assert not site.query("SELECT FROM event WHERE action = 'brought_back'")


def test_who_is_slow_but_not_cut_goes_on(site):
    """Late in the lease it is the lock that counts: nobody can have taken what is still locked."""
    oids = two_items(site)
    let_b_go(site)
    slept = [lambda: site.advance(seconds=site.context.settings.lease_seconds * 2)]
    pool = StoragePool(lambda row: AfterTheFirst(_open_row(row), "rename", slept))
    report = drain(replace(site.context, storages=pool), {OperationKind.TRASH: execute_trash})
    assert report.done == {"trash": 2} and not slept
    assert [site.replicas(oid)["b"] for oid in oids] == ["TRASHED"] * 2
    assert site.visible("b") == {}


class Dial:
    """A clock to be turned, and how often the database was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ticks, self.asked, self.alive = (
            datetime(2026, 6, 1, tzinfo=UTC),
            0.0,
            0,
            True,
        )
        monkeypatch.setattr(fence.time, "monotonic", lambda: self.ticks)
        monkeypatch.setattr(fence.queue, "holds_locks", self.ask)

    def ask(self, _: Any) -> bool:
        self.asked += 1
        return self.alive


@pytest.mark.parametrize("which", ["now", "ticks"])
def test_one_clock_that_went_on_is_enough_to_ask(monkeypatch, which):
    """A suspended machine's own clock stood still, one that is set back tells nothing."""
    dial = Dial(monkeypatch)
    until = dial.now + timedelta(seconds=10)
    guard = fence.Fence(cast(Any, None), lambda: dial.now, until, until_ticks=10.0)
    guard.pass_through()
    assert dial.asked == 0
    dial.now, dial.ticks = dial.now - timedelta(seconds=99), -99.0
    if which == "now":
        dial.now += timedelta(seconds=109)
    else:
        dial.ticks += 109
    guard.pass_through()
    assert dial.asked == 1
    dial.alive = False
    for _ in range(2):
        with pytest.raises(CatalogueUnavailableError):
            guard.pass_through()
    assert dial.asked == 2


@pytest.mark.parametrize("which", ["now", "ticks"])
def test_who_sleeps_over_the_answer_has_slept(monkeypatch, which):
    """What the database said of the lease was said when it was asked: a worker that is suspended
    before it reads the answer asks again."""
    dial = Dial(monkeypatch)

    def answered_late(*_: Any) -> timedelta:
        dial.now += timedelta(hours=which == "now")
        dial.ticks += 3600.0 * (which == "ticks")
        return timedelta(seconds=100)

    monkeypatch.setattr(fence.queue, "lease_left", answered_late)
    lease = timedelta(seconds=100)
    fence.fence(cast(Any, None), lambda: dial.now, new_id(), lease).pass_through()
    assert dial.asked == 1


def test_the_second_half_of_a_lease_is_not_quiet(site):
    """What is on its way then may arrive when others have the work."""
    two_items(site)
    let_b_go(site)
    token, lease = new_id(), timedelta(seconds=100)

    def quiet_for(connection: Any) -> list[bool]:
        asked: list[bool] = []
        guard = fence.fence(connection, lambda: site.now, token, lease)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fence.queue, "holds_locks", lambda _: bool(asked.append(True)) or True)
            for _ in range(2):
                guard.pass_through()
                asked.append(False)
                site.advance(seconds=51)
        return asked

    site.context.transact(
        lambda c: queue.claim_operations(
            c, OperationKind.TRASH, token=token, worker="w", limit=9, lease=lease, now=site.now
        )
    )
    assert site.context.transact(quiet_for) == [False, True, False]


def test_a_copy_that_ends_its_workers_is_given_up(site):
    """After the last try its replica is no longer on its way, the storage is left alone for an
    hour, and the run tells of it; the copies of others are made."""
    site.add_item("x", b"deadly", "a")
    site.add_item("y", b"harmless", "a")
    site.execute("UPDATE data_item SET target_phase = 'SOLID'")
    plan_replication(site.context)
    tries = site.context.settings.max_attempts
    site.execute(
        """UPDATE operation SET state = 'RUNNING', attempts = :n, worker = 'w', lease_token = :t,
                  lease_until = :now
            WHERE oid = (SELECT oid FROM data_item WHERE uri LIKE '%x')""",
        n=tries, t=new_id(), now=site.now,
    )  # fmt: skip
    site.advance(seconds=1)
    report = drain(site.context, {OperationKind.COPY: ALL[OperationKind.COPY]})
    assert dict(report.failed) == {"DLM-600": 1}
    assert dict(report.done) == {"copy": 1}
    copies = site.query(
        """SELECT i.uri, r.state, r.excluded_until FROM replica r JOIN data_item i USING (oid)
            WHERE storage_id = :s ORDER BY uri""",
        s=site.storages["b"],
    )
    assert [row["state"] for row in copies] == ["MISSING", "READY"]
    assert copies[0]["excluded_until"] > site.now
    site.advance(hours=2)
    plan_replication(site.context)
    drain(site.context, {OperationKind.COPY: ALL[OperationKind.COPY]})
    assert site.query("SELECT count(*) AS n FROM replica WHERE state = 'READY'")[0]["n"] == 4


def test_waiting_is_no_try_that_a_lost_worker_could_end(site):
    """A purge waits for a hold, look after look; then one worker is lost: it comes due again."""
    two_items(site)
    let_b_go(site)
    site.settle()
    site.context.transact(
        lambda c: insert_hold(
            c, Target(everything=True), reason="evidence", actor="user:test", now=site.now
        )
    )
    for _ in range(site.context.settings.max_attempts + 1):
        site.advance(hours=2)
        site.work(OperationKind.PURGE)
    purges = "SELECT state, attempts FROM operation WHERE kind = 'purge'"
    assert {(row["state"], row["attempts"]) for row in site.query(purges)} == {("QUEUED", 0)}
    site.advance(hours=2)
    site.context.transact(
        lambda c: queue.claim_operations(
            c, OperationKind.PURGE, token=new_id(), worker="w", limit=9,
            lease=timedelta(minutes=5), now=site.now,
        )
    )  # fmt: skip
    site.advance(hours=2)
    site.work(OperationKind.PURGE)
    assert {row["state"] for row in site.query(purges)} == {"QUEUED"}
