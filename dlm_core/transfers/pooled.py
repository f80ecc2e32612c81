"""Work on many small things with a pool of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dlm_core.storages.port import Storage

MAX_CHUNK = 16

_T = TypeVar("_T")
_R = TypeVar("_R")


def at_once(*ends: Storage) -> int:
    """How many transfers suit both ends: what is far away hides its latency behind many requests,
    disks want few."""
    remote = any(
        getattr(one, "atomic_write", False) or getattr(one, "remote", False) for one in ends
    )
    chosen = [one.concurrency for one in ends]
    return max(chosen) if remote else max(1, min(chosen))


def each(pool: ThreadPoolExecutor, function: Callable[[_T], _R], things: Sequence[_T]) -> list[_R]:
    """``pool.map`` in chunks: handing over a small file costs as much as copying it."""
    return in_chunks(pool, lambda chunk: list(map(function, chunk)), things)


def in_chunks(
    pool: ThreadPoolExecutor,
    function: Callable[[Sequence[_T]], list[_R]],
    things: Sequence[_T],
    longest: int = MAX_CHUNK,
) -> list[_R]:
    """What ``function`` gives for chunks of at most ``longest`` things, in their order; few things
    are spread over all threads."""
    length = max(1, min(longest, len(things) // (4 * pool._max_workers)))
    chunks = [things[n : n + length] for n in range(0, len(things), length)]
    return [one for done in pool.map(function, chunks) for one in done]
