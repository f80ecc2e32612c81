"""Set-based statements on replicas and the items they belong to: planning, copying, verifying."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import Texts, rows, run
from dlm_core.types import ReplicaState

#: whether what lies on a storage has to be staged, by the alias of its row
COLD = "jsonb_exists({}.config, 'stage')"
#: from when on the next check of a replica r counts that was just read. What comes in keeps what it
#: came with for an hour: no index is touched then
CHECKED = """CASE WHEN r.state = 'PENDING' AND r.check_from
  BETWEEN CAST(:now AS timestamptz) - interval '1 hour' AND CAST(:now AS timestamptz)
  THEN r.check_from ELSE CAST(:now AS timestamptz) END"""
#: a storage that failed to take a copy of an item is not asked again for this long
_EXCLUSION = timedelta(hours=1)


def count_evaluations_due(connection: Connection, now: datetime, limit: int = 100_000) -> int:
    """Items the planner has to look at now; counting stops at ``limit``."""
    found = rows(
        connection,
        "SELECT count(*) AS n FROM (SELECT FROM evaluation WHERE due_at <= :now LIMIT :limit) due",
        now=now,
        limit=limit,
    )
    return int(found[0]["n"])


def take_evaluations(connection: Connection, now: datetime, limit: int) -> dict[uuid.UUID, int]:
    """Take due evaluations off the list: tries so far by oid.

    What changes after this transaction's look puts the item on the list again, since the list's
    row is gone and the triggers insert a new one.
    """
    found = rows(
        connection,
        """DELETE FROM evaluation WHERE oid IN (
             SELECT oid FROM evaluation WHERE due_at <= :now ORDER BY due_at LIMIT :limit
             FOR UPDATE SKIP LOCKED)
           RETURNING oid, attempts""",
        now=now,
        limit=limit,
    )
    return {row["oid"]: row["attempts"] for row in found}


def put_evaluations(
    connection: Connection, dues: Sequence[tuple[uuid.UUID, datetime, int]]
) -> None:
    """Put (oid, due_at, attempts) on the list; an earlier due time that is there stays."""
    run(
        connection,
        """INSERT INTO evaluation (oid, due_at, attempts)
           SELECT * FROM unnest(CAST(:oids AS uuid[]), CAST(:dues AS timestamptz[]),
                                CAST(:tries AS integer[])) AS u(oid, due_at, attempts)
            ORDER BY oid
           ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at)""",
        oids=[oid for oid, _, _ in dues],
        dues=[due for _, due, _ in dues],
        tries=[attempts for _, _, attempts in dues],
    )


def lock_items(connection: Connection, oids: Sequence[uuid.UUID]) -> list[dict[str, Any]]:
    """Items in key order, locked against other planners and state changes."""
    return rows(
        connection,
        """SELECT oid, uri, version, state, kind, size, digest, target_phase, phase_weight,
                  shortfall, collection_id, expires_at
             FROM data_item WHERE oid = ANY(:oids) ORDER BY oid FOR NO KEY UPDATE""",
        oids=list(oids),
    )


def replicas_of(
    connection: Connection, oids: Sequence[uuid.UUID], *, lock: bool = False
) -> list[dict[str, Any]]:
    """All replicas of items that are not trashed or deleted, in key order, locked if asked."""
    return rows(
        connection,
        """SELECT uid, oid, storage_id, path, state, size, digest, checked_at, expires_at,
                  excluded_until
             FROM replica WHERE oid = ANY(:oids) AND live
            ORDER BY uid"""
        + (" FOR NO KEY UPDATE" if lock else ""),
        oids=list(oids),
    )


def awaiting_first_look(connection: Connection, oids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Items with a SUSPECT replica whose look is queued and was not tried yet, or is being taken
    for the first time."""
    found = rows(
        connection,
        """SELECT DISTINCT r.oid FROM replica r JOIN operation o ON o.uid = r.uid
            WHERE r.oid = ANY(:oids) AND r.state = 'SUSPECT' AND o.kind = 'verify'
              AND ((o.state = 'QUEUED' AND o.attempts = 0) OR (o.state = 'RUNNING' AND o.attempts = 1))""",
        oids=list(oids),
    )
    return {row["oid"] for row in found}


def insert_pending(
    connection: Connection, records: Sequence[dict[str, Any]], now: datetime
) -> set[uuid.UUID]:
    """Insert replicas that are to be copied; the uids that were, others' places were taken or
    their storage retired at this moment (it waits for us, or we for it)."""
    found = rows(
        connection,
        """INSERT INTO replica (uid, oid, storage_id, path, size, created_at, accessed_at,
                                check_from)
           SELECT u.uid, u.oid, storage_id, u.path, u.size, :now, :now, :now
             FROM unnest(CAST(:uids AS uuid[]), CAST(:oids AS uuid[]), CAST(:storages AS uuid[]),
                         CAST(:paths AS text[]), CAST(:sizes AS bigint[]))
                  AS u(uid, oid, storage_id, path, size)
             JOIN (SELECT storage_id FROM storage WHERE storage_id = ANY(:storages)
                      AND mode NOT IN ('retired', 'lost') FOR KEY SHARE) s USING (storage_id)
           ON CONFLICT DO NOTHING RETURNING uid""",
        now=now,
        uids=[record["uid"] for record in records],
        oids=[record["oid"] for record in records],
        storages=[record["storage_id"] for record in records],
        paths=Texts([record["path"] for record in records]),
        sizes=[record["size"] for record in records],
    )
    return {row["uid"] for row in found}


def owners_of_places(
    connection: Connection, records: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], str]]:
    """Those of ``records`` (as for :func:`insert_pending`) whose path on their storage is that of
    another item's replica, with that item's uri and version; or of a trashed copy of their own item
    for which nothing is under way, as when its restore has FAILED."""
    found = rows(
        connection,
        """SELECT u.n, CASE WHEN r.oid = u.oid THEN 'its copy in the trash, which waits for dlm retry'
                            ELSE i.uri || CASE WHEN i.version > 1 THEN '#' || i.version ELSE '' END
                       END AS owner
             FROM unnest(CAST(:oids AS uuid[]), CAST(:storages AS uuid[]), CAST(:paths AS text[]))
                  WITH ORDINALITY AS u(oid, storage_id, path, n)
             JOIN replica r ON r.storage_id = u.storage_id AND r.path = u.path AND r.owns_path
             JOIN data_item i ON i.oid = r.oid
            WHERE r.oid <> u.oid OR (r.state = 'TRASHED' AND NOT EXISTS (
                  SELECT FROM operation o WHERE o.uid = r.uid AND o.state IN ('QUEUED', 'RUNNING')))""",
        oids=[record["oid"] for record in records],
        storages=[record["storage_id"] for record in records],
        paths=[record["path"] for record in records],
    )
    return [(records[row["n"] - 1], row["owner"]) for row in found]


def remake_replicas(connection: Connection, uids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Set CORRUPTED and MISSING replicas to PENDING, to be copied again; those that were."""
    found = rows(
        connection,
        """UPDATE replica SET state = 'PENDING', expires_at = NULL, expiry_reason = NULL,
                  own_expires_at = NULL, own_expiry_reason = NULL, mtime = NULL
            WHERE uid = ANY(:uids) AND state IN ('CORRUPTED', 'MISSING') RETURNING uid""",
        uids=list(uids),
    )
    return {row["uid"] for row in found}


def update_phases(
    connection: Connection, changes: Sequence[tuple[uuid.UUID, int, str | None, str]]
) -> None:
    """Write (oid, phase_weight, shortfall, state) of items that differ from what is there."""
    run(
        connection,
        """UPDATE data_item i SET phase_weight = u.weight, shortfall = u.shortfall, state = u.state
             FROM unnest(CAST(:oids AS uuid[]), CAST(:weights AS smallint[]),
                         CAST(:shortfalls AS text[]), CAST(:states AS text[]))
                  AS u(oid, weight, shortfall, state)
            WHERE i.oid = u.oid
              AND (i.phase_weight, i.shortfall, i.state)
                  IS DISTINCT FROM (u.weight, u.shortfall, u.state)""",
        oids=[change[0] for change in changes],
        weights=[change[1] for change in changes],
        shortfalls=[change[2] for change in changes],
        states=[change[3] for change in changes],
    )


def copy_details(
    connection: Connection, operation_ids: Sequence[uuid.UUID]
) -> list[dict[str, Any]]:
    """What copy operations need: the replica to make, the item, and the best source there is.

    The source is chosen now, not when the copy was planned: READY, on a storage that can be read,
    not the one that failed in the last try if there is another, what need not be staged first, disk
    before tape, the same location first, newest check first; ``sources`` is how many there are.
    """
    # OFFSET 0: while statistics are young, an index of all READY replicas looks smaller than it is
    return rows(
        connection,
        f"""SELECT o.operation_id, o.partial, t.uid, t.oid, t.state, t.path, t.storage_id, i.uri, i.kind,
                  i.size, i.digest, i.state AS item_state, s.uid AS source_uid, s.path AS source_path,
                  s.storage_id AS source_storage_id, s.sources
             FROM operation o
             JOIN replica t ON t.uid = o.uid
             JOIN storage ts ON ts.storage_id = t.storage_id
             JOIN data_item i ON i.oid = t.oid
             LEFT JOIN LATERAL (
               SELECT r.uid, r.path, r.storage_id, count(*) OVER () AS sources
                 FROM (SELECT * FROM replica WHERE oid = t.oid OFFSET 0) r
                 JOIN storage rs USING (storage_id)
                WHERE r.state = 'READY' AND rs.mode IN ('read_write', 'read_only', 'draining')
                ORDER BY (r.uid IS NOT DISTINCT FROM o.source_uid), {COLD.format("rs")},
                         (rs.class = 'tape'), (rs.location_id <> ts.location_id), r.checked_at DESC, r.uid
                LIMIT 1) s ON true
            WHERE o.operation_id = ANY(:ids)
            ORDER BY o.priority, o.due_at, o.operation_id""",
        ids=list(operation_ids),
    )


def note_sources(connection: Connection, pairs: Sequence[tuple[uuid.UUID, uuid.UUID]]) -> None:
    """Remember the source that a failed copy read, so that the next try prefers another."""
    run(
        connection,
        """UPDATE operation o SET source_uid = u.source
             FROM unnest(CAST(:ids AS uuid[]), CAST(:sources AS uuid[])) AS u(id, source)
            WHERE o.operation_id = u.id""",
        ids=[pair[0] for pair in pairs],
        sources=[pair[1] for pair in pairs],
    )


def manifests_of(
    connection: Connection, oids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, list[dict[str, Any]]]:
    """Manifest rows by oid, in path order."""
    found = rows(
        connection,
        """SELECT oid, path, size, digest FROM manifest_file WHERE oid = ANY(:oids)
            ORDER BY oid, path COLLATE "C" """,
        oids=list(oids),
    )
    grouped: dict[uuid.UUID, list[dict[str, Any]]] = {}
    for row in found:
        grouped.setdefault(row["oid"], []).append(row)
    return grouped


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a replica's bytes: None for size and digest if there is nothing."""

    uid: uuid.UUID
    size: int | None
    digest: str | None


def mark_ready(
    connection: Connection,
    seen: Sequence[Seen],
    now: datetime,
    *,
    only_from: Sequence[str] = ("PENDING", "READY", "SUSPECT"),
) -> int:
    """Replicas whose bytes were observed become READY, or stay it with a newer check; how many.

    Those in other states than ``only_from``, as if trashed meanwhile, are left alone. The database
    refuses any whose digest or size is not the item's.
    """
    if not seen:
        return 0
    return run(
        connection,
        f"""UPDATE replica r SET state = 'READY', size = u.size, digest = u.digest,
                  checked_at = :now, check_from = {CHECKED}, excluded_until = NULL
             FROM unnest(CAST(:uids AS uuid[]), CAST(:sizes AS bigint[]),
                         CAST(:digests AS text[])) AS u(uid, size, digest)
            WHERE r.uid = u.uid AND r.state = ANY(:only_from)""",
        now=now,
        only_from=list(only_from),
        uids=[one.uid for one in seen],
        sizes=[one.size for one in seen],
        digests=Texts([one.digest or "" for one in seen]),
    )


def mark_state(
    connection: Connection,
    uids: Sequence[uuid.UUID],
    state: str,
    *,
    only_from: Sequence[str],
    excluded_until: datetime | None = None,
) -> set[uuid.UUID]:
    """Move replicas that are in one of ``only_from`` to ``state``; those that were."""
    found = rows(
        connection,
        """UPDATE replica SET state = :state,
                  excluded_until = coalesce(CAST(:until AS timestamptz), excluded_until)
            WHERE uid = ANY(:uids) AND state = ANY(:only_from) RETURNING uid""",
        uids=list(uids),
        state=state,
        only_from=list(only_from),
        until=excluded_until,
    )
    return {row["uid"] for row in found}


def give_up_copies(connection: Connection, uids: Sequence[uuid.UUID], now: datetime) -> None:
    """Replicas whose copy failed for good are MISSING, and their storage is left alone a while."""
    mark_state(
        connection,
        uids,
        ReplicaState.MISSING,
        only_from=[ReplicaState.PENDING],
        excluded_until=now + _EXCLUSION,
    )


def note_brought_back(connection: Connection, places: Mapping[uuid.UUID, str]) -> None:
    """Write into the log that bytes came back from quarantine, and from which place there."""
    # to an object store they are new ones
    run(connection, "UPDATE replica SET mtime = NULL WHERE uid = ANY(:uids)", uids=list(places))
    run(
        connection,
        """INSERT INTO event (noun, action, oid, uid, storage_id, actor, detail)
           SELECT 'replica', 'brought_back', r.oid, r.uid, r.storage_id, dlm_actor(),
                  jsonb_build_object('from', u.place)
             FROM unnest(CAST(:uids AS uuid[]), CAST(:places AS text[])) AS u(uid, place)
             JOIN replica r USING (uid)""",
        uids=list(places),
        places=list(places.values()),
    )


def replica_details(
    connection: Connection, uids: Sequence[uuid.UUID], *, lock: bool = False
) -> dict[uuid.UUID, dict[str, Any]]:
    """Replicas with their item's digest, size and kind, by uid."""
    found = rows(
        connection,
        """SELECT r.*, i.uri, i.version, i.kind, i.digest AS item_digest, i.size AS item_size,
                  i.state AS item_state, i.expires_at AS item_expires_at
             FROM replica r JOIN data_item i USING (oid)
            WHERE r.uid = ANY(:uids) ORDER BY r.uid"""
        + (" FOR NO KEY UPDATE OF r" if lock else ""),
        uids=list(uids),
    )
    return {row["uid"]: row for row in found}


def select_unmarked(
    connection: Connection,
    storage_id: uuid.UUID,
    limit: int,
    after: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Replicas on a storage that are not leaving, coldest first, then largest; those behind the row
    ``after``, if one is given."""
    behind = (
        """AND accessed_at >= :accessed_at
           AND (accessed_at, -size, uid) > (:accessed_at, -CAST(:size AS bigint), :uid)"""
        if after
        else ""
    )
    return rows(
        connection,
        f"""SELECT uid, oid, size, state, accessed_at FROM replica
             WHERE storage_id = :storage AND expires_at IS NULL AND live
               AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING') {behind}
             ORDER BY accessed_at, size DESC, uid LIMIT :limit""",
        storage=storage_id,
        limit=limit,
        **({key: after[key] for key in ("accessed_at", "size", "uid")} if after else {}),
    )


def select_staying(
    connection: Connection, storage_id: uuid.UUID, now: datetime, limit: int
) -> list[dict[str, Any]]:
    """Replicas on a storage whose own time comes later: a drain does not wait for it."""
    return rows(
        connection,
        """SELECT uid, oid, size, state FROM replica
            WHERE storage_id = :storage AND deletable_at IS NOT NULL AND expires_at > :now
            LIMIT :limit""",
        storage=storage_id,
        now=now,
        limit=limit,
    )


def mark_leaving(
    connection: Connection, uids: Sequence[uuid.UUID], reason: str, now: datetime
) -> int:
    """Let replicas expire now: replication stops counting them, expiry deletes them with proof. An
    expiry of their own is remembered."""
    return run(
        connection,
        """UPDATE replica SET expires_at = greatest(:now, created_at), expiry_reason = :reason,
                  own_expires_at = expires_at, own_expiry_reason = expiry_reason
            WHERE uid = ANY(:uids) AND (expires_at IS NULL OR expires_at > :now)
              AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING')""",
        uids=list(uids),
        reason=reason,
        now=now,
    )


def keep_drained(connection: Connection, storage_id: uuid.UUID) -> int:
    """A drain is called off: what was to leave for it stays, with the expiry that it had before."""
    return run(
        connection,
        """UPDATE replica SET expires_at = own_expires_at, expiry_reason = own_expiry_reason,
                  own_expires_at = NULL, own_expiry_reason = NULL
            WHERE storage_id = :id AND deletable_at IS NOT NULL AND expiry_reason LIKE 'drain:%'""",
        id=storage_id,
    )


def leaving_bytes(connection: Connection, storage_id: uuid.UUID, now: datetime) -> int:
    """Bytes of replicas on a storage whose time is over but which are not trashed yet."""
    found = rows(
        connection,
        """SELECT coalesce(sum(size), 0) AS n FROM replica
            WHERE storage_id = :storage AND deletable_at IS NOT NULL AND expires_at <= :now""",
        storage=storage_id,
        now=now,
    )
    return int(found[0]["n"])


def put_off_deletion(
    connection: Connection, uids: Sequence[uuid.UUID], now: datetime, delay: timedelta
) -> None:
    """Ask again for a refused deletion only after ``delay``."""
    run(
        connection,
        "UPDATE replica SET delete_after = :until WHERE uid = ANY(:uids)",
        uids=list(uids),
        until=now + delay,
    )


def resume_deletions(connection: Connection, oids: Collection[uuid.UUID], now: datetime) -> int:
    """Items that have got another copy: deletions refused for want of it are due at once."""
    # hardly ever there are any: a statement that writes costs more, though it writes nothing
    refused = rows(
        connection,
        """SELECT uid FROM replica
            WHERE oid = ANY(:oids) AND delete_after > expires_at AND delete_after > :now
              AND expires_at <= :now AND deletable_at IS NOT NULL""",
        oids=list(oids),
        now=now,
    )
    if not refused:
        return 0
    return run(
        connection,
        """UPDATE replica SET delete_after = expires_at
            WHERE uid = ANY(:uids) AND deletable_at IS NOT NULL""",
        uids=[row["uid"] for row in refused],
    )


def known_paths(connection: Connection, storage_id: uuid.UUID, paths: Collection[str]) -> set[str]:
    """Those of ``paths`` (encoded) at which a replica lies on a storage, or may lie."""
    found = rows(
        connection,
        """SELECT path FROM replica
            WHERE storage_id = :storage AND path = ANY(:paths) AND owns_path""",
        storage=storage_id,
        paths=list(paths),
    )
    return {row["path"] for row in found}
