"""Checksums that were brought along with what is registered."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

from dlm_core.storages.port import Storage
from dlm_core.transfers.checksums import manifest_digest
from dlm_core.types import ManifestEntry, PayloadKind

_OF_ALL = (
    "which were not compared: give those of all its files and no others, or that of the directory, "
    "the sha256 of its manifest (docs/cli.md)"
)


class Sums:
    """Checksums by names that are relative to the storage's root or to ``top``, the folder that is
    registered (None: a list is). What none is compared with is told: who brought it believes that
    it was."""

    def __init__(self, storage: Storage, sums: Mapping[str, str], top: str | None) -> None:
        self._storage, self._sums, self._top = storage, sums, top
        self._names = sorted(sums)
        self._below = f"{top}/" if top else ""
        self._used: set[str] = set()
        self._directories: set[str] = set()
        self._relative = False

    def of(self, path: str, kind: PayloadKind) -> str | None:
        """That of the payload at a path, if there is one; of a directory that of the manifest which
        the sums of all its files make.

        Raises
        ------
        StorageError
        """
        digest = self._told(path)
        if kind is PayloadKind.DIRECTORY and self._sums:
            self._directories.add(path)
            return digest or self._of_files_in(path)
        return digest

    def _told(self, path: str) -> str | None:
        name = path
        if name not in self._sums and self._below and path.startswith(self._below):
            name = path[len(self._below) :]
        digest = self._sums.get(name)
        if digest is not None:
            self._used.add(name)
            self._relative |= name != path
        return digest

    def _of_files_in(self, top: str) -> str | None:
        below = f"{top}/"
        if not any(map(self._has_below, {below, below.removeprefix(self._below)})):
            return None
        used = self._used.copy()
        files = [
            ManifestEntry(entry.path[len(below) :], entry.size, self._told(entry.path) or "")
            for entry in self._storage.walk(top)
        ]
        if all(file.digest for file in files):
            return manifest_digest(files)
        self._used = used
        return None

    def _has_below(self, folder: str) -> bool:
        first = bisect_left(self._names, folder)
        return first < len(self._names) and self._names[first].startswith(folder)

    def left(self) -> Iterator[tuple[str, str]]:
        """Names of what was to be here and was not compared, with the reason."""
        within = {name: top for name in self._sums if (top := self._around(name)) is not None}
        for top, files in Counter(within.values()).items():
            yield top, f"has checksums of some files in it ({files}), {_OF_ALL}"
        if self._sums and not self._used and not within:
            why = f"none of the {len(self._sums)} checksums names a payload that was found: paths"
            yield "checksums", f"{why} are relative to the storage's root, or to what is registered"
            return
        # a list may name few of what has a sum, and a tree be one of several
        mine = self._top is not None
        relative = self._relative or any(not name.startswith(self._below) for name in within)
        for name in self._sums if mine else ():
            told = name in self._used or name in within
            if not told and (relative or name.startswith(self._below)):
                yield name, "has a checksum, which was compared with no payload"

    def _around(self, name: str) -> str | None:
        """The directory payload in which the file of a name lies."""
        if not self._directories or name in self._used:
            return None
        for path in (name, self._below + name):
            parts = path.split("/")
            for depth in range(1, len(parts)):
                if (top := "/".join(parts[:depth])) in self._directories:
                    return top
        return None
