"""Rebalancing: choose what leaves a storage that is too full or being drained.

Leaving is only a mark: the replica's time is over. Replication stops counting it and makes the
copy that is missing then; expiry deletes it with proof. So no way of freeing space has safety
rules of its own, and a move is a copy that is verified before the source may go.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import capacity as catalogue
from dlm_core.catalogue import replicas
from dlm_core.errors import StorageError
from dlm_core.lifecycle.decide import ItemView, ReplicaView, Space, StorageView, decide_copies
from dlm_core.lifecycle.replicate import storage_views
from dlm_core.lifecycle.work import Context
from dlm_core.types import ItemState

_BATCH = 2000
#: a storage without a given capacity is asked for it this often
ASK_AGAIN = timedelta(minutes=10)
#: what a storage told is kept for so long though it tells nothing any more
_KEPT = timedelta(days=1)
#: what nothing can leave is looked through again after this, or so many times as long as it took
_STUCK, _SHARE = timedelta(minutes=5), 10


@dataclass(frozen=True, slots=True)
class Leaving:
    """One replica proposed to leave a storage, and why."""

    uid: uuid.UUID
    oid: uuid.UUID
    size: int
    storage: str
    reason: str


def plan_rebalance(context: Context) -> int:
    """Mark what has to leave; returns how many replicas were marked."""
    observe_usage(context)
    due = _to_relieve(context)
    if any(storage["told"] for storage in due):
        # what they told earlier counts what was purged since: it would leave once more
        observe_usage(context, {storage["storage_id"] for storage in due})
        due = _to_relieve(context)
    return sum(
        len(page) for storage in due for page in _relieve(context, storage, context.transact)
    )


def _to_relieve(context: Context) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = context.transact(
        lambda c: catalogue.storages_to_relieve(c, context.clock())
    )
    return found


def propose_rebalance(context: Context) -> list[Leaving]:
    """What :func:`plan_rebalance` would mark now, changing nothing (``dry_run``)."""

    def look(connection: Connection) -> list[Leaving]:
        due = catalogue.storages_to_relieve(connection, context.clock())
        return [
            one
            for storage in due
            for page in _relieve(context, storage, lambda work: work(connection))
            for one in page
        ]

    return context.rehearse(look)


def observe_usage(context: Context, these: Collection[uuid.UUID] | None = None) -> None:
    """Ask storages without a given capacity how full they are, at most every ten minutes each; or
    ``these`` at once.

    What gives no answer though it told before is asked again after that time, and nothing leaves
    it meanwhile; what it told is kept for a day, or it would be taken as having room.
    """
    now = context.clock()
    before = now - ASK_AGAIN if these is None else now
    found = context.transact(lambda c: catalogue.storages_to_observe(c, before))
    # later than what was found: each of them is known
    known = context.transact(context.storages.load) if found else {}
    for row in found:
        if these is not None and row["storage_id"] not in these:
            continue
        key, usage = row["storage_id"], None
        try:
            usage = context.storages.open(known[key]).usage()
            told = usage is not None or _is_old(row, now)
        except StorageError:
            told = False  # an outage is told where the storage is used; nothing is known here
        if usage is not None and (usage.total < 0 or usage.used < 0):
            usage, told = None, _is_old(row, now)  # no number of bytes
        if not told:
            again = now + ASK_AGAIN
            context.transact(partial(catalogue.put_off_rebalance, storage_id=key, until=again))
            continue
        total, used = (usage.total, usage.used) if usage else (None, None)
        context.transact(
            partial(catalogue.note_usage, storage_id=key, total=total, used=used, now=now)
        )


def _is_old(row: Mapping[str, Any], now: datetime) -> bool:
    """Whether a storage has told nothing that is to be kept."""
    return row["observed_total_bytes"] is None or row["observed_at"] < now - _KEPT


def _relieve(
    context: Context, storage: Mapping[str, Any], transact: Callable[[Callable[..., Any]], Any]
) -> Iterator[list[Leaving]]:
    """Mark what leaves a storage, page by page, each by a transaction: of one that is drained one
    page of all that is there; else past what cannot leave, until enough does or all was seen."""
    if storage["undrained"]:
        yield transact(partial(_drain, context=context, storage=storage))
        return
    to_free, began = storage["to_free"], monotonic()
    last: Mapping[str, Any] | None = None
    while to_free > 0 and not context.stop.is_set():
        asked = {**storage, "to_free": to_free}
        page, last = transact(partial(_make_room, context=context, storage=asked, after=last))
        to_free -= sum(one.size for one in page)
        yield page
        if last is None:
            break
    else:
        return
    if to_free == storage["to_free"]:
        again = context.clock() + max(_STUCK, _SHARE * timedelta(seconds=monotonic() - began))
        transact(lambda c: catalogue.put_off_rebalance(c, storage["storage_id"], again))


def _drain(connection: Connection, context: Context, storage: Mapping[str, Any]) -> list[Leaving]:
    now = context.clock()
    if not catalogue.lock_draining(connection, storage["storage_id"]):
        return []  # the drain was called off since: what is marked now would leave all the same
    candidates = replicas.select_unmarked(connection, storage["storage_id"], _BATCH)
    candidates += replicas.select_staying(connection, storage["storage_id"], now, _BATCH)
    reason = f"drain: storage {storage['name']} is being drained"
    leaving = [
        Leaving(row["uid"], row["oid"], row["size"], storage["name"], reason) for row in candidates
    ]
    _mark(connection, leaving, now)
    return leaving


def _make_room(
    connection: Connection,
    context: Context,
    storage: Mapping[str, Any],
    after: Mapping[str, Any] | None,
) -> tuple[list[Leaving], Mapping[str, Any] | None]:
    """What may leave of the candidates that follow ``after``, and the last one that was looked at;
    None if none follows."""
    now = context.clock()
    candidates = replicas.select_unmarked(connection, storage["storage_id"], _BATCH, after)
    leaving = _choose(connection, context, storage, candidates, now)
    _mark(connection, leaving, now)
    return leaving, candidates[-1] if len(candidates) == _BATCH else None


def _mark(connection: Connection, leaving: Sequence[Leaving], now: datetime) -> None:
    for reason, uids in _by_reason(leaving).items():
        replicas.mark_leaving(connection, uids, reason, now)


def _by_reason(leaving: Sequence[Leaving]) -> dict[str, list[uuid.UUID]]:
    grouped: dict[str, list[uuid.UUID]] = defaultdict(list)
    for one in leaving:
        grouped[one.reason].append(one.uid)
    return grouped


def _choose(
    connection: Connection,
    context: Context,
    storage: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    now: datetime,
) -> list[Leaving]:
    """Longest there first, and of those surplus copies before those to be made elsewhere."""
    oids = [row["oid"] for row in candidates]
    items = {row["oid"]: row for row in replicas.lock_items(connection, oids)}
    by_item: dict[uuid.UUID, list[ReplicaView]] = defaultdict(list)
    for row in replicas.replicas_of(connection, oids):
        by_item[row["oid"]].append(
            ReplicaView(
                row["uid"], row["storage_id"], row["state"], row["expires_at"],
                row["excluded_until"],
            )
        )  # fmt: skip
    views = storage_views(context.storages.load(connection).values())
    space = Space(views.values())
    why = f"rebalance: storage {storage['name']} is above {storage['high_watermark']:.0%}"
    surplus: list[Leaving] = []
    moves: list[Leaving] = []
    for candidate in candidates:
        item = items[candidate["oid"]]
        if item["state"] != ItemState.READY:
            continue
        uid, oid = candidate["uid"], candidate["oid"]
        verdict = _without(item, by_item[oid], uid, views, space, now)
        if verdict is not None:
            one = Leaving(uid, oid, candidate["size"], storage["name"], f"{why}; {verdict}")
            (surplus if verdict == "surplus" else moves).append(one)
        if sum(o.size for o in surplus) >= storage["to_free"]:
            break
    return _enough([*surplus, *moves], storage["to_free"])


def _without(
    item: Mapping[str, Any],
    known: Sequence[ReplicaView],
    uid: uuid.UUID,
    views: Mapping[uuid.UUID, StorageView],
    space: Space,
    now: datetime,
) -> str | None:
    """'surplus' or 'moved' if the item can do without the replica, else None."""
    assumed = [replace(r, expires_at=now) if r.uid == uid else r for r in known]
    decision = decide_copies(
        ItemView(item["oid"], item["state"], item["size"], item["target_phase"]),
        assumed,
        views,
        space,
        now,
    )
    if decision.shortfall is None:
        return "surplus"
    if decision.copies and not decision.impossible:
        return "moved"
    return None


def _enough(ordered: Sequence[Leaving], to_free: int) -> list[Leaving]:
    """The first of ``ordered`` whose bytes reach ``to_free``."""
    chosen, freed = [], 0
    for one in ordered:
        if freed >= to_free:
            break
        chosen.append(one)
        freed += one.size
    return chosen
