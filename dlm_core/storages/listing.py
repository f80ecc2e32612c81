"""Looking at a storage by two questions only: one path, and what lies directly in one folder."""

from __future__ import annotations

import posixpath
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from dlm_core.errors import (
    PathRefusedError,
    PayloadNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.port import PRIVATE, Entry, ReadStream

_LOOKS_INSTEAD_OF_LIST = 8
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")


class Listed(ABC):
    """The looking part of :class:`~dlm_core.storages.port.Storage` where a folder is listed."""

    name: str
    concurrency: int
    reads_at_once = 4

    @abstractmethod
    def _look(self, path: str) -> Entry | None:
        """The entry of a checked path; None if the server answers that nothing is there."""

    @abstractmethod
    def _list(self, folder: str) -> list[Entry] | None:
        """What lies directly in a folder, in any order; None if it is not there."""

    @abstractmethod
    def read_back(self, path: str) -> ReadStream:
        """As ``open_read`` for what is known to be a file: one question less."""

    @abstractmethod
    def _check_root(self) -> None:
        """Raise unless the root is there: one that is gone is an outage, not an empty storage."""

    def _refused(self, path: str, message: str) -> PathRefusedError:
        return PathRefusedError(storage=self.name, path=path, message=message)

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)

    def _path(self, path: str) -> str:
        """``path`` if every server of such a kind keeps it."""
        framed = f"/{path}/"
        if "//" in framed or "/./" in framed or "/../" in framed:
            raise self._refused(path, "want relative, without '.', '..' or ''")
        if _ODD.search(path):
            raise self._refused(path, "not every server keeps control characters and backslashes")
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            raise self._refused(path, "names there are UTF-8") from None
        return path

    def _new_path(self, path: str) -> str:
        """``path`` if a move may be told to make it."""
        if "?" in path or ";" in path:
            # WsgiDAV takes them for the end of the name, and moves to a shorter one
            raise self._refused(path, "not every server keeps '?' and ';' in a new name")
        return self._path(path)

    def stat(self, path: str) -> Entry | None:
        found = self._look(self._path(path))
        if found is None:
            self._check_root()
        return found

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        found: dict[str, Entry | None] = {}
        rest: list[str] = []
        for folder, group in groupby(sorted(map(self._path, set(paths))), posixpath.dirname):
            wanted = list(group)
            if len(wanted) > _LOOKS_INSTEAD_OF_LIST:
                listed = {entry.path: entry for entry in self._list(folder) or ()}
                found.update({path: listed[path] for path in wanted if path in listed})
            # what a listing leaves out is asked for by name: it may be partial
            rest += [path for path in wanted if path not in found]
        if rest:
            with ThreadPoolExecutor(self.concurrency, "dlm-look") as pool:
                found.update(zip(rest, pool.map(self._look, rest), strict=True))
        if None in found.values():
            self._check_root()
        return found

    def read_many(
        self, files: Sequence[tuple[str, int]], stop: threading.Event | None = None
    ) -> dict[str, bytes]:
        """One after the other, without the question what each of them is."""
        found: dict[str, bytes] = {}
        for path, size in files:
            if stop is not None and stop.is_set():
                return {}
            try:
                with self.read_back(path) as stream:
                    data = stream.read(size + 1)
                    while 0 < len(data) <= size and (more := stream.read(size + 1 - len(data))):
                        data += more
                    found[path] = data
            except StorageUnavailableError:
                break  # of the others it is told by whoever asks for them
            except StorageError:
                continue
        return found

    def walk(self, path: str = "") -> Iterator[Entry]:
        top = self._sorted(self._path(path) if path else "")
        if top is None:
            self._check_root()
            raise PayloadNotFoundError(storage=self.name, path=path)
        levels = [iter(top)]
        while levels:
            for entry in levels[-1]:
                if entry.kind != "directory":
                    yield entry
                elif entry.path != PRIVATE:
                    levels.append(iter(self._below(entry.path)))
                    break
            else:
                levels.pop()

    def _sorted(self, folder: str) -> list[Entry] | None:
        found = self._list(folder)
        return None if found is None else sorted(found, key=lambda one: one.path.encode())

    def _below(self, folder: str) -> list[Entry]:
        found = self._sorted(folder)
        if found is None:
            self._check_root()  # else it was removed since its folder was listed
        return found or []

    def _check_inside(self, entries: Iterable[Entry], folder: str) -> None:
        for one in entries:
            if posixpath.dirname(one.path) != folder:
                raise self._unavailable(f"its listing of {folder or 'its root'} has {one.path}")
