"""Which copies an item still needs, and where they go: pure, every answer with its reason."""

from __future__ import annotations

import math
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from dlm_core.types import ItemState, Phase, ReplicaState, StorageMode

_LIVE = (ReplicaState.PENDING, ReplicaState.READY, ReplicaState.SUSPECT)
_REMAKABLE = (ReplicaState.CORRUPTED, ReplicaState.MISSING)
# what is READY on a storage that is being audited was read by the audit
_COUNTING_MODES = (
    StorageMode.READ_WRITE,
    StorageMode.READ_ONLY,
    StorageMode.OFFLINE,
    StorageMode.AUDITING,
)
_UNREADABLE = (
    StorageMode.OFFLINE,
    StorageMode.LOST,
    StorageMode.AUDITING,
    StorageMode.RETIRED,
)


@dataclass(frozen=True, slots=True)
class StorageView:
    """What the planner knows of a storage; ``free`` is bytes below the high watermark."""

    storage_id: uuid.UUID
    name: str
    location_id: uuid.UUID
    weight: int
    mode: str
    managed: bool
    storage_class: str
    free: float
    free_fraction: float


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What the planner knows of a replica; ``leaving`` from ``expires_at`` on."""

    uid: uuid.UUID
    storage_id: uuid.UUID
    state: str
    expires_at: datetime | None = None
    excluded_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ItemView:
    oid: uuid.UUID
    state: str
    size: int
    target_phase: str
    #: planned before without a mend, and no first look waits: suspect replicas do not count again
    waited: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to make on ``storage_id``; ``uid`` names the replica to make again, if one is."""

    oid: uuid.UUID
    storage_id: uuid.UUID
    size: int
    reason: str
    uid: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """``weight`` is what the verified replicas give now; ``shortfall`` says what is missing."""

    weight: int
    copies: tuple[Copy, ...] = ()
    shortfall: str | None = None
    item_state: str | None = None
    #: nothing that is under way will mend the shortfall: look again later
    impossible: bool = False
    #: no good copy is known: its lost ones are looked for again
    search: bool = False


class Space:
    """Free bytes by storage while a batch is planned, so that it cannot promise them twice."""

    def __init__(self, storages: Iterable[StorageView]) -> None:
        self._free = {storage.storage_id: storage.free for storage in storages}

    def fits(self, storage_id: uuid.UUID, size: int) -> bool:
        return self._free[storage_id] >= size

    def take(self, storage_id: uuid.UUID, size: int) -> None:
        self._free[storage_id] -= size


def weight_of(
    replicas: Iterable[ReplicaView], storages: Mapping[uuid.UUID, StorageView]
) -> dict[uuid.UUID, int]:
    """Best weight by location (DESIGN §2: an item's phase is their sum)."""
    best: dict[uuid.UUID, int] = {}
    for replica in replicas:
        storage = storages[replica.storage_id]
        best[storage.location_id] = max(best.get(storage.location_id, 0), storage.weight)
    return best


def is_leaving(replica: ReplicaView, storage: StorageView, now: datetime) -> bool:
    """True if the replica is not to be counted on: its time is over or its storage is drained."""
    expired = replica.expires_at is not None and replica.expires_at <= now
    return expired or storage.mode not in _COUNTING_MODES


def decide_copies(
    item: ItemView,
    replicas: Sequence[ReplicaView],
    storages: Mapping[uuid.UUID, StorageView],
    space: Space,
    now: datetime,
) -> Decision:
    """What ``item`` needs to reach its target phase with replicas that stay.

    Copies that are on their way count as expected, never as reached. A source must exist: without
    any READY replica on a storage that can be read there is nothing to copy, and an item of which
    no replica is READY, SUSPECT or on its way is CORRUPTED, once its lost ones were looked for.
    """
    ready = [r for r in replicas if r.state == ReplicaState.READY]
    staying = [r for r in ready if not is_leaving(r, storages[r.storage_id], now)]
    reached = sum(weight_of(ready, storages).values())
    kept = weight_of(staying, storages)
    target = Phase(item.target_phase)
    recovered = ItemState.READY if item.state == ItemState.CORRUPTED and ready else None
    if sum(kept.values()) >= target.weight:
        return Decision(reached, item_state=recovered)
    if not ready:
        return _without_source(item, replicas)
    if all(storages[r.storage_id].mode in _UNREADABLE for r in ready):
        return Decision(reached, (), "its good copies cannot be read now", recovered, True)
    if _second_look_may_do(item, replicas, staying, storages, now):
        text = "a suspect copy waits for its second look"
        return Decision(reached, (), text, recovered, True)
    pending = [r for r in replicas if r.state == ReplicaState.PENDING]
    coming = [r for r in pending if not is_leaving(r, storages[r.storage_id], now)]
    best = weight_of([*staying, *coming], storages)
    copies = _choose(item, replicas, storages, space, best, now)
    expected = sum(best.values())
    have = Phase.from_weight(sum(kept.values()))
    if expected >= target.weight:
        text = f"{have} of {target}; {len(coming) + len(copies)} copies on their way"
        return Decision(reached, tuple(copies), text, recovered)
    why = _why_not(item, replicas, storages, space, best, now)
    return Decision(
        reached, tuple(copies), f"{have} of {target}; impossible now: {why}", recovered, True
    )


def _second_look_may_do(
    item: ItemView,
    replicas: Sequence[ReplicaView],
    staying: Sequence[ReplicaView],
    storages: Mapping[uuid.UUID, StorageView],
    now: datetime,
) -> bool:
    """True if the target is reached once suspect replicas turn out good; asked until a look was
    tried, so that one that cannot be taken does not keep a copy from being made. An audit is waited
    for: it has an end, and would else set off as many copies as the storage holds."""
    suspect = [
        r
        for r in replicas
        if r.state == ReplicaState.SUSPECT
        and not is_leaving(r, storages[r.storage_id], now)
        and not (item.waited and storages[r.storage_id].mode != StorageMode.AUDITING)
    ]
    with_suspects = weight_of([*staying, *suspect], storages)
    return bool(suspect) and sum(with_suspects.values()) >= Phase(item.target_phase).weight


def _without_source(item: ItemView, replicas: Sequence[ReplicaView]) -> Decision:
    states = {r.state for r in replicas}
    if ReplicaState.SUSPECT in states:
        return Decision(0, shortfall="no verified copy; a suspect one waits for its second look")
    if ReplicaState.PENDING in states:
        return Decision(0, shortfall="no verified copy; one is announced or being copied")
    if ReplicaState.CORRUPTED in states and item.state == ItemState.READY and not item.waited:
        # the storage may have read good bytes wrongly: nothing is called lost before another look
        text = "no good copy is known; what was set aside is looked at again"
        return Decision(0, shortfall=text, impossible=True, search=True)
    lost = ItemState.CORRUPTED if item.state == ItemState.READY else None
    return Decision(
        0, shortfall="no good copy is known", item_state=lost, impossible=True, search=True
    )


def _choose(
    item: ItemView,
    replicas: Sequence[ReplicaView],
    storages: Mapping[uuid.UUID, StorageView],
    space: Space,
    best: dict[uuid.UUID, int],
    now: datetime,
) -> list[Copy]:
    """Pick storages greedily, fewest copies first; ``best`` grows with what is picked."""
    target = Phase(item.target_phase)
    by_storage = {r.storage_id: r for r in replicas if r.state in _REMAKABLE}
    copies: list[Copy] = []
    while (need := target.weight - sum(best.values())) > 0:
        options = [
            storage
            for storage in storages.values()
            if _refusal(item, storage, replicas, space, now) is None
            and storage.storage_id not in {copy.storage_id for copy in copies}
            and storage.weight > best.get(storage.location_id, 0)
        ]
        if not options:
            break
        pick = max(
            options,
            key=lambda s: (
                min(s.weight - best.get(s.location_id, 0), need),
                s.storage_id in by_storage,  # damage is mended in its place
                _rendezvous(item.oid, s),
            ),
        )
        again = by_storage.get(pick.storage_id)
        verb = f"made again, it was {again.state}" if again else f"for {target}"
        copies.append(
            Copy(
                item.oid,
                pick.storage_id,
                item.size,
                f"copy to {pick.name} ({Phase.from_weight(pick.weight)}) {verb}",
                again.uid if again else None,
            )
        )
        space.take(pick.storage_id, item.size)
        best[pick.location_id] = max(best.get(pick.location_id, 0), pick.weight)
    return copies


def _refusal(
    item: ItemView,
    storage: StorageView,
    replicas: Sequence[ReplicaView],
    space: Space,
    now: datetime,
) -> str | None:
    """Why ``storage`` cannot take a copy of ``item``, or None."""
    if storage.mode != StorageMode.READ_WRITE:
        return storage.mode
    if not storage.managed:
        return "not managed"
    for replica in replicas:
        if replica.storage_id != storage.storage_id:
            continue
        if replica.state in _LIVE:
            return "has a copy already"
        if replica.excluded_until is not None and replica.excluded_until > now:
            return f"failed, not before {replica.excluded_until:%Y-%m-%d %H:%M}"
    if not space.fits(storage.storage_id, item.size):
        return "no space below its high watermark"
    return None


def _why_not(
    item: ItemView,
    replicas: Sequence[ReplicaView],
    storages: Mapping[uuid.UUID, StorageView],
    space: Space,
    best: Mapping[uuid.UUID, int],
    now: datetime,
) -> str:
    reasons = []
    for storage in sorted(storages.values(), key=lambda s: s.name):
        if storage.mode in (StorageMode.RETIRED, StorageMode.LOST):
            continue
        refusal = _refusal(item, storage, replicas, space, now)
        if refusal is None and storage.weight <= best.get(storage.location_id, 0):
            refusal = "its location has a copy as good"
        reasons.append(f"{storage.name}: {refusal or 'adds too little'}")
    return "; ".join(reasons) or "there is no storage"


def _rendezvous(oid: uuid.UUID, storage: StorageView) -> float:
    """Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): spreads by free space, and
    the same item goes to the same storage again."""
    draw = (zlib.crc32(oid.bytes + storage.storage_id.bytes) + 0.5) / 2**32
    return -max(storage.free_fraction, 1e-6) / math.log(draw)
