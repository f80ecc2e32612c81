"""Verification: read replicas again and believe only what was read."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import checks, recovery
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas as catalogue
from dlm_core.catalogue.urgency import STEP, Urgency
from dlm_core.errors import (
    AccessDeniedError,
    DlmError,
    IntegrityError,
    PayloadNotFoundError,
    StorageError,
)
from dlm_core.lifecycle.check import AUDIT, SCHEDULED
from dlm_core.lifecycle.quarantine import (
    bring_back,
    find_good,
    is_aside,
    list_aside,
    set_aside,
)
from dlm_core.lifecycle.staging import (
    Wanted,
    believed,
    files_below,
    files_of,
    hold_back,
    is_cold,
)
from dlm_core.lifecycle.survivors import content_stamp, look_again
from dlm_core.lifecycle.traffic import looking_at, reading_from
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error, put_off
from dlm_core.storages.mark import must_show_something
from dlm_core.storages.port import Storage
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.pooled import TINY, Turns, near
from dlm_core.transfers.reading import Interrupted
from dlm_core.transfers.throttle import Pace
from dlm_core.types import (
    Observation,
    OperationKind,
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    decode_path,
)

_READABLE = ("read_write", "read_only", "draining", "auditing")
#: a verdict beside the states: the storage said what it said before
_TOLD = "TOLD"
#: after so many intervals a replica is read whatever its storage says
_READ_EVERY = 4
#: its bytes are not known to be in its place
_LOST = (ReplicaState.MISSING, ReplicaState.CORRUPTED)
_CHECKABLE = (ReplicaState.READY, ReplicaState.SUSPECT, *_LOST)


def request_verification(
    connection: Connection,
    *,
    actor: str,
    now: datetime,
    storage_id: uuid.UUID | None = None,
    oid: uuid.UUID | None = None,
    oids: Sequence[uuid.UUID] | None = None,
    reason: str = "asked for",
    priority: int = 0,
) -> int:
    """Queue a look at every replica of an item, on a storage, or both narrowed; how many.

    ``oids`` names several items. Those that are CORRUPTED are looked for in quarantine. Replicas
    that wait for a look already are not queued twice; one that was put off comes now. With nothing
    given, all replicas. ``priority`` is from -9 (first) to 9 (last).

    Raises
    ------
    InvalidValueError
    """
    chosen = STEP * Urgency(priority).priority
    items = oids if oids is not None else [oid] if oid else None
    found = checks.select_unasked(connection, storage_id, items)
    put_off = checks.select_put_off(connection, storage_id, items, now)
    return checks.hasten_looks(connection, put_off, now) + queue.insert_operations(
        connection,
        [
            queue.NewOperation(
                OperationKind.VERIFY, row["oid"], row["uid"], reason, now, priority=chosen
            )
            for row in found
        ],
        actor,
        now,
    )


#: looks that are written together, and the seconds after which fewer will do
_MOST, _SOON = 512, 10.0
_GROUP = 32
_GROUP_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at one replica found: an observation, or the error that prevented it."""

    operation_id: uuid.UUID
    uid: uuid.UUID
    observation: Observation | None
    error: DlmError | None
    seconds: float
    #: what the storage said of the content just before it was read
    stamp: str | None = None
    #: that is what it said when it was last read, and nothing was read this time
    told: bool = False
    #: the row that was looked at
    target: Mapping[str, Any] = field(default_factory=dict)


#: a look, the state that it proves ('' for none), and the error to show
Verdict = tuple[Look, str, DlmError | None]


def look_at(
    storage: Storage, targets: Sequence[Mapping[str, Any]], context: Context
) -> Iterator[Look]:
    """Read payloads on one storage with its concurrency; nothing more once ``stop`` is set.

    ``targets`` are rows with operation_id, uid, storage_id, size, path (as catalogued) and kind.
    Where they say ``tellable``, the storage's stamp is noted; if that is true and the stamp is
    still told_stamp, the payload is not read.
    """

    def read(target: Mapping[str, Any]) -> Look | None:
        if context.stop.is_set():
            return None
        begun = time.monotonic()
        seen, failure, stamp, told = None, None, None, False
        try:
            kind = PayloadKind(target["kind"])
            if "tellable" in target:
                stamp = _stamp(storage, target)
                told = target["tellable"] and stamp is not None and stamp == target["told_stamp"]
            if not told:
                with looking_at(context, storage, target) as paced:
                    seen = observe(paced, decode_path(target["path"]), kind, context.stop)
        except DlmError as error:
            failure = error
        except Interrupted:
            return None
        if context.stop.is_set():
            return None
        took = time.monotonic() - begun
        return Look(target["operation_id"], target["uid"], seen, failure, took, stamp, told, target)

    turns = Turns(storage.concurrency)

    def read_together(group: Sequence[Mapping[str, Any]]) -> list[Look]:
        tiny = near(storage) and all((target["size"] or 0) <= TINY for target in group)
        with turns.one() if tiny else nullcontext():
            return [look for target in group if (look := read(target)) is not None]

    with ThreadPoolExecutor(storage.concurrency, "dlm-look") as pool:
        for looks in pool.map(read_together, _groups(targets, storage.concurrency)):
            yield from looks


def wanted_files(
    context: Context, storage: Storage, targets: Sequence[Mapping[str, Any]]
) -> dict[uuid.UUID, list[str]]:
    """Of a cold storage, the files that a look at each target may have to read, by operation: those
    of its payload, and what was set aside of it."""
    if not is_cold(storage):
        return {}
    files = files_of(context, storage, targets)
    try:
        aside = list_aside(storage, {str(row["uid"]) for row in targets})
    except StorageError:
        return files  # an outage: the looks will tell
    for row in targets:
        for place in aside.get(str(row["uid"]), ()):
            files[row["operation_id"]] += files_below(storage, place)
    return files


def look_when_online(
    context: Context,
    storage: Storage,
    storage_id: uuid.UUID,
    targets: Sequence[Mapping[str, Any]],
    files: Mapping[uuid.UUID, Sequence[str]],
    anew: Collection[uuid.UUID] = (),
) -> Iterator[Look]:
    """As :func:`look_at`; of a cold storage those whose ``files`` are offline come back at once,
    with that error, and are asked for together."""
    wanted = [Wanted(key, paths, key in anew) for key, paths in files.items()]
    held = hold_back(context, storage, storage_id, wanted)
    for row in targets:
        if (error := held.get(row["operation_id"])) is not None:
            yield Look(row["operation_id"], row["uid"], None, error, 0.0, target=row)
    yield from look_at(storage, [r for r in targets if r["operation_id"] not in held], context)


def _groups(
    targets: Sequence[Mapping[str, Any]], threads: int
) -> Iterator[list[Mapping[str, Any]]]:
    """Small payloads together: handing one to a thread costs as much as reading it."""
    most = min(_GROUP, -(-len(targets) // threads))
    group: list[Mapping[str, Any]] = []
    size = 0
    for target in targets:
        group.append(target)
        size += target["size"] or 0
        if len(group) >= most or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _stamp(storage: Storage, target: Mapping[str, Any]) -> str | None:
    """What the storage says of a file's content without its being read; None if it says nothing."""
    if not getattr(storage, "tells_content", False) or target["kind"] != PayloadKind.FILE:
        return None
    entry = storage.stat(decode_path(target["path"]))
    return None if entry is None else content_stamp(entry)


def execute_verify(context: Context, claim: Claim) -> Report:
    """Verify the replicas of a claim.

    The same bytes: READY, checked now. Others: SUSPECT at first, with a second look queued; when
    that differs too the bytes are set aside under a visible name and the replica is CORRUPTED.
    Nothing there, said by a storage that is well: MISSING. What is MISSING or CORRUPTED is looked
    for in quarantine too and brought back from there; other bytes in its place are taken for
    somebody else's. An outage proves nothing.

    Scheduled checks ask a storage that can tell the content first: if it says what it said when the
    bytes were last read, they are read another time, unless this is the last good copy. All is
    read at the pace that the storage allows, which the drainers share.
    """
    report = Report()
    operations = {op["operation_id"]: op for op in claim.operations}
    storages = context.transact(context.storages.load)
    details = context.transact(
        lambda c: catalogue.replica_details(c, [op["uid"] for op in claim.operations])
    )
    tellable = _tellable(context, claim)
    groups: dict[uuid.UUID, list[dict[str, Any]]] = defaultdict(list)
    for operation in claim.operations:
        row = dict(details[operation["uid"]], operation_id=operation["operation_id"])
        row["tellable"] = operation["uid"] in tellable
        # suspect by what befell its storage, not by a look: one that differs is its first
        details[operation["uid"]]["unread"] = operation["reason"] == AUDIT
        if row["state"] in _CHECKABLE and storages[row["storage_id"]]["mode"] in _READABLE:
            groups[row["storage_id"]].append(row)
    for storage_id, targets in groups.items():
        writable = storages[storage_id]["managed"] and storages[storage_id]["mode"] != "read_only"
        anew = {row["operation_id"] for row in targets if row["state"] == ReplicaState.SUSPECT}
        with reading_from(
            context, storages[storage_id], *_budget(context, storages[storage_id])
        ) as storage:
            files = wanted_files(context, storage, targets)
            looks = look_when_online(context, storage, storage_id, targets, files, anew)
            for batch in _batches(looks, _MOST):
                _judge(context, claim, operations, details, batch, storage, writable, files, report)
    looked_at = {t["operation_id"] for targets in groups.values() for t in targets}
    waived = [
        _not_looked_at(context, op, details[op["uid"]], storages)
        for op in claim.operations
        if op["operation_id"] not in looked_at
    ]
    context.transact(lambda c: queue.finish_operations(c, claim.token, waived, context.clock()))
    return report


def _not_looked_at(
    context: Context,
    operation: Mapping[str, Any],
    row: Mapping[str, Any],
    storages: Mapping[uuid.UUID, Mapping[str, Any]],
) -> queue.Outcome:
    """There is nothing to read; but a doubt is not over because its storage is away."""
    storage = storages[row["storage_id"]]
    if row["state"] == ReplicaState.SUSPECT and storage["mode"] == StorageMode.OFFLINE:
        return put_off(context, operation, storage)
    text = "nothing to verify any more"
    return queue.Outcome(operation["operation_id"], OperationState.CANCELLED, "DLM-503", text)


def _tellable(context: Context, claim: Claim) -> set[uuid.UUID]:
    scheduled = [op["uid"] for op in claim.operations if op["reason"] == SCHEDULED]
    if not scheduled:
        return set()
    found: set[uuid.UUID] = context.transact(
        lambda c: checks.select_tellable(c, scheduled, context.clock(), _READ_EVERY)
    )
    return found


def _budget(context: Context, row: Mapping[str, Any]) -> list[Pace]:
    """The pace of all verification on a storage, beside the limit of everything there."""
    rate = row["verify_bytes_per_second"]
    # each drainer has its share: none knows of the others
    return [Pace(rate / context.settings.max_drainers, context.stop)] if rate else []


def _batches(looks: Iterator[Look], size: int) -> Iterator[list[Look]]:
    """``size`` looks together, fewer where they take long: what is written is then not much older
    than it says."""
    batch: list[Look] = []
    begun = time.monotonic()
    for look in looks:
        batch.append(look)
        if len(batch) >= size or time.monotonic() - begun >= _SOON:
            yield batch
            batch = []
            begun = time.monotonic()
    if batch:
        yield batch


def _judge(
    context: Context,
    claim: Claim,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    details: Mapping[uuid.UUID, Mapping[str, Any]],
    looks: Sequence[Look],
    storage: Storage,
    writable: bool,
    files: Mapping[uuid.UUID, Sequence[str]],
    report: Report,
) -> None:
    """Set damaged bytes aside, then write what was found in one transaction.

    After a recovery other bytes may be a newer payload's that the old catalogue does not know:
    until a person has confirmed it, they stay where they are.
    """
    floor = context.transact(recovery.unconfirmed_floor)
    verdicts: list[tuple[Look, str, DlmError | None]] = []
    for look in looks:
        verdict, error = _verdict(look, details[look.uid])
        if verdict == ReplicaState.MISSING:
            verdict, error = _unless_aside(look, verdict, error, storage, writable)
        if isinstance(error, IntegrityError) and look.operation_id in files:
            error = believed(storage, files[look.operation_id], error)
            # of a stub that was read nothing is known
            verdict = verdict if isinstance(error, IntegrityError) else ""
        if verdict == ReplicaState.CORRUPTED and recovery.is_unproven(details[look.uid], floor):
            verdict = ""
        verdicts.append((look, verdict, error))
    damaged = [
        (look.operation_id, look.uid)
        for look, verdict, _ in verdicts
        if verdict == ReplicaState.CORRUPTED and details[look.uid]["state"] not in _LOST
    ]
    if damaged and writable:
        failed = context.transact(lambda c: set_aside(c, claim, details, damaged, storage))
        verdicts = [
            (look, ReplicaState.SUSPECT, failed[look.uid])
            if failed.get(look.uid)
            else (look, verdict, error)
            for look, verdict, error in verdicts
        ]
    if writable:
        verdicts = _rescued(context, claim, details, verdicts, storage)
    outcomes = context.transact(lambda c: _write(c, context, claim, operations, details, verdicts))
    for look, outcome in outcomes:
        size = look.observation.size if look.observation else 0
        report.note(operations[look.operation_id], outcome, size, look.seconds)


def _verdict(look: Look, row: Mapping[str, Any]) -> tuple[str, DlmError | None]:
    """The state that a look proves, '' for none, and the error to show."""
    if look.told:
        return _TOLD, None
    if isinstance(look.error, PayloadNotFoundError):
        lost = row["state"] if row["state"] in _LOST else ReplicaState.MISSING
        return lost, look.error
    if look.observation is None:
        return "", look.error
    if (look.observation.digest, look.observation.size) == (row["item_digest"], row["item_size"]):
        return ReplicaState.READY, None
    error = IntegrityError(
        where=row["path"],
        expected=f"{row['item_digest']} ({row['item_size']} bytes)",
        found=f"{look.observation.digest} ({look.observation.size} bytes)",
    )
    if row["state"] in _LOST:
        # its own bytes are not known to be there: what is in its place may be anybody's
        return row["state"], error
    second = row["state"] == ReplicaState.SUSPECT and not row["unread"]
    return (ReplicaState.CORRUPTED if second else ReplicaState.SUSPECT), error


def _unless_aside(
    look: Look, verdict: str, error: DlmError | None, storage: Storage, writable: bool
) -> tuple[str, DlmError | None]:
    """Nothing is in its place: CORRUPTED, if this operation has moved it away in a try that ended
    before it could say so; and not known, if nothing of ours is there at all."""
    try:
        if writable:
            must_show_something(storage)
        aside = is_aside(storage, look.operation_id, look.uid)
    except StorageError as failure:
        return "", failure
    return (ReplicaState.CORRUPTED if aside else verdict), error


def _rescued(
    context: Context,
    claim: Claim,
    details: Mapping[uuid.UUID, Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    storage: Storage,
) -> list[Verdict]:
    """The verdicts after a look into quarantine for what is not in its place."""
    lost = {look.uid: look for look, verdict, _ in verdicts if verdict in _LOST}
    try:
        good = find_good(storage, [details[uid] for uid in lost]) if lost else {}
    except StorageError as error:
        # whether anything is lost cannot be told now
        return [(v[0], "", error) if v[0].uid in lost else v for v in verdicts]
    if not good:
        return list(verdicts)
    found = {(lost[uid].operation_id, uid): path for uid, path in good.items()}
    back = context.transact(lambda c: bring_back(c, claim, details, found, storage))
    try:
        storage.flush()
    except StorageError as error:
        # they may be back; the next look will tell
        return [(v[0], "", error) if v[0].uid in back else v for v in verdicts]
    return [
        _seen_again(v, back[v[0].uid], details[v[0].uid], storage) if v[0].uid in back else v
        for v in verdicts
    ]


def _seen_again(
    verdict: Verdict, error: StorageError | None, row: Mapping[str, Any], storage: Storage
) -> Verdict:
    """What is said of a copy that came back from quarantine, or did not: its bytes tell."""
    if error is not None:
        return verdict[0], verdict[1], error
    try:
        seen = observe(storage, decode_path(row["path"]), PayloadKind(row["kind"]))
    except DlmError as failure:
        return verdict[0], ReplicaState.SUSPECT, failure
    look = replace(verdict[0], observation=seen, error=None)
    state, reason = _verdict(look, row)
    return look, state if state == ReplicaState.READY else ReplicaState.SUSPECT, reason


def _write(
    connection: Connection,
    context: Context,
    claim: Claim,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    details: Mapping[uuid.UUID, Mapping[str, Any]],
    verdicts: Sequence[Verdict],
) -> list[tuple[Look, queue.Outcome]]:
    now = context.clock()
    held = queue.lock_claimed(connection, claim.token, [v[0].operation_id for v in verdicts])
    mine = [v for v in verdicts if v[0].operation_id in held]
    by_state: dict[str, list[uuid.UUID]] = defaultdict(list)
    for look, verdict, _ in mine:
        by_state[verdict].append(look.uid)
    returned = [u for u in by_state[ReplicaState.READY] if details[u]["state"] in _LOST]
    _mark(connection, returned, ReplicaState.SUSPECT, _LOST)
    _mark(
        connection,
        by_state[ReplicaState.SUSPECT],
        ReplicaState.SUSPECT,
        [ReplicaState.READY, *_LOST],
    )
    _mark(
        connection, by_state[ReplicaState.CORRUPTED], ReplicaState.CORRUPTED, [ReplicaState.SUSPECT]
    )
    _mark(
        connection,
        by_state[ReplicaState.MISSING],
        ReplicaState.MISSING,
        [ReplicaState.READY, ReplicaState.SUSPECT],
    )
    good = [
        catalogue.Seen(look.uid, look.observation.size, look.observation.digest)
        for look, verdict, _ in mine
        if verdict == ReplicaState.READY and look.observation
    ]
    doubted = _mark_good(connection, details, good, now) if good else []
    _note_words(connection, [look for look, _, _ in mine], {one.uid for one in good}, now)
    outcomes = [(look, _outcome(context, operations, look, v, e, now)) for look, v, e in mine]
    queue.finish_operations(connection, claim.token, [o for _, o in outcomes], now)
    _queue_second_looks(connection, context, details, mine, now)
    look_again(connection, context, doubted, "doubted while it was read", now)
    return outcomes


def _mark_good(
    connection: Connection,
    details: Mapping[uuid.UUID, Mapping[str, Any]],
    good: Sequence[catalogue.Seen],
    now: datetime,
) -> list[Mapping[str, Any]]:
    """READY is what is still as it was looked at; what somebody has doubted since, which is
    returned, or has begun to make again, this look knows nothing of: it may have read before."""
    ready = [one for one in good if details[one.uid]["state"] == ReplicaState.READY]
    others = [one for one in good if details[one.uid]["state"] != ReplicaState.READY]
    marked = catalogue.mark_ready(connection, ready, now, only_from=[ReplicaState.READY])
    marked += catalogue.mark_ready(
        connection, others, now, only_from=[ReplicaState.READY, ReplicaState.SUSPECT]
    )
    if marked == len(good):
        return []
    found = catalogue.replica_details(connection, [one.uid for one in good])
    return [row for row in found.values() if row["state"] == ReplicaState.SUSPECT]


def _note_words(
    connection: Connection, looks: Sequence[Look], good: set[uuid.UUID], now: datetime
) -> None:
    """Write what storages said: the same as before, or the stamp of bytes just read and matched."""
    told = [look.uid for look in looks if look.told]
    stamps = {look.uid: look.stamp for look in looks if look.stamp and look.uid in good}
    if told:
        checks.mark_told(connection, told, now)
    if stamps:
        checks.note_stamps(connection, stamps)


def _mark(
    connection: Connection, uids: Sequence[uuid.UUID], state: str, only_from: Sequence[str]
) -> None:
    if uids:
        catalogue.mark_state(connection, uids, state, only_from=only_from)


def _outcome(
    context: Context,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    look: Look,
    verdict: str,
    error: DlmError | None,
    now: datetime,
) -> queue.Outcome:
    operation = operations[look.operation_id]
    if isinstance(error, AccessDeniedError) or (not verdict and error is not None):
        return outcome_of_error(context, operation, error, now)
    if error is None:
        return done(operation)
    # the look itself is done; what it found stays to be read beside it
    return queue.Outcome(look.operation_id, OperationState.DONE, error.code, str(error)[:2000])


def _queue_second_looks(
    connection: Connection,
    context: Context,
    details: Mapping[uuid.UUID, Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    now: datetime,
) -> None:
    again = [
        queue.NewOperation(
            OperationKind.VERIFY,
            details[look.uid]["oid"],
            look.uid,
            "second look at a suspect replica",
            now,
            priority=-1,
        )
        for look, verdict, error in verdicts
        if verdict == ReplicaState.SUSPECT
        and (
            details[look.uid]["state"] in (ReplicaState.READY, *_LOST)
            or details[look.uid]["unread"]
        )
    ]
    if again:
        queue.insert_operations(connection, again, context.actor, now)
