"""Files of cold storages that are waited for: who asks, when again, until when."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.replicas import COLD

#: whoever waits looks after it within a day (the longest stage_poll_seconds)
_NOBODY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Wait:
    """A file that is waited for: since when, what the last request came to, and what is to be done:
    ``ask`` for it (this transaction took it upon itself), give up (``late``), or nothing before
    others have come (``turn``)."""

    since: datetime
    asked_at: datetime | None
    error: str | None
    ask: bool = False
    late: bool = False
    turn: bool = False


def waits_for(
    connection: Connection, storage_id: uuid.UUID, paths: Sequence[str]
) -> dict[str, Wait]:
    """Those of ``paths`` (percent-encoded) that are waited for already."""
    found = rows(
        connection,
        """SELECT path, since, asked_at, error FROM staging
            WHERE storage_id = :storage AND path = ANY(:paths)""",
        storage=storage_id,
        paths=list(paths),
    )
    return {row["path"]: Wait(row["since"], row["asked_at"], row["error"]) for row in found}


def begin_waiting(
    connection: Connection,
    storage_id: uuid.UUID,
    paths: Sequence[str],
    now: datetime,
    *,
    retry: timedelta,
    deadline: timedelta,
    lease: timedelta,
    most: int,
) -> dict[str, Wait]:
    """Note that ``paths`` (percent-encoded) are waited for, and take those upon ourselves that are
    to be asked for now; within ``lease`` nobody else does. While ``most`` files are on their way the
    others are not noted: they wait for their turn, with no deadline.

    What was waited for longer than ``deadline`` is late and noted no more. A wait that nobody
    looked after for as long as ``retry`` begins anew.
    """
    run(
        connection,
        """DELETE FROM staging WHERE storage_id = :storage AND path = ANY(:paths)
              AND polled_at < :forgotten""",
        storage=storage_id,
        paths=list(paths),
        forgotten=now - retry,
    )
    late = rows(
        connection,
        """DELETE FROM staging WHERE storage_id = :storage AND path = ANY(:paths)
              AND since <= :late RETURNING path, since, asked_at, error""",
        storage=storage_id,
        paths=list(paths),
        late=now - deadline,
    )
    over = {r["path"]: Wait(r["since"], r["asked_at"], r["error"], late=True) for r in late}
    rest = sorted(set(paths) - set(over))
    known = waits_for(connection, storage_id, rest)
    new = [path for path in rest if path not in known]
    room = max(0, most - _count(connection, storage_id, now)) if new else 0
    later = {path: Wait(now, None, None, turn=True) for path in new[room:]}
    taken = [path for path in rest if path not in later]
    return over | later | _take(connection, storage_id, taken, now, now + lease)


def _count(connection: Connection, storage_id: uuid.UUID, now: datetime) -> int:
    found = rows(
        connection,
        "SELECT count(*) AS n FROM staging WHERE storage_id = :storage AND polled_at > :recent",
        storage=storage_id,
        recent=now - _NOBODY,
    )
    return int(found[0]["n"])


def _take(
    connection: Connection,
    storage_id: uuid.UUID,
    paths: Sequence[str],
    now: datetime,
    until: datetime,
) -> dict[str, Wait]:
    """Note ``paths``; those that are new, or due to be asked for again, are ours ``until`` then."""
    values = {"storage": storage_id, "paths": list(paths), "now": now, "until": until}
    new = rows(
        connection,
        """INSERT INTO staging (storage_id, path, since, polled_at, retry_at)
           SELECT :storage, path, :now, :now, :until FROM unnest(CAST(:paths AS text[])) path
            ORDER BY path ON CONFLICT DO NOTHING RETURNING path""",
        **values,
    )
    fresh = {row["path"] for row in new}
    # in key order, waiting for who asks at this moment; what they took is not due any more then
    known = rows(
        connection,
        """WITH held AS MATERIALIZED (
             SELECT path, retry_at <= :now AS due FROM staging
              WHERE storage_id = :storage AND path = ANY(:paths) ORDER BY path FOR UPDATE)
           UPDATE staging s SET polled_at = :now,
                  retry_at = CASE WHEN held.due THEN :until ELSE s.retry_at END
             FROM held WHERE s.storage_id = :storage AND s.path = held.path
           RETURNING s.path, s.since, s.asked_at, s.error, held.due""",
        **values,
    )
    return {
        row["path"]: Wait(
            row["since"], row["asked_at"], row["error"], row["due"] or row["path"] in fresh
        )
        for row in known
    }


def note_asked(
    connection: Connection,
    storage_id: uuid.UUID,
    paths: Sequence[str],
    now: datetime,
    retry_at: datetime,
    error: str | None,
) -> None:
    """The storage took the request for ``paths``, or did not: then ``error`` says why."""
    run(
        connection,
        """UPDATE staging SET retry_at = :retry_at, error = CAST(:error AS text),
                  asked_at = CASE WHEN CAST(:error AS text) IS NULL THEN :now ELSE asked_at END
            WHERE storage_id = :storage AND path = ANY(:paths)""",
        storage=storage_id,
        paths=list(paths),
        now=now,
        retry_at=retry_at,
        error=error,
    )


def end_waiting(connection: Connection, storage_id: uuid.UUID, paths: Sequence[str]) -> None:
    """``paths`` are online: nobody waits for them any more."""
    run(
        connection,
        "DELETE FROM staging WHERE storage_id = :storage AND path = ANY(:paths)",
        storage=storage_id,
        paths=list(paths),
    )


def forget_waits(connection: Connection, now: datetime) -> int:
    """Remove what nobody has looked after for a week (its operation was cancelled, say); how many."""
    return run(connection, "DELETE FROM staging WHERE polled_at < :old", old=now - 7 * _NOBODY)


def waiting_overview(
    connection: Connection, now: datetime, storage_id: uuid.UUID | None = None
) -> list[dict[str, Any]]:
    """By storage how many files are waited for, how many were asked for, since when, and an error
    that a request ended with. The cost follows what is waited for."""
    only = "AND g.storage_id = :storage" if storage_id else ""
    return rows(
        connection,
        f"""SELECT s.name AS storage, count(*) AS files, count(g.asked_at) AS asked,
                  min(g.since) AS since, max(g.error) AS error
             FROM staging g JOIN storage s USING (storage_id)
            WHERE g.polled_at > :recent {only}
            GROUP BY s.name ORDER BY s.name""",
        recent=now - _NOBODY,
        **({"storage": storage_id} if storage_id else {}),
    )


def select_cold_copies(
    connection: Connection,
    oids: Sequence[uuid.UUID] | None,
    collection_id: uuid.UUID | None,
    storage_id: uuid.UUID | None,
) -> list[dict[str, Any]]:
    """One good copy (uid, oid) on a cold storage of each item, named or in a collection and those
    below it; none of which staging is asked already."""
    return rows(
        connection,
        f"""WITH RECURSIVE below AS (
              SELECT collection_id FROM collection WHERE collection_id = CAST(:collection AS uuid)
              UNION ALL
              SELECT c.collection_id FROM collection c JOIN below b ON c.parent_id = b.collection_id),
            item AS (
              SELECT oid FROM data_item WHERE oid = ANY(CAST(:oids AS uuid[]))
              UNION
              SELECT oid FROM data_item WHERE collection_id IN (SELECT collection_id FROM below))
            SELECT DISTINCT ON (r.oid) r.uid, r.oid
              FROM item CROSS JOIN LATERAL (SELECT * FROM replica WHERE oid = item.oid OFFSET 0) r
              JOIN storage s USING (storage_id)
             WHERE r.state = 'READY' AND s.mode IN ('read_write', 'read_only', 'draining')
               AND {COLD.format("s")}
               AND (CAST(:storage AS uuid) IS NULL OR r.storage_id = :storage)
               AND NOT EXISTS (SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'stage'
                                  AND o.state IN ('QUEUED', 'RUNNING'))
             ORDER BY r.oid, r.checked_at DESC""",
        oids=list(oids or []),
        collection=collection_id,
        storage=storage_id,
    )
