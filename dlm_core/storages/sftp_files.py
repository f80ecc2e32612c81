"""Files that are written over SFTP, and what both ways share."""

from __future__ import annotations

import asyncio
import stat as stat_module
from collections import deque
from collections.abc import Awaitable, Iterable
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
REQUEST = 255 << 10
#: bytes that go over in one call from thread to loop
BLOCK = 4 * REQUEST
# blocks of an upload that are under way at once
_BLOCKS_AHEAD = 4


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
    length = min(REQUEST, session.sftp.limits.max_write_len or REQUEST)
    return [file.write(data[n : n + length], offset + n) for n in range(0, len(data), length)]


async def synced(file: SFTPClientFile) -> None:
    """Wait until a file is on its medium; a server that cannot tell is believed."""
    with suppress(asyncssh.SFTPOpUnsupported):
        await file.fsync()


def take(source: Readable) -> bytes:
    """The next block; shorter only at the end."""
    parts, length = [], 0
    while length < BLOCK and (part := source.read(BLOCK - length)):
        parts.append(part)
        length += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
