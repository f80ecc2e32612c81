"""SFTP: HPC machines and whatever else OpenSSH stands in front of.

What needs the far side's answers is a coroutine that runs in the loop of
:mod:`dlm_core.storages.ssh`; as many requests as may be are sent before the first is answered, for
each costs a round trip.
"""

from __future__ import annotations

import asyncio
import posixpath
import stat as stat_module
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import asyncssh
from asyncssh import SFTPAttrs, SFTPClientFile

from dlm_core.errors import (
    AccessDeniedError,
    DlmError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages import ssh
from dlm_core.storages.config import read_config
from dlm_core.storages.port import PRIVATE, Entry, Readable, ReadStream, Usage
from dlm_core.storages.ranges import Slice
from dlm_core.storages.sftp_clone import clone
from dlm_core.storages.sftp_files import (
    BLOCK,
    LARGE_WEIGHT,
    SILENCE_SECONDS,
    entry_of,
    every,
    pour,
    raise_first,
    surely_written,
    synced,
    take,
    writes,
)
from dlm_core.storages.sftp_reading import SftpStream, digests_there, read_together
from dlm_core.storages.ssh import Session

_T = TypeVar("_T")
_P = TypeVar("_P")

_READ = asyncssh.FXF_READ
_CREATE = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
_LARGE_AT_ONCE = 4
_LOOKED_AT_ONCE = 64
_LOOKED_IN_ONE_CALL = 1024
# a disk with less than this does not take another request
_NO_ROOM = 1 << 20
_READ_ONLY = 1  # of statvfs' f_flag
_ABSENT = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory)
_DENIED = (asyncssh.SFTPPermissionDenied, asyncssh.SFTPWriteProtect)
_FULL = (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded)
_REFUSED = (asyncssh.SFTPBadMessage, asyncssh.SFTPInvalidFilename, asyncssh.SFTPLinkLoop)
_LOST = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)
_SYNC = "xargs -0 sync -f -- || sync"


def open_sftp(name: str, root: str, config: Mapping[str, Any]) -> SftpStorage:
    """A folder behind SFTP; ``root`` is ``user@host:port/absolute/path``.

    Raises
    ------
    InvalidValueError
        if the root is of another form, the config has unknown keys (a secret among them), host keys
        are missing, or neither a key nor a password is named.
    """
    parsed = read_config(ssh.SshConfig, name, config)
    address = ssh.parse_address(name, root)
    ssh.read_host_keys(name, parsed.host_keys)
    if not (parsed.key or parsed.password):
        raise InvalidValueError(
            what=f"config of storage {name}", value="", expected="key=env:NAME or password=env:NAME"
        )
    return SftpStorage(name, ssh.Connections(name, address, parsed), shell=parsed.shell)


class SftpStorage:
    """A folder on a machine that speaks SFTP; see :class:`dlm_core.storages.port.Storage`.

    The protocol has no call that refuses symbolic links on the way to a file: each path's folder
    is resolved by the server, and used only if it comes out as it went in. Somebody who may write
    there can still put a link in its place between the two.

    Parameters
    ----------
    shell : whether commands may be run there, for digests and one sync a batch. Else every file is
        synced by itself (fsync@openssh.com) and read back.
    concurrency : transfers at once.
    """

    atomic_write = False
    exclusive = "file"
    remote = True

    def __init__(
        self, name: str, connections: ssh.Connections, *, shell: bool, concurrency: int = 32
    ) -> None:
        self.name, self.concurrency = name, concurrency
        self.connections, self.shell = connections, shell
        self._large = threading.BoundedSemaphore(_LARGE_AT_ONCE)
        # folders with names that are not durable yet
        self._touched: set[str] = set()
        self._flushing = threading.Lock()
        self._lock = threading.Lock()
        weakref.finalize(self, ssh.end, connections).atexit = False

    # --- paths and errors ------------------------------------------------------------------------

    def _octets(self, path: str) -> bytes:
        framed = f"/{path}/"
        if "//" in framed or "/./" in framed or "/../" in framed or "\0" in path:
            raise self._refused(path, "want relative, without '.', '..' or ''")
        return path.encode("utf-8", "surrogateescape")

    def _refused(self, path: str, message: str) -> PathRefusedError:
        return PathRefusedError(storage=self.name, path=path, message=message)

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)

    def _run(self, path: str, work: Callable[[Session], Awaitable[_T]]) -> _T:
        """``work`` with a session, in the loop; what goes wrong is told in the port's words."""

        async def in_loop() -> _T:
            async with self.connections.session() as session:
                return await self.told(session, path, work(session))

        return ssh.run(in_loop())

    async def told(
        self, session: Session, path: str, work: Awaitable[_T], making: bool = False
    ) -> _T:
        """``work``, or what went wrong in the port's words; ``making``: never "not found"."""
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                return await work
        except TimeoutError:
            session.connection.abort()  # whatever it would answer, nobody waits for it any more
            raise self._unavailable(f"no answer for {SILENCE_SECONDS} s about {path!r}") from None
        except (asyncssh.Error, OSError) as error:
            raise await self._translate(session, path, error, making) from error

    async def _translate(
        self, session: Session, path: str, error: Exception, making: bool = False
    ) -> StorageError:
        if isinstance(error, _DENIED):
            return AccessDeniedError(storage=self.name, path=path, message=ssh.one_line(error))
        if isinstance(error, _FULL):
            return StorageFullError(storage=self.name, message=ssh.one_line(error))
        if isinstance(error, asyncssh.SFTPFileAlreadyExists):
            return PayloadExistsError(storage=self.name, path=path)
        if isinstance(error, _ABSENT) and session.alive():
            absent = await self._absent(session, path)
            if making and isinstance(absent, PayloadNotFoundError):
                return self._unavailable(f"the folder of {path} went while it was used")
            return absent
        if isinstance(error, _REFUSED) and session.alive():
            return self._refused(path, ssh.one_line(error))
        if isinstance(error, asyncssh.SFTPFailure):
            return await self._why(session, path, error, making)
        return self._unavailable(f"{path}: {ssh.one_line(error)}" if path else ssh.one_line(error))

    async def _root_is_gone(self, session: Session) -> StorageUnavailableError | None:
        """A root that is gone is an outage, not an empty storage."""
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                attributes = await session.sftp.stat(session.root)
        except (asyncssh.Error, OSError) as error:
            return self._unavailable(f"its root is not there: {ssh.one_line(error)}")
        if not stat_module.S_ISDIR(attributes.permissions or 0):
            return self._unavailable("its root is no folder")
        return None

    async def _why(self, session: Session, path: str, error: Exception, new: bool) -> StorageError:
        """The protocol has one word for a full disk, a read-only one, and whatever else."""
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                found = await session.sftp.statvfs(session.root)
        except (asyncssh.Error, OSError):
            found = None
        if found is not None and found.flags & _READ_ONLY:
            return AccessDeniedError(storage=self.name, path=path, message="read-only file system")
        if found is not None and new:  # to read takes no room
            if found.bavail * found.frsize < _NO_ROOM:
                return StorageFullError(storage=self.name, message="no space left on the far side")
            if found.files and not found.favail:
                return StorageFullError(storage=self.name, message="no inodes left on the far side")
        return self._unavailable(f"{path}: {ssh.one_line(error)} (a quota, or a faulty disk?)")

    # --- looking ---------------------------------------------------------------------------------

    def stat(self, path: str) -> Entry | None:
        return self.stat_many([path])[path]

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        wanted = sorted({path: self._octets(path) for path in paths})
        found: dict[str, Entry | None] = {}
        for n in range(0, len(wanted), _LOOKED_IN_ONE_CALL):
            some = wanted[n : n + _LOOKED_IN_ONE_CALL]
            found.update(self._run(some[0], partial(self.look, paths=some)))
        return found

    async def look(self, session: Session, paths: Sequence[str]) -> dict[str, Entry | None]:
        folders = sorted({posixpath.dirname(path) for path in paths})
        free = asyncio.Semaphore(_LOOKED_AT_ONCE)

        async def limited(work: Awaitable[_T]) -> _T:
            async with free:
                return await work

        found = await every(
            *(limited(self._lstat(session, path)) for path in paths),
            *(limited(self._linked(session, folder)) for folder in folders),
        )
        entries, linked = found[: len(paths)], found[len(paths) :]
        if any(linked):
            raise self._refused(folders[linked.index(True)], "a symbolic link stands in the way")
        if None in entries and (outage := await self._root_is_gone(session)):
            raise outage
        return dict(zip(paths, entries, strict=True))

    async def _lstat(self, session: Session, path: str) -> Entry | None:
        try:
            return entry_of(path, await session.sftp.lstat(self.full(session, path)))
        except _ABSENT:
            return None

    async def _linked(self, session: Session, folder: str) -> bool:
        """Whether a link leads away from ``folder``; one that is not there leads nowhere.

        OpenSSH resolves what is not there too if what is above it is.
        """
        full = self.full(session, folder)
        try:
            return await session.sftp.realpath(full) != full
        except _ABSENT:
            return False

    def full(self, session: Session, path: str) -> bytes:
        octets = self._octets(path) if path else b""
        return posixpath.join(session.root, octets) if octets else session.root

    def walk(self, path: str = "") -> Iterator[Entry]:
        levels = [iter(self._listed(path, top=True))]
        while levels:
            for entry in levels[-1]:
                if entry.kind != "directory":
                    yield entry
                elif entry.path != PRIVATE:
                    levels.append(iter(self._listed(entry.path)))
                    break
            else:
                levels.pop()

    def _listed(self, path: str, top: bool = False) -> list[Entry]:
        try:
            return self._run(path, lambda session: self._list(session, path))
        except PayloadNotFoundError:
            if top:
                raise
            return []  # removed since its parent was listed

    async def _list(self, session: Session, path: str) -> list[Entry]:
        full = self.full(session, path)
        linked, names = await every(self._linked(session, path), session.sftp.readdir(full))
        if linked:
            raise self._refused(path, "a symbolic link stands in the way")
        entries = []
        for one in names:
            if one.filename not in (b".", b".."):
                name = one.filename.decode("utf-8", "surrogateescape")
                entries.append(
                    (one.filename, entry_of(f"{path}/{name}" if path else name, one.attrs))
                )
        return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]

    def open_read(self, path: str) -> SftpStream:
        return self.open_read_at(path, 0)

    def open_read_at(self, path: str, offset: int) -> SftpStream:
        self._octets(path)
        return ssh.run(SftpStream.begun(self, path, offset))

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes of a file from ``offset`` on."""
        self._octets(path)
        stream = ssh.run(SftpStream.begun(self, path, offset, size))
        return Slice(stream, max(0, min(size, stream.size - offset)))

    async def open_file(self, session: Session, path: str) -> tuple[Entry, SFTPClientFile]:
        entry = (await self.look(session, [path]))[path]
        if entry is None:
            raise PayloadNotFoundError(storage=self.name, path=path)
        if entry.kind != "file":
            raise self._refused(path, "not a regular file")
        return entry, await self.open_looked_at(session, path)

    async def open_looked_at(self, session: Session, path: str) -> SFTPClientFile:
        """Open for reading what :meth:`look` found to be a file."""
        full = self.full(session, path)
        return await session.sftp.open(full, _READ, encoding=None, block_size=None)

    def read_many(
        self, files: Sequence[tuple[str, int]], stop: threading.Event | None = None
    ) -> dict[str, bytes]:
        for path, _ in files:
            self._octets(path)
        return read_together(self, files, stop) if files else {}

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        self._octets(path)
        first = take(source)
        if len(first) < BLOCK:
            raise_first(self.write_many([(path, first)]))
        else:
            with self._large:
                pour(self, path, first, source, 0, keep=False)
        return None

    def write_on(self, path: str, source: Readable, begun: int) -> None:
        self._octets(path)
        with self._large:
            pour(self, path, take(source), source, begun, keep=True)

    def left_of(self, path: str) -> int:
        entry = self.stat(path)
        return surely_written(entry.size) if entry is not None and entry.kind == "file" else 0

    def copy_from(
        self, source: Any, source_path: str, path: str, size: int, moved: Callable[[int], None]
    ) -> bool:
        if not isinstance(source, SftpStorage) or not self.connections.same_as(source.connections):
            return False
        return clone(self, source, source_path, path, size, moved)

    def write_many(self, files: Sequence[tuple[str, bytes]]) -> list[DlmError | None]:
        return self._each_of(files, self._put)

    def _each_of(
        self,
        pairs: Sequence[tuple[str, _P]],
        work: Callable[[Session, str, _P, set[str]], Awaitable[None]],
    ) -> list[DlmError | None]:
        """``work`` on all pairs of a path and something, many at once: how each of them ended."""
        looked: set[str] = set()
        free = asyncio.Semaphore(self.concurrency)

        # a tuple: an error that is a result must not be taken for one that was raised
        async def one(session: Session, path: str, what: _P) -> tuple[DlmError | None]:
            try:
                self._octets(path)
                async with free:
                    await self.told(session, path, work(session, path, what, looked), making=True)
            except DlmError as error:
                return (error,)
            return (None,)

        async def in_loop() -> list[DlmError | None]:
            async with self.connections.session(min(len(pairs), LARGE_WEIGHT)) as session:
                ended = await every(*(one(session, *pair) for pair in pairs))
            return [error for (error,) in ended]

        return ssh.run(in_loop())

    async def _put(self, session: Session, path: str, data: bytes, looked: set[str]) -> None:
        """A whole small file: its bytes and its end are sent without waiting in between."""
        file = await self.create(session, path, looked)
        try:
            await every(
                *writes(session, file, data, 0),
                *([] if self.shell else [synced(file)]),
                file.close(),
            )
        except (asyncssh.Error, OSError) as error:
            translated = await self._translate(session, path, error, making=True)
            await self.discard(session, path)
            raise translated from error

    async def create(self, session: Session, path: str, looked: set[str]) -> SFTPClientFile:
        """Open a new file for writing; ``looked``: see :meth:`_enter`."""
        try:
            return await self._in_folder(
                session, path, looked, partial(self._create_in, session, self.full(session, path))
            )
        except asyncssh.SFTPFailure:
            if await self._lstat(session, path) is not None:
                raise PayloadExistsError(storage=self.name, path=path) from None
            raise

    async def reopen(self, session: Session, path: str, looked: set[str]) -> SFTPClientFile:
        """Open a file that is there for writing."""
        full = self.full(session, path)
        again = partial(session.sftp.open, full, asyncssh.FXF_WRITE, encoding=None, block_size=None)
        return await self._in_folder(session, path, looked, again)

    async def _create_in(self, session: Session, full: bytes) -> SFTPClientFile:
        attributes = SFTPAttrs(permissions=0o644)
        return await session.sftp.open(full, _CREATE, attributes, encoding=None, block_size=None)

    async def _in_folder(
        self, session: Session, path: str, looked: set[str], work: Callable[[], Awaitable[_T]]
    ) -> _T:
        """Do ``work`` on ``path``; if that finds no folder, make it and do it again."""
        folder = posixpath.dirname(path)
        await self._enter(session, folder, looked)
        try:
            return await work()
        except _ABSENT:
            await self._make(session, folder, looked)
            return await work()
        finally:
            # not before the answer: a flush in between would miss what was done
            self._touch(folder)

    def _touch(self, folder: str) -> None:
        with self._lock:
            self._touched.add(folder)

    async def _enter(self, session: Session, folder: str, looked: set[str]) -> None:
        """Make sure that no link leads away from a folder, be it there or not.

        ``looked`` has those of the same batch that were looked at: once for each is enough.
        """
        if folder in looked:
            return
        if await self._linked(session, folder):
            raise self._refused(folder, "a symbolic link stands in the way")
        looked.add(folder)

    async def _make(self, session: Session, folder: str, looked: set[str]) -> None:
        """Make a folder, and what is missing above it."""
        if not folder:
            raise await self._root_is_gone(session) or self._unavailable("its root changes")
        full, attributes = self.full(session, folder), SFTPAttrs(permissions=0o755)
        try:
            await self._in_folder(
                session, folder, looked, lambda: session.sftp.mkdir(full, attributes)
            )
        except asyncssh.SFTPFailure:
            there = await self._lstat(session, folder)  # another made it, or something else is so
            if there is None:
                raise
            if there.kind != "directory":
                raise self._refused(folder, "no folder, though one is wanted") from None

    async def discard(self, session: Session, path: str) -> None:
        """Clearing up after an error that is being told; the sweep finds what stays."""
        with suppress(asyncssh.Error, OSError, TimeoutError):
            async with asyncio.timeout(SILENCE_SECONDS):
                await session.sftp.remove(self.full(session, path))

    def flush(self) -> None:
        if self.shell:
            self._syncevery()
            return
        # one after the other: what another has begun to make durable is not durable yet
        with self._flushing:
            with self._lock:
                folders, self._touched = self._touched, set()
            try:
                self._run("", lambda session: self._sync_folders(session, folders))
            except BaseException:
                with self._lock:
                    self._touched |= folders
                raise

    def _syncevery(self) -> None:
        status, _, complaint = self._run("", lambda session: session.command(_SYNC, session.root))
        if status != 0:
            said = complaint.decode("utf-8", "replace").strip().split("\n")[-1][:200]
            raise self._unavailable(f"'{_SYNC}' fails there, is shell=false right? {said}")

    async def _sync_folders(self, session: Session, folders: Iterable[str]) -> None:
        for folder in sorted(folders):
            with suppress(*_ABSENT):  # removed since
                file = await session.sftp.open(self.full(session, folder), _READ, encoding=None)
                await every(synced(file), file.close())

    def rename(self, source: str, destination: str) -> None:
        raise_first(self.rename_many([(source, destination)]))

    def rename_many(self, pairs: Sequence[tuple[str, str]]) -> list[DlmError | None]:
        return self._each_of(pairs, self._rename)

    async def _rename(
        self, session: Session, source: str, destination: str, looked: set[str]
    ) -> None:
        """Plain rename of SFTP 3: OpenSSH links and unlinks, and so replaces nothing."""
        old = posixpath.dirname(source)
        full = self.full(session, source), self.full(session, destination)
        self._touch(old)

        async def move() -> None:
            try:
                await session.sftp.rename(*full)
            except _ABSENT:
                if await self._lstat(session, source) is None:  # nothing is made for no source
                    raise await self._absent(session, source) from None
                raise

        await self._enter(session, old, looked)
        try:
            await self._in_folder(session, destination, looked, move)
        except asyncssh.SFTPFailure:
            if await self._lstat(session, destination) is None:
                raise
            raise PayloadExistsError(storage=self.name, path=destination) from None
        except _ABSENT:
            raise await self._absent(session, source) from None

    async def _absent(self, session: Session, path: str) -> StorageError:
        outage = await self._root_is_gone(session)
        return outage or PayloadNotFoundError(storage=self.name, path=path)

    def remove(self, path: str) -> None:
        self._octets(path)
        entry = self.stat(path)
        if entry is None:
            return
        if entry.kind == "directory":
            self._remove_tree(path)
        else:
            self._run(path, lambda session: self._remove_files(session, [path]))

    def _remove_tree(self, path: str) -> None:
        entries = self._listed(path)
        for entry in entries:
            if entry.kind == "directory":
                self._remove_tree(entry.path)
        files = [entry.path for entry in entries if entry.kind != "directory"]
        for n in range(0, len(files), _LOOKED_IN_ONE_CALL):
            some = files[n : n + _LOOKED_IN_ONE_CALL]
            self._run(path, partial(self._remove_files, paths=some))

        async def remove_folder(session: Session) -> None:
            with suppress(*_ABSENT):
                await session.sftp.rmdir(self.full(session, path))

        self._run(path, remove_folder)

    async def _remove_files(self, session: Session, paths: Sequence[str]) -> None:
        async def remove_one(path: str) -> None:
            with suppress(*_ABSENT):
                await session.sftp.remove(self.full(session, path))

        for n in range(0, len(paths), _LOOKED_AT_ONCE):
            await every(*map(remove_one, paths[n : n + _LOOKED_AT_ONCE]))
        self._touch(posixpath.dirname(paths[0]))

    def usage(self) -> Usage | None:
        async def work(session: Session) -> Usage | None:
            try:
                found = await session.sftp.statvfs(session.root)
            except asyncssh.SFTPOpUnsupported:
                return None
            return Usage(found.blocks * found.frsize, (found.blocks - found.bavail) * found.frsize)

        return self._run("", work)

    def check(self) -> None:
        async def work(session: Session) -> None:
            if outage := await self._root_is_gone(session):
                raise outage
            async for _ in session.sftp.scandir(session.root):
                break
            if self.shell:
                if not await session.has_shell():
                    raise self._unavailable("no command can be run there: say shell=false")

        self._run("", work)

    # --- proving ---------------------------------------------------------------------------------

    def digest_many(
        self, paths: Sequence[str], stop: threading.Event | None = None
    ) -> dict[str, str]:
        names = {self._octets(path): path for path in paths} if self.shell else {}
        told = digests_there(self, list(names), stop) if names else {}
        return {names[name]: f"sha256:{digest}" for name, digest in told.items() if name in names}
