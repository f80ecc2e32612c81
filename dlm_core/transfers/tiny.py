"""What is done with the tiny files of a chunk, here or in a process beside ours.

This module and those that it needs are imported by such a process at its beginning: few, and none
but the standard library's and ours.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256

from dlm_core.errors import DlmError, SourceDamagedError
from dlm_core.storages.port import Readable, Storage
from dlm_core.storages.posix import PosixStorage, PosixStream

#: why a file was not copied or read, if it was not; the seconds that it took
Ended = tuple[DlmError | None, float]


def read_up_to(stream: Readable, size: int) -> bytes:
    """The first ``size`` bytes, or all there are."""
    data = stream.read(size)
    while data and len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def read_whole(source: Storage, path: str, size: int, digest: str) -> bytes:
    """A file that is to have ``size`` bytes of a ``digest``.

    Raises
    ------
    SourceDamagedError
        if it has others.
    """
    with source.open_read(path) as stream:
        data = read_up_to(stream, size + 1)
    found = f"sha256:{sha256(data).hexdigest()}"
    if found != digest or len(data) != size:
        raise SourceDamagedError(
            where=f"{source.name}:{path}",
            expected=f"{digest} ({size} bytes)",
            found=f"{found} (the first {len(data)} bytes)",
        )
    return data


def copy_each(
    source: Storage, destination: Storage, files: Sequence[tuple[str, str, int, str]]
) -> list[Ended]:
    """Copy files, given as (path, new path, size, digest)."""
    ended: list[Ended] = []
    for path, written, size, digest in files:
        begun, failure = time.monotonic(), None
        try:
            data = read_whole(source, path, size, digest)
            destination.write(written, io.BytesIO(data), size)
        except DlmError as error:
            failure = error
        ended.append((failure, time.monotonic() - begun))
    return ended


def look_at_each(
    storage: PosixStorage, files: Sequence[tuple[str, int]]
) -> list[tuple[int, str, Ended]]:
    """(size, digest, how it ended) of files, given as (path, the most bytes to read)."""
    with ExitStack() as opened:
        # all are opened first, so that the medium is at work on the next ones
        streams = [_opened(storage, path, opened) for path, _ in files]
        return [_look(stream, most) for stream, (_, most) in zip(streams, files, strict=True)]


def _opened(storage: PosixStorage, path: str, opened: ExitStack) -> PosixStream | DlmError:
    try:
        return opened.enter_context(storage.read_back(path))
    except DlmError as error:
        return error


def _look(stream: PosixStream | DlmError, most: int) -> tuple[int, str, Ended]:
    begun = time.monotonic()
    if isinstance(stream, DlmError):
        return 0, "", (stream, 0.0)
    try:
        data = read_up_to(stream, most)
    except DlmError as error:
        return 0, "", (error, time.monotonic() - begun)
    digest = f"sha256:{sha256(data).hexdigest()}"
    return len(data), digest, (None, time.monotonic() - begun)
