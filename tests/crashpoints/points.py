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
import time
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import Engine

from dlm_core.storages.port import Storage
from tests.fakes import Wrapped, refuse_batches

_LOOKS = ("stat", "stat_many", "walk", "open_read", "read_back", "usage", "check")
#: threads that read ahead of a write come as they like
_AHEAD = ("dlm-prefetch", "dlm-pack")
_NOTICED_SECONDS = 60
_AT_WORK = (
    "SELECT FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
)
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
        self.concurrency = inner.concurrency = (
            1  # so that the points come in the same order each time
        )

    def __getattr__(self, attribute: str) -> Any:
        refuse_batches(attribute)
        call = getattr(self.inner, attribute)
        if attribute in _LOOKS:
            return self._looking(attribute, call)
        return self._acting(attribute, call) if attribute in _EFFECTS else call

    def _looking(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any) -> Any:
            if threading.current_thread().name.startswith(_AHEAD):
                return call(*arguments)
            self.points.passed(f"{self.inner.name}: before {name}")
            return call(*arguments)

        return look

    def _acting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            self.points.passed(f"{self.inner.name}: before {name}")
            for label, half in self._halves(name):
                if self.points.reached(f"{self.inner.name}: {label}"):
                    half(*arguments)
                    self.points.stop()
            result = call(*arguments)
            self.points.passed(f"{self.inner.name}: after {name}")
            return result

        return act

    def _halves(self, name: str) -> list[tuple[str, Callable[..., None]]]:
        """What a crash may leave of a call that is no single step of this storage."""
        objects = getattr(self.inner, "atomic_write", False)
        if name == "remove":
            return [("in remove", self._one_removed)]
        if name == "rename" and objects:
            return [("early in rename", self._one_copied), ("late in rename", self._one_deleted)]
        return [("in write", self._half_written)] if name == "write" and not objects else []

    def _half_written(self, path: str, source: Any, size: int) -> None:
        data = source.read(size // 2)
        self.inner.write(path, io.BytesIO(data), len(data))

    def _one_removed(self, path: str) -> None:
        if len(files := self._files(path)) > 1:
            self.inner.remove(files[0])

    def _one_copied(self, source: str, destination: str) -> None:
        if self.inner.stat(destination) is None:
            for path in self._files(source)[:1]:
                self._copy(path, destination + path[len(source) :])

    def _one_deleted(self, source: str, destination: str) -> None:
        """All is copied, and the first of several sources deleted."""
        if self.inner.stat(destination) is None and len(files := self._files(source)) > 1:
            for path in files:
                self._copy(path, destination + path[len(source) :])
            self.inner.remove(files[0])

    def _files(self, path: str) -> list[str]:
        entry = self.inner.stat(path)
        if entry is None or entry.kind == "file":
            return [path] if entry else []
        return [one.path for one in self.inner.walk(path)]

    def _copy(self, source: str, destination: str) -> None:
        with self.inner.open_read(source) as stream:
            data = stream.read(-1)
        self.inner.write(destination, io.BytesIO(data), len(data))


def watch_commits(engine: Engine, points: Points) -> None:
    """Make every commit on ``engine`` a point, and one that wrote something a second one: it is
    done, but its reply never comes."""
    commit = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        if threading.current_thread().name == "dlm-traffic":
            # what is told every few seconds comes where it likes, and is no part of the work
            return commit(connection)
        wrote = connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone()[0]
        points.passed("before commit")
        commit(connection)
        if wrote:
            points.passed("after commit")
        return None

    engine.dialect.do_commit = do_commit  # type: ignore[method-assign]


def end_connections(engine: Engine) -> None:
    """Dispose of a stopped process's engine, and wait until the server has noticed: until then its
    last transaction keeps its locks, and who claims next passes over what it had."""
    engine.dispose()
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + _NOTICED_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(_AT_WORK).fetchone() is not None:
            if time.monotonic() > deadline:
                raise AssertionError("a transaction of a stopped process goes on")
            time.sleep(0.01)
