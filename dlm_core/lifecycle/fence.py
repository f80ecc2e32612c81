"""What stands between a worker that wakes up late and bytes that are not its any more.

A storage takes a rename or a removal from anybody at any time. What keeps others off an operation
is its lease, and its row's lock as long as the transaction that took it lives: a worker that was
stopped, or whose connection was cut, may have lost both without knowing. So each single call that
moves or removes something is made either early in the lease, by two clocks, or after the database
has answered in the very transaction that holds the lock.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.clock import Clock, utc_now
from dlm_core.errors import CatalogueUnavailableError
from dlm_core.storages.port import Storage


class Fence:
    """Says before each effect whether the locks that ``connection`` took are still there.

    Until ``until`` by the ``clock`` and ``until_ticks`` by the monotonic one nobody else can have
    them, connection or no connection, which is not asked meanwhile. May be asked by many threads
    while nothing else uses the connection.
    """

    def __init__(
        self,
        connection: Connection,
        clock: Clock = utc_now,
        until: datetime | None = None,
        until_ticks: float = 0.0,
    ) -> None:
        self._connection, self._clock, self._lock = connection, clock, threading.Lock()
        # a clock that stands still while the machine is suspended does not say so, and one that is
        # set back does not tell the time: nothing is late by both
        self._until, self._until_ticks = until or clock(), until_ticks
        self._lost = False

    def pass_through(self) -> None:
        """Return if what is locked is still this worker's.

        Raises
        ------
        CatalogueUnavailableError
            if that cannot be told: then others may have it.
        """
        if not self._lost and self._clock() < self._until and time.monotonic() < self._until_ticks:
            return
        with self._lock:
            self._lost = self._lost or not queue.holds_locks(self._connection)
            self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """As :meth:`pass_through`, by what is known already."""
        if self._lost:
            raise CatalogueUnavailableError(
                reason="the connection that held the work's locks is gone",
                hint="nothing more was moved or removed, the work is done again",
            )

    def around(self, storage: Storage) -> Storage:
        """``storage``, whose renames and removals pass through here."""
        return cast(Storage, _Fenced(storage, self))


def fence(connection: Connection, clock: Clock, token: uuid.UUID, lease: timedelta) -> Fence:
    """A fence for what ``token`` has locked on ``connection``.

    Half of the ``lease`` is kept for what is on its way when the other half is over, and for the
    clocks of others that are not ours.
    """
    # before the question: who sleeps over the answer must not count his sleep as quiet
    asked, ticks = clock(), time.monotonic()
    quiet = queue.lease_left(connection, token, asked) - lease / 2
    return Fence(connection, clock, asked + quiet, ticks + quiet.total_seconds())


class _Fenced:
    """Passes everything on, what moves or removes bytes only through a fence."""

    def __init__(self, inner: Storage, fence_: Fence) -> None:
        self._inner, self._fence = inner, fence_

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "rename_many":
            raise AttributeError(attribute)  # one by one, each through the fence
        found = getattr(self._inner, attribute)
        return self._guarded(found) if attribute == "remove_file" else found

    def _guarded(self, remove_file: Callable[[str], None]) -> Callable[[str], None]:
        def remove(path: str) -> None:
            self._fence.pass_through()
            remove_file(path)

        return remove

    def rename(self, source: str, destination: str) -> None:
        self._fence.pass_through()
        self._inner.rename(source, destination)

    def remove(self, path: str) -> None:
        self._fence.pass_through()
        self._inner.remove(path)
