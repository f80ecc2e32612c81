"""Drainers: claim a batch, work on it, write the results, until nothing is due.

A job's operation calls :func:`drain` with what to plan and what to execute. Everything that a
drainer needs travels in one :class:`Context`.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self, cast

from sqlalchemy import Connection, Engine

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.engine import rows, transact
from dlm_core.catalogue.replicas import give_up_copies
from dlm_core.clock import Clock, utc_now
from dlm_core.errors import CatalogueError, DlmError, NotOnlineError, StorageUnavailableError
from dlm_core.lifecycle.traffic import Traffic
from dlm_core.settings import Settings
from dlm_core.storages.mark import OFFLINE, mark_of, must_show_something
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from dlm_core.types import OperationKind, OperationState, new_id

log = logging.getLogger("dlm")

#: how often progress is logged and leases are prolonged, as a share of the lease
_HEARTBEAT_SHARE = 0.25
_PROGRESS_SECONDS = 15.0
_POLL_SECONDS = 0.5
# while large copies go on, new work is looked for this often
_BUSY_SECONDS = 2.0
#: payloads above this many bytes are copied beside the others, each by itself
LARGE = 256 << 20
#: a claim of copies that takes longer is not waited for before the next one
_PATIENCE_SECONDS = 5.0
#: what a claim takes at most: tapes want many files asked for at once, however large they are
_SHARE = queue.Share(few=1000, bytes=16 << 30, files=1 << 18)
#: the first claim of a drainer takes no more, and the next twice as many: to look them up takes
#: about as long as the work on those before
_FIRST = 500
#: kinds of which another claim is taken while the last of one are at work
_BESIDE = (OperationKind.ADMIT, OperationKind.COPY)
#: deletions of a claim: after each the guard looks at how they went
_DELETIONS = 1000
_DELETING = (OperationKind.TRASH, OperationKind.PURGE)
#: when the mark of a storage that could not be reached is looked at again
_LOOK_AGAIN_SECONDS = 10.0
#: inode of the namespace that all processes of a machine are in (PROC_PID_INIT_INO of Linux)
_MACHINE = 0xEFFFFFFC
#: what the port asks of every storage
_CALLS = {name for name in vars(Storage) if not name.startswith("_")}
#: slowest and first failed operations that a report names
_SLOWEST = 10


class _Rehearsed(Exception):
    """Ends a dry run's transaction."""


@dataclass(slots=True)
class _Opened:
    stamp: str
    storage: Storage
    #: when its mark is looked at, in monotonic seconds
    look_from: float
    #: why it could not be looked at when that was tried last
    outage: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class StoragePool:
    """Open adapters by storage id, kept while the storage's row says the same.

    Parameters
    ----------
    opener : in place of the usual one; then marks are not looked at.
    """

    def __init__(self, opener: Callable[[Mapping[str, Any]], Storage] | None = None) -> None:
        self._opener, self._looks = opener or _open_row, opener is None
        self._open: dict[uuid.UUID, _Opened] = {}
        self._lock = threading.Lock()

    def load(self, connection: Connection) -> dict[uuid.UUID, dict[str, Any]]:
        """All storages' rows by id, with location, usage and free space; refreshes the adapters."""
        found = rows(
            connection,
            """SELECT s.*, l.name AS location, u.used_bytes, u.trashed_bytes,
                      phase_weight(s.phase) AS weight, t.*
                 FROM storage s JOIN location l USING (location_id)
                 JOIN storage_usage u USING (storage_id), LATERAL (
                   SELECT coalesce(sum(bytes) FILTER (WHERE state = 'PENDING'), 0)::bigint
                            AS pending_bytes,
                          sum(n) FILTER (WHERE state IN ('READY', 'SUSPECT')) AS there
                     FROM tally WHERE noun = 'replica' AND storage_id = s.storage_id) t""",
        )
        return {row["storage_id"]: row for row in found}

    def open(self, row: Mapping[str, Any]) -> Storage:
        """The adapter of a storage's row."""
        stamp = repr((row["interface"], row["root"], row["config"], row["concurrency"]))
        with self._lock:
            kept = self._open.get(row["storage_id"])
            if kept is None or kept.stamp != stamp:
                try:
                    storage = self._opener(row)
                except DlmError as error:
                    # it fails its operations one by one like one that is down, and must not stop
                    # the work on the others; not kept: the secret that it wants may come
                    return _unavailable(row, str(error))
                kept = _Opened(stamp, storage, 0.0 if self._looks and row["managed"] else math.inf)
                self._open[row["storage_id"]] = kept
        if kept.look_from == math.inf:
            return kept.storage
        # not under the lock of all: it may be waited for
        with kept.lock:
            return self._looked_at(row, kept)

    def _looked_at(self, row: Mapping[str, Any], kept: _Opened) -> Storage:
        """The adapter, once its mark was looked for and another's is not at its place: two disks
        that were swapped, or one that is not mounted, would have all their copies missing."""
        if time.monotonic() < kept.look_from:
            return _unavailable(row, kept.outage)
        try:
            mark = mark_of(kept.storage)
            if mark is None and row.get("there"):
                must_show_something(kept.storage)
        except StorageUnavailableError as error:
            # whoever wants it meanwhile need not wait for this each time
            kept.look_from = time.monotonic() + _LOOK_AGAIN_SECONDS
            kept.outage = str(error.details["message"])
            return _unavailable(row, kept.outage)
        except DlmError:
            mark = None  # its calls will tell
        if mark not in (None, OFFLINE, str(row["storage_id"])):
            message = f"the key of another storage is there ({mark}), of another disk or server"
            return _unavailable(row, message)
        kept.look_from = math.inf
        return kept.storage


class _Unavailable:
    """Stands for a storage that could not be opened: every call that each storage has says why, and
    it has none of the others."""

    concurrency = 1
    atomic_write = False
    remote = False
    tells_content = False
    part_size = None
    stager = None

    def __init__(self, name: str, message: str) -> None:
        self.name, self._message = name, message

    def __getattr__(self, attribute: str) -> Callable[..., Any]:
        if attribute not in _CALLS:
            raise AttributeError(attribute)

        def refuse(*_: object, **__: object) -> None:
            raise StorageUnavailableError(storage=self.name, message=self._message)

        return refuse


def _unavailable(row: Mapping[str, Any], message: str) -> Storage:
    return cast(Storage, _Unavailable(row["name"], message))


def _open_row(row: Mapping[str, Any]) -> Storage:
    storage = open_storage(row["name"], row["interface"], row["root"], row["config"])
    if row["concurrency"]:
        storage.concurrency = row["concurrency"]
    return storage


@dataclass(slots=True)
class Context:
    """What core functions with effects need; ``actor`` goes into every event they cause."""

    engine: Engine
    settings: Settings
    actor: str
    clock: Clock = utc_now
    storages: StoragePool = field(default_factory=StoragePool)
    stop: threading.Event = field(default_factory=threading.Event)
    worker: str = field(default_factory=lambda: f"{_processes()}:{os.getpid()}")
    #: what its drainer reads and writes now
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.traffic = Traffic(self.stop)

    def transact(self, work: Callable[[Connection], Any]) -> Any:
        """Run ``work(connection)`` in one transaction at this context's time.

        Raises
        ------
        ClockSkewError
            if that is this machine's, and not the catalogue server's by more than a quarter of a
            lease: two clocks that are both off are half a lease apart then, which fences bear.
        """
        # a simulated clock is nobody's
        tolerance = self.settings.lease / 4 if self.clock is utc_now else None
        return transact(self.engine, self.actor, work, self.clock(), tolerance)

    def rehearse(self, work: Callable[[Connection], Any]) -> Any:
        """Run ``work(connection)`` as :meth:`transact` does, then undo it: a dry run."""
        kept: list[Any] = []

        def look(connection: Connection) -> None:
            kept.append(work(connection))
            raise _Rehearsed

        try:
            self.transact(look)
        except _Rehearsed:
            pass
        return kept[-1]

    @property
    def backoff(self) -> queue.Backoff:
        s = self.settings
        return queue.Backoff(s.retry_base_seconds, s.retry_max_seconds, s.max_attempts)


@dataclass(frozen=True, slots=True)
class Claim:
    """A batch of operations that ``token`` holds; ``eased`` is set when part of the work has ended
    and others' could go on beside the rest."""

    token: uuid.UUID
    operations: Sequence[Mapping[str, Any]]
    eased: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Report:
    """What a drainer did, in aggregate; becomes the run's metadata."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    planned: int = 0
    bytes: int = 0
    seconds: float = 0.0
    #: (seconds, kind, oid) of the slowest operations, slowest first
    slowest: list[tuple[float, str, str]] = field(default_factory=list)
    #: (kind, error, oid) of the first operations that FAILED
    first_failures: list[tuple[str, str, str]] = field(default_factory=list)

    def note(
        self, operation: Mapping[str, Any], outcome: queue.Outcome, size: int, seconds: float
    ) -> None:
        """Count one operation that ended."""
        if outcome.state is OperationState.DONE:
            self.done[operation["kind"]] += 1
            self.bytes += size
        else:
            causes = self.failed if outcome.state is OperationState.FAILED else self.retried
            causes[outcome.error_code or "DLM-000"] += 1
            if causes is self.failed and len(self.first_failures) < _SLOWEST:
                error = f"{outcome.error_code}: {outcome.error}"
                self.first_failures.append((operation["kind"], error, str(operation["oid"])))
        if len(self.slowest) < _SLOWEST or seconds > self.slowest[-1][0]:
            slow = (seconds, operation["kind"], str(operation["oid"]))
            self.slowest = sorted([*self.slowest, slow], reverse=True)[:_SLOWEST]

    def add(self, other: Report) -> None:
        """Add another report to this one."""
        self.done += other.done
        self.failed += other.failed
        self.retried += other.retried
        self.planned += other.planned
        self.bytes += other.bytes
        self.slowest = sorted([*self.slowest, *other.slowest], reverse=True)[:_SLOWEST]
        self.first_failures = [*self.first_failures, *other.first_failures][:_SLOWEST]

    @property
    def total(self) -> int:
        return sum(self.done.values()) + sum(self.failed.values()) + sum(self.retried.values())


Executor = Callable[[Context, Claim], Report]
Planner = Callable[[Context], int]
#: looks at what was done so far, after each batch; ends the drainer by raising
Guard = Callable[[Context, Report], None]


def outcome_of_error(
    context: Context, operation: Mapping[str, Any], error: DlmError, now: datetime
) -> queue.Outcome:
    """Classify a failure: retryable ones are due again after a back-off, others FAILED at once.

    Waiting for files to be staged is no try, however long it lasts: its deadline ends it.
    """
    if isinstance(error, NotOnlineError) and error.poll_seconds is not None:
        again = now + timedelta(seconds=error.poll_seconds)
        queued, text = OperationState.QUEUED, str(error)[:2000]
        return queue.Outcome(
            operation["operation_id"], queued, error.code, text, again, counted=False
        )  # fmt: skip
    due = context.backoff.next_due(operation["attempts"], now) if error.retryable else None
    state = OperationState.QUEUED if due else OperationState.FAILED
    return queue.Outcome(operation["operation_id"], state, error.code, str(error)[:2000], due)


def done(operation: Mapping[str, Any]) -> queue.Outcome:
    """The outcome of an operation that did what it should."""
    return queue.Outcome(operation["operation_id"], OperationState.DONE)


def put_off(
    context: Context, operation: Mapping[str, Any], storage: Mapping[str, Any]
) -> queue.Outcome:
    """The outcome of an operation that its storage's mode does not allow now; no try of it."""
    due = context.clock() + timedelta(seconds=context.settings.retry_base_seconds * 12)
    text = f"storage {storage['name']} is {storage['mode']}"
    return queue.Outcome(
        operation["operation_id"], OperationState.QUEUED, "DLM-504", text, due, counted=False
    )


def drain(
    context: Context,
    executors: Mapping[OperationKind, Executor],
    planner: Planner | None = None,
    *,
    guard: Guard | None = None,
    linger_seconds: float = 0.0,
    most_seconds: float = math.inf,
) -> Report:
    """Plan and execute until dry, then wait ``linger_seconds`` for new work before ending.

    Several drainers may run at once, on several machines: an operation is claimed by one of them.
    ``planner`` turns due catalogue work into operations and returns how much it planned; what
    ``guard`` raises after a batch ends the drainer. After ``most_seconds`` it takes nothing more
    and ends what it has. When ``context.stop`` is set it gives back what it has not begun and
    returns. The report's seconds end with the last work, so that rates don't tell of the waiting.
    """
    report, begun = Report(), time.monotonic()
    last_work = last_log = begun
    with context.traffic.telling(context), _Crew(context, executors) as crew:
        while not context.stop.is_set():
            late = time.monotonic() - begun >= most_seconds
            planned = planner(context) if planner and not late else 0
            batch = crew.some() if late else crew.work()
            report.planned += planned
            report.add(batch)
            if guard is not None:
                guard(context, report)
            now = time.monotonic()
            if planned or batch.total or crew.busy:
                last_work = now
            elif late or now - last_work >= linger_seconds:
                break
            else:
                context.stop.wait(min(_POLL_SECONDS, linger_seconds))
            if now - last_log >= _PROGRESS_SECONDS:
                last_log = now
                log.info(progress_line(report, now - begun))
        report.add(crew.rest())
    report.seconds = last_work - begun
    return report


def progress_line(report: Report, seconds: float) -> str:
    """One line for the log."""
    done_text = ", ".join(f"{n} {kind}" for kind, n in sorted(report.done.items())) or "nothing"
    rate = report.bytes / 1e6 / seconds if seconds else 0.0
    return (
        f"done: {done_text}; {report.bytes / 1e6:.1f} MB at {rate:.1f} MB/s; "
        f"to be tried again: {sum(report.retried.values())}; failed: {sum(report.failed.values())}"
    )


class _Crew:
    """Claims and executes, kind by kind; copies of several claims go on beside each other, and so
    do the last admissions of one and the first of the next.

    While a claim of copies takes long (one huge file, a slow storage), others are taken beside it:
    nothing more for the storages that have work in hand, and the last of them no large payloads, so
    that small ones always find a way.
    """

    def __init__(self, context: Context, executors: Mapping[OperationKind, Executor]) -> None:
        self._context, self._executors = context, executors
        self._at_once = context.settings.links_at_once
        self._pool = ThreadPoolExecutor(self._at_once, "dlm-claim")
        self._going: set[Future[Report]] = set()
        self._next = dict.fromkeys(_BESIDE, _FIRST)

    @property
    def busy(self) -> bool:
        """Whether claims are still being worked on."""
        return bool(self._going)

    def work(self) -> Report:
        """A claim of each kind; what is returned is of claims that have ended."""
        report, kinds, context = self._ended(), list(self._executors), self._context
        for lost in context.transact(lambda c: _release_lost(c, context, kinds)):
            outcome = queue.Outcome(
                lost["operation_id"], OperationState.FAILED, lost["error_code"], lost["error"]
            )
            report.note(lost, outcome, 0, 0.0)
        for kind, execute in self._executors.items():
            if kind in _BESIDE and self._at_once > 1:
                self._take_on(kind, execute)
                report.add(self._ended())
            elif claim := self._claim(kind):
                report.add(self._execute(claim, execute))
            if context.stop.is_set():
                break
        return report

    def some(self) -> Report:
        """Of the claims that go on, those that end within a moment; none is taken."""
        wait(self._going, _BUSY_SECONDS, FIRST_COMPLETED)
        return self._ended()

    def rest(self) -> Report:
        """Of the claims that go on, once they have ended."""
        wait(self._going)
        return self._ended()

    def _take_on(self, kind: OperationKind, execute: Executor) -> None:
        if len(self._going) < self._at_once and (claim := self._claim(kind)):
            future = self._pool.submit(self._execute, claim, execute)
            self._going.add(future)
            future.add_done_callback(lambda _: claim.eased.set())
            # copies to another storage need not wait for a slow one
            claim.eased.wait(_PATIENCE_SECONDS if kind is OperationKind.COPY else None)
        elif self._going:
            wait(self._going, _BUSY_SECONDS, FIRST_COMPLETED)

    def _ended(self) -> Report:
        report = Report()
        ended = {future for future in self._going if future.done()}
        self._going -= ended
        for future in ended:
            report.add(future.result())
        return report

    def _claim(self, kind: OperationKind) -> Claim | None:
        context, token = self._context, new_id()
        last = self._at_once > 1 and len(self._going) == self._at_once - 1
        limit = context.settings.batch_size
        if kind in self._next:
            limit = min(limit, self._next[kind])
            self._next[kind] = 2 * limit

        def claim(connection: Connection) -> list[dict[str, Any]]:
            return queue.claim_operations(
                connection,
                kind,
                token=token,
                worker=context.worker,
                limit=min(limit, _DELETIONS) if kind in _DELETING else limit,
                share=_SHARE,
                lease=context.settings.lease,
                now=context.clock(),
                avoid=context.traffic.filled(),
                most_bytes=LARGE if last else None,
            )

        operations = context.transact(claim)
        return Claim(token, operations) if operations else None

    def _execute(self, claim: Claim, execute: Executor) -> Report:
        with _holding(self._context, claim.token) as held:
            report = execute(self._context, claim)
            held.left = report.total != len(claim.operations)
            return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What goes on is waited for; it is asked to stop if this ends with an error."""
        stop = self._context.stop
        ask = kind is not None and not stop.is_set()
        if ask:
            stop.set()
        self._pool.shutdown()
        if ask:
            stop.clear()


def _release_lost(
    connection: Connection, context: Context, kinds: Sequence[OperationKind]
) -> list[dict[str, Any]]:
    """Make lost workers' operations due again; those that FAILED by it."""
    now = context.clock()
    lost = queue.release_expired_leases(connection, kinds, now, context.settings.max_attempts)
    failed = [one for one in lost if one["state"] == OperationState.FAILED]
    copies = [one["uid"] for one in failed if one["kind"] == OperationKind.COPY]
    if copies:
        give_up_copies(connection, copies, now)
    return failed


def end_lost_leases(context: Context) -> int:
    """Make due what workers of this machine had whose process is gone: who starts again here need
    not wait until their leases run out. How many operations those are."""
    here = _processes()

    def end(connection: Connection) -> int:
        gone = [
            worker
            for worker in queue.workers(connection)
            if worker.rpartition(":")[0] == here and not _runs(worker.rpartition(":")[2])
        ]
        return queue.end_leases(connection, gone, context.clock()) if gone else 0

    ended: int = context.transact(end)
    return ended


def _processes() -> str:
    """Where a process' number means something: a machine, or a container on one, which may have the
    machine's name, or that of another container."""
    try:
        inode = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no Linux
        inode = _MACHINE
    host = socket.gethostname()
    return host if inode == _MACHINE else f"{host}/{inode}"


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@dataclass(slots=True)
class _Held:
    """Whether any of a claim may be unfinished."""

    left: bool = True


@contextmanager
def _holding(context: Context, token: uuid.UUID) -> Iterator[_Held]:
    """Keep the leases of ``token`` alive, and give back what is left of them, whatever happens."""
    held = _Held()
    try:
        with _heartbeat(context, token):
            yield held
    finally:
        try:
            if held.left:
                context.transact(lambda c: queue.release_operations(c, token, context.clock()))
        except CatalogueError as error:
            log.warning("operations not given back, their leases will run out: %s", error)


@contextmanager
def _heartbeat(context: Context, token: uuid.UUID) -> Iterator[None]:
    """Prolong the leases of ``token`` while the work goes on, so that only a lost worker's end."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(context.settings.lease_seconds * _HEARTBEAT_SHARE):
            try:
                context.transact(
                    lambda c: queue.extend_leases(
                        c, token, context.clock() + context.settings.lease
                    )
                )
            except DlmError as error:
                # the lease may run out; then the operation is done again, which is harmless
                log.warning("leases not prolonged: %s", error)

    thread = threading.Thread(target=beat, name="dlm-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
