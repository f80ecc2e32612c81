"""What stands between a stream and who reads it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Self

from dlm_core.storages.port import ReadStream


class StreamOver:
    """All of a stream but its ``read``, which a subclass gives."""

    def __init__(self, stream: ReadStream) -> None:
        self._stream = stream
        self.size, self.opened = stream.size, stream.opened

    def stamp(self) -> Hashable:
        """As of the stream below: of the whole file."""
        return self._stream.stamp()

    def close(self) -> None:
        """Close the stream below."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
