"""Staging: whoever reads from a cold storage asks here first, for all it wants at once.

What is not online is asked for, in as few calls as the storage allows, and the operation goes back
to the queue; that is no try of it. A file that does not come ends in a FAILED operation.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas
from dlm_core.catalogue import staging as catalogue
from dlm_core.catalogue.holds import find_collection
from dlm_core.errors import (
    DlmError,
    EmptySelectorError,
    NotOnlineError,
    SourceDamagedError,
    StagingFailedError,
    StorageError,
)
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.port import Storage
from dlm_core.transfers.mover import CopyResult, CopyTask
from dlm_core.types import (
    OperationKind,
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    decode_path,
    encode_path,
)

Row = Mapping[str, Any]
_READABLE = (
    StorageMode.READ_WRITE, StorageMode.READ_ONLY, StorageMode.DRAINING, StorageMode.AUDITING,
)  # fmt: skip
#: who took it upon itself to ask and is not heard of again is stood in for after this long
_ASKING = timedelta(minutes=30)
#: seconds
_LONGEST_POLL = 3600.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files (paths of the port) that an operation has to read. ``anew``: what is said to be
    online was found wrong, so they are asked for once more before they are believed to be."""

    operation_id: uuid.UUID
    paths: Sequence[str]
    anew: bool = False


def is_cold(storage: Storage) -> bool:
    """Whether what lies on ``storage`` may have to be staged."""
    return getattr(storage, "stager", None) is not None


def files_of(context: Context, storage: Storage, rows: Sequence[Row]) -> dict[uuid.UUID, list[str]]:
    """The files to be read by operation, of rows with operation_id, oid, kind and a catalogued
    path: all of a directory payload, by its manifest, or as they lie there if it has none yet."""
    trees = [row["oid"] for row in rows if row["kind"] == PayloadKind.DIRECTORY]
    manifests = context.transact(lambda c: replicas.manifests_of(c, trees)) if trees else {}
    found: dict[uuid.UUID, list[str]] = {}
    for row in rows:
        place = decode_path(row["path"])
        files = [place]
        if row["kind"] == PayloadKind.DIRECTORY:
            named = [f"{place}/{decode_path(one['path'])}" for one in manifests.get(row["oid"], ())]
            files = named or files_below(storage, place)
        found[row["operation_id"]] = files
    return found


def files_below(storage: Storage, path: str) -> list[str]:
    """The files that lie at or below ``path`` now; ``path`` itself if nothing can be told."""
    try:
        return [entry.path for entry in storage.walk(path)] or [path]
    except DlmError:
        return [path]  # reading it will tell why


def hold_back(
    context: Context, storage: Storage, storage_id: uuid.UUID, wanted: Sequence[Wanted]
) -> dict[uuid.UUID, DlmError]:
    """What keeps operations from reading their files now, by operation; the rest may go on.

    One look for all of them; then what is offline is asked for together, unless the last request
    is younger than ``stage_retry_hours``. What is not there at all is not waited for: reading
    tells. A storage that cannot tell what is online holds back all.
    """
    if not is_cold(storage) or not wanted:
        return {}
    cold = cast(ColdStorage, storage)
    try:
        offline = _offline(context, cold, storage_id, wanted)
    except StorageError as error:
        return {one.operation_id: error for one in wanted}
    waits = _ask(context, cold, storage_id, offline) if offline else {}
    found = {}
    for one in wanted:
        mine = {path: waits[path] for path in one.paths if path in waits}
        if mine:
            found[one.operation_id] = _told(cold, mine, context.clock())
    return found


def _offline(
    context: Context, cold: ColdStorage, storage_id: uuid.UUID, wanted: Sequence[Wanted]
) -> list[str]:
    """The files that have to be waited for; those that came are waited for no more."""
    paths = sorted({path for one in wanted for path in one.paths})
    names = {encode_path(path): path for path in paths}
    known = context.transact(lambda c: catalogue.waits_for(c, storage_id, list(names)))
    asked = {names[name] for name, wait in known.items() if wait.asked_at is not None}
    doubted = {path for one in wanted if one.anew for path in one.paths} - asked
    away = (set(paths) - cold.look(paths)) | doubted
    entries = cold.stat_many(sorted(away)) if away else {}
    offline = [
        path for path in sorted(away)
        if (entry := entries.get(path)) is not None and entry.kind == "file"
    ]  # fmt: skip
    came = [name for name in known if names[name] not in set(offline)]
    if came:
        context.transact(lambda c: catalogue.end_waiting(c, storage_id, came))
    return offline


def _ask(
    context: Context, cold: ColdStorage, storage_id: uuid.UUID, offline: Sequence[str]
) -> dict[str, catalogue.Wait]:
    """Ask for what nobody has asked for lately; how each file is waited for."""
    now, terms = context.clock(), cold.terms
    names = {encode_path(path): path for path in offline}
    waits = context.transact(
        lambda c: catalogue.begin_waiting(
            c, storage_id, list(names), now,
            retry=timedelta(hours=terms.stage_retry_hours),
            deadline=timedelta(hours=terms.stage_deadline_hours),
            lease=_ASKING,
            most=terms.stage_most,
        )
    )  # fmt: skip
    found = {names[name]: wait for name, wait in waits.items()}
    mine = sorted(path for path, wait in found.items() if wait.ask)
    refusal = _request(context, cold, storage_id, mine) if mine else None
    return found | {path: replace(found[path], error=refusal) for path in mine}


def _request(
    context: Context, cold: ColdStorage, storage_id: uuid.UUID, paths: Sequence[str]
) -> str | None:
    """Ask the storage for ``paths``; why it did not take the request, or None."""
    refusal, again = None, timedelta(hours=cold.terms.stage_retry_hours)
    try:
        cold.stage(paths)
    except DlmError as error:
        # the wait goes on, and its deadline with it: at the next look it is asked again
        refusal, again = str(error)[:2000], timedelta(seconds=cold.terms.stage_poll_seconds)
    now = context.clock()
    names = [encode_path(path) for path in paths]
    context.transact(
        lambda c: catalogue.note_asked(c, storage_id, names, now, now + again, refusal)
    )
    return refusal


def _told(cold: ColdStorage, waits: Mapping[str, catalogue.Wait], now: datetime) -> DlmError:
    """The error of an operation that waits for ``waits``, or waited too long for one of them."""
    path, first = min(waits.items(), key=lambda item: (not item[1].late, item[1].since, item[0]))
    since = f"{first.since:%Y-%m-%dT%H:%M:%SZ}"
    refusal = next((wait.error for wait in waits.values() if wait.error), None)
    if first.late:
        message = refusal or f"it is not online after {cold.terms.stage_deadline_hours:g} h"
        return StagingFailedError(storage=cold.name, path=path, since=since, message=message)
    count = f"{len(waits)} files wait" if len(waits) > 1 else "it waits"
    message = f"{count} for staging since {since}" + (f"; {refusal}" if refusal else "")
    if first.turn:
        message = f"{count} for a turn while {cold.terms.stage_most} files are on their way"
    return NotOnlineError(cold.name, path, message, _poll_after(cold, now - first.since))


def _poll_after(cold: ColdStorage, waited: timedelta) -> float:
    """Seconds until the next look: what takes hours is looked at less and less often."""
    terms = cold.terms
    longest = min(_LONGEST_POLL, terms.stage_retry_hours * 3600 / 2)
    return max(terms.stage_poll_seconds, min(waited.total_seconds() / 10, longest))


def believed(storage: Storage, paths: Collection[str], error: DlmError) -> DlmError:
    """``error``, which says that bytes read from ``paths`` are wrong, unless they are offline (by
    now): then what was read was a stub, and says nothing of the bytes."""
    if not is_cold(storage):
        return error
    cold = cast(ColdStorage, storage)
    try:
        away = sorted(set(paths) - cold.look(list(paths)))
        entries = cold.stat_many(away)
    except DlmError as failure:
        return failure
    gone = [path for path in away if entries.get(path) is not None]
    return (
        NotOnlineError(cold.name, gone[0], "it went offline while it was read") if gone else error
    )


def hold_back_copies(
    context: Context,
    source: Storage,
    destination: Storage,
    row: Row,
    tasks: Sequence[CopyTask],
) -> dict[uuid.UUID, DlmError]:
    """As :func:`hold_back`, for copies from one storage to another: what a lost try left whole in
    their place, and has migrated since, has to be read too."""
    if not (is_cold(source) or is_cold(destination)):
        return {}
    there = [_files(task, task.destination_path) for task in tasks]
    held = hold_back(context, destination, row["storage_id"], there)
    wanted = [_files(task, task.source_path) for task in tasks if task.operation_id not in held]
    return held | hold_back(context, source, row["source_storage_id"], wanted)


def _files(task: CopyTask, path: str) -> Wanted:
    return Wanted(task.operation_id, [f"{path}/{one.path}" for one in task.manifest] or [path])


def looked_at_again(source: Storage, result: CopyResult) -> CopyResult:
    """Of a cold source that was found damaged: whether it was read at all."""
    if not isinstance(result.error, SourceDamagedError):
        return result
    files = _files(result.task, result.task.source_path).paths
    return replace(result, error=believed(source, files, result.error))


# --- asked for by hand ----------------------------------------------------------------------------


def request_staging(
    connection: Connection,
    *,
    oids: Sequence[uuid.UUID] | None = None,
    collection: str | None = None,
    storage_id: uuid.UUID | None = None,
    actor: str,
    now: datetime,
) -> int:
    """Queue the staging of a good cold copy of each item ahead of need; how many.

    A collection stands for all below it. Copies of which it was asked already are left out.

    Raises
    ------
    EmptySelectorError, NotFoundError
        if neither items nor a collection are named; if there is no such collection.
    """
    if not oids and collection is None:
        raise EmptySelectorError(expected="name items, or a collection")
    collection_id = find_collection(connection, collection) if collection else None
    found = catalogue.select_cold_copies(connection, oids, collection_id, storage_id)
    return queue.insert_operations(
        connection,
        [
            queue.NewOperation(OperationKind.STAGE, row["oid"], row["uid"], "asked for", now)
            for row in found
        ],
        actor,
        now,
    )


def execute_stage(context: Context, claim: Claim) -> Report:
    """Bring the files of a claim's replicas online: DONE once all of them are."""
    report = Report()
    storages = context.transact(context.storages.load)
    uids = [op["uid"] for op in claim.operations]
    details = context.transact(lambda c: replicas.replica_details(c, uids))
    groups: dict[uuid.UUID, list[Row]] = {}
    outcomes: list[tuple[Row, queue.Outcome]] = []
    for operation in claim.operations:
        row = details[operation["uid"]]
        mode = storages[row["storage_id"]]["mode"]
        if row["state"] == ReplicaState.READY and mode in _READABLE:
            groups.setdefault(row["storage_id"], []).append(
                {**row, "operation_id": operation["operation_id"], "operation": operation}
            )
        else:
            text = f"the replica is {row['state']}, its storage {mode}"
            outcomes.append((operation, queue.Outcome(
                operation["operation_id"], OperationState.CANCELLED, "DLM-503", text)))  # fmt: skip
    for storage_id, rows in groups.items():
        storage = context.storages.open(storages[storage_id])
        files = files_of(context, storage, rows)
        held = hold_back(context, storage, storage_id, [Wanted(*one) for one in files.items()])
        outcomes += [_staged(context, row["operation"], held) for row in rows]
    context.transact(
        lambda c: queue.finish_operations(
            c, claim.token, [outcome for _, outcome in outcomes], context.clock()
        )
    )
    for operation, outcome in outcomes:
        report.note(operation, outcome, 0, 0.0)
    return report


def _staged(
    context: Context, operation: Row, held: Mapping[uuid.UUID, DlmError]
) -> tuple[Row, queue.Outcome]:
    error = held.get(operation["operation_id"])
    if error is None:
        return operation, done(operation)
    return operation, outcome_of_error(context, operation, error, context.clock())
