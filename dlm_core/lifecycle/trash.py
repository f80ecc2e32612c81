"""The file work behind a deletion: to the trash, out of it again, or purged for good.

Each step may be repeated after a crash: it looks at what is there and goes on.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import deletions as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import recovery, replicas
from dlm_core.catalogue.browse import names_of
from dlm_core.errors import (
    AlreadyExistsError,
    DlmError,
    NotFoundError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.lifecycle.fence import fence
from dlm_core.lifecycle.quarantine import is_payload
from dlm_core.lifecycle.staging import Wanted, files_below, hold_back, is_cold
from dlm_core.lifecycle.strangers import is_strangers
from dlm_core.lifecycle.survivors import look_again, look_at_survivors
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error, put_off
from dlm_core.storages.port import Storage, trash_path
from dlm_core.transfers.checksums import observe
from dlm_core.types import (
    Observation,
    OperationKind,
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    decode_path,
)

Row = Mapping[str, Any]
#: what moves or removes bytes of (storage, replica's row), while the operation is locked
Effect = Callable[[Storage, Row], Any]
#: what reads them afterwards, told what the effect returned; it may take long
Reading = Callable[[Storage, Row, Any], Any]
_WRITABLE = ("read_write", "draining")
_GONE = (StorageMode.LOST, StorageMode.RETIRED)
#: the bytes of a replica in these states are gone or set aside, not in its place
_WITHOUT_BYTES = (ReplicaState.MISSING, ReplicaState.CORRUPTED)
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Effected:
    """An operation whose file work was tried."""

    operation: Row
    row: Row
    result: Any
    error: DlmError | None
    seconds: float


def execute_trash(context: Context, claim: Claim) -> Report:
    """Move the bytes of TRASHED replicas to the trash and start their grace."""

    def write(connection: Connection, ok: Sequence[Effected], now: datetime) -> None:
        managed = [e for e in ok if e.row["managed"]]
        catalogue.mark_trashed(connection, [e.row["uid"] for e in managed], now)
        queue.insert_operations(
            connection, [_purge_later(context, e, now) for e in ok], context.actor, now
        )

    return _run(context, claim, _to_trash, write)


def _purge_later(context: Context, effected: Effected, now: datetime) -> queue.NewOperation:
    grace = effected.row["trash_grace"]
    due = now + (context.settings.trash_grace if grace is None else grace)
    row, reason = effected.row, effected.operation["reason"]
    return queue.NewOperation(OperationKind.PURGE, row["oid"], row["uid"], reason, due)


def _to_trash(storage: Storage, row: Row) -> None:
    if not row["managed"]:
        return  # the bytes belong to somebody else and stay where they are
    if row["unproven"]:
        return  # known from an old catalogue only: what lies there may be another's by now
    path, trashed = decode_path(row["path"]), trash_path(str(row["uid"]))
    if row["from_state"] in _WITHOUT_BYTES and not is_payload(storage, path, row):
        return  # nothing of ours is there; what may be is somebody else's
    if is_strangers(storage, path, row):
        return
    try:
        storage.rename(path, trashed)
    except PayloadNotFoundError:
        return  # moved by an earlier try, or there was nothing
    except PayloadExistsError:
        # An earlier try moved it, and what is there now is somebody's. Or it got half-way, since an
        # object store's rename is copy and delete: then the same bytes are in both places.
        if _is_half_way(storage, path, trashed, row):
            storage.remove(trashed)
            storage.rename(path, trashed)
    if storage.stat(trashed) is None and storage.stat(path) is not None:
        raise StorageUnavailableError(
            storage=storage.name, message=f"{path} is still there after its move to the trash"
        )


def _is_half_way(storage: Storage, path: str, trashed: str, row: Row) -> bool:
    kind = PayloadKind(row["kind"])
    try:
        there = observe(storage, path, kind)
        if _are_payload(there, row):
            return True
        moved = observe(storage, trashed, kind)
        return (there.digest, there.size) == (moved.digest, moved.size)
    except (PayloadNotFoundError, PathRefusedError):
        return False


# --- restore --------------------------------------------------------------------------------------


def request_restore(
    connection: Connection,
    *,
    oid: uuid.UUID,
    storage_id: uuid.UUID | None,
    actor: str,
    now: datetime,
    reason: str = "asked for",
) -> int:
    """Queue the way back of an item's trashed replicas, all or those on one storage; how many.

    Raises
    ------
    NotFoundError
        if nothing of the item lies in the trash, or it is being purged at this moment.
    AlreadyExistsError
        if a newer copy has taken the place; then there is nothing to restore.
    """
    trashed = [row["uid"] for row in catalogue.newest_trashed(connection, oid, storage_id)]
    # the purge of those that cannot come back stays queued
    free = catalogue.free_places(connection, trashed)
    wanted = [uid for uid in free if not _busy(connection, uid, now)]
    if trashed and not free:
        noun = "newer copy of the item in the place of trashed"
        raise AlreadyExistsError(noun=noun, key=names_of(connection, [oid])[str(oid)][0])
    if not wanted:
        uri, _ = names_of(connection, [oid])[str(oid)]
        raise NotFoundError("trashed replica of item", uri, "what is purged cannot come back")
    taken = catalogue.take_back_path(connection, wanted)
    # this one comes in the place of what failed
    catalogue.cancel_operations(
        connection, [*taken], ["trash", "purge", "restore"], now, OperationState.FAILED
    )
    return queue.insert_operations(
        connection,
        [queue.NewOperation(OperationKind.RESTORE, oid, uid, reason, now) for uid in taken],
        actor,
        now,
    )


def _busy(connection: Connection, uid: uuid.UUID, now: datetime) -> bool:
    """Cancel what is queued against a replica; True if something is running already."""
    catalogue.cancel_operations(connection, [uid], ["trash", "purge"], now)
    return catalogue.count_active(connection, uid, ["trash", "purge", "restore"]) > 0


def execute_restore(context: Context, claim: Claim) -> Report:
    """Bring bytes back from the trash, read them, and believe them only then.

    Where a newer copy of the item was begun meanwhile they go to the trash again.
    """

    def write(connection: Connection, ok: Sequence[Effected], now: datetime) -> None:
        good, damaged, missing = [], [], []
        displaced = catalogue.displaced(connection, [e.row["uid"] for e in ok])
        again = [(e.row["oid"], e.row["uid"]) for e in ok if e.row["uid"] in displaced]
        reason = "a newer copy of the item has taken its place"
        _trash_again(connection, context, again, reason, now)
        for e in ok:
            if e.row["uid"] in displaced:
                continue
            if e.result is None:
                missing.append(e.row)
            elif (e.result.digest, e.result.size) == (e.row["item_digest"], e.row["item_size"]):
                good.append(replicas.Seen(e.row["uid"], e.result.size, e.result.digest))
            else:
                damaged.append(e.row)
        if good:
            catalogue.undo_trash(connection, good, now)
        for rows, state in ((damaged, ReplicaState.SUSPECT), (missing, ReplicaState.MISSING)):
            if rows:
                uids = [row["uid"] for row in rows]
                replicas.mark_state(connection, uids, state, only_from=[ReplicaState.TRASHED])
        catalogue.let_stay(connection, [e.row["oid"] for e in ok])
        look_again(connection, context, damaged, "damaged when it came out of the trash", now)

    return _run(context, claim, _from_trash, write, _brought_back)


def _trash_again(
    connection: Connection,
    context: Context,
    pairs: Sequence[tuple[uuid.UUID, uuid.UUID]],
    reason: str,
    now: datetime,
) -> None:
    queue.insert_operations(
        connection,
        [queue.NewOperation(OperationKind.TRASH, oid, uid, reason, now) for oid, uid in pairs],
        context.actor,
        now,
    )


def _from_trash(storage: Storage, row: Row) -> bool:
    """True if what lies in the replica's place now was brought there by this try."""
    if not row["managed"]:
        return True
    path, trashed = decode_path(row["path"]), trash_path(str(row["uid"]))
    try:
        storage.rename(trashed, path)
    except PayloadNotFoundError:
        return False  # it never left, or an earlier try brought it back: reading will tell
    except PayloadExistsError:
        # an object store's rename that got half-way, or somebody's file: the bytes tell
        if not is_payload(storage, path, row):
            raise
        storage.remove(trashed)
    return True


def _brought_back(storage: Storage, row: Row, moved: bool) -> Observation | None:
    try:
        seen = observe(storage, decode_path(row["path"]), PayloadKind(row["kind"]))
    except PayloadNotFoundError as error:
        if moved and row["managed"]:
            message = f"{row['path']} is not there after its way back from the trash"
            raise StorageUnavailableError(storage=storage.name, message=message) from error
        return None
    except PathRefusedError:
        if moved:
            raise
        return None
    # other bytes that this try did not bring back may be anybody's: nothing is known of ours
    return seen if moved or _are_payload(seen, row) else None


def _are_payload(seen: Observation, row: Row) -> bool:
    return (seen.digest, seen.size) == (row["item_digest"], row["item_size"])


# --- purge ----------------------------------------------------------------------------------------


def execute_purge(context: Context, claim: Claim) -> Report:
    """Prove again, look at the survivors on their storages, certify, remove, confirm absence.

    Storage by storage, some at a time: no proof ages while another storage takes its time.
    """
    report = Report()
    for operations in _by_storage(context, claim):
        if context.stop.is_set():
            break
        report.add(_purge_some(context, Claim(claim.token, operations)))
    return report


def _by_storage(context: Context, claim: Claim) -> list[Sequence[Row]]:
    uids = [op["uid"] for op in claim.operations]
    details = context.transact(lambda c: replicas.replica_details(c, uids))
    groups: dict[uuid.UUID, list[Row]] = {}
    for operation in claim.operations:
        groups.setdefault(details[operation["uid"]]["storage_id"], []).append(operation)
    return [
        group[start : start + _CHUNK]
        for group in groups.values()
        for start in range(0, len(group), _CHUNK)
    ]


def _purge_some(context: Context, claim: Claim) -> Report:
    uids = [op["uid"] for op in claim.operations]
    proofs = context.transact(lambda c: catalogue.prove(c, uids))
    unseen = look_at_survivors(context, proofs)
    seen = {uid for proof in proofs for uid in proof.survivors} - unseen
    # before the certificates are written: none is good for less
    until = context.clock() + timedelta(seconds=context.settings.certificate_seconds)
    granted = context.transact(lambda c: _certify_purge(c, context, claim, seen))

    def purge(storage: Storage, row: Row) -> None:
        if row["managed"] and context.clock() >= until:
            raise StorageUnavailableError(
                storage=storage.name, message="it took so long that what is left is proven again"
            )
        _purge(storage, row)

    def write(connection: Connection, ok: Sequence[Effected], now: datetime) -> None:
        for released in (False, True):
            gone = [e.row["uid"] for e in ok if e.row["managed"] is not released]
            if gone:
                catalogue.mark_deleted(connection, gone, now, released=released)

    held = [op for op in claim.operations if op["operation_id"] in granted]
    return _run(context, Claim(claim.token, held), purge, write)


def _purge(storage: Storage, row: Row) -> None:
    if not row["managed"]:
        return
    path = trash_path(str(row["uid"]))
    storage.remove(path)
    if storage.stat(path) is not None:
        # a reply may be wrong: "done" is what a look confirms
        raise StorageUnavailableError(
            storage=storage.name, message=f"{path} is still there after its removal"
        )


def _certify_purge(
    connection: Connection, context: Context, claim: Claim, seen: set[uuid.UUID]
) -> set[uuid.UUID]:
    """Certify what may be purged; put off or undo the rest. The operations to go on with.

    Of the survivors that are ``seen`` alone: what became one since was not looked at.
    """
    now = context.clock()
    held = queue.lock_claimed(
        connection, claim.token, [o["operation_id"] for o in claim.operations]
    )
    operations = {op["uid"]: op for op in claim.operations if op["operation_id"] in held}
    proofs = [
        p for p in catalogue.prove(connection, list(operations)) if p.state == ReplicaState.TRASHED
    ]
    blind = {p.uid for p in proofs if not seen.issuperset(p.survivors)}
    good = [p for p in proofs if p.refusal is None and p.uid not in blind]
    # nobody was to touch its storage when it was trashed, and now it would be purged there: what is
    # in its place yet has its grace first
    unmoved = {p.uid: p.oid for p in good if p.managed and p.trashed_at is None}
    good = [p for p in good if p.uid not in unmoved]
    reason = "it was not moved, its storage was lost or not managed"
    _trash_again(connection, context, [(oid, uid) for uid, oid in unmoved.items()], reason, now)
    catalogue.certify(
        connection,
        [(p, "purge" if p.managed else "release") for p in good],
        actor=context.actor,
        now=now,
        valid_for=timedelta(seconds=context.settings.certificate_seconds),
    )
    granted = {p.uid for p in good}
    needed = [p for p in proofs if _is_needed(p) and p.uid not in blind]
    returning = _bring_back(connection, context, needed, now)
    outcomes = [
        _not_purged(context, operations[p.uid], p, p.uid in returning, now)
        for p in proofs
        if p.uid not in granted and p.uid not in unmoved
    ]
    gone = dict.fromkeys(set(operations) - {p.uid for p in proofs}, "not in the trash any more")
    outcomes += [
        queue.Outcome(operations[uid]["operation_id"], OperationState.CANCELLED, "DLM-503", why)
        for uid, why in [*gone.items(), *((uid, reason) for uid in unmoved)]
    ]
    queue.finish_operations(connection, claim.token, outcomes, now)
    return {operations[uid]["operation_id"] for uid in granted}


def _is_needed(proof: catalogue.Proof) -> bool:
    """True if the trashed copy is needed again: the survivors its certificate named are fewer."""
    return proof.refusal is not None and not proof.waits


def _not_purged(
    context: Context, operation: Row, proof: catalogue.Proof, returning: bool, now: datetime
) -> queue.Outcome:
    if not returning:
        why = proof.refusal or "a survivor could not be looked at"
        due = now + timedelta(seconds=context.settings.retry_base_seconds * 12)
        # to wait is no try
        return queue.Outcome(
            operation["operation_id"], OperationState.QUEUED, "DLM-501", why, due, counted=False
        )
    return queue.Outcome(
        operation["operation_id"], OperationState.CANCELLED, "DLM-501",
        f"{proof.refusal}; the copy is brought back from the trash",
    )  # fmt: skip


def _bring_back(
    connection: Connection, context: Context, proofs: Sequence[catalogue.Proof], now: datetime
) -> set[uuid.UUID]:
    """Queue the way back of trashed copies that are needed again, if their place is free; those
    that come back."""
    by_uid = {proof.uid: proof for proof in proofs}
    taken = catalogue.take_back_path(connection, list(by_uid)) if by_uid else set()
    queue.insert_operations(
        connection,
        [
            queue.NewOperation(
                OperationKind.RESTORE, by_uid[uid].oid, uid, by_uid[uid].refusal or "", now
            )
            for uid in taken
        ],
        context.actor,
        now,
    )
    return taken


# --- the frame they share -------------------------------------------------------------------------


def _run(
    context: Context,
    claim: Claim,
    effect: Effect,
    write: Callable[[Connection, Sequence[Effected], datetime], None],
    reading: Reading | None = None,
) -> Report:
    """Do ``effect`` for each operation, with each storage's concurrency, then ``reading``, then
    ``write`` and finish in one transaction a chunk. Operations whose replica is not TRASHED any
    more are cancelled; those on a storage that may not be written now come back later."""
    report = Report()
    storages = context.transact(context.storages.load)
    uids = [op["uid"] for op in claim.operations]
    details = context.transact(lambda c: replicas.replica_details(c, uids))
    before = context.transact(lambda c: catalogue.trashed_from(c, uids))
    trees = [row["oid"] for row in details.values() if row["kind"] == PayloadKind.DIRECTORY]
    manifests = context.transact(lambda c: replicas.manifests_of(c, trees)) if trees else {}
    floor = context.transact(recovery.proof_floor)
    work: dict[uuid.UUID, list[tuple[Row, Row]]] = {}
    idle: list[tuple[Row, queue.Outcome]] = []
    for operation in claim.operations:
        storage = storages[details[operation["uid"]]["storage_id"]]
        # of what is lost the record ends untouched; a way back from there waits until it is back
        touched = reading is not None or storage["mode"] not in _GONE
        row = {**details[operation["uid"]], "managed": storage["managed"] and touched,
               "trash_grace": storage["trash_grace"],
               "manifest": {m["path"]: m["size"] for m in manifests.get(operation["oid"], ())},
               "unproven": recovery.is_unproven(details[operation["uid"]], floor),
               "from_state": before.get(operation["uid"])}  # fmt: skip
        outcome = _idle_outcome(context, operation, row, storage)
        if outcome is None:
            work.setdefault(row["storage_id"], []).append((operation, row))
        else:
            idle.append((operation, outcome))
    if idle:
        context.transact(
            lambda c: queue.finish_operations(
                c, claim.token, [outcome for _, outcome in idle], context.clock()
            )
        )
    for operation, outcome in idle:
        report.note(operation, outcome, 0, 0.0)
    for storage_id, pairs in work.items():
        adapter = context.storages.open(storages[storage_id])
        pairs = _readable(context, claim, adapter, pairs, reading is not None, report)
        for start in range(0, len(pairs), _CHUNK):
            if context.stop.is_set():
                return report
            _effect_chunk(
                context, claim, adapter, pairs[start : start + _CHUNK], effect, reading, write,
                report,
            )  # fmt: skip
    return report


def _readable(
    context: Context,
    claim: Claim,
    adapter: Storage,
    pairs: list[tuple[Row, Row]],
    reading: bool,
    report: Report,
) -> list[tuple[Row, Row]]:
    """Of work on a cold storage, what need not wait: a rename recalls nothing, but what comes back
    is read, and on some storages a rename is a copy. The rest goes back to the queue."""
    if not is_cold(adapter) or not pairs:
        return pairs
    wanted = []
    for operation, row in pairs:
        path, trashed = decode_path(row["path"]), trash_path(str(row["uid"]))
        if operation["kind"] == OperationKind.PURGE or not row["managed"]:
            places = []
        elif reading or getattr(adapter, "renames_read", False):
            places = [path, trashed]
        else:
            places = [path] if row["from_state"] in _WITHOUT_BYTES else []
        paths = [file for place in places for file in _files_at(adapter, place, row)]
        wanted.append(Wanted(operation["operation_id"], paths))
    held = hold_back(context, adapter, pairs[0][1]["storage_id"], wanted)
    outcomes = [
        (operation, outcome_of_error(context, operation, error, context.clock()))
        for operation, _ in pairs
        if (error := held.get(operation["operation_id"])) is not None
    ]
    context.transact(
        lambda c: queue.finish_operations(c, claim.token, [o for _, o in outcomes], context.clock())
    )
    for operation, outcome in outcomes:
        report.note(operation, outcome, 0, 0.0)
    return [pair for pair in pairs if pair[0]["operation_id"] not in held]


def _files_at(adapter: Storage, place: str, row: Row) -> list[str]:
    return [place] if row["kind"] == PayloadKind.FILE else files_below(adapter, place)


def _idle_outcome(context: Context, operation: Row, row: Row, storage: Row) -> queue.Outcome | None:
    if row["state"] != ReplicaState.TRASHED:
        return queue.Outcome(
            operation["operation_id"], OperationState.CANCELLED, "DLM-503",
            f"the replica is {row['state']} by now",
        )  # fmt: skip
    if row["managed"] and storage["mode"] not in _WRITABLE:
        return put_off(context, operation, storage)
    return None


def _effect_chunk(
    context: Context,
    claim: Claim,
    adapter: Storage,
    pairs: Sequence[tuple[Row, Row]],
    effect: Effect,
    reading: Reading | None,
    write: Callable[[Connection, Sequence[Effected], datetime], None],
    report: Report,
) -> None:
    def one(storage: Storage, pair: tuple[Row, Row]) -> Effected:
        return _tried(*pair, lambda: effect(storage, pair[1]))

    def read(e: Effected) -> Effected:
        if reading is None or e.error is not None:
            return e
        after = _tried(e.operation, e.row, lambda: reading(adapter, e.row, e.result))
        return replace(after, seconds=e.seconds + after.seconds)

    def act(connection: Connection) -> list[Effected]:
        # Who lost the lease must not touch a path that others' work may have filled anew since. And
        # nobody takes over an operation that is locked: what lies there stays ours to the end.
        ids = [operation["operation_id"] for operation, _ in pairs]
        held = queue.lock_claimed(connection, claim.token, ids)
        guard = fence(connection, context.clock, claim.token, context.settings.lease)
        act_on = partial(one, guard.around(adapter))
        with ThreadPoolExecutor(adapter.concurrency, "dlm-trash") as pool:
            acted = list(pool.map(act_on, [p for p in pairs if p[0]["operation_id"] in held]))
        guard.raise_if_lost()
        return acted

    acted: list[Effected] = context.transact(act)
    with ThreadPoolExecutor(adapter.concurrency, "dlm-look") as pool:
        effected = list(pool.map(read, acted))
    try:
        adapter.flush()
    except DlmError as error:
        # what is not durable is not done
        effected = [replace(e, error=e.error or error) for e in effected]

    def close(connection: Connection) -> list[tuple[Effected, queue.Outcome]]:
        now = context.clock()
        ids = [e.operation["operation_id"] for e in effected]
        held = queue.lock_claimed(connection, claim.token, ids)
        mine = [e for e in effected if e.operation["operation_id"] in held]
        good = [e for e in mine if e.error is None]
        if good:
            write(connection, good, now)
        outcomes = [
            (e, done(e.operation) if e.error is None
             else outcome_of_error(context, e.operation, e.error, now))
            for e in mine
        ]  # fmt: skip
        queue.finish_operations(connection, claim.token, [o for _, o in outcomes], now)
        return outcomes

    for e, outcome in context.transact(close):
        report.note(e.operation, outcome, e.row["size"], e.seconds)


def _tried(operation: Row, row: Row, action: Callable[[], Any]) -> Effected:
    begun = time.monotonic()
    result, failure = None, None
    try:
        result = action()
    except DlmError as error:
        failure = error
    return Effected(operation, row, result, failure, time.monotonic() - begun)
