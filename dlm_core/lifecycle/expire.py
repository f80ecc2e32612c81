"""Expiry: what is past its time goes, with a certificate, through the trash (DESIGN §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from dlm_core.catalogue import deletions as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas
from dlm_core.catalogue.deletions import Proof
from dlm_core.errors import BlastRadiusError
from dlm_core.lifecycle.work import Context
from dlm_core.types import OperationKind

_PLAN_BATCH = 5000
#: a refused deletion is asked for again after this long, or as soon as replication has made what
#: was missing
_REFUSED = timedelta(minutes=10)
_REFUSED_HELD = timedelta(hours=1)


@dataclass(slots=True)
class ExpiryPlanner:
    """Plans the expiry of what is due, within what one run may delete (DESIGN §5.6).

    ``max_items`` counts replicas, ``max_bytes`` their bytes; reaching either stops the run before
    the next batch with nothing of it trashed.
    """

    max_items: int
    max_bytes: int
    trashed_items: int = 0
    trashed_bytes: int = 0
    refused: int = 0

    def __call__(self, context: Context) -> int:
        """Trash what is due; returns the number of replicas that were.

        Raises
        ------
        BlastRadiusError
            if more is due than one run may delete.
        """
        planned = 0
        while not context.stop.is_set():
            due = context.transact(lambda c: catalogue.count_expiry_due(c, context.clock()))
            if not due.replicas:
                break
            self._check(due)
            trashed, refused = context.transact(lambda c: plan_batch(c, context, _PLAN_BATCH))
            self.trashed_items += len(trashed)
            self.trashed_bytes += sum(proof.size for proof in trashed)
            self.refused += len(refused)
            planned += len(trashed)
        return planned

    def _check(self, due: catalogue.Due) -> None:
        items, size = self.trashed_items + due.replicas, self.trashed_bytes + due.bytes
        if items > self.max_items:
            raise BlastRadiusError(
                what="expiry", found=items, unit="replicas", limit=self.max_items
            )
        if size > self.max_bytes:
            raise BlastRadiusError(what="expiry", found=size, unit="bytes", limit=self.max_bytes)


def plan_batch(
    connection: Connection, context: Context, limit: int
) -> tuple[list[Proof], list[Proof]]:
    """Expire items and trash due replicas in one transaction: (trashed, refused).

    Survivors are locked, certificates written, replicas marked and their file work queued
    together. A refusal puts the deletion off and asks replication for what is missing.
    """
    now = context.clock()
    catalogue.expire_items(connection, now, limit)
    due = catalogue.select_expired(connection, now, limit)
    if not due:
        return [], []
    proofs = catalogue.prove(connection, due)
    # what another worker trashed between the selection and the lock is no longer ours
    live = [p for p in proofs if p.state in ("READY", "SUSPECT", "CORRUPTED", "MISSING")]
    granted = [p for p in live if p.refusal is None]
    refused = [p for p in live if p.refusal is not None]
    if granted:
        trash(connection, granted, actor=context.actor, now=now, valid_for=_certificate(context))
    if refused:
        _put_off(connection, refused, now)
    return granted, refused


def trash(
    connection: Connection,
    proofs: Sequence[Proof],
    *,
    actor: str,
    now: datetime,
    valid_for: timedelta,
) -> None:
    """Certify and mark replicas TRASHED, and queue the move of their bytes."""
    catalogue.certify(
        connection, [(p, "trash") for p in proofs], actor=actor, now=now, valid_for=valid_for
    )
    catalogue.cancel_operations(connection, [p.uid for p in proofs], ["copy", "verify"], now)
    queue.insert_operations(
        connection,
        [queue.NewOperation(OperationKind.TRASH, p.oid, p.uid, p.reason, now) for p in proofs],
        actor,
        now,
    )


def propose_expiry(context: Context, limit: int = 1000) -> list[Proof]:
    """What expiry would do now with its reasons, changing nothing (``dry_run``)."""

    def look(connection: Connection) -> list[Proof]:
        granted, refused = plan_batch(connection, context, limit)
        return [*granted, *refused]

    return context.rehearse(look)


def _certificate(context: Context) -> timedelta:
    return timedelta(seconds=context.settings.certificate_seconds)


def _put_off(connection: Connection, refused: Sequence[Proof], now: datetime) -> None:
    held = [p.uid for p in refused if p.refusal and p.refusal.startswith("under a hold")]
    others = [p.uid for p in refused if p.uid not in set(held)]
    for uids, delay in ((held, _REFUSED_HELD), (others, _REFUSED)):
        if uids:
            replicas.put_off_deletion(connection, uids, now, delay)
    replicas.put_evaluations(connection, [(oid, now, 0) for oid in {p.oid for p in refused}])
