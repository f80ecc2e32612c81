"""The storage port: what every adapter promises. The comments here are the contract.

Paths are relative to the storage's root, ``/``-separated ``str`` (octets that are no UTF-8 as
surrogate escapes on POSIX). An adapter refuses absolute paths, ``..``, and anything that a symbolic
link would lead out of the root (``PathRefusedError``). No call overwrites: what is there stays.
Errors are those of ``dlm_core.errors``: ``StorageUnavailableError`` (retry), ``StorageFullError``,
``AccessDeniedError``, ``PayloadNotFoundError``, ``PayloadExistsError``, ``PathRefusedError``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

#: Everything of the DLM's own on a storage lies below this folder and is never a payload.
PRIVATE = ".dlm"
#: The folder of what was found damaged.
QUARANTINE = f"{PRIVATE}/quarantine"


def temp_path(token: str) -> str:
    """Where a copy is written before it is verified and renamed; ``token`` is unique per try."""
    return f"{PRIVATE}/tmp/{token}"


def trash_path(uid: str) -> str:
    """Where a trashed replica's payload lies until it is purged or restored."""
    return f"{PRIVATE}/trash/{uid}"


def quarantine_path(uid: str, token: str) -> str:
    """Where damaged bytes are kept, visibly, when a replica is made again."""
    return f"{QUARANTINE}/{uid}.{token}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the storage says of one path. A statement, not a proof: only reading proves bytes."""

    path: str
    #: bytes; for a directory 0
    size: int
    #: seconds since 1970, as the storage tells it
    mtime: float
    #: 'file', 'directory', 'symlink' or 'other' (fifo, socket, device)
    kind: str
    #: opaque: changes when the content does, if the storage has such a thing (S3)
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Capacity in bytes as the storage itself tells it."""

    total: int
    used: int


class Readable(Protocol):
    """What bytes are written from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes, all of them if it is negative; empty at the end only."""
        ...


class ReadStream(Readable, Protocol):
    """The bytes of one file, read once from front to back; raises the port's errors."""

    #: bytes the file had when it was opened
    size: int
    #: :meth:`stamp` at that time
    opened: Hashable

    def stamp(self) -> Hashable:
        """Something that stays the same while it is read unless the file changes meanwhile."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


class Storage(Protocol):
    """One volume. Implementations are thread-safe and cheap to keep.

    An adapter may also have

    ``tells_content = True``
        its entries' ``etag`` changes when the content does, so that a scheduled check may ask
        before it reads.
    ``remote = True``
        every call costs a round trip: its ``concurrency`` is used whatever the other end's is.
    ``exclusive = "file"`` or ``"folder"``
        of several that make or rename something to one new path at the same moment, from other
        processes and machines too, one succeeds: of files; or only of full folders that are
        renamed (the server looks first and replaces a file then, or nests a folder, which who
        reads back finds out). Bundles are kept on such storages only.
    ``write_many([(path, bytes), …])`` and ``rename_many([(source, destination), …])``
        as :meth:`write` of small files and :meth:`rename`, many at once; for each the error that
        the single call would raise, or None. Handing over each by itself costs more than it does.
    ``read_many([(path, size), …], stop) -> dict[path, bytes]``
        what may be the contents of small files, many in one request; ``size`` (bytes) is what the
        caller takes them for, who compares them with the digest that they are to have. Nothing is
        concluded from other bytes, nor from what is left out (all is once ``stop`` is set): it is
        read by :meth:`open_read`. ``reads_at_once`` are the files that one call is good for, 64
        unless told: more are spread over several.
    ``digest_many(paths, stop) -> dict[path, 'sha256:…']``
        digests that the far side computes from the bytes as they lie there, in one request; paths
        of which nothing is told are left out, and so are all once ``stop`` is set. It may prove a
        copy that was just written, for no other bytes have that digest; nothing else is concluded
        from it: what differs or is left out is read back here.
    ``open_range(path, offset, size) -> ReadStream``
        as :meth:`open_read`, of ``size`` bytes from ``offset`` on (fewer if the file ends before),
        without reading what lies before them; the stream's ``size`` is the part's, its stamp the
        file's.
    ``take_many(source, paths, folder, stop, progress) -> dict[path, 'sha256:…']``
        copies many files of another storage to their paths below ``folder`` (a temporary one) in
        one request, reads them back there, and tells their digests. What it leaves out was not
        copied or could not be read; the mover tries it alone.
    ``copy_from(source, source_path, path, size, moved) -> bool``
        copies a file of ``size`` bytes from another storage to a *new* file of this one without its
        bytes passing through here, and calls ``moved(bytes)`` on the way, which may wait or raise.
        False, and nothing is left, if these two cannot, or not this file. Errors are those of
        :meth:`write`. Nothing is proven by it: the mover reads the copy back whole.
    ``write_on(path, source, begun)`` and ``left_of(path) -> int``
        as :meth:`write` of a large file, from byte ``begun`` on: of a new file if that is 0, else
        of one that an earlier ``write_on`` made, nobody else writes to, and has so many bytes at
        least. If it fails, what was written stays; ``left_of`` tells how much of it is sure to be
        the file's beginning. The mover reads that again, and all of it once it is whole.
    ``write_in_parts(path, source, size, sending) -> etag``
        as :meth:`write` of a large file whose source is read from its beginning, but the parts that
        an earlier call left are not sent again if they are what ``source`` gives: so much is known
        from digests of its own bytes, by which the whole is named in the end. ``sending(bytes)`` is
        called before so many are sent, from several threads; it may wait or raise. If it fails,
        nothing is visible and what was sent stays, for the next call or ``forget_parts``. Returns
        the etag that these bytes have there, as they were read.
    ``forget_parts(before, owned) -> int``
        ends what ``write_in_parts`` and :meth:`write` left unfinished in the storage and nobody has
        touched since ``before`` (seconds since 1970); how many. ``owned(paths)`` tells those that
        are the DLM's, and whether a copy to it is still to be made: of each of these one stays that
        can be gone on from. Nothing outside the storage is touched, and where others may have a
        part in it nothing of which ``owned`` does not know.
    ``open_read_at(path, offset) -> ReadStream``
        as :meth:`open_read`, from that byte on; its size and stamp are the whole file's.
    ``old_versions() -> Iterator[Entry]``
        what the storage keeps of objects that were overwritten or deleted; only to be counted.
    ``remove_file(path)``
        see :func:`remove_file`, in one step: where a file may be beside a folder of its name.
    """

    name: str
    #: how many transfers at once suit this storage
    concurrency: int

    def stat(self, path: str) -> Entry | None:
        """The entry, or None if the storage *answers* that nothing is there.

        An outage is never None: it raises ``StorageUnavailableError``. On an object store a
        prefix with objects below is a 'directory'.
        """
        ...

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        """As :meth:`stat` for many paths of files, in as few requests as the storage allows."""
        ...

    def walk(self, path: str = "") -> Iterator[Entry]:
        """All entries below ``path`` but directories, in path order within a directory.

        Symbolic links come as 'symlink' and are never followed. ``.dlm`` is left out. Raises
        rather than leave something out silently; ``PayloadNotFoundError`` if ``path`` is not there.
        """
        ...

    def open_read(self, path: str) -> ReadStream:
        """A stream over the bytes of a file; closing it is the caller's.

        ``PathRefusedError`` for what is no file (a directory, a symbolic link, a device).
        """
        ...

    def write(self, path: str, source: Readable, size: int) -> str | None:
        """Write ``size`` bytes from ``source`` to a *new* file; make parent folders.

        Returns the etag if the storage has one. When it returns the bytes are durable or will be
        by :meth:`flush`. If it raises, nothing is visible at ``path`` or :meth:`remove` clears it.
        What ``source`` raises goes through; ``PayloadNotFoundError`` is never said of ``path``.
        """
        ...

    def flush(self) -> None:
        """Make all that was written and renamed durable (one syncfs for a whole batch)."""
        ...

    def rename(self, source: str, destination: str) -> None:
        """Move a file or directory tree; make parent folders of the destination.

        Fails with ``PayloadExistsError`` if the destination is there and ``PayloadNotFoundError``
        if the source is not. On an object store it is copy, check, delete: a crash leaves the
        source, or both, never neither; doing it again completes it, for a file after the
        destination was removed.
        """
        ...

    def remove(self, path: str) -> None:
        """Remove a file or directory tree; fine if nothing is there. Empty parents may go too."""
        ...

    def usage(self) -> Usage | None:
        """Capacity, or None if the storage cannot tell."""
        ...

    def check(self) -> None:
        """Raise unless the root is there, reachable and readable."""
        ...


def remove_file(storage: Storage, path: str) -> None:
    """Remove a file; fine if nothing is there. A folder of that name stays: where a file was that
    went already, what lies below may be others'."""
    by_itself: Callable[[str], None] | None = getattr(storage, "remove_file", None)
    if by_itself is not None:
        by_itself(path)
        return
    entry = storage.stat(path)
    if entry is not None and entry.kind != "directory":
        storage.remove(path)
