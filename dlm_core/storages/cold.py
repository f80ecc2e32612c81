"""A storage whose files may be offline: nothing of it is read before it was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from dlm_core.errors import DlmError, NotOnlineError, StorageUnavailableError
from dlm_core.storages.port import Readable, ReadStream, Storage, temp_path
from dlm_core.storages.ranges import open_range
from dlm_core.storages.staging import Stager, StageTerms

#: what was online is taken to be so for this long, in seconds
_TRUSTED_SECONDS = 600.0
_MOST_REMEMBERED = 200_000
_TEMP = temp_path("")

_T = TypeVar("_T")


class ColdStorage:
    """An adapter with a stager; see :class:`dlm_core.storages.port.Storage` for the contract.

    Reading a file that is not online raises ``NotOnlineError`` instead of recalling it by
    accident, one by one; who has many to read asks :meth:`look` for all of them first. What this
    process wrote to disk a moment ago is online, and so are temporary files, of whoever's: they are
    written and read at once. All else goes through to the adapter.
    """

    def __init__(self, inner: Storage, stager: Stager, terms: StageTerms) -> None:
        self.inner, self.stager, self.terms = inner, stager, terms
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()
        #: a rename here needs the bytes online
        self.renames_read = bool(getattr(stager, "renames_read", False))

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "read_many" or (attribute == "rename_many" and self.renames_read):
            raise AttributeError(attribute)  # one by one, each if it is online
        found = getattr(self.inner, attribute)
        if attribute in ("write_in_parts", "write_on"):
            return self._remembering_one(found)
        if attribute == "rename_many":
            return self._remembering_moves(found)
        if attribute == "copy_from":
            return self._remembering_copy(found)
        if attribute == "open_read_at":
            return self._if_online(found)
        return self._remembering(found) if attribute == "write_many" else found

    @property
    def concurrency(self) -> int:
        """Transfers at once, those of the adapter."""
        return self.inner.concurrency

    @concurrency.setter
    def concurrency(self, value: int) -> None:
        self.inner.concurrency = value

    def look(self, paths: Sequence[str]) -> set[str]:
        """Those of ``paths`` that are online now.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
            if the storage cannot tell.
        """
        found: set[str] = set()
        for batch in _batches(paths, self.terms.stage_batch):
            found |= self._told(self._online, batch)
        with self._lock:
            for path in set(paths) - found:
                self._until.pop(path, None)
        self._remember(found)
        return found

    def stage(self, paths: Sequence[str]) -> None:
        """Ask for files to be brought online, in one call if ``stage_batch`` allows.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
            if the storage does not take the request.
        """
        for batch in _batches(self._told(self._ordered, paths), self.terms.stage_batch):
            self._told(self.stager.stage, batch)

    def _online(self, paths: Sequence[str]) -> set[str]:
        return set(self.stager.online(paths)) & set(paths)

    def _ordered(self, paths: Sequence[str]) -> Sequence[str]:
        order = getattr(self.stager, "order", None)
        return [*order(paths)] if order else paths

    def _told(self, ask: Callable[[Sequence[str]], _T], paths: Sequence[str]) -> _T:
        """What the stager answers; it may be somebody else's, and fail in a way of its own."""
        try:
            return ask(paths)
        except DlmError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever others' code raises
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            message = f"its stager {self.terms.stage!r} failed: {told}"
            raise StorageUnavailableError(storage=self.inner.name, message=message) from None

    def open_read(self, path: str) -> ReadStream:
        self._must_be_online(path)
        return self.inner.open_read(path)

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        self._must_be_online(path)
        return open_range(self.inner, path, offset, size)

    def write(self, path: str, source: Readable, size: int) -> str | None:
        etag = self.inner.write(path, source, size)
        self._remember_written([path])
        return etag

    def rename(self, source: str, destination: str) -> None:
        if self.renames_read:
            self._must_be_online(source)
        self.inner.rename(source, destination)
        self._remember_moved([(source, destination)])

    def remove(self, path: str) -> None:
        self.inner.remove(path)
        with self._lock:
            self._until.pop(path, None)

    def _must_be_online(self, path: str) -> None:
        if path.startswith(_TEMP) and not self.renames_read:
            return
        if self._until.get(path, 0.0) > time.monotonic() or path in self.look([path]):
            return
        entry = self.inner.stat(path)
        if entry is not None and entry.kind == "file":
            # what is not there, or no file, the adapter tells
            raise NotOnlineError(self.inner.name, path, "nobody asked for it: 'dlm stage' does")

    def _if_online(self, open_read_at: Callable[..., ReadStream]) -> Callable[..., ReadStream]:
        def opened(path: str, offset: int) -> ReadStream:
            self._must_be_online(path)
            return open_read_at(path, offset)

        return opened

    def _remembering(self, write_many: Callable[..., Any]) -> Callable[..., Any]:
        def write(things: Sequence[tuple[str, bytes]]) -> Any:
            errors = write_many(things)
            pairs = zip(things, errors, strict=True)
            self._remember_written([path for (path, _), error in pairs if error is None])
            return errors

        return write

    def _remembering_one(self, write_one: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: str, *rest: Any) -> Any:
            etag = write_one(path, *rest)
            self._remember_written([path])
            return etag

        return write

    def _remembering_copy(self, copy_from: Callable[..., bool]) -> Callable[..., bool]:
        def copy(source: Storage, source_path: str, path: str, *rest: Any) -> bool:
            done = copy_from(source, source_path, path, *rest)
            if done:
                self._remember_written([path])
            return done

        return copy

    def _remembering_moves(self, rename_many: Callable[..., Any]) -> Callable[..., Any]:
        def rename(pairs: Sequence[tuple[str, str]]) -> Any:
            errors = rename_many(pairs)
            together = zip(pairs, errors, strict=True)
            self._remember_moved([pair for pair, error in together if error is None])
            return errors

        return rename

    def _remember_moved(self, pairs: Iterable[tuple[str, str]]) -> None:
        with self._lock:
            for source, destination in pairs:
                until = self._until.pop(source, None)
                if until is not None:
                    self._until[destination] = until

    def _remember_written(self, paths: Iterable[str]) -> None:
        """What a disk takes stays there for a while; an archive class is offline at once."""
        if not self.renames_read:
            self._remember(paths)

    def _remember(self, paths: Iterable[str]) -> None:
        now = time.monotonic()
        with self._lock:
            if len(self._until) > _MOST_REMEMBERED:
                self._until = {p: until for p, until in self._until.items() if until > now}
            self._until.update(dict.fromkeys(paths, now + _TRUSTED_SECONDS))


def beneath(storage: Storage) -> Storage:
    """The adapter under a cold storage, for files that are never offline there; else itself."""
    return storage.inner if isinstance(storage, ColdStorage) else storage


def _batches(paths: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))
