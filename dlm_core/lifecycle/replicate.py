"""Replication: plan the copies that items need, and make them."""

from __future__ import annotations

import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas as catalogue
from dlm_core.errors import (
    DlmError,
    PayloadNotFoundError,
    SourceDamagedError,
    StorageFullError,
)
from dlm_core.lifecycle.decide import (
    Copy,
    Decision,
    ItemView,
    ReplicaView,
    Space,
    StorageView,
    decide_copies,
)
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error
from dlm_core.storages.port import Storage
from dlm_core.transfers.mover import CopyResult, CopyTask, copy_batch
from dlm_core.types import (
    ItemState,
    ManifestEntry,
    OperationKind,
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    decode_path,
    encode_path,
    new_id,
)

_PLAN_BATCH = 2000
_IMPOSSIBLE_BASE = timedelta(seconds=30)
_IMPOSSIBLE_CEILING = timedelta(hours=6)
#: a storage that failed to take a copy of an item is not asked again for this long
_EXCLUSION = timedelta(hours=1)
# control characters, backslashes and octets that are no UTF-8 (see S3Storage)
_NO_OBJECT_KEY = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_NO_URL_NAME = re.compile(r"[\x00-\x1f\x7f\\?;\ud800-\udfff]")
#: what an interface's servers do not all keep in a name
_ODD_NAMES = {"s3": _NO_OBJECT_KEY, "webdav": _NO_URL_NAME, "rclone": _NO_URL_NAME}


def storage_views(storage_rows: Iterable[Mapping[str, Any]]) -> dict[uuid.UUID, StorageView]:
    """The planner's view of storages' rows, free space taken up to the high watermark.

    With a capacity given, the catalogue's own count of bytes is what is used; else what the
    storage last told. A storage that tells neither is taken as having room.
    """
    views = {}
    for row in storage_rows:
        capacity, used = capacity_and_use(row)
        free = capacity * row["high_watermark"] - used if capacity else float("inf")
        views[row["storage_id"]] = StorageView(
            row["storage_id"],
            row["name"],
            row["location_id"],
            row["weight"],
            row["mode"],
            row["managed"],
            row["class"],
            free,
            max(free, 0.0) / capacity if capacity else 1.0,
        )
    return views


def capacity_and_use(row: Mapping[str, Any]) -> tuple[int | None, int]:
    """Capacity (None: unknown) and used bytes of a storage."""
    if row["capacity_bytes"] is not None:
        return row["capacity_bytes"], row["used_bytes"]
    return row["observed_total_bytes"], row["observed_used_bytes"] or row["used_bytes"]


def copy_path(uri: str, version: int, interface: str = "posix") -> str:
    """Where a copy lies below a storage's root: ``scheme/path``, encoded as the catalogue has it.

    Versions after the first have a top folder of their own: a longer file name could pass the 255
    octets that file systems allow. Names that S3 or WebDAV may not keep lie there in their
    percent-encoded form, in a top folder of their own (no scheme has a ``!``) so that they meet no
    file which is really called so.
    """
    scheme, _, path = uri.partition(":")
    top = scheme if version == 1 else f"{scheme}@{version}"
    odd = _ODD_NAMES.get(interface)
    if odd is not None and odd.search(decode_path(path)):
        # a semicolon may stand in a URI as it is, but not in every server's names
        return encode_path(f"{top}!/{path.replace(';', '%3B')}")
    return f"{top}/{path}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """One copy to be made, as a dry run prints it."""

    uri: str
    copy: Copy
    storage: str


def plan_replication(context: Context) -> int:
    """Look at the items whose copies or targets changed, and queue the copies they need.

    Returns how many items were looked at. One transaction for each batch: the list of due items,
    the planned replicas and operations, and the phases all change together.
    """
    looked_at = 0
    while not context.stop.is_set():
        batch = context.transact(lambda c: _plan_batch(c, context))
        looked_at += batch
        if batch < _PLAN_BATCH:
            break
    return looked_at


def propose_replication(context: Context, limit: int = 1000) -> list[Proposal]:
    """What :func:`plan_replication` would queue now, changing nothing (``dry_run``)."""

    def look(connection: Connection) -> list[Proposal]:
        taken = catalogue.take_evaluations(connection, context.clock(), limit)
        storages = context.storages.load(connection)
        return [
            Proposal(item["uri"], copy, storages[copy.storage_id]["name"])
            for item, decision in _decide(connection, taken, storages, context.clock())
            for copy in decision.copies
        ]

    return context.rehearse(look)


def _plan_batch(connection: Connection, context: Context) -> int:
    now = context.clock()
    taken = catalogue.take_evaluations(connection, now, _PLAN_BATCH)
    if not taken:
        return 0
    storages = context.storages.load(connection)
    decided = _decide(connection, taken, storages, now)
    _apply(connection, context, decided, storages, taken, now)
    return len(taken)


def _decide(
    connection: Connection,
    taken: Mapping[uuid.UUID, int],
    storage_rows: Mapping[uuid.UUID, Mapping[str, Any]],
    now: datetime,
) -> list[tuple[Mapping[str, Any], Decision]]:
    items = [
        item
        for item in catalogue.lock_items(connection, list(taken))
        if item["state"] in (ItemState.READY, ItemState.CORRUPTED)
    ]
    by_item: dict[uuid.UUID, list[ReplicaView]] = defaultdict(list)
    for row in catalogue.replicas_of(connection, [item["oid"] for item in items]):
        by_item[row["oid"]].append(
            ReplicaView(
                row["uid"],
                row["storage_id"],
                row["state"],
                row["expires_at"],
                row["excluded_until"],
            )
        )
    storages = storage_views(storage_rows.values())
    space = Space(storages.values())
    return [
        (
            item,
            decide_copies(
                ItemView(
                    item["oid"],
                    item["state"],
                    item["size"],
                    item["target_phase"],
                    taken[item["oid"]] > 0,
                ),
                by_item[item["oid"]],
                storages,
                space,
                now,
            ),
        )
        for item in items
    ]


def _apply(
    connection: Connection,
    context: Context,
    decided: Sequence[tuple[Mapping[str, Any], Decision]],
    storages: Mapping[uuid.UUID, Mapping[str, Any]],
    tries: Mapping[uuid.UUID, int],
    now: datetime,
) -> None:
    fresh: list[tuple[Copy, dict[str, Any]]] = []
    again: list[tuple[Copy, uuid.UUID]] = []
    for item, decision in decided:
        for copy in decision.copies:
            if copy.uid is None:
                interface = storages[copy.storage_id]["interface"]
                path = copy_path(item["uri"], item["version"], interface)
                fresh.append(
                    (
                        copy,
                        {
                            "uid": new_id(),
                            "oid": copy.oid,
                            "storage_id": copy.storage_id,
                            "path": path,
                            "size": copy.size,
                        },
                    )
                )
            else:
                again.append((copy, copy.uid))
    made = (
        catalogue.insert_pending(connection, [record for _, record in fresh], now)
        if fresh
        else set()
    )
    remade = catalogue.remake_replicas(connection, [uid for _, uid in again]) if again else set()
    pairs: list[tuple[Copy, uuid.UUID]] = [
        (copy, record["uid"]) for copy, record in fresh if record["uid"] in made
    ]
    pairs += [(copy, uid) for copy, uid in again if uid in remade]
    if pairs:
        queue.insert_operations(
            connection,
            [
                queue.NewOperation(OperationKind.COPY, copy.oid, uid, copy.reason, now)
                for copy, uid in pairs
            ],
            context.actor,
            now,
        )
    _write_phases(connection, decided, now)
    planned = {copy.oid for copy, _ in pairs}
    _look_again(connection, decided, planned, tries, now)


def _write_phases(
    connection: Connection,
    decided: Sequence[tuple[Mapping[str, Any], Decision]],
    now: datetime,
) -> None:
    changes = [
        (item["oid"], decision.weight, decision.shortfall, decision.item_state or item["state"])
        for item, decision in decided
        if (item["phase_weight"], item["shortfall"], item["state"])
        != (decision.weight, decision.shortfall, decision.item_state or item["state"])
    ]
    if changes:
        catalogue.update_phases(connection, changes)


def _look_again(
    connection: Connection,
    decided: Sequence[tuple[Mapping[str, Any], Decision]],
    planned: set[uuid.UUID],
    tries: Mapping[uuid.UUID, int],
    now: datetime,
) -> None:
    """Put items back on the list whose shortfall nothing under way will mend, later and later."""
    dues = []
    for item, decision in decided:
        lost_race = bool(decision.copies) and item["oid"] not in planned
        if decision.impossible or lost_race:
            attempts = tries[item["oid"]]
            delay = min(_IMPOSSIBLE_BASE * 2 ** min(attempts, 12), _IMPOSSIBLE_CEILING)
            dues.append((item["oid"], now + delay, attempts + 1))
    if dues:
        catalogue.put_evaluations(connection, dues)


# --- copying --------------------------------------------------------------------------------------


def execute_copy(context: Context, claim: Claim) -> Report:
    """Make the copies of a claim, grouped by source and destination; results in sub-batches."""
    report = Report()
    operations = {op["operation_id"]: op for op in claim.operations}
    details, manifests, storages = context.transact(lambda c: _load(c, context, claim))
    groups: dict[tuple[uuid.UUID, uuid.UUID], list[Mapping[str, Any]]] = defaultdict(list)
    settled: list[queue.Outcome] = []
    for row in details:
        refusal = _refuse(row, storages)
        if refusal is None:
            groups[row["source_storage_id"], row["storage_id"]].append(row)
        else:
            settled.append(
                queue.Outcome(
                    row["operation_id"],
                    OperationState.CANCELLED,
                    "DLM-503",
                    f"not copied: {refusal}",
                )
            )
    if settled:
        _write_refusals(context, claim, settled, operations, report)
    for (source_id, destination_id), rows in groups.items():
        if context.stop.is_set():
            break
        source = context.storages.open(storages[source_id])
        destination = context.storages.open(storages[destination_id])
        _copy_group(context, claim, operations, rows, manifests, source, destination, report)
    return report


def _load(connection: Connection, context: Context, claim: Claim) -> tuple[Any, Any, Any]:
    details = catalogue.copy_details(connection, [op["operation_id"] for op in claim.operations])
    directories = [row["oid"] for row in details if row["kind"] == PayloadKind.DIRECTORY]
    manifests = catalogue.manifests_of(connection, directories) if directories else {}
    return details, manifests, context.storages.load(connection)


def _refuse(row: Mapping[str, Any], storages: Mapping[uuid.UUID, Mapping[str, Any]]) -> str | None:
    """Why a copy is not to be made any more, or None. The planner asks again when things change."""
    if row["state"] != ReplicaState.PENDING:
        return f"the replica is {row['state']} by now"
    if row["item_state"] not in (ItemState.READY, ItemState.CORRUPTED):
        return f"the item is {row['item_state']} by now"
    storage = storages[row["storage_id"]]
    if storage["mode"] != StorageMode.READ_WRITE:
        return f"storage {storage['name']} is {storage['mode']}"
    return "there is no good copy to read" if row["source_uid"] is None else None


def _write_refusals(
    context: Context,
    claim: Claim,
    settled: Sequence[queue.Outcome],
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    report: Report,
) -> None:
    def write(connection: Connection) -> None:
        held = queue.lock_claimed(connection, claim.token, [o.operation_id for o in settled])
        # a copy that will not be made must not look as if it were on its way
        catalogue.mark_state(
            connection,
            [operations[operation_id]["uid"] for operation_id in held],
            ReplicaState.MISSING,
            only_from=[ReplicaState.PENDING],
        )
        queue.finish_operations(connection, claim.token, settled, context.clock())

    context.transact(write)
    for outcome in settled:
        report.note(operations[outcome.operation_id], outcome, 0, 0.0)


def _copy_group(
    context: Context,
    claim: Claim,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    manifests: Mapping[uuid.UUID, Sequence[Mapping[str, Any]]],
    source: Storage,
    destination: Storage,
    report: Report,
) -> None:
    by_id = {row["operation_id"]: row for row in rows}
    tasks = [_task(row, manifests, claim.token) for row in rows]
    waiting: list[CopyResult] = []
    for result in copy_batch(source, destination, tasks, stop=context.stop):
        waiting.append(result)
        if len(waiting) >= 512:
            _write_copies(context, claim, operations, by_id, waiting, report)
            waiting = []
    if waiting:
        _write_copies(context, claim, operations, by_id, waiting, report)


def _task(
    row: Mapping[str, Any],
    manifests: Mapping[uuid.UUID, Sequence[Mapping[str, Any]]],
    token: uuid.UUID,
) -> CopyTask:
    manifest = tuple(
        ManifestEntry(decode_path(entry["path"]), entry["size"], entry["digest"])
        for entry in manifests.get(row["oid"], ())
    )
    return CopyTask(
        row["operation_id"],
        decode_path(row["source_path"]),
        decode_path(row["path"]),
        PayloadKind(row["kind"]),
        row["size"],
        row["digest"],
        manifest,
        # unique for every try: a worker whose lease ran out writes beside its successor
        f"{row['uid'].hex}.{token.hex}",
    )


def _write_copies(
    context: Context,
    claim: Claim,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    by_id: Mapping[uuid.UUID, Mapping[str, Any]],
    results: Sequence[CopyResult],
    report: Report,
) -> None:
    """One transaction for a sub-batch of results; retried whole if it loses a deadlock."""
    written = context.transact(
        lambda c: _write_copies_in(c, context, claim, operations, by_id, results)
    )
    for result, outcome in written:
        row = by_id[outcome.operation_id]
        report.note(operations[outcome.operation_id], outcome, row["size"], result.seconds)


def _write_copies_in(
    connection: Connection,
    context: Context,
    claim: Claim,
    operations: Mapping[uuid.UUID, Mapping[str, Any]],
    by_id: Mapping[uuid.UUID, Mapping[str, Any]],
    results: Sequence[CopyResult],
) -> list[tuple[CopyResult, queue.Outcome]]:
    now = context.clock()
    ids = [result.task.operation_id for result in results]
    held = queue.lock_claimed(connection, claim.token, ids)
    written: list[tuple[CopyResult, queue.Outcome]] = []
    good: list[catalogue.Seen] = []
    for result in results:
        operation = operations.get(result.task.operation_id)
        if operation is None or result.task.operation_id not in held:
            continue
        if result.error is None:
            row = by_id[result.task.operation_id]
            good.append(catalogue.Seen(row["uid"], row["size"], row["digest"]))
            written.append((result, done(operation)))
        else:
            written.append((result, _copy_failed(context, operation, result.error, now)))
    if good:
        catalogue.mark_ready(connection, good, now)
        oids = {by_id[outcome.operation_id]["oid"] for r, outcome in written if r.error is None}
        catalogue.resume_deletions(connection, list(oids), now)
    _write_suspects(connection, context, by_id, written, now)
    _give_up(connection, by_id, written, now)
    queue.finish_operations(connection, claim.token, [o for _, o in written], now)
    return written


def _copy_failed(
    context: Context, operation: Mapping[str, Any], error: DlmError, now: datetime
) -> queue.Outcome:
    if isinstance(error, SourceDamagedError | PayloadNotFoundError):
        # another source may be good: try it at once, the damaged one gets its second look
        due = now if operation["attempts"] < context.settings.max_attempts else None
        state = OperationState.QUEUED if due else OperationState.FAILED
        return queue.Outcome(operation["operation_id"], state, error.code, str(error), due)
    if isinstance(error, StorageFullError):
        # not worth waiting for: the planner chooses a storage that has room
        return queue.Outcome(
            operation["operation_id"], OperationState.FAILED, error.code, str(error)
        )
    return outcome_of_error(context, operation, error, now)


def _write_suspects(
    connection: Connection,
    context: Context,
    by_id: Mapping[uuid.UUID, Mapping[str, Any]],
    written: Sequence[tuple[CopyResult, queue.Outcome]],
    now: datetime,
) -> None:
    bad = [
        by_id[outcome.operation_id]
        for result, outcome in written
        if isinstance(result.error, SourceDamagedError | PayloadNotFoundError)
    ]
    if not bad:
        return
    turned = catalogue.mark_state(
        connection,
        [row["source_uid"] for row in bad],
        ReplicaState.SUSPECT,
        only_from=[ReplicaState.READY],
    )
    queue.insert_operations(
        connection,
        [
            queue.NewOperation(
                OperationKind.VERIFY,
                row["oid"],
                row["source_uid"],
                "a copy from it found it damaged or gone",
                now,
                priority=-1,
            )
            for row in {row["source_uid"]: row for row in bad}.values()
            if row["source_uid"] in turned
        ],
        context.actor,
        now,
    )


def _give_up(
    connection: Connection,
    by_id: Mapping[uuid.UUID, Mapping[str, Any]],
    written: Sequence[tuple[CopyResult, queue.Outcome]],
    now: datetime,
) -> None:
    """Replicas whose copy failed for good are MISSING, and their storage is left alone a while."""
    failed = [
        by_id[outcome.operation_id]["uid"]
        for _, outcome in written
        if outcome.state is OperationState.FAILED
    ]
    if failed:
        catalogue.mark_state(
            connection,
            failed,
            ReplicaState.MISSING,
            only_from=[ReplicaState.PENDING],
            excluded_until=now + _EXCLUSION,
        )
    retried = [
        (outcome.operation_id, by_id[outcome.operation_id]["source_uid"])
        for _, outcome in written
        if outcome.state is OperationState.QUEUED
    ]
    if retried:
        catalogue.note_sources(connection, retried)
