"""What a storage's description of itself says, and which of it has changed since the last one.

A row of ``storage_export`` remembers how far the newest description has come in the event feed: all
events of transactions below ``seen_xid``, and all up to ``low_seq``, are in it. The second is what
keeps the question cheap; the first makes it right, since a late commit may have drawn a low number.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

from dlm_core.catalogue.engine import alone, rows, run
from dlm_core.errors import ExportRunningError

#: advisory locks of exports; the second key is the storage's
_LOCK = 0x646C6D65
_PAGE = 500
_LAST_BUCKET = "fffff"


def exporting(
    engine: Engine, actor: str, storage_id: uuid.UUID, name: str
) -> AbstractContextManager[None]:
    """Nobody else exports this storage meanwhile.

    Raises
    ------
    ExportRunningError
        if somebody does.
    """
    return alone(engine, actor, _LOCK, storage_id, ExportRunningError(storage=name))


def load_progress(connection: Connection, storage_id: uuid.UUID) -> dict[str, Any] | None:
    """The row of ``storage_export``, transaction ids as text; None before the first export and
    after a recovery."""
    found = rows(
        connection,
        """SELECT digits, index_path, index_digest, seen_xid::text, low_seq, next_xid::text, next_seq
             FROM storage_export WHERE storage_id = :id""",
        id=storage_id,
    )
    return found[0] if found else None


def look_around(connection: Connection) -> dict[str, Any]:
    """Where the event feed is at this moment: what is read later holds all events below it."""
    return rows(
        connection,
        """SELECT pg_snapshot_xmin(s)::text AS seen_xid, pg_snapshot_xmax(s)::text AS next_xid,
                  (SELECT coalesce(max(seq), 0) FROM event) AS next_seq,
                  (SELECT coalesce(min(seq), 0) FROM event) AS oldest_seq
             FROM pg_current_snapshot() s""",
    )[0]


def count_replicas(connection: Connection, storage_id: uuid.UUID) -> int:
    """Replicas on a storage that are not deleted, from the tally."""
    found = rows(
        connection, "SELECT replicas FROM storage_usage WHERE storage_id = :id", id=storage_id
    )
    return int(found[0]["replicas"])


def used_prefixes(connection: Connection, storage_id: uuid.UUID, digits: int) -> set[str]:
    """The first ``digits`` of uri_bucket of all that lies on a storage; goes through all of it."""
    found = rows(
        connection,
        """SELECT DISTINCT left(i.uri_bucket, :digits) AS prefix
             FROM replica r JOIN data_item i USING (oid)
            WHERE r.storage_id = :id AND r.state <> 'DELETED'""",
        id=storage_id,
        digits=digits,
    )
    return {row["prefix"] for row in found}


def changed_prefixes(
    connection: Connection, storage_id: uuid.UUID, progress: Mapping[str, Any]
) -> set[str]:
    """Prefixes of what lies or lay on a storage and has events that ``progress`` has not seen."""
    found = rows(
        connection,
        """SELECT DISTINCT left(i.uri_bucket, :digits) AS prefix
             FROM (SELECT DISTINCT oid FROM event
                    WHERE seq > :low AND xid >= CAST(:seen AS xid8) AND oid IS NOT NULL
                      AND noun IN ('item', 'replica')) e
             JOIN data_item i USING (oid)
            WHERE EXISTS (SELECT FROM replica r WHERE r.oid = e.oid AND r.storage_id = :id OFFSET 0)""",
        id=storage_id,
        digits=progress["digits"],
        low=progress["low_seq"],
        seen=progress["seen_xid"],
    )
    return {row["prefix"] for row in found}


# One JSON object a replica, written by the database: no value changes its form on the way.
_LINES = """
SELECT to_jsonb(line)::text AS line FROM (
  SELECT r.uid, r.oid, i.uri, i.version, i.uri_bucket, r.path, r.state, i.state AS item_state, i.kind, i.size,
         i.digest, i.content_type, i.target_phase, c.name AS collection, i.owner, i.metadata, i.tags,
         i.created_at, i.expires_at, i.expiry_reason, r.mtime, r.created_at AS replica_created_at,
         r.checked_at, r.accessed_at, r.expires_at AS replica_expires_at,
         r.expiry_reason AS replica_expiry_reason,
         CASE WHEN i.kind = 'directory' THEN (
           SELECT jsonb_agg(jsonb_build_array(f.path, f.size, f.digest) ORDER BY f.path COLLATE "C")
             FROM manifest_file f WHERE f.oid = i.oid) END AS files
    FROM data_item i JOIN replica r USING (oid) LEFT JOIN collection c USING (collection_id)
   WHERE i.uri_bucket BETWEEN :first AND :last AND r.storage_id = :id AND r.state <> 'DELETED') line
 ORDER BY line.uri, line.version, line.uid
"""


def describe_prefix(connection: Connection, storage_id: uuid.UUID, prefix: str) -> Iterator[str]:
    """A line of JSON for each replica on a storage whose uri_bucket starts with ``prefix``."""
    found = connection.execute(
        text(_LINES),
        {
            "id": storage_id,
            "first": prefix.ljust(len(_LAST_BUCKET), "0"),
            "last": prefix + _LAST_BUCKET[len(prefix) :],
        },
        execution_options={"yield_per": _PAGE},
    )
    for (line,) in found:
        yield line


def describe_storage(connection: Connection, storage_id: uuid.UUID) -> dict[str, Any]:
    """The rows of a storage and of its location; config holds references, never secrets."""
    found = rows(
        connection,
        """SELECT to_jsonb(s) - '{rebalance_after,verify_day,verify_day_bytes}'::text[] AS storage,
                  to_jsonb(l) AS location
             FROM storage s JOIN location l USING (location_id) WHERE s.storage_id = :id""",
        id=storage_id,
    )
    return found[0]


_SITE = """
SELECT to_jsonb(line)::text AS line FROM (
  SELECT 'collection' AS noun, to_jsonb(c) || jsonb_build_object('parent', p.name) AS told,
         c.name AS key FROM collection c LEFT JOIN collection p ON p.collection_id = c.parent_id
  UNION ALL
  SELECT 'hold', to_jsonb(h) || jsonb_build_object('uri', i.uri, 'version', i.version,
                                                   'collection', c.name), h.hold_id::text
    FROM hold h LEFT JOIN data_item i USING (oid)
    LEFT JOIN collection c ON c.collection_id = h.collection_id
   WHERE hold_in_force(h)) line
 ORDER BY line.noun, line.key
"""


def describe_site(connection: Connection) -> Iterator[str]:
    """A line of JSON for each collection and each hold in force: they belong to no storage."""
    for (line,) in connection.execute(text(_SITE), execution_options={"yield_per": _PAGE}):
        yield line


def note_export(
    connection: Connection,
    storage_id: uuid.UUID,
    progress: Mapping[str, Any],
    around: Mapping[str, Any],
    index: tuple[str, str],
    digits: int,
    now: datetime,
) -> None:
    """A storage carries a description of itself that holds all events up to ``around``, and whose
    reading began after it; ``index`` is its path and digest, ``progress`` an earlier look around
    with the ``low_seq`` known then."""
    if int(around["seen_xid"]) >= int(progress["next_xid"]):
        # all that had drawn a number by then has ended, so this description has it
        low, mark = progress["next_seq"], around
    else:
        low, mark = progress["low_seq"], progress
    run(
        connection,
        """INSERT INTO storage_export (storage_id, digits, index_path, index_digest, seen_xid, low_seq,
                                       next_xid, next_seq, exported_at)
           VALUES (:id, :digits, :path, :digest, CAST(:seen AS xid8), :low, CAST(:next AS xid8),
                   :next_seq, :now)
           ON CONFLICT (storage_id) DO UPDATE SET digits = EXCLUDED.digits,
                  index_path = EXCLUDED.index_path, index_digest = EXCLUDED.index_digest,
                  seen_xid = EXCLUDED.seen_xid, low_seq = EXCLUDED.low_seq,
                  next_xid = EXCLUDED.next_xid, next_seq = EXCLUDED.next_seq,
                  exported_at = EXCLUDED.exported_at""",
        id=storage_id,
        digits=digits,
        path=index[0],
        digest=index[1],
        seen=around["seen_xid"],
        low=low,
        next=mark["next_xid"],
        next_seq=mark["next_seq"],
        now=now,
    )


def exports_due(connection: Connection, before: datetime) -> list[str]:
    """Names of the storages that the DLM may write to and whose description is older than
    ``before``, or which have none."""
    found = rows(
        connection,
        """SELECT s.name FROM storage s LEFT JOIN storage_export e USING (storage_id)
            WHERE s.managed AND s.mode IN ('read_write', 'draining')
              AND (e.exported_at IS NULL OR e.exported_at < :before) ORDER BY s.name""",
        before=before,
    )
    return [row["name"] for row in found]
