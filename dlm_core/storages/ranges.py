"""A part of a file as a stream of its own."""

from __future__ import annotations

from collections.abc import Callable

from dlm_core.storages.port import ReadStream, Storage
from dlm_core.storages.streams import StreamOver

_BLOCK = 1 << 20


class Slice(StreamOver):
    """The next ``size`` bytes of ``stream``; its stamp is the whole file's."""

    def __init__(self, stream: ReadStream, size: int) -> None:
        super().__init__(stream)
        self.size = self._left = size

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all that are left if it is negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_BLOCK), b""))
        wanted = min(size, self._left)
        block = self._stream.read(wanted) if wanted else b""
        self._left -= len(block)
        return block


def open_range(storage: Storage, path: str, offset: int, size: int) -> ReadStream:
    """A stream over ``size`` bytes of a file from ``offset`` on, fewer if the file ends before.

    A storage that cannot begin in the middle of a file is read through up to there.

    Raises
    ------
    PayloadNotFoundError, PathRefusedError, StorageUnavailableError, AccessDeniedError
    """
    ranged: Callable[[str, int, int], ReadStream] | None = getattr(storage, "open_range", None)
    if ranged is not None:
        return ranged(path, offset, size)
    stream = storage.open_read(path)
    try:
        passed = 0
        while passed < offset and (block := stream.read(min(_BLOCK, offset - passed))):
            passed += len(block)
    except BaseException:
        stream.close()
        raise
    return Slice(stream, max(0, min(size, stream.size - offset)))
