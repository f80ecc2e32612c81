"""Take from an iterator in a thread of its own, one step ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Prefetched(Iterator[Any]):
    """Takes from ``source``, which holds no None, in a thread of its own, one step ahead."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = iter(source)
        self._pool = ThreadPoolExecutor(1, "dlm-prefetch")
        self._coming = self._pool.submit(self._step)

    def _step(self) -> Any:
        return next(self._source, None)

    def __next__(self) -> Any:
        thing = self._coming.result()
        if thing is None:
            raise StopIteration
        self._coming = self._pool.submit(self._step)
        return thing

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
