"""The one mechanism that stops a process anywhere: it counts commits and storage calls.

A point lies before and after everything that has an effect (a commit; a write, rename, removal or
flush on a storage), in the middle of what is no single step of the storage (a write, the removal of
a tree, the rename of an object), and before every call that only looks. Once stopped, nothing that
the process still does has an effect: threads and ``finally`` clauses find every door closed.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from dlm_core.storages.port import Storage
from tests.fakes import Wrapped

_LOOKS = ("stat", "stat_many", "walk", "open_read", "read_back", "usage", "check")
_EFFECTS = ("write", "rename", "remove", "flush")


class Crash(BaseException):
    """The process is lost here; no clause for errors of ours may catch it."""


def raise_crash() -> None:
    """Stop as if the process was lost, seen from within this one."""
    raise Crash


def kill_process() -> None:
    """Stop this very process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


class Points:
    """Counts the points that are passed; stops at number ``at`` (None: never), counted from 1."""

    def __init__(self, at: int | None = None, stop: Callable[[], None] = raise_crash) -> None:
        self.at, self.stop = at, stop
        self.names: list[str] = []
        self._stopped = False
        self._lock = threading.Lock()

    def reached(self, name: str) -> bool:
        """Count a point; True if it is the one to stop at, which the caller then does."""
        with self._lock:
            if self._stopped:
                raise Crash
            self.names.append(name)
            self._stopped = len(self.names) == self.at
            return self._stopped

    def passed(self, name: str) -> None:
        """Count a point, and stop there if it is the one."""
        if self.reached(name):
            self.stop()


class CrashingStorage(Wrapped):
    """A real storage whose calls are points."""

    def __init__(self, inner: Storage, points: Points) -> None:
        super().__init__(inner)
        self.points = points
        self.concurrency = 1  # so that the points come in the same order each time

    def __getattr__(self, attribute: str) -> Any:
        call = getattr(self.inner, attribute)
        if attribute in _LOOKS:
            return self._looking(attribute, call)
        return self._acting(attribute, call) if attribute in _EFFECTS else call

    def _looking(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any) -> Any:
            self.points.passed(f"{self.inner.name}: before {name}")
            return call(*arguments)

        return look

    def _acting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        half = getattr(self, f"_half_{name}", None)

        def act(*arguments: Any) -> Any:
            self.points.passed(f"{self.inner.name}: before {name}")
            if half is not None and self.points.reached(f"{self.inner.name}: in {name}"):
                half(*arguments)
                self.points.stop()
            result = call(*arguments)
            self.points.passed(f"{self.inner.name}: after {name}")
            return result

        return act

    def _half_write(self, path: str, source: Any, size: int) -> None:
        """The first half of the bytes is on the medium; an object appears whole or not at all."""
        if not getattr(self.inner, "atomic_write", False):
            data = source.read(size // 2)
            self.inner.write(path, io.BytesIO(data), len(data))

    def _half_remove(self, path: str) -> None:
        """One file of a tree is gone."""
        entry = self.inner.stat(path)
        if entry is not None and entry.kind == "directory":
            self.inner.remove(next(iter(self.inner.walk(path))).path)

    def _half_rename(self, source: str, destination: str) -> None:
        """An object store has copied the first object and not deleted it yet."""
        if not getattr(self.inner, "atomic_write", False):
            return
        entry = self.inner.stat(source)
        if entry is None or self.inner.stat(destination) is not None:
            return
        first = entry if entry.kind == "file" else next(iter(self.inner.walk(source)))
        with self.inner.open_read(first.path) as stream:
            data = stream.read(-1)
        self.inner.write(destination + first.path[len(source) :], io.BytesIO(data), len(data))


def watch_commits(engine: Engine, points: Points) -> None:
    """Make every commit on ``engine`` a point, and one that wrote something a second one: it is
    done, but its reply never comes."""
    commit = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        wrote = connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone()[0]
        points.passed("before commit")
        commit(connection)
        if wrote:
            points.passed("after commit")

    engine.dialect.do_commit = do_commit  # type: ignore[method-assign]
