"""Copies of files that the far side of SFTP makes, without their bytes coming over the line."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import asyncssh
from asyncssh import SFTPClientFile

from dlm_core.storages import ssh
from dlm_core.storages.sftp_files import LARGE_WEIGHT, every
from dlm_core.storages.ssh import Session

if TYPE_CHECKING:
    from dlm_core.storages.sftp import SftpStorage

#: bytes that are copied by one request, during which the server answers no other of its session
CHUNK = 128 << 20
# operands come by standard input: no name stands on a command line, and no shell looks at any
_DD = "xargs -0 dd"
_TERMS = (
    b"bs=1M", b"iflag=skip_bytes,count_bytes,fullblock,nofollow", b"oflag=seek_bytes,nofollow",
    b"conv=notrunc,nocreat",
)  # fmt: skip


def clone(
    storage: SftpStorage, source: str, path: str, size: int, moved: Callable[[int], None]
) -> bool:
    """Make a new file of the first ``size`` bytes of another: by the server's ``copy-data``
    (OpenSSH 9 and newer), else by ``dd`` where commands may be run.

    Exactly as many, however much is there: of a file that somebody writes to the end is not sure
    to be whole, and how far it is follows from the size that it was seen to have. False, and
    nothing is left, if the far side can do neither or has fewer bytes.

    Raises
    ------
    StorageUnavailableError, PayloadExistsError, PayloadNotFoundError, AccessDeniedError
        and what ``moved`` raises; then nothing is left either.
    """
    copy = ssh.run(_Clone.begun(storage, source, path, size))
    if copy is None:
        return False
    whole = False
    try:
        for offset in range(0, size, CHUNK):
            length = min(CHUNK, size - offset)
            if not ssh.run(copy.chunk(offset, length)):
                return False
            moved(length)
        whole = ssh.run(copy.is_whole())
    finally:
        ssh.run(copy.end(keep=whole))
    return whole


class _Clone:
    """One on its way; one session has it from its beginning to its end."""

    def __init__(
        self, storage: SftpStorage, names: tuple[str, str], size: int, session: Session,
        files: tuple[SFTPClientFile, SFTPClientFile],
    ) -> None:  # fmt: skip
        self._storage, self._names, self._size = storage, names, size
        self._session, self._files = session, files

    @classmethod
    async def begun(cls, storage: SftpStorage, source: str, path: str, size: int) -> _Clone | None:
        session = await storage.connections.borrow(LARGE_WEIGHT)
        try:
            if not (session.sftp.supports_remote_copy or storage.shell):
                session.busy -= LARGE_WEIGHT
                return None
            entry, file = await storage.told(session, source, storage.open_file(session, source))
            if entry.size < size:
                await storage.told(session, source, file.close())
                session.busy -= LARGE_WEIGHT
                return None
            making = storage.create(session, path, set())
            try:
                new = await storage.told(session, path, making, making=True)
            except BaseException:
                with suppress(asyncssh.Error, OSError):
                    await file.close()
                raise
        except BaseException:
            session.busy -= LARGE_WEIGHT
            raise
        return cls(storage, (source, path), size, session, (file, new))

    async def chunk(self, offset: int, length: int) -> bool:
        """Copy some bytes; False if that cannot be."""
        by = self._by_server if self._session.sftp.supports_remote_copy else self._by_command
        work = by(offset, length)
        return await self._storage.told(self._session, self._names[1], work, making=True)

    async def _by_server(self, offset: int, length: int) -> bool:
        try:
            await self._session.sftp.remote_copy(*self._files, offset, length, offset)
        except (asyncssh.SFTPEOFError, asyncssh.SFTPOpUnsupported):
            return False
        return True

    async def _by_command(self, offset: int, length: int) -> bool:
        root = self._session.root
        names = [
            posixpath.join(root, name.encode("utf-8", "surrogateescape")) for name in self._names
        ]
        operands = (
            b"if=" + names[0], b"of=" + names[1], b"skip=%d" % offset, b"seek=%d" % offset,
            b"count=%d" % length, *_TERMS,
        )  # fmt: skip
        given = b"".join(operand + b"\0" for operand in operands)
        status, _, _ = await self._session.command(_DD, given)
        return status == 0

    async def is_whole(self) -> bool:
        """Whether all bytes are there: a source that became shorter gives fewer."""
        looked = self._files[1].stat()
        told = await self._storage.told(self._session, self._names[1], looked, making=True)
        return told.size == self._size

    async def end(self, *, keep: bool) -> None:
        self._session.busy -= LARGE_WEIGHT
        closing = every(*(file.close() for file in self._files))
        try:
            await self._storage.told(self._session, self._names[1], closing, making=True)
        finally:
            if not keep:
                await self._storage.discard(self._session, self._names[1])
