"""The folded index of a storage's bundles: a sorted file that is read by the block.

Two files: ``<name>.data`` has a line ``[path, bundle, number, offset, size, digest, mtime]`` a
member in path order, ``<name>.head`` what is not about members, and where each block begins. So a
worker holds one line in memory for some hundred members, and the blocks that it looked at last.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from io import BytesIO
from typing import Any

from dlm_core.errors import PayloadNotFoundError, StorageUnavailableError
from dlm_core.storages.bundle_tar import FOLDER, Member
from dlm_core.storages.port import Storage
from dlm_core.storages.ranges import open_range

#: where the folded indexes lie
BASES = f"{FOLDER}/index"
_LINES = 256
_BLOCK = 1 << 20
_BLOCKS_KEPT = 64

Line = tuple[str, Member]


class SupersededError(StorageUnavailableError):
    """storage {storage} cannot be reached: {message}"""


class Base:
    """A folded index as it lies on a storage; an empty one if ``name`` is None."""

    def __init__(self, storage: Storage, name: str | None) -> None:
        self._storage, self.name = storage, name
        self.head: dict[str, Any] = {"blocks": []}
        if name is not None:
            try:
                with storage.open_read(f"{BASES}/{name}.head") as stream:
                    self.head = json.loads(stream.read(-1))
            except ValueError:
                raise StorageUnavailableError(
                    storage=storage.name, message=f"{BASES}/{name}.head is damaged"
                ) from None
            except PayloadNotFoundError:
                raise self._superseded() from None
        self._firsts = [block[0] for block in self.head["blocks"]]
        self._kept: OrderedDict[int, list[Line]] = OrderedDict()

    def get(self, path: str) -> Member | None:
        """The member at ``path``."""
        number = bisect_right(self._firsts, path) - 1
        if number < 0:
            return None
        return next((member for name, member in self._block(number) if name == path), None)

    def since(self, first: str) -> Iterator[Line]:
        """Paths and members from ``first`` on, in path order."""
        begin = max(0, bisect_right(self._firsts, first) - 1)
        for number in range(begin, len(self._firsts)):
            for line in self._block(number):
                if line[0] >= first:
                    yield line

    def _block(self, number: int) -> list[Line]:
        kept = self._kept.get(number)
        if kept is None:
            kept = self._load(number)
            self._kept[number] = kept
            if len(self._kept) > _BLOCKS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return kept

    def _load(self, number: int) -> list[Line]:
        _, offset, length = self.head["blocks"][number]
        try:
            with open_range(self._storage, f"{BASES}/{self.name}.data", offset, length) as stream:
                data = stream.read(-1)
        except PayloadNotFoundError:
            raise self._superseded() from None
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            return [(path, Member(*rest)) for path, *rest in lines]
        except (ValueError, TypeError):
            raise StorageUnavailableError(
                storage=self._storage.name, message=f"{BASES}/{self.name}.data is damaged"
            ) from None

    def _superseded(self) -> SupersededError:
        return SupersededError(
            storage=self._storage.name, message=f"{BASES}/{self.name} is not there any more"
        )


def read_back(storage: Storage, path: str, wanted: bytes) -> None:
    """Believe that a file was written only when its sha256 is read there.

    Raises
    ------
    StorageUnavailableError
        if it is not.
    """
    hasher = sha256()
    with storage.open_read(path) as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    if hasher.digest() != wanted:
        raise StorageUnavailableError(
            storage=storage.name, message=f"{path} reads back differently"
        )


def write_base(storage: Storage, name: str, lines: Iterable[Line], head: Mapping[str, Any]) -> None:
    """Write a folded index of ``lines``, which come in path order, under a new name."""
    blocks: list[list[Any]] = []
    with tempfile.TemporaryFile() as file:
        hasher, at = sha256(), 0
        for number, (path, m) in enumerate(lines):
            if number % _LINES == 0:
                blocks.append([path, at, 0])
            row = [path, m.bundle, m.number, m.offset, m.size, m.digest, m.mtime]
            line = json.dumps(row).encode("ascii") + b"\n"
            hasher.update(line)
            at += file.write(line)
            blocks[-1][2] = at - blocks[-1][1]
        file.seek(0)
        storage.write(f"{BASES}/{name}.data", file, at)
    data = json.dumps({**head, "blocks": blocks}).encode("ascii")
    storage.write(f"{BASES}/{name}.head", BytesIO(data), len(data))
    storage.flush()
    read_back(storage, f"{BASES}/{name}.data", hasher.digest())
    read_back(storage, f"{BASES}/{name}.head", sha256(data).digest())
