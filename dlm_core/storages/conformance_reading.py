"""What the port promises of a storage that is only read, on the files that lie there.

As :mod:`dlm_core.storages.conformance`, but nothing is written: a check takes the storage and some
of its files.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from itertools import islice

from dlm_core.errors import PathRefusedError, PayloadNotFoundError
from dlm_core.storages.conformance import refuses, want
from dlm_core.storages.port import Entry, Storage

ReadingCheck = Callable[[Storage, Sequence[Entry]], None]

_LISTED, _FILES = 1000, 20
_READ_BYTES = 8 << 20


def some_files(storage: Storage) -> list[Entry]:
    """Up to 20 of the first 1000 entries: all there are of some bytes, spread over the sizes.

    Raises
    ------
    StorageError
    """
    listed = islice(storage.walk(), _LISTED)
    files = sorted((one for one in listed if one.kind == "file"), key=lambda one: one.size)
    return files[:: max(1, -(-len(files) // _FILES))]


def it_answers_and_tells_its_capacity(storage: Storage, files: Sequence[Entry]) -> None:
    """check() is content; usage, if told at all, is between nothing and the whole."""
    storage.check()
    usage = storage.usage()
    sane = usage is None or 0 <= usage.used <= usage.total
    want(storage, sane, f"its usage is told as {usage}")


def what_is_listed_is_there(storage: Storage, files: Sequence[Entry]) -> None:
    """stat and stat_many tell what the listing told."""
    told = storage.stat_many([one.path for one in files])
    for one in files:
        for call, entry in (("stat", storage.stat(one.path)), ("stat_many", told[one.path])):
            same = entry is not None and (entry.kind, entry.size) == ("file", one.size)
            want(storage, same, f"{one.path!r} is listed with {one.size} bytes, {call}: {entry}")


def what_is_read_has_the_size_that_was_told(storage: Storage, files: Sequence[Entry]) -> None:
    """Small files whole, of large ones the beginning; twice the same, and its stamp stays."""
    for one in files:
        data = _beginning(storage, one)
        wanted = min(one.size, _READ_BYTES)
        want(storage, len(data) == wanted, f"{one.path!r} gives {len(data)} bytes of {wanted}")
        want(storage, _beginning(storage, one) == data, f"{one.path!r} reads differently again")


def _beginning(storage: Storage, one: Entry) -> bytes:
    data, most = b"", _READ_BYTES if one.size > _READ_BYTES else one.size + 1
    with storage.open_read(one.path) as stream:
        want(storage, stream.size == one.size, f"{one.path!r} is opened with {stream.size} bytes")
        while len(data) < most and (block := stream.read(min(1 << 20, most - len(data)))):
            data += block
        want(storage, stream.stamp() == stream.opened, f"{one.path!r} changes while it is read")
    return data


def what_is_not_there_is_said_so(storage: Storage, files: Sequence[Entry]) -> None:
    """A name that nobody has, and what would lie below it, is absent and no outage."""
    path = f"dlm-{uuid.uuid4().hex}"
    for absent in (path, f"{path}/below"):
        want(storage, storage.stat(absent) is None, "stat tells of what is not there")
    refuses(storage, lambda: storage.open_read(path).close(), PayloadNotFoundError, "reading it")


def paths_that_leave_the_root_are_refused(storage: Storage, files: Sequence[Entry]) -> None:
    """Before anything is looked at."""
    for path in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b"):
        refuses(storage, lambda p=path: storage.stat(p), PathRefusedError, f"stat of {path!r}")  # type: ignore[misc]


READING: tuple[ReadingCheck, ...] = (
    it_answers_and_tells_its_capacity,
    what_is_listed_is_there,
    what_is_read_has_the_size_that_was_told,
    what_is_not_there_is_said_so,
    paths_that_leave_the_root_are_refused,
)
