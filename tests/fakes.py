"""Storages that misbehave on purpose: wrappers around real adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

from dlm_core.errors import StorageFullError
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.packing import pack
from dlm_core.storages.port import Entry, Readable, Storage


class Wrapped:
    """Passes everything on to a real storage; subclasses change one thing."""

    #: files go one by one, through what the subclass changes
    take_many = None

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def __getattr__(self, attribute: str) -> Any:
        refuse_batches(attribute)
        return getattr(self.inner, attribute)


def refuse_batches(attribute: str) -> None:
    """A wrapper that changes single calls must not be gone round by those that do without."""
    batches = ("write_many", "rename_many", "copy_from", "write_on", "write_in_parts")
    if attribute in (*batches, "remove_file"):
        raise AttributeError(attribute)


class Cut(Wrapped):
    """A source that does ``cut`` after so many bytes, and counts what is read from it."""

    #: the kernel would copy past it
    copy_from = None

    def __init__(self, inner: Any, after: int, cut: Callable[[], None]) -> None:
        super().__init__(inner)
        self.after, self.cut, self.read = after, cut, 0

    def open_read(self, path: str) -> Any:
        return _CutStream(self, self.inner.open_read(path))

    def open_read_at(self, path: str, offset: int) -> Any:
        return _CutStream(self, self.inner.open_read_at(path, offset))


class _CutStream(Wrapped):
    def __init__(self, owner: Cut, inner: Any) -> None:
        super().__init__(inner)
        self.owner, self.size, self.opened = owner, inner.size, inner.opened

    def read(self, size: int = -1) -> bytes:
        if self.owner.read >= self.owner.after:
            self.owner.after = 1 << 60
            self.owner.cut()
        block: bytes = self.inner.read(size)
        self.owner.read += len(block)
        return block

    def __enter__(self) -> _CutStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.inner.close()


class QuotaStorage(Wrapped):
    """Takes at most ``quota`` bytes; past that a write is cut short like on a full disk."""

    def __init__(self, inner: Storage, quota: int) -> None:
        super().__init__(inner)
        self.left, self.lock = quota, threading.Lock()

    def write(self, path: str, source: BinaryIO, size: int) -> str | None:
        etag = self.inner.write(path, cast(BinaryIO, _Metered(self, source)), size)
        return etag

    def take(self, size: int) -> None:
        with self.lock:
            if size > self.left:
                raise StorageFullError(storage=self.inner.name, message="quota exceeded")
            self.left -= size


class _Metered:
    def __init__(self, storage: QuotaStorage, source: BinaryIO) -> None:
        self.storage, self.source = storage, source

    def read(self, size: int = -1) -> bytes:
        block = self.source.read(size)
        self.storage.take(len(block))
        return block


class Tampering(Wrapped):
    """Changes bytes on their way to the medium, as a bad cable or controller would."""

    def write(self, path: str, source: BinaryIO, size: int) -> str | None:
        return self.inner.write(path, cast(BinaryIO, _Flipped(source)), size)


class _Flipped:
    def __init__(self, source: BinaryIO) -> None:
        self.source, self.first = source, True

    def read(self, size: int = -1) -> bytes:
        block = self.source.read(size)
        if block and self.first:
            self.first = False
            return bytes([block[0] ^ 1]) + block[1:]
        return block


class Hooked(Wrapped):
    """Calls ``hook(call, path)`` before a call of the port; it may raise what it likes."""

    def __init__(self, inner: Storage, hook: Callable[[str, str], None]) -> None:
        super().__init__(inner)
        self.hook = hook

    def __getattr__(self, attribute: str) -> Any:
        refuse_batches(attribute)
        found = getattr(self.inner, attribute)
        if attribute not in ("stat", "write", "rename", "remove", "open_read", "flush"):
            return found

        def call(*arguments: Any) -> Any:
            self.hook(attribute, str(arguments[0]) if arguments else "")
            return found(*arguments)

        return call


class Misreading(Wrapped):
    """Reads wrongly as long as ``left`` lasts, an element a stream."""

    left: list[None]

    def open_read(self, path: str) -> Any:
        stream = self.inner.open_read(path)
        return _Inverted(stream) if self.left and self.left.pop() is None else stream

    read_back = open_read


class _Inverted(Wrapped):
    def read(self, size: int = -1) -> bytes:
        return bytes(255 - byte for byte in self.inner.read(size))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.inner.close()


#: a time at which everything has waited long enough
FAR = datetime(2100, 1, 1, tzinfo=UTC)


def any_digest(entries: Sequence[Entry]) -> dict[str, str | None]:
    """What may be packed where no catalogue is asked: everything, whatever its bytes."""
    return {entry.path: None for entry in entries}


class Packing(Bundled):
    """Packs everything after every change, so that what is looked at lies in a bundle."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.one_at_a_time = threading.Lock()

    def _pack(self) -> None:
        with self.one_at_a_time:
            pack(self, any_digest, FAR)

    def write(self, path: str, source: Readable, size: int) -> str | None:
        etag = super().write(path, source, size)
        self._pack()
        return etag

    def rename(self, source: str, destination: str) -> None:
        super().rename(source, destination)
        self._pack()


_CALLS = (
    "stat", "stat_many", "walk", "open_read", "open_range", "read_back", "write", "flush", "rename",
    "remove",
)  # fmt: skip


class Counting(Wrapped):
    """Keeps every call of the port with what it is about."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, attribute: str) -> Any:
        refuse_batches(attribute)
        found = getattr(self.inner, attribute)
        if attribute not in _CALLS:
            return found

        def call(*arguments: Any) -> Any:
            self.called(attribute, str(arguments[0]) if arguments else "")
            return found(*arguments)

        return call

    def called(self, call: str, about: str) -> None:
        self.calls.append((call, about))


class StoppedError(BaseException):
    """Ends the process, as far as who uses the storage is concerned."""


def die_after(call: str, path: str) -> Callable[[str, str], None]:
    """A hook for :class:`Hooked`: the process ends after this call of the port."""
    called: list[str] = []

    def hook(now: str, where: str) -> None:
        if called:
            raise StoppedError
        if (now, where) == (call, path):
            called.append(path)

    return hook


class Stopping(Counting):
    """At the ``left``-th call does ``meanwhile``; without one the process ends there, and no later
    call comes through."""

    def __init__(
        self, inner: Storage, left: int, meanwhile: Callable[[], object] | None = None
    ) -> None:
        super().__init__(inner)
        self.left, self.meanwhile, self.last = left, meanwhile, ("", "")
        self._lock = threading.Lock()

    def called(self, call: str, about: str) -> None:
        with self._lock:  # several threads call
            self.left -= 1
            left = self.left
            if left >= 0:
                self.last = (call, about)
        if left <= 0 and self.meanwhile is None:
            raise StoppedError
        if left == 0 and self.meanwhile is not None:
            self.meanwhile()
