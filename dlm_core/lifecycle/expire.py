"""Expiry: what is past its time goes, with a certificate, through the trash (DESIGN §5)."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from time import monotonic

from sqlalchemy import Connection

from dlm_core.catalogue import deletions as catalogue
from dlm_core.catalogue import expiring, plans, recovery, replicas
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.deletions import Proof
from dlm_core.errors import BlastRadiusError, TooManyErrorsError
from dlm_core.lifecycle.work import Context, Report
from dlm_core.types import OperationKind

_PLAN_BATCH = 5000
#: so many sessions of the database work on a lot each, no two of them on one replica
_LOTS_AT_ONCE = 2
#: what is due is counted to here though the limit is lower, so that a stop tells how much it is
_COUNTED = 1_000_000
#: the share of errors is looked at from so many deletions on
_ERRORS_OF = 50
#: what is due is counted anew after so long, or so many times as long as the counting took
_COUNT_SECONDS, _COUNT_SHARE = 60.0, 10
#: a refused deletion is asked for again after this long, or as soon as replication has made what
#: was missing
_REFUSED = timedelta(minutes=10)
_REFUSED_HELD = timedelta(hours=1)


@dataclass(slots=True)
class ExpiryPlanner:
    """Plans the expiry of what is due, within the limits (DESIGN §5.6).

    ``max_items`` counts the replicas of one run, ``max_bytes`` their bytes; the other limits are in
    the context's settings. What people have approved as a plan passes them all and is not counted.
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
            if a limit would be broken: then all that is due waits as a plan, and nothing of it is
            trashed. What plans named before is no longer due.
        """
        planned = self._apply_plans(context)
        while not context.stop.is_set():
            trashed, refused = self._take_counted(context)
            planned += trashed
            if not trashed and not refused:
                break  # nothing is due, or somebody else holds it locked
        return planned

    def _take_counted(self, context: Context) -> tuple[int, int]:
        """Count what is due, and trash in batches nothing but what was counted, as far as it is
        still due and no plan names it then: (trashed, refused)."""
        begun, before = monotonic(), (self.trashed_items, self.refused)
        lots = self._check(context)
        counted = monotonic()
        until = counted + max(_COUNT_SECONDS, _COUNT_SHARE * (counted - begun))
        for trashed, size, refused in _trash_lots(context, lots, until):
            self.trashed_items += trashed
            self.trashed_bytes += size
            self.refused += refused
        return self.trashed_items - before[0], self.refused - before[1]

    def _apply_plans(self, context: Context) -> int:
        """Trash what approved plans name, each replica with its proof."""
        planned = 0
        for plan_id in context.transact(lambda c: plans.approved_plans(c, context.clock())):
            lots = context.transact(
                partial(expiring.list_planned, plan_id=plan_id, size=_PLAN_BATCH)
            )
            for trashed, _, refused in _trash_lots(context, lots, plan_id=plan_id):
                self.refused += refused
                planned += trashed
            context.transact(partial(plans.note_applied, plan_id=plan_id, now=context.clock()))
        return planned

    def _check(self, context: Context) -> list[expiring.Lot]:
        """What is due, which breaks no limit, in lots: of more than the limit nothing is let go."""
        done = expiring.Due(self.trashed_items, self.trashed_bytes)
        limits = limits_of(context, self.max_items, self.max_bytes)
        enough = max(self.max_items + 1, _COUNTED)

        def look(c: Connection) -> tuple[list[expiring.Lot], tuple[plans.Stop, uuid.UUID] | None]:
            due, lots = expiring.list_due(c, context.clock(), _PLAN_BATCH, enough)
            return lots, _stop(c, context, limits, due, done) if due.replicas else None

        lots, stopped = context.transact(look)
        if stopped is not None:
            stop, plan_id = stopped
            raise BlastRadiusError(
                limit=stop.limit, value=stop.value, found=stop.found, plan=plan_id
            )
        return lots


def _trash_lots(
    context: Context,
    lots: Sequence[expiring.Lot],
    until: float = math.inf,
    plan_id: uuid.UUID | None = None,
) -> Iterator[tuple[int, int, int]]:
    """:func:`plan_batch` of each lot, some at once, that is begun before ``until``: of each lot how
    many replicas were trashed, of how many bytes, and how many were refused."""

    def take(lot: expiring.Lot) -> tuple[int, int, int]:
        if context.stop.is_set() or monotonic() > until:
            return 0, 0, 0
        work = partial(plan_batch, context=context, limit=_PLAN_BATCH, lot=lot, plan_id=plan_id)
        trashed, refused = context.transact(work)
        # not the proofs: they would be kept while a lot before waits for a lock
        return len(trashed), sum(proof.size for proof in trashed), len(refused)

    with ThreadPoolExecutor(_LOTS_AT_ONCE, "dlm-expiry") as pool:
        yield from pool.map(take, lots)


def limits_of(context: Context, max_items: int, max_bytes: int) -> plans.Limits:
    """The limits of a run: two of its own, the others from the settings."""
    settings = context.settings
    return plans.Limits(
        max_items,
        max_bytes,
        settings.max_delete_items_per_day,
        settings.max_delete_bytes_per_day,
        settings.max_delete_fraction,
        settings.delete_fraction_min_items,
    )


def _stop(
    connection: Connection,
    context: Context,
    limits: plans.Limits,
    due: expiring.Due,
    done: expiring.Due,
) -> tuple[plans.Stop, uuid.UUID] | None:
    """The limit that is reached and the plan that waits now; None if none is, or if another run
    has just put all that was due into a plan."""
    stop = plans.find_stop(connection, context.clock(), limits, due, done)
    if stop is None:
        return None
    plan_id = plans.propose_plan(
        connection,
        context.clock(),
        stop,
        actor=context.actor,
        approvals=context.settings.approvals,
        valid_for=timedelta(seconds=context.settings.plan_seconds),
    )
    return (stop, plan_id) if plan_id else None


def stop_on_errors(context: Context, report: Report) -> None:
    """End a run in which too many deletions fail: something is wrong that more will not mend.

    Raises
    ------
    TooManyErrorsError
        if more than ``max_delete_error_fraction`` of at least 50 failed, tried again or for good.
    """
    # refusals and cancellations (DLM-5xx) are the DLM's own decisions, no failures
    causes = Counter(
        {
            code: count
            for code, count in (report.failed + report.retried).items()
            if not code.startswith("DLM-5")
        }
    )
    failed = sum(causes.values())
    tried = failed + sum(report.done.values())
    if tried >= _ERRORS_OF and failed > context.settings.max_delete_error_fraction * tried:
        raise TooManyErrorsError(
            value=context.settings.max_delete_error_fraction,
            failed=failed,
            tried=tried,
            cause=causes.most_common(1)[0][0],
        )


def plan_batch(
    connection: Connection,
    context: Context,
    limit: int,
    lot: expiring.Lot | None = None,
    plan_id: uuid.UUID | None = None,
) -> tuple[list[Proof], list[Proof]]:
    """Expire items and trash due replicas in one transaction: (trashed, refused).

    Those that no plan names; of a ``lot`` only those that it names, and with it also of the plan
    ``plan_id``, as long as that is approved. Survivors are locked,
    certificates written, replicas marked and their file work queued together. A refusal puts the
    deletion off and asks replication for what is missing.
    """
    now = context.clock()
    if plan_id is not None and not plans.lock_approved(connection, plan_id, now):
        return [], []  # somebody took it back, or its time is over
    expiring.expire_items(connection, now, limit, lot, plan_id)
    proofs = catalogue.prove_expired(connection, now, limit, lot, plan_id)
    # what another worker trashed between the selection and the lock is no longer ours
    live = [p for p in proofs if p.state in ("READY", "SUSPECT", "CORRUPTED", "MISSING")]
    granted = [p for p in live if p.refusal is None]
    refused = [p for p in live if p.refusal is not None]
    if granted:
        trash(
            connection,
            granted,
            actor=context.actor,
            now=now,
            valid_for=_certificate(context),
            plan_id=plan_id,
        )
    if refused:
        _put_off(connection, refused, now, context.actor)
    return granted, refused


def trash(
    connection: Connection,
    proofs: Sequence[Proof],
    *,
    actor: str,
    now: datetime,
    valid_for: timedelta,
    plan_id: uuid.UUID | None = None,
) -> None:
    """Certify and mark replicas TRASHED, and queue the move of their bytes."""
    catalogue.certify(
        connection,
        [(p, "trash") for p in proofs],
        actor=actor,
        now=now,
        valid_for=valid_for,
        plan_id=plan_id,
    )
    catalogue.queue_trashing(connection, actor=actor, now=now, plan_id=plan_id)


def propose_expiry(context: Context, limit: int = 1000) -> list[Proof]:
    """What expiry would do now with its reasons, changing nothing (``dry_run``)."""

    def look(connection: Connection) -> list[Proof]:
        granted, refused = plan_batch(connection, context, limit)
        return [*granted, *refused]

    return context.rehearse(look)


def find_stop(context: Context, max_items: int, max_bytes: int) -> str | None:
    """Why a run with these limits of its own would trash nothing of what is due now, if so."""

    def look(connection: Connection) -> plans.Stop | None:
        enough = max(max_items + 1, _COUNTED)
        due = expiring.count_expiry_due(connection, context.clock(), enough)
        limits = limits_of(context, max_items, max_bytes)
        none = expiring.Due(0, 0)
        return (
            plans.find_stop(connection, context.clock(), limits, due, none)
            if due.replicas
            else None
        )

    stop: plans.Stop | None = context.transact(look)
    if stop is None:
        return None
    return f"by {stop.limit}={stop.value}: {stop.found}; all of it would wait as a plan"


def _certificate(context: Context) -> timedelta:
    return timedelta(seconds=context.settings.certificate_seconds)


def _look_first(
    connection: Connection, oids: Collection[uuid.UUID], now: datetime, actor: str
) -> None:
    """Have the copies read that are known from an old catalogue only."""
    if not oids:
        return
    queue.insert_operations(
        connection,
        [
            queue.NewOperation(OperationKind.VERIFY, oid, uid, catalogue.RECOVERED, now)
            for uid, oid in recovery.select_unproven(connection, oids)
        ],
        actor,
        now,
    )


def _put_off(connection: Connection, refused: Sequence[Proof], now: datetime, actor: str) -> None:
    catalogue.note_refusals(connection, refused)
    unproven = {p.uid for p in refused if (p.refusal or "").startswith(catalogue.RECOVERED)}
    held = [p.uid for p in refused if p.waits and p.uid not in unproven]
    others = [p.uid for p in refused if p.uid not in set(held)]
    for uids, delay in ((held, _REFUSED_HELD), (others, _REFUSED)):
        if uids:
            replicas.put_off_deletion(connection, uids, now, delay)
    _look_first(connection, {p.oid for p in refused if p.uid in unproven}, now, actor)
    replicas.put_evaluations(connection, [(oid, now, 0) for oid in {p.oid for p in refused}])
