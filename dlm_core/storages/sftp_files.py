"""Files on their way over SFTP: one that is written in blocks, and one that is read."""

from __future__ import annotations

import asyncio
import posixpath
import stat as stat_module
from collections import deque
from collections.abc import Awaitable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh import SFTPAttrs, SFTPClientFile

from dlm_core.errors import DlmError
from dlm_core.storages import ssh
from dlm_core.storages.port import Entry, Readable
from dlm_core.storages.ssh import Session

if TYPE_CHECKING:
    from dlm_core.storages.sftp import SftpStorage

#: a request that is not answered for so long never will be (a file system that hangs, say)
SILENCE_SECONDS = 120
#: how much busier a session is with a large file than with a question
LARGE_WEIGHT = 8
# bytes in a request where the server takes so many: OpenSSH's largest (255 KiB)
_REQUEST = 255 << 10
#: bytes that go over in one call from thread to loop
BLOCK = 4 * _REQUEST
# blocks of an upload that are under way at once
_BLOCKS_AHEAD = 4
# a file of some hundred terabytes takes so long
_HASH_SECONDS = 86_400
# no name stands on a command line: no shell looks at any, and csh and sh read this alike
_HASH = "xargs -0 sha256sum -z --"
# requests of a download that are under way at once
_REQUESTS_AHEAD = 8


class Upload:
    """A large file on its way; one session has it from its first byte to its last."""

    def __init__(
        self, storage: SftpStorage, path: str, session: Session, file: SFTPClientFile, offset: int
    ) -> None:
        self._storage, self._path = storage, path
        self._session, self._file, self._offset = session, file, offset

    @classmethod
    async def begun(cls, storage: SftpStorage, path: str, offset: int = 0) -> Upload:
        """Of a new file, or from ``offset`` on of one that is there."""
        session = await storage.connections.borrow(LARGE_WEIGHT)
        opening = storage.reopen if offset else storage.create
        try:
            file = await storage.told(session, path, opening(session, path, set()), making=True)
        except BaseException:
            session.busy -= LARGE_WEIGHT
            raise
        return cls(storage, path, session, file, offset)

    async def write(self, block: bytes) -> None:
        requests = writes(self._session, self._file, block, self._offset)
        self._offset += len(block)
        await self._storage.told(self._session, self._path, every(*requests), making=True)

    async def finish(self) -> None:
        last = [] if self._storage.shell else [synced(self._file)]
        await self._storage.told(
            self._session, self._path, every(*last, self._file.close()), making=True
        )
        self._session.busy -= LARGE_WEIGHT

    async def abandon(self, *, keep: bool) -> None:
        self._session.busy -= LARGE_WEIGHT
        with suppress(asyncssh.Error, OSError, TimeoutError, ValueError):
            async with asyncio.timeout(SILENCE_SECONDS):
                await self._file.close()
        if not keep:
            await self._storage.discard(self._session, self._path)


def pour(
    storage: SftpStorage, path: str, first: bytes, source: Readable, begun: int, *, keep: bool
) -> None:
    """A large file from ``begun`` on, a few blocks ahead of what the far side has answered for;
    what was written stays if it fails and ``keep`` is set."""
    upload = ssh.run(Upload.begun(storage, path, begun))
    waiting: deque[Future[None]] = deque()
    try:
        block = first
        while block:
            waiting.append(ssh.submit(upload.write(block)))
            if len(waiting) > _BLOCKS_AHEAD:
                waiting.popleft().result()
            block = take(source)
        while waiting:
            waiting.popleft().result()
        ssh.run(upload.finish())
    except BaseException:
        for one in waiting:
            one.cancel()
        ssh.run(upload.abandon(keep=keep))
        raise


def surely_written(size: int) -> int:
    """Of a file of ``size`` bytes whose upload was cut off, those that are there: later blocks may
    have come before earlier ones."""
    return max(0, size - (_BLOCKS_AHEAD + 2) * BLOCK)


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
        self._length = min(_REQUEST, session.sftp.limits.max_read_len or _REQUEST)
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


async def every(*work: Awaitable[Any]) -> list[Any]:
    """Results in order; the first error, once all have ended: none goes on by itself."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for one in results:
        if isinstance(one, BaseException):
            raise one
    return results


def writes(
    session: Session, file: SFTPClientFile, data: bytes, offset: int
) -> list[Awaitable[int]]:
    length = min(_REQUEST, session.sftp.limits.max_write_len or _REQUEST)
    return [file.write(data[n : n + length], offset + n) for n in range(0, len(data), length)]


async def synced(file: SFTPClientFile) -> None:
    """Wait until a file is on its medium; a server that cannot tell is believed."""
    with suppress(asyncssh.SFTPOpUnsupported):
        await file.fsync()


def _forget(task: asyncio.Future[Any]) -> None:
    """Whoever waits for it is told its error; the loop need not complain that nobody does."""
    if not task.cancelled():
        task.exception()


def take(source: Readable) -> bytes:
    """The next block; shorter only at the end."""
    parts, length = [], 0
    while length < BLOCK and (part := source.read(BLOCK - length)):
        parts.append(part)
        length += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def stamp_of(entry: Entry) -> Hashable:
    return entry.size, entry.mtime


async def digests_there(session: Session, names: Sequence[bytes]) -> dict[bytes, str]:
    """sha256 by name, computed on the far side; names are relative to the session's root.

    What is not there, or not answered for as ``sha256sum -z`` does, is left out.
    """
    top = posixpath.join(session.root, b"")
    asked = b"".join(top + name + b"\0" for name in names)
    async with asyncio.timeout(_HASH_SECONDS):
        _, printed, _ = await session.command(_HASH, asked)
    return dict(_digests(printed, top))


def _digests(output: bytes, top: bytes) -> Iterator[tuple[bytes, str]]:
    """Names below ``top`` and digests from ``sha256sum -z``; what looks otherwise tells nothing."""
    for line in output.split(b"\0"):
        digest, _, name = line.partition(b"  ")
        if len(digest) == 64 and name.startswith(top):
            with suppress(ValueError):
                yield name[len(top) :], bytes.fromhex(digest.decode("ascii")).hex()


def entry_of(path: str, attributes: SFTPAttrs) -> Entry:
    """What the protocol's attributes say of a path."""
    mode, mtime = attributes.permissions or 0, float(attributes.mtime or 0)
    if stat_module.S_ISREG(mode):
        return Entry(path, attributes.size or 0, mtime, "file")
    if stat_module.S_ISDIR(mode):
        return Entry(path, 0, mtime, "directory")
    kind = "symlink" if stat_module.S_ISLNK(mode) else "other"
    return Entry(path, attributes.size or 0, mtime, kind)


def raise_first(errors: Iterable[DlmError | None]) -> None:
    """Raise what a call about many things says of the first that failed."""
    for error in errors:
        if error is not None:
            raise error
