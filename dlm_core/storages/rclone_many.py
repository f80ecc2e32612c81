"""Many files in one call of the rclone daemon: copied, read back, moved.

A call names its files in a list, and its answer is about all of them together: how each one ended
is the caller's to look at.
"""

from __future__ import annotations

import posixpath
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

from dlm_core.storages.rclone_daemon import Daemon, RcloneError
from dlm_core.storages.wire import WireError

_HASH_LINE = re.compile(r"([0-9a-f]{64})  (.+)", re.DOTALL)
# destinations are looked at before the call: few enough that this was not long ago
_MOST_MOVES = 256


def copy_listed(
    running: Daemon, source: str, target: str, names: Sequence[str], at_once: int,
    stop: threading.Event, progress: Callable[[int], None] | None,
) -> RcloneError | None:  # fmt: skip
    """Copy files of ``source`` to the same names below ``target``, which is a new folder.

    Returns what rclone says went wrong with any of them, or that it was stopped.

    Raises
    ------
    WireError, RcloneError
    """
    parameters = {
        "srcFs": source, "dstFs": target,
        "_config": {
            "Transfers": at_once, "NoTraverse": True, "NoCheckDest": True,
            "BufferSize": "2Mi", "IgnoreChecksum": True, "Retries": 1,
        },
    }  # fmt: skip
    with _listed(running, names) as more, ThreadPoolExecutor(1, "dlm-rclone-copy") as pool:
        group, done = {"group": more["_group"]}, 0
        copying = pool.submit(running.call, "sync/copy", parameters | more)
        while not _ended(copying):
            if stop.is_set():
                running.call("job/stopgroup", group)
            done = _tell(running.call("core/stats", group), done, progress)
        failure = copying.exception()
        with suppress(RcloneError, WireError):
            _tell(running.call("core/stats", group), done, progress)
    if failure is not None and not isinstance(failure, RcloneError):
        raise failure
    return failure


def _tell(stats: Mapping[str, Any], done: int, progress: Callable[[int], None] | None) -> int:
    moved = int(stats.get("bytes", 0))
    if progress is not None and moved > done:
        progress(moved - done)
    return max(moved, done)


def _ended(copying: Future[Any]) -> bool:
    try:
        copying.exception(timeout=0.25)
    except StillRunning:
        return False
    return True


def hashes(running: Daemon, target: str, at_once: int) -> dict[str, str]:
    """The sha256 of every file below ``target`` that can be read, by name.

    Raises
    ------
    RcloneError, WireError
    """
    told = running.call(
        "operations/hashsum",
        {
            "fs": target, "hashType": "sha256", "download": True,
            "_config": {"Checkers": at_once, "Transfers": at_once},
        },
    )  # fmt: skip
    lines = map(_HASH_LINE.fullmatch, told.get("hashsum") or ())
    return {line[2]: f"sha256:{line[1]}" for line in lines if line}


def move_listed(
    running: Daemon, source: str, target: str, names: Sequence[str], at_once: int
) -> bool:
    """Move files of ``source`` to the same names below ``target``, whatever is there.

    Returns whether rclone says of each that it was moved; else some were and some were not.

    Raises
    ------
    RcloneError, WireError
    """
    parameters = {
        "srcFs": source, "dstFs": target,
        "_config": {
            "Transfers": at_once, "Checkers": at_once, "NoCheckDest": True,
            "NoUpdateDirModTime": True, "Retries": 1,
        },
    }  # fmt: skip
    with _listed(running, names) as more:
        try:
            running.call("sync/move", parameters | more)
        except RcloneError:
            return False
        stats = running.call("core/stats", {"group": more["_group"]})
    return (stats.get("renames"), stats.get("errors")) == (len(names), 0)


@contextmanager
def _listed(running: Daemon, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a call is told to keep to files with these names, in a group of its own."""
    group = f"dlm-{uuid.uuid4().hex}"
    file = running.folder / f"list-{uuid.uuid4().hex}"
    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    try:
        yield {"_group": group, "_filter": {"FilesFromRaw": [str(file)]}}
    finally:
        file.unlink(missing_ok=True)
        with suppress(RcloneError, WireError):
            running.call("core/stats-delete", {"group": group})


def move_groups(
    pairs: Iterable[tuple[str, str]],
) -> Iterator[tuple[str, str, list[str]]]:
    """Source folder, destination folder, and sorted names below both, of pairs that one call can
    move; what lies in one folder is kept together."""
    groups: dict[tuple[str, str], set[str]] = {}
    for source, destination in pairs:
        name = _common_end(source, destination)
        if name and name.isprintable():
            ends = (source[: -len(name)].rstrip("/"), destination[: -len(name)].rstrip("/"))
            groups.setdefault(ends, set()).add(name)
    for (old, new), found in groups.items():
        for names in _few(sorted(found, key=posixpath.split)):
            if len(names) > 1:
                yield old, new, names


def _few(names: Sequence[str]) -> Iterator[list[str]]:
    few: list[str] = []
    for _, group in groupby(names, posixpath.dirname):
        folder = list(group)
        if few and len(few) + len(folder) > _MOST_MOVES:
            yield few
            few = []
        few += folder
        while len(few) > _MOST_MOVES:
            yield few[:_MOST_MOVES]
            few = few[_MOST_MOVES:]
    if few:
        yield few


def _common_end(one: str, other: str) -> str:
    """The last segments that two paths have in common, of the first not all."""
    last = one.split("/")[1:], other.split("/")
    common: list[str] = []
    for first, second in zip(reversed(last[0]), reversed(last[1]), strict=False):
        if first != second:
            break
        common.insert(0, first)
    return "/".join(common)
