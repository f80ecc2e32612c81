"""POSIX file systems: local disks, NFS, Lustre, anything that is mounted."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import shutil
import stat as stat_module
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

from dlm_core.errors import (
    AccessDeniedError,
    DlmError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.kernel import open_without_links, rename_noreplace, sync_filesystem
from dlm_core.storages.port import PRIVATE, Entry, Readable, ReadStream, Usage
from dlm_core.storages.ranges import Slice

_BLOCK = 1 << 20
# a large file begins its way to the medium while the rest is written: flushing waits less
_WRITEBACK = 32 << 20
# bytes that the kernel copies in one call: a limit and a stop are looked at in between
_KERNEL_BLOCK = 1 << 20
_NOT_BY_KERNEL = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}
# a fifo must not keep us waiting for somebody to write into it
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_REFUSED = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EXDEV, errno.EFBIG}
_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR}
_ABSENT = {errno.ENOENT, errno.ENOTDIR}


class PosixStorage:
    """A folder as a storage; see :class:`dlm_core.storages.port.Storage` for the contract.

    No symbolic link is followed in any part of a path: the kernel is told so where it can be
    (openat2), and what is looked at, renamed or removed is named relative to its open folder.

    Parameters
    ----------
    root : an absolute folder; links in the root itself are resolved once, here.
    concurrency : transfers at once.
    mount : a mount point. Unless something is mounted there the storage counts as unreachable, so
        that the empty folder below a disk that went is not taken for an empty storage.
    """

    atomic_write = False
    exclusive = "file"

    def __init__(
        self, name: str, root: str, concurrency: int = 4, mount: str | None = None
    ) -> None:
        self.name = name
        self.root = os.path.realpath(root)
        self.concurrency = concurrency
        self._mount = mount

    # --- paths and errors ------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        framed = f"/{path}/"
        if "//" in framed or "/./" in framed or "/../" in framed or "\0" in path:
            raise self._refused(path, "want relative, without '.', '..' or ''")
        return f"{self.root}/{path}"

    def _refused(self, path: str, message: str) -> PathRefusedError:
        return PathRefusedError(storage=self.name, path=path, message=message)

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)

    def _open_folder(self, full: str) -> tuple[int, str]:
        """A descriptor of the folder that holds ``full``, and the name therein."""
        parent, _, name = full.rpartition("/")
        return open_without_links(parent, _FOLDER), name

    def _check_root(self) -> None:
        """A root that is gone is an outage, not an empty storage."""
        if self._mount is not None and not os.path.ismount(self._mount):
            raise self._unavailable(f"nothing is mounted at {self._mount}")
        if not os.path.isdir(self.root):
            raise self._unavailable(f"its root {self.root} is not there, or is no folder")

    def _translate(self, error: OSError, path: str) -> StorageError:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            return StorageFullError(storage=self.name, message=reason)
        if error.errno in _DENIED:
            return AccessDeniedError(storage=self.name, path=path, message=reason)
        if error.errno == errno.ELOOP:
            return self._refused(path, "a symbolic link stands in the way")
        if error.errno in _REFUSED:
            return self._refused(path, reason)
        if error.errno in _OCCUPIED:
            return PayloadExistsError(storage=self.name, path=path)
        if error.errno in _ABSENT:
            try:
                self._check_root()
            except StorageUnavailableError as outage:
                return outage
            return PayloadNotFoundError(storage=self.name, path=path)
        return self._unavailable(f"{path}: {reason}")

    def _translate_making(self, error: OSError, path: str) -> StorageError:
        """As _translate where something was to be made, which cannot be "not found"."""
        translated = self._translate(error, path)
        if not isinstance(translated, PayloadNotFoundError):
            return translated
        if error.errno == errno.ENOTDIR:
            return self._refused(path, "a file stands where a folder is wanted")
        return self._unavailable(f"the folder of {path} went while it was used")

    # --- looking ---------------------------------------------------------------------------------

    def stat(self, path: str) -> Entry | None:
        return self.stat_many([path])[path]

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        found: dict[str, Entry | None] = {}
        for parent, group in groupby(sorted(set(paths)), posixpath.dirname):
            self._stat_in_folder(parent, list(group), found)
        return found

    def _stat_in_folder(
        self, parent: str, paths: list[str], found: dict[str, Entry | None]
    ) -> None:
        fulls = [self._full(path) for path in paths]
        try:
            folder, _ = self._open_folder(fulls[0])
        except OSError as error:
            if error.errno not in _ABSENT:
                raise self._translate(error, parent) from error
            self._check_root()
            found.update(dict.fromkeys(paths))
            return
        try:
            for path in paths:
                found[path] = self._stat_at(folder, path)
        finally:
            os.close(folder)

    def _stat_at(self, folder: int, path: str) -> Entry | None:
        name = path.rpartition("/")[2]
        try:
            return _entry(path, os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            self._check_root()
            return None
        except OSError as error:
            raise self._translate(error, path) from error

    def walk(self, path: str = "") -> Iterator[Entry]:
        self._check_root()
        top = self._full(path) if path else self.root
        levels = [(path, iter(self._scan(top, path, top=True)))]
        while levels:
            prefix, entries = levels[-1]
            for found in entries:
                relative = f"{prefix}/{found.name}" if prefix else found.name
                if not found.is_dir(follow_symlinks=False):
                    entry = self._scanned(found, relative)
                    if entry is not None:
                        yield entry
                elif relative != PRIVATE:
                    levels.append((relative, iter(self._scan(found.path, relative))))
                    break
            else:
                levels.pop()

    def _scan(self, full: str, path: str, top: bool = False) -> list[os.DirEntry[str]]:
        try:
            descriptor = open_without_links(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if top:
                raise self._translate(error, path) from error
            self._check_root()  # else it was removed since its folder was listed
            return []
        except OSError as error:
            raise self._translate(error, path) from error
        os.close(descriptor)
        try:
            with os.scandir(full) as found:
                return sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise self._translate(error, path) from error

    def _scanned(self, found: os.DirEntry[str], path: str) -> Entry | None:
        try:
            return _entry(path, found.stat(follow_symlinks=False))
        except FileNotFoundError:
            self._check_root()
            return None  # removed since its folder was listed
        except OSError as error:
            raise self._translate(error, path) from error

    def open_read(self, path: str) -> PosixStream:
        try:
            descriptor = open_without_links(self._full(path), _READ)
        except OSError as error:
            raise self._translate(error, path) from error
        status = os.fstat(descriptor)
        if not stat_module.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise self._refused(path, "not a regular file")
        return PosixStream(self, path, descriptor, status)

    def open_read_at(self, path: str, offset: int) -> PosixStream:
        stream = self.open_read(path)
        stream.seek(offset)
        return stream

    def read_back(self, path: str) -> PosixStream:
        """As :meth:`open_read`, but from the medium where the kernel lets go of its cache; the
        reading begins at once, in the background."""
        stream = self.open_read(path)
        _let_go(stream.fileno(), 0, 0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, _BLOCK, os.POSIX_FADV_WILLNEED)
        return stream

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes of a file from ``offset`` on."""
        stream = self.open_read(path)
        stream.seek(offset)
        return Slice(stream, max(0, min(size, stream.size - offset)))

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        full = self._full(path)
        descriptor = self._create(full, path)
        try:
            self._pour(source, descriptor, path)
        except BaseException:
            # the medium or the source failed, or we were interrupted: nothing may stay
            _close_quietly(descriptor)
            self._clear(full)
            raise
        try:
            os.close(descriptor)  # where NFS tells that the quota is used up
        except OSError as error:
            self._clear(full)
            raise self._translate_making(error, path) from error
        return None

    def write_on(self, path: str, source: Readable, begun: int) -> None:
        full = self._full(path)
        try:
            again = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = open_without_links(full, again) if begun else self._create(full, path)
        except OSError as error:
            raise self._translate_making(error, path) from error
        try:
            os.ftruncate(descriptor, begun)
            os.lseek(descriptor, begun, os.SEEK_SET)
            self._pour(source, descriptor, path)
        finally:
            try:
                os.close(descriptor)  # where NFS tells that the quota is used up
            except OSError as error:
                raise self._translate_making(error, path) from error

    def left_of(self, path: str) -> int:
        entry = self.stat(path)
        return entry.size if entry is not None and entry.kind == "file" else 0

    def copy_from(
        self, source: Any, source_path: str, path: str, size: int, moved: Callable[[int], None]
    ) -> bool:
        """A copy within one file system, by the kernel, which may share the blocks."""
        if not isinstance(source, PosixStorage) or not hasattr(os, "copy_file_range"):
            return False
        full = self._full(path)
        with source.open_read(source_path) as stream:
            descriptor = self._create(full, path)
            try:
                done = stream.size == size and self._by_kernel(stream, descriptor, path, moved)
            except BaseException:
                _close_quietly(descriptor)
                self._clear(full)
                raise
        try:
            os.close(descriptor)
            if not done:
                self._clear(full)
        except OSError as error:
            raise self._translate_making(error, path) from error
        return done

    def _by_kernel(
        self, stream: PosixStream, descriptor: int, path: str, moved: Callable[[int], None]
    ) -> bool:
        source, left, offset, begun = stream.fileno(), stream.size, 0, 0
        if os.fstat(source).st_dev != os.fstat(descriptor).st_dev:
            return False
        while left:
            try:
                copied = os.copy_file_range(source, descriptor, min(left, _KERNEL_BLOCK))
            except OSError as error:
                if error.errno in _NOT_BY_KERNEL and not offset:
                    return False
                raise self._translate_making(error, path) from error
            if not copied:
                return False  # the source became shorter
            offset, left = offset + copied, left - copied
            if offset - begun >= _WRITEBACK:
                _let_go(descriptor, begun, offset - begun)
                begun = offset
            moved(copied)
        return True

    def _create(self, full: str, path: str) -> int:
        try:
            try:
                return open_without_links(full, _CREATE, 0o644)
            except FileNotFoundError:
                self._make_parent(full)
                return open_without_links(full, _CREATE, 0o644)
        except OSError as error:
            raise self._translate_making(error, path) from error

    def _clear(self, full: str) -> None:
        """Clearing up after an error that is being told; the sweep finds what stays."""
        with suppress(OSError):
            folder, name = self._open_folder(full)
            try:
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)

    def _pour(self, source: Readable, descriptor: int, path: str) -> None:
        written = begun = 0
        while block := source.read(_BLOCK):
            view = memoryview(block)
            try:
                while view:
                    view = view[os.write(descriptor, view) :]
            except OSError as error:
                raise self._translate_making(error, path) from error
            written += len(block)
            if written - begun >= _WRITEBACK:
                _let_go(descriptor, begun, written - begun)
                begun = written

    def _make_parent(self, full: str) -> None:
        self._check_root()
        os.makedirs(os.path.dirname(full), mode=0o755, exist_ok=True)

    def flush(self) -> None:
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_filesystem(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._translate_making(error, "") from error

    def rename(self, source: str, destination: str) -> None:
        old, new = self._full(source), self._full(destination)
        try:
            folder, name = self._open_folder(old)
        except OSError as error:
            raise self._translate(error, source) from error
        try:
            self._rename_from(folder, name, new)
        except OSError as error:
            # the kernel's one answer may be about either name: look which
            if self._stat_at(folder, source) is None:
                raise PayloadNotFoundError(storage=self.name, path=source) from error
            raise self._translate_making(error, destination) from error
        finally:
            os.close(folder)

    def rename_many(self, pairs: Sequence[tuple[str, str]]) -> list[DlmError | None]:
        """As :meth:`rename` for each; folders of names that follow each other are opened once."""
        errors: list[DlmError | None] = []
        for _, group in groupby(pairs, _folders):
            errors += self._rename_between(list(group))
        return errors

    def _rename_between(self, pairs: Sequence[tuple[str, str]]) -> list[DlmError | None]:
        """Of names in the same two folders; what does not go at once is tried by itself."""
        moved, (source, destination) = set[int](), pairs[0]
        with (
            suppress(OSError, DlmError),
            self._folder(source) as old,
            self._folder(destination) as new,
        ):
            moved.update(n for n, pair in enumerate(pairs) if self._moved(old, new, pair))
        return [None if n in moved else self._error_of_rename(pair) for n, pair in enumerate(pairs)]

    @contextmanager
    def _folder(self, path: str) -> Iterator[int]:
        descriptor, _ = self._open_folder(self._full(path))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _moved(self, old: int, new: int, pair: tuple[str, str]) -> bool:
        try:
            source, destination = (posixpath.basename(self._full(path)) for path in pair)
            rename_noreplace(old, source, new, destination)
        except (OSError, DlmError):
            return False
        return True

    def _error_of_rename(self, pair: tuple[str, str]) -> DlmError | None:
        try:
            self.rename(*pair)
        except DlmError as error:
            return error
        return None

    def _rename_from(self, folder: int, name: str, new: str) -> None:
        try:
            target, new_name = self._open_folder(new)
        except FileNotFoundError:
            os.stat(name, dir_fd=folder, follow_symlinks=False)  # nothing is made for no source
            self._make_parent(new)
            target, new_name = self._open_folder(new)
        try:
            rename_noreplace(folder, name, target, new_name)
        finally:
            os.close(target)

    def remove(self, path: str) -> None:
        try:
            folder, name = self._open_folder(self._full(path))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise self._translate(error, path) from error
            self._check_root()
            return
        try:
            self._remove_at(folder, name)
        except FileNotFoundError:
            if self._stat_at(folder, path) is not None:
                raise self._unavailable(f"{path} changed while it was removed") from None
        except OSError as error:
            raise self._translate(error, path) from error
        finally:
            os.close(folder)

    def _remove_at(self, folder: int, name: str) -> None:
        try:
            os.unlink(name, dir_fd=folder)
        except (IsADirectoryError, PermissionError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat_module.S_ISDIR(status.st_mode):
                raise
            shutil.rmtree(name, dir_fd=folder)

    def usage(self) -> Usage | None:
        self._check_root()
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


class PosixStream(io.FileIO):
    """A file being read; its faults are told in the port's words."""

    def __init__(
        self, storage: PosixStorage, path: str, descriptor: int, status: os.stat_result
    ) -> None:
        super().__init__(descriptor, "rb")
        self._storage, self._path = storage, path
        self.size, self.opened = status.st_size, _stamp(status)

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        try:
            return super().read(size)
        except OSError as error:
            raise self._storage._translate(error, self._path) from error

    def stamp(self) -> Hashable:
        """Size, time of change and how many names the file has: one that another was renamed over
        has one less."""
        return _stamp(os.fstat(self.fileno()))


def mount_point(root: str) -> str:
    """Where the file system that holds an absolute folder is mounted."""
    path = os.path.realpath(root)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _folders(pair: tuple[str, str]) -> tuple[str, str]:
    return pair[0].rpartition("/")[0], pair[1].rpartition("/")[0]


def _stamp(status: os.stat_result) -> Hashable:
    return status.st_size, status.st_mtime_ns, status.st_nlink


def _entry(path: str, status: os.stat_result) -> Entry:
    mode = status.st_mode
    if stat_module.S_ISREG(mode):
        return Entry(path, status.st_size, status.st_mtime, "file")
    if stat_module.S_ISDIR(mode):
        return Entry(path, 0, status.st_mtime, "directory")
    kind = "symlink" if stat_module.S_ISLNK(mode) else "other"
    return Entry(path, status.st_size, status.st_mtime, kind)


def _let_go(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel write out what is dirty in a range of a file, and forget what is clean."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def _close_quietly(descriptor: int) -> None:
    """After an error that is being told."""
    with suppress(OSError):
        os.close(descriptor)
