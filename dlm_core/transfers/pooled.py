"""Work on many small things with a pool of threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from dlm_core.errors import DlmError
from dlm_core.storages.port import Storage

MAX_CHUNK = 32
#: of near files up to this size, in bytes, the interpreter's own work is most
TINY = 64 << 10
#: turns that each of several threads has had before they are compared with fewer threads
_TRIED = 4
#: what twice the threads have to be faster by
_FASTER = 1.1

_T = TypeVar("_T")
_R = TypeVar("_R")


def at_once(*ends: Storage) -> int:
    """How many transfers suit both ends: what is far away hides its latency behind many requests,
    disks want few."""
    chosen = [one.concurrency for one in ends]
    return max(1, min(chosen)) if near(*ends) else max(chosen)


def near(*ends: Storage) -> bool:
    """Whether no network protocol of ours is between us and any of them."""
    return not any(
        getattr(one, "atomic_write", False) or getattr(one, "remote", False) for one in ends
    )


class Turns:
    """Lets as many threads work on tiny files at a time as are fastest together.

    The interpreter runs one thread at a time, and threads that want it in turns after every call of
    the system may spend more on the handing over than on the files: on a fast disk one is the best,
    on a busy network file system ``most`` are. So it begins with ``first``, and goes on doubling
    while that makes it faster.
    """

    def __init__(self, most: int, first: int = 1) -> None:
        first = max(1, min(first, most))
        self._most, self._width, self._free = most, first, first
        self._lock, self._waiting = threading.Lock(), deque[threading.Lock]()
        self._trying = most > first
        self._ended, self._begun, self._rate = 0, 0.0, 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A turn, for as long as it lasts; who came first has the next one."""
        self._enter()
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                if self._trying:
                    self._try()
                while self._waiting and self._free > 0:
                    self._free -= 1
                    self._waiting.popleft().release()

    def _enter(self) -> None:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            called = threading.Lock()
            called.acquire()
            self._waiting.append(called)
        called.acquire()

    def _try(self) -> None:
        """Another turn of this width has ended; after some of them they are compared."""
        self._ended += 1
        if self._ended == 1:
            self._begun = time.perf_counter()  # before that it was still another width's
        if self._ended <= _TRIED * self._width:
            return
        rate = (self._ended - 1) / (time.perf_counter() - self._begun)
        width = min(2 * self._width, self._most)
        if rate < _FASTER * self._rate:
            self._trying, width = False, self._width // 2
        elif width == self._width:
            self._trying = False
        self._free += width - self._width
        self._width, self._rate, self._ended = width, rate, 0


def in_chunks(
    pool: ThreadPoolExecutor,
    function: Callable[[Sequence[_T]], list[_R]],
    things: Sequence[_T],
    longest: int = MAX_CHUNK,
) -> list[_R]:
    """What ``function`` gives for chunks of at most ``longest`` things, in their order; handing
    over a small file costs as much as copying it. Few things are spread over all threads."""
    length = max(1, min(longest, len(things) // (4 * pool._max_workers)))
    chunks = [things[n : n + length] for n in range(0, len(things), length)]
    return [one for done in pool.map(function, chunks) for one in done]


def together(call: Callable[..., Any], things: Sequence[Any]) -> Sequence[DlmError | None]:
    """How each of several things ended in one call; what that raises is the error of each."""
    try:
        return cast(Sequence[DlmError | None], call(things))
    except DlmError as error:
        return [error] * len(things)
