"""Limits of storages and links, and what drainers tell of themselves; see the table ``drainer``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.places import get_storage
from dlm_core.errors import InvalidValueError

#: a drainer that has not told anything for this long is lost: its shares are the others'
LOST_AFTER = timedelta(seconds=30)
_LIMITS = ("max_bytes_per_second", "max_concurrency")
_HIGHEST = {"max_bytes_per_second": 2**63 - 1, "max_concurrency": 100_000}
# shares of a number of places are given out one drainer at a time
_LOCK = 0x646C6D6C


def storage_key(storage_id: uuid.UUID) -> str:
    """How a storage is named among what drainers use."""
    return str(storage_id)


def link_key(source_id: uuid.UUID, destination_id: uuid.UUID) -> str:
    """How a link is named among what drainers use."""
    return f"{source_id}>{destination_id}"


@dataclass(frozen=True, slots=True)
class Share:
    """What one drainer may use of a storage or link; None: as much as it likes."""

    bytes_per_second: float | None
    places: int | None


def share_of(limits: Mapping[str, Any], others: Sequence[int]) -> Share:
    """A drainer's share of ``limits`` beside the other drainers, each of which has taken so many
    places (``others``).

    Bytes a second are shared evenly. Places too, but none is given out that another still has:
    who has more than its share gives back as its files end.
    """
    rate, most, count = limits["max_bytes_per_second"], limits["max_concurrency"], len(others) + 1
    places = None
    if most is not None:
        places = max(0, min(-(-most // count), most - sum(others)))
    return Share(None if rate is None else rate / count, places)


def beat(
    connection: Connection,
    drainer_id: uuid.UUID,
    worker: str,
    uses: Mapping[str, int],
    running: Sequence[Mapping[str, Any]],
    now: datetime,
) -> dict[str, Share]:
    """Tell what a drainer does, and learn its share of everything that it uses.

    Parameters
    ----------
    uses : files open now by :func:`storage_key` and :func:`link_key`
    running : its larger operations (operation_id, step, bytes done and in all, since)
    """
    limits = limits_of(connection, list(uses))
    if any(limits[key]["max_concurrency"] is not None for key in limits):
        run(connection, "SELECT pg_advisory_xact_lock(:key)", key=_LOCK)
    others = rows(
        connection,
        "SELECT uses FROM drainer WHERE drainer_id <> :me AND beat_at > :since",
        me=drainer_id,
        since=now - LOST_AFTER,
    )
    shares = {
        key: share_of(limits[key], [row["uses"][key] for row in others if key in row["uses"]])
        for key in uses
    }
    # what it has by now and what it may have: so the sum of all never passes the limit
    told = {key: max(used, shares[key].places or 0) for key, used in uses.items()}
    run(
        connection,
        """INSERT INTO drainer (drainer_id, worker, beat_at, uses, running)
           VALUES (:me, :worker, :now, CAST(:uses AS jsonb), CAST(:running AS jsonb))
           ON CONFLICT (drainer_id) DO UPDATE SET beat_at = EXCLUDED.beat_at, uses = EXCLUDED.uses,
                  running = EXCLUDED.running""",
        me=drainer_id,
        worker=worker,
        now=now,
        uses=Jsonb(told),
        running=Jsonb(list(running)),
    )
    return shares


def limits_of(connection: Connection, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The limits of storages and links, all of them None where there is none."""
    found = {key: dict.fromkeys(_LIMITS) for key in keys}
    for row in rows(
        connection,
        """SELECT storage_id::text AS key, max_bytes_per_second, max_concurrency FROM storage
            WHERE storage_id::text = ANY(:keys)
           UNION ALL
           SELECT source_id || '>' || destination_id, max_bytes_per_second, max_concurrency
             FROM link""",
        keys=list(keys),
    ):
        if row["key"] in found:
            found[row["key"]] = {name: row[name] for name in _LIMITS}
    return found


def limited_keys(connection: Connection) -> frozenset[str]:
    """The keys of all storages and links that have a limit."""
    found = rows(
        connection,
        """SELECT storage_id::text AS key FROM storage
            WHERE num_nonnulls(max_bytes_per_second, max_concurrency) > 0
           UNION ALL SELECT source_id || '>' || destination_id FROM link""",
    )
    return frozenset(row["key"] for row in found)


def forget(connection: Connection, drainer_id: uuid.UUID, now: datetime) -> None:
    """A drainer has ended; with it go those that were lost."""
    run(
        connection,
        """DELETE FROM drainer WHERE drainer_id IN (
             SELECT drainer_id FROM drainer WHERE drainer_id = :me OR beat_at <= :since
             FOR UPDATE SKIP LOCKED)""",
        me=drainer_id,
        since=now - LOST_AFTER,
    )


def list_running(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """The larger operations that are at work, the oldest first: kind, uri, storage, worker, step,
    bytes done and in all, their rate since it began, and when its worker last told."""
    return rows(
        connection,
        """SELECT o.operation_id, o.kind, o.attempts, i.uri, i.version, s.name AS storage, d.worker,
                  u.step, u.done_bytes, u.total_bytes, u.since, d.beat_at,
                  u.done_bytes / greatest(extract(epoch FROM d.beat_at - u.since), 0.001)::float8
                    AS bytes_per_second
             FROM drainer d CROSS JOIN LATERAL jsonb_to_recordset(d.running)
                  AS u(operation_id uuid, step text, done_bytes bigint, total_bytes bigint,
                       since timestamptz)
             JOIN operation o USING (operation_id) JOIN data_item i USING (oid)
             JOIN replica r ON r.uid = o.uid JOIN storage s USING (storage_id)
            WHERE d.beat_at > :since ORDER BY u.since, o.operation_id""",
        since=now - LOST_AFTER,
    )


def set_link(
    connection: Connection, source: str, destination: str, changes: Mapping[str, int | None]
) -> None:
    """Change limits of the copies from ``source`` to ``destination``; None or 0 takes one away.

    Raises
    ------
    NotFoundError, InvalidValueError
    """
    ends = [get_storage(connection, name)["storage_id"] for name in (source, destination)]
    wanted = {name: check_limit(name, changes[name]) for name in _LIMITS if name in changes}
    if source == destination and any(wanted.values()):
        raise InvalidValueError(what="link to", value=destination, expected="another storage")
    key = link_key(ends[0], ends[1])
    merged = limits_of(connection, [key])[key] | wanted
    run(
        connection,
        "DELETE FROM link WHERE (source_id, destination_id) = (:source, :destination)",
        source=ends[0],
        destination=ends[1],
    )
    if any(merged.values()):
        run(
            connection,
            """INSERT INTO link (source_id, destination_id, max_bytes_per_second, max_concurrency)
               VALUES (:source, :destination, :max_bytes_per_second, :max_concurrency)""",
            source=ends[0],
            destination=ends[1],
            **merged,
        )


def check_limit(name: str, value: int | None) -> int | None:
    """A limit as it is kept: 0 is none.

    Raises
    ------
    InvalidValueError
    """
    if value is not None and not 0 <= value <= _HIGHEST[name]:
        raise InvalidValueError(what=name, value=value, expected=f"0 (none) to {_HIGHEST[name]}")
    return value or None


def list_links(connection: Connection) -> list[dict[str, Any]]:
    """The links that have limits, by the names of their storages."""
    return rows(
        connection,
        """SELECT a.name AS source, b.name AS destination, l.max_bytes_per_second, l.max_concurrency
             FROM link l JOIN storage a ON a.storage_id = l.source_id
             JOIN storage b ON b.storage_id = l.destination_id ORDER BY 1, 2""",
    )
