"""System calls that Python has no name for, and what does in their place where they are missing."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_OPENAT2 = 437  # the same on every architecture (Linux 5.6 and newer)
_RESOLVE_NO_SYMLINKS = 4

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
)  # fmt: skip


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def _failed(path: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), path)


@cache
def _how(flags: int, mode: int) -> Any:
    return ctypes.byref(_OpenHow(flags, mode, _RESOLVE_NO_SYMLINKS))


def open_by_openat2(full: str, flags: int, mode: int = 0) -> int:
    """open(2) where the kernel itself follows no link in any part of the path: no race."""
    descriptor: int = _syscall(
        _OPENAT2, _AT_FDCWD, os.fsencode(full), _how(flags, mode), ctypes.sizeof(_OpenHow)
    )
    if descriptor < 0:
        raise _failed(full)
    return descriptor


def open_by_realpath(full: str, flags: int, mode: int = 0) -> int:
    """The same for kernels without openat2 and sandboxes that forbid it: looks, then opens."""
    walked = full if flags & os.O_DIRECTORY else os.path.dirname(full)
    if os.path.realpath(walked) != walked:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), full)
    return os.open(full, flags | os.O_NOFOLLOW, mode)


def _choose() -> Callable[..., int]:
    if sys.platform != "linux":
        return open_by_realpath
    try:
        os.close(open_by_openat2("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return open_by_realpath
    return open_by_openat2


#: ``open_without_links(full, flags, mode=0)`` gives a descriptor, or raises OSError (ELOOP: a
#: symbolic link is part of the absolute path ``full``)
open_without_links = _choose()


def rename_noreplace(old_folder: int, old: str, new_folder: int, new: str) -> None:
    """Rename between two open folders; FileExistsError if ``new`` is there.

    renameat2(2), or link and unlink where the file system lacks RENAME_NOREPLACE.
    """
    number = errno.ENOSYS
    if hasattr(_libc, "renameat2"):
        code = _libc.renameat2(
            old_folder, os.fsencode(old), new_folder, os.fsencode(new), _RENAME_NOREPLACE
        )
        if code == 0:
            return
        number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), old)
    if stat.S_ISDIR(os.stat(old, dir_fd=old_folder, follow_symlinks=False).st_mode):
        # no atomic way there: mkdir claims the name, rename then replaces only an empty folder
        try:
            os.mkdir(new, dir_fd=new_folder)
        except FileExistsError as taken:
            _rename_over_claim(old_folder, old, new_folder, new, taken)
            return
        os.rename(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)
    else:
        os.link(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder, follow_symlinks=False)
        os.unlink(old, dir_fd=old_folder)


def _rename_over_claim(
    old_folder: int, old: str, new_folder: int, new: str, taken: FileExistsError
) -> None:
    """An empty folder is what somebody left who was cut off after he had claimed the name."""
    try:
        os.rename(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise taken from None
        raise


def sync_filesystem(descriptor: int) -> None:
    """Wait until everything written to the file system of an open file is durable (syncfs)."""
    if not hasattr(_libc, "syncfs"):
        os.sync()
    elif _libc.syncfs(descriptor) != 0:
        raise _failed("")
