"""What is not so cannot be written, however it is put: certificates, places, times, seals."""

from __future__ import annotations

import json
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine

from dlm_core.catalogue import schema
from dlm_core.catalogue.engine import begin, make_engine, rows, run
from dlm_core.errors import CatalogueError
from dlm_core.types import encode_path, make_uri, new_id
from tests.schema.rules import (
    NOW,
    add_item,
    add_replica,
    add_storage,
    certify,
    insert,
    ready_item,
    refusal,
    set_item,
    set_replica,
)
from tests.sessions import until_it_waits

# --- certificates ---------------------------------------------------------------------------------


def survivor(uid: uuid.UUID) -> str:
    return json.dumps([{"uid": str(uid)}])


def test_a_certificate_names_what_is_so(db: Connection) -> None:
    """Of another item, storage or state, of an item that has not expired, with a survivor that is
    none: it is not written, and so nothing goes by it."""
    oid, (uid, other) = ready_item(db)
    stranger, (far, _) = ready_item(db)
    for wrong in (
        {"oid": stranger},
        {"storage_id": add_storage(db)},
        {"from_state": "SUSPECT"},
    ):
        told = _certificate(db, uid, **wrong)
        assert "tells of another replica" in refusal(db, insert, "deletion", **told), wrong
    found = refusal(db, certify, uid, "trash", basis="item_expired", survivors="[]")
    assert "its item has not expired" in found
    for none in (uid, far, new_id()):
        assert "is none" in refusal(db, certify, uid, "trash", survivors=survivor(none)), none
    assert refusal(db, certify, uid, "trash", survivors=survivor(other)) == ""
    _leave(db, other, oid)


def _certificate(db: Connection, uid: uuid.UUID, **values: Any) -> dict[str, Any]:
    found = rows(db, "SELECT * FROM replica WHERE uid = :uid", uid=uid)[0]
    others = rows(db, "SELECT uid FROM replica WHERE oid = :o AND uid <> :u", o=found["oid"], u=uid)
    return {
        "deletion_id": new_id(), "step": "trash", "basis": "replica_expired", "uid": uid,
        "oid": found["oid"], "storage_id": found["storage_id"], "from_state": found["state"],
        "survivors": survivor(others[0]["uid"]), "survivor_weight": 2, "target_phase": "LIQUID",
        "holds_examined": 0, "reason": "r", "actor": "a", "proved_at": NOW,
        "valid_until": NOW + timedelta(hours=1), **values,
    }  # fmt: skip


def _leave(db: Connection, other: uuid.UUID, oid: uuid.UUID) -> None:
    """A survivor that is leaving, or on a storage that is lost, is none either."""
    (uid,) = [
        row["uid"]
        for row in rows(db, "SELECT uid FROM replica WHERE oid = :o AND uid <> :u", o=oid, u=other)
    ]
    for change in (
        "UPDATE replica SET expires_at = :now WHERE uid = :uid",
        """UPDATE storage SET mode = 'lost' WHERE storage_id = (
             SELECT storage_id FROM replica WHERE uid = :uid) AND :now IS NOT NULL""",
    ):
        savepoint = db.begin_nested()
        run(db, change, uid=other, now=NOW)
        assert "is none" in refusal(db, certify, uid, "trash", survivors=survivor(other)), change
        savepoint.rollback()


def test_a_certificate_is_of_its_own_transaction(db: Connection) -> None:
    """One that names a later transaction would be good in that."""
    _, (uid, _) = ready_item(db)
    coming = rows(db, "SELECT (pg_current_xact_id()::text::bigint + 1)::text AS n")[0]["n"]
    told = _certificate(db, uid, xid=int(coming))
    columns = ", ".join(told)
    values = ", ".join("CAST(:xid AS text)::xid8" if key == "xid" else f":{key}" for key in told)
    statement = f"INSERT INTO deletion ({columns}) VALUES ({values})"
    found = refusal(db, run, statement, **(told | {"xid": coming}))
    assert "a certificate is of now" in found


def test_of_two_who_trash_one_copy_each_the_second_is_refused(engine: Engine) -> None:
    """Each sees the other's copy READY when it begins: together they would leave none."""
    with begin(engine, "test", NOW) as connection:
        oid, (one, two) = ready_item(connection)
    outcome: list[str] = []

    def trash(connection: Connection, uid: uuid.UUID) -> None:
        key = certify(connection, uid, "trash")
        change = "UPDATE replica SET state = 'TRASHED', deletion_id = :key WHERE uid = :uid"
        run(connection, change, key=key, uid=uid)

    def second() -> None:
        try:
            with begin(engine, "test", NOW) as connection:
                trash(connection, two)
        except CatalogueError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=second)
    with begin(engine, "test", NOW) as connection:
        trash(connection, one)
        thread.start()
        until_it_waits(engine, thread)
    thread.join(60)
    assert len(outcome) == 1 and "last good copy" in outcome[0]
    with begin(engine, "test", NOW) as connection:
        found = rows(connection, "SELECT state FROM replica WHERE oid = :o ORDER BY 1", o=oid)
    assert [row["state"] for row in found] == ["READY", "TRASHED"]


def test_what_was_read_is_not_forgotten(db: Connection) -> None:
    """A copy without digest or look could be withdrawn as one that was never let in."""
    _, (uid, _) = ready_item(db)
    for state in ("MISSING", "PENDING"):
        set_replica(db, uid, state)
    for column in ("digest", "checked_at"):
        change = f"UPDATE replica SET {column} = NULL WHERE uid = :uid"
        assert "nor forget what was read" in refusal(db, run, change, uid=uid), column


@pytest.mark.parametrize("simulated", [False, True])
def test_the_present_is_moved_by_an_hour_at_most(
    database_url: str, engine: Engine, simulated: bool
) -> None:
    """dlm.now is anybody's: it lets nothing expire that has years left, but in a database that was
    made for it."""
    if not simulated:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(
                "CREATE OR REPLACE FUNCTION dlm_is_simulation() RETURNS boolean "
                "LANGUAGE sql IMMUTABLE AS 'SELECT false'"
            )
    for year, beyond in (("2190", True), ("2001", False)):
        with begin(engine, "test", datetime.fromisoformat(f"{year}-01-01T00:00Z")) as connection:
            found = rows(connection, "SELECT dlm_now() - clock_timestamp() AS d")[0]["d"]
        moved = abs(found) > timedelta(minutes=61)
        assert moved is simulated and (found > timedelta()) is beyond


# --- places and names -----------------------------------------------------------------------------

_BAD_PATHS = [
    "a//b", "a/", "/a", "./a", "a/./b", "a/..", "..", ".", "", "a b", "a%", "a%2", "a%zz", "a%2f",
    "%61bc", "a%2Fb", "a%00", "\u00e4", "a\nb", "a\\b", "a%2e", "a?b", "a#b",
]  # fmt: skip
_GOOD_PATHS = [
    "a", "a/b.c", "..a", "a..", ".hidden/x", "a b", "ä", "a%b", "new\nline", "\udcff", "%41",
    "~!$&'()*+,;=:@-._", "a\\b", "?#[]", "x" * 300,
]  # fmt: skip


def test_a_path_and_a_uri_have_one_spelling(db: Connection) -> None:
    """Two would be two replicas of one file, of which the second is taken with the first."""
    oid = add_item(db)
    for path in _BAD_PATHS:
        found = refusal(db, add_replica, oid, add_storage(db), path=path)
        assert "replica_path_check" in found, path
        assert "data_item_uri_check" in refusal(db, add_item, uri=f"test:{path}"), path
    for path in (".dlm", ".dlm/trash/x"):
        assert "replica_path_check" in refusal(db, add_replica, oid, add_storage(db), path=path)
    for path in _GOOD_PATHS:
        good = refusal(db, add_replica, oid, add_storage(db), path=encode_path(path))
        assert good == "", path
        assert refusal(db, add_item, uri=make_uri("test", path)) == "", path
    assert "data_item_uri_check" in refusal(db, add_item, uri="Test:x")


@pytest.mark.parametrize(
    "change",
    ["trashed_at = :now", "absent_at = :now", "released_at = :now", "delete_after = :now",
     "size = 9007199254740992", "check_from = :late"],
)  # fmt: skip
def test_a_good_copy_is_not_said_to_be_gone(db: Connection, change: str) -> None:
    """Its path would be another's to take."""
    _, (uid, _) = ready_item(db)
    late = NOW + timedelta(days=3650)
    times = {name: value for name, value in (("now", NOW), ("late", late)) if f":{name}" in change}
    assert refusal(db, run, f"UPDATE replica SET {change} WHERE uid = :uid", uid=uid, **times) != ""


_STORAGES = [
    ({"root": "/x/y/"}, "storage_root_absolute"),
    ({"root": "/x//y"}, "storage_root_absolute"),
    ({"root": "/x/./y"}, "storage_root_absolute"),
    ({"root": "/x/../y"}, "storage_root_absolute"),
    ({"root": "/there"}, "would lie within"),
    ({"root": "/there/inside"}, "would lie within"),
    ({"root": "/"}, "would lie within"),
    ({"root": "/there", "config": '{"mount": "/"}'}, "would lie within"),
    ({"root": "/n1", "trash_grace": "170000000 years"}, "storage_trash_grace_limit"),
    ({"root": "/n2", "verify_day": "infinity"}, "storage_verify_day_check"),
    ({"root": "/n3", "audit_after": ""}, "storage_mode_told"),
    ({"root": "/n4", "drain_since": NOW}, "storage_mode_told"),
    ({"root": "/n5", "mode_before": "read_only"}, "storage_mode_told"),
    ({"root": "/n6", "observed_used_bytes": 2**62}, "storage_bytes_limit"),
]


def test_a_place_is_one_storage(db: Connection) -> None:
    """However it is spelled, and with whatever values beside it; what is only read may have another
    one within it, and the place of a retired one is free."""
    there = add_storage(db, root="/there")
    for values, why in _STORAGES:
        assert why in refusal(db, add_storage, **values), values
    read_only = add_storage(db, root="/read", managed=False)
    assert refusal(db, add_storage, root="/read/within") == ""
    assert "would lie within" in refusal(db, add_storage, root="/read")
    move = "UPDATE storage SET root = '/read/in' WHERE storage_id = :id"
    assert refusal(db, run, move, id=there) == ""
    add_storage(db, root="/read/other")
    own = "UPDATE storage SET managed = true WHERE storage_id = :id"
    assert "would lie within" in refusal(db, run, own, id=read_only)
    retire = "UPDATE storage SET mode = 'retired', retired_at = now() WHERE storage_id = :id"
    run(db, retire, id=there)
    assert refusal(db, add_storage, root="/there/again") == ""


def test_a_collection_does_not_lie_within_itself(db: Connection) -> None:
    """Neither at once nor by others in between; nor has it an empty name."""
    keys = [new_id() for _ in range(3)]
    for number, key in enumerate(keys):
        above = keys[number - 1] if number else None
        insert(db, "collection", collection_id=key, name=f"c{number}", parent_id=above)
    ring = "UPDATE collection SET parent_id = :p WHERE collection_id = :c"
    assert "within itself" in refusal(db, run, ring, c=keys[0], p=keys[2])
    assert refusal(db, run, ring, c=keys[2], p=keys[0]) == ""
    assert "collection_name_told" in refusal(
        db, insert, "collection", collection_id=new_id(), name=" \n"
    )


_MADE = ["location", "storage", "collection", "hold", "plan", "policy_version", "watch",
         "item_relation", "delivery", "principal"]  # fmt: skip


@pytest.mark.parametrize("table", _MADE)
def test_nothing_of_a_site_was_made_in_the_future(db: Connection, table: str) -> None:
    """Neither when it is written nor later; what refers to it would be older than it."""
    found = rows(
        db,
        """SELECT tgname FROM pg_trigger WHERE tgrelid = CAST(:t AS regclass)
              AND tgfoid = 'dlm_not_ahead'::regproc AND tgenabled = 'O'""",
        t=table,
    )
    assert len(found) == 1
    if table == "location":
        late = {"location_id": new_id(), "name": "x", "created_at": NOW + timedelta(days=3650)}
        assert "made in the future" in refusal(db, insert, table, **late)
        insert(db, table, **(late | {"created_at": NOW}))
        change = "UPDATE location SET created_at = created_at + interval '10 years'"
        assert "made in the future" in refusal(db, run, change)


@pytest.mark.parametrize("column", ["observed_at", "drain_since", "retired_at"])
def test_a_storage_tells_nothing_of_the_future(db: Connection, column: str) -> None:
    """A use that was told next year would be believed until then."""
    storage = add_storage(db)
    change = f"UPDATE storage SET {column} = :at WHERE storage_id = :id"
    late = refusal(db, run, change, at=NOW + timedelta(days=3650), id=storage)
    assert "are not in the future" in late


def test_a_lease_is_of_days(empty_database_url: str) -> None:
    """A worker that is lost is waited for until its lease is over."""
    schema.upgrade(empty_database_url)
    engine = make_engine(empty_database_url)
    with begin(engine, "test") as db:
        oid = add_item(db)
        uid = add_replica(db, oid, add_storage(db))
        row: dict[str, Any] = {
            "operation_id": new_id(), "kind": "admit", "oid": oid, "uid": uid, "reason": "r",
            "actor": "a", "due_at": NOW, "state": "RUNNING", "lease_token": new_id(),
        }  # fmt: skip
        until = datetime.now(UTC) + timedelta(days=365)
        late = refusal(db, insert, "operation", **row, lease_until=until)
        assert "operation_lease_limit" in late
        row["lease_until"] = until - timedelta(days=360)
        assert refusal(db, insert, "operation", **row) == ""
    engine.dispose()


# --- what never changes ---------------------------------------------------------------------------

_KEPT = {
    "policy_version": "UPDATE policy_version SET content = 'x'",
    "rule": "DELETE FROM rule",
    "operation": "DELETE FROM operation",
    "evaluation": "TRUNCATE evaluation",
    "tally": "TRUNCATE tally",
    "item_relation": "TRUNCATE item_relation",
}


@pytest.mark.parametrize("table", _KEPT)
def test_what_is_kept_is_not_removed(db: Connection, table: str) -> None:
    """Work that is queued, approved policies, and what is counted."""
    assert "never changed or removed" in refusal(db, run, _KEPT[table])


def test_a_manifest_comes_whole_and_stays(db: Connection) -> None:
    """A file more, less or of another size would make good copies look wrong."""
    oid = add_item(db, kind="directory")
    files = """INSERT INTO manifest_file SELECT :oid, n, 1, :digest
                 FROM unnest(CAST(:names AS text[])) n"""
    digest = "sha256:" + "c" * 64
    run(db, files, oid=oid, digest=digest, names=["a", "b/c"])
    for change in (
        "UPDATE manifest_file SET size = 2",
        "DELETE FROM manifest_file",
        "TRUNCATE manifest_file",
    ):
        assert "never changed or removed" in refusal(db, run, change), change
    more = refusal(db, run, files, oid=oid, digest=digest, names=["d"])
    assert "has a manifest already" in more
    again = files + " ON CONFLICT DO NOTHING"
    assert refusal(db, run, again, oid=oid, digest=digest, names=["a", "b/c"]) == ""
    other = add_item(db, kind="directory")
    outside = refusal(db, run, files, oid=other, digest=digest, names=["../../x"])
    assert "manifest_file_path_encoded" in outside


def test_an_operation_stays_what_it_is_about(db: Connection) -> None:
    """A look does not become a purge, nor one of another replica; what it goes on from is ours."""
    oid, (uid, other) = ready_item(db)
    key = new_id()
    insert(
        db, "operation", operation_id=key, kind="verify", oid=oid, uid=uid, reason="r", actor="a",
        due_at=NOW, created_at=NOW,
    )  # fmt: skip
    for change in ("kind = 'purge'", f"uid = '{other}'", "oid = gen_random_uuid()"):
        assert "what it is about never changes" in refusal(
            db, run, f"UPDATE operation SET {change}"
        )
    assert "operation_partial_check" in refusal(db, run, "UPDATE operation SET partial = '../../x'")
    assert refusal(db, run, "UPDATE operation SET kind = kind, partial = '.dlm/tmp/l/x'") == ""


def test_an_item_keeps_its_bucket_and_the_time_of_its_announcement(db: Connection) -> None:
    """By the first sites compare what they have."""
    oid = add_item(db)
    for change in ("uri_bucket = '00000'", "created_at = created_at - interval '1 day'"):
        found = refusal(db, run, f"UPDATE data_item SET {change} WHERE oid = :o", o=oid)
        assert "nor change key" in found, change


def test_a_plan_starts_as_proposed(db: Connection) -> None:
    """Nobody is asked about one that is born APPROVED."""
    row = {"kind": "expiry", "content_hash": "0" * 64, "operations": 1, "bytes": 1, "actor": "a"}
    found = refusal(db, insert, "plan", plan_id=new_id(), state="APPROVED", **row)
    assert "starts as PROPOSED" in found
    assert refusal(db, insert, "plan", plan_id=new_id(), **row) == ""


@pytest.mark.parametrize(
    ("pattern", "prefix", "good"),
    [("test:i\\", "test:i", False), ("test:%", "zz:", False), ("test:i\\%%", "test:i%", True),
     ("test:a\\\\%", "test:a", True)],
)  # fmt: skip
def test_a_hold_by_pattern_can_match(db: Connection, pattern: str, prefix: str, good: bool) -> None:
    """One that cannot, or that ends in the middle of an escape, holds nothing or everything."""
    found = refusal(
        db, insert, "hold", hold_id=new_id(), uri_prefix=prefix, uri_pattern=pattern, reason="r",
        actor="a", created_at=NOW,
    )  # fmt: skip
    assert (found == "") is good, found


@pytest.mark.parametrize(
    "wrong",
    [
        {"xid_shift": "NaN"},
        {"xid_shift": "1e30"},
        {"last_seq": -5},
        {"recovered_at": "infinity"},
        {"recovered_at": "1900-01-01"},
    ],
)
def test_a_recovery_has_numbers_that_the_feed_can_go_on_from(
    db: Connection, wrong: dict[str, Any]
) -> None:
    """Else no reader of the feed would get another row, and no look would ever prove anything."""
    row = {"recovered_at": NOW, "source": "s", "actor": "a", "last_seq": 0, "xid_shift": 0}
    made = """INSERT INTO recovery (recovery_id, recovered_at, source, actor, last_seq, xid_shift)
              VALUES (:key, CAST(:recovered_at AS timestamptz), :source, :actor, :last_seq,
                      CAST(:xid_shift AS numeric))"""
    assert "recovery_numbers" in refusal(db, run, made, key=new_id(), **(row | wrong))
    assert refusal(db, run, made, key=new_id(), **row) == ""


@pytest.mark.parametrize("at", ["-infinity", "infinity", "1900-01-01", "2300-01-01"])
def test_an_event_is_of_these_centuries(db: Connection, at: str) -> None:
    """To seal the days since then would not end."""
    told = """INSERT INTO event (at, noun, action, actor)
              VALUES (CAST(:at AS timestamptz), 'replica', 'refused', 'a')"""
    assert refusal(db, run, told, at=at) != ""


def test_a_seal_is_the_next_one_and_says_what_it_seals(db: Connection) -> None:
    """One of next year would stop the sealing, and one with another hash let rows be dropped."""
    set_item(db, add_item(db), "READY")
    made = """INSERT INTO audit_seal
              SELECT 'event', CAST(:day AS date), 1, repeat('0', 64), 0, 0, 0, repeat('0', 64),
                     :seal, now(), NULL"""
    true = """SELECT encode(sha256(convert_to(ROW('event', CAST(:day AS date), 1::bigint,
                repeat('0', 64), 0::numeric, 0::numeric, 0::numeric, repeat('0', 64))::text,
                'UTF8')), 'hex') AS seal"""
    assert "is not the next one" in refusal(db, run, made, day="2026-01-01", seal="0" * 64)
    late = rows(db, true, day="2199-12-31")[0]["seal"]
    assert "is not the next one" in refusal(db, run, made, day="2199-12-31", seal=late)
    first = rows(db, true, day="2026-01-01")[0]["seal"]
    run(db, made, day="2026-01-01", seal=first)
    # of the next day, but not behind the first; and of another day
    for day in ("2026-01-02", "2026-01-03"):
        seal = rows(db, true, day=day)[0]["seal"]
        assert "is not the next one" in refusal(db, run, made, day=day, seal=seal)


def test_rows_that_are_not_those_that_were_sealed_are_not_dropped(db: Connection) -> None:
    """Retention compares before it drops: a forged seal would be the way to lose the log."""
    run(db, "SELECT dlm_ensure_partitions(CAST('2024-02-01' AS timestamptz), 1)")
    run(
        db,
        """INSERT INTO event (at, noun, action, actor)
           SELECT d, 'audit', 'x', 'a'
             FROM generate_series(CAST('2024-02-01 12:00Z' AS timestamptz), '2024-02-29 12:00Z',
                                  interval '1 day') d""",
    )
    assert rows(db, "SELECT dlm_seal_days('event', '2024-02-29') AS n") == [{"n": 29}]
    savepoint = db.begin_nested()
    run(
        db,
        "INSERT INTO event (at, noun, action, actor) VALUES ('2024-02-10Z', 'audit', 'y', 'b')",
    )
    drop = "SELECT dlm_drop_month('event', '2024-02-01') AS n"
    assert "are not those that were sealed" in refusal(db, rows, drop)
    savepoint.rollback()
    assert rows(db, drop) == [{"n": 29}]
