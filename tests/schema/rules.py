"""Rows written with plain SQL, as somebody with psql would."""

from __future__ import annotations

import itertools
import json
import uuid
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dlm_core.catalogue.engine import rows, run
from dlm_core.types import new_id, uri_bucket

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
#: what differs from a digest in one respect each
NO_DIGESTS = [
    "sha256:" + "a" * 63,
    "sha256:" + "a" * 65,
    "sha257:" + "a" * 64,
    "sha256:" + "a" * 63 + "\n",
    "sha256:" + "a" * 62 + "\u00e4",
    " sha256" + "a" * 64,
    "sha256:" + "A" * 64,
]
OTHER = "sha256:" + "b" * 64
SIZE = 3
_numbers = itertools.count()


def set_clock(connection: Connection, now: datetime = NOW) -> None:
    """What the catalogue takes for the present in this transaction."""
    run(connection, "SELECT set_config('dlm.now', :now, true)", now=now.isoformat())


def let_time_be_told(url: str) -> None:
    """Make a catalogue one whose present is what a test says, by as many years as it likes."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION dlm_is_simulation() RETURNS boolean "
            "LANGUAGE sql IMMUTABLE AS 'SELECT true'"
        )
        connection.execute("ALTER TABLE operation DROP CONSTRAINT operation_lease_limit")


def must_be_told(engine: Engine) -> None:
    """Raise where a catalogue goes by its own clock: what a test's clock makes due never is there,
    and a story in which nothing happens goes well."""
    with engine.connect() as connection:
        if not rows(connection, "SELECT dlm_is_simulation() AS told")[0]["told"]:
            raise AssertionError("this catalogue's present is not what the test says")


def insert(connection: Connection, table: str, **values: Any) -> None:
    """One row of a table."""
    names = ", ".join(f'"{name}"' for name in values)
    places = ", ".join(f":{name}" for name in values)
    run(connection, f'INSERT INTO "{table}" ({names}) VALUES ({places})', **values)


def add_storage(connection: Connection, **values: Any) -> uuid.UUID:
    """A LIQUID storage at a location of its own."""
    number = next(_numbers)
    storage_id, location_id = new_id(), new_id()
    insert(connection, "location", location_id=location_id, name=f"place-{number}")
    row = {"name": f"storage-{number}", "interface": "posix", "class": "disk", "phase": "LIQUID",
           "root": f"/data/{number}"}  # fmt: skip
    insert(connection, "storage", storage_id=storage_id, location_id=location_id, **(row | values))
    return storage_id


def add_item(connection: Connection, **values: Any) -> uuid.UUID:
    """An INITIALISED item."""
    oid = new_id()
    uri = f"test:item-{next(_numbers)}"
    row = {"uri": uri, "uri_bucket": uri_bucket(uri), "size": SIZE, "digest": DIGEST,
           "created_at": NOW}  # fmt: skip
    insert(connection, "data_item", oid=oid, **(row | values))
    return oid


def add_replica(
    connection: Connection, oid: uuid.UUID, storage_id: uuid.UUID, **values: Any
) -> uuid.UUID:
    """A PENDING replica."""
    uid = new_id()
    row = {"path": f"file-{next(_numbers)}", "size": SIZE, "created_at": NOW, "accessed_at": NOW}
    insert(connection, "replica", uid=uid, oid=oid, storage_id=storage_id, **(row | values))
    return uid


def ready_item(connection: Connection, storages: int = 2, **values: Any) -> Any:
    """A READY item with a READY replica on each of some new storages: (oid, uids)."""
    oid = add_item(connection, **values)
    set_item(connection, oid, "READY")
    uids = []
    for _ in range(storages):
        uids.append(add_replica(connection, oid, add_storage(connection)))
        set_replica(connection, uids[-1], "READY")
    return oid, uids


def certify(connection: Connection, uid: uuid.UUID, step: str, **values: Any) -> uuid.UUID:
    """A certificate for a step of a replica's deletion, true unless ``values`` say otherwise: its
    item has expired, or its other good copies survive."""
    deletion_id = new_id()
    found = rows(
        connection,
        """SELECT r.*, i.state AS item_state, (
                  SELECT json_agg(json_build_object('uid', x.uid)) FROM replica x
                   WHERE x.oid = r.oid AND x.uid <> r.uid AND x.state = 'READY') AS others
             FROM replica r JOIN data_item i USING (oid) WHERE r.uid = :uid""",
        uid=uid,
    )[0]
    expired = found["item_state"] == "EXPIRED" or not found["others"]
    row = {"basis": "item_expired" if expired else "replica_expired",
           "from_state": found["state"],
           "survivors": json.dumps([] if expired else found["others"]),
           "survivor_weight": 4, "target_phase": "SOLID", "holds_examined": 0, "reason": "test",
           "actor": "user:test", "proved_at": NOW,
           "valid_until": NOW + timedelta(hours=1)}  # fmt: skip
    insert(
        connection, "deletion", deletion_id=deletion_id, step=step, uid=uid, oid=found["oid"],
        storage_id=found["storage_id"], **(row | values),
    )  # fmt: skip
    return deletion_id


def set_item(connection: Connection, oid: uuid.UUID, state: str) -> None:
    """Bring an item to a state, with all that the state asks for but the way there."""
    run(
        connection,
        "UPDATE data_item SET state = :state, expires_at = coalesce(expires_at, created_at) "
        "WHERE oid = :oid"
        if state in ("EXPIRED", "DELETED")
        else "UPDATE data_item SET state = :state WHERE oid = :oid",
        state=state,
        oid=oid,
    )


def set_replica(connection: Connection, uid: uuid.UUID, state: str) -> None:
    """Bring a replica to a state, with all that the state asks for but the way there."""
    steps = {"TRASHED": "trash", "DELETED": "purge"}
    certificate = None
    if state == "DELETED" and _state_of(connection, uid) == "PENDING":
        certificate = certify(connection, uid, "release", basis="withdrawn")
    elif state in steps:
        certificate = certify(connection, uid, steps[state])
    run(
        connection,
        """UPDATE replica SET state = :state, digest = :digest, size = :size, checked_at = :now,
                  deletion_id = coalesce(CAST(:certificate AS uuid), deletion_id),
                  absent_at = CASE WHEN :state = 'DELETED' THEN CAST(:now AS timestamptz) END
            WHERE uid = :uid""",
        state=state,
        digest=DIGEST,
        size=SIZE,
        now=NOW,
        certificate=certificate,
        uid=uid,
    )


def refusal(connection: Connection, action: Any, *arguments: Any, **values: Any) -> str:
    """Why the database refuses what ``action`` does; '' if it does not. Nothing is kept."""
    savepoint = connection.begin_nested()
    try:
        action(connection, *arguments, **values)
    except DBAPIError as error:
        return str(error.orig)
    finally:
        savepoint.rollback()
    return ""


def _state_of(connection: Connection, uid: uuid.UUID) -> str:
    return str(rows(connection, "SELECT state FROM replica WHERE uid = :uid", uid=uid)[0]["state"])


def ways(connection: Connection, noun: str, start: str) -> dict[str, list[str]]:
    """The shortest way from ``start`` to every state that the transition table leads to."""
    legal: dict[str, list[str]] = {}
    for row in rows(connection, "SELECT * FROM state_transition WHERE noun = :noun", noun=noun):
        legal.setdefault(row["old_state"], []).append(row["new_state"])
    found, queue = {start: [start]}, deque([start])
    while queue:
        state = queue.popleft()
        for following in legal.get(state, []):
            if following not in found:
                found[following] = [*found[state], following]
                queue.append(following)
    return found
