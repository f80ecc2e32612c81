"""Scheduled verification: plan what is to be read again, the riskiest first, within the budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import accumulate, takewhile

from sqlalchemy import Connection

from dlm_core.catalogue import checks
from dlm_core.catalogue import operations as queue
from dlm_core.lifecycle.work import Context
from dlm_core.types import OperationKind

#: why a scheduled check was queued; what was asked for in words is always read
SCHEDULED = "its check is due"
#: why all of a storage that came back is read
AUDIT = "its storage is back and is audited"
#: a helping is about as much as is read in this time, so that a crash loses little
_HELPING_SECONDS = 600
_CLASSES = ("disk", "object", "tape")


def plan_verification(context: Context) -> int:
    """Queue what is due to be read again on each storage, a helping of it; how many replicas.

    Those with the fewest good copies come first, then those on cheap media, then those looked at
    longest ago. What a storage may read on a day is never exceeded but by a payload that is larger
    than that by itself. Looks at doubted copies that FAILED a while ago are queued again too.
    """
    planned: int = context.transact(lambda c: _plan(c, context))
    return planned


def propose_verification(context: Context) -> list[checks.Check]:
    """What would be read again next, changing nothing (``dry_run``)."""

    def look(connection: Connection) -> list[checks.Check]:
        return [check for _, chosen in _choose(connection, context) for check in chosen]

    found: list[checks.Check] = context.rehearse(look)
    return found


def _plan(connection: Connection, context: Context) -> int:
    now = context.clock()
    count = checks.look_again(connection, now)
    checks.put_off(connection, now)
    for budget, chosen in _choose(connection, context):
        # what is due does not fit into the rest of the day: the day is over, so that nobody asks
        size = sum(c.size for c in chosen) if chosen else budget.left or 0
        checks.spend(connection, budget.storage_id, now, size)
        count += _queue(connection, context, budget, chosen, now)
    return count


def _choose(
    connection: Connection, context: Context
) -> Iterator[tuple[checks.Budget, list[checks.Check]]]:
    now = context.clock()
    for budget in checks.lock_budgets(connection, now):
        if budget.left == 0:
            continue
        due = checks.select_checks(connection, budget, now, context.settings.batch_size)
        if due:
            yield budget, within_budget(due, budget)


def within_budget(due: Sequence[checks.Check], budget: checks.Budget) -> list[checks.Check]:
    """The first of ``due`` that the rest of the day's budget and one helping allow.

    Nothing is passed over for being large, else it would never be read: it waits for a day of which
    nothing was used yet, and then goes even if it is larger than the whole day's.
    """
    helping = budget.per_second * _HELPING_SECONDS if budget.per_second else None
    totals = list(accumulate(check.size for check in due))
    fits = len(list(takewhile(lambda n: budget.left is None or n <= budget.left, totals)))
    if fits == 0 and budget.fresh and due:
        return [due[0]]
    if helping is not None:
        fits = min(fits, max(1, len(list(takewhile(lambda n: n <= helping, totals)))))
    return list(due[:fits])


def _queue(
    connection: Connection,
    context: Context,
    budget: checks.Budget,
    chosen: Sequence[checks.Check],
    now: datetime,
) -> int:
    rank = _CLASSES.index(budget.storage_class)
    return queue.insert_operations(
        connection,
        [
            queue.NewOperation(
                OperationKind.VERIFY,
                check.oid,
                check.uid,
                SCHEDULED,
                now,
                # after what was asked for (0) and second looks (-1)
                priority=1 + min(check.copies, 9) * len(_CLASSES) + rank,
            )
            for check in chosen
        ],
        context.actor,
        now,
    )
