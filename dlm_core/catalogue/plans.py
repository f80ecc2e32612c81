"""Plans that a limit stopped: stored with a hash of their content, decided on by people.

What a proposed or rejected plan names is left alone by expiry; what an approved one names is
trashed by that plan, past the limits but with every proof, until the approval runs out.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.expiring import DUE_ENTRIES, Due, plan_is_due
from dlm_core.errors import IllegalTransitionError, NotFoundError
from dlm_core.types import new_id

#: entries of one plan; what is more gets a plan of its own
MOST_ENTRIES = 1_000_000
_LOCK = 1684827507
#: with a plan's key: shared by those who work on it, alone by who decides on it
_DECIDING = 1684827508
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far expiry goes by itself (DESIGN §5.6); sizes in bytes."""

    run_items: int
    run_bytes: int
    day_items: int
    day_bytes: int
    #: of the items of one collection, 0 to 1
    fraction: float
    #: collections with fewer items are not looked at
    fraction_of: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The limit that was reached (a setting's name), its value, and what was found."""

    limit: str
    value: object
    found: str


def find_stop(
    connection: Connection, now: datetime, limits: Limits, due: Due, done: Due
) -> Stop | None:
    """The first limit that trashing ``due`` would break, with ``done`` trashed by this run."""
    items, size = due.replicas + done.replicas, due.bytes + done.bytes
    if items > limits.run_items:
        return Stop(
            "DLM_MAX_DELETE_ITEMS", limits.run_items, f"one run would trash {items} replicas"
        )
    if size > limits.run_bytes:
        return Stop("DLM_MAX_DELETE_BYTES", limits.run_bytes, f"one run would trash {size} bytes")
    day = trashed_since(connection, now - _DAY)
    items, size = due.replicas + day.replicas, due.bytes + day.bytes
    within = f"{day.replicas} replicas ({day.bytes} bytes) were trashed in the last 24 hours and"
    if items > limits.day_items:
        return Stop(
            "DLM_MAX_DELETE_ITEMS_PER_DAY", limits.day_items, f"{within} {due.replicas} are due"
        )
    if size > limits.day_bytes:
        return Stop(
            "DLM_MAX_DELETE_BYTES_PER_DAY", limits.day_bytes, f"{within} {due.bytes} bytes are due"
        )
    return _fraction_stop(connection, now, limits)


def trashed_since(connection: Connection, since: datetime) -> Due:
    """What was trashed after ``since`` without an approved plan."""
    found = rows(
        connection,
        """SELECT count(*) AS n, coalesce(sum(size), 0) AS bytes FROM deletion
            WHERE step = 'trash' AND plan_id IS NULL AND proved_at > :since""",
        since=since,
    )[0]
    return Due(int(found["n"]), int(found["bytes"]))


# of a collection's items that are not DELETED, those of the collections in it included: those due to
# expire and those EXPIRED, without those whose going somebody approved. Only collections with
# something due, and those above them, are looked at; counting stops where the answer is known.
_FRACTIONS = """
WITH RECURSIVE direct AS MATERIALIZED (
  SELECT i.collection_id, count(*) AS n FROM data_item i
   WHERE i.expiring_at <= :now
     AND i.collection_id IS NOT NULL
     AND NOT EXISTS (SELECT FROM plan_reserved k WHERE k.oid = i.oid AND k.basis = 'item_expired')
     AND NOT EXISTS (SELECT FROM holds_on(i.oid, i.uri, i.collection_id))
   GROUP BY 1),
due AS MATERIALIZED (
  SELECT up.collection_id, sum(d.n) AS n
    FROM direct d, collections_above(d.collection_id) up(collection_id) GROUP BY 1),
tree(top, collection_id) AS (
  SELECT collection_id, collection_id FROM due
  UNION SELECT t.top, c.collection_id FROM tree t JOIN collection c ON c.parent_id = t.collection_id),
gone AS (
  SELECT t.top AS collection_id, count(*) AS n FROM data_item i JOIN tree t USING (collection_id)
   WHERE i.expired
     AND NOT EXISTS (SELECT FROM plan_entry e JOIN plan p USING (plan_id)
                      WHERE e.oid = i.oid AND p.state = 'APPROVED')
   GROUP BY 1),
going AS (
  SELECT collection_id, due.n + coalesce(gone.n, 0) AS n FROM due LEFT JOIN gone USING (collection_id))
SELECT c.name, g.n::bigint AS n, t.total FROM going g JOIN collection c USING (collection_id), LATERAL (
  SELECT count(*) AS total FROM (
    SELECT FROM tree b JOIN data_item i ON i.collection_id = b.collection_id
     WHERE b.top = g.collection_id AND i.state <> 'DELETED'
     LIMIT greatest(:least, ceil(g.n / CAST(:fraction AS double precision)))::bigint) x) t
 WHERE g.n > :fraction * :least AND t.total >= :least AND g.n > :fraction * t.total
 ORDER BY g.n DESC, c.name LIMIT 1"""


def _fraction_stop(connection: Connection, now: datetime, limits: Limits) -> Stop | None:
    if limits.fraction >= 1:
        return None
    found = rows(
        connection, _FRACTIONS, now=now, fraction=limits.fraction, least=limits.fraction_of
    )
    if not found:
        return None
    one = found[0]
    told = f"{one['n']} items of collection {one['name']!r} would go, of {one['total']}"
    return Stop("DLM_MAX_DELETE_FRACTION", limits.fraction, told)


def propose_plan(
    connection: Connection,
    now: datetime,
    stop: Stop,
    *,
    actor: str,
    approvals: int,
    valid_for: timedelta,
) -> uuid.UUID | None:
    """Store what expiry would trash now as a plan that waits; its key.

    None if nothing is due that no plan names yet: another run was faster.
    """
    run(connection, "SELECT pg_advisory_xact_lock(:key)", key=_LOCK)
    run(connection, "DROP TABLE IF EXISTS pg_temp.proposed")
    run(
        connection,
        f"CREATE TEMPORARY TABLE proposed ON COMMIT DROP AS {DUE_ENTRIES} LIMIT :most",
        now=now,
        most=MOST_ENTRIES,
    )
    total = rows(
        connection,
        """SELECT count(*) AS n, coalesce(sum(size), 0) AS bytes,
                  encode(dlm_chain(ROW(uid, oid, size, basis, reason)::text ORDER BY uid), 'hex') AS hash
             FROM proposed""",
    )[0]
    if not total["n"]:
        return None
    plan_id = new_id()
    run(
        connection,
        """INSERT INTO plan (plan_id, kind, content_hash, operations, bytes, actor, created_at, reason,
                             approvals, valid_until)
           VALUES (:id, 'expiry', :hash, :n, :bytes, :actor, :now, :reason, :approvals,
                   CAST(:now AS timestamptz) + CAST(:valid AS interval))""",
        id=plan_id,
        hash=total["hash"],
        n=total["n"],
        bytes=total["bytes"],
        actor=actor,
        now=now,
        reason=f"{stop.limit} is {stop.value}: {stop.found}",
        approvals=approvals,
        valid=_DAY if stop.limit.endswith("_PER_DAY") else valid_for,
    )
    run(
        connection,
        """INSERT INTO plan_entry (plan_id, uid, oid, size, basis, reason)
           SELECT :id, uid, oid, size, basis, reason FROM proposed""",
        id=plan_id,
    )
    return plan_id


_PLANS = """
  SELECT p.plan_id, p.kind, p.content_hash, p.operations, p.bytes, p.actor, p.created_at, p.reason,
         p.approvals AS approvals_needed, plan_approvals(p.plan_id) AS approvals, p.valid_until,
         CASE WHEN p.state = 'APPROVED' AND p.applied_at IS NOT NULL AND p.valid_until <= dlm_now() THEN 'DONE'
              WHEN p.state <> 'REJECTED' AND p.valid_until <= dlm_now() THEN p.state || ' (over)'
              ELSE p.state END AS state
    FROM plan p"""


def list_plans(connection: Connection, limit: int = 100) -> list[dict[str, Any]]:
    """The newest plans."""
    return rows(connection, _PLANS + " ORDER BY p.plan_id DESC LIMIT :limit", limit=limit)


def waiting_plans(connection: Connection) -> list[dict[str, Any]]:
    """Plans that wait for somebody's decision."""
    return rows(
        connection,
        """SELECT plan_id, operations, bytes, reason FROM plan
            WHERE state = 'PROPOSED' AND valid_until > dlm_now() ORDER BY created_at""",
    )


def get_plan(connection: Connection, plan_id: uuid.UUID, entries: int = 100) -> dict[str, Any]:
    """A plan with its decisions, its reasons in sum, and its first entries by uri.

    Raises
    ------
    NotFoundError
    """
    found = rows(connection, _PLANS + " WHERE p.plan_id = :id", id=plan_id)
    if not found:
        raise NotFoundError("plan", plan_id, "see 'dlm plan list'")
    return {
        **found[0],
        "trashed": _trashed(connection, plan_id),
        "decisions": rows(
            connection,
            """SELECT actor, decision, reason, created_at FROM plan_decision
                WHERE plan_id = :id ORDER BY seq""",
            id=plan_id,
        ),
        "reasons": rows(
            connection,
            """SELECT e.basis, e.reason, c.name AS collection, count(*) AS replicas,
                      sum(e.size)::bigint AS bytes
                 FROM plan_entry e JOIN data_item i USING (oid) LEFT JOIN collection c USING (collection_id)
                WHERE e.plan_id = :id GROUP BY 1, 2, 3 ORDER BY 4 DESC LIMIT 50""",
            id=plan_id,
        ),
        "entries": rows(
            connection,
            """SELECT i.uri, i.version, s.name AS storage, e.size AS bytes, e.basis, e.reason,
                      r.state, e.uid
                 FROM plan_entry e JOIN replica r USING (uid) JOIN storage s USING (storage_id)
                 JOIN data_item i ON i.oid = e.oid
                WHERE e.plan_id = :id ORDER BY i.uri, i.version, s.name LIMIT :n""",
            id=plan_id,
            n=entries,
        ),
    }


def _trashed(connection: Connection, plan_id: uuid.UUID) -> int:
    found = rows(
        connection,
        """SELECT count(*) AS n FROM plan_entry e JOIN replica r USING (uid)
            WHERE e.plan_id = :id AND r.state IN ('TRASHED', 'DELETED')""",
        id=plan_id,
    )
    return int(found[0]["n"])


def approve_plan(
    connection: Connection,
    plan_id: uuid.UUID,
    *,
    actor: str,
    now: datetime,
    valid_for: timedelta,
    reason: str | None = None,
) -> dict[str, Any]:
    """Approve a plan in the name of ``actor``; the plan as it is then.

    When as many different people did as it needs, what it names passes the limits until
    ``valid_for`` from then. A rejected plan may be approved after all, by all who have to.

    Raises
    ------
    NotFoundError
    IllegalTransitionError
        if it was approved before, or proposed too long ago: the next run proposes what is due then.
    """
    plan = _lock(connection, plan_id)
    over = plan["state"] == "PROPOSED" and plan["valid_until"] <= now
    if plan["state"] == "APPROVED" or over:
        state = "a proposal that has run out" if over else "APPROVED"
        raise IllegalTransitionError(noun="plan", key=plan_id, old=state, new="APPROVED")
    _decide(connection, plan_id, actor, "approved", reason, now)
    run(
        connection,
        """UPDATE plan SET state = 'APPROVED',
                  valid_until = CAST(:now AS timestamptz) + CAST(:valid AS interval)
            WHERE plan_id = :id AND plan_approvals(plan_id) >= approvals""",
        id=plan_id,
        now=now,
        valid=valid_for,
    )
    return get_plan(connection, plan_id, entries=0)


def reject_plan(
    connection: Connection, plan_id: uuid.UUID, *, actor: str, now: datetime, reason: str
) -> None:
    """Reject a plan, or take an approval back: expiry leaves alone what it names, until it is
    approved after all. What it has trashed already can be restored.

    Raises
    ------
    NotFoundError
    """
    _lock(connection, plan_id)
    _decide(connection, plan_id, actor, "rejected", reason, now)
    run(connection, "UPDATE plan SET state = 'REJECTED' WHERE plan_id = :id", id=plan_id)


def _lock(connection: Connection, plan_id: uuid.UUID) -> Mapping[str, Any]:
    _stand_in_line(connection, plan_id)
    found = rows(connection, "SELECT * FROM plan WHERE plan_id = :id FOR UPDATE", id=plan_id)
    if not found:
        raise NotFoundError("plan", plan_id, "see 'dlm plan list'")
    return found[0]


def _stand_in_line(connection: Connection, plan_id: uuid.UUID, shared: str = "") -> None:
    """Wait for those who came before: batches that lock a plan's row for share, each before the
    last one ends, would let who decides on it wait for the last of all."""
    lock = f"SELECT pg_advisory_xact_lock{shared}(:work, hashtext(:plan))"
    run(connection, lock, work=_DECIDING, plan=str(plan_id))


def _decide(
    connection: Connection,
    plan_id: uuid.UUID,
    actor: str,
    decision: str,
    reason: str | None,
    now: datetime,
) -> None:
    run(
        connection,
        """INSERT INTO plan_decision (plan_id, actor, decision, reason, created_at)
           VALUES (:id, :actor, :decision, :reason, :now)""",
        id=plan_id,
        actor=actor,
        decision=decision,
        reason=reason,
        now=now,
    )


def approved_plans(connection: Connection, now: datetime) -> list[uuid.UUID]:
    """Approved plans whose time is not over and of which something could be trashed now: not what
    is under a hold, was refused a while ago, or lies where the DLM may not write."""
    found = rows(
        connection,
        "SELECT plan_id FROM plan WHERE state = 'APPROVED' AND valid_until > :now ORDER BY plan_id",
        now=now,
    )
    return [row["plan_id"] for row in found if plan_is_due(connection, now, row["plan_id"])]


def lock_approved(connection: Connection, plan_id: uuid.UUID, now: datetime) -> bool:
    """Whether a plan is approved and its time not over, until the end of the transaction."""
    _stand_in_line(connection, plan_id, "_shared")
    found = rows(
        connection,
        """SELECT plan_id FROM plan WHERE plan_id = :id AND state = 'APPROVED' AND valid_until > :now
              FOR SHARE""",
        id=plan_id,
        now=now,
    )
    return bool(found)


def note_applied(connection: Connection, plan_id: uuid.UUID, now: datetime) -> None:
    """Remember when a plan was first put to work, and end its time if nothing of it is left: then
    no question looks through its entries any more."""
    run(
        connection,
        "UPDATE plan SET applied_at = :now WHERE plan_id = :id AND applied_at IS NULL",
        id=plan_id,
        now=now,
    )
    run(
        connection,
        """UPDATE plan SET valid_until = :now WHERE plan_id = :id AND valid_until > :now
              AND NOT EXISTS (SELECT FROM plan_entry e JOIN replica r USING (uid)
                               WHERE e.plan_id = :id AND r.live)""",
        id=plan_id,
        now=now,
    )
