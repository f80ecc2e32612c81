"""New versions of items: other bytes under the same uri."""

from __future__ import annotations

import uuid
from datetime import datetime

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.items import Announcement, Terms, insert_replica
from dlm_core.catalogue.urgency import Urgency, set_urgency
from dlm_core.types import new_id, uri_bucket

#: states of a replica whose place can be taken by a new version
_DISPLACED = ("READY", "SUSPECT", "CORRUPTED", "MISSING")


def add_version(
    connection: Connection,
    storage_id: uuid.UUID,
    old_uid: uuid.UUID | None,
    announcement: Announcement,
    terms: Terms,
    actor: str,
    now: datetime,
) -> int | None:
    """The bytes at a path are a new version: the replica ``old_uid`` that is there, if any, is
    MISSING, and the next version of the item is announced. Returns the version; None if the place is
    another's by now, or that of a replica that is being copied or trashed."""
    # of two who find the change at once the second sees what the first made of it
    run(
        connection,
        "SELECT FROM data_item WHERE uri = :uri ORDER BY version FOR NO KEY UPDATE",
        uri=announcement.uri,
    )
    owners = rows(
        connection,
        """SELECT uid, state FROM replica
            WHERE storage_id = :storage AND path = :path AND owns_path FOR NO KEY UPDATE""",
        storage=storage_id,
        path=announcement.path,
    )
    if any(owner["uid"] != old_uid or owner["state"] not in _DISPLACED for owner in owners):
        return None
    if old_uid is not None:
        _displace(connection, old_uid)
    oid, uid = new_id(), new_id()
    version = rows(
        connection,
        """INSERT INTO data_item (oid, uri, version, uri_bucket, kind, size, digest, target_phase,
                                  collection_id, owner, tags, expires_at, created_at)
           SELECT :oid, :uri, max(version) + 1, :bucket, :kind, :size, :digest, :phase,
                  CAST(:collection AS uuid), :owner, CAST(:tags AS jsonb),
                  CAST(:expires AS timestamptz), :now
             FROM data_item WHERE uri = :uri RETURNING version""",
        oid=oid, uri=announcement.uri, bucket=uri_bucket(announcement.uri),
        kind=announcement.kind.value, size=announcement.size, digest=announcement.digest,
        phase=terms.target_phase, collection=terms.collection_id, owner=terms.owner,
        tags=Jsonb(terms.tags or {}), expires=terms.item_end(now), now=now,
    )[0]["version"]  # fmt: skip
    insert_replica(
        connection, oid, uid, storage_id, announcement.path, announcement.size,
        announcement.mtime, terms.replica_expires_at, now,
    )  # fmt: skip
    run(
        connection,
        """INSERT INTO operation (operation_id, kind, oid, uid, reason, actor, due_at, created_at)
           VALUES (:id, 'admit', :oid, :uid, 'announced as a new version', :actor, :now, :now)""",
        id=new_id(),
        oid=oid,
        uid=uid,
        actor=actor,
        now=now,
    )
    if terms.urgency != Urgency():
        given = {"priority": terms.urgency.priority, "needed_by": terms.urgency.needed_by}
        set_urgency(connection, [oid], given)
    return int(version)


def _displace(connection: Connection, uid: uuid.UUID) -> None:
    """A replica whose place has other bytes is MISSING; should it be copied back, it goes beside."""
    run(
        connection,
        """UPDATE replica SET state = 'MISSING'
            WHERE uid = :uid AND state IN ('READY', 'SUSPECT', 'CORRUPTED')""",
        uid=uid,
    )
    run(
        connection,
        """UPDATE replica r SET path = split_part(i.uri, ':', 1) || '@' || i.version || '/' || r.path
             FROM data_item i WHERE r.uid = :uid AND i.oid = r.oid AND r.state = 'MISSING'""",
        uid=uid,
    )
