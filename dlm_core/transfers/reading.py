"""Reading a source that is to be what the catalogue says, or to fail before its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import md5, sha256
from typing import Any

from dlm_core.errors import SourceDamagedError
from dlm_core.storages.port import Readable

BLOCK = 1 << 20

Progress = Callable[[int], None]


class Interrupted(Exception):
    """Raised inside a read when the copying is to stop."""


class HashingReader:
    """A stream that computes digests of what is read, and fails before its end if they are wrong.

    Failing inside the read makes an upload abort: nothing becomes visible at the destination.

    Parameters
    ----------
    size, digest : what the catalogue says, bytes and ``sha256:<hex>``; ``size`` is above 0. Without
        a digest only the size is looked at: somebody else is to compare the bytes.
    where : how errors call the source.
    hasher, begun : of bytes of the file that came before ``stream``'s, and how many they are.
    part_size : bytes; the MD5 of each part is kept, for comparison with an object store's ETag.
    """

    def __init__(
        self,
        stream: Readable,
        size: int,
        digest: str | None,
        where: str,
        part_size: int | None,
        stop: threading.Event,
        progress: Progress | None,
        hasher: Any = None,
        begun: int = 0,
    ) -> None:
        self._stream, self._size, self._digest, self._where = stream, size, digest, where
        self._stop, self._progress = stop, progress
        self._sha, self._left = hasher or sha256(), size - begun
        self._part_size = part_size or 0
        self._parts: list[bytes] = []
        self._part, self._part_left = md5(usedforsecurity=False), self._part_size

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, at most a block.

        Raises
        ------
        SourceDamagedError
            instead of handing out the last bytes if they are not right.
        Interrupted
        """
        if self._stop.is_set():
            raise Interrupted
        block = self._stream.read(BLOCK if size < 0 else min(size, BLOCK))
        if self._digest is not None:
            self._sha.update(block)
        self._left -= len(block)
        if self._part_size:
            self._count_parts(block)
        if block and self._left <= 0:
            self._finish()
        elif not block and self._left:
            self._wrong(f"only {self._size - self._left} bytes")
        if self._progress is not None and block:
            self._progress(len(block))
        return block

    def _finish(self) -> None:
        if self._left < 0 or self._stream.read(1):
            self._wrong(f"more than {self._size} bytes")
        found = f"sha256:{self._sha.hexdigest()}"
        if self._digest not in (None, found):
            self._wrong(found)

    def _wrong(self, found: str) -> None:
        raise SourceDamagedError(
            where=self._where, expected=self._digest or f"{self._size} bytes", found=found
        )

    def _count_parts(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            taken = view[: self._part_left]
            self._part.update(taken)
            self._part_left -= len(taken)
            view = view[len(taken) :]
            if not self._part_left:
                self._close_part()

    def _close_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part = md5(usedforsecurity=False)
        self._part_left = self._part_size

    def etag(self) -> str:
        """The ETag that S3 gives these bytes: MD5 of a single part, or of the parts' MD5s."""
        if not self._part_size:
            return ""
        parts = list(self._parts)
        if self._part_left != self._part_size:
            parts.append(self._part.digest())
        if len(parts) == 1:
            return parts[0].hex()
        return f"{md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
