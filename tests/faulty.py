"""Storages that lie, lag and fail: one wrapper around any real adapter, seeded and replayable.

A fault strikes by script (``arm``: the next n calls that it concerns) or by chance (``rates``,
drawn from one seeded generator). With none of either the wrapper keeps the port's contract like
the adapter that it wraps. ``struck`` tells what struck where, so a story can be told again.
"""

from __future__ import annotations

import io
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from dlm_core.errors import AccessDeniedError, StorageFullError, StorageUnavailableError
from dlm_core.storages.port import Entry, Storage
from tests.fakes import Wrapped, refuse_batches


class Fault(StrEnum):
    """What may go wrong on a storage; docs/faults.md says what the DLM does then."""

    LISTING_INCOMPLETE = "a listing leaves something out"
    LISTING_STALE = "a listing shows what was, not what is"
    GHOST = "stat says present though it is gone"
    DELETE_REPLY_LOST = "a removal is done, its reply is lost"
    DELETE_NOT_DONE = "a removal is said to be done and is not"
    RENAME_NOT_DONE = "a rename is said to be done and is not"
    WRITE_CUT_SHORT = "a write ends short without an error"
    BIT_FLIPPED = "a bit flips at rest"
    READ_DIFFERS_ONCE = "a read gives other bytes once"
    PERMISSION_LOST = "permission is lost"
    FULL = "the disk is full"
    TIMEOUT = "so slow that the call times out"
    GONE = "the whole storage is gone"
    CLOCK_SKEW = "the storage's clock is wrong"


class Faulty(Wrapped):
    """A real storage with faults put in.

    Parameters
    ----------
    seed : of the generator that all chance is drawn from
    rates : probability of a fault for each call that it concerns
    skew : seconds that the storage's clock is ahead while CLOCK_SKEW strikes
    """

    def __init__(
        self,
        inner: Storage,
        seed: int = 0,
        rates: Mapping[Fault, float] | None = None,
        skew: float = 0.0,
    ) -> None:
        super().__init__(inner)
        self.rates, self.skew = dict(rates or {}), skew
        self.struck: list[tuple[Fault, str]] = []
        self._random = random.Random(seed)
        self._armed: dict[Fault, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._listings: dict[str, list[Entry]] = {}
        self._ghosts: dict[str, Entry] = {}
        self._misread: set[str] = set()

    def arm(self, fault: Fault, times: float = 1, only: str = "") -> None:
        """Let a fault strike the next ``times`` calls whose path has ``only`` in it."""
        self._armed[fault] = (times, only)

    def heal(self) -> None:
        """No fault strikes any more; what it did stays done."""
        self._armed.clear()
        self.rates.clear()

    def strikes(self, fault: Fault, path: str = "") -> bool:
        """Whether a fault strikes this call."""
        with self._lock:
            times, only = self._armed.get(fault, (0, ""))
            rate = self.rates.get(fault, 0.0)
            hit = (times > 0 and only in path) or (rate > 0 and self._random.random() < rate)
            if hit:
                self.struck.append((fault, path))
                self._armed[fault] = (times - 1, only)
            return hit

    def _reach(self, path: str) -> None:
        if self.strikes(Fault.GONE, path):
            raise StorageUnavailableError(storage=self.inner.name, message="no route to host")
        if self.strikes(Fault.PERMISSION_LOST, path):
            raise AccessDeniedError(storage=self.inner.name, path=path, message="denied")

    def _reply(self, path: str) -> None:
        """The call was made; its reply may come too late."""
        if self.strikes(Fault.TIMEOUT, path):
            time.sleep(0.01)
            raise StorageUnavailableError(storage=self.inner.name, message="timed out")

    # --- looking ---------------------------------------------------------------------------------

    def check(self) -> None:
        self._reach("")
        self.inner.check()

    def usage(self) -> Any:
        self._reach("")
        return self.inner.usage()

    def stat(self, path: str) -> Entry | None:
        self._reach(path)
        self._reply(path)
        return self._told(path, self.inner.stat(path))

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        self._reach("")
        self._reply("")
        found = self.inner.stat_many(paths)
        return {path: self._told(path, entry) for path, entry in found.items()}

    def _told(self, path: str, entry: Entry | None) -> Entry | None:
        if entry is not None:
            self._ghosts[path] = entry
            return self._skewed(entry)
        known = self._ghosts.get(path)
        return known if known is not None and self.strikes(Fault.GHOST, path) else None

    def _skewed(self, entry: Entry) -> Entry:
        if self.skew and self.strikes(Fault.CLOCK_SKEW, entry.path):
            return replace(entry, mtime=entry.mtime + self.skew)
        return entry

    def walk(self, path: str = "") -> Iterator[Entry]:
        self._reach(path)
        entries = list(self.inner.walk(path))
        if path in self._listings and self.strikes(Fault.LISTING_STALE, path):
            entries = self._listings[path]
        self._listings[path] = entries
        if entries and self.strikes(Fault.LISTING_INCOMPLETE, path):
            left_out = self._random.randrange(len(entries))
            entries = entries[:left_out] + entries[left_out + 1 :]
        return map(self._skewed, entries)

    def open_read(self, path: str) -> Any:
        return self._open(self.inner.open_read, path)

    def __getattr__(self, attribute: str) -> Any:
        refuse_batches(attribute)
        found = getattr(self.inner, attribute)
        # not of every adapter: the mover asks whether it is there
        return (lambda path: self._open(found, path)) if attribute == "read_back" else found

    def _open(self, call: Any, path: str) -> Any:
        self._reach(path)
        self._reply(path)
        stream = call(path)
        if path in self._misread:
            self._misread.discard(path)  # once: the next read of the same is right
        elif self.strikes(Fault.READ_DIFFERS_ONCE, path):
            self._misread.add(path)
            return _Flipping(stream)
        return stream

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Any, size: int) -> str | None:
        self._reach(path)
        if self.strikes(Fault.FULL, path):
            source = _Full(source, size // 2, self.inner.name)
        elif size and self.strikes(Fault.WRITE_CUT_SHORT, path):
            source = io.BytesIO(source.read(-1)[: size // 2])
            size //= 2
        etag = self.inner.write(path, source, size)
        if getattr(self.inner, "atomic_write", False) and self.strikes(Fault.BIT_FLIPPED, path):
            self.flip(path)  # it is at its final place already
        self._reply(path)
        return etag

    def flush(self) -> None:
        self._reach("")
        self.inner.flush()

    def rename(self, source: str, destination: str) -> None:
        self._reach(source)
        if self.inner.stat(source) is not None and self.strikes(Fault.RENAME_NOT_DONE, source):
            return
        self.inner.rename(source, destination)
        if self.strikes(Fault.BIT_FLIPPED, destination):
            self.flip(destination)
        self._reply(source)

    def remove(self, path: str) -> None:
        self._reach(path)
        if self.strikes(Fault.DELETE_NOT_DONE, path):
            return
        entry = self.inner.stat(path) if Fault.GHOST in self._armed else None
        if entry is not None:
            self._ghosts[path] = entry
        self.inner.remove(path)
        if self.strikes(Fault.DELETE_REPLY_LOST, path):
            raise StorageUnavailableError(storage=self.inner.name, message="connection reset")
        self._reply(path)

    def flip(self, path: str) -> None:
        """Change one bit of a file, or of the first file of a tree, as it lies there."""
        entry = self.inner.stat(path)
        assert entry is not None
        if entry.kind == "directory":
            path = next(iter(self.inner.walk(path))).path
        with self.inner.open_read(path) as stream:
            data = stream.read(-1)
        if data:
            at = self._random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << self._random.randrange(8)]) + data[at + 1 :]
            self.inner.remove(path)
            self.inner.write(path, io.BytesIO(data), len(data))


class _Flipping:
    """A stream whose first byte comes wrong."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.first = inner, True

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.inner, attribute)

    def __enter__(self) -> _Flipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.inner.close()

    def read(self, size: int = -1, /) -> bytes:
        block = self.inner.read(size)
        if block and self.first:
            self.first = False
            return bytes([block[0] ^ 1]) + block[1:]
        return block


class _Full:
    """A source during whose reading the disk gets full."""

    def __init__(self, inner: Any, room: int, storage: str) -> None:
        self.inner, self.room, self.storage = inner, room, storage

    def read(self, size: int = -1, /) -> bytes:
        block = self.inner.read(size)
        self.room -= len(block)
        if self.room < 0 or not block:
            raise StorageFullError(storage=self.storage, message="no space left on device")
        return block


#: for ``arm``: until it is healed
ALWAYS = math.inf
