"""The queue of file work: insert, claim with a lease, extend, finish. One statement a batch."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, exc, text

from dlm_core.catalogue.engine import KEY, copy_into, rows, run
from dlm_core.errors import InvalidValueError
from dlm_core.types import OperationKind, OperationState, encode_path, new_key


@dataclass(frozen=True, slots=True)
class NewOperation:
    """One operation to queue; ``uid`` is the replica it acts on or makes."""

    kind: OperationKind
    oid: uuid.UUID
    uid: uuid.UUID
    reason: str
    due_at: datetime
    plan_id: uuid.UUID | None = None
    priority: int = 0
    deadline: datetime | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one try of an operation ended.

    ``state`` is DONE, FAILED (for good) or QUEUED (again at ``due_at``); an error's code and text
    stay visible in every case.
    """

    operation_id: uuid.UUID
    state: OperationState
    error_code: str | None = None
    error: str | None = None
    due_at: datetime | None = None
    #: False if it only waited: this was no try
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off with full jitter, ``base`` to ``ceiling`` seconds."""

    base: float
    ceiling: float
    max_attempts: int

    def next_due(self, attempts: int, now: datetime) -> datetime | None:
        """When to try again after ``attempts`` tries, or None when enough is enough."""
        if attempts >= self.max_attempts:
            return None
        longest = min(self.ceiling, self.base * 2 ** max(attempts - 1, 0))
        return now + timedelta(seconds=random.uniform(longest / 2, longest))


_NEW = {
    "operation_id": KEY, "kind": "text", "oid": "uuid", "uid": "uuid", "reason": "text",
    "due_at": "timestamptz", "plan_id": "uuid", "priority": "int2",
    "deadline": "timestamptz", "actor": "text", "created_at": "timestamptz",
}  # fmt: skip


def insert_operations(
    connection: Connection, operations: Iterable[NewOperation], actor: str, now: datetime
) -> int:
    """Queue operations; the number queued."""
    records = [
        (new_key(), op.kind.value, op.oid, op.uid, op.reason, op.due_at, op.plan_id, op.priority,
         op.deadline, actor, now)
        for op in operations
    ]  # fmt: skip
    copy_into(connection, "operation", _NEW, records)
    return len(records)


def count_due(
    connection: Connection, kinds: Sequence[OperationKind], now: datetime, limit: int = 100_000
) -> int:
    """Operations to be claimed now, leases that ran out included; counting stops at ``limit``."""
    found = rows(
        connection,
        """SELECT count(*) AS n FROM (
             SELECT FROM operation WHERE state = 'QUEUED' AND kind = ANY(:kinds) AND due_at <= :now
             UNION ALL
             SELECT FROM operation WHERE state = 'RUNNING' AND lease_until < :now
                AND kind = ANY(:kinds)
             LIMIT :limit) due""",
        kinds=[kind.value for kind in kinds],
        now=now,
        limit=limit,
    )
    return int(found[0]["n"])


def list_due(
    connection: Connection, kind: OperationKind, now: datetime, limit: int
) -> list[dict[str, Any]]:
    """The first operations of a kind that would be claimed now: uri, storage, reason and bytes."""
    return rows(
        connection,
        """SELECT i.uri, s.name AS storage, o.reason, coalesce(r.size, i.size, 0) AS bytes
             FROM (SELECT * FROM operation
                    WHERE state = 'QUEUED' AND kind = :kind AND due_at <= :now
                    ORDER BY priority, due_at LIMIT :limit) o
             JOIN replica r USING (uid) JOIN storage s USING (storage_id)
             JOIN data_item i ON i.oid = r.oid ORDER BY o.priority, o.due_at, o.operation_id""",
        kind=kind.value,
        now=now,
        limit=limit,
    )


def workers(connection: Connection) -> list[str]:
    """Who has RUNNING operations: host and process, as :func:`claim_operations` was told."""
    found = rows(
        connection,
        "SELECT DISTINCT worker FROM operation WHERE state = 'RUNNING' AND worker IS NOT NULL",
    )
    return [row["worker"] for row in found]


def end_leases(connection: Connection, lost: Sequence[str], now: datetime) -> int:
    """Let the leases of workers that are lost run out now; how many."""
    return run(
        connection,
        """UPDATE operation SET lease_until = CAST(:now AS timestamptz) - interval '1 second'
            WHERE state = 'RUNNING' AND worker = ANY(:lost)""",
        lost=list(lost),
        now=now,
    )


def release_expired_leases(
    connection: Connection, kinds: Sequence[OperationKind], now: datetime, max_attempts: int
) -> list[dict[str, Any]]:
    """Make operations due again whose worker was lost: all of these, with their ``state``. Those
    that lost it at the last of ``max_attempts`` tries are FAILED: it may be they that end it."""
    return rows(
        connection,
        """UPDATE operation o
              SET state = CASE WHEN o.attempts < :most THEN 'QUEUED' ELSE 'FAILED' END,
                  finished_at = CASE WHEN o.attempts < :most THEN NULL
                                     ELSE CAST(:now AS timestamptz) END,
                  lease_token = NULL, lease_until = NULL, due_at = :now, error_code = 'DLM-600',
                  error = 'the lease of ' || coalesce(o.worker, '?') || ' ran out at '
                          || o.lease_until
            WHERE operation_id IN (
              SELECT operation_id FROM operation WHERE state = 'RUNNING' AND lease_until < :now
                 AND kind = ANY(:kinds) FOR UPDATE SKIP LOCKED)
           RETURNING o.operation_id, o.kind, o.oid, o.uid, o.state, o.error_code, o.error""",
        kinds=[kind.value for kind in kinds],
        now=now,
        most=max_attempts,
    )


_PICKY = """AND NOT EXISTS (
  SELECT FROM replica r WHERE r.uid = o.uid AND (
    r.storage_id = ANY(:avoid) OR r.size > CAST(:most AS bigint)))"""


@dataclass(frozen=True, slots=True)
class Share:
    """What one claim may take, so that others find work and memory suffices: ``few`` operations
    whatever their size, more as long as all have less than ``bytes``, and nothing once their
    payloads have ``files`` files."""

    few: int
    bytes: int
    files: int


#: tries of an operation after which a lost worker may be its doing
_DOUBTED = 2

# OFFSET 0: by index for each row, a join might read all replicas for a few operations
_WEIGHED = """
  SELECT due.*, coalesce(w.bytes, 0) AS bytes, coalesce(w.files, 1) AS files
    FROM due LEFT JOIN LATERAL (
      SELECT coalesce(r.size, i.size) AS bytes, CASE WHEN i.kind = 'directory' THEN (
               SELECT count(*) FROM manifest_file f WHERE f.oid = i.oid) END AS files
        FROM replica r JOIN data_item i USING (oid) WHERE r.uid = due.uid OFFSET 0) w ON true"""


def claim_operations(
    connection: Connection,
    kind: OperationKind,
    *,
    token: uuid.UUID,
    worker: str,
    limit: int,
    lease: timedelta,
    now: datetime,
    avoid: Sequence[uuid.UUID] = (),
    most_bytes: int | None = None,
    share: Share | None = None,
) -> list[dict[str, Any]]:
    """Claim up to ``limit`` due operations of a kind until ``now + lease``; commit before doing
    the work.

    What is first by priority, then by its due time, comes first. ``token`` is new for every claim:
    only who holds it can extend or finish. Left out are replicas on the storages ``avoid`` and
    those of more than ``most_bytes``, and what is more than a ``share``; without one all is taken.
    What has lost its worker again is claimed by itself: should it be that which ends workers, then
    others end with it no more.
    """
    share = share or Share(limit, 0, 2**62)
    picky = "" if not avoid and most_bytes is None else _PICKY
    return rows(
        connection,
        f"""WITH due AS MATERIALIZED (
             SELECT operation_id, uid, priority, due_at,
                    attempts >= :doubted AND error_code IS NOT DISTINCT FROM 'DLM-600' AS doubted
               FROM operation o
              WHERE state = 'QUEUED' AND kind = :kind AND due_at <= :now {picky}
              ORDER BY priority, due_at LIMIT :limit FOR UPDATE SKIP LOCKED),
           chosen AS MATERIALIZED (
             SELECT operation_id, row_number() OVER queue AS number,
                    doubted OR first_value(doubted) OVER queue AS alone,
                    sum(bytes) OVER queue AS bytes, sum(files) OVER queue - files AS files_before
               FROM ({_WEIGHED}) weighed
             WINDOW queue AS (ORDER BY priority, due_at, operation_id ROWS UNBOUNDED PRECEDING)),
           claimed AS (
             UPDATE operation o SET state = 'RUNNING', attempts = attempts + 1, worker = :worker,
                    lease_token = :token, lease_until = :until
               FROM chosen WHERE o.operation_id = chosen.operation_id
                AND (chosen.number <= :few OR chosen.bytes < :bytes)
                AND chosen.files_before < :files AND (chosen.number = 1 OR NOT chosen.alone)
             RETURNING o.operation_id, o.kind, o.oid, o.uid, o.reason, o.attempts, o.plan_id,
                       o.created_at, o.source_uid, o.error_code, o.priority, o.due_at)
           SELECT * FROM claimed ORDER BY priority, due_at, operation_id""",
        kind=kind.value,
        token=token,
        worker=worker,
        limit=limit,
        until=now + lease,
        now=now,
        few=share.few,
        bytes=share.bytes,
        files=share.files,
        doubted=_DOUBTED,
        **({"avoid": list(avoid), "most": most_bytes} if picky else {}),
    )


def extend_leases(connection: Connection, token: uuid.UUID, until: datetime) -> int:
    """Prolong what ``token`` still holds; 0 means that all is finished or lost."""
    return run(
        connection,
        "UPDATE operation SET lease_until = :until WHERE lease_token = :token AND state = 'RUNNING'",
        token=token,
        until=until,
    )


def release_operations(connection: Connection, token: uuid.UUID, now: datetime) -> int:
    """Give back what ``token`` holds, untried: an interrupted drainer's unfinished work."""
    return run(
        connection,
        """UPDATE operation SET state = 'QUEUED', lease_token = NULL, lease_until = NULL,
                  due_at = :now, attempts = greatest(attempts - 1, 0)
            WHERE lease_token = :token AND state = 'RUNNING'""",
        token=token,
        now=now,
    )


def note_partials(
    connection: Connection, token: uuid.UUID, partials: Mapping[uuid.UUID, str]
) -> int:
    """Write which temporary files tries of copies left, by operation; said by who holds them, so
    that nobody writes there any more."""
    return run(
        connection,
        """UPDATE operation o SET partial = u.partial
             FROM unnest(CAST(:ids AS uuid[]), CAST(:partials AS text[])) AS u(id, partial)
            WHERE o.operation_id = u.id AND o.lease_token = :token AND o.state = 'RUNNING'""",
        token=token,
        ids=list(partials),
        partials=list(partials.values()),
    )


def partials_on(connection: Connection, storage_id: uuid.UUID) -> set[str]:
    """Temporary files on a storage from which copies that are queued will go on."""
    found = rows(
        connection,
        """SELECT o.partial FROM operation o JOIN replica r USING (uid)
            WHERE o.partial IS NOT NULL AND o.state IN ('QUEUED', 'RUNNING')
              AND r.storage_id = :storage""",
        storage=storage_id,
    )
    return {row["partial"] for row in found}


def owned_on(
    connection: Connection, storage_id: uuid.UUID, paths: Sequence[str]
) -> dict[str, bool]:
    """Those of ``paths`` (as adapters take them) on a storage that are a replica's, or lie in one
    that is a directory, and whether a copy to it is queued or running."""
    above = {path: _it_and_above(path) for path in paths}
    found = rows(
        connection,
        """SELECT r.path, EXISTS (
                  SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'copy'
                     AND o.state IN ('QUEUED', 'RUNNING')) AS awaited
             FROM replica r WHERE r.storage_id = :storage AND r.path = ANY(:paths)
              AND r.owns_path""",
        storage=storage_id,
        paths=sorted({one for some in above.values() for one in some}),
    )
    awaited = {row["path"]: bool(row["awaited"]) for row in found}
    return {
        path: any(awaited.get(one, False) for one in some)
        for path, some in above.items()
        if not awaited.keys().isdisjoint(some)
    }


def _it_and_above(path: str) -> list[str]:
    try:
        parts = encode_path(path).split("/")
    except InvalidValueError:
        return []  # no path of ours
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def lock_claimed(
    connection: Connection, token: uuid.UUID, operation_ids: Sequence[uuid.UUID]
) -> set[uuid.UUID]:
    """Those of ``operation_ids`` that ``token`` still holds, locked to the end of the transaction.

    A worker whose lease ran out must write nothing: another may have claimed the operation.
    """
    wanted = set(operation_ids)
    held = """SELECT operation_id FROM operation WHERE operation_id = ANY(:ids)
                  AND lease_token = :token AND state = 'RUNNING' ORDER BY operation_id FOR UPDATE"""
    values = {"ids": list(wanted), "token": token}
    count = rows(connection, f"SELECT count(*) AS n FROM ({held}) held", **values)[0]["n"]
    # most often it is all of them, and to name each costs more than to count
    if count == len(wanted):
        return wanted
    return {row["operation_id"] for row in rows(connection, held, **values)}


def lease_left(connection: Connection, token: uuid.UUID, now: datetime) -> timedelta:
    """How long nobody else can claim any of what ``token`` holds; zero if it holds nothing."""
    found = rows(
        connection,
        """SELECT coalesce(min(lease_until), :now) - :now AS left_over FROM operation
            WHERE lease_token = :token AND state = 'RUNNING'""",
        token=token,
        now=now,
    )
    left: timedelta = found[0]["left_over"]
    return left


def holds_locks(connection: Connection) -> bool:
    """Whether the transaction that ``connection`` is in still lives, and all its locks with it:
    the server answers in it."""
    try:
        connection.execute(text("SELECT 1"))
    except exc.SQLAlchemyError:
        return False
    return True


def finish_operations(
    connection: Connection, token: uuid.UUID, outcomes: Sequence[Outcome], now: datetime
) -> int:
    """Write how operations ended; those that ``token`` no longer holds are left alone."""
    done = [outcome.operation_id for outcome in outcomes if _went_well(outcome)]
    rest = [outcome for outcome in outcomes if not _went_well(outcome)]
    finished = 0
    if done:
        finished += run(
            connection,
            """UPDATE operation SET state = 'DONE', error_code = NULL, error = NULL,
                      lease_token = NULL, lease_until = NULL, finished_at = :now
                WHERE operation_id = ANY(:ids) AND lease_token = :token AND state = 'RUNNING'""",
            token=token,
            now=now,
            ids=done,
        )
    return finished + (_finish_otherwise(connection, token, rest, now) if rest else 0)


def _went_well(outcome: Outcome) -> bool:
    return outcome.state is OperationState.DONE and outcome.error_code is None


def _finish_otherwise(
    connection: Connection, token: uuid.UUID, outcomes: Sequence[Outcome], now: datetime
) -> int:
    return run(
        connection,
        """UPDATE operation o SET state = u.state, error_code = u.code, error = u.error,
                  due_at = coalesce(u.due_at, o.due_at), lease_token = NULL, lease_until = NULL,
                  attempts = greatest(o.attempts - CASE WHEN u.counted THEN 0 ELSE 1 END, 0),
                  finished_at = CASE WHEN u.state = 'QUEUED' THEN NULL
                                     ELSE CAST(:now AS timestamptz) END
             FROM unnest(CAST(:ids AS uuid[]), CAST(:states AS text[]), CAST(:codes AS text[]),
                         CAST(:errors AS text[]), CAST(:dues AS timestamptz[]),
                         CAST(:counted AS boolean[]))
                  AS u(operation_id, state, code, error, due_at, counted)
            WHERE o.operation_id = u.operation_id AND o.lease_token = :token
              AND o.state = 'RUNNING'""",
        token=token,
        now=now,
        ids=[outcome.operation_id for outcome in outcomes],
        states=[outcome.state.value for outcome in outcomes],
        codes=[outcome.error_code for outcome in outcomes],
        errors=[outcome.error for outcome in outcomes],
        dues=[outcome.due_at for outcome in outcomes],
        counted=[outcome.counted for outcome in outcomes],
    )


@dataclass(frozen=True, slots=True)
class FailedSelector:
    """Which FAILED operations: all that are given have to match, None matches all."""

    kind: OperationKind | None = None
    storage_id: uuid.UUID | None = None
    oid: uuid.UUID | None = None
    error_code: str | None = None


_SELECTED = """
  o.state = 'FAILED' AND (CAST(:kind AS text) IS NULL OR o.kind = :kind)
  AND (CAST(:oid AS uuid) IS NULL OR o.oid = :oid)
  AND (CAST(:code AS text) IS NULL OR o.error_code = :code)
  AND (CAST(:storage AS uuid) IS NULL OR EXISTS (
    SELECT FROM replica r WHERE r.uid = o.uid AND r.storage_id = :storage))"""


def retry_failed(
    connection: Connection, now: datetime, selector: FailedSelector | None = None
) -> int:
    """Queue FAILED operations again, all or the selected ones, with their tries forgotten; how many.

    Of several of a kind on one replica the newest is, if none is queued or running, else two workers
    would do the same at once; the others are CANCELLED.
    """
    chosen = selector or FailedSelector()
    values = {
        "now": now,
        "kind": chosen.kind.value if chosen.kind else None,
        "storage": chosen.storage_id,
        "oid": chosen.oid,
        "code": chosen.error_code,
    }
    run(
        connection,
        f"""UPDATE operation o SET state = 'CANCELLED', finished_at = :now
             WHERE {_SELECTED} AND EXISTS (
               SELECT FROM operation x WHERE x.uid = o.uid AND x.kind = o.kind
                  AND (x.state IN ('QUEUED', 'RUNNING')
                       OR (x.state = 'FAILED' AND x.operation_id > o.operation_id
                           AND (CAST(:code AS text) IS NULL OR x.error_code = :code))))""",
        **values,
    )
    return run(
        connection,
        f"""UPDATE operation o SET state = 'QUEUED', attempts = 0, due_at = :now, finished_at = NULL
             WHERE {_SELECTED}""",
        **values,
    )


def cancel_overtaken(connection: Connection, now: datetime) -> int:
    """FAILED operations that nothing waits for any more are CANCELLED; how many.

    A later one of their kind did it, their replica is deleted, or it is MISSING and not missed:
    its item has what its target phase asks for.
    """
    return run(
        connection,
        """UPDATE operation o SET state = 'CANCELLED', finished_at = :now
            WHERE o.state = 'FAILED' AND (
                  EXISTS (SELECT FROM operation x WHERE x.uid = o.uid AND x.kind = o.kind
                             AND x.state = 'DONE' AND x.operation_id > o.operation_id)
               OR EXISTS (SELECT FROM replica r JOIN data_item i USING (oid) WHERE r.uid = o.uid
                             AND (r.state = 'DELETED'
                                  OR (r.state = 'MISSING' AND i.shortfall IS NULL))))""",
        now=now,
    )
