"""Which items go first, and by when their copies have to be there."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import InvalidValueError, NotFoundError

#: an operation's priority is ten times its item's, so that there is room for what it does
STEP = 10
#: of what would miss its deadline: before everything else
_FIRST = -100
#: advisory lock of who changes urgencies
_LOCK = 0x75726765


@dataclass(frozen=True, slots=True)
class Urgency:
    """``priority`` from -9 (first) to 9 (last)."""

    priority: int = 0
    needed_by: datetime | None = None

    def __post_init__(self) -> None:
        """Raises InvalidValueError."""
        if not isinstance(self.priority, int) or not -9 <= self.priority <= 9:
            raise InvalidValueError(
                what="priority", value=self.priority, expected="-9 (first) to 9 (last)"
            )
        by = self.needed_by
        if by is not None and (not isinstance(by, datetime) or by.tzinfo is None):
            raise InvalidValueError(
                what="deadline", value=str(by), expected="a datetime with its zone"
            )


def urgencies_of(connection: Connection, oids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Urgency]:
    """The items that have one, with what it is."""
    found = rows(
        connection,
        "SELECT oid, priority, needed_by FROM urgency WHERE oid = ANY(:oids)",
        oids=list(oids),
    )
    return {row["oid"]: Urgency(row["priority"], row["needed_by"]) for row in found}


def set_urgency(
    connection: Connection, oids: Sequence[uuid.UUID], changes: Mapping[str, Any]
) -> None:
    """Change ``priority`` or ``needed_by`` of items, and of what is queued for them.

    Raises
    ------
    InvalidValueError
    """
    # what is queued moves by the difference, which of two at once both would take from the same
    run(connection, "SELECT pg_advisory_xact_lock(:key)", key=_LOCK)
    before = urgencies_of(connection, oids)
    after = {
        oid: Urgency(
            changes.get("priority", before.get(oid, Urgency()).priority),
            changes.get("needed_by", before.get(oid, Urgency()).needed_by),
        )
        for oid in sorted(oids)
    }
    kept = {oid: one for oid, one in after.items() if one != Urgency()}
    run(
        connection,
        "DELETE FROM urgency WHERE oid = ANY(:oids)",
        oids=[oid for oid in before if oid not in kept],
    )
    run(
        connection,
        """INSERT INTO urgency (oid, priority, needed_by)
           SELECT * FROM unnest(CAST(:oids AS uuid[]), CAST(:priorities AS int2[]),
                                CAST(:times AS timestamptz[]))
           ON CONFLICT (oid) DO UPDATE
              SET priority = EXCLUDED.priority, needed_by = EXCLUDED.needed_by""",
        oids=list(kept),
        priorities=[one.priority for one in kept.values()],
        times=[one.needed_by for one in kept.values()],
    )
    _move_queued(connection, before, after)


def _move_queued(
    connection: Connection, before: Mapping[uuid.UUID, Urgency], after: Mapping[uuid.UUID, Urgency]
) -> None:
    none = Urgency()
    steps = [STEP * (one.priority - before.get(oid, none).priority) for oid, one in after.items()]
    # by the replicas: operations are looked up by these
    run(
        connection,
        """UPDATE operation o SET deadline = u.needed_by,
                  priority = greatest(o.priority + u.step, :first)
             FROM unnest(CAST(:oids AS uuid[]), CAST(:steps AS int2[]),
                         CAST(:times AS timestamptz[])) AS u(oid, step, needed_by)
             JOIN replica r ON r.oid = u.oid
            WHERE o.uid = r.uid AND o.state = 'QUEUED' AND o.kind IN ('admit', 'copy')""",
        oids=list(after),
        steps=steps,
        times=[one.needed_by for one in after.values()],
        first=_FIRST,
    )


def hasten(connection: Connection, until: datetime) -> int:
    """Put what is queued and has to be done before ``until`` before everything else; how many."""
    return run(
        connection,
        """UPDATE operation SET priority = :first
            WHERE deadline <= :until AND state = 'QUEUED' AND priority > :first""",
        until=until,
        first=_FIRST,
    )


def deadlines(connection: Connection, now: datetime, until: datetime) -> dict[str, Any]:
    """Items whose copies are not all there though they are needed: ``late`` ones, those that are
    needed before ``until`` (``near``), and the earliest of these times."""
    return rows(
        connection,
        """SELECT count(*) FILTER (WHERE u.needed_by <= :now) AS late,
                  count(*) FILTER (WHERE u.needed_by > :now) AS near, min(u.needed_by) AS earliest
             FROM urgency u JOIN data_item i USING (oid)
            WHERE u.needed_by <= :until AND (i.shortfall IS NOT NULL OR i.state = 'INITIALISED')""",
        now=now,
        until=until,
    )[0]


def forget_met(connection: Connection, before: datetime) -> int:
    """Forget deadlines before that time of items that have their copies; how many."""
    found = rows(
        connection,
        """SELECT u.oid FROM urgency u JOIN data_item i USING (oid)
            WHERE u.needed_by < :before AND i.shortfall IS NULL AND i.state <> 'INITIALISED'
            LIMIT 10000""",
        before=before,
    )
    set_urgency(connection, [row["oid"] for row in found], {"needed_by": None})
    return len(found)


def items_in(connection: Connection, collection: str) -> list[uuid.UUID]:
    """The items of a collection and of those in it.

    Raises
    ------
    NotFoundError
    """
    if not rows(connection, "SELECT FROM collection WHERE name = :name", name=collection):
        raise NotFoundError("collection", collection)
    found = rows(
        connection,
        """WITH RECURSIVE below AS (
             SELECT collection_id FROM collection WHERE name = :name
             UNION SELECT c.collection_id FROM collection c JOIN below b
                       ON c.parent_id = b.collection_id)
           SELECT oid FROM data_item JOIN below USING (collection_id) ORDER BY oid""",
        name=collection,
    )
    return [row["oid"] for row in found]
