"""Holds and retention locks, as the database itself keeps them: plain SQL, as with psql."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from dlm_core.catalogue.engine import rows, run
from dlm_core.types import new_id
from tests.schema.rules import (
    NOW,
    add_item,
    certify,
    insert,
    ready_item,
    refusal,
    set_clock,
    set_item,
    set_replica,
)

#: before any machine's clock: a lock looks at the server's own, too
PAST = datetime(2020, 1, 1, tzinfo=UTC)
FOREVER = datetime(2199, 1, 1, tzinfo=UTC)


@pytest.fixture
def db(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        set_clock(connection)
        yield connection


def _hold(db: Connection, **values: Any) -> Any:
    hold_id = new_id()
    row = {"reason": "audit", "actor": "user:a", "created_at": PAST}
    insert(db, "hold", hold_id=hold_id, **(row | values))
    return hold_id


@pytest.mark.parametrize(
    ("selector", "held"),
    [
        ({"uri_prefix": "test:a/"}, {"test:a/1", "test:a/x.fits"}),
        ({"uri_prefix": "test:a/", "uri_pattern": "test:a/%.fits"}, {"test:a/x.fits"}),
        ({"uri_prefix": "test:a/1"}, {"test:a/1"}),
        ({"everything": True}, {"test:a/1", "test:a/x.fits", "test:b/x.fits"}),
        ({"uri_prefix": "other:"}, set()),
    ],
)
def test_a_selector_holds_what_it_matches_also_what_comes_later(
    db: Connection, selector: dict[str, Any], held: set[str]
) -> None:
    """Prefix, pattern and everything: the hold is there before the items are."""
    _hold(db, **selector)
    found = set()
    for uri in ("test:a/1", "test:a/x.fits", "test:b/x.fits"):
        oid, _ = ready_item(db, 1, uri=uri)
        if "under a hold" in refusal(db, set_item, oid, "EXPIRED"):
            found.add(uri)
    assert found == held


def test_a_hold_forbids_until_it_ends_and_not_longer(db: Connection) -> None:
    """Nothing runs when a hold ends: the clock alone frees the item."""
    oid, _ = ready_item(db, 1)
    _hold(db, oid=oid, ends_at=NOW + timedelta(hours=1))
    set_clock(db, NOW + timedelta(minutes=59))
    assert "under a hold" in refusal(db, set_item, oid, "EXPIRED")
    set_clock(db, NOW + timedelta(hours=1))
    assert refusal(db, set_item, oid, "EXPIRED") == ""


@pytest.mark.parametrize(
    "change",
    [
        "ends_at = ends_at - interval '1 second'",
        "ends_at = created_at",
        "ends_at = NULL, locked = false",
        "locked = false",
        "uri_prefix = 'test:b/'",
        "uri_pattern = 'test:a/never'",
        "everything = true, uri_prefix = NULL",
        "created_at = created_at - interval '1 day'",
    ],
)
def test_a_lock_cannot_be_shortened_or_turned_aside(db: Connection, change: str) -> None:
    """Neither its end, its being a lock nor what it matches can be changed away, with psql."""
    _hold(db, uri_prefix="test:a/", ends_at=FOREVER, locked=True)
    assert refusal(db, run, f"UPDATE hold SET {change}") != ""
    assert "never changed or removed" in refusal(db, run, "DELETE FROM hold")
    assert refusal(db, run, "TRUNCATE hold") != ""
    assert refusal(db, run, "UPDATE hold SET ends_at = ends_at + interval '1 day'") == ""


def test_a_lock_needs_an_end_and_a_hold_becomes_one_for_good(db: Connection) -> None:
    """A lock without end is refused; a hold that was made a lock stays one."""
    assert refusal(db, _hold, uri_prefix="test:", locked=True) != ""
    _hold(db, uri_prefix="test:", ends_at=FOREVER)
    run(db, "UPDATE hold SET locked = true")
    assert "can only be lengthened" in refusal(db, run, "UPDATE hold SET locked = false")


def test_a_lock_does_not_end_by_a_clock_that_was_put_forward(db: Connection) -> None:
    """dlm.now is anybody's to set; a lock looks at the server's own clock as well."""
    oid, _ = ready_item(db, 1)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    _hold(db, oid=oid, ends_at=tomorrow, locked=True)
    set_clock(db, tomorrow + timedelta(days=1))
    assert "under a hold" in refusal(db, set_item, oid, "EXPIRED")


def test_a_lock_ends_when_its_time_is_over(db: Connection) -> None:
    """And then it forbids nothing any more."""
    oid, _ = ready_item(db, 1, created_at=PAST)
    _hold(db, oid=oid, ends_at=PAST + timedelta(days=1), locked=True)
    set_clock(db, PAST + timedelta(hours=23))
    assert "under a hold" in refusal(db, set_item, oid, "EXPIRED")
    set_clock(db, PAST + timedelta(days=1))
    assert refusal(db, set_item, oid, "EXPIRED") == ""


def test_nothing_leaves_a_locked_collection(db: Connection) -> None:
    """Taking an item, or a collection below, out of what is locked would be a way round."""
    outer, inner = new_id(), new_id()
    insert(db, "collection", collection_id=outer, name="outer")
    insert(db, "collection", collection_id=inner, name="inner", parent_id=outer)
    oid = add_item(db, collection_id=inner)
    plain = _hold(db, collection_id=outer, ends_at=FOREVER)
    leave = "UPDATE data_item SET collection_id = NULL WHERE oid = :oid"
    assert refusal(db, run, leave, oid=oid) == ""
    run(db, "UPDATE hold SET locked = true WHERE hold_id = :id", id=plain)
    assert "retention lock" in refusal(db, run, leave, oid=oid)
    moved = refusal(db, run, "UPDATE collection SET parent_id = NULL WHERE parent_id IS NOT NULL")
    assert "retention lock" in moved


def test_no_certificate_is_written_for_what_is_held(db: Connection) -> None:
    """A hold that comes while the copy lies in the trash stops the purge, in every partition."""
    oid, (uid, _) = ready_item(db)
    set_replica(db, uid, "TRASHED")
    _hold(db, oid=oid)
    assert "under a hold" in refusal(db, certify, uid, "purge")
    (month,) = rows(db, "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYYMM') AS name")
    direct = f"""INSERT INTO deletion_{month["name"]} SELECT uuid7_floor(clock_timestamp()),
                'purge', basis, uid, oid, storage_id, 'TRASHED', survivors, survivor_weight,
                target_phase, holds_examined, reason, plan_id, actor, proved_at, valid_until
                FROM deletion"""
    assert "under a hold" in refusal(db, run, direct)
    unruled = """SELECT inhrelid::regclass::text AS name FROM pg_inherits
                  WHERE inhparent = 'deletion'::regclass AND 2 <> (
                    SELECT count(*) FROM pg_trigger WHERE tgrelid = inhrelid AND tgfoid IN (
                      'deletion_of_unheld'::regproc, 'deletion_after_recovery'::regproc))"""
    assert rows(db, unruled) == []


def test_many_holds_on_other_items_cost_nothing(db: Connection) -> None:
    """A look at 500 items among 20,000 holds of every kind takes the indexes."""
    run(
        db,
        """INSERT INTO hold (hold_id, uri_prefix, reason, actor, created_at)
           SELECT gen_random_uuid(), 'test:held-' || n || '/', 'r', 'a', :past
             FROM generate_series(1, 20000) n""",
        past=PAST,
    )
    for _ in range(20):
        add_item(db)
    run(db, "ANALYZE hold")
    read = """SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) AS n
                FROM pg_stat_xact_user_tables WHERE relname = 'hold'"""
    (before,) = rows(db, read)
    question = """SELECT count(*) AS n FROM data_item i, generate_series(1, 25),
                         LATERAL holds_on(i.oid, i.uri, i.collection_id)"""
    assert rows(db, question) == [{"n": 0}]
    (after,) = rows(db, read)
    assert after["n"] - before["n"] <= 500  # and not 500 × 20,000
