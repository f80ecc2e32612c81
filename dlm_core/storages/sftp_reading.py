"""Reading over SFTP: one file as a stream, many small ones together, and digests from there."""

from __future__ import annotations

import asyncio
import posixpath
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh import SFTPClientFile

from dlm_core.errors import DlmError, StorageUnavailableError
from dlm_core.storages import ssh
from dlm_core.storages.port import Entry
from dlm_core.storages.sftp_files import BLOCK, LARGE_WEIGHT, REQUEST, SILENCE_SECONDS, every
from dlm_core.storages.ssh import Session

if TYPE_CHECKING:
    from dlm_core.storages.sftp import SftpStorage

# requests of a download that are under way at once
_REQUESTS_AHEAD = 8
# files of a request for many that are read at once
_FILES_AHEAD = 32
# a file of some hundred terabytes takes so long
_HASH_SECONDS = 86_400
# what a slow line brings in a second, in bytes
_SLOWEST = 32 << 10
# no name stands on a command line: no shell looks at any, and csh and sh read this alike
_HASH = "xargs -0 sha256sum -z --"
# nothing but files, for a pipe would be waited for; and no more of them than there should be
_PRINT = (
    """xargs -0 sh -c 'for f; do test -f "$f" && ! test -L "$f" || exit 1; done; """
    """exec cat -- "$@"' sh | head -c {most}"""
)


class SftpStream:
    """A file that is read once, front to back, some requests ahead of who reads it.

    ``offset`` is where it is begun, ``end`` up to where (bytes) it will be read.
    """

    def __init__(
        self,
        storage: SftpStorage,
        path: str,
        entry: Entry,
        session: Session,
        file: SFTPClientFile,
        offset: int,
        end: int,
    ) -> None:
        self._storage, self._path, self._session = storage, path, session
        self._file: SFTPClientFile | None = file
        self.size, self.opened = entry.size, stamp_of(entry)
        self._begin, self._last = offset, end
        self._length = min(REQUEST, session.sftp.limits.max_read_len or REQUEST)
        # answers to come, with the offset at which each ends if it is whole
        self._coming: deque[tuple[asyncio.Future[bytes], int]] = deque()
        self._rest, self._at_end = memoryview(b""), False
        self._asked = self._received = offset

    @classmethod
    async def begun(
        cls, storage: SftpStorage, path: str, offset: int = 0, size: int | None = None
    ) -> SftpStream:
        """A stream from ``offset`` on, of which no more than ``size`` bytes will be read."""
        session = await storage.connections.borrow(1)
        try:
            opening = cls._opened(storage, session, path, offset, size)
            return await storage.told(session, path, opening)
        except BaseException:
            session.busy -= 1
            raise

    @classmethod
    async def _opened(
        cls, storage: SftpStorage, session: Session, path: str, offset: int, size: int | None
    ) -> SftpStream:
        entry, file = await storage.open_file(session, path)
        end = entry.size if size is None else min(entry.size, offset + size)
        stream = cls(storage, path, entry, session, file, offset, end)
        try:
            await stream.begin()
        except BaseException:
            stream._drop()
            raise
        return stream

    async def begin(self) -> None:
        """Ask for the first bytes. A small file is there at once, and closed again."""
        self._ask()
        if self._coming and self._last - self._begin < self._length:
            self._rest = memoryview(await self._next())
            if self._at_end:
                await self._end()

    def _ask(self) -> None:
        """Keep some requests under way; the last asks for a byte more than there should be."""
        while len(self._coming) < _REQUESTS_AHEAD and self._asked <= self._last:
            self._ask_for(min(self._length, self._last + 1 - self._asked))

    def _ask_for(self, length: int) -> None:
        task = asyncio.ensure_future(self._part(self._asked, length))
        task.add_done_callback(_forget)
        self._asked += length
        self._coming.append((task, self._asked))

    async def _next(self) -> bytes:
        task, end = self._coming.popleft()
        part = await task
        self._received += len(part)
        self._at_end = self._received < end
        return part

    async def _part(self, offset: int, length: int) -> bytes:
        assert self._file is not None
        found = b""
        while len(found) < length:
            more = await self._file.read(length - len(found), offset + len(found))
            if not more:
                break
            found += more  # type: ignore[operator]  # opened without an encoding
        return found

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(BLOCK), b""))
        if len(self._rest) < size and not self._at_end:
            told = self._storage.told(self._session, self._path, self._more(size))
            self._rest = memoryview(ssh.run(told))
        taken = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return taken

    async def _more(self, size: int) -> bytes:
        parts, length = [bytes(self._rest)], len(self._rest)
        while length < size and not self._at_end:
            if not self._coming:
                self._ask_for(self._length)  # it has grown: whoever reads on is told so
            parts.append(await self._next())
            length += len(parts[-1])
            self._ask()
        return b"".join(parts)

    def stamp(self) -> Hashable:
        """Size and time of change (whole seconds, by the protocol) of what has the name now."""
        entry = self._storage.stat(self._path)
        return stamp_of(entry) if entry is not None else None

    def close(self) -> None:
        if self._file is not None:
            ssh.run(self._end())

    async def _end(self) -> None:
        if self._file is not None:
            self._session.busy -= 1
        self._drop()

    def _drop(self) -> None:
        file, self._file = self._file, None
        for task, _ in self._coming:
            task.cancel()
        if file is not None:
            # nobody waits for the answer
            closing = asyncio.ensure_future(file.close())
            closing.add_done_callback(_forget)

    def __enter__(self) -> SftpStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_together(
    storage: SftpStorage, files: Sequence[tuple[str, int]], stop: threading.Event | None
) -> dict[str, bytes]:
    """What ``files``, paths with the bytes that they should have, hold: all in a row as a command
    there prints them, or by requests that are sent without waiting for each other. Nothing if that
    fails, or ``stop`` is set: each by itself then tells why."""

    async def in_loop() -> dict[str, bytes]:
        async with storage.connections.session(LARGE_WEIGHT) as session:
            try:
                async with asyncio.timeout(SILENCE_SECONDS + sum(n for _, n in files) / _SLOWEST):
                    how = _printed if storage.shell else _asked_for
                    return await how(storage, session, files)
            except (asyncssh.Error, OSError, DlmError):
                return {}

    return ssh.run_unless(stop, in_loop()) or {}


async def _printed(
    storage: SftpStorage, session: Session, files: Sequence[tuple[str, int]]
) -> dict[str, bytes]:
    """Where one begins is told by the sizes of those before it: if one has another, all are lost,
    which digests show."""
    names = b"".join(storage.full(session, path) + b"\0" for path, _ in files)
    total = sum(size for _, size in files)
    status, printed, _ = await session.command(_PRINT.format(most=total + 1), names)
    if status != 0 or len(printed) != total:
        return {}
    found, begin = {}, 0
    for path, size in files:
        found[path] = printed[begin : begin + size]
        begin += size
    return found


async def _asked_for(
    storage: SftpStorage, session: Session, files: Sequence[tuple[str, int]]
) -> dict[str, bytes]:
    entries = await storage.look(session, [path for path, _ in files])
    free = asyncio.Semaphore(_FILES_AHEAD)

    async def one(path: str, size: int) -> tuple[str, bytes] | None:
        entry = entries[path]
        if entry is None or (entry.kind, entry.size) != ("file", size):
            return None
        async with free:
            file, data = await storage.open_looked_at(session, path), b""
            try:
                while more := len(data) < size and await file.read(size + 1 - len(data), len(data)):
                    data += more  # type: ignore[operator]  # opened without an encoding
            finally:
                closing = asyncio.ensure_future(file.close())  # nobody waits for the answer
                closing.add_done_callback(_forget)
        return path, data

    found = await every(*(one(*file) for file in files))
    return dict(pair for pair in found if pair is not None)


def digests_there(
    storage: SftpStorage, names: Sequence[bytes], stop: threading.Event | None
) -> dict[bytes, str]:
    """sha256 by name, computed on the far side; names are relative to the root.

    What is not there, or not answered for as ``sha256sum -z`` does, is left out, and all is once
    ``stop`` is set.

    Raises
    ------
    StorageUnavailableError, AccessDeniedError
    """

    async def in_loop() -> dict[bytes, str]:
        async with storage.connections.session(LARGE_WEIGHT) as session:
            top = posixpath.join(session.root, b"")
            asked = b"".join(top + name + b"\0" for name in names)
            try:
                async with asyncio.timeout(_HASH_SECONDS):
                    _, printed, _ = await session.command(_HASH, asked)
            except (asyncssh.Error, OSError) as error:
                told = f"sha256sum there: {ssh.one_line(error)}"
                raise StorageUnavailableError(storage=storage.name, message=told) from error
        return dict(_digests(printed, top))

    return ssh.run_unless(stop, in_loop()) or {}


def _digests(output: bytes, top: bytes) -> Iterator[tuple[bytes, str]]:
    """Names below ``top`` and digests from ``sha256sum -z``; what looks otherwise tells nothing."""
    for line in output.split(b"\0"):
        digest, _, name = line.partition(b"  ")
        if len(digest) == 64 and name.startswith(top):
            with suppress(ValueError):
                yield name[len(top) :], bytes.fromhex(digest.decode("ascii")).hex()


def stamp_of(entry: Entry) -> Hashable:
    return entry.size, entry.mtime


def _forget(task: asyncio.Future[Any]) -> None:
    """Whoever waits for it is told its error; the loop need not complain that nobody does."""
    if not task.cancelled():
        task.exception()
