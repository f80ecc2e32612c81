"""Scheduled verification: what is due to be read again, the budgets, and how well it goes.

What is due comes from the index ``replica_check`` (storage, time from which the next check counts);
the cost of a question follows what is due, not the catalogue. The index knows no state, so what
cannot be checked comes due as well, and is put off.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.replicas import COLD

#: of what is due on a storage, so many that were looked at longest ago are ordered by risk
WINDOW = 5000
#: a check that FAILED is planned again after this long
_FAILED_WAITS = timedelta(days=1)

_READABLE = "('read_write', 'read_only', 'draining')"
_DUE = """
  SELECT r.uid, r.oid, r.size, r.check_from FROM replica r
   WHERE r.storage_id = :storage AND r.live AND r.check_from < :before{state}
     -- one look by uid for each row that is due: as an anti-join it would read all operations
     AND (SELECT 1 FROM operation o WHERE o.uid = r.uid AND o.kind = 'verify'
             AND (o.state IN ('QUEUED', 'RUNNING') OR (o.state = 'FAILED' AND o.finished_at > :failed))
           LIMIT 1) IS NULL
   ORDER BY r.check_from LIMIT :window"""


def put_looks_off(
    connection: Connection, uids: Sequence[uuid.UUID], when: datetime
) -> set[uuid.UUID]:
    """Of some replicas those of which a look is queued; it does not come before ``when``."""
    found = rows(
        connection,
        """UPDATE operation SET due_at = greatest(due_at, :at)
            WHERE uid = ANY(:uids) AND kind = 'verify' AND state = 'QUEUED' RETURNING uid""",
        uids=list(uids),
        at=when,
    )
    return {row["uid"] for row in found}


def hasten_looks(connection: Connection, uids: Sequence[uuid.UUID], now: datetime) -> int:
    """Let looks at replicas that are queued for later come now; how many."""
    return run(
        connection,
        """UPDATE operation SET due_at = :now
            WHERE uid = ANY(:uids) AND kind = 'verify' AND state = 'QUEUED' AND due_at > :now""",
        uids=list(uids),
        now=now,
    )


def select_put_off(
    connection: Connection,
    storage_id: uuid.UUID | None,
    oids: Sequence[uuid.UUID] | None,
    now: datetime,
) -> list[uuid.UUID]:
    """Replicas on a storage and of items, None for all, of which a look is queued for later."""
    on_storage = " AND r.storage_id = :storage" if storage_id is not None else ""
    of_items = " AND r.oid = ANY(:oids)" if oids is not None else ""
    values: dict[str, Any] = {"storage": storage_id} if storage_id is not None else {}
    if oids is not None:
        values["oids"] = list(oids)
    found = rows(
        connection,
        f"""SELECT o.uid FROM operation o JOIN replica r USING (uid)
             WHERE o.kind = 'verify' AND o.state = 'QUEUED' AND o.due_at > :now{on_storage}{of_items}""",
        now=now,
        **values,
    )
    return [row["uid"] for row in found]


def select_unasked(
    connection: Connection, storage_id: uuid.UUID | None, oids: Sequence[uuid.UUID] | None
) -> list[dict[str, Any]]:
    """Replicas (uid, oid) on a storage and of items, None for all, whose bytes may be looked for and
    for which no look is queued."""
    # each wish by its own index: one statement for all would read the catalogue through
    on_storage = " AND r.storage_id = :storage" if storage_id is not None else ""
    of_items = " AND r.oid = ANY(:oids)" if oids is not None else ""
    values: dict[str, Any] = {"storage": storage_id} if storage_id is not None else {}
    if oids is not None:
        values["oids"] = list(oids)
    return rows(
        connection,
        f"""SELECT r.uid, r.oid FROM replica r
             WHERE r.state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING'){on_storage}{of_items}
               AND NOT EXISTS (SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'verify'
                                  AND o.state IN ('QUEUED', 'RUNNING'))""",
        **values,
    )


# a doubted copy whose look FAILED: again after an hour, then two, four … a day at most. Found through
# the index of FAILED operations.
_FAILED_LOOKS = f"""
  SELECT o.operation_id FROM operation o JOIN replica r USING (uid) JOIN storage s USING (storage_id)
   WHERE o.state = 'FAILED' AND o.kind = 'verify' AND r.state = 'SUSPECT' AND s.mode IN {_READABLE}
     AND o.finished_at <= CAST(:now AS timestamptz)
         - least(interval '1 hour' * power(2, least(o.attempts - 1, 10)), interval '1 day')"""


def count_failed_looks(connection: Connection, now: datetime) -> int:
    """Looks at SUSPECT replicas that FAILED and are to be tried again now."""
    found = rows(connection, f"SELECT count(*) AS n FROM ({_FAILED_LOOKS}) x", now=now)
    return int(found[0]["n"])


def look_again(connection: Connection, now: datetime) -> int:
    """Queue looks at SUSPECT replicas that FAILED a while ago, so that no doubt stays for want of an
    operator; their tries go on being counted. How many."""
    return run(
        connection,
        f"""UPDATE operation SET state = 'QUEUED', due_at = :now, finished_at = NULL
             WHERE operation_id IN ({_FAILED_LOOKS} FOR UPDATE OF o SKIP LOCKED)""",
        now=now,
    )


@dataclass(frozen=True, slots=True)
class Check:
    """A replica to be read again; ``copies`` are its item's READY ones, itself included."""

    uid: uuid.UUID
    oid: uuid.UUID
    size: int
    copies: int
    check_from: datetime


@dataclass(frozen=True, slots=True)
class Budget:
    """A storage with checks, and what it may read; sizes in bytes, None without limit."""

    storage_id: uuid.UUID
    name: str
    storage_class: str
    every: timedelta
    per_second: int | None
    #: left of the day's
    left: int | None
    #: nothing of the day's was used yet
    fresh: bool


_BUDGETS = f"""
  SELECT storage_id, name, class, verify_every_days, verify_bytes_per_second, verify_bytes_per_day,
         CASE WHEN verify_day = (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date
              THEN verify_day_bytes ELSE 0 END AS used
    FROM storage s WHERE mode IN {_READABLE} AND verify_every_days IS NOT NULL
     -- reading recalls: never a whole tape because nobody said how much of it
     AND (verify_bytes_per_day IS NOT NULL OR NOT {COLD.format("s")})"""


def lock_budgets(connection: Connection, now: datetime) -> list[Budget]:
    """The budgets of the storages that nobody else plans for at this moment, cheap media first."""
    return _budgets(connection, now, " FOR NO KEY UPDATE SKIP LOCKED")


def _budgets(connection: Connection, now: datetime, locking: str = "") -> list[Budget]:
    order = " ORDER BY array_position(ARRAY['disk', 'object', 'tape'], class), name"
    found = rows(connection, _BUDGETS + order + locking, now=now)
    return [
        Budget(
            row["storage_id"],
            row["name"],
            row["class"],
            timedelta(days=row["verify_every_days"]),
            row["verify_bytes_per_second"],
            None
            if row["verify_bytes_per_day"] is None
            else max(row["verify_bytes_per_day"] - row["used"], 0),
            row["used"] == 0,
        )
        for row in found
    ]


def storages_with_checks_due(connection: Connection, now: datetime) -> list[str]:
    """Names of the storages on which something is to be read again now, within the day's budget."""
    return [
        budget.name
        for budget in _budgets(connection, now)
        if budget.left != 0 and rows(connection, _DUE.format(state=""), **_values(budget, now, 1))
    ]


def _values(budget: Budget, now: datetime, window: int) -> dict[str, Any]:
    return {
        "storage": budget.storage_id,
        "before": now - budget.every,
        "failed": now - _FAILED_WAITS,
        "window": window,
    }


def put_off(connection: Connection, now: datetime, limit: int = 50_000) -> None:
    """What is due and not READY, ``limit`` of each storage, cannot be checked: not before another
    interval is over. It is looked at by what made it so."""
    for budget in lock_budgets(connection, now):
        run(
            connection,
            """UPDATE replica SET check_from = :now WHERE uid IN (
                 SELECT uid FROM replica WHERE storage_id = :storage AND live AND check_from < :before
                    AND state <> 'READY' ORDER BY check_from LIMIT :limit
                    FOR NO KEY UPDATE SKIP LOCKED)""",
            now=now,
            storage=budget.storage_id,
            before=now - budget.every,
            limit=limit,
        )


def select_checks(connection: Connection, budget: Budget, now: datetime, limit: int) -> list[Check]:
    """Of the :data:`WINDOW` looked at longest ago the riskiest: fewest good copies, then oldest
    look; ``limit`` at most."""
    found = rows(
        connection,
        f"""WITH due AS MATERIALIZED ({_DUE.format(state=" AND r.state = 'READY'")})
            SELECT d.*, (SELECT count(*) FROM replica x WHERE x.oid = d.oid AND x.state = 'READY') AS copies
              FROM due d ORDER BY copies, check_from, uid LIMIT :limit""",
        **_values(budget, now, WINDOW),
        limit=limit,
    )
    return [Check(r["uid"], r["oid"], r["size"], r["copies"], r["check_from"]) for r in found]


def spend(connection: Connection, storage_id: uuid.UUID, now: datetime, size: int) -> None:
    """Count ``size`` bytes against a storage's budget of the day."""
    run(
        connection,
        """UPDATE storage SET verify_day = (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date,
                  verify_day_bytes = :size + CASE
                    WHEN verify_day = (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date
                    THEN verify_day_bytes ELSE 0 END
            WHERE storage_id = :id""",
        now=now,
        size=size,
        id=storage_id,
    )


def select_tellable(
    connection: Connection, uids: Sequence[uuid.UUID], now: datetime, times: int
) -> set[uuid.UUID]:
    """Replicas for which the word of their storage may do this time.

    Their stamp is known, they were read within ``times`` of their storage's interval, and the item
    has another READY replica that was read within one interval of its own storage: never the last
    good copy.
    """
    found = rows(
        connection,
        """SELECT r.uid FROM replica r JOIN storage s USING (storage_id)
            WHERE r.uid = ANY(:uids) AND r.told_stamp IS NOT NULL AND r.state = 'READY'
              AND r.checked_at > CAST(:now AS timestamptz) - :times * make_interval(days => s.verify_every_days)
              AND EXISTS (SELECT FROM replica x JOIN storage y USING (storage_id)
                           WHERE x.oid = r.oid AND x.uid <> r.uid AND x.state = 'READY'
                             AND x.checked_at > CAST(:now AS timestamptz)
                                 - make_interval(days => coalesce(y.verify_every_days, 90)))""",
        uids=list(uids),
        now=now,
        times=times,
    )
    return {row["uid"] for row in found}


def mark_told(connection: Connection, uids: Sequence[uuid.UUID], now: datetime) -> None:
    """Their storage told the same stamp as at their last read; that is no check."""
    run(
        connection,
        "UPDATE replica SET told_at = :now, check_from = :now WHERE uid = ANY(:uids) AND state = 'READY'",
        uids=list(uids),
        now=now,
    )


def note_stamps(connection: Connection, stamps: Mapping[uuid.UUID, str]) -> None:
    """Remember the storage's stamps of replicas that were read and matched."""
    run(
        connection,
        """UPDATE replica r SET told_stamp = u.stamp
             FROM unnest(CAST(:uids AS uuid[]), CAST(:stamps AS text[])) AS u(uid, stamp)
            WHERE r.uid = u.uid AND r.told_stamp IS DISTINCT FROM u.stamp""",
        uids=list(stamps),
        stamps=list(stamps.values()),
    )


# --- how well it goes -----------------------------------------------------------------------------


def check_overview(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """Per storage the oldest look and what was used of the day's budget: by index, always cheap."""
    return rows(
        connection,
        """SELECT s.name AS storage, s.verify_every_days, o.oldest,
                  CASE WHEN s.verify_day = (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date
                       THEN s.verify_day_bytes ELSE 0 END AS planned_today_bytes,
                  s.verify_bytes_per_day, s.verify_bytes_per_second
             FROM storage s LEFT JOIN LATERAL (
               SELECT GREATEST(r.checked_at, r.told_at) AS oldest FROM replica r
                WHERE r.storage_id = s.storage_id AND r.live AND r.state = 'READY'
                ORDER BY r.check_from LIMIT 1) o ON true
            WHERE s.mode <> 'retired' ORDER BY s.name""",
        now=now,
    )


_SHARES = """
  SELECT {name} AS {key}, count(*) AS replicas,
         count(*) FILTER (WHERE r.checked_at > :since) AS read,
         count(*) FILTER (WHERE GREATEST(r.checked_at, r.told_at) > :since) AS read_or_told,
         count(*) FILTER (WHERE r.checked_at > :since)::float8 / count(*) AS read_fraction,
         coalesce(sum(r.size) FILTER (WHERE r.checked_at > :since), 0)::bigint AS read_bytes,
         sum(r.size)::bigint AS bytes, min(r.checked_at) AS oldest_read
    FROM replica r {join} WHERE r.state = 'READY' GROUP BY 1 ORDER BY 1"""

# 'doubted' is written when a READY replica is one no more; what followed tells what it was
_FINDINGS = """
  SELECT s.name AS storage, count(*) AS doubted,
         count(*) FILTER (WHERE f.damaged) AS damaged,
         count(*) FILTER (WHERE NOT f.damaged AND f.good_at IS NOT NULL) AS false_alarms,
         count(*) FILTER (WHERE f.good_at IS NULL) AS open,
         extract(epoch FROM avg(d.took) FILTER (WHERE f.damaged))::float8 AS detect_mean_seconds,
         extract(epoch FROM max(d.took) FILTER (WHERE f.damaged))::float8 AS detect_max_seconds,
         extract(epoch FROM avg(f.good_at - d.at) FILTER (WHERE f.damaged))::float8 AS repair_mean_seconds,
         extract(epoch FROM max(f.good_at - d.at) FILTER (WHERE f.damaged))::float8 AS repair_max_seconds
    FROM (SELECT e.seq, e.at, e.oid, e.uid, e.storage_id,
                 CAST(e.detail->>'found_at' AS timestamptz) - CAST(e.detail->>'checked_at' AS timestamptz) AS took
            FROM event e WHERE e.action = 'doubted' AND e.at > clock_timestamp() - :within) d
    JOIN storage s USING (storage_id), LATERAL (
      SELECT min(e.at) FILTER (WHERE e.new_state = 'READY') AS good_at,
             coalesce(bool_or(e.new_state IN ('CORRUPTED', 'MISSING') AND e.seq < coalesce(g.seq, e.seq + 1)), false) AS damaged
        FROM event e LEFT JOIN LATERAL (
          SELECT min(x.seq) AS seq FROM event x WHERE x.oid = d.oid AND x.uid = d.uid AND x.seq > d.seq
             AND x.action = 'state' AND x.new_state = 'READY') g ON true
       WHERE e.oid = d.oid AND e.uid = d.uid AND e.seq > d.seq AND e.action = 'state') f
   GROUP BY 1 ORDER BY 1"""


def verification_report(connection: Connection, now: datetime, days: int) -> dict[str, Any]:
    """How much was read again in the last ``days``, by storage and collection; how long damage lay
    unnoticed at most (since the last good look) and how long its repair took, in seconds.

    Goes through all replicas: for reports, never asked by a sensor.
    """
    values = {"since": now - timedelta(days=days)}
    by_storage = _SHARES.format(
        name="s.name", key="storage", join="JOIN storage s USING (storage_id)"
    )
    by_collection = _SHARES.format(
        name="coalesce(c.name, '')",
        key="collection",
        join="JOIN data_item i USING (oid) LEFT JOIN collection c USING (collection_id)",
    )
    shares = {row["storage"]: row for row in rows(connection, by_storage, **values)}
    return {
        "days": days,
        "storages": [
            {**row, **shares.get(row["storage"], {"replicas": 0})}
            for row in check_overview(connection, now)
        ],
        "collections": rows(connection, by_collection, **values),
        "findings": rows(connection, _FINDINGS, within=timedelta(days=days)),
    }
