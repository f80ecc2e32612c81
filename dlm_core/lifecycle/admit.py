"""Admission: read what was announced, and let it in, or say why not."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from itertools import count
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import items as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.paths import folders_above, owners_at
from dlm_core.errors import OF_DATA, AlreadyExistsError, DlmError, IntegrityError
from dlm_core.lifecycle.staging import files_of, is_cold
from dlm_core.lifecycle.traffic import reading_from
from dlm_core.lifecycle.verify import Look, look_when_online
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error, put_off
from dlm_core.metadata import extract_all
from dlm_core.storages.port import Storage
from dlm_core.types import (
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    decode_path,
    encode_path,
)

Row = Mapping[str, Any]
#: payloads let in by one transaction, and the seconds after which fewer will do
_FEWEST, _MOST, _SOON = 512, 1024, 1.0
#: payloads that are read while others are claimed
_LAST = 256
#: transactions at a time: small payloads are read faster than the catalogue writes them
_WRITERS = 2

Writing = Future[list[tuple[Look, queue.Outcome]]]


def execute_admit(context: Context, claim: Claim) -> Report:
    """Read the announced payloads of a claim once: size, digest, content type, metadata.

    An INITIALISED item becomes READY with what was seen; a digest that came with the announcement,
    or that the item has, is compared. What cannot be admitted stays as it is with its reason.
    Writing the results of one chunk overlaps with reading the next.
    """
    report = Report()
    storages = context.transact(context.storages.load)
    uids = [operation["uid"] for operation in claim.operations]
    announced = context.transact(lambda c: catalogue.select_announced(c, uids))
    waiting: dict[uuid.UUID, list[Row]] = defaultdict(list)
    over: list[queue.Outcome] = []
    for operation in claim.operations:
        row = announced[operation["uid"]]
        refusal = _refuse(context, operation, row, storages[row["storage_id"]])
        if refusal is not None:
            over.append(refusal)
            continue
        target = {**row, "operation_id": operation["operation_id"], "operation": operation}
        waiting[row["storage_id"]].append(target)
    if over:
        context.transact(lambda c: queue.finish_operations(c, claim.token, over, context.clock()))
    with ThreadPoolExecutor(_WRITERS, "dlm-write") as writer:
        for left, (storage_id, targets) in reversed([*zip(count(), waiting.items())]):
            with reading_from(context, storages[storage_id]) as storage:
                files = files_of(context, storage, targets) if is_cold(storage) else {}
                looks = look_when_online(context, storage, storage_id, targets, files)
                if not left:
                    looks = _easing(looks, len(targets), claim)
                _admit_storage(context, claim, storage, looks, writer, report)
    return report


def _easing(looks: Iterator[Look], most: int, claim: Claim) -> Iterator[Look]:
    """Others may be claimed as soon as the last of these, of ``most`` in all, are read."""
    last = most - min(most // 4, _LAST)
    for number, look in enumerate(looks, start=1):
        yield look
        if number >= last:
            claim.eased.set()
    claim.eased.set()


def _refuse(context: Context, operation: Row, row: Row, storage: Row) -> queue.Outcome | None:
    """Why there is nothing to read (now), or None."""
    key = operation["operation_id"]
    if storage["mode"] == StorageMode.LOST:
        # visible, and retried by 'dlm retry' should the storage come back
        text = f"storage {storage['name']} is lost"
        return queue.Outcome(key, OperationState.FAILED, "DLM-301", text)
    if row["state"] != ReplicaState.PENDING:
        text = f"the replica is {row['state']} by now"
        return queue.Outcome(key, OperationState.CANCELLED, "DLM-503", text)
    if storage["mode"] in (StorageMode.OFFLINE, StorageMode.AUDITING):
        return put_off(context, operation, storage)
    return None


def _admit_storage(
    context: Context,
    claim: Claim,
    storage: Storage,
    looks: Iterator[Look],
    writer: ThreadPoolExecutor,
    report: Report,
) -> None:
    writing: deque[Writing] = deque()
    gathered: list[Look] = []

    def write() -> None:
        if len(writing) == _WRITERS:
            _note(writing.popleft(), report)
        prepared = [_prepare(storage, look) for look in gathered]
        gathered.clear()
        writing.append(writer.submit(_write, context, claim, prepared))

    begun = time.monotonic()
    for look in looks:
        gathered.append(look)
        # a transaction costs as much as some fifty rows of it, and the processor is what hashing
        # small payloads waits for; large ones are written soon, so that little is left for the end
        free = len(writing) < _WRITERS or writing[0].done()
        enough = _FEWEST if time.monotonic() - begun < _SOON else 1
        if len(gathered) >= (enough if free else _MOST):
            write()
            begun = time.monotonic()
    if gathered:
        write()
    for one in writing:
        _note(one, report)


def _note(writing: Writing, report: Report) -> None:
    for look, outcome in writing.result():
        size = look.observation.size if look.observation else 0
        report.note(look.target["operation"], outcome, size, look.seconds)


def _prepare(
    storage: Storage, look: Look
) -> tuple[Look, catalogue.Admitted | None, DlmError | None]:
    """A payload ready to be let in with its metadata, or the reason why it is not."""
    row, seen = look.target, look.observation
    if seen is None:
        return look, None, look.error
    claimed = row["item_digest"]
    if claimed is not None and claimed != seen.digest:
        error = IntegrityError(
            where=f"{storage.name}:{row['path']}", expected=claimed, found=seen.digest
        )
        return look, None, error
    metadata = extract_all(storage, decode_path(row["path"]), seen)
    return look, catalogue.Admitted(look.uid, row["oid"], seen, metadata), None


def _write(
    context: Context,
    claim: Claim,
    prepared: Sequence[tuple[Look, catalogue.Admitted | None, DlmError | None]],
) -> list[tuple[Look, queue.Outcome]]:
    def write(connection: Connection) -> list[tuple[Look, queue.Outcome]]:
        now = context.clock()
        ids = [look.operation_id for look, _, _ in prepared]
        held = queue.lock_claimed(connection, claim.token, ids)
        mine = [one for one in prepared if one[0].operation_id in held]
        mine = _unless_shared(connection, mine)
        good = [admitted for _, admitted, _ in mine if admitted is not None]
        let_in = catalogue.admit(connection, good, now) if good else set()
        outcomes = [(look, _outcome(context, look, let_in, error, now)) for look, _, error in mine]
        queue.finish_operations(connection, claim.token, [o for _, o in outcomes], now)
        return outcomes

    try:
        return context.transact(write)
    except OF_DATA as error:
        # of one of them: which is not told
        if len(prepared) == 1:
            return _write(context, claim, [(prepared[0][0], None, error)])
        half = len(prepared) // 2
        return [
            *_write(context, claim, prepared[:half]), *_write(context, claim, prepared[half:]),
        ]  # fmt: skip


def _unless_shared(
    connection: Connection,
    prepared: Sequence[tuple[Look, catalogue.Admitted | None, DlmError | None]],
) -> list[tuple[Look, catalogue.Admitted | None, DlmError | None]]:
    """Refuse files that lie in another item's directory, and directories in which another item's
    payload lies: who was there first keeps it. Else a deletion of the one would be the other's."""
    places = {
        look.uid: _places(look.target["path"], admitted)
        for look, admitted, _ in prepared
        if admitted is not None
    }
    asked = {path for some in places.values() for path in some}
    if not asked:
        return [*prepared]
    owners = owners_at(connection, prepared[0][0].target["storage_id"], asked)
    settled = []
    for look, admitted, error in prepared:
        for path in places.get(look.uid, ()) if owners else ():
            owner = owners.get(path)
            if owner and owner["uid"] != look.uid and _holds(owner, path, look.target["path"]):
                # of two that were only announced the first is let in
                if not owner["announced"] or owner["uid"] < look.uid:
                    noun = f"the item of {path}, which {look.target['path']} shares its files with,"
                    admitted, error = None, AlreadyExistsError(noun=noun, key=owner["uri"])
                    break
        settled.append((look, admitted, error))
    return settled


def _holds(owner: Row, path: str, mine: str) -> bool:
    """Whether what lies at ``path`` is a directory around what is mine, or a part of it. In a file
    nothing lies: an object store may have names that go on where its name ends."""
    return owner["kind"] == PayloadKind.DIRECTORY or path.startswith(f"{mine}/")


def _places(path: str, admitted: catalogue.Admitted) -> set[str]:
    """Where something may lie that is a part of a payload, or of which it is one."""
    inside = {f"{path}/{encode_path(entry.path)}" for entry in admitted.seen.manifest}
    return inside.union(*(folders_above(one) for one in inside or {path}))


def _outcome(
    context: Context,
    look: Look,
    let_in: set[uuid.UUID],
    error: DlmError | None,
    now: datetime,
) -> queue.Outcome:
    operation = look.target["operation"]
    if error is None and look.uid not in let_in:
        # another replica of the item was admitted meanwhile, with other bytes
        found = look.observation.digest if look.observation else ""
        error = IntegrityError(where=str(look.uid), expected="the item's digest", found=found)
    return done(operation) if error is None else outcome_of_error(context, operation, error, now)
