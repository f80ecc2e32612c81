"""One bundle: a plain POSIX tar (pax), planned before it is written, and read without the plan.

Sizes are known beforehand, so every offset is, and so is the length of the tar: it is streamed to
the storage in one write. Its last member is its index, one line a member.
"""

from __future__ import annotations

import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from dlm_core.errors import PayloadNotFoundError
from dlm_core.storages.port import PRIVATE, Readable, ReadStream

FOLDER = f"{PRIVATE}/bundles"
_BLOCK = 1 << 20
#: files up to this size are read whole, several at once
_SMALL = 1 << 20
_TAR_BLOCK = 512
#: tar's own unit: archives end at a multiple of it
_RECORD = 20 * _TAR_BLOCK
_UNKNOWN = "-" * 64


def tar_path(bundle: str) -> str:
    """Where a bundle lies on its storage."""
    return f"{FOLDER}/tar/{bundle}.tar"


def list_path(bundle: str) -> str:
    """Where the list of a bundle's members lies: on its storage, and in the tar under this name."""
    return f"{FOLDER}/tar/{bundle}.members"


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in a bundle. ``offset`` and ``size`` are bytes in the tar, ``digest`` is
    ``sha256:…``, ``mtime`` seconds since 1970."""

    bundle: str
    number: int
    offset: int
    size: int
    digest: str
    mtime: float

    def was(self, size: int, mtime: float) -> bool:
        """Whether it was made of a single file of this size and time. S3 tells whole seconds in one
        answer and parts of them in another."""
        whole = mtime.is_integer() or self.mtime.is_integer()
        same = int(mtime) == int(self.mtime) if whole else mtime == self.mtime
        return size == self.size and same


@dataclass(frozen=True, slots=True)
class Part:
    """A file that is to go into a bundle. ``digest`` is what its bytes must have, if that is known;
    ``source`` opens it; ``token`` is the packer's own."""

    path: str
    size: int
    mtime: float
    digest: str | None
    source: Callable[[], ReadStream]
    token: Any = None


class Layout:
    """Where everything lies in a tar of ``parts``, in their order."""

    def __init__(self, bundle: str, parts: Sequence[Part]) -> None:
        self.bundle, self.parts = bundle, parts
        self.offsets: list[int] = []
        at = 0
        for part in parts:
            at += len(_header(part.path, part.size, part.mtime))
            self.offsets.append(at)
            at += _padded(part.size)
        listed = len(self.listing({}))
        at += len(_header(list_path(bundle), listed, 0)) + _padded(listed)
        #: bytes of the whole tar
        self.size = -(-(at + 2 * _TAR_BLOCK) // _RECORD) * _RECORD

    def listing(self, digests: Mapping[int, str]) -> bytes:
        """The index of the bundle; its length is the same whatever is known of the digests."""
        lines = [json.dumps({"bundle": self.bundle, "members": len(self.parts)})]
        for number, part in enumerate(self.parts):
            digest = digests.get(number, _UNKNOWN).removeprefix("sha256:")
            lines.append(
                json.dumps([part.path, self.offsets[number], part.size, digest, part.mtime])
            )
        return ("\n".join(lines) + "\n").encode("ascii")


class TarSource:
    """The bytes of a tar as planned, made while they are read.

    A file that went, or is not what it should be, leaves its place filled (with what came, then
    zeros) and is not in ``digests``: the bundle holds no member there.
    """

    def __init__(self, layout: Layout, threads: int) -> None:
        self.layout, self._threads = layout, max(1, threads)
        #: of the members that are good, by number
        self.digests: dict[int, str] = {}
        #: of those that came with other bytes than they should have
        self.refused: list[int] = []
        self._listing = b""

    @property
    def listing(self) -> bytes:
        """The index as it was written."""
        return self._listing

    def blocks(self) -> Iterator[bytes]:
        """The tar in blocks of about 1 MiB."""
        waiting, length = [], 0
        for piece in self._pieces():
            waiting.append(piece)
            length += len(piece)
            if length >= _BLOCK:
                yield b"".join(waiting)
                waiting, length = [], 0
        if waiting:
            yield b"".join(waiting)

    def _pieces(self) -> Iterator[bytes]:
        written = 0
        with ThreadPoolExecutor(self._threads, "dlm-pack") as pool:
            for number, pieces in self._contents(pool):
                part = self.layout.parts[number]
                yield _header(part.path, part.size, part.mtime)
                yield from self._checked(number, part, pieces)
                written = self.layout.offsets[number] + _padded(part.size)
        self._listing = self.layout.listing(self.digests)
        head = _header(list_path(self.layout.bundle), len(self._listing), 0)
        yield head
        yield self._listing
        written += len(head) + len(self._listing)
        yield bytes(self.layout.size - written)

    def _contents(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Each member's number and bytes; small ones are read some members ahead."""
        ahead: deque[Future[list[bytes]] | None] = deque()
        parts = self.layout.parts
        for number, part in enumerate(parts):
            for later in parts[number + len(ahead) : number + self._threads]:
                small = later.size <= _SMALL
                ahead.append(pool.submit(_read_whole, later) if small else None)
            coming = ahead.popleft()
            yield number, iter(coming.result()) if coming is not None else _read(part)

    def _checked(self, number: int, part: Part, pieces: Iterator[bytes]) -> Iterator[bytes]:
        hasher, length = sha256(), 0
        for piece in pieces:
            hasher.update(piece)
            fitting = piece[: max(0, part.size - length)]
            length += len(piece)
            yield fitting
        digest = f"sha256:{hasher.hexdigest()}"
        if length == part.size and part.digest in (None, digest):
            self.digests[number] = digest
        elif length:
            self.refused.append(number)
        left = _padded(part.size) - min(length, part.size)
        while left:
            yield bytes(min(left, _BLOCK))
            left -= min(left, _BLOCK)


def _read_whole(part: Part) -> list[bytes]:
    return list(_read(part))


def _read(part: Part) -> Iterator[bytes]:
    """The bytes of a file, one more than planned if it has grown; fewer if it went."""
    try:
        with part.source() as stream:
            left = part.size + 1
            while left and (piece := stream.read(min(_BLOCK, left))):
                left -= len(piece)
                yield piece
    except PayloadNotFoundError:
        return


def _header(path: str, size: int, mtime: float) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = size, int(mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


@dataclass(frozen=True, slots=True)
class Found:
    """A member as it is read in a tar; ``data`` only of the tar's own index."""

    path: str
    offset: int
    size: int
    digest: str
    data: bytes | None


def read_tar(stream: Readable, bundle: str) -> Iterator[Found]:
    """The members of a tar with the sha256 of their bytes, in one pass of bounded memory.

    Raises
    ------
    tarfile.TarError
        if it is no whole tar.
    """
    with tarfile.open(
        fileobj=cast(Any, stream), mode="r|", encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
            file = tar.extractfile(info) if info.isfile() else None
            if file is None:
                continue
            hasher, kept, size = sha256(), [], 0
            while piece := file.read(_BLOCK):
                hasher.update(piece)
                size += len(piece)
                if info.name == list_path(bundle):
                    kept.append(piece)
            data = b"".join(kept) if info.name == list_path(bundle) else None
            digest = f"sha256:{hasher.hexdigest()}"
            yield Found(info.name, info.offset_data, size, digest, data)


def parse_listing(data: bytes) -> Iterator[tuple[str, Member]]:
    """Paths and members of a bundle's index; those that hold no good bytes are left out.

    Raises
    ------
    ValueError
        if it is no such index.
    """
    first, *lines = data.decode("ascii").splitlines()
    head = json.loads(first)
    if len(lines) != head["members"]:
        raise ValueError("lines are missing")
    for number, line in enumerate(lines):
        path, offset, size, digest, mtime = json.loads(line)
        if digest != _UNKNOWN:
            yield path, Member(head["bundle"], number, offset, size, f"sha256:{digest}", mtime)
