"""Third-party copies of XRootD: a server fetches a file from another one, asked by the client.

https://xrootd.org/doc/dev56/ofs_config.htm, 'tpc'; servers that were not told to refuse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: bytes; below, our own copy is over before the client looks for the second time (2.5 s)
FROM_SIZE = 256 << 20
_BEGIN_SECONDS = 30
_SLOWEST = 1 << 20  # bytes/s
_AGAIN_SECONDS = 3600

#: of two servers that could not, when they are asked again (monotonic)
_not_before: dict[tuple[str, str], float] = {}


def may(source: str, destination: str) -> bool:
    """Whether the server ``destination`` may be asked to fetch from ``source``."""
    return time.monotonic() >= _not_before.get((source, destination), 0.0)


def could_not(source: str, destination: str) -> None:
    """They are not asked for an hour: to try costs seconds a file."""
    _not_before[source, destination] = time.monotonic() + _AGAIN_SECONDS


def fetch(client: Any, source: str, new: str, size: int, moved: Callable[[int], None]) -> Any:
    """The status of having ``new`` made from ``source`` (URLs); the folder is made, nothing is
    overwritten. ``moved`` is called with bytes on the way; what it raises ends the copy, and goes
    through.
    """
    process, watch = client.CopyProcess(), _Watch(moved)
    process.add_job(
        source, new, thirdparty="only", mkdir=True, force=False, inittimeout=_BEGIN_SECONDS,
        tpctimeout=max(600, size // _SLOWEST),
    )  # fmt: skip
    status = process.prepare()
    if status.ok:
        status, _ = process.run(watch)
    if status.ok:
        watch.update(1, size, size)
    if watch.error is not None:
        raise watch.error
    return status


class _Watch:
    """Called by the client's threads, through which nothing may be raised."""

    def __init__(self, moved: Callable[[int], None]) -> None:
        self._moved, self._done = moved, 0
        self.error: BaseException | None = None

    def begin(self, *_: Any) -> None:
        pass

    def end(self, *_: Any) -> None:
        pass

    def update(self, _: int, done: int, __: int) -> None:
        if self.error is None:
            more, self._done = max(0, done - self._done), max(done, self._done)
            try:
                self._moved(more)  # of none too: it may be time to stop
            except BaseException as error:  # noqa: BLE001 - it is raised again by who asked
                self.error = error

    def should_cancel(self, _: int) -> bool:
        return self.error is not None
