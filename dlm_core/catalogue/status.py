"""The state of the whole site in numbers; the cost does not follow the size of the catalogue."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows
from dlm_core.catalogue.places import list_storages
from dlm_core.catalogue.staging import waiting_overview
from dlm_core.catalogue.urgency import deadlines

_RECENT = timedelta(hours=24)
_SOON = timedelta(hours=24)


def status(connection: Connection, now: datetime) -> dict[str, Any]:
    """Items, replicas and bytes by state; operations by kind and state (those that ended: of the
    last 24 hours); storages with their fill; files that wait to be staged; items below their target
    phase.

    Counts of items and replicas come from the tally, exact in every transaction.
    """
    tally = rows(
        connection,
        """SELECT noun, state, sum(n)::bigint AS n, sum(bytes)::bigint AS bytes FROM tally
            GROUP BY noun, state HAVING sum(n) <> 0 ORDER BY noun, state""",
    )
    storages = list_storages(connection)
    return {
        "items": {row["state"]: row["n"] for row in tally if row["noun"] == "item"},
        "replicas": {row["state"]: row["n"] for row in tally if row["noun"] == "replica"},
        "bytes": {
            "items": _bytes(tally, "item", ("READY", "CORRUPTED", "EXPIRED")),
            "replicas": _bytes(tally, "replica", ("READY",)),
        },
        "operations": count_operations(connection, now),
        "items_below_target_phase": _count(
            connection, "SELECT count(*) AS n FROM data_item WHERE shortfall IS NOT NULL"
        ),
        "staging": waiting_overview(connection, now),
        # of the items that are needed by a time: those whose copies are not all there
        "deadlines": deadlines(connection, now, now + _SOON),
        "items_to_evaluate": _count(connection, "SELECT count(*) AS n FROM evaluation"),
        "storages": [
            {
                key: row[key]
                for key in (
                    "name", "location", "interface", "phase", "mode", "managed", "replicas",
                    "used_bytes", "capacity_bytes", "fill_fraction",
                )
            }
            for row in storages
        ],
    }  # fmt: skip


def _bytes(tally: list[dict[str, Any]], noun: str, states: tuple[str, ...]) -> int:
    return sum(row["bytes"] for row in tally if row["noun"] == noun and row["state"] in states)


def _count(connection: Connection, sql: str) -> int:
    return int(rows(connection, sql)[0]["n"])


def count_operations(connection: Connection, now: datetime) -> dict[str, dict[str, int]]:
    """Numbers by kind and state: live ones and those that ended within a day, from their partial
    indexes."""
    found = rows(
        connection,
        """SELECT kind, state, sum(n)::bigint AS n FROM (
             SELECT kind, state, count(*) AS n FROM operation WHERE state = 'QUEUED' GROUP BY 1, 2
             UNION ALL
             SELECT kind, state, count(*) FROM operation WHERE state = 'RUNNING' GROUP BY 1, 2
             UNION ALL
             SELECT kind, state, count(*) FROM operation WHERE state = 'FAILED' GROUP BY 1, 2
             UNION ALL
             SELECT kind, state, count(*) FROM operation
              WHERE state IN ('DONE', 'CANCELLED')
                AND finished_at >= CAST(:since AS timestamptz) GROUP BY 1, 2) o
           GROUP BY kind, state ORDER BY kind, state""",
        since=now - _RECENT,
    )
    grouped: dict[str, dict[str, int]] = {}
    for row in found:
        grouped.setdefault(row["kind"], {})[row["state"]] = row["n"]
    return grouped
