"""Scheduled verification: what is read again, in which order, how much, and what comes of it."""

from __future__ import annotations

import io
import json
import random
import threading
import time
from datetime import timedelta

import pytest

from dlm_core.catalogue import checks
from dlm_core.errors import AccessDeniedError, StorageUnavailableError
from dlm_core.lifecycle import verify as verifying
from dlm_core.lifecycle.check import plan_verification, propose_verification, within_budget
from dlm_core.lifecycle.ingest import init_data_item, set_uri
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import _open_row
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind
from tests.backends import s3_config
from tests.fakes import Hooked
from tests.site import make_site, reopen

DAY = timedelta(days=1)


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path, max_drainers=1)
    for name in "ab":
        site.add_storage(name, name.upper())
    return site


def add(site, path, data=b"12345", on="a", target="LIQUID"):
    return site.add_item(path, data, on, target_phase=target)


def verify(site):
    return site.work(OperationKind.VERIFY, plan=plan_verification)


def checked(site, oid, storage="a"):
    return site.replica(oid, storage)["checked_at"]


def reads(site, note):
    """Call ``note(path)`` for every payload that is read from now on."""

    def hook(call, path):
        if call == "open_read":
            note(path)

    reopen(site, lambda row: Hooked(_open_row(row), hook))


def test_what_was_not_read_for_its_interval_is_read_again(site):
    """After 90 days, or what the storage says; not before, and then not again at once."""
    old = add(site, "old")
    site.set_storage("b", verify_every_days=10)
    other = add(site, "other", on="b")
    site.advance(days=11)
    assert verify(site).done == {"verify": 1}
    assert checked(site, other, "b") == site.now
    site.set_storage("b", verify_every_days=None)
    site.advance(days=80)
    young = add(site, "young")
    assert verify(site).done == {"verify": 1}
    assert checked(site, old) == site.now
    assert verify(site).total == 0
    assert checked(site, young) == site.now


def test_what_cannot_be_checked_is_put_off(site):
    """A missing copy and an announcement that was never let in come due once an interval, cost one
    question, and hold nothing up."""
    site.set_storage("b", verify_every_days=None)
    good, gone = add(site, "good"), add(site, "gone")
    site.execute("UPDATE replica SET state = 'MISSING' WHERE oid = :oid", oid=gone)
    announced = init_data_item(site.context, "test:announced")
    set_uri(site.context, announced, "a", "announced")

    def due():
        return site.context.transact(lambda c: checks.storages_with_checks_due(c, site.now))

    for _ in range(2):
        site.advance(days=89)
        assert due() == []
        site.advance(days=2)
        assert due() == ["a"]
        assert verify(site).done == {"verify": 1}
        assert due() == [] and checked(site, good) == site.now


def test_what_takes_long_is_written_before_all_is_read(site, monkeypatch):
    """Else a look at the first of many large copies would be told of when the last was read, as if
    it had been taken then."""
    monkeypatch.setattr(verifying, "_SOON", 0)
    site.set_storage("a", concurrency=1)
    monkeypatch.setattr(verifying, "_GROUP", 1)
    first = add(site, "1-first")
    for n in range(2, 9):
        add(site, f"{n}")
    site.advance(days=91)
    seen = []

    def note(path):
        if path == "8":
            end = time.monotonic() + 60
            while checked(site, first) != site.now and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(checked(site, first))

    reads(site, note)
    assert verify(site).done == {"verify": 8}
    assert seen == [site.now]


def test_the_riskiest_come_first(site):
    """Fewest good copies, then cheap media, then the oldest look."""
    site.set_storage("b", **{"class": "tape"})
    paths = ("two-copies", "one-old", "one-young")
    add(site, "two-copies", target="SOLID")
    site.work(OperationKind.COPY, plan=plan_replication)
    site.advance(minutes=1)
    add(site, "one-old")
    add(site, "on-tape", on="b")
    site.advance(minutes=1)
    add(site, "one-young")
    site.advance(days=91)
    order = []
    reads(site, order.append)
    for name in "ab":
        site.set_storage(name, concurrency=1)
    assert plan_verification(site.context) == 5
    while site.work(OperationKind.VERIFY).total:
        pass
    planned = site.query(
        """SELECT i.uri, s.name FROM operation o JOIN replica r USING (uid) JOIN data_item i
             ON i.oid = r.oid JOIN storage s USING (storage_id) WHERE o.kind = 'verify'
            ORDER BY o.priority, r.checked_at, o.operation_id"""
    )
    assert [(p["uri"][5:], p["name"]) for p in planned][:3] == [
        ("one-old", "a"), ("one-young", "a"), ("on-tape", "b"),
    ]  # fmt: skip
    on_a = [path for path in order if path in paths]
    assert on_a[0] == "one-old" and on_a.index("one-young") < len(on_a) - 1


def test_a_day_reads_what_it_may_and_the_next_goes_on(site):
    """Twelve bytes a day are two payloads of five; the day is one of UTC."""
    site.set_storage("a", verify_bytes_per_day=12)
    for n in range(5):
        add(site, f"{n}")
    site.advance(days=91, hours=20)
    assert verify(site).done == {"verify": 2}
    site.advance(hours=3)
    assert verify(site).total == 0
    site.advance(hours=2)
    assert verify(site).done == {"verify": 2}
    assert site.context.transact(lambda c: checks.storages_with_checks_due(c, site.now)) == []
    site.advance(days=1)
    assert verify(site).done == {"verify": 1}


def test_what_is_larger_than_a_day_has_a_day_of_its_own(site):
    """Else it would never be read."""
    site.set_storage("a", verify_bytes_per_day=3)
    add(site, "large")
    site.advance(days=91)
    assert verify(site).done == {"verify": 1}


def test_no_budget_is_exceeded_and_nothing_starves():
    """Whatever is due: within the day's rest, in order, and something as long as a day is fresh."""
    chance = random.Random(7)
    for _ in range(2000):
        due = [
            checks.Check(None, None, chance.choice([0, 1, 10, 100, 10**9]), 1, None)
            for _ in range(chance.randrange(6))
        ]
        left = chance.choice([None, 0, 5, 50, 10**10])
        per_second = chance.choice([None, 1, 10**6])
        fresh = chance.random() < 0.5
        budget = checks.Budget(None, "a", "disk", DAY, per_second, left, fresh)
        chosen = within_budget(due, budget)
        assert chosen == due[: len(chosen)]
        if len(chosen) > 1:
            assert left is None or sum(c.size for c in chosen) <= left
            assert per_second is None or sum(c.size for c in chosen) <= per_second * 600
        if due and (fresh or left is None):
            assert chosen


def test_reading_keeps_the_pace_that_the_storage_allows(site):
    """Four payloads of 50 kB at 200 kB/s take a second, though four threads read."""
    for n in range(4):
        add(site, f"{n}", random.Random(n).randbytes(50_000))
    site.set_storage("a", verify_bytes_per_second=200_000)
    site.advance(days=91)
    begun = time.monotonic()
    assert verify(site).done == {"verify": 4}
    assert 0.9 < time.monotonic() - begun < 60


def test_a_wait_for_the_pace_ends_when_the_drainer_is_stopped(site):
    """The work is given back, untouched."""
    add(site, "large", bytes(1_000_000))
    site.set_storage("a", verify_bytes_per_second=1000)
    site.advance(days=91)
    reads(site, lambda _: threading.Timer(0.5, site.context.stop.set).start())
    begun = time.monotonic()
    assert verify(site).total == 0
    assert time.monotonic() - begun < 60
    assert site.query("SELECT state FROM operation") == [{"state": "QUEUED"}]


def test_damage_is_found_set_aside_and_repaired_without_anybody_asking(site):
    """SUSPECT, CORRUPTED after a second look, kept in quarantine, made again from the good copy;
    the report tells how long it lay unnoticed at most."""
    oid = add(site, "x", target="SOLID")
    site.work(OperationKind.COPY, plan=plan_replication)
    (site.folder / "a" / "x").write_bytes(b"1234X")
    site.advance(days=91)
    assert verify(site).done == {"verify": 3}
    assert site.replicas(oid) == {"a": "CORRUPTED", "b": "READY"}
    assert len(site.private("a", "quarantine")) == 1
    site.work(OperationKind.COPY, plan=plan_replication)
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    assert site.visible("a") == {"x": b"12345"}
    (found,) = report(site)["findings"]
    told = [found[key] for key in ("doubted", "damaged", "false_alarms", "open")]
    assert told == [1, 1, 0, 0]
    assert found["detect_max_seconds"] == 91 * 86400
    assert 0 < found["repair_max_seconds"] < 60


def test_a_read_that_differs_once_is_a_false_alarm(site):
    """The second look finds the bytes as they should be."""
    oid = add(site, "x")
    site.advance(days=91)
    file = site.folder / "a" / "x"
    file.write_bytes(b"1234X")
    plan_verification(site.context)
    looks = []

    def mend(path):
        looks.append(path)
        if len(looks) == 2:
            file.write_bytes(b"12345")

    reads(site, mend)
    verify(site)
    assert site.replicas(oid) == {"a": "READY"}
    (found,) = report(site)["findings"]
    assert (found["damaged"], found["false_alarms"], found["open"]) == (0, 1, 0)


def test_what_cannot_be_read_is_not_planned_again_and_again(site):
    """A denied access is FAILED and visible; the next try is a day later."""

    def deny(path):
        raise AccessDeniedError(storage="a", path=path, message="no")

    add(site, "x")
    site.advance(days=91)
    reads(site, deny)
    assert sum(verify(site).failed.values()) == 1
    assert plan_verification(site.context) == 0
    site.advance(days=1, minutes=1)
    assert plan_verification(site.context) == 1


def test_storages_that_may_not_be_read_are_left_alone(site):
    """Offline: nothing is planned, and the sensor has nothing to ask for."""
    add(site, "x")
    site.advance(days=91)
    site.set_storage("a", mode="offline")
    assert plan_verification(site.context) == 0
    site.set_storage("a", mode="read_only")
    due = site.context.transact(lambda c: checks.storages_with_checks_due(c, site.now))
    assert due == ["a"]


def test_a_dry_run_shows_what_would_be_read(site):
    """And plans nothing."""
    oid = add(site, "x")
    site.advance(days=91)
    assert [(c.oid, c.copies) for c in propose_verification(site.context)] == [(oid, 1)]
    assert site.query("SELECT FROM operation") == []


def report(site, days=365):
    return site.context.transact(lambda c: checks.verification_report(c, site.now, days))


def test_the_report_tells_shares_and_the_oldest_look(site):
    """By storage and by collection, within the days asked for."""
    add(site, "old")
    first = site.now
    site.advance(days=20)
    for n in range(3):
        add(site, f"{n}")
    site.advance(days=5)
    found = report(site, 10)
    a, b = found["storages"]
    assert (a["replicas"], a["read"], a["read_fraction"], a["oldest_read"]) == (4, 3, 0.75, first)
    assert b["replicas"] == 0 and b["oldest"] is None
    assert [(c["collection"], c["read_fraction"]) for c in found["collections"]] == [("", 0.75)]


# --- storages that can tell -----------------------------------------------------------------------


@pytest.fixture
def buckets(engine, tmp_path, s3):
    """A disk and a bucket of a real S3 server, each item with a copy on both."""
    site = make_site(engine, tmp_path, max_drainers=1)
    site.add_storage("a", "A")
    root = f"{s3.bucket}/{tmp_path.name}-{random.randrange(10**9)}"
    site.add_storage("bucket", "B")
    site.execute(
        """UPDATE storage SET interface = 's3', class = 'object', root = :root,
                  config = CAST(:config AS jsonb) WHERE name = 'bucket'""",
        root=root,
        config=json.dumps(s3_config(s3)),
    )
    site.set_storage("a", verify_every_days=None)
    return site


def bucket_reads(site):
    """Paths read from the bucket from now on."""
    found = []

    def opener(row):
        def hook(call, path):
            if call == "open_read" and row["name"] == "bucket":
                found.append(path)

        return Hooked(open_storage(row["name"], row["interface"], row["root"], row["config"]), hook)

    reopen(site, opener)
    return found


def both(site, path="x"):
    oid = site.add_item(path, b"12345", "a")
    site.work(OperationKind.COPY, plan=plan_replication)
    assert site.replicas(oid) == {"a": "READY", "bucket": "READY"}
    return oid


def look_at_disk(site, oid):
    site.context.transact(
        lambda c: request_verification(
            c, actor="t", now=site.now, oid=oid, storage_id=site.storages["a"]
        )
    )
    site.work(OperationKind.VERIFY)


def test_a_storage_that_can_tell_is_asked_before_it_is_read(buckets):
    """Read the first time, then told while the other copy's last read is fresh; that is no check:
    the time of the last reading stays, and after four intervals it is read again."""
    oid, found, history = both(buckets), bucket_reads(buckets), []
    begun = buckets.now
    for _ in range(6):
        buckets.advance(days=91)
        look_at_disk(buckets, oid)
        before = len(found)
        assert verify(buckets).done == {"verify": 1}
        history.append("read" if len(found) > before else "told")
    assert history == ["read", "told", "told", "told", "read", "told"]
    replica = buckets.replica(oid, "bucket")
    assert replica["checked_at"] == begun + 5 * 91 * DAY
    assert replica["told_at"] == begun + 6 * 91 * DAY
    (_, row) = report(buckets, 10)["storages"]
    assert (row["read"], row["read_or_told"]) == (0, 1)


def test_the_last_good_copy_is_always_read(buckets):
    """Whatever the storage tells: no other copy that was read of late, no trust."""
    oid, found = both(buckets), bucket_reads(buckets)
    for times in (1, 2, 3):
        buckets.advance(days=91)
        verify(buckets)
        assert len(found) == times
    buckets.execute("UPDATE replica SET state = 'MISSING' WHERE storage_id = :s",
                    s=buckets.storages["a"])  # fmt: skip
    buckets.advance(days=91)
    verify(buckets)
    assert len(found) == 4 and buckets.replica(oid, "bucket")["told_at"] is None


def test_another_word_leads_to_a_read_that_finds_the_damage(buckets):
    """The object was replaced: its ETag differs, it is read, and it is SUSPECT then CORRUPTED."""
    oid, found = both(buckets), bucket_reads(buckets)
    buckets.advance(days=91)
    look_at_disk(buckets, oid)
    verify(buckets)
    rows = buckets.context.transact(buckets.context.storages.load)
    bucket = buckets.context.storages.open(rows[buckets.storages["bucket"]])
    path = buckets.replica(oid, "bucket")["path"]
    bucket.remove(path)
    bucket.write(path, io.BytesIO(b"1234X"), 5)
    buckets.advance(days=91)
    look_at_disk(buckets, oid)
    before = len(found)
    verify(buckets)
    # twice in its place, and once more where it is set aside
    assert found[before:][:2] == [path, path] and found[-1].startswith(".dlm/quarantine/")
    assert len(found) == before + 3
    assert buckets.replica(oid, "bucket")["state"] == "CORRUPTED"


def test_what_is_asked_for_in_words_is_read(buckets):
    """dlm verify means the bytes."""
    oid, found = both(buckets), bucket_reads(buckets)
    for times in (1, 2):
        buckets.context.transact(
            lambda c: request_verification(c, actor="t", now=buckets.now, oid=oid)
        )
        buckets.work(OperationKind.VERIFY)
        assert len(found) == times


def test_a_doubted_copy_whose_look_failed_is_looked_at_again_by_itself(site):
    """After an hour, then two, then four; nobody has to ask."""
    oid = add(site, "x")
    (site.folder / "a" / "x").write_bytes(b"1234X")
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    denied = [True]

    def deny(path):
        if denied and site.replicas(oid)["a"] == "SUSPECT":
            raise AccessDeniedError(storage="a", path=path, message="not you")

    reads(site, deny)
    verify(site)
    asked = "SELECT state, attempts FROM operation WHERE kind = 'verify' ORDER BY operation_id"
    assert site.replicas(oid)["a"] == "SUSPECT" and site.query(asked)[-1]["state"] == "FAILED"
    for tries, hours in ((2, 1), (3, 2), (4, 4)):
        site.advance(hours=hours, seconds=-1)
        assert verify(site).total == 0
        assert site.context.transact(lambda c: checks.count_failed_looks(c, site.now)) == 0
        site.advance(seconds=1)
        assert site.context.transact(lambda c: checks.count_failed_looks(c, site.now)) == 1
        assert verify(site).total == 1
        assert site.query(asked)[-1] == {"state": "FAILED", "attempts": tries}
    denied.clear()
    site.advance(hours=24)
    verify(site)
    assert site.replicas(oid)["a"] == "CORRUPTED"


def test_an_outage_of_a_storage_that_is_only_read_proves_nothing(site):
    """Nobody looks into its quarantine either: the copy stays READY and is asked for again."""
    oid = add(site, "x")
    site.set_storage("a", mode="read_only")
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )

    def fail(path):
        raise StorageUnavailableError(storage="a", message="no answer")

    reads(site, fail)
    assert site.work(OperationKind.VERIFY).retried == {"DLM-301": 1}
    assert site.replicas(oid)["a"] == "READY"


def test_a_doubt_outlasts_the_absence_of_its_storage(site):
    """The look at it waits while the storage is offline; else nobody would take it any more, and
    the only copy would be no copy for ever."""
    oid = add(site, "x")
    site.execute("UPDATE replica SET state = 'SUSPECT' WHERE oid = :o", o=oid)
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.set_storage("a", mode="offline")
    for _ in range(20):
        site.work(OperationKind.VERIFY)
        site.advance(hours=1)
    site.set_storage("a", mode="read_write")
    site.work(OperationKind.VERIFY)
    assert site.replica(oid, "a")["state"] == "READY"
