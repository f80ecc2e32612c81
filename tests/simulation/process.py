"""A process that can be stopped, disturbed and cut off at the points that it passes."""

from __future__ import annotations

import threading
from collections.abc import Callable

#: threads that read ahead of a write come as they like
_AHEAD = ("dlm-prefetch", "dlm-pack")


class Crash(BaseException):
    """The process is gone: whatever it would still do does not happen."""


class Process:
    """Points of one process: what is to happen at the one that counts."""

    def __init__(self) -> None:
        self.countdown: int | None = None
        self.event: Callable[[], None] = lambda: None
        self.dead = False
        #: in a transaction, whose locks others would wait for: here they would wait for ever
        self.locking = False
        self.patient = self.after = False
        #: its connection was cut: it may end with an error
        self.cut = False

    def arm(
        self, point: int, event: Callable[[], None], *, patient: bool = False, after: bool = False
    ) -> None:
        """Let ``event`` happen at the point with this number, counted from now; if it is
        ``patient``, not before the transaction in hand is over, and only when something on a
        storage has just been done if that is asked for."""
        self.countdown, self.event, self.patient, self.after = point, event, patient, after

    def point(self, *, after: bool = False) -> None:
        if self.dead:
            raise Crash
        if self.countdown is None or threading.current_thread().name.startswith(_AHEAD):
            return
        self.countdown -= 1
        late = (self.locking and self.patient) or (self.after and not after)
        if self.countdown < 0 and not late:
            self.countdown = None
            self.event()

    def crash(self) -> None:
        self.dead = True
        raise Crash
