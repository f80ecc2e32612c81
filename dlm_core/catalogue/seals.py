"""Seals of the append-only log: a hash over each day's rows, chained to the day before.

What changed afterwards is noticed by computing the hashes again. Who owns the database can write
all seals anew; so note the newest one elsewhere from time to time (the maintenance run tells it)
and give it to :func:`verify_seals` as ``anchor``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows
from dlm_core.errors import InvalidValueError

FEEDS = ("event", "deletion")
#: a client's clock may be behind by as much when it makes a key
_SETTLE = timedelta(hours=1)
_START = "0" * 64
_DAYS_AT_ONCE = 31


@dataclass(frozen=True, slots=True)
class Horizon:
    """Up to where the log is complete once the transactions below ``xid`` have ended."""

    last_day: date
    xid: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was sealed; ``row`` names the one row where that can be told."""

    feed: str
    day: date | None
    problem: str
    row: str | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """What :func:`verify_seals` looked at, and the newest seal of each feed."""

    days: int
    rows: int
    dropped_days: int
    heads: dict[str, str]
    findings: list[Finding]


def audit_horizon(connection: Connection) -> Horizon:
    """The last day that is over by the server's clock, and the transactions to wait for."""
    found = rows(
        connection,
        """SELECT ((clock_timestamp() - CAST(:settle AS interval)) AT TIME ZONE 'UTC')::date - 1 AS day,
                  -- a number of its own: a snapshot's xmax may be that of a running transaction
                  CAST(CAST(pg_current_xact_id() AS text) AS bigint) AS xid""",
        settle=_SETTLE,
    )[0]
    return Horizon(found["day"], found["xid"])


def seal_days(connection: Connection, horizon: Horizon) -> int | None:
    """Seal days up to ``horizon`` that are not, 31 of each feed at most; how many, 0 when all are.

    None if a transaction that began before the horizon is still running: it may have rows of those
    days that nobody sees yet.
    """
    running = rows(
        connection,
        """SELECT CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint) < :xid AS r""",
        xid=horizon.xid,
    )[0]["r"]
    if running:
        return None
    return sum(
        int(
            rows(connection, "SELECT dlm_seal_days(:f, :d) AS n", f=feed, d=horizon.last_day)[0][
                "n"
            ]
        )
        for feed in FEEDS
    )


def newest_seals(connection: Connection) -> dict[str, str]:
    """The newest seal of each feed, to be noted elsewhere."""
    found = rows(
        connection, "SELECT DISTINCT ON (feed) feed, seal FROM audit_seal ORDER BY feed, day DESC"
    )
    return {row["feed"]: row["seal"] for row in found}


def drop_month(connection: Connection, feed: str, month: date) -> int:
    """Drop a month's rows of a feed, whose days are all sealed; the seals stay. The rows dropped.

    Raises
    ------
    InvalidValueError
        if a day of it is not sealed, or it was dropped before.
    CatalogueError
        if its rows are not those that were sealed.
    """
    found = rows(
        connection,
        """SELECT count(*) FILTER (WHERE dropped_at IS NULL) AS kept, max(day) = m.last AS over
             FROM audit_seal, LATERAL (SELECT date_trunc('month', CAST(:m AS date))::date AS first,
                  (date_trunc('month', CAST(:m AS date)) + interval '1 month')::date - 1 AS last) m
            WHERE feed = :f AND day BETWEEN m.first AND m.last GROUP BY m.last""",
        f=feed,
        m=month,
    )
    if not found or not found[0]["kept"] or not found[0]["over"]:
        raise InvalidValueError(
            what=f"month of {feed}",
            value=f"{month:%Y-%m}",
            expected="one whose days are all sealed, and were not dropped before",
        )
    return int(rows(connection, "SELECT dlm_drop_month(:f, :m) AS n", f=feed, m=month)[0]["n"])


def verify_seals(connection: Connection, anchor: str | None = None) -> Checked:
    """Compute every seal again and tell what is not as it was sealed.

    ``anchor`` is a seal that was noted elsewhere: it has to be in the chain.
    """
    findings: list[Finding] = []
    heads, days, sealed_rows, dropped, anchored = {}, 0, 0, 0, anchor is None
    for feed in FEEDS:
        previous: dict[str, Any] | None = None
        for seal, now in _pairs(connection, feed):
            findings += _chain(seal, previous)
            findings += _content(connection, seal, now)
            previous = seal
            days += 1
            sealed_rows += seal["rows"]
            dropped += seal["dropped_at"] is not None
            anchored = anchored or seal["seal"] == anchor
        if previous is not None:
            heads[feed] = previous["seal"]
    if not anchored:
        findings.append(Finding("event", None, f"no seal is {anchor}: the chain was written anew"))
    return Checked(days, sealed_rows, dropped, heads, findings)


def _pairs(
    connection: Connection, feed: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each seal with what its day's rows give now (None: no rows), a month at a time."""
    first: date | None = None
    while True:
        seals = rows(
            connection,
            """SELECT s.*, audit_seal_of(s) AS again FROM audit_seal s WHERE feed = :feed
                  AND (CAST(:first AS date) IS NULL OR day >= :first) ORDER BY day LIMIT :n""",
            feed=feed,
            first=first,
            n=_DAYS_AT_ONCE,
        )
        if not seals:
            return
        found = rows(
            connection,
            "SELECT * FROM audit_digests(:feed, :first, :last)",
            feed=feed,
            first=seals[0]["day"],
            last=seals[-1]["day"],
        )
        by_day = {row["day"]: row for row in found}
        for seal in seals:
            yield seal, by_day.get(seal["day"])
        first = seals[-1]["day"] + timedelta(days=1)


def _chain(seal: dict[str, Any], previous: dict[str, Any] | None) -> list[Finding]:
    feed, day = seal["feed"], seal["day"]
    if seal["again"] != seal["seal"]:
        return [Finding(feed, day, "the seal itself was changed")]
    if previous is None:
        if seal["previous"] != _START:
            return [Finding(feed, day, "seals before this day are missing")]
    elif seal["day"] - previous["day"] != timedelta(days=1):
        return [Finding(feed, day, f"seals are missing after {previous['day']}")]
    elif seal["previous"] != previous["seal"]:
        return [Finding(feed, day, f"it does not follow the seal of {previous['day']}")]
    return []


def _content(
    connection: Connection, seal: dict[str, Any], now: dict[str, Any] | None
) -> list[Finding]:
    feed, day = seal["feed"], seal["day"]
    count = now["rows"] if now else 0
    if seal["dropped_at"] is not None:
        if count:
            return [Finding(feed, day, f"{count} rows on a day whose rows were dropped")]
        return []
    if count == seal["rows"] and (not now or now["digest"] == seal["digest"]):
        return []
    sums = ("rows", "key_sum", "hash_sum", "product_sum")
    more = {name: int(now[name] if now else 0) - int(seal[name]) for name in sums}
    problem = {-1: "a row is missing", 0: "a row was changed", 1: "a row was added"}.get(
        more["rows"], f"{abs(more['rows'])} rows {'added' if more['rows'] > 0 else 'are missing'}"
    )
    return [Finding(feed, day, problem, _row(connection, feed, more))]


def _row(connection: Connection, feed: str, more: dict[str, int]) -> str | None:
    """The key of the row, if one row alone explains the difference of all sums."""
    if more["rows"] == 0 and more["key_sum"] == 0 and more["hash_sum"]:
        key, rest = divmod(more["product_sum"], more["hash_sum"])
    elif abs(more["rows"]) == 1:
        key = more["key_sum"] * more["rows"]
        rest = more["product_sum"] - key * more["hash_sum"]
    else:
        return None
    if rest or key < 0 or key >= 2**128:
        return None
    if feed == "deletion":
        return f"certificate {uuid.UUID(int=key)}"
    return f"event {key}" + (_told(connection, key) if more["rows"] >= 0 else "")


def _told(connection: Connection, seq: int) -> str:
    found = rows(
        connection,
        "SELECT noun, action, oid, actor FROM event WHERE seq = :seq AND seq < 9223372036854775807",
        seq=seq,
    )
    if not found:
        return ""
    one = found[0]
    return f" ({one['noun']} {one['action']}, item {one['oid']}, by {one['actor']})"
