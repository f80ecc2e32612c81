"""Copies of files that the far side of SFTP makes, without their bytes coming over the line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import asyncssh
from asyncssh import SFTPClientFile

from dlm_core.storages import ssh
from dlm_core.storages.sftp_files import LARGE_WEIGHT, every, synced
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
    storage: SftpStorage, theirs: SftpStorage, source: str, path: str, size: int,
    moved: Callable[[int], None],
) -> bool:  # fmt: skip
    """Make a new file of the first ``size`` bytes of another, ``source`` of the storage ``theirs``,
    which the same user has on the same machine: by the server's ``copy-data`` (OpenSSH 9 and
    newer), else by ``dd`` where commands may be run.

    Exactly as many, however much is there: of a file that somebody writes to the end is not sure
    to be whole, and how far it is follows from the size that it was seen to have. False, and
    nothing is left, if the far side can do neither or has fewer bytes.

    Raises
    ------
    StorageUnavailableError, PayloadExistsError, PayloadNotFoundError, AccessDeniedError
        and what ``moved`` raises; then nothing is left either.
    """
    copy = ssh.run(_Clone.begun(storage, theirs, source, path, size))
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
    """One on its way; one session has it from its beginning to its end.

    Parameters
    ----------
    places : absolute, of the source and of the copy.
    """

    def __init__(
        self, storage: SftpStorage, path: str, places: tuple[bytes, bytes], size: int,
        session: Session, files: tuple[SFTPClientFile, SFTPClientFile],
    ) -> None:  # fmt: skip
        self._storage, self._path, self._places, self._size = storage, path, places, size
        self._session, self._files = session, files

    @classmethod
    async def begun(
        cls, storage: SftpStorage, theirs: SftpStorage, source: str, path: str, size: int
    ) -> _Clone | None:
        session = await storage.connections.borrow(LARGE_WEIGHT)
        try:
            if not (session.sftp.supports_remote_copy or storage.shell):
                session.busy -= LARGE_WEIGHT
                return None
            there = session if theirs is storage else await _seen_from(theirs, session)
            entry, file = await theirs.told(there, source, theirs.open_file(there, source))
            if entry.size < size:
                await theirs.told(there, source, file.close())
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
        places = theirs.full(there, source), storage.full(session, path)
        return cls(storage, path, places, size, session, (file, new))

    async def chunk(self, offset: int, length: int) -> bool:
        """Copy some bytes; False if that cannot be."""
        by = self._by_server if self._session.sftp.supports_remote_copy else self._by_command
        work = by(offset, length)
        return await self._storage.told(self._session, self._path, work, making=True)

    async def _by_server(self, offset: int, length: int) -> bool:
        try:
            await self._session.sftp.remote_copy(*self._files, offset, length, offset)
        except (asyncssh.SFTPEOFError, asyncssh.SFTPOpUnsupported):
            return False
        return True

    async def _by_command(self, offset: int, length: int) -> bool:
        source, new = self._places
        operands = (
            b"if=" + source, b"of=" + new, b"skip=%d" % offset, b"seek=%d" % offset,
            b"count=%d" % length, *_TERMS,
        )  # fmt: skip
        given = b"".join(operand + b"\0" for operand in operands)
        status, _, _ = await self._session.command(_DD, given)
        return status == 0

    async def is_whole(self) -> bool:
        """Whether all bytes are there, and on their medium where no sync of a batch will see to
        that: a source that became shorter gives fewer."""
        looked = self._files[1].stat()
        told = await self._storage.told(self._session, self._path, looked, making=True)
        if not self._storage.shell:
            done = synced(self._files[1])
            await self._storage.told(self._session, self._path, done, making=True)
        return told.size == self._size

    async def end(self, *, keep: bool) -> None:
        self._session.busy -= LARGE_WEIGHT
        closing = every(*(file.close() for file in self._files))
        try:
            await self._storage.told(self._session, self._path, closing, making=True)
        finally:
            if not keep:
                await self._storage.discard(self._session, self._path)


async def _seen_from(storage: SftpStorage, session: Session) -> Session:
    """A session of another storage of this user's on this machine, as one of ``storage``."""
    path = storage.connections.address.path.encode("utf-8", "surrogateescape")
    root = await storage.told(session, "", session.sftp.realpath(path))
    return Session(session.connection, session.sftp, root)
