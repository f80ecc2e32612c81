"""Replication: plan the copies that items need, and make them."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas as catalogue
from dlm_core.catalogue.paths import owner_inside, places_inside
from dlm_core.catalogue.traffic import limited_keys
from dlm_core.catalogue.urgency import STEP, Urgency, hasten, urgencies_of
from dlm_core.errors import (
    DlmError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
    SourceDamagedError,
    StagingFailedError,
    StorageFullError,
)
from dlm_core.lifecycle.copying import Copies
from dlm_core.lifecycle.decide import (
    Copy,
    Decision,
    ItemView,
    ReplicaView,
    Space,
    StorageView,
    decide_copies,
)
from dlm_core.lifecycle.paths import place_of
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import Claim, Context, Report, done, outcome_of_error
from dlm_core.transfers.mover import CopyResult
from dlm_core.types import (
    ItemState,
    OperationKind,
    OperationState,
    PayloadKind,
    ReplicaState,
    StorageMode,
    new_id,
)

_PLAN_BATCH = 2000
_IMPOSSIBLE_BASE = timedelta(seconds=30)
_IMPOSSIBLE_CEILING = timedelta(hours=6)
#: the first copy of what has but one goes before others of the same urgency
_RISK = -5


def storage_views(storage_rows: Iterable[Mapping[str, Any]]) -> dict[uuid.UUID, StorageView]:
    """The planner's view of storages' rows, free space taken up to the high watermark.

    With a capacity given, the catalogue's own count of bytes is what is used; else what the
    storage last told, and what is announced there since copies were planned. A storage that tells
    neither is taken as having room.
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
    if not row["observed_used_bytes"]:
        return row["observed_total_bytes"], row["used_bytes"]
    return row["observed_total_bytes"], row["observed_used_bytes"] + row["pending_bytes"]


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
    soon = context.clock() + context.settings.deadline_lead
    context.transact(lambda c: hasten(c, soon))
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
        planning = _begin(connection, taken, storages, context.clock())
        return [
            Proposal(item["uri"], copy, storages[copy.storage_id]["name"])
            for item in planning.items
            for copy in planning.decide(item).copies
        ]

    return context.rehearse(look)


def _plan_batch(connection: Connection, context: Context) -> int:
    now = context.clock()
    taken = catalogue.take_evaluations(connection, now, _PLAN_BATCH)
    if not taken:
        return 0
    planning = _begin(connection, taken, context.storages.load(connection), now)
    _apply(connection, context, planning)
    return len(taken)


@dataclass(slots=True)
class _Planning:
    """A batch of items that is planned: what is known of them, and what was decided."""

    items: Sequence[Mapping[str, Any]]
    replicas: Mapping[uuid.UUID, list[ReplicaView]]
    rows: Mapping[uuid.UUID, Mapping[str, Any]]
    views: Mapping[uuid.UUID, StorageView]
    space: Space
    tries: Mapping[uuid.UUID, int]
    now: datetime
    #: oids of items whose suspect copies wait for a first look
    waiting: Collection[uuid.UUID]
    #: why a storage has no place for an item, by oid and storage
    refused: dict[uuid.UUID, dict[uuid.UUID, str]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def decide(self, item: Mapping[str, Any]) -> Decision:
        oid = item["oid"]
        refused = self.refused.get(oid, {})
        looked = self.tries[oid] > 0 and oid not in self.waiting
        decision = decide_copies(
            ItemView(oid, item["state"], item["size"], item["target_phase"], looked),
            self.replicas[oid],
            {key: view for key, view in self.views.items() if key not in refused},
            self.space,
            self.now,
        )
        if decision.shortfall is None or not refused:
            return decision
        why = [f"{self.rows[key]['name']}: {reason}" for key, reason in refused.items()]
        return replace(decision, shortfall="; ".join([decision.shortfall, *why]))

    def place(self, item: Mapping[str, Any], storage_id: uuid.UUID) -> str | None:
        """Where a copy goes, or None: the storage's rules have no place for it."""
        row = self.rows[storage_id]
        try:
            return place_of(item["uri"], item["version"], row["interface"], row["path_rules"]).path
        except InvalidValueError as error:
            self.refused[item["oid"]][storage_id] = str(error)
            return None


def _begin(
    connection: Connection,
    taken: Mapping[uuid.UUID, int],
    storage_rows: Mapping[uuid.UUID, Mapping[str, Any]],
    now: datetime,
) -> _Planning:
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
    suspect = [
        oid for oid, views in by_item.items() if any(v.state == ReplicaState.SUSPECT for v in views)
    ]
    # after a rebuild of the catalogue a first look may take days to come
    waiting = catalogue.awaiting_first_look(connection, suspect) if suspect else set()
    views = storage_views(storage_rows.values())
    return _Planning(
        items, by_item, storage_rows, views, Space(views.values()), taken, now, waiting
    )


def _apply(connection: Connection, context: Context, planning: _Planning) -> None:
    decided: dict[uuid.UUID, tuple[Mapping[str, Any], Decision]] = {}
    pairs: list[tuple[Copy, uuid.UUID]] = []
    todo: Sequence[Mapping[str, Any]] = planning.items
    while todo:
        decisions = [(item, planning.decide(item)) for item in todo]
        decided |= {item["oid"]: (item, decision) for item, decision in decisions}
        made, without_place = _announce(connection, planning, decisions)
        pairs += made
        # again without the storages that have no place for them: so it ends
        todo = [item for item in todo if item["oid"] in without_place]
    if pairs:
        operations = _operations(connection, planning, pairs)
        queue.insert_operations(connection, operations, context.actor, planning.now)
    _write_phases(connection, [*decided.values()])
    lost = [oid for oid, (_, decision) in decided.items() if decision.search]
    if lost:
        reason = "no good copy of its item is known"
        request_verification(
            connection, actor=context.actor, now=planning.now, oids=lost, reason=reason
        )
    planned = {copy.oid for copy, _ in pairs}
    _look_again(connection, [*decided.values()], planned, planning.tries, planning.now)


def _operations(
    connection: Connection, planning: _Planning, pairs: Sequence[tuple[Copy, uuid.UUID]]
) -> list[queue.NewOperation]:
    """The copies to queue: by their items' urgency, and the first of an item that has only one
    good copy, or none, before those that make it safer still."""
    urgencies = urgencies_of(connection, [copy.oid for copy, _ in pairs])
    safe = {
        oid
        for oid, views in planning.replicas.items()
        if sum(view.state == ReplicaState.READY for view in views) > 1
    }
    operations = []
    for copy, uid in pairs:
        urgency = urgencies.get(copy.oid, Urgency())
        risk = 0 if copy.oid in safe else _RISK
        safe.add(copy.oid)
        operations.append(
            queue.NewOperation(
                OperationKind.COPY, copy.oid, uid, copy.reason, planning.now,
                priority=STEP * urgency.priority + risk, deadline=urgency.needed_by,
            )
        )  # fmt: skip
    return operations


def _announce(
    connection: Connection,
    planning: _Planning,
    decisions: Sequence[tuple[Mapping[str, Any], Decision]],
) -> tuple[list[tuple[Copy, uuid.UUID]], set[uuid.UUID]]:
    """Insert or renew the replicas that are to be made: those that were, and the items for some of
    which a storage has no place."""
    fresh: list[tuple[Copy, dict[str, Any]]] = []
    again: list[tuple[Copy, uuid.UUID]] = []
    homeless: set[uuid.UUID] = set()
    for item, decision in decisions:
        for copy in decision.copies:
            if copy.uid is not None:
                again.append((copy, copy.uid))
            elif (path := planning.place(item, copy.storage_id)) is None:
                homeless.add(copy.oid)
            else:
                fresh.append((copy, _record(copy, path)))
    trees = {item["oid"] for item, _ in decisions if item["kind"] == PayloadKind.DIRECTORY}
    inside = places_inside(connection, [record for _, record in fresh], trees)
    for record, owner in inside:
        # a deletion of the one would be the other's
        planning.refused[record["oid"]][record["storage_id"]] = (
            f"its place {record['path']} is inside that of {owner}"
        )
        homeless.add(record["oid"])
    refused = {record["uid"] for record, _ in inside}
    fresh = [(copy, record) for copy, record in fresh if record["uid"] not in refused]
    records = [record for _, record in fresh]
    made = catalogue.insert_pending(connection, records, planning.now) if records else set()
    remade = catalogue.remake_replicas(connection, [uid for _, uid in again]) if again else set()
    pairs: list[tuple[Copy, uuid.UUID]] = [
        (copy, record["uid"]) for copy, record in fresh if record["uid"] in made
    ]
    pairs += [(copy, uid) for copy, uid in again if uid in remade]
    for copy, uid in pairs:
        planning.replicas[copy.oid].append(ReplicaView(uid, copy.storage_id, ReplicaState.PENDING))
    rest = [record for record in records if record["uid"] not in made]
    for record, owner in catalogue.owners_of_places(connection, rest) if rest else ():
        planning.refused[record["oid"]][record["storage_id"]] = (
            f"its place {record['path']} is that of {owner}"
        )
        homeless.add(record["oid"])
    return pairs, homeless


def _record(copy: Copy, path: str) -> dict[str, Any]:
    return {
        "uid": new_id(), "oid": copy.oid, "storage_id": copy.storage_id, "path": path,
        "size": copy.size,
    }  # fmt: skip


def _write_phases(
    connection: Connection,
    decided: Sequence[tuple[Mapping[str, Any], Decision]],
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
    """Make the copies of a claim, by source and destination; results in sub-batches."""
    report = Report()
    operations = {op["operation_id"]: op for op in claim.operations}
    details, manifests, storages, limited = context.transact(lambda c: _load(c, context, claim))
    by_id = {row["operation_id"]: row for row in details}
    record = partial(_write_copies, context, claim, operations, by_id)
    copies = Copies(context, claim, storages, manifests, limited, record)
    settled: list[queue.Outcome] = []
    for row in details:
        refusal = _refuse(row, storages)
        if refusal is None:
            copies.links[row["source_storage_id"], row["storage_id"]].append(row)
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
    report.add(copies.make())
    return report


def _load(connection: Connection, context: Context, claim: Claim) -> tuple[Any, Any, Any, Any]:
    details = catalogue.copy_details(connection, [op["operation_id"] for op in claim.operations])
    directories = [row["oid"] for row in details if row["kind"] == PayloadKind.DIRECTORY]
    manifests = catalogue.manifests_of(connection, directories) if directories else {}
    return details, manifests, context.storages.load(connection), limited_keys(connection)


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
    oids: set[uuid.UUID] = set()
    partials: dict[uuid.UUID, str] = {}
    for result in results:
        operation = operations.get(result.task.operation_id)
        if operation is None or result.task.operation_id not in held:
            continue
        if result.partial is not None:
            partials[result.task.operation_id] = result.partial
        if result.stopped:
            continue  # given back untried with all that was not begun
        row = by_id[result.task.operation_id]
        if result.error is None and row["kind"] == PayloadKind.DIRECTORY:
            result = _unless_shared(connection, row, result)
        if result.error is None:
            good.append(catalogue.Seen(row["uid"], row["size"], row["digest"]))
            oids.add(row["oid"])
            written.append((result, done(operation)))
        else:
            several = row["sources"] > 1
            written.append((result, _copy_failed(context, operation, result.error, now, several)))
    if partials:
        queue.note_partials(connection, claim.token, partials)
    if good:
        catalogue.mark_ready(connection, good, now)
        catalogue.resume_deletions(connection, oids, now)
    _write_suspects(connection, context, by_id, written, now)
    _give_up(connection, by_id, written, now)
    queue.finish_operations(connection, claim.token, [o for _, o in written], now)
    return written


def _unless_shared(
    connection: Connection, row: Mapping[str, Any], result: CopyResult
) -> CopyResult:
    """A directory that was found there whole may be of files that are copies of other items."""
    found = owner_inside(connection, row["storage_id"], row["path"], row["oid"])
    return replace(result, error=PayloadExistsError(**found)) if found else result


def _copy_failed(
    context: Context, operation: Mapping[str, Any], error: DlmError, now: datetime, several: bool
) -> queue.Outcome:
    never_came = isinstance(error, StagingFailedError) and several
    if isinstance(error, SourceDamagedError | PayloadNotFoundError) or never_came:
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
    failed = [
        by_id[outcome.operation_id]["uid"]
        for _, outcome in written
        if outcome.state is OperationState.FAILED
    ]
    if failed:
        catalogue.give_up_copies(connection, failed, now)
    retried = [
        (outcome.operation_id, by_id[outcome.operation_id]["source_uid"])
        for _, outcome in written
        # who only waits for its source keeps it: another may have to be staged too
        if outcome.state is OperationState.QUEUED and outcome.counted
    ]
    if retried:
        catalogue.note_sources(connection, retried)
