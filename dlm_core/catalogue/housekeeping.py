"""Statements of the daily housekeeping."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run

_MONTHS_AHEAD = 3


def ensure_partitions(connection: Connection, now: datetime) -> None:
    """Make the partitions of this month and the next ones."""
    run(
        connection,
        "SELECT dlm_ensure_partitions(CAST(:now AS timestamptz), :months)",
        now=now,
        months=_MONTHS_AHEAD,
    )


def fold_tally(connection: Connection) -> int:
    """Fold the tally's deltas into one row a group; the rows that are left.

    Two at once would each fold what the other has: the second leaves it to the first.
    """
    locked = rows(connection, "SELECT pg_try_advisory_xact_lock(1684827505) AS ok")[0]["ok"]
    if locked:
        run(connection, "SELECT dlm_fold_tally()")
    return int(rows(connection, "SELECT count(*) AS n FROM tally")[0]["n"])


def fold_long_tally(connection: Connection, longest: int = 10_000) -> bool:
    """Fold the tally if it has more than ``longest`` rows; looking costs no more than these."""
    found = rows(
        connection,
        "SELECT count(*) AS n FROM (SELECT FROM tally LIMIT :limit) t",
        limit=longest + 1,
    )
    if found[0]["n"] <= longest:
        return False
    fold_tally(connection)
    return True
