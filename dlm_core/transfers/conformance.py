"""The contract of movers as checks that run against anybody's, between two storages of theirs.

A check takes the ends and a folder of its own at the source, and raises ``AssertionError`` where
the contract of :mod:`dlm_core.transfers.plugged` is not kept. Its docstring says what has to hold.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from dlm_core.errors import PayloadNotFoundError
from dlm_core.storages.conformance import get, put
from dlm_core.storages.port import PRIVATE, Entry, Storage, temp_path
from dlm_core.transfers.plugged import Brought, Mover

#: a mover that was told to stop has this long, in seconds
STOPPED_WITHIN = 60.0
# what goes on in secret is seen after this, in seconds
_A_WHILE = 0.5

_NAMES = (
    "with space.dat",
    "quote'\".dat",
    "percent%20.dat",
    "ünïcödé-星.dat",
    "hash#&=+.dat",
    "semi;colon$HOME.dat",
    "-dash",
    ".dot",
    "*",
)
_SIZES = (0, 1, 4096, (1 << 20) + 1, (8 << 20) + 1)


@dataclass(frozen=True, slots=True)
class Ends:
    """A mover, and two storages that it suits."""

    mover: Mover
    source: Storage
    destination: Storage


Check = Callable[[Ends, str], None]


def it_has_a_name_and_suits(ends: Ends, folder: str) -> None:
    """It says that it suits these two, and says so again."""
    _want(isinstance(ends.mover, Mover), "it lacks name, suits or bring")
    _want(isinstance(ends.mover.name, str) and bool(ends.mover.name), "it has no name")
    for _ in range(2):
        _want(ends.mover.suits(ends.source, ends.destination) is True, "it does not suit these two")


def bytes_of_every_size_arrive(ends: Ends, folder: str) -> None:
    """Also none at all; a mover that tells its progress tells no more bytes than there are."""
    payloads = {f"{folder}/{size}": os.urandom(size) for size in _SIZES}
    told: list[int] = []
    _bring(ends, payloads, told.append)
    _want(all(size >= 0 for size in told), f"its progress went back: {told}")
    _want(sum(told) <= sum(_SIZES), f"it told {sum(told)} bytes of {sum(_SIZES)}")


def files_of_any_name_arrive(ends: Ends, folder: str) -> None:
    """Spaces, quotes and letters of any language, in names and in folders."""
    _bring(ends, {f"{folder}/{name}/{name}": name.encode() for name in _NAMES})


def many_files_arrive_at_once(ends: Ends, folder: str) -> None:
    """As many as a sub-batch has, in folders of several depths that are not there yet."""
    _bring(ends, {f"{folder}/{n % 7}/{'sub/' * (n % 3)}{n}": b"%d" % n for n in range(512)})


def several_calls_at_once_are_kept_apart(ends: Ends, folder: str) -> None:
    """Each brings its own files."""

    def one(n: int) -> None:
        _bring(ends, {f"{folder}/{n}/{m}": b"%d of %d" % (m, n) for m in range(20)}, alone=False)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))


def what_is_not_there_is_not_made_up(ends: Ends, folder: str) -> None:
    """A file that the source does not have is left out; raising is fine."""
    one = Brought(f"{folder}/nothing", _written("nothing"), 3)
    with suppress(Exception):
        ends.mover.bring(ends.source, ends.destination, [one], threading.Event(), None)
    found = ends.destination.stat(one.written)
    _want(found is None or found.size != one.size, "it made up what is not at the source")


def files_are_no_links(ends: Ends, folder: str) -> None:
    """Two copies of the same bytes on disk would be damaged together."""
    files = _bring(ends, {f"{folder}/x": b"payload"})
    for one in files:
        with (
            ends.source.open_read(one.source) as first,
            ends.destination.open_read(one.written) as second,
        ):
            if not (hasattr(first, "fileno") and hasattr(second, "fileno")):
                return
            # only files of a file system have numbers that could be compared
            told = [os.fstat(stream.fileno()) for stream in (first, second)]
        same = told[0].st_dev == told[1].st_dev and told[0].st_ino == told[1].st_ino
        _want(not same, "the copy is a link to its source")


def a_stop_is_heeded(ends: Ends, folder: str) -> None:
    """It returns soon, or raises, whether it was told before it began or on its way; and then
    nothing of it is at work."""
    payloads = {f"{folder}/{n}": os.urandom(8 << 20) for n in range(4)}
    files = _put(ends, payloads)
    for delay in (0.0, 0.05):
        stop = threading.Event()
        if not delay:
            stop.set()

        def bring(stop: threading.Event = stop) -> None:
            with suppress(Exception):
                ends.mover.bring(ends.source, ends.destination, files, stop, None)

        # not waited for when Python ends: it may never return
        at_work = threading.Thread(target=bring, daemon=True)
        at_work.start()
        time.sleep(delay)
        stop.set()
        at_work.join(STOPPED_WITHIN)
        _want(not at_work.is_alive(), f"it has not returned {STOPPED_WITHIN:.0f} s after a stop")
        left = _listed(ends.destination)
        time.sleep(_A_WHILE)
        _want(_listed(ends.destination) == left, "it was still at work when it had returned")
        ends.destination.remove(temp_path(_OWN))


CHECKS: tuple[Check, ...] = (
    it_has_a_name_and_suits,
    bytes_of_every_size_arrive,
    files_of_any_name_arrive,
    many_files_arrive_at_once,
    several_calls_at_once_are_kept_apart,
    what_is_not_there_is_not_made_up,
    files_are_no_links,
    a_stop_is_heeded,
)

# all that a check has written, below the folder of temporary files
_OWN = "dlm-conformance"


def run_check(check: Check, ends: Ends, folder: str) -> None:
    """Run one check in a folder of its own, and clear away what it wrote at both ends.

    Raises
    ------
    AssertionError, StorageError
        what was not as it should be.
    """
    own = f"{folder}/{getattr(check, '__name__', 'check')}"
    try:
        check(ends, own)
    finally:
        ends.source.remove(own)
        ends.destination.remove(temp_path(_OWN))


def _bring(
    ends: Ends,
    payloads: Mapping[str, bytes],
    progress: Callable[[int], None] | None = None,
    *,
    alone: bool = True,
) -> list[Brought]:
    """Have files brought, which all have to arrive; if it is ``alone`` at work, with nothing else
    at the destination and no change at the source."""
    files = _put(ends, payloads)
    before, sources = _listed(ends.destination), _sources(ends, files)
    ends.mover.bring(ends.source, ends.destination, files, threading.Event(), progress)
    ends.destination.flush()
    for one in files:
        try:
            data = get(ends.destination, one.written)
        except PayloadNotFoundError:
            raise AssertionError(f"{one.source} has not arrived") from None
        _want(data == payloads[one.source], f"{one.source} arrived with other bytes")
    _want(_sources(ends, files) == sources, "it changed the source")
    for path, data in payloads.items():
        _want(get(ends.source, path) == data, f"it changed the bytes of {path} at the source")
    if alone:
        more = _listed(ends.destination).keys() - before.keys() - {one.written for one in files}
        _want(not more, f"it wrote more than it was asked for: {sorted(more)[:5]}")
    return files


def _put(ends: Ends, payloads: Mapping[str, bytes]) -> list[Brought]:
    for path, data in payloads.items():
        put(ends.source, path, data)
    ends.source.flush()
    return [Brought(path, _written(path), len(data)) for path, data in payloads.items()]


def _written(path: str) -> str:
    # as the names are of a copy's files: a folder of this try, and what the manifest says
    return temp_path(f"{_OWN}/{uuid.uuid4().hex}/{path.split('/', 2)[-1]}")


def _sources(ends: Ends, files: list[Brought]) -> dict[str, Entry | None]:
    return ends.source.stat_many([one.source for one in files])


def _listed(storage: Storage) -> dict[str, Entry]:
    """All files, also the DLM's own."""
    found = {entry.path: entry for entry in storage.walk()}
    with suppress(PayloadNotFoundError):
        found |= {entry.path: entry for entry in storage.walk(PRIVATE)}
    return found


def _want(kept: bool, reason: str) -> None:
    if not kept:
        raise AssertionError(reason)
