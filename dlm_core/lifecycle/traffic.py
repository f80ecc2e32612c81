"""What a drainer reads and writes at this moment: its share of limits, and its progress.

Every few seconds a drainer that is at work tells what it uses and how far it is, and learns its
share of what is limited; so a limit holds for all of them, and a change reaches those at work.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dlm_core.catalogue import traffic as catalogue
from dlm_core.catalogue.engine import transact
from dlm_core.errors import DlmError
from dlm_core.storages.port import Storage
from dlm_core.transfers.throttle import Pace, Slots, Taker, Watched, paced
from dlm_core.types import new_id

if TYPE_CHECKING:
    from dlm_core.lifecycle.work import Context

log = logging.getLogger("dlm")

_BEAT_SECONDS = 2.0
_LOG_SECONDS = 15.0
#: operations that a drainer tells of at most
_TOLD = 64
# of what is smaller nothing is told
_SMALL = 1 << 20
_ANYWHERE: AbstractContextManager[None] = nullcontext()


@dataclass(slots=True)
class _Running:
    """How far an operation is; ``step`` is copy or check."""

    total: int
    since: datetime
    step: str
    done: int = 0


class Traffic:
    """Of one drainer; for all its threads."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._lock, self._telling = stop, threading.Lock(), threading.Lock()
        self._id, self._told = new_id(), False
        self._slots = Slots(stop)
        self._paces: dict[str, Pace] = {}
        self._users: Counter[str] = Counter()
        self._running: dict[uuid.UUID, _Running] = {}
        self._filled: Counter[uuid.UUID] = Counter()
        #: bytes that came through since the drainer began
        self.moved_bytes = 0

    # --- limits ----------------------------------------------------------------------------------

    @contextmanager
    def using(self, context: Context, keys: Sequence[str], *, limited: bool) -> Iterator[None]:
        """Count as a user of ``keys`` (see :mod:`dlm_core.catalogue.traffic`); where something is
        ``limited`` by now, the share is known before anything is read."""
        with self._lock:
            self._users.update(keys)
        try:
            if limited:
                self.tell(context)
            yield
        finally:
            with self._lock:
                self._users.subtract(keys)
                self._users = +self._users

    @contextmanager
    def filling(self, storage_id: uuid.UUID | None) -> Iterator[Callable[[], None]]:
        """Work of its own for a storage is in hand: no more is claimed for it meanwhile, or until
        what is yielded is called."""
        left = [storage_id] if storage_id else []

        def over() -> None:
            with self._lock:
                self._filled.subtract(left)
                left.clear()

        with self._lock:
            self._filled.update(left)
        try:
            yield over
        finally:
            over()

    def filled(self) -> list[uuid.UUID]:
        """Storages that have work in hand."""
        with self._lock:
            return [key for key, count in self._filled.items() if count > 0]

    @property
    def limited(self) -> bool:
        """Whether the files at once are limited anywhere that this drainer is at work."""
        return self._slots.limited

    def limits(self, keys: Sequence[str]) -> bool:
        """Whether the files at once are limited under one of ``keys``."""
        return self._slots.limits(keys)

    def pace(self, key: str) -> Pace:
        """The pace of a storage or link, for whatever is read or written there."""
        with self._lock:
            return self._paces.setdefault(key, Pace(None, self._stop))

    def places(self, keys: Sequence[str], size: int) -> AbstractContextManager[None]:
        """One file of ``size`` bytes is at work under all of ``keys``; small ones are only counted
        while something is limited: they are done before a limit that is set now could matter."""
        if size <= _SMALL and not self._slots.limited:
            return _ANYWHERE
        return self._slots.held(keys)

    # --- progress --------------------------------------------------------------------------------

    def moved(self, context: Context, key: uuid.UUID, total: int, step: str, size: int) -> None:
        """``size`` more bytes of an operation of ``total`` are done in this step of it."""
        with self._lock:
            self.moved_bytes += size
            running = self._running.get(key)
            if running is None or running.step != step:
                running = self._running[key] = _Running(total, context.clock(), step)
            running.done += size

    def ended(self, key: uuid.UUID) -> None:
        """An operation is no longer at work."""
        with self._lock:
            self._running.pop(key, None)

    def lines(self, now: datetime) -> list[str]:
        """Of the operations with most bytes, a line each for the log."""
        with self._lock:
            largest = sorted(self._running.items(), key=lambda one: -one[1].total)[:5]
        return [_line(key, running, now) for key, running in largest]

    # --- telling ---------------------------------------------------------------------------------

    def tell(self, context: Context) -> None:
        """Write what is done now, and go on by what is learnt."""
        # one at a time: what is applied last was asked last
        with self._telling:
            self._tell(context)

    def _tell(self, context: Context) -> None:
        with self._lock:
            users, running = list(self._users), self._listed()
        if not users and not running:
            self._forget(context)
            return
        used = self._slots.used()
        now = context.clock()
        uses = {key: used.get(key, 0) for key in users}
        # not in the context's own transaction: this is no step of its work
        shares = transact(
            context.engine,
            context.actor,
            lambda c: catalogue.beat(c, self._id, context.worker, uses, running, now),
            now,
        )
        self._told = True
        self._apply(shares)

    def _listed(self) -> list[dict[str, Any]]:
        largest = sorted(self._running.items(), key=lambda one: -one[1].total)[:_TOLD]
        return [
            {
                "operation_id": str(key), "step": one.step, "done_bytes": one.done,
                "total_bytes": one.total, "since": one.since.isoformat(),
            }
            for key, one in largest
        ]  # fmt: skip

    def _apply(self, shares: dict[str, catalogue.Share]) -> None:
        for key, share in shares.items():
            self.pace(key).set(share.bytes_per_second)
        self._slots.set({key: one.places for key, one in shares.items() if one.places is not None})

    @contextmanager
    def telling(self, context: Context) -> Iterator[None]:
        """Tell every few seconds for as long as it lasts, and log the progress."""
        over = threading.Event()
        thread = threading.Thread(
            target=self._tell_until, args=(context, over), name="dlm-traffic", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._forget(context)

    def _tell_until(self, context: Context, over: threading.Event) -> None:
        last_log = time.monotonic()
        while not over.wait(_BEAT_SECONDS):
            try:
                self.tell(context)
            except DlmError as error:
                # as before with the limits known so far
                log.warning("limits not looked at, progress not told: %s", error)
            if time.monotonic() - last_log >= _LOG_SECONDS:
                last_log = time.monotonic()
                for line in self.lines(context.clock()):
                    log.info(line)

    def _forget(self, context: Context) -> None:
        if not self._told:
            return
        now = context.clock()
        try:
            transact(
                context.engine, context.actor, lambda c: catalogue.forget(c, self._id, now), now
            )
            self._told = False
        except DlmError as error:
            log.warning("the end of this drainer was not told, it is taken for lost: %s", error)


def _line(key: uuid.UUID, running: _Running, now: datetime) -> str:
    seconds = max((now - running.since).total_seconds(), 1e-3)
    return (
        f"running: {running.step} of operation {key}, {running.done / 1e6:.1f} of "
        f"{running.total / 1e6:.1f} MB at {running.done / 1e6 / seconds:.1f} MB/s"
    )


@contextmanager
def pacing(context: Context, row: Mapping[str, Any]) -> Iterator[Pace]:
    """The pace of the storage of a row, of which one is a user meanwhile."""
    key = catalogue.storage_key(row["storage_id"])
    limited = bool(row["max_bytes_per_second"] or row["max_concurrency"])
    with context.traffic.using(context, [key], limited=limited):
        yield context.traffic.pace(key)


@contextmanager
def reading_from(context: Context, row: Mapping[str, Any], *more: Taker) -> Iterator[Storage]:
    """The storage of a row, read no faster than its limit and ``more`` let."""
    with pacing(context, row) as pace:
        yield paced(context.storages.open(row), [pace, *more])


def looking_at(
    context: Context, storage: Storage, target: Mapping[str, Any]
) -> AbstractContextManager[Storage]:
    """Hold a place on the storage of ``target`` (storage_id, operation_id, size), and tell of the
    reading if it is large.

    Raises
    ------
    Interrupted
    """
    size = target["size"] or 0
    if size <= _SMALL and not context.traffic.limited:
        return nullcontext(storage)
    return _looking_at(context, storage, target, size)


@contextmanager
def _looking_at(
    context: Context, storage: Storage, target: Mapping[str, Any], size: int
) -> Iterator[Storage]:
    traffic, key = context.traffic, target["operation_id"]

    def moved(block: int) -> None:
        traffic.moved(context, key, size, "check", block)

    with traffic.places([catalogue.storage_key(target["storage_id"])], size):
        try:
            yield storage if size <= _SMALL else paced(storage, [Watched(moved)])
        finally:
            traffic.ended(key)
