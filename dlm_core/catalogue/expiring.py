"""What is past its time and could be trashed: counted, listed in lots, expired.

What is counted is what the limits on deletions are asked about (DESIGN §5.6); no row is locked by
it. Certificates and their proofs are in ``catalogue.deletions``.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run

#: keys of so many replicas are kept by a run at once
_MOST_IN_LOTS = 1_000_000
#: why copies go whose item has expired
WITH_ITEM = "its item has expired"
_DELETABLE = "('READY', 'SUSPECT', 'CORRUPTED', 'MISSING')"


@dataclass(frozen=True, slots=True)
class Due:
    """How much is due to be trashed: replicas and bytes, those of items due to expire included."""

    replicas: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Lot:
    """Some of what was due when it was counted, by key, 16 octets each: ``uids`` of replicas, and
    ``oids`` of the items among theirs that were due to expire as a whole."""

    uids: bytes
    oids: bytes

    def keys(self) -> tuple[list[uuid.UUID], list[uuid.UUID]]:
        """The uids and the oids."""
        return _keys(self.uids), _keys(self.oids)


def _keys(octets: bytes) -> list[uuid.UUID]:
    return [uuid.UUID(bytes=octets[n : n + 16]) for n in range(0, len(octets), 16)]


def _due_replicas(of: str) -> str:
    return f"""
  SELECT r.uid, r.oid, r.size, r.deletable_at FROM {of} r JOIN storage s USING (storage_id)
   WHERE r.deletable_at <= :now
     AND (NOT s.managed OR s.mode IN ('read_write', 'draining', 'lost', 'retired'))"""


def _due_items(of: str) -> str:
    # after a recovery a person has to confirm holds and times first
    return f"""
  SELECT i.oid, i.expires_at, i.expiry_reason FROM {of} i
   WHERE i.expiring_at <= :now
     AND NOT (SELECT recovery_unconfirmed())"""


_DUE_REPLICAS, _DUE_ITEMS = _due_replicas("replica"), _due_items("data_item")
_UNHELD = " AND NOT EXISTS (SELECT FROM holds_on(i.oid, i.uri, i.collection_id))"
# what no plan names, and what a plan does: see catalogue.plans
_FREE_REPLICA = " AND NOT EXISTS (SELECT FROM plan_reserved k WHERE k.uid = r.uid)"
_FREE_ITEM = """ AND NOT EXISTS (
  SELECT FROM plan_reserved k WHERE k.oid = i.oid AND k.basis = 'item_expired')"""
_PLANNED_REPLICA = """ AND EXISTS (
  SELECT FROM plan_entry k WHERE k.plan_id = :plan AND k.uid = r.uid)"""
_PLANNED_ITEM = """ AND EXISTS (
  SELECT FROM plan_entry k WHERE k.plan_id = :plan AND k.oid = i.oid AND k.basis = 'item_expired')"""

_LONGEST_FIRST = " ORDER BY r.deletable_at LIMIT :limit"
#: replicas that are due and that no plan names
EXPIRED = f"{_DUE_REPLICAS}{_FREE_REPLICA}{_LONGEST_FIRST}"
# of a lot: looked up by key, whatever the planner takes the backlog for
_NAMED = "WITH named AS MATERIALIZED (SELECT * FROM replica WHERE uid = ANY(:uids))"
#: those of a lot, and of these those that a plan names
EXPIRED_OF_LOT = f"{_NAMED}{_due_replicas('named')}{_FREE_REPLICA}{_LONGEST_FIRST}"
EXPIRED_OF_PLAN = f"{_NAMED}{_due_replicas('named')}{_PLANNED_REPLICA}{_LONGEST_FIRST}"

_ITEMS = f"""
  due AS MATERIALIZED ({_DUE_ITEMS}{_FREE_ITEM}{_UNHELD}
    ORDER BY i.expiring_at LIMIT :limit FOR NO KEY UPDATE OF i SKIP LOCKED)"""
_LOCKED_ITEMS = """
  named AS MATERIALIZED (
    SELECT * FROM data_item WHERE oid = ANY(:oids) ORDER BY oid FOR NO KEY UPDATE SKIP LOCKED)"""
_ITEMS_OF_LOT = f"""{_LOCKED_ITEMS},
  due AS MATERIALIZED ({_due_items("named")}{_FREE_ITEM}{_UNHELD} LIMIT :limit)"""
_ITEMS_OF_PLAN = f"""{_LOCKED_ITEMS},
  due AS MATERIALIZED ({_due_items("named")}{_PLANNED_ITEM}{_UNHELD} LIMIT :limit)"""

#: the replicas that are due and that no plan names, as the entries of one
DUE_ENTRIES = f"""
  WITH item AS MATERIALIZED ({_DUE_ITEMS}{_FREE_ITEM}{_UNHELD})
  SELECT r.uid, r.oid, r.size, 'item_expired' AS basis,
         coalesce(item.expiry_reason, 'its time is over') AS reason
    FROM item JOIN replica r USING (oid) WHERE r.state IN {_DELETABLE}
  UNION ALL
  SELECT r.uid, r.oid, r.size,
         CASE i.state WHEN 'EXPIRED' THEN 'item_expired' ELSE 'replica_expired' END,
         coalesce(r.expiry_reason, 'its time is over')
    FROM ({_DUE_REPLICAS}{_FREE_REPLICA}) due JOIN replica r USING (uid) JOIN data_item i ON i.oid = r.oid
   WHERE NOT EXISTS (SELECT FROM item WHERE item.oid = r.oid)"""


def count_expiry_due(connection: Connection, now: datetime, limit: int = 1_000_000) -> Due:
    """What has passed its time and could be trashed now; counting stops at ``limit``.

    Replicas on storages where the DLM may not write now, and items under a hold, wait uncounted;
    so does what a plan names.
    """
    found = rows(
        connection,
        f"""SELECT count(*) AS n, coalesce(sum(size), 0) AS bytes FROM (
              SELECT uid, size FROM ({_DUE_REPLICAS}{_FREE_REPLICA}) due
              UNION
              SELECT r.uid, r.size FROM ({_DUE_ITEMS}{_FREE_ITEM}{_UNHELD}) due JOIN replica r USING (oid)
               WHERE r.state IN {_DELETABLE}
              LIMIT :limit) d""",
        now=now,
        limit=limit,
    )[0]
    return Due(int(found["n"]), int(found["bytes"]))


# in lots of :size, longest due first; only the first :kept of them have their keys told
_LOTS = f"""
WITH item AS MATERIALIZED ({_DUE_ITEMS}{_FREE_ITEM}{_UNHELD}),
due AS (
  SELECT r.uid, r.oid, r.size, item.expires_at AS since, true AS whole
    FROM item JOIN replica r USING (oid) WHERE r.state IN {_DELETABLE}
  UNION ALL
  SELECT uid, oid, size, deletable_at, false FROM ({_DUE_REPLICAS}{_FREE_REPLICA}) d
   WHERE NOT EXISTS (SELECT FROM item WHERE item.oid = d.oid)
  LIMIT :limit),
sorted AS (
  SELECT *, (row_number() OVER (ORDER BY since, oid, uid) - 1) / :size AS lot FROM due)
SELECT count(*) AS n, sum(size) AS bytes,
       string_agg(uuid_send(uid), '') FILTER (WHERE lot < :kept) AS uids,
       string_agg(DISTINCT uuid_send(oid), '') FILTER (WHERE lot < :kept AND whole) AS oids
  FROM sorted GROUP BY lot ORDER BY lot"""


def list_due(connection: Connection, now: datetime, size: int, limit: int) -> tuple[Due, list[Lot]]:
    """As :func:`count_expiry_due`, with what was counted in lots of ``size`` replicas, longest due
    first: of a million at most."""
    found = rows(connection, _LOTS, now=now, size=size, limit=limit, kept=-(-_MOST_IN_LOTS // size))
    due = Due(sum(int(row["n"]) for row in found), sum(int(row["bytes"]) for row in found))
    return due, [Lot(row["uids"], row["oids"] or b"") for row in found if row["uids"]]


def list_planned(connection: Connection, plan_id: uuid.UUID, size: int) -> list[Lot]:
    """What a plan names and is not trashed yet, in lots of ``size`` replicas."""
    found = rows(
        connection,
        f"""SELECT string_agg(uuid_send(uid), '') AS uids,
                   string_agg(DISTINCT uuid_send(oid), '') FILTER (WHERE basis = 'item_expired') AS oids
              FROM (SELECT k.uid, k.oid, k.basis,
                           (row_number() OVER (ORDER BY k.oid, k.uid) - 1) / :size AS lot
                      FROM plan_entry k JOIN replica r USING (uid)
                     WHERE k.plan_id = :plan AND r.state IN {_DELETABLE}) k
             GROUP BY lot ORDER BY lot""",
        plan=plan_id,
        size=size,
    )
    return [Lot(row["uids"], row["oids"] or b"") for row in found]


def plan_is_due(connection: Connection, now: datetime, plan_id: uuid.UUID) -> bool:
    """Whether something that a plan names could expire or be trashed now."""
    found = rows(
        connection,
        f"""SELECT EXISTS ({_DUE_REPLICAS}{_PLANNED_REPLICA})
                OR EXISTS ({_DUE_ITEMS}{_PLANNED_ITEM}{_UNHELD}) AS due""",
        now=now,
        plan=plan_id,
    )
    return bool(found[0]["due"])


def expire_items(
    connection: Connection,
    now: datetime,
    limit: int,
    lot: Lot | None = None,
    plan_id: uuid.UUID | None = None,
) -> int:
    """READY and CORRUPTED items past their time and under no hold become EXPIRED, and all their
    replicas' time is over with them: those that no plan names; of a ``lot``, or also of a plan,
    only those that it names. Returns how many."""
    run(connection, "LOCK TABLE hold IN SHARE MODE")
    items = _ITEMS
    named: dict[str, Any] = {}
    if lot is not None:
        items, named = _ITEMS_OF_LOT, {"oids": lot.keys()[1]}
    if plan_id is not None:
        items, named = _ITEMS_OF_PLAN, {**named, "plan": plan_id}
    found = rows(
        connection,
        f"""WITH {items}
            UPDATE data_item i SET state = 'EXPIRED', shortfall = NULL
              FROM due WHERE i.oid = due.oid RETURNING i.oid""",
        now=now,
        limit=limit,
        **named,
    )
    oids = [row["oid"] for row in found]
    if oids:
        run(
            connection,
            """UPDATE replica SET expires_at = greatest(:now, created_at), expiry_reason = :reason
                WHERE oid = ANY(:oids) AND live""",
            oids=oids,
            now=now,
            reason=WITH_ITEM,
        )
        _end_announcements(connection, oids, now)
    return len(oids)


def _end_announcements(connection: Connection, oids: list[uuid.UUID], now: datetime) -> None:
    """Nobody waits for what was only announced of expired items, or was refused when it was read:
    MISSING, it goes with the rest. A copy that is made ends by itself."""
    run(
        connection,
        """UPDATE operation SET state = 'CANCELLED', finished_at = :now, lease_token = NULL,
                  lease_until = NULL, error_code = 'DLM-503', error = 'the item is EXPIRED by now'
            WHERE uid = ANY(ARRAY(SELECT uid FROM replica WHERE oid = ANY(:oids) AND state = 'PENDING'))
              AND kind = 'admit' AND state IN ('QUEUED', 'RUNNING', 'FAILED')""",
        oids=oids,
        now=now,
    )
    run(
        connection,
        """UPDATE replica r SET state = 'MISSING' WHERE oid = ANY(:oids) AND state = 'PENDING'
              AND NOT EXISTS (SELECT FROM operation o WHERE o.uid = r.uid
                                 AND o.state IN ('QUEUED', 'RUNNING'))""",
        oids=oids,
    )


def item_due(connection: Connection, oid: uuid.UUID, now: datetime) -> bool:
    """Whether an item, or a replica of it, has passed its time and could be trashed now: no plan
    names it, or an approved one."""
    approved = """ AND EXISTS (SELECT FROM plan_entry k JOIN plan p USING (plan_id)
      WHERE p.state = 'APPROVED' AND p.valid_until > :now AND k."""
    approved_item = f"{approved}oid = i.oid AND k.basis = 'item_expired')"
    found = rows(
        connection,
        f"""SELECT EXISTS ({_DUE_ITEMS}{_FREE_ITEM}{_UNHELD} AND i.oid = :oid)
                OR EXISTS ({_DUE_ITEMS}{approved_item}{_UNHELD} AND i.oid = :oid)
                OR EXISTS ({_DUE_REPLICAS}{_FREE_REPLICA} AND r.oid = :oid)
                OR EXISTS ({_DUE_REPLICAS}{approved}uid = r.uid) AND r.oid = :oid) AS due""",
        oid=oid,
        now=now,
    )
    return bool(found[0]["due"])
