"""The queue of file work: who claims an operation holds it until its lease ends, and no longer."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from dlm_core.catalogue import operations as queue
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import Claim, Context, Report, done, drain
from dlm_core.types import OperationKind, OperationState, new_id
from tests.site import Site, make_site

_LEASE = timedelta(seconds=60)
_VERIFY = [OperationKind.VERIFY]


@pytest.fixture
def site(engine, tmp_path) -> Site:
    """Two checks are queued."""
    site = make_site(engine, tmp_path, batch_size=1)
    site.add_storage("a", "A")
    for name in "xy":
        site.add_item(name, b"good bytes", "a")
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))
    return site


def claim(
    connection: Connection,
    site: Site,
    token: uuid.UUID | None = None,
    limit: int = 9,
    share: queue.Share | None = None,
) -> list[dict[str, Any]]:
    return queue.claim_operations(
        connection,
        OperationKind.VERIFY,
        token=token or new_id(),
        worker="w",
        limit=limit,
        lease=_LEASE,
        now=site.now,
        share=share,
    )


def release_lost(site: Site, most: int = 8) -> int:
    return len(
        site.context.transact(lambda c: queue.release_expired_leases(c, _VERIFY, site.now, most))
    )


def test_what_one_claims_another_does_not_wait_for_nor_get(site):
    """While the first one's claim is not committed yet the second takes what is left, at once."""

    def second(connection: Connection) -> list[dict[str, Any]]:
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        return claim(connection, site)

    def first(connection: Connection) -> tuple[Any, Any]:
        mine = claim(connection, site, limit=1)
        return mine, site.context.transact(second)

    mine, others = site.context.transact(first)
    assert len(mine) == len(others) == 1
    assert mine[0]["operation_id"] != others[0]["operation_id"]


@pytest.mark.parametrize(
    ("few", "most", "claimed"), [(1, 1, 1), (1, 20, 1), (1, 21, 2), (2, 1, 2), (9, 1, 2)]
)
def test_a_claim_of_many_ends_when_it_has_enough_bytes(site, few, most, claimed):
    """Two payloads of ten bytes: a few are taken whatever their size, more only while they are
    small together; what is left is others'."""
    share = queue.Share(few, most, 100)
    found = site.context.transact(lambda c: claim(c, site, share=share))
    assert len(found) == claimed
    assert len(site.context.transact(lambda c: claim(c, site))) == 2 - claimed


def test_the_files_of_a_directory_count_too(site):
    """Directory payloads of many files fill a claim: each file is work, and costs memory."""
    for name in ("p", "q"):
        oid = site.add_item(name, b"some bytes", "a", kind="directory")
        site.execute(
            "INSERT INTO manifest_file (oid, path, size, digest) "
            "SELECT oid, n::text, 0, digest FROM data_item, generate_series(1, 3) n "
            "WHERE oid = :oid",
            oid=oid,
        )
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))
    share = queue.Share(few=9, bytes=2**40, files=5)
    found = site.context.transact(lambda c: claim(c, site, share=share))
    assert len(found) == 3
    found = site.context.transact(lambda c: claim(c, site, share=share))
    assert len(found) == 1


def test_a_lease_holds_until_its_end(site):
    """What somebody holds is neither given back nor claimed again."""
    assert len(site.context.transact(lambda c: claim(c, site))) == 2
    site.now += _LEASE
    assert release_lost(site) == 0
    assert site.context.transact(lambda c: claim(c, site)) == []


def test_a_lease_that_ran_out_is_given_to_another(site):
    """A lost worker's operations are due again, and what was lost is told."""
    site.context.transact(lambda c: claim(c, site))
    site.now += _LEASE + timedelta(microseconds=1)
    assert release_lost(site) == 2
    assert {one["attempts"] for one in site.context.transact(lambda c: claim(c, site))} == {2}
    assert {row["error_code"] for row in site.query("SELECT * FROM operation")} == {"DLM-600"}


def test_what_lost_its_worker_at_the_last_try_has_failed(site):
    """It may be the operation that ends its workers: it is not tried for ever, and says why."""
    for _ in range(3):
        site.context.transact(lambda c: claim(c, site, limit=1))
        site.now += _LEASE + timedelta(seconds=1)
        release_lost(site, most=2)
    states = site.query("SELECT state, attempts, error_code, finished_at FROM operation ORDER BY 1")
    assert [(row["state"], row["attempts"]) for row in states] == [("FAILED", 2), ("QUEUED", 1)]
    assert {row["error_code"] for row in states} == {"DLM-600"}
    assert [row["finished_at"] is not None for row in states] == [True, False]


@pytest.mark.parametrize(("fresh_first", "claims"), [(True, [2, 1, 1, 0]), (False, [1, 1, 2, 0])])
def test_what_lost_its_worker_twice_is_claimed_by_itself(site, fresh_first, claims):
    """Others end no more with what may be ending its workers."""
    for _ in range(2):
        assert len(site.context.transact(lambda c: claim(c, site))) == 2
        site.now += _LEASE + timedelta(seconds=1)
        release_lost(site)
    for name in "vw":
        site.add_item(name, b"good bytes", "a")
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))
    site.advance(days=2)
    site.execute(
        "UPDATE operation SET due_at = due_at + interval '1 day' WHERE (attempts = 0) = :later",
        later=not fresh_first,
    )
    found = [site.context.transact(lambda c: claim(c, site)) for _ in claims]
    assert [len(claimed) for claimed in found] == claims


@pytest.mark.parametrize("state", [OperationState.DONE, OperationState.FAILED])
def test_who_lost_its_lease_writes_nothing(site, state):
    """What another holds by now is neither locked nor finished nor given back by who had it."""
    lost, held = new_id(), new_id()
    ids = [one["operation_id"] for one in site.context.transact(lambda c: claim(c, site, lost))]
    site.advance(hours=1)
    release_lost(site)
    site.context.transact(lambda c: claim(c, site, held))
    outcomes = [queue.Outcome(one, state) for one in ids]

    def write(connection: Connection) -> list[Any]:
        return [
            queue.lock_claimed(connection, lost, ids),
            queue.finish_operations(connection, lost, outcomes, site.now),
            queue.release_operations(connection, lost, site.now),
            queue.extend_leases(connection, lost, site.now + _LEASE),
        ]

    assert site.context.transact(write) == [set(), 0, 0, 0]
    found = site.query("SELECT state, lease_token FROM operation")
    assert [(row["state"], row["lease_token"]) for row in found] == [("RUNNING", held)] * 2
    assert site.context.transact(lambda c: queue.lock_claimed(c, held, ids)) == set(ids)


def test_every_claim_has_a_token_of_its_own(site):
    """By it, and not by the worker's name, an operation is known to be held."""
    tokens = []

    def execute(context: Context, claim: Claim) -> Report:
        tokens.append(claim.token)
        outcomes = [done(one) for one in claim.operations]
        context.transact(
            lambda c: queue.finish_operations(c, claim.token, outcomes, context.clock())
        )
        report = Report()
        for one, outcome in zip(claim.operations, outcomes, strict=True):
            report.note(one, outcome, 0, 0.0)
        return report

    assert drain(site.context, {OperationKind.VERIFY: execute}).total == 2
    assert len(tokens) == len(set(tokens)) == 2


def test_what_failed_is_queued_again_once_for_each_replica(site):
    """Of several operations of a kind on it the newest, and none beside one that is queued: two
    workers would do the same at once."""

    def fail():
        site.execute(
            """UPDATE operation SET state = 'FAILED', error_code = 'DLM-302', finished_at = :now
                WHERE state = 'QUEUED'""",
            now=site.now,
        )

    def ask():
        return site.context.transact(
            lambda c: request_verification(c, actor="user:test", now=site.now)
        )

    def states():
        found = site.query("SELECT state FROM operation ORDER BY state")
        return [row["state"] for row in found]

    fail()
    assert ask() == 2
    fail()
    assert states() == ["FAILED"] * 4
    assert site.context.transact(lambda c: queue.retry_failed(c, site.now)) == 2
    assert states() == ["CANCELLED"] * 2 + ["QUEUED"] * 2
    fail()
    assert ask() == 2
    assert site.context.transact(lambda c: queue.retry_failed(c, site.now)) == 0
    assert states() == ["CANCELLED"] * 4 + ["QUEUED"] * 2


def test_what_failed_and_was_done_by_a_later_one_is_cancelled(engine, tmp_path):
    """A look that was made after all, a copy that another storage took instead; what
    is still wanted stays FAILED, and the log tells of each."""
    site = make_site(engine, tmp_path, max_attempts=1)
    site.add_storage("a", "A")
    site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    site.add_storage("b", "B")
    (tmp_path / "b").rename(tmp_path / "b-away")
    site.settle()

    def look():
        on_a = {"storage_id": site.storages["a"], "actor": "user:test", "now": site.now}
        site.context.transact(lambda c: request_verification(c, **on_a))
        site.work(OperationKind.VERIFY)

    (tmp_path / "a").rename(tmp_path / "a-away")
    look()
    (tmp_path / "a-away").rename(tmp_path / "a")

    def failed():
        found = site.query("SELECT kind FROM operation WHERE state = 'FAILED' ORDER BY kind")
        return [row["kind"] for row in found]

    def cancel():
        return site.context.transact(lambda c: queue.cancel_overtaken(c, site.now))

    assert failed() == ["copy", "verify"]
    assert cancel() == 0
    look()
    assert cancel() == 1 and failed() == ["copy"]
    site.add_storage("c", "C")
    site.advance(minutes=30)  # b is left alone for longer
    site.settle()
    assert cancel() == 1 and failed() == []
    told = site.query(
        "SELECT action FROM event WHERE noun = 'operation' AND new_state = 'CANCELLED' ORDER BY seq"
    )
    assert [one["action"] for one in told] == ["verify", "copy"]


def test_tries_end():
    """Each wait is at most twice as long as the last and none longer than the ceiling; after the
    last try there is none."""
    now = datetime(2026, 6, 1, tzinfo=UTC)
    backoff = queue.Backoff(10, 30, 4)
    for attempts, longest in ((1, 10), (2, 20), (3, 30)):
        due = backoff.next_due(attempts, now)
        assert due is not None
        assert longest / 2 <= (due - now).total_seconds() <= longest
    assert backoff.next_due(4, now) is None
