"""How storages of other kinds than plain folders keep their files, and what truly lies there.

Behind the port all kinds look alike; a shelf knows the folder behind it: members lie in tars where
the index says, bytes of what a tape has migrated in its silo.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dlm_core.storages.bundle_tar import FOLDER, Member, tar_path
from dlm_core.storages.bundles import BundleConfig, Bundled
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.port import Storage
from dlm_core.storages.posix import PosixStorage
from dlm_core.storages.staging import StageTerms
from tests.simulation.model import Tree

#: a plain folder; small files in bundles; a tape; bundles on a tape
KINDS = ("posix", "bundled", "tape", "vault")
#: each member takes about 1 KiB more in a tar
_BUNDLES = {"bundle_bytes": 4000, "bundle_below": 1000, "bundle_after_hours": 0}
_TAPE = {"stage": "robot", "stage_poll_seconds": 60, "stage_retry_hours": 0.5}


class Unsynced(PosixStorage):
    """Does not wait for the medium."""

    def flush(self) -> None:
        pass


class Shelf:
    """The folder of one storage; ``prompt`` tapes bring back at once what is asked for."""

    def __init__(
        self, name: str, kind: str, root: Path, seen: Counter[str], *, prompt: bool = False
    ) -> None:
        self.name, self.root, self.seen, self.prompt = name, root, seen, prompt
        self.bundles = (
            BundleConfig.model_validate(_BUNDLES) if kind in ("bundled", "vault") else None
        )
        self.cold = kind in ("tape", "vault")
        #: bytes of what is migrated, by inode; a stub of zeros is left in its place
        self.silo: dict[int, bytes] = {}
        self.wanted: set[str] = set()
        self._reader = Bundled(Unsynced(name, str(root)), self.bundles) if self.bundles else None

    @property
    def config(self) -> dict[str, Any]:
        """The config of its row in the catalogue."""
        return (_BUNDLES if self.bundles else {}) | (_TAPE if self.cold else {})

    def around(self, volume: Storage) -> Storage:
        """What :func:`dlm_core.storages.open.open_storage` would make around a folder's adapter."""
        if self.cold:
            terms = StageTerms.model_validate(_TAPE)
            volume = cast(Storage, ColdStorage(volume, Robot(self), terms))
        return cast(Storage, Bundled(volume, self.bundles)) if self.bundles else volume

    # --- what lies there -------------------------------------------------------------------------

    def tree(self) -> Tree:
        """All files by path as whoever reads them, staged, should find them; without those that
        bundles are made of."""
        found = self._files()
        if self._reader is None:
            return found
        members = self.members()
        view = {path: data for path, data in found.items() if not path.startswith(f"{FOLDER}/")}
        for path, member in members.items():
            view.pop(path, None)
            if (tar := found.get(tar_path(member.bundle))) is not None:
                view[path] = tar[member.offset : member.offset + member.size]
        return view

    def members(self) -> dict[str, Member]:
        """Where each member lies, by the index as it is now."""
        if self._reader is None:
            return {}
        index = self._reader.index
        found: dict[str, Member] = index.look(lambda: dict(index.since("", "")))
        return found

    def _files(self) -> Tree:
        found, inodes = {}, {}
        for path, entry in walk(str(self.root)):
            inodes[entry.inode()] = path
            stub = self.silo.get(entry.inode()) if self.silo else None
            found[path] = Path(entry.path).read_bytes() if stub is None else stub
        # an inode is used again: what went from here went from the silo too
        self.silo = {inode: data for inode, data in self.silo.items() if inode in inodes}
        return found

    def is_free(self, path: str) -> bool:
        """Whether a user may put a file there."""
        return not (self.root / path).exists() and path not in self.members()

    # --- what befalls it -------------------------------------------------------------------------

    def harm(self, path: str, data: bytes | None) -> bytes | None:
        """Change the bytes at a place, or take them away (None): of a member they rot instead.
        What is there now."""
        member = self.members().get(path)
        file = self.root / (tar_path(member.bundle) if member else path)
        whole = self.silo.pop(file.stat().st_ino, None) or file.read_bytes()
        if member is None:
            file.unlink() if data is None else file.write_bytes(data)
            return data
        end = member.offset + member.size
        rotten = data or bytes(255 - byte for byte in whole[member.offset : end])
        file.write_bytes(whole[: member.offset] + rotten + whole[end:])
        return rotten

    def drop(self, bundle: str) -> None:
        """A tar goes, and all its members with it."""
        (self.root / tar_path(bundle)).unlink()

    # --- the tape --------------------------------------------------------------------------------

    def migrate(self, spared: Sequence[str]) -> None:
        """Move bytes to the silo, but those in which ``spared`` paths lie and those of the bundles'
        index."""
        members = self.members()
        spared = [tar_path(members[path].bundle) if path in members else path for path in spared]
        for path, entry in list(walk(str(self.root))):
            own = path.startswith(f"{FOLDER}/") and not path.endswith(".tar")
            if own or path in spared or entry.inode() in self.silo:
                continue
            file, status = Path(entry.path), entry.stat()
            self.silo[entry.inode()] = file.read_bytes()
            with file.open("r+b") as stub:
                stub.write(bytes(status.st_size))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.seen["file migrated to a silo"] += 1

    def deliver(self) -> None:
        """Bring back what was asked for."""
        stubs = [path for path in sorted(self.wanted) if self.is_stub(path)]
        self.wanted.clear()
        for path in stubs:
            file = self.root / path
            status = file.stat()
            with file.open("r+b") as whole:
                whole.write(self.silo.pop(status.st_ino))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.seen["file delivered from a silo"] += 1

    def is_stub(self, path: str) -> bool:
        """Whether the bytes of a file are in the silo."""
        file = self.root / path
        return file.is_file() and file.stat().st_ino in self.silo


class Robot:
    """The stager of a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def stage(self, paths: Sequence[str]) -> None:
        """Ask for files."""
        self._shelf.wanted.update(paths)
        if self._shelf.prompt:
            self._shelf.deliver()

    def online(self, paths: Sequence[str]) -> set[str]:
        """Those that can be read at once."""
        return {
            path
            for path in paths
            if (self._shelf.root / path).is_file() and not self._shelf.is_stub(path)
        }


def walk(root: str) -> list[tuple[str, os.DirEntry[str]]]:
    """All files below a folder."""
    found, folders = [], [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    found.append((entry.path[len(root) + 1 :], entry))
    return found
