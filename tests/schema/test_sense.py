"""What makes no sense is refused whoever writes it (revisions 0016 to 0018)."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from tests.schema.rules import (
    NOW,
    add_item,
    add_replica,
    add_storage,
    certify,
    ready_item,
    refusal,
    set_item,
    set_replica,
)

YEARS = timedelta(days=3 * 365)


def commit(connection: Connection, *_: object) -> None:
    """What is looked at when a transaction ends."""
    run(connection, "SET CONSTRAINTS ALL IMMEDIATE")


def test_an_item_is_not_ready_without_a_copy(db: Connection) -> None:
    """With none, or with one that was only announced, the transaction cannot end."""
    oid = add_item(db)
    add_replica(db, oid, add_storage(db))
    set_item(db, oid, "READY")
    assert "no copy of it was read and matched" in refusal(db, commit)


@pytest.mark.parametrize("state", ["READY", "SUSPECT"])
def test_a_copy_that_was_read_or_waits_for_its_look_makes_an_item_ready(
    db: Connection, state: str
) -> None:
    """The order within the transaction does not matter."""
    oid = add_item(db)
    set_item(db, oid, "READY")
    uid = add_replica(db, oid, add_storage(db))
    for step in ("READY", state) if state != "READY" else ("READY",):
        set_replica(db, uid, step)
    assert refusal(db, commit) == ""


def test_an_expired_or_corrupted_item_does_not_come_back_without_a_copy(db: Connection) -> None:
    """Neither from the trash nor from having been given up."""
    for state in ("EXPIRED", "CORRUPTED"):
        run(db, "SET CONSTRAINTS ALL DEFERRED")
        oid, (uid,) = ready_item(db, 1)
        commit(db)
        for step in ("SUSPECT", "CORRUPTED"):
            set_replica(db, uid, step)
        set_item(db, oid, state)
        run(db, "SET CONSTRAINTS ALL DEFERRED")
        set_item(db, oid, "READY")
        assert "no copy of it" in refusal(db, commit), state
        set_replica(db, uid, "SUSPECT")
        assert refusal(db, commit) == "", state


def test_an_item_that_left_in_the_same_transaction_needs_no_copy(db: Connection) -> None:
    """Only what it is at the end counts."""
    oid = add_item(db)
    for state in ("READY", "CORRUPTED"):
        set_item(db, oid, state)
    assert refusal(db, commit) == ""


def test_a_copy_of_an_item_that_was_not_let_in_is_not_ready(db: Connection) -> None:
    """A digest that was announced is a claim."""
    uid = add_replica(db, add_item(db), add_storage(db))
    assert "cannot be READY" in refusal(db, set_replica, uid, "READY")


@pytest.mark.parametrize("column", ["checked_at", "told_at", "accessed_at", "trashed_at"])
def test_nothing_was_looked_at_in_the_future(db: Connection, column: str) -> None:
    """An hour is the clocks' own; more is refused, and a row that has it already may be mended."""
    _, (uid, _) = ready_item(db)
    if column == "trashed_at":
        set_replica(db, uid, "TRASHED")
    change = f"UPDATE replica SET {column} = :at WHERE uid = :uid"
    assert refusal(db, run, change, at=NOW + timedelta(minutes=50), uid=uid) == ""
    assert "in the future" in refusal(db, run, change, at=NOW + YEARS, uid=uid)


def test_nothing_is_announced_in_the_future(db: Connection) -> None:
    """Neither an item nor a replica."""
    assert "in the future" in refusal(db, add_item, created_at=NOW + YEARS)
    oid, storage = add_item(db), add_storage(db)
    for column in ("created_at", "accessed_at"):
        assert "in the future" in refusal(db, add_replica, oid, storage, **{column: NOW + YEARS})


def test_a_row_from_the_future_that_is_there_already_can_still_be_changed(db: Connection) -> None:
    """A clock that was off before this rule came does not stop what becomes of its rows."""
    _, (uid, _) = ready_item(db)
    run(db, "ALTER TABLE replica DISABLE TRIGGER replica_updated")
    run(db, "UPDATE replica SET checked_at = :at WHERE uid = :uid", at=NOW + YEARS, uid=uid)
    run(db, "ALTER TABLE replica ENABLE TRIGGER replica_updated")
    assert refusal(db, run, "UPDATE replica SET expires_at = NULL WHERE uid = :uid", uid=uid) == ""
    assert refusal(db, set_replica, uid, "SUSPECT") == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"proved_at": NOW + YEARS, "valid_until": NOW + YEARS + timedelta(hours=1)},
        {"valid_until": NOW + timedelta(days=8)},
    ],
)
def test_a_certificate_is_of_now_and_runs_out(db: Connection, wrong: dict[str, object]) -> None:
    """One that was proved in the future, or holds for ever, is none."""
    _, (uid, _) = ready_item(db)
    assert "a certificate is of now" in refusal(db, certify, uid, "trash", **wrong)
    assert refusal(db, certify, uid, "trash", valid_until=NOW + timedelta(days=6)) == ""


@pytest.mark.parametrize("mtime", ["NaN", "Infinity", "-Infinity"])
def test_a_time_of_change_is_a_number(db: Connection, mtime: str) -> None:
    """NaN would be equal to itself, and infinity later than any."""
    uid = add_replica(db, add_item(db), add_storage(db))
    change = "UPDATE replica SET mtime = CAST(:m AS float8) WHERE uid = :uid"
    assert "replica_mtime_check" in refusal(db, run, change, m=mtime, uid=uid)
    assert refusal(db, run, change, m="-1.5", uid=uid) == ""


def test_a_posix_root_is_absolute(db: Connection) -> None:
    """A relative one would be another folder for each process."""
    assert "storage_root_absolute" in refusal(db, add_storage, root="data/archive")
    bucket = {"root": "archive/data", "interface": "s3", "class": "object"}
    assert refusal(db, add_storage, **bucket) == ""


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM state_transition",
        "TRUNCATE state_transition",
        "INSERT INTO state_transition VALUES ('replica', 'DELETED', 'READY')",
        "UPDATE state_transition SET new_state = 'READY' WHERE old_state = 'PENDING'",
    ],
)
def test_the_rules_of_states_are_not_changed_by_the_way(db: Connection, change: str) -> None:
    """Only a migration does, which says so."""
    before = rows(db, "SELECT count(*) AS n FROM state_transition")
    assert "rows here are never changed" in refusal(db, run, change)
    assert rows(db, "SELECT count(*) AS n FROM state_transition") == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"noun": "item", "act": "READY"},
        {"noun": "storage", "act": "retired"},
        {"noun": "replica", "act": "created"},
        {"noun": "replica", "act": "refused", "new_state": "READY"},
        {"noun": "audit", "act": "x", "old_state": "READY"},
    ],
)
def test_an_event_is_told_by_what_changed(db: Connection, wrong: dict[str, str]) -> None:
    """By hand nobody adds one that says so, into a partition neither; what our own code tells by
    itself changes no state."""
    told = """INSERT INTO {} (at, noun, action, old_state, new_state, actor)
              VALUES (CAST(:at AS timestamptz), :noun, :act, :old_state, :new_state, 'a')"""
    stateless = {"old_state": None, "new_state": None}
    for table, at in (("event", NOW), ("event_default", NOW + 50 * YEARS)):
        assert "not by hand" in refusal(db, run, told.format(table), at=at, **stateless | wrong)
        right = stateless | {"noun": "audit", "act": "note"}
        assert refusal(db, run, told.format(table), at=at, **right) == ""


@pytest.mark.parametrize(
    "wrong",
    ["at = clock_timestamp() - interval '2 hours'", "at = '2199-12-31Z'", "xid = '3'",
     "seq = (SELECT last_value FROM event_seq) + 1"],
)  # fmt: skip
def test_an_event_by_hand_is_of_now(db: Connection, wrong: str) -> None:
    """One that comes before or behind all others would be skipped by a reader, or stop it."""
    run(
        db,
        "CREATE OR REPLACE FUNCTION dlm_is_simulation() RETURNS boolean "
        "LANGUAGE sql IMMUTABLE AS 'SELECT false'",
    )
    column, _, value = wrong.partition(" = ")
    told = "INSERT INTO event (noun, action, actor{}) VALUES ('audit', 'note', 'a'{})"
    assert "is of now" in refusal(db, run, told.format(f", {column}", f", {value}"))
    assert refusal(db, run, told.format("", "")) == ""


def test_a_place_is_not_excluded_for_years(db: Connection) -> None:
    """No copy would be made there, and nobody be told."""
    _, (uid, _) = ready_item(db)
    change = "UPDATE replica SET excluded_until = :at WHERE uid = :uid"
    assert refusal(db, run, change, at=NOW + timedelta(days=7), uid=uid) == ""
    assert "30 days at most" in refusal(db, run, change, at=NOW + YEARS, uid=uid)


@pytest.mark.parametrize("column", ["owner", "content_type"])
@pytest.mark.parametrize("value", ["", "a\nb", "a\x1b[2Jb", "a\x7f"])
def test_texts_can_be_shown_on_a_line(db: Connection, column: str, value: str) -> None:
    """An empty one means nothing; escapes would be played by terminals."""
    assert f"{column}_told" in refusal(db, add_item, **{column: value})
    assert refusal(db, add_item, **{column: "text/plain; charset=utf-8"}) == ""


@pytest.mark.parametrize("state", ["EXPIRED", "DELETED"])
@pytest.mark.parametrize("at", [NOW + timedelta(days=30), None])
def test_what_has_expired_gets_no_other_time(db: Connection, state: str, at: object) -> None:
    """Its copies go all the same; only what is restored gets one."""
    oid = ready_item(db)[0] if state == "EXPIRED" else add_item(db)
    run(db, "UPDATE data_item SET expires_at = :now WHERE oid = :oid", now=NOW, oid=oid)
    set_item(db, oid, state)
    wanted = "UPDATE data_item SET expires_at = :at WHERE oid = :oid"
    assert "its time of expiry is over" in refusal(db, run, wanted, at=at, oid=oid)
    assert refusal(db, run, wanted, at=NOW, oid=oid) == ""
