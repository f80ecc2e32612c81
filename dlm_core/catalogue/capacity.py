"""Queries of rebalancing: which storages need room made, and what they told of themselves."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.places import MOST_BYTES

_EFFECTIVE = """
  SELECT s.storage_id, s.name, s.mode, s.managed, s.high_watermark, s.low_watermark,
         s.rebalance_after, coalesce(s.capacity_bytes, s.observed_total_bytes) AS capacity,
         CASE WHEN s.capacity_bytes IS NULL THEN greatest(s.observed_used_bytes, u.used_bytes)
              ELSE u.used_bytes END AS used,
         s.capacity_bytes IS NULL AS told, u.trashed_bytes AS trashed, l.bytes AS leaving,
         -- by its order the index replica_coldest: an EXISTS would read the whole table in vain once
         -- a storage that held much is empty
         s.mode = 'draining' AND ((
           SELECT r.uid FROM replica r WHERE r.storage_id = s.storage_id AND r.expires_at IS NULL AND r.live
              AND r.state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING')
            ORDER BY r.accessed_at LIMIT 1) IS NOT NULL OR l.later) AS undrained
    FROM storage s JOIN storage_usage u USING (storage_id)
    CROSS JOIN LATERAL (
      SELECT coalesce(sum(r.size) FILTER (WHERE r.expires_at <= :now), 0)::bigint AS bytes,
             coalesce(bool_or(r.expires_at > :now), false) AS later FROM replica r
       WHERE r.storage_id = s.storage_id AND r.deletable_at IS NOT NULL) l
   -- of others' files none is moved to make room, but all are left behind where a storage is given up
   WHERE s.mode = 'draining' OR (s.managed AND s.mode = 'read_write')
"""


def storages_to_relieve(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """Storages being drained with replicas not on their way, and storages above their high
    watermark for which what is trashed or leaving does not suffice to reach the low one.

    ``to_free`` is bytes that still have to leave (0 for draining ones).
    """
    return rows(
        connection,
        f"""SELECT *, CASE WHEN undrained THEN 0
                 ELSE used - trashed - leaving - floor(capacity * low_watermark)::bigint END AS to_free
              FROM ({_EFFECTIVE}) e
             WHERE undrained
                OR (mode = 'read_write' AND used > capacity * high_watermark
                    AND used - trashed - leaving > capacity * low_watermark
                    AND (rebalance_after IS NULL OR rebalance_after <= :now))
             ORDER BY name""",
        now=now,
    )


def lock_draining(connection: Connection, storage_id: uuid.UUID) -> bool:
    """Whether a storage is being drained; nobody calls that off before this transaction ends."""
    return bool(
        rows(
            connection,
            "SELECT 1 AS n FROM storage WHERE storage_id = :id AND mode = 'draining' FOR SHARE",
            id=storage_id,
        )
    )


def put_off_rebalance(connection: Connection, storage_id: uuid.UUID, until: datetime) -> None:
    """Nothing more can leave the storage now, or it gives no answer: do not try again before
    ``until``."""
    run(
        connection,
        "UPDATE storage SET rebalance_after = :until WHERE storage_id = :storage",
        until=until,
        storage=storage_id,
    )


def storages_to_observe(connection: Connection, before: datetime) -> list[dict[str, Any]]:
    """Storages without a given capacity, not asked yet or last asked before ``before`` (an hour
    before that, if they could not tell), but for those of which rebalancing is put off."""
    return rows(
        connection,
        """SELECT * FROM storage WHERE capacity_bytes IS NULL AND managed
              AND mode IN ('read_write', 'draining')
              AND (observed_at IS NULL OR observed_at < :before - CASE
                   WHEN observed_total_bytes IS NULL THEN interval '1 hour' ELSE interval '0' END)
              AND (rebalance_after IS NULL OR rebalance_after <= dlm_now())""",
        before=before,
    )


def note_usage(
    connection: Connection,
    storage_id: uuid.UUID,
    total: int | None,
    used: int | None,
    now: datetime,
) -> None:
    """Keep what a storage told of its capacity, in bytes; None when it cannot tell."""
    run(
        connection,
        """UPDATE storage SET observed_total_bytes = :total, observed_used_bytes = :used,
                  observed_at = :now WHERE storage_id = :storage""",
        total=total if total is None else min(total, MOST_BYTES),
        used=used if used is None else min(used, MOST_BYTES),
        now=now,
        storage=storage_id,
    )
