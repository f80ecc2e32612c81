"""Announcements that are taken back: what was never let in, and whose bytes nobody looked at."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.types import new_id

_VALID = timedelta(minutes=1)
# what is announced, was never read, and is not being copied: a copy on its way has its operation
_ANNOUNCED = """
  r.state = 'PENDING' AND r.checked_at IS NULL AND NOT EXISTS (
    SELECT FROM operation o WHERE o.uid = r.uid AND o.kind <> 'admit'
       AND o.state IN ('QUEUED', 'RUNNING'))"""
_ON_STORAGE = "(CAST(:storage AS uuid) IS NULL OR r.storage_id = :storage)"


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """How many announcements were taken back, and how many items with them, which have no others."""

    announcements: int
    items: int


def announcements_of(
    connection: Connection, oid: uuid.UUID, storage_id: uuid.UUID | None
) -> list[uuid.UUID]:
    """The announced replicas of an item that are not let in; on a storage, if one is given."""
    found = rows(
        connection,
        f"""SELECT r.uid FROM replica r
             WHERE r.oid = :oid AND {_ON_STORAGE} AND {_ANNOUNCED} ORDER BY r.uid""",
        oid=oid,
        storage=storage_id,
    )
    return [row["uid"] for row in found]


def failed_announcements(
    connection: Connection, storage_id: uuid.UUID | None, limit: int
) -> list[uuid.UUID]:
    """Announced replicas whose admission FAILED and is not asked for again, under no hold; on a
    storage, if one is given."""
    found = rows(
        connection,
        f"""SELECT r.uid FROM replica r JOIN data_item i USING (oid)
             WHERE r.uid IN (SELECT f.uid FROM operation f
                              WHERE f.state = 'FAILED' AND f.kind = 'admit')
               AND {_ON_STORAGE} AND {_ANNOUNCED} AND NOT EXISTS (
                 SELECT FROM operation o WHERE o.uid = r.uid AND o.state IN ('QUEUED', 'RUNNING'))
               AND NOT EXISTS (SELECT FROM holds_on(i.oid, i.uri, i.collection_id))
             ORDER BY r.uid LIMIT :limit""",
        storage=storage_id,
        limit=limit,
    )
    return [row["uid"] for row in found]


def withdraw(
    connection: Connection,
    uids: Sequence[uuid.UUID],
    *,
    reason: str,
    actor: str,
    now: datetime,
    oids: Sequence[uuid.UUID] = (),
) -> Withdrawn:
    """Take announced replicas back, with a certificate each, and the items that were never let in
    (or have expired) and have no others, as those of ``oids`` that have none at all. No bytes are
    touched.

    An admission that is under way loses its lease, and so writes nothing. What was let in meanwhile
    stays. The items are locked against announcements, too: who makes one of them waits, or is
    waited for. The database refuses what is under a hold, and all before a recovered catalogue is
    confirmed.
    """
    run(
        connection,
        """UPDATE operation SET state = 'CANCELLED', finished_at = :now, lease_token = NULL,
                  lease_until = NULL, error_code = 'DLM-503', error = :why
            WHERE uid = ANY(:uids) AND kind = 'admit' AND state IN ('QUEUED', 'RUNNING', 'FAILED')""",
        uids=list(uids),
        now=now,
        why=f"withdrawn: {reason}"[:2000],
    )
    items = _lock_items(connection, uids, oids)
    going = rows(
        connection,
        f"""SELECT r.uid FROM replica r WHERE r.uid = ANY(:uids) AND {_ANNOUNCED}
             ORDER BY r.uid FOR NO KEY UPDATE""",
        uids=list(uids),
    )
    gone = _release(connection, [row["uid"] for row in going], reason, actor, now)
    ended = run(
        connection,
        """UPDATE data_item i SET state = 'DELETED'
            WHERE i.oid = ANY(:oids) AND i.state IN ('INITIALISED', 'EXPIRED')
              AND NOT EXISTS (SELECT FROM replica r WHERE r.oid = i.oid AND r.state <> 'DELETED')""",
        oids=items,
    )
    return Withdrawn(gone, ended)


def _lock_items(
    connection: Connection, uids: Sequence[uuid.UUID], oids: Sequence[uuid.UUID]
) -> list[uuid.UUID]:
    found = rows(
        connection,
        """SELECT oid FROM data_item
            WHERE oid = ANY(ARRAY(SELECT oid FROM replica WHERE uid = ANY(:uids))
                            || CAST(:oids AS uuid[]))
            ORDER BY oid FOR UPDATE""",
        uids=list(uids),
        oids=list(oids),
    )
    return [row["oid"] for row in found]


def _release(
    connection: Connection, uids: Sequence[uuid.UUID], reason: str, actor: str, now: datetime
) -> int:
    keys = {"uids": list(uids), "ids": [new_id() for _ in uids]}
    pairs = "unnest(CAST(:uids AS uuid[]), CAST(:ids AS uuid[])) AS u(uid, deletion_id)"
    certificate: dict[str, Any] = {
        "reason": reason, "actor": actor, "now": now, "until": now + _VALID,
    }  # fmt: skip
    run(
        connection,
        f"""INSERT INTO deletion (deletion_id, step, basis, uid, oid, storage_id, from_state,
                                  survivors, survivor_weight, target_phase, holds_examined, reason,
                                  size, actor, proved_at, valid_until)
            SELECT u.deletion_id, 'release', 'withdrawn', r.uid, r.oid, r.storage_id, r.state, '[]',
                   0, i.target_phase, (SELECT count(*) FROM hold), :reason, r.size, :actor,
                   :now, :until
              FROM {pairs} JOIN replica r USING (uid) JOIN data_item i USING (oid)""",
        **keys,
        **certificate,
    )
    return run(
        connection,
        f"""UPDATE replica r SET state = 'DELETED', released_at = :now,
                   deletion_id = u.deletion_id
              FROM {pairs} WHERE r.uid = u.uid""",
        now=now,
        **keys,
    )
