"""POSIX file systems: local disks, NFS, Lustre, anything that is mounted."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat as stat_module
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from dlm_core.errors import (
    AccessDeniedError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.port import PRIVATE, Entry, Usage

_BLOCK = 1 << 20
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_REFUSED = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EILSEQ}
_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR}


class PosixStorage:
    """A folder as a storage; see :class:`dlm_core.storages.port.Storage` for the contract.

    Confinement: the folder that holds a path must resolve to itself below the root, so no symbolic
    link on the way is followed, and files are opened with ``O_NOFOLLOW``. Folders that were found
    good are remembered for as long as their inode stays.
    """

    atomic_write = False

    def __init__(self, name: str, root: str, concurrency: int = 4) -> None:
        self.name = name
        self.root = os.path.realpath(root)
        self.concurrency = concurrency
        self._parents: dict[str, tuple[int, int]] = {}

    # --- paths -----------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in path:
            raise PathRefusedError(
                storage=self.name, path=path, message="want relative, without '.', '..' or ''"
            )
        full = f"{self.root}/{path}"
        self._check_parent(os.path.dirname(full), path)
        return full

    def _check_parent(self, parent: str, path: str) -> None:
        try:
            status = os.lstat(parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                # what is not there yet cannot lead out; the nearest folder that is there decides
                above = os.path.dirname(parent)
                if len(parent) > len(self.root):
                    self._check_parent(above, path)
                return
            raise self._translate(error, path) from error
        stamp = (status.st_dev, status.st_ino)
        if self._parents.get(parent) == stamp:
            return
        if os.path.realpath(parent) != parent:
            raise PathRefusedError(
                storage=self.name, path=path, message="a symbolic link stands in the way"
            )
        if len(self._parents) > 100_000:
            self._parents.clear()
        self._parents[parent] = stamp

    def _check_root(self) -> None:
        """A root that is gone is an outage, not an empty storage."""
        if not os.path.isdir(self.root):
            raise StorageUnavailableError(
                storage=self.name, message=f"its root {self.root} is not there"
            )

    def _translate(self, error: OSError, path: str) -> StorageError:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return StorageFullError(storage=self.name, message=reason)
        if error.errno in _DENIED:
            return AccessDeniedError(storage=self.name, path=path, message=reason)
        if error.errno in _REFUSED:
            return PathRefusedError(storage=self.name, path=path, message=reason)
        if error.errno in _OCCUPIED:
            return PayloadExistsError(storage=self.name, path=path)
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            if not os.path.isdir(self.root):
                return StorageUnavailableError(
                    storage=self.name, message=f"its root {self.root} is not there"
                )
            return PayloadNotFoundError(storage=self.name, path=path)
        return StorageUnavailableError(storage=self.name, message=f"{path}: {reason}")

    # --- looking ---------------------------------------------------------------------------------

    def stat(self, path: str) -> Entry | None:
        try:
            return _entry(path, os.lstat(self._full(path)))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                self._check_root()
                return None
            raise self._translate(error, path) from error

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        return {path: self.stat(path) for path in paths}

    def walk(self, path: str = "") -> Iterator[Entry]:
        top = self._full(path) if path else self.root
        try:
            yield from self._scan(top, path)
        except OSError as error:
            translated = self._translate(error, path)
            raise translated from error

    def _scan(self, folder: str, prefix: str) -> Iterator[Entry]:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        for entry in entries:
            relative = f"{prefix}/{entry.name}" if prefix else entry.name
            if relative == PRIVATE:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._scan(entry.path, relative)
            else:
                yield _entry(relative, entry.stat(follow_symlinks=False))

    def open_read(self, path: str) -> BinaryIO:
        try:
            descriptor = os.open(self._full(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self._translate(error, path) from error
        if not stat_module.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PathRefusedError(storage=self.name, path=path, message="not a regular file")
        return os.fdopen(descriptor, "rb", buffering=0)

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: BinaryIO, size: int) -> str | None:
        full = self._full(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                descriptor = os.open(full, flags, 0o644)
            except FileNotFoundError:
                self._make_parent(full)
                descriptor = os.open(full, flags, 0o644)
        except OSError as error:
            raise self._translate(error, path) from error
        try:
            self._pour(source, descriptor, path)
        except BaseException:
            # the medium or the source failed, or we were interrupted: nothing may stay
            _unlink_quietly(full)
            raise
        finally:
            os.close(descriptor)
        return None

    def _pour(self, source: BinaryIO, descriptor: int, path: str) -> None:
        while block := source.read(_BLOCK):
            view = memoryview(block)
            try:
                while view:
                    view = view[os.write(descriptor, view) :]
            except OSError as error:
                raise self._translate(error, path) from error

    def _make_parent(self, full: str) -> None:
        self._check_root()
        os.makedirs(os.path.dirname(full), mode=0o755, exist_ok=True)

    def read_back(self, path: str) -> BinaryIO:
        """As :meth:`open_read`, but from the medium where the kernel lets go of its cache."""
        stream = self.open_read(path)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return stream

    def flush(self) -> None:
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._translate(error, "") from error
        try:
            if _libc.syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise self._translate(OSError(code, os.strerror(code)), "")
        finally:
            os.close(descriptor)

    def rename(self, source: str, destination: str) -> None:
        old, new = self._full(source), self._full(destination)
        try:
            try:
                _rename_noreplace(old, new)
            except FileNotFoundError:
                os.lstat(old)  # is it the source that is missing?
                self._make_parent(new)
                _rename_noreplace(old, new)
        except FileExistsError as error:
            if not os.path.lexists(old):
                raise PayloadNotFoundError(storage=self.name, path=source) from error
            raise PayloadExistsError(storage=self.name, path=destination) from error
        except OSError as error:
            raise self._translate(error, source) from error
        self._parents.pop(old, None)

    def remove(self, path: str) -> None:
        full = self._full(path)
        try:
            try:
                os.unlink(full)
            except (IsADirectoryError, PermissionError):
                if not os.path.isdir(full):
                    raise
                shutil.rmtree(full)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                self._check_root()
                return
            raise self._translate(error, path) from error

    def usage(self) -> Usage | None:
        try:
            found = os.statvfs(self.root)
        except OSError as error:
            raise self._translate(error, "") from error
        total = found.f_blocks * found.f_frsize
        return Usage(total, total - found.f_bavail * found.f_frsize)

    def check(self) -> None:
        self._check_root()
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise AccessDeniedError(storage=self.name, path="", message="not readable")


def _entry(path: str, status: os.stat_result) -> Entry:
    mode = status.st_mode
    if stat_module.S_ISREG(mode):
        return Entry(path, status.st_size, status.st_mtime, "file")
    if stat_module.S_ISDIR(mode):
        return Entry(path, 0, status.st_mtime, "directory")
    kind = "symlink" if stat_module.S_ISLNK(mode) else "other"
    return Entry(path, status.st_size, status.st_mtime, kind)


def _rename_noreplace(old: str, new: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE; link and unlink where the file system lacks it."""
    code = _libc.renameat2(
        _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE
    )
    if code == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), old)
    if os.path.isdir(old):
        # no atomic way there: mkdir claims the name, rename then replaces only an empty folder
        os.mkdir(new)
        os.rename(old, new)
    else:
        os.link(old, new, follow_symlinks=False)
        os.unlink(old)


def _unlink_quietly(full: str) -> None:
    try:
        os.unlink(full)
    except OSError:
        pass  # the sweep of temporary files finds it
