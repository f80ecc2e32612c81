"""Large files that go on where an earlier try was interrupted."""

from __future__ import annotations

import io
import threading
from hashlib import sha256
from typing import Any

from dlm_core.errors import (
    DestinationDamagedError,
    PayloadNotFoundError,
    SourceDamagedError,
    StorageUnavailableError,
)
from dlm_core.storages.port import Entry, ReadStream, Storage
from dlm_core.transfers.reading import BLOCK, HashingReader, Interrupted, Progress
from dlm_core.transfers.tasks import File


def write_in_parts(
    source: Storage, destination: Storage, file: File, stop: threading.Event, moved: Progress
) -> None:
    """Write one file; the destination has ``write_in_parts``, and finds by itself what is there.

    The source is read whole, and fails before its end if it is not what it should be.
    """

    def sending(_: int) -> None:
        if stop.is_set():
            raise Interrupted

    where = f"{source.name}:{file.source}"
    with source.open_read(file.source) as stream:
        reader = HashingReader(stream, file.size, file.digest, where, None, stop, moved)
        write: Any = destination.write_in_parts  # type: ignore[attr-defined]
        file.etag = write(file.written, reader, file.size, sending) or ""


class Resuming:
    """Writes one file; the destination has ``write_on``.

    What an earlier try left is renamed to this try's own name first: only one can have it, and who
    wrote it has ended, so nobody else writes there. What a worker left that was lost without a word
    may still be written to: a copy of it is made, where the storage makes copies by itself, and it
    is removed. What is gone on from is read again for the digest of the whole.
    """

    def __init__(
        self, source: Storage, destination: Storage, stop: threading.Event, moved: Progress
    ) -> None:
        self._source, self._destination, self._stop = source, destination, stop
        self._moved = moved

    def write(self, file: File) -> None:
        """Raises as ``write``, and Interrupted; ``file.kept`` tells if what was written stays.

        DestinationDamagedError
            if the whole is not what it should be: whether the fault is that of the bytes which were
            there is not known, so the next try begins anew.
        """
        begun, hasher = self._taken_over(file)
        if begun == file.size:
            self._destination.write_on(file.written, io.BytesIO(), begun)  # type: ignore[attr-defined]
            file.kept = False
            return
        where = f"{self._source.name}:{file.source}"
        try:
            with self._opened(file, begun) as stream:
                reader = HashingReader(
                    stream, file.size, file.digest, where, None, self._stop, self._moved,
                    hasher, begun,
                )  # fmt: skip
                file.kept = True
                self._destination.write_on(file.written, reader, begun)  # type: ignore[attr-defined]
        except (Interrupted, StorageUnavailableError):
            file.kept = file.kept or begun > 0
            raise
        except SourceDamagedError as error:
            file.kept = False
            if not begun:
                raise
            raise DestinationDamagedError(
                where=f"{self._destination.name}:{file.final}",
                expected=file.digest,
                found=f"{error.details['found']} with the {begun} bytes of an earlier try",
            ) from error
        except BaseException:
            file.kept = False
            raise
        file.kept = False

    def _taken_over(self, file: File) -> tuple[int, Any]:
        """How many bytes are there already, and the digest of them so far."""
        if not (self._renamed(file) or self._cloned(file)):
            return 0, sha256()
        file.kept = True
        left: int = self._destination.left_of(file.written)  # type: ignore[attr-defined]
        if not 0 < left <= file.size:
            file.kept = False
            self._destination.remove(file.written)
            return 0, sha256()
        return left, self._hashed(file.written, left)

    def _renamed(self, file: File) -> bool:
        if file.partial is None:
            return False
        try:
            self._destination.rename(file.partial, file.written)
        except PayloadNotFoundError:
            return False
        return True

    def _cloned(self, file: File) -> bool:
        """Whether something is here that a lost worker left, of which the storage made a copy."""
        copy_from = getattr(self._destination, "copy_from", None)
        left = self._left_by_others(file) if copy_from is not None else []
        if copy_from is None or not left:
            return False
        most = max(left, key=lambda entry: entry.size)

        def moved(_: int) -> None:
            if self._stop.is_set():
                raise Interrupted

        cloned: bool = copy_from(self._destination, most.path, file.written, most.size, moved)
        for entry in left if cloned else ():
            self._destination.remove(entry.path)
        return cloned

    def _left_by_others(self, file: File) -> list[Entry]:
        folder, _, name = file.written.rpartition("/")
        own = f"{folder}/{name.partition('.')[0]}."
        try:
            return [
                entry
                for entry in self._destination.walk(folder)
                if entry.path.startswith(own) and entry.path != file.written and entry.size
            ]
        except PayloadNotFoundError:
            return []

    def _hashed(self, path: str, size: int) -> Any:
        hasher = sha256()
        with self._destination.open_read(path) as stream:
            while size and (block := stream.read(min(BLOCK, size))):
                if self._stop.is_set():
                    raise Interrupted
                hasher.update(block)
                size -= len(block)
                self._moved(len(block))
        if size:
            raise StorageUnavailableError(
                storage=self._destination.name, message=f"{path} became shorter"
            )
        return hasher

    def _opened(self, file: File, begun: int) -> ReadStream:
        """The source from byte ``begun`` on, which it may have to be read up to."""
        at = getattr(self._source, "open_read_at", None)
        if at is not None and begun:
            found: ReadStream = at(file.source, begun)
            return found
        stream = self._source.open_read(file.source)
        try:
            while begun and (block := stream.read(min(BLOCK, begun))):
                if self._stop.is_set():
                    raise Interrupted
                begun -= len(block)
        except BaseException:
            stream.close()
            raise
        return stream
