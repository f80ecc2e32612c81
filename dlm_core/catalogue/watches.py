"""Watched folders, and what was seen in them that had not settled yet."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue.engine import copy_rows, rows, run
from dlm_core.errors import AlreadyExistsError, NotFoundError
from dlm_core.types import new_id

_TOLD = 20

# a storage that is out of use is not looked at; back in use its watches are due at once
_DUE_WATCHES = """
  SELECT w.watch_id FROM watch w JOIN storage s USING (storage_id)
   WHERE w.scan_at <= :now AND s.mode NOT IN ('offline', 'auditing', 'retired', 'lost')"""


def count_watches_due(connection: Connection, now: datetime) -> int:
    """Watched folders whose next look is due."""
    found = rows(connection, f"SELECT count(*) AS n FROM ({_DUE_WATCHES}) due", now=now)
    return int(found[0]["n"])


def claim_watches(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """Due watches, each put off by its interval: two drainers do not scan one folder at once."""
    return rows(
        connection,
        f"""UPDATE watch w SET scan_at = CAST(:now AS timestamptz) + w.interval
            WHERE watch_id IN ({_DUE_WATCHES} FOR UPDATE OF w SKIP LOCKED)
           RETURNING w.*, (SELECT s.name FROM storage s WHERE s.storage_id = w.storage_id) AS storage""",
        now=now,
    )


def settled_entries(
    connection: Connection,
    watch_id: uuid.UUID,
    storage_id: uuid.UUID,
    seen: Iterable[tuple[str, int, float]],
    settle: timedelta,
    now: datetime,
) -> list[dict[str, Any]]:
    """Of what a watched folder shows now (encoded path, bytes, mtime), that which is new to the
    catalogue and has not changed for ``settle``. The rest is remembered for the next look."""
    copy_rows(connection, "seen", {"path": "text", "size": "int8", "mtime": "float8"}, iter(seen))
    run(
        connection,
        """DELETE FROM seen s USING replica r WHERE r.storage_id = :storage AND r.path = s.path
              AND r.owns_path
              AND (r.mtime IS NULL OR (r.size, r.mtime) IS NOT DISTINCT FROM (s.size, s.mtime))""",
        storage=storage_id,
    )
    run(
        connection,
        """DELETE FROM watch_entry e WHERE e.watch_id = :watch
              AND NOT EXISTS (SELECT FROM seen s WHERE s.path = e.path)""",
        watch=watch_id,
    )
    run(
        connection,
        """INSERT INTO watch_entry (watch_id, path, size, mtime, since)
           SELECT :watch, path, size, mtime, :now FROM seen
           ON CONFLICT (watch_id, path) DO UPDATE SET size = EXCLUDED.size, mtime = EXCLUDED.mtime,
                  since = EXCLUDED.since, refusal = NULL
            WHERE (watch_entry.size, watch_entry.mtime) IS DISTINCT FROM
                  (EXCLUDED.size, EXCLUDED.mtime)""",
        watch=watch_id,
        now=now,
    )
    return rows(
        connection,
        """DELETE FROM watch_entry WHERE watch_id = :watch
              AND since <= CAST(:now AS timestamptz) - CAST(:settle AS interval)
           RETURNING path, size, mtime""",
        watch=watch_id,
        now=now,
        settle=settle,
    )


def put_off_entries(
    connection: Connection,
    watch_id: uuid.UUID,
    entries: Sequence[Mapping[str, Any]],
    until: datetime,
) -> None:
    """What :func:`settled_entries` gave, each with its ``refusal``, settles again only after
    ``until``, unless it changes. Those that became known meanwhile are forgotten by the next look."""
    run(
        connection,
        """INSERT INTO watch_entry (watch_id, path, size, mtime, since, refusal)
           SELECT :watch, path, size, mtime, :until, refusal
             FROM unnest(CAST(:paths AS text[]), CAST(:sizes AS bigint[]),
                         CAST(:times AS float8[]), CAST(:refusals AS text[]))
                  AS u(path, size, mtime, refusal)
           ON CONFLICT DO NOTHING""",
        watch=watch_id,
        until=until,
        paths=[entry["path"] for entry in entries],
        sizes=[entry["size"] for entry in entries],
        times=[entry["mtime"] for entry in entries],
        refusals=[entry["refusal"] for entry in entries],
    )


def forget_entry(connection: Connection, watch_id: uuid.UUID, path: str) -> None:
    """Forget what is remembered of one path of a watch."""
    run(
        connection,
        "DELETE FROM watch_entry WHERE watch_id = :watch AND path = :path",
        watch=watch_id,
        path=path,
    )


def add_watch(
    connection: Connection,
    storage_id: uuid.UUID,
    path: str,
    scheme: str,
    options: dict[str, Any],
    interval: timedelta,
    now: datetime,
) -> uuid.UUID:
    """Watch a folder (encoded path, '' for the root) of a storage from now on.

    Raises
    ------
    AlreadyExistsError
        it is watched already.
    """
    watch_id = new_id()
    made = run(
        connection,
        """INSERT INTO watch (watch_id, storage_id, path, scheme, options, interval, scan_at,
                              created_at)
           VALUES (:id, :storage, :path, :scheme, CAST(:options AS jsonb),
                   CAST(:interval AS interval), :now, :now)
           ON CONFLICT (storage_id, path) DO NOTHING""",
        id=watch_id,
        storage=storage_id,
        path=path,
        scheme=scheme,
        options=Jsonb(options),
        interval=interval,
        now=now,
    )
    if not made:
        raise AlreadyExistsError(noun="watch", key=path or "/")
    return watch_id


def list_watches(connection: Connection) -> list[dict[str, Any]]:
    """Watched folders (``path`` encoded) with how many entries there have not settled yet, how many
    were refused, and of the first of these why, by encoded path. A look that failed is told as a
    refusal of the folder."""
    return rows(
        connection,
        """SELECT s.name AS storage, w.path, w.scheme, c.name AS collection,
                  w.options - 'collection_id' AS options, w.interval, w.scan_at,
                  (SELECT count(*) FROM watch_entry e
                    WHERE e.watch_id = w.watch_id AND e.refusal IS NULL) AS waiting,
                  (SELECT count(*) FROM watch_entry e
                    WHERE e.watch_id = w.watch_id AND e.refusal IS NOT NULL) AS refused,
                  (SELECT json_object_agg(path, refusal) FROM (
                     SELECT e.path, e.refusal FROM watch_entry e
                      WHERE e.watch_id = w.watch_id AND e.refusal IS NOT NULL
                      ORDER BY e.path LIMIT :told) f) AS refusals
             FROM watch w JOIN storage s USING (storage_id)
             LEFT JOIN collection c ON c.collection_id = CAST(w.options->>'collection_id' AS uuid)
            ORDER BY s.name, w.path""",
        told=_TOLD,
    )


def remove_watch(connection: Connection, storage: str, path: str) -> None:
    """Watch a folder (encoded path) of a storage no longer; what it brought stays.

    Raises
    ------
    NotFoundError
    """
    removed = run(
        connection,
        """DELETE FROM watch w USING storage s
            WHERE s.storage_id = w.storage_id AND s.name = :storage AND w.path = :path""",
        storage=storage,
        path=path,
    )
    if not removed:
        raise NotFoundError("watch", f"{storage}:{path or '/'}", "see 'dlm watch list'")
