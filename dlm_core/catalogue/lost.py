"""Storages that are lost, what they held alone, and their audit when they are back."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.places import get_storage
from dlm_core.catalogue.replicas import mark_state
from dlm_core.errors import IllegalTransitionError
from dlm_core.types import ReplicaState, StorageMode

#: states of what is on a storage as far as the catalogue knows, and of what may be
_THERE = "('PENDING', 'READY', 'SUSPECT', 'CORRUPTED')"


def declare_lost(connection: Connection, name: str, reason: str) -> dict[str, Any]:
    """Set a storage's mode to lost: from now on nothing on it counts. The storage as it was.

    Raises
    ------
    NotFoundError
    IllegalTransitionError
        if it is retired.
    """
    run(connection, "SELECT FROM storage WHERE name = :name FOR UPDATE", name=name)
    storage = get_storage(connection, name)
    if storage["mode"] == StorageMode.RETIRED:
        raise IllegalTransitionError(noun="storage", key=name, old="retired", new="lost")
    run(
        connection,
        """UPDATE storage SET mode = 'lost', mode_reason = :reason
            WHERE storage_id = :id AND mode <> 'lost'""",
        reason=reason,
        id=storage["storage_id"],
    )
    return storage


def end_operations(connection: Connection, storage_id: uuid.UUID, why: str, now: datetime) -> int:
    """Cancel what is queued or running to copy to a storage or to read on it; how many.

    Copies *from* it choose their source when they begin; one that is under way fails and is tried
    from another, or ends well with bytes that were verified.
    """
    return run(
        connection,
        """UPDATE operation o SET state = 'CANCELLED', finished_at = :now, lease_token = NULL,
                  lease_until = NULL, error_code = 'DLM-503', error = :why
             FROM replica r, data_item i
            WHERE r.uid = o.uid AND i.oid = r.oid AND r.storage_id = :storage
              AND i.state <> 'INITIALISED'
              AND o.kind IN ('copy', 'verify') AND o.state IN ('QUEUED', 'RUNNING')""",
        storage=storage_id,
        why=why,
        now=now,
    )


def lose_replicas(
    connection: Connection, storage_id: uuid.UUID, after: str, limit: int
) -> tuple[int, str | None]:
    """Make replicas MISSING, in the order of their paths from ``after`` on: how many became so,
    and the last path looked at, None at the end.

    What was only announced stays as it is: nothing of it was ever seen. A mark to leave because
    its storage was drained or full is taken away.
    """
    found = rows(
        connection,
        f"""WITH page AS MATERIALIZED (
              SELECT uid, oid, path, state FROM replica
               WHERE storage_id = :storage AND path > :after AND owns_path
               ORDER BY path LIMIT :limit)
            SELECT p.uid, p.path, p.state IN {_THERE} AND i.state <> 'INITIALISED' AS there
              FROM page p JOIN data_item i USING (oid) ORDER BY p.path""",
        storage=storage_id,
        after=after,
        limit=limit,
    )
    uids = sorted(row["uid"] for row in found if row["there"])
    lost: set[uuid.UUID] = set()
    if uids:
        run(
            connection,
            "SELECT FROM replica WHERE uid = ANY(:uids) ORDER BY uid FOR NO KEY UPDATE",
            uids=uids,
        )
        states = [ReplicaState.PENDING, ReplicaState.READY, ReplicaState.SUSPECT]
        lost = mark_state(connection, uids, "MISSING", only_from=[*states, ReplicaState.CORRUPTED])
        _let_stay(connection, [*lost])
    return len(lost), found[-1]["path"] if len(found) == limit else None


def _let_stay(connection: Connection, uids: list[uuid.UUID]) -> None:
    run(
        connection,
        """UPDATE replica SET expires_at = NULL, expiry_reason = NULL
            WHERE uid = ANY(:uids) AND expires_at IS NOT NULL
              AND (expiry_reason LIKE 'drain:%' OR expiry_reason LIKE 'rebalance:%')""",
        uids=uids,
    )


_ELSEWHERE = """EXISTS (
     SELECT FROM (SELECT * FROM replica WHERE oid = r.oid OFFSET 0) x JOIN storage s USING (storage_id)
      WHERE x.storage_id <> :storage AND x.state = 'READY' AND s.mode NOT IN ({out}))"""
_OF_STORAGE = """
  FROM replica r JOIN data_item i USING (oid)
 WHERE r.storage_id = :storage AND r.live
   AND i.state IN ('INITIALISED', 'READY', 'CORRUPTED')"""
_GONE = "'lost', 'retired'"
_ALONE = f"{_OF_STORAGE} AND NOT {_ELSEWHERE.format(out=_GONE)}"
_AWAY = f"""{_OF_STORAGE} AND {_ELSEWHERE.format(out=_GONE)}
   AND NOT {_ELSEWHERE.format(out=f"{_GONE}, 'offline'")}"""


def held_alone(connection: Connection, storage_id: uuid.UUID, limit: int) -> dict[str, Any]:
    """The items of which no other storage has a good copy: how many, their bytes, and the first
    ``limit`` of them by uri; and of how many the only others are on storages that are ``offline``.
    """
    total = rows(
        connection,
        f"SELECT count(*) AS items, coalesce(sum(i.size), 0)::bigint AS bytes {_ALONE}",
        storage=storage_id,
    )[0]
    listed = rows(
        connection,
        f"""SELECT i.uri, i.version, i.state, i.size, i.owner, r.path {_ALONE}
             ORDER BY i.uri, i.version LIMIT :limit""",
        storage=storage_id,
        limit=limit,
    )
    away = rows(connection, f"SELECT count(*) AS n {_AWAY}", storage=storage_id)[0]["n"]
    return {**total, "listed": listed, "offline": away}


def begin_audit(connection: Connection, name: str) -> None:
    """A lost or offline storage is back: nothing on it counts before it was read again.

    Raises
    ------
    NotFoundError
    IllegalTransitionError
        if it was neither lost nor offline.
    """
    run(connection, "SELECT FROM storage WHERE name = :name FOR UPDATE", name=name)
    storage = get_storage(connection, name)
    if storage["mode"] not in (StorageMode.LOST, StorageMode.OFFLINE):
        raise IllegalTransitionError(noun="storage", key=name, old=storage["mode"], new="auditing")
    run(
        connection,
        "UPDATE storage SET mode = 'auditing', mode_reason = :why WHERE storage_id = :id",
        why=f"it was {storage['mode']}",
        id=storage["storage_id"],
    )


def lock_audits(connection: Connection) -> list[dict[str, Any]]:
    """The storages that are audited and that nobody else plans for at this moment."""
    return rows(
        connection,
        """SELECT storage_id, name, managed, audit_after FROM storage WHERE mode = 'auditing'
            ORDER BY name FOR NO KEY UPDATE SKIP LOCKED""",
    )


def storages_in_audit(connection: Connection) -> list[str]:
    """Names of the storages that are audited and for which something is to be planned or ended."""
    return [
        row["name"]
        for row in rows(
            connection,
            "SELECT storage_id, name, audit_after FROM storage WHERE mode = 'auditing' ORDER BY name",
        )
        if row["audit_after"] is not None or not waits_for_looks(connection, row["storage_id"])
    ]


def doubt_replicas(
    connection: Connection, storage_id: uuid.UUID, after: str, limit: int
) -> list[dict[str, Any]]:
    """READY and MISSING replicas become SUSPECT, a page in the order of their paths from ``after``
    on; those that have to be read, none if the page is the last and empty. Keeps how far it got."""
    page = rows(
        connection,
        """SELECT uid, oid, path, state FROM replica
            WHERE storage_id = :storage AND path > :after AND owns_path
            ORDER BY path LIMIT :limit""",
        storage=storage_id,
        after=after,
        limit=limit,
    )
    uids = sorted(row["uid"] for row in page)
    run(
        connection,
        "SELECT FROM replica WHERE uid = ANY(:uids) ORDER BY uid FOR NO KEY UPDATE",
        uids=uids,
    )
    known = [
        row["uid"]
        for row in rows(
            connection,
            """SELECT r.uid FROM replica r JOIN data_item i USING (oid)
                WHERE r.uid = ANY(:uids) AND i.state <> 'INITIALISED'""",
            uids=uids,
        )
    ]
    states = [ReplicaState.READY, ReplicaState.MISSING]
    mark_state(connection, known, "SUSPECT", only_from=states)
    run(
        connection,
        "UPDATE storage SET audit_after = :path WHERE storage_id = :storage",
        path=page[-1]["path"] if len(page) == limit else None,
        storage=storage_id,
    )
    return rows(
        connection,
        """SELECT uid, oid FROM replica r WHERE uid = ANY(:uids) AND state = 'SUSPECT'
              AND NOT EXISTS (SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'verify'
                                 AND o.state IN ('QUEUED', 'RUNNING')) ORDER BY path""",
        uids=uids,
    )


def waits_for_looks(connection: Connection, storage_id: uuid.UUID) -> bool:
    """Whether something on a storage still waits to be read, or is."""
    found = rows(
        connection,
        """SELECT EXISTS (
             SELECT FROM operation o JOIN replica r USING (uid)
              WHERE o.kind = 'verify' AND o.state IN ('QUEUED', 'RUNNING')
                AND r.storage_id = :storage) AS waits""",
        storage=storage_id,
    )
    return bool(found[0]["waits"])


def end_audit(connection: Connection, storage_id: uuid.UUID, mode: str) -> None:
    """All was read: the storage is used again as before, or as ``mode`` if that is not known."""
    run(
        connection,
        "UPDATE storage SET mode = coalesce(mode_before, :mode) WHERE storage_id = :id AND mode = 'auditing'",
        mode=mode,
        id=storage_id,
    )
