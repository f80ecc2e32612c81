"""Declare a storage lost, take one back, and audit it before anything on it counts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import lost as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.places import get_storage
from dlm_core.errors import InvalidValueError
from dlm_core.lifecycle.check import AUDIT
from dlm_core.lifecycle.work import Context
from dlm_core.types import OperationKind, StorageMode

_BATCH = 5000


def lose_storage(context: Context, name: str, reason: str, limit: int = 1000) -> dict[str, Any]:
    """Declare a storage lost: nothing on it counts any more, and its replicas become MISSING.

    What is missing then is made again by the replication job. Done in batches; one that was
    interrupted is completed by doing it again. Returns how many replicas were lost and operations
    ended, and what was held alone (see :func:`propose_loss`).

    Raises
    ------
    NotFoundError, IllegalTransitionError
    InvalidValueError
        without a reason.
    """
    if not reason.strip():
        raise InvalidValueError(what="reason", value=reason, expected="why it is lost")
    storage = context.transact(lambda c: catalogue.declare_lost(c, name, reason))
    storage_id = storage["storage_id"]
    why = f"storage {name} was declared lost: {reason}"
    replicas = operations = 0
    while True:
        # a planner or worker that began before may add to it once
        ended = context.transact(
            lambda c: catalogue.end_operations(c, storage_id, why, context.clock())
        )
        gone = _lose_all(context, storage_id)
        replicas, operations = replicas + gone, operations + ended
        if not (ended or gone):
            break
    alone = context.transact(lambda c: catalogue.held_alone(c, storage_id, limit))
    return {"storage": name, "replicas": replicas, "operations_ended": operations, "alone": alone}


def _lose_all(context: Context, storage_id: uuid.UUID) -> int:
    lost, after = 0, ""
    while True:
        count, last = context.transact(
            partial(catalogue.lose_replicas, storage_id=storage_id, after=after, limit=_BATCH)
        )
        lost += count
        if last is None:
            return lost
        after = last


def propose_loss(context: Context, name: str, limit: int = 1000) -> dict[str, Any]:
    """The items of which no other storage has a good copy, changing nothing (``dry_run``).

    Raises
    ------
    NotFoundError
    """

    def look(connection: Connection) -> dict[str, Any]:
        storage = get_storage(connection, name)
        replicas = sum(n for s, n in storage["replicas_by_state"].items() if s != "DELETED")
        alone = catalogue.held_alone(connection, storage["storage_id"], limit)
        return {"storage": name, "replicas": replicas, "operations_ended": 0, "alone": alone}

    found: dict[str, Any] = context.transact(look)
    return found


def take_back(context: Context, name: str) -> None:
    """A lost or offline storage is there again: it is looked at, and its audit begins.

    Until the verification job has read a copy again it is SUSPECT: it is no survivor of a
    deletion, and until all were read the storage is neither written to nor read from.

    Raises
    ------
    NotFoundError, IllegalTransitionError
    StorageError
        if it cannot be reached.
    """
    row = context.transact(lambda c: get_storage(c, name))
    known = context.transact(context.storages.load)
    context.storages.open(known[row["storage_id"]]).check()
    context.transact(lambda c: catalogue.begin_audit(c, name))


def plan_audits(context: Context) -> int:
    """Queue the looks at what storages that came back hold, a batch of each, and end the audits
    whose looks were all taken; how many were queued."""
    planned: int = context.transact(lambda c: _plan(c, context))
    return planned


def _plan(connection: Connection, context: Context) -> int:
    return sum(_audit(connection, context, row) for row in catalogue.lock_audits(connection))


def _audit(connection: Connection, context: Context, row: Mapping[str, Any]) -> int:
    storage_id, now = row["storage_id"], context.clock()
    if row["audit_after"] is None:
        if not catalogue.waits_for_looks(connection, storage_id):
            mode = StorageMode.READ_WRITE if row["managed"] else StorageMode.READ_ONLY
            catalogue.end_audit(connection, storage_id, mode)
        return 0
    doubted = catalogue.doubt_replicas(connection, storage_id, row["audit_after"], _BATCH)
    looks = [
        queue.NewOperation(OperationKind.VERIFY, one["oid"], one["uid"], AUDIT, now)
        for one in doubted
    ]
    # a page of what needs no look is work too: another may follow
    return queue.insert_operations(connection, looks, context.actor, now) if looks else 1
