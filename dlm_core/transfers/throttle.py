"""Limits that may change at any time, for all threads together: bytes a second, files at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

from dlm_core.storages.guarded import unguarded
from dlm_core.storages.port import Readable, ReadStream, Storage
from dlm_core.storages.streams import StreamOver
from dlm_core.transfers.reading import Interrupted

#: at most so many bytes are read in one go, so that the pace is even
_BLOCK = 1 << 20
# what is not used within this time is lost: no burst makes up for a pause
_SAVED_SECONDS = 0.2
# a waiting thread looks this often whether its limit was changed
_LOOK_SECONDS = 0.25


class Pace:
    """Lets ``bytes_per_second`` pass (None: any), for all threads together.

    ``stop`` ends every wait. :meth:`set` takes effect at once, for those that wait too.
    """

    def __init__(self, bytes_per_second: float | None, stop: threading.Event) -> None:
        self._rate, self._stop = bytes_per_second, stop
        self._lock, self._credit, self._at = threading.Lock(), 0.0, time.monotonic()

    @property
    def limited(self) -> bool:
        return self._rate is not None

    def set(self, bytes_per_second: float | None) -> None:
        """Another rate from now on."""
        with self._lock:
            if bytes_per_second != self._rate:
                self._earn()
                self._rate = bytes_per_second

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes have had their time."""
        left = float(size)
        while left > 0 and self._rate is not None and not self._stop.is_set():
            with self._lock:
                self._earn()
                granted = min(left, self._credit)
                self._credit -= granted
                left -= granted
                rate = self._rate
            if left > 0 and rate is not None:
                self._stop.wait(min(_LOOK_SECONDS, left / rate))

    def _earn(self) -> None:
        now = time.monotonic()
        rate = self._rate or 0.0
        # a block must fit in: who waits for another limit loses nothing of this one meanwhile
        most = max(rate * _SAVED_SECONDS, _BLOCK)
        self._credit = min(self._credit + (now - self._at) * rate, most)
        self._at = now


class Taker(Protocol):
    """Is asked before bytes go on."""

    @property
    def limited(self) -> bool: ...

    def take(self, size: int) -> None: ...


class Watched:
    """Lets everything pass, and tells how much."""

    limited = False

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.take = tell


class Slots:
    """How many may be at work under each of several keys; a key without a number has no limit.

    One who needs several keys gets all of them or waits for all, so that no two can wait for each
    other.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._changed = stop, threading.Condition()
        self._most: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def set(self, most: Mapping[str, int]) -> None:
        """Other numbers from now on; who is at work goes on."""
        with self._changed:
            self._most = dict(most)
            self._changed.notify_all()

    @property
    def limited(self) -> bool:
        return bool(self._most)

    def limits(self, keys: Iterable[str]) -> bool:
        """Whether one of ``keys`` has a number."""
        return not self._most.keys().isdisjoint(keys)

    def used(self) -> dict[str, int]:
        """How many are at work, by key."""
        with self._changed:
            return {key: count for key, count in self._used.items() if count}

    @contextmanager
    def held(self, keys: Sequence[str]) -> Iterator[None]:
        """One place under each of ``keys``.

        Raises
        ------
        Interrupted
            if ``stop`` is set while waiting.
        """
        with self._changed:
            while not all(self._free(key) for key in keys):
                if self._stop.is_set():
                    raise Interrupted
                self._changed.wait(_LOOK_SECONDS)
            for key in keys:
                self._used[key] = self._used.get(key, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                for key in keys:
                    self._used[key] -= 1
                self._changed.notify_all()

    def _free(self, key: str) -> bool:
        return key not in self._most or self._used.get(key, 0) < self._most[key]


class _PacedReader:
    """Bytes that come no faster than the paces."""

    def __init__(self, inner: Readable, take: Callable[[int], None]) -> None:
        self._inner, self._take = inner, take

    def read(self, size: int = -1, /) -> bytes:
        block = self._inner.read(min(size, _BLOCK) if size >= 0 else size)
        if block:
            self._take(len(block))
        return block


class _PacedStream(_PacedReader, StreamOver):
    """A stream whose bytes come no faster than the paces."""

    def __init__(self, inner: ReadStream, take: Callable[[int], None]) -> None:
        _PacedReader.__init__(self, inner, take)
        StreamOver.__init__(self, inner)


class _Paced:
    """A storage whose payloads are read and written at a pace; all else goes through."""

    def __init__(self, inner: Storage, reading: Sequence[Taker], writing: Sequence[Taker]) -> None:
        self._inner, self._reading, self._writing = inner, reading, writing

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._inner, attribute)
        if attribute == "take_many":
            # one request for many files cannot be held back
            limited = _any_limited((*self._reading, *self._writing))
            return None if limited or found is None else _unwrapping(found)
        if attribute == "copy_from":
            return found and partial(self._copy_from, found)
        if attribute in ("read_back", "open_read_at", "open_range"):
            return found and (lambda *where: self._held_back(found(*where)))
        if attribute == "write_on":
            return found and partial(self._write_on, found)
        if attribute == "write_in_parts":
            return found and partial(self._write_in_parts, found)
        if attribute == "write_many" and found is not None:
            return lambda files: self._write_many(found, files)
        if attribute == "read_many" and found is not None:
            return partial(self._read_many, found)
        return found

    def open_read(self, path: str) -> ReadStream:
        return self._held_back(self._inner.open_read(path))

    def _held_back(self, stream: ReadStream) -> ReadStream:
        """What is small is through before a limit that is set now could matter."""
        if stream.size <= _BLOCK and not _any_limited(self._reading):
            return stream
        return _PacedStream(stream, self._read)

    def write(self, path: str, source: Readable, size: int) -> str | None:
        if size > _BLOCK or _any_limited(self._writing):
            source = _PacedReader(source, self._write)
        return self._inner.write(path, source, size)

    def _read_many(
        self, read_many: Callable[..., Any], files: Sequence[tuple[str, int]], *rest: Any
    ) -> Any:
        self._read(sum(size for _, size in files))
        return read_many(files, *rest)

    def _write_many(
        self, write_many: Callable[..., Any], files: Sequence[tuple[str, bytes]]
    ) -> Any:
        self._write(sum(len(data) for _, data in files))
        return write_many(files)

    def _write_on(
        self, write_on: Callable[..., None], path: str, source: Readable, begun: int
    ) -> None:
        write_on(path, _PacedReader(source, self._write), begun)

    def _write_in_parts(
        self, write_in_parts: Callable[..., Any], path: str, source: Readable, size: int,
        sending: Callable[[int], None],
    ) -> Any:  # fmt: skip
        """What is there already takes none of the pace."""

        def held(size: int) -> None:
            self._write(size)
            sending(size)

        return write_in_parts(path, source, size, held)

    def _copy_from(
        self, copy_from: Callable[..., bool], source: Storage, source_path: str, path: str,
        size: int, moved: Callable[[int], None],
    ) -> bool:  # fmt: skip
        paces = [*(source._reading if isinstance(source, _Paced) else ()), *self._writing]

        def held(size: int) -> None:
            _take(paces, size)
            moved(size)

        return copy_from(bare(source), source_path, path, size, held)

    def _read(self, size: int) -> None:
        _take(self._reading, size)

    def _write(self, size: int) -> None:
        _take(self._writing, size)


def _any_limited(paces: Iterable[Taker]) -> bool:
    # asked for each file, of which a generator would cost more than the question
    for pace in paces:  # noqa: SIM110
        if pace.limited:
            return True
    return False


def _take(paces: Iterable[Taker], size: int) -> None:
    for pace in paces:
        pace.take(size)


def _unwrapping(take_many: Callable[..., Any]) -> Callable[..., Any]:
    """It may look at what the source is: hand over that, not what stands around it; of one that is
    held back it takes none."""
    return lambda source, *rest: {} if held_back(source) else take_many(bare(source), *rest)


def bare(storage: Storage) -> Storage:
    """The adapter itself."""
    while isinstance(storage, _Paced):
        storage = storage._inner
    return cast(Storage, unguarded(storage))


def held_back(*storages: Storage) -> bool:
    """Whether what is read or written at any of them keeps to a number of bytes a second now."""
    for storage in storages:
        while isinstance(storage, _Paced):
            if _any_limited((*storage._reading, *storage._writing)):
                return True
            storage = storage._inner
    return False


def paced(
    storage: Storage, reading: Sequence[Taker], writing: Sequence[Taker] | None = None
) -> Storage:
    """``storage``, read (and written) no faster than all of the paces let.

    Bytes that a far side reads by itself (``digest_many``) are not counted.
    """
    return cast(Storage, _Paced(storage, reading, reading if writing is None else writing))
