"""What nobody can write, not even with psql: every refusal here is the database's own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from dlm_core.catalogue.engine import rows, run
from dlm_core.types import ItemState, ReplicaState, new_id
from tests.schema.rules import (
    DIGEST,
    NO_DIGESTS,
    NOW,
    OTHER,
    SIZE,
    add_item,
    add_replica,
    add_storage,
    certify,
    insert,
    ready_item,
    refusal,
    set_clock,
    set_item,
    set_replica,
    ways,
)

# --- transitions ----------------------------------------------------------------------------------


def legal(connection: Connection, noun: str) -> set[tuple[str, str]]:
    found = rows(connection, "SELECT * FROM state_transition WHERE noun = :noun", noun=noun)
    return {(row["old_state"], row["new_state"]) for row in found}


@pytest.mark.parametrize("old", list(ItemState))
def test_items_go_where_the_table_says_and_nowhere_else(db: Connection, old: str) -> None:
    """From each state an item reaches exactly the states of the transition table."""
    oid = add_item(db)
    for state in ways(db, "item", "INITIALISED")[old][1:]:
        set_item(db, oid, state)
    for new in set(ItemState) - {old}:
        found = refusal(db, set_item, oid, new)
        if (old, new) in legal(db, "item"):
            assert found == "", (old, new)
        else:
            assert f"cannot go from {old} to {new}" in found, (old, new)


@pytest.mark.parametrize("old", list(ReplicaState))
def test_replicas_go_where_the_table_says_and_nowhere_else(db: Connection, old: str) -> None:
    """From each state a replica reaches exactly the states of the transition table, given a
    certificate and another good copy where they are asked for."""
    oid, _ = ready_item(db, 1)
    uid = add_replica(db, oid, add_storage(db))
    for state in ways(db, "replica", "PENDING")[old][1:]:
        set_replica(db, uid, state)
    for new in set(ReplicaState) - {old}:
        found = refusal(db, set_replica, uid, new)
        if (old, new) in legal(db, "replica"):
            assert found == "", (old, new)
        else:
            assert f"cannot go from {old} to {new}" in found, (old, new)


def test_the_table_reaches_every_state_and_deleted_never_goes_back(db: Connection) -> None:
    """No state is out of reach, and nothing leads out of DELETED."""
    assert set(ways(db, "item", "INITIALISED")) == set(ItemState)
    assert set(ways(db, "replica", "PENDING")) == set(ReplicaState)
    for noun in ("item", "replica"):
        assert not [pair for pair in legal(db, noun) if pair[0] == "DELETED"]


@pytest.mark.parametrize("state", sorted(set(ItemState) - {"INITIALISED"}))
def test_an_item_starts_as_initialised(db: Connection, state: str) -> None:
    """An item cannot be written into another state than the first."""
    found = refusal(db, add_item, state=state, expires_at=NOW)
    assert "starts as INITIALISED" in found


@pytest.mark.parametrize("state", sorted(set(ReplicaState) - {"PENDING"}))
def test_a_replica_starts_as_pending(db: Connection, state: str) -> None:
    """A replica cannot be written into another state than the first."""
    oid, storage = add_item(db), add_storage(db)
    values = {"digest": DIGEST, "checked_at": NOW, "deletion_id": new_id()}
    values |= {"absent_at": NOW} if state == "DELETED" else {}
    assert "starts as PENDING" in refusal(db, add_replica, oid, storage, state=state, **values)


@pytest.mark.parametrize(
    "change",
    ["uri = 'test:other'", "version = 2", "size = 4", f"digest = '{OTHER}'", "kind = 'directory'",
     "oid = gen_random_uuid()"],
)  # fmt: skip
def test_what_a_ready_item_is_never_changes(db: Connection, change: str) -> None:
    """Key, uri, version, size, digest and kind of a READY item stay as they are."""
    oid, _ = ready_item(db, 0)
    statement = f"UPDATE data_item SET {change} WHERE oid = :oid"
    assert "nor change key" in refusal(db, run, statement, oid=oid)


@pytest.mark.parametrize("column", ["uid", "oid", "storage_id", "path"])
def test_what_a_replica_is_a_copy_of_never_changes(db: Connection, column: str) -> None:
    """Key, item, storage and path of a READY replica stay as they are."""
    _, (uid, _) = ready_item(db, 2)
    other = {"uid": new_id(), "oid": add_item(db), "storage_id": add_storage(db), "path": "else"}
    statement = f"UPDATE replica SET {column} = :value WHERE uid = :key"
    assert "nor change key" in refusal(db, run, statement, value=other[column], key=uid)


# --- READY ----------------------------------------------------------------------------------------


def test_an_item_without_digest_or_size_is_not_ready(db: Connection) -> None:
    """READY says that the payload is known: its size and digest."""
    for missing in ("digest", "size"):
        oid = add_item(db, **{missing: None})
        assert "violates check constraint" in refusal(db, set_item, oid, "READY")


def test_only_observed_bytes_make_a_replica_ready(db: Connection) -> None:
    """READY needs a digest, a time of reading, and the item's very digest and size."""
    oid, _ = ready_item(db, 0)
    uid = add_replica(db, oid, add_storage(db))
    good = {"digest": DIGEST, "checked_at": NOW, "size": SIZE}
    statement = """UPDATE replica SET state = 'READY', digest = :digest, checked_at = :checked_at,
                          size = :size WHERE uid = :uid"""
    assert "check constraint" in refusal(
        db, run, statement, uid=uid, **{**good, "checked_at": None}
    )
    for wrong in ({"digest": None}, {"digest": OTHER}, {"size": SIZE + 1}):
        assert refusal(db, run, statement, uid=uid, **{**good, **wrong}) != "", wrong
    assert refusal(db, run, statement, uid=uid, **good) == ""


def test_a_ready_replica_cannot_take_other_bytes(db: Connection) -> None:
    """The digest of a READY replica cannot become another."""
    _, (uid, _) = ready_item(db)
    statement = "UPDATE replica SET digest = :digest WHERE uid = :uid"
    assert "cannot be READY" in refusal(db, run, statement, digest=OTHER, uid=uid)


# --- deletion -------------------------------------------------------------------------------------

_TRASH = "UPDATE replica SET state = 'TRASHED', deletion_id = :certificate WHERE uid = :uid"
_DELETE = """UPDATE replica SET state = 'DELETED', deletion_id = :certificate, absent_at = :now
              WHERE uid = :uid"""


def test_nothing_is_trashed_without_a_certificate(db: Connection) -> None:
    """No certificate, an invented one, another replica's or another step's do not trash."""
    _, (uid, other) = ready_item(db)
    assert "check constraint" in refusal(db, run, _TRASH, certificate=None, uid=uid)
    for wrong in (new_id(), certify(db, other, "trash"), certify(db, uid, "purge")):
        assert "without a certificate" in refusal(db, run, _TRASH, certificate=wrong, uid=uid)
    right = certify(db, uid, "trash")
    assert refusal(db, run, _TRASH, certificate=right, uid=uid) == ""


def test_a_certificate_of_another_transaction_does_not_trash(engine: Engine) -> None:
    """What a certificate proves holds under the locks of its own transaction only."""
    with engine.begin() as first:
        set_clock(first)
        _, (uid, _) = ready_item(first)
        certificate = certify(first, uid, "trash")
    with engine.begin() as second:
        set_clock(second)
        found = refusal(second, run, _TRASH, certificate=certificate, uid=uid)
        assert "without a certificate" in found


def test_nothing_is_deleted_but_trash_with_a_proof_that_is_good_now(db: Connection) -> None:
    """The end needs a purge or release certificate of this replica that has not run out, and
    bytes that are confirmed absent or released."""
    _, (uid, other, _) = ready_item(db, 3)
    set_replica(db, uid, "TRASHED")
    stale = {"proved_at": NOW - timedelta(hours=2), "valid_until": NOW - timedelta(hours=1)}
    for wrong in (
        certify(db, uid, "trash"),
        certify(db, other, "purge"),
        certify(db, uid, "purge", **stale),
    ):
        assert "certificate" in refusal(db, run, _DELETE, certificate=wrong, uid=uid, now=NOW)
    for step in ("purge", "release"):
        right = certify(db, uid, step)
        assert "check" in refusal(db, run, _DELETE, certificate=right, uid=uid, now=None)
        assert refusal(db, run, _DELETE, certificate=right, uid=uid, now=NOW) == ""


def test_the_last_good_copy_stays_until_its_item_has_expired(db: Connection) -> None:
    """The last READY replica is not trashed, nor are the last two in one statement; those of an
    EXPIRED item are."""
    oid, uids = ready_item(db, 2)

    def trash(connection: Connection, some: list[Any]) -> None:
        pairs = {uid: certify(connection, uid, "trash") for uid in some}
        run(
            connection,
            """UPDATE replica r SET state = 'TRASHED', deletion_id = p.certificate
                 FROM unnest(CAST(:uids AS uuid[]), CAST(:certificates AS uuid[]))
                      AS p(uid, certificate) WHERE p.uid = r.uid""",
            uids=list(pairs),
            certificates=list(pairs.values()),
        )

    assert "last good copy" in refusal(db, trash, uids)
    set_replica(db, uids[0], "SUSPECT")
    assert "its item has not expired" in refusal(db, trash, [uids[1]])
    set_item(db, oid, "EXPIRED")
    assert refusal(db, trash, uids) == ""


def test_an_item_expires_only_past_its_time_and_goes_only_after_its_replicas(
    db: Connection,
) -> None:
    """EXPIRED needs an expires_at that has passed, DELETED that no replica is left."""
    oid, (uid, _) = ready_item(db, 2)
    future = "UPDATE data_item SET state = 'EXPIRED', expires_at = :at WHERE oid = :oid"
    found = refusal(db, run, future, at=NOW + timedelta(seconds=1), oid=oid)
    assert "not past its expires_at" in found
    never = "UPDATE data_item SET state = 'EXPIRED' WHERE oid = :oid"
    assert "check constraint" in refusal(db, run, never, oid=oid)
    set_item(db, oid, "EXPIRED")
    set_replica(db, uid, "TRASHED")
    assert "still has replicas" in refusal(db, set_item, oid, "DELETED")


@pytest.mark.parametrize("by", ["oid", "collection_id", "nested", "uri_prefix"])
def test_a_hold_keeps_items_and_replicas(db: Connection, by: str) -> None:
    """Under a hold on it, its collection, one above that, or its uri's start, an item does not
    expire and its replicas are not trashed; once the hold has ended they are."""
    outer, inner, hold = new_id(), new_id(), new_id()
    insert(db, "collection", collection_id=outer, name="outer")
    insert(db, "collection", collection_id=inner, name="inner", parent_id=outer)
    oid, (uid, _) = ready_item(db, 2, uri="test:held/x", collection_id=inner)
    what = {"oid": {"oid": oid}, "collection_id": {"collection_id": inner},
            "nested": {"collection_id": outer},
            "uri_prefix": {"uri_prefix": "test:held/"}}  # fmt: skip
    insert(db, "hold", hold_id=hold, reason="audit", actor="user:a", created_at=NOW, **what[by])
    assert "under a hold" in refusal(db, set_item, oid, "EXPIRED")
    assert "under a hold" in refusal(db, set_replica, uid, "TRASHED")
    run(db, "UPDATE hold SET ends_at = :now WHERE hold_id = :id", now=NOW, id=hold)
    assert refusal(db, set_item, oid, "EXPIRED") == ""
    assert refusal(db, set_replica, uid, "TRASHED") == ""


def test_a_storage_retires_only_when_empty_and_for_good(db: Connection) -> None:
    """A storage with replicas is not retired; a retired one does not come back."""
    storage = add_storage(db)
    retire = "UPDATE storage SET mode = 'retired', retired_at = now() WHERE storage_id = :id"
    oid, _ = ready_item(db, 1)
    uid = add_replica(db, oid, storage)
    assert "still has replicas" in refusal(db, run, retire, id=storage)
    for state in ("READY", "TRASHED", "DELETED"):
        set_replica(db, uid, state)
    run(db, retire, id=storage)
    back = "UPDATE storage SET mode = 'read_write', retired_at = NULL WHERE storage_id = :id"
    assert "does not come back" in refusal(db, run, back, id=storage)


# --- what is never removed ------------------------------------------------------------------------


def _everything(db: Connection) -> None:
    oid, (uid, _) = ready_item(db)
    certify(db, uid, "trash")
    insert(db, "hold", hold_id=new_id(), oid=oid, reason="r", actor="a", created_at=NOW)


@pytest.mark.parametrize("table", ["data_item", "replica", "deletion", "event", "hold"])
def test_rows_are_not_removed(db: Connection, table: str) -> None:
    """DELETE and TRUNCATE are refused, CASCADE or not."""
    _everything(db)
    for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}", f"TRUNCATE {table} CASCADE"):
        assert refusal(db, run, statement) != "", statement


@pytest.mark.parametrize("table", ["deletion", "event"])
def test_certificates_and_events_are_append_only_in_every_partition(
    db: Connection, table: str
) -> None:
    """They are not rewritten either, nor through the partition that holds them."""
    _everything(db)
    partitions = rows(
        db,
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = :t ::regclass",
        t=table,
    )
    assert len(partitions) > 1
    for name in (table, *(row["name"] for row in partitions)):
        for statement in (
            f"UPDATE {name} SET actor = 'nobody'",
            f"DELETE FROM {name}",
            f"TRUNCATE {name}",
        ):
            assert "never changed or removed" in refusal(db, run, statement), statement


# --- nonsense -------------------------------------------------------------------------------------

_NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("location", {"name": "has space"}),
    ("location", {"name": ""}),
    ("location", {"country": "Germany"}),
    ("location", {"created_at": "1999-12-31T23:59:59Z"}),
    ("storage", {"name": "-x"}),
    ("storage", {"phase": "PLASTIC"}),
    ("storage", {"class": "paper"}),
    ("storage", {"mode": "asleep"}),
    ("storage", {"root": ""}),
    ("storage", {"config": "[]"}),
    ("storage", {"capacity_bytes": 0}),
    ("storage", {"capacity_bytes": -5}),
    ("storage", {"high_watermark": 1.5}),
    ("storage", {"low_watermark": 0}),
    ("storage", {"low_watermark": 0.95}),
    ("storage", {"concurrency": 0}),
    ("storage", {"trash_grace": timedelta(seconds=-1)}),
    ("storage", {"mode": "retired"}),
    ("storage", {"location_id": new_id()}),
    ("data_item", {"uri": "no scheme"}),
    ("data_item", {"uri": "Test:x"}),
    ("data_item", {"uri": "test:/absolute"}),
    ("data_item", {"uri": "test:"}),
    ("data_item", {"uri": "test:two words"}),
    ("data_item", {"uri": "test:line\nbreak"}),
    ("data_item", {"uri_bucket": "xyz"}),
    ("data_item", {"version": 0}),
    ("data_item", {"size": -1}),
    ("data_item", {"digest": "md5:" + "a" * 32}),
    *(("data_item", {"digest": digest}) for digest in NO_DIGESTS),
    ("data_item", {"state": "FINE"}),
    ("data_item", {"kind": "socket"}),
    ("data_item", {"target_phase": "GOLD"}),
    ("data_item", {"phase_weight": -1}),
    ("data_item", {"metadata": "[]"}),
    ("data_item", {"tags": '"x"'}),
    ("data_item", {"created_at": "1970-01-01T00:00:00Z"}),
    ("data_item", {"expires_at": "2200-01-01T00:00:00Z"}),
    ("data_item", {"expires_at": "infinity"}),
    ("data_item", {"expires_at": NOW - timedelta(seconds=1)}),
    ("data_item", {"collection_id": new_id()}),
    ("replica", {"path": "/absolute"}),
    ("replica", {"path": "a/../b"}),
    ("replica", {"path": ".."}),
    ("replica", {"path": ""}),
    ("replica", {"size": -1}),
    ("replica", {"state": "GONE"}),
    ("replica", {"checked_at": NOW - timedelta(seconds=1)}),
    ("replica", {"expires_at": "0001-01-01T00:00:00Z"}),
    ("replica", {"storage_id": new_id()}),
    ("hold", {"reason": ""}),
    ("hold", {"uri_prefix": "test:"}),
    ("hold", {"ends_at": NOW - timedelta(seconds=1)}),
    ("operation", {"kind": "destroy"}),
    ("operation", {"state": "WAITING"}),
    ("operation", {"state": "RUNNING"}),
    ("operation", {"state": "DONE"}),
    ("operation", {"state": "FAILED", "finished_at": NOW}),
    ("operation", {"reason": ""}),
    ("operation", {"attempts": -1}),
    ("operation", {"lease_until": NOW, "lease_token": new_id()}),
    ("deletion", {"step": "burn"}),
    ("deletion", {"basis": "boredom"}),
    ("deletion", {"survivors": "{}"}),
    ("deletion", {"basis": "replica_expired", "survivors": "[]"}),
    ("deletion", {"basis": "item_expired"}),
    ("deletion", {"basis": "withdrawn", "step": "release", "from_state": "READY"}),
    ("deletion", {"valid_until": NOW}),
    ("deletion", {"actor": ""}),
    ("collection", {"name": ""}),
    ("manifest_file", {"path": "/x"}),
    ("manifest_file", {"size": -1}),
    ("watch", {"interval": timedelta(0)}),
    ("watch", {"scheme": "A b"}),
    ("plan", {"content_hash": "x"}),
    ("plan", {"bytes": -1}),
    ("grant", {"role": "king"}),
]


def _good(db: Connection) -> dict[str, dict[str, Any]]:
    """A row that every table takes."""
    oid, location, principal = add_item(db), new_id(), new_id()
    storage = add_storage(db)
    uid = add_replica(db, oid, storage)
    insert(db, "location", location_id=location, name="there")
    insert(db, "principal", principal_id=principal, name="p", kind="user")
    return {
        "location": {"location_id": new_id(), "name": "here"},
        "storage": {"storage_id": new_id(), "name": "s", "location_id": location, "class": "disk",
                    "interface": "posix", "root": "/s", "phase": "GAS"},
        "data_item": {"oid": new_id(), "uri": "test:good", "uri_bucket": "01234",
                      "created_at": NOW},
        "replica": {"uid": new_id(), "oid": oid, "storage_id": add_storage(db), "path": "p",
                    "size": 1, "created_at": NOW},
        "hold": {"hold_id": new_id(), "oid": oid, "reason": "r", "actor": "a", "created_at": NOW},
        "operation": {"operation_id": new_id(), "kind": "copy", "oid": oid, "uid": uid,
                      "reason": "r", "actor": "a", "due_at": NOW},
        "deletion": {"deletion_id": new_id(), "step": "release", "basis": "withdrawn", "uid": uid,
                     "oid": oid, "storage_id": storage, "from_state": "PENDING", "survivors": "[]",
                     "survivor_weight": 0, "target_phase": "GAS", "holds_examined": 0,
                     "reason": "r", "actor": "a", "proved_at": NOW,
                     "valid_until": NOW + timedelta(hours=1)},
        "collection": {"collection_id": new_id(), "name": "c"},
        "manifest_file": {"oid": oid, "path": "p", "size": 1, "digest": DIGEST},
        "watch": {"watch_id": new_id(), "storage_id": storage, "scheme": "file", "scan_at": NOW},
        "plan": {"plan_id": new_id(), "kind": "expiry", "content_hash": "0" * 64, "operations": 1,
                 "bytes": 1, "actor": "a"},
        "grant": {"principal_id": principal, "role": "reader"},
    }  # fmt: skip


def test_nonsense_is_refused_and_sense_is_not(db: Connection) -> None:
    """Each row is taken as it is, and refused with any one value that makes no sense."""
    good = _good(db)
    for table, row in good.items():
        assert refusal(db, insert, table, **row) == "", table
    for table, wrong in _NONSENSE:
        assert refusal(db, insert, table, **{**good[table], **wrong}) != "", (table, wrong)


def test_a_uri_and_version_exist_once_and_a_place_holds_one_replica(db: Connection) -> None:
    """Two items of one uri and version, two live replicas of an item on a storage, or of two
    items at one path are refused."""
    oid, storage = add_item(db, uri="test:one"), add_storage(db)
    add_replica(db, oid, storage, path="here")
    assert "duplicate key" in refusal(db, add_item, uri="test:one")
    assert refusal(db, add_item, uri="test:one", version=2) == ""
    assert "duplicate key" in refusal(db, add_replica, oid, storage, path="there")
    assert "duplicate key" in refusal(db, add_replica, add_item(db), storage, path="here")


# --- counts and the feed --------------------------------------------------------------------------

_RECOUNT = """
  SELECT 'item' AS noun, NULL::uuid AS storage_id, state, count(*)::bigint AS n,
         coalesce(sum(size), 0)::bigint AS bytes FROM data_item GROUP BY state
  UNION ALL
  SELECT 'replica', storage_id, state, count(*), sum(size)::bigint FROM replica
   GROUP BY storage_id, state ORDER BY 1, 2, 3"""
_TALLIED = """
  SELECT noun, storage_id, state, sum(n)::bigint AS n, sum(bytes)::bigint AS bytes FROM tally
   GROUP BY noun, storage_id, state HAVING sum(n) <> 0 OR sum(bytes) <> 0 ORDER BY 1, 2, 3"""

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "item", "replica", "fold", "size"]),
        st.integers(0, 7),
        st.sampled_from([*ItemState, *ReplicaState]),
    ),
    max_size=25,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=_STEPS)
@example(steps=[("add", 1, "READY"), ("size", 5, "READY")])
def test_the_tally_is_a_recount_after_any_changes(engine: Engine, steps: Any) -> None:
    """Whatever is tried, allowed or refused, the tally equals a recount of the rows."""
    with engine.connect() as connection:
        set_clock(connection)
        storages = [add_storage(connection) for _ in range(2)]
        oids, uids = [add_item(connection)], []
        for action, number, state in steps:
            savepoint = connection.begin_nested()
            try:
                _change(connection, action, number, state, oids, uids, storages)
                savepoint.commit()
            except DBAPIError:
                savepoint.rollback()
        assert rows(connection, _TALLIED) == rows(connection, _RECOUNT)
        connection.rollback()


def _change(
    connection: Connection,
    action: str,
    number: int,
    state: str,
    oids: Any,
    uids: Any,
    storages: Any,
) -> None:
    oid = oids[number % len(oids)]
    if action == "add":
        oids.append(add_item(connection, size=number))
        uids.append(add_replica(connection, oid, storages[number % 2], size=number))
    elif action == "item":
        set_item(connection, oid, state)
    elif action == "replica" and uids:
        set_replica(connection, uids[number % len(uids)], state)
    elif action == "size":
        # many rows in one statement
        run(connection, "UPDATE replica SET size = :n WHERE state = 'PENDING'", n=number)
        run(connection, "UPDATE data_item SET size = :n WHERE state = 'INITIALISED'", n=number)
    else:
        run(connection, "SELECT dlm_fold_tally()")


def test_every_change_of_state_is_an_event(db: Connection) -> None:
    """Creation and each change of state write one event with both states and the actor; a
    statement that touches many rows writes one for each."""
    run(db, "SELECT set_config('dlm.actor', 'user:probe', true)")
    oid, _ = ready_item(db, 3)
    run(db, "UPDATE replica SET state = 'SUSPECT' WHERE oid = :oid", oid=oid)
    found = rows(
        db,
        """SELECT old_state, new_state, actor, count(*) AS n FROM event
            WHERE oid = :oid AND noun = 'replica' AND action IN ('created', 'state')
            GROUP BY 1, 2, 3 ORDER BY min(seq)""",
        oid=oid,
    )
    told = [(row["old_state"], row["new_state"], row["n"]) for row in found]
    assert told == [(None, "PENDING", 3), ("PENDING", "READY", 3), ("READY", "SUSPECT", 3)]
    assert {row["actor"] for row in found} == {"user:probe"}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("wwcrx")), max_size=30))
@example([(0, "w"), (1, "w"), (1, "c"), (0, "r")])
def test_the_feed_never_skips_a_late_commit(engine: Engine, steps: Any) -> None:
    """Three writers write, commit and roll back in any order; a reader that goes on from the
    (xid, seq) it has read last sees every committed event once, in that order."""
    writers = [engine.connect() for _ in range(3)]
    written: list[list[Any]] = [[], [], []]
    committed, seen, place = set(), [], (0, 0)
    try:
        with engine.connect() as reader:
            place = _last(reader)
            for number, action in [*steps, (0, "c"), (1, "c"), (2, "c"), (0, "r")]:
                if action == "w":
                    written[number].append(add_item(writers[number], created_at=NOW))
                elif action in "cx":
                    writers[number].commit() if action == "c" else writers[number].rollback()
                    committed |= set(written[number]) if action == "c" else set()
                    written[number] = []
                else:
                    found = _read(reader, place)
                    seen += [row["oid"] for row in found]
                    place = (found[-1]["xid"], found[-1]["seq"]) if found else place
        assert len(seen) == len(set(seen))
        assert set(seen) == committed
    finally:
        for writer in writers:
            writer.rollback()
            writer.close()


_FEED = """SELECT xid::text::bigint AS xid, seq, oid FROM event_feed
            WHERE (xid::text::bigint, seq) > (:xid, :seq) ORDER BY xid, seq"""


def _last(reader: Connection) -> tuple[int, int]:
    found = _read(reader, (0, 0))
    return (found[-1]["xid"], found[-1]["seq"]) if found else (0, 0)


def _read(reader: Connection, place: tuple[int, int]) -> list[dict[str, Any]]:
    try:
        return rows(reader, _FEED, xid=place[0], seq=place[1])
    finally:
        reader.rollback()


def test_a_refusal_has_a_state_of_its_own(db: Connection) -> None:
    """Refusals by rule carry SQLSTATE DL001, so that programs tell them from bugs."""
    with pytest.raises(DBAPIError) as caught:
        add_item(db, state="READY")
    assert getattr(caught.value.orig, "sqlstate", None) == "DL001"
    assert not isinstance(caught.value, IntegrityError)
