"""Reading through the rclone daemon: whole files, and parts of them.

The daemon answers every range with 206 and the ``Content-Range`` that was asked for, whatever its
backend made of it: a web server that ignores ranges sends the file from its first byte on, and up
to the length that was told that is what comes. So a part counts only if it begins otherwise than
the file does; what cannot be told apart is read through.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING

from dlm_core.errors import StorageUnavailableError
from dlm_core.storages.port import Entry
from dlm_core.storages.wire import Reply, ReplyStream, part

if TYPE_CHECKING:
    from dlm_core.storages.rclone import RcloneStorage

# so many bytes are compared, and so many files kept of which they are known
_COMPARED = 64
_MOST_KEPT = 1000


class RcloneStream(ReplyStream):
    """The bytes of a file, or of its end."""

    def __init__(
        self, storage: RcloneStorage, path: str, reply: Reply, entry: Entry | None
    ) -> None:
        super().__init__(reply, lambda error: storage._error(error, path))
        self._storage, self._path = storage, path
        self._ahead = b""
        self.size: int = entry.size if entry else reply.length or 0
        self.opened: Hashable = entry

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        if not self._ahead:
            return super().read(size)
        if size < 0:
            ahead, self._ahead = self._ahead, b""
            return ahead + super().read(size)
        ahead, self._ahead = self._ahead[:size], self._ahead[size:]
        return ahead

    def look_ahead(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end; they are still to be read."""
        while len(self._ahead) < count and (more := super().read(count - len(self._ahead))):
            self._ahead += more
        return self._ahead

    def stamp(self) -> Hashable:
        """Size and time of change, asked anew."""
        return self._storage._look(self._path)


class Beginnings:
    """How the files begin that were read in parts last: those of a tar are read one by one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Entry, bytes] = OrderedDict()

    def get(self, storage: RcloneStorage, entry: Entry) -> bytes:
        """The first bytes of a file, asked for if they are not known of it as it is now.

        Raises
        ------
        StorageError
            also where the backend sends more than it is asked for.
        """
        with self._lock:
            if (known := self._known.get(entry)) is not None:
                self._known.move_to_end(entry)
                return known
        count = min(_COMPARED, entry.size)
        reply = storage.open_reply(entry.path, part(0, count))
        with RcloneStream(storage, entry.path, reply, entry) as stream:
            found = stream.look_ahead(count)
        if len(found) < count:
            raise storage._unavailable(f"it sends less of {entry.path} than it tells")
        with self._lock:
            self._known[entry] = found
            if len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
        return found


def open_part(
    storage: RcloneStorage, beginnings: Beginnings, entry: Entry, offset: int, end: int
) -> RcloneStream | None:
    """The bytes of a file from ``offset`` to ``end``, perhaps a few more; None if they do not come
    for sure: what is wrong, if anything is, reading it whole tells.

    Raises
    ------
    PayloadNotFoundError, AccessDeniedError
    """
    end = min(max(end, offset + _COMPARED), entry.size)
    with suppress(StorageUnavailableError):
        first = beginnings.get(storage, entry)
        reply = storage.open_reply(entry.path, part(offset, end))
        stream = RcloneStream(storage, entry.path, reply, entry)
        try:
            sure = stream.is_part(offset, end, entry.size)
            if sure and not first.startswith(stream.look_ahead(min(_COMPARED, end - offset))):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()
    return None
