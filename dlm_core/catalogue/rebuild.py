"""Make a catalogue again from what storages say of themselves.

Nothing that they say is a proof: items become READY with the digest that their bytes have to have,
every replica becomes SUSPECT with a look queued, and only that look makes it READY.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.engine import copy_rows, rows, run
from dlm_core.errors import RestoreRefusedError
from dlm_core.types import OperationKind, new_id

REASON = "the catalogue was rebuilt"

_TOLD = """
  uid uuid, oid uuid, uri text, version integer, uri_bucket text, path text, state text, item_state text, kind text,
  size bigint, digest text, content_type text, target_phase text, collection text, owner text,
  metadata jsonb, tags jsonb, created_at timestamptz, expires_at timestamptz, expiry_reason text,
  mtime double precision, replica_created_at timestamptz, accessed_at timestamptz,
  replica_expires_at timestamptz, replica_expiry_reason text, files jsonb"""


@dataclass(slots=True)
class Merged:
    """What a chunk of lines became."""

    items: int = 0
    replicas: int = 0
    #: items that an older description tells differently
    differing: int = 0
    #: (uri, path, why) of what was not taken over
    refused: list[tuple[str, str, str]] = field(default_factory=list)


def must_be_empty(connection: Connection) -> None:
    """Raise ``RestoreRefusedError`` if the catalogue holds anything that a rebuild would make."""
    run(
        connection,
        "LOCK TABLE location, storage, collection, data_item IN SHARE ROW EXCLUSIVE MODE",
    )
    for table in ("data_item", "storage", "location", "collection", "hold"):
        if rows(connection, f"SELECT FROM {table} LIMIT 1"):
            database = rows(connection, "SELECT current_database() AS name")[0]["name"]
            raise RestoreRefusedError(
                database=database, found=f"is not empty (table {table})",
                hint="make a new one, and 'dlm db upgrade' there",
            )  # fmt: skip


def look_up_by_key(connection: Connection) -> None:
    """Have this transaction look rows up by their keys: statistics tell of an empty catalogue until
    it is over, and each chunk would go through all that the chunks before it have brought."""
    run(connection, "SET LOCAL enable_seqscan = off")


def insert_storage(
    connection: Connection,
    storage: Mapping[str, Any],
    location: Mapping[str, Any],
    place: Mapping[str, Any],
) -> None:
    """A storage as it told of itself, at its place of now (``interface``, ``root``, ``config``)."""
    run(
        connection,
        """INSERT INTO location SELECT * FROM jsonb_populate_record(NULL::location, CAST(:told AS jsonb))
           ON CONFLICT DO NOTHING""",
        told=Jsonb(dict(location)),
    )
    told = {"verify_day_bytes": 0, **storage, **place}
    run(
        connection,
        "INSERT INTO storage SELECT * FROM jsonb_populate_record(NULL::storage, CAST(:told AS jsonb))",
        told=Jsonb(told),
    )


def insert_collections(connection: Connection, told: Iterable[Mapping[str, Any]]) -> None:
    """Collections that are not there yet; parents first, whatever the order they are told in."""
    left = {one["name"]: one for one in told}
    while left:
        ready = [one for one in left.values() if one["parent"] not in left]
        if not ready:  # a ring, which no catalogue makes: then without parents
            ready = [dict(one, parent=None) for one in left.values()]
        for one in ready:
            del left[one["name"]]
            run(
                connection,
                """INSERT INTO collection (collection_id, name, parent_id, metadata, created_at)
                   SELECT CAST(:id AS uuid), CAST(:name AS text), (SELECT collection_id FROM collection WHERE name = :parent),
                          CAST(:metadata AS jsonb), CAST(:created AS timestamptz)
                   ON CONFLICT DO NOTHING""",
                id=one["collection_id"],
                name=one["name"],
                parent=one["parent"],
                metadata=Jsonb(one["metadata"]),
                created=one["created_at"],
            )


def insert_hold(connection: Connection, told: Mapping[str, Any]) -> bool:
    """A hold in force when it was told; False if what it holds is not in this catalogue."""
    inserted = run(
        connection,
        """INSERT INTO hold (hold_id, oid, collection_id, uri_prefix, uri_pattern, everything, locked,
                             reason, actor, created_at, ends_at)
           SELECT h.hold_id, i.oid, c.collection_id, h.uri_prefix, h.uri_pattern, h.everything,
                  h.locked, h.reason, h.actor, h.created_at, h.ends_at
             FROM jsonb_populate_record(NULL::hold, CAST(:told AS jsonb)) h
             LEFT JOIN data_item i ON i.uri = :uri AND i.version = :version
             LEFT JOIN collection c ON c.name = :collection
            WHERE (h.oid IS NULL OR i.oid IS NOT NULL)
              AND (h.collection_id IS NULL OR c.collection_id IS NOT NULL)
           ON CONFLICT DO NOTHING""",
        told=Jsonb(dict(told)),
        uri=told["uri"],
        version=told["version"],
        collection=told["collection"],
    )
    known = rows(connection, "SELECT FROM hold WHERE hold_id = :id", id=uuid.UUID(told["hold_id"]))
    return bool(inserted or known)


def merge_lines(
    connection: Connection,
    storage_id: uuid.UUID,
    lines: Iterable[str],
    actor: str,
    now: datetime,
) -> Merged:
    """Take over a chunk of what a storage tells of its replicas.

    What is there already was told by a newer description and stays. A replica whose digest is not
    its item's, or whose place is taken, is refused; an item that has no other is left INITIALISED.
    """
    copy_rows(connection, "line", {"line": "text"}, ((line,) for line in lines))
    run(connection, "DROP TABLE IF EXISTS pg_temp.told")
    run(
        connection,
        f"""CREATE TEMPORARY TABLE told ON COMMIT DROP AS
              SELECT t.* FROM line, jsonb_to_record(line::jsonb) AS t({_TOLD})""",
    )
    # of a catalogue that took texts which cannot be shown on a line
    run(
        connection,
        r"""UPDATE told SET owner = nullif(trim(regexp_replace(owner, '[\x01-\x1f\x7f]', ' ', 'g')), '')
             WHERE owner = '' OR owner ~ '[\x01-\x1f\x7f]'""",
    )
    run(connection, "ANALYZE told")
    _insert_named_collections(connection, now)
    merged = Merged(items=_insert_items(connection))
    merged.differing = _count_differing(connection)
    merged.refused = _refuse_conflicts(connection)
    _insert_replicas(connection, storage_id, now)
    merged.refused += _refuse_taken(connection)
    merged.replicas = _suspect_and_look(connection, actor, now)
    # the database lets no item begin as READY, nor be it without a copy that may be good
    run(
        connection,
        """UPDATE data_item SET state = 'READY' WHERE state = 'INITIALISED'
              AND oid IN (SELECT oid FROM told)""",
    )
    return merged


def _insert_named_collections(connection: Connection, now: datetime) -> None:
    """Collections that only items tell of: their own file was damaged."""
    found = rows(
        connection,
        """SELECT DISTINCT collection FROM told t WHERE collection IS NOT NULL
              AND NOT EXISTS (SELECT FROM collection c WHERE c.name = t.collection)""",
    )
    for row in found:
        run(
            connection,
            "INSERT INTO collection (collection_id, name, created_at) VALUES (:id, :name, :now)",
            id=new_id(),
            name=row["collection"],
            now=now,
        )


def _insert_items(connection: Connection) -> int:
    inserted = run(
        connection,
        """INSERT INTO data_item (oid, uri, version, uri_bucket, kind, size, digest, content_type,
                                  target_phase, collection_id, owner, metadata, tags, created_at,
                                  expires_at, expiry_reason)
           SELECT DISTINCT ON (t.uri, t.version) t.oid, t.uri, t.version, t.uri_bucket, t.kind, t.size,
                  t.digest, t.content_type, t.target_phase, c.collection_id, t.owner, t.metadata,
                  t.tags, t.created_at, t.expires_at, t.expiry_reason
             FROM told t LEFT JOIN collection c ON c.name = t.collection
            ORDER BY t.uri, t.version, t.uid
           ON CONFLICT DO NOTHING""",
    )
    run(
        connection,
        """INSERT INTO manifest_file (oid, path, size, digest)
           SELECT t.oid, f->>0, CAST(f->>1 AS bigint), f->>2
             FROM (SELECT DISTINCT ON (oid) oid, digest, files FROM told WHERE files IS NOT NULL) t
             JOIN data_item i USING (oid), jsonb_array_elements(t.files) f
            WHERE i.digest = t.digest
           ON CONFLICT DO NOTHING""",
    )
    return inserted


def _count_differing(connection: Connection) -> int:
    found = rows(
        connection,
        """SELECT count(DISTINCT i.oid) AS n FROM told t JOIN data_item i USING (uri, version)
             LEFT JOIN collection c ON c.collection_id = i.collection_id
            WHERE (t.target_phase, t.collection, t.owner, t.metadata, t.tags, t.expires_at)
                  IS DISTINCT FROM
                  (i.target_phase, c.name, i.owner, i.metadata, i.tags, i.expires_at)""",
    )
    return int(found[0]["n"])


def _refuse_conflicts(connection: Connection) -> list[tuple[str, str, str]]:
    """Leave out what has other bytes than its item; the rest belongs to the item of its uri."""
    gone = rows(
        connection,
        """DELETE FROM told t WHERE NOT EXISTS (
             SELECT FROM data_item i WHERE i.uri = t.uri AND i.version = t.version
                AND (i.digest, i.size, i.kind) = (t.digest, t.size, t.kind))
           RETURNING t.uri, t.path, t.digest""",
    )
    run(
        connection,
        """UPDATE told t SET oid = i.oid FROM data_item i
            WHERE i.uri = t.uri AND i.version = t.version AND i.oid <> t.oid""",
    )
    return [
        (row["uri"], row["path"], f"a newer description has other bytes than {row['digest']}")
        for row in gone
    ]


def _insert_replicas(connection: Connection, storage_id: uuid.UUID, now: datetime) -> None:
    run(
        connection,
        """INSERT INTO replica (uid, oid, storage_id, path, size, mtime, created_at, accessed_at,
                                check_from, expires_at, expiry_reason)
           SELECT uid, oid, :storage, path, size, mtime, least(replica_created_at, :now), accessed_at,
                  :now, replica_expires_at, replica_expiry_reason
             FROM told ORDER BY uid
           ON CONFLICT DO NOTHING""",
        storage=storage_id,
        now=now,
    )


def _refuse_taken(connection: Connection) -> list[tuple[str, str, str]]:
    gone = rows(
        connection,
        """DELETE FROM told t WHERE NOT EXISTS (
             SELECT FROM replica r WHERE r.uid = t.uid AND r.state = 'PENDING')
           RETURNING t.uri, t.path""",
    )
    return [(row["uri"], row["path"], "another copy has its place") for row in gone]


def _suspect_and_look(connection: Connection, actor: str, now: datetime) -> int:
    """Nobody knows whether the bytes are there: not even MISSING would be true. A SUSPECT copy
    counts for nothing, and its place is left alone until it was looked at."""
    for old, new in (("PENDING", "MISSING"), ("MISSING", "SUSPECT")):
        run(
            connection,
            """UPDATE replica SET state = :new WHERE state = :old AND uid IN (SELECT uid FROM told)""",
            old=old,
            new=new,
        )
    looks = [
        queue.NewOperation(OperationKind.VERIFY, row["oid"], row["uid"], REASON, now)
        for row in rows(connection, "SELECT uid, oid FROM told ORDER BY uid")
    ]
    return queue.insert_operations(connection, looks, actor, now)
