"""The audit trail: every decision and effect with who, why, and the certificate behind it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows

_PAGE = 1000

# why: what the event itself says, else the certificate, else the item's expiry, else the operation
# that made the copy
_TRAIL = """
  SELECT e.seq, e.at, e.actor AS who, e.noun, e.action, e.old_state, e.new_state, i.uri, i.version,
         s.name AS storage, e.uid,
         coalesce(e.detail->>'reason', d.reason,
           CASE WHEN e.noun = 'item' AND e.new_state IN ('EXPIRED', 'DELETED') THEN i.expiry_reason END,
           CASE WHEN e.noun = 'replica' AND e.action = 'created' THEN (
             SELECT o.reason FROM operation o WHERE o.uid = e.uid ORDER BY o.operation_id LIMIT 1) END) AS why,
         CASE WHEN d.deletion_id IS NOT NULL THEN jsonb_build_object(
           'deletion_id', d.deletion_id, 'step', d.step, 'basis', d.basis, 'survivors', d.survivors,
           'holds_examined', d.holds_examined, 'plan_id', d.plan_id, 'proved_at', d.proved_at,
           'valid_until', d.valid_until) END AS certificate,
         e.detail
    FROM event e
    LEFT JOIN deletion d ON d.deletion_id = CAST(e.detail->>'deletion_id' AS uuid) AND e.noun = 'replica'
    LEFT JOIN data_item i ON i.oid = e.oid
    LEFT JOIN storage s ON s.storage_id = e.storage_id
   WHERE e.at >= :since AND e.seq > :after
   ORDER BY e.seq LIMIT :page"""


def audit_trail(connection: Connection, since: datetime) -> Iterator[dict[str, Any]]:
    """The log from ``since`` on in the order of its sequence, a page at a time."""
    after = 0
    while True:
        page = rows(connection, _TRAIL, since=since, after=after, page=_PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1]["seq"]
