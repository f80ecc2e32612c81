"""Reading no faster than a budget allows, by however many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from typing import Any, Self, cast

from dlm_core.storages.port import ReadStream, Storage

#: at most so many bytes are read in one go, so that the pace is even
_BLOCK = 1 << 20


class Pace:
    """Lets ``bytes_per_second`` pass, for all threads together; ``stop`` ends every wait."""

    def __init__(self, bytes_per_second: float, stop: threading.Event) -> None:
        self._rate, self._stop = bytes_per_second, stop
        self._lock, self._free_at = threading.Lock(), time.monotonic()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes have had their time."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / self._rate
            wait = self._free_at - now
        self._stop.wait(wait)


class _PacedStream:
    """A stream whose bytes come no faster than the pace."""

    def __init__(self, inner: ReadStream, pace: Pace) -> None:
        self._inner, self._pace = inner, pace
        self.size, self.opened = inner.size, inner.opened

    def read(self, size: int = -1, /) -> bytes:
        block = self._inner.read(min(size, _BLOCK) if size >= 0 else size)
        self._pace.take(len(block))
        return block

    def stamp(self) -> Hashable:
        return self._inner.stamp()

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Paced:
    """A storage whose payloads are read at a pace; all else goes through."""

    def __init__(self, inner: Storage, pace: Pace) -> None:
        self._inner, self._pace = inner, pace

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)

    def open_read(self, path: str) -> ReadStream:
        return _PacedStream(self._inner.open_read(path), self._pace)


def paced(storage: Storage, bytes_per_second: float, stop: threading.Event) -> Storage:
    """``storage``, read no faster than ``bytes_per_second`` by all its readers together."""
    return cast(Storage, _Paced(storage, Pace(bytes_per_second, stop)))
