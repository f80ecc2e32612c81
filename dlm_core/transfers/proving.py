"""Prove that what was written is what was to be copied, before anybody sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256

from dlm_core.errors import (
    DestinationDamagedError,
    DlmError,
    PayloadNotFoundError,
    SourceDamagedError,
    StorageUnavailableError,
)
from dlm_core.storages.port import ReadStream, Storage
from dlm_core.transfers.beside import Call, LostError
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.pooled import MAX_CHUNK
from dlm_core.transfers.reading import BLOCK, Interrupted
from dlm_core.transfers.tasks import SMALL, File, Lane, Turn, interrupted
from dlm_core.transfers.throttle import bare
from dlm_core.transfers.tiny import look_at_each


class Prover:
    """Looks at the files of a sub-batch where they were written; what it finds is noted in them.

    Parameters
    ----------
    turn : held while some files are read; may give what calls a process that can.
    """

    def __init__(
        self, source: Storage, destination: Storage, stop: threading.Event, lane: Lane, turn: Turn
    ) -> None:
        self._source, self._destination, self._stop = source, destination, stop
        self._lane, self._turn = lane, turn
        self._digest_many = getattr(destination, "digest_many", None)
        self._open = getattr(destination, "read_back", destination.open_read)
        #: files that one call of :meth:`read_back` opens before it reads them
        self.opened_ahead = MAX_CHUNK if hasattr(destination, "read_back") else 1

    def compare_etags(self, files: Sequence[File]) -> None:
        """One listing tells the ETags of the whole sub-batch; they are digests of the bytes there.

        A file whose ETag is of another kind (encrypted by a key service, say) is read back.
        """
        waiting = {file.written: file for file in files if file.made and file.etag}
        if not waiting:
            return
        try:
            entries = self._destination.stat_many(waiting)
        except DlmError:
            return  # read them back instead
        for path, file in waiting.items():
            entry = entries.get(path)
            file.proven = entry is not None and (entry.size, entry.etag) == (file.size, file.etag)

    def ask_for_digests(self, files: Sequence[File]) -> None:
        """The far side reads what it has just made durable and tells digests of the sub-batch.

        Another machine's word proves these bytes: it was not told what we expect, and only who has
        read them all can say it. Any other answer proves nothing; the file is read back.
        """
        waiting = {
            file.written: file for file in files if file.made and not file.proven and not file.error
        }
        if self._digest_many is None or not waiting:
            return
        try:
            told = self._digest_many(list(waiting), self._stop)
        except DlmError:
            return  # read them back instead
        for path, digest in told.items():
            waiting[path].proven = digest == waiting[path].digest

    def read_back(self, files: Sequence[File]) -> list[None]:
        """Read files back; all are opened first, so that the medium is at work on the next ones."""
        try:
            most = max(file.size for file in files)
            with self._lane.places(True, most), self._turn(files) as call, ExitStack() as opened:
                if call is not None and self._looked_at_beside(call, files):
                    return []
                for file, stream in self._opened(files, opened):
                    self._verify_one(file, stream)
        except Interrupted:
            for file in files:
                file.error = file.error or interrupted(self._destination)
        return []

    def _looked_at_beside(self, call: Call, files: Sequence[File]) -> bool:
        """Whether a process beside has read them all."""
        try:
            wanted = [(file.written, file.size + 1) for file in files]
            seen = call(look_at_each, bare(self._destination), wanted)
        except LostError:
            return False
        for file, (size, found, (error, seconds)) in zip(files, seen, strict=True):
            file.seconds += seconds
            if isinstance(error, PayloadNotFoundError):
                file.error = self._damaged(file, "nothing")
            elif error is not None:
                file.error = error
            else:
                self._compare(file, size, found)
        return True

    def _opened(self, files: Sequence[File], opened: ExitStack) -> list[tuple[File, ReadStream]]:
        return [
            (file, opened.enter_context(stream))
            for file in files
            if (stream := self._open_back(file)) is not None
        ]

    def _open_back(self, file: File) -> ReadStream | None:
        try:
            return self._open(file.written)
        except PayloadNotFoundError:
            file.error = self._damaged(file, "nothing")
        except DlmError as error:
            file.error = error
        return None

    def _verify_one(self, file: File, stream: ReadStream) -> None:
        begun = time.monotonic()
        try:
            self._compare(file, *self._digest_of(stream, file))
        except PayloadNotFoundError:
            file.error = self._damaged(file, "nothing")
        except Interrupted:
            file.error = interrupted(self._destination)
        except DlmError as error:
            file.error = error
        file.kept = file.resumable and isinstance(file.error, StorageUnavailableError)
        file.seconds += time.monotonic() - begun

    def _compare(self, file: File, size: int, found: str) -> None:
        if (found, size) != (file.digest, file.size):
            told = f"{found} ({size} bytes)"
            source = self._damaged_source(file) if file.direct else None
            file.error = source or self._damaged(file, told)

    def _digest_of(self, stream: ReadStream, file: File) -> tuple[int, str]:
        hasher, size = sha256(), 0
        while block := stream.read(min(BLOCK, file.size - size + 1)):
            hasher.update(block)
            size += len(block)
            if file.size > SMALL:
                self._lane.watch(file.operation_id, "check", len(block))
            if size > file.size:
                break
            if size < file.size and self._stop.is_set():
                raise Interrupted
        return size, f"sha256:{hasher.hexdigest()}"

    def _damaged_source(self, file: File) -> DlmError | None:
        """What is wrong with the source of a copy whose bytes nobody looked at, if it is."""
        try:
            seen = observe(self._source, file.source, stop=self._stop)
        except DlmError as error:
            return error
        if self._stop.is_set():
            raise Interrupted
        if (seen.digest, seen.size) == (file.digest, file.size):
            return None
        return SourceDamagedError(
            where=f"{self._source.name}:{file.source}",
            expected=f"{file.digest} ({file.size} bytes)",
            found=f"{seen.digest} ({seen.size} bytes)",
        )

    def _damaged(self, file: File, found: str) -> DestinationDamagedError:
        return DestinationDamagedError(
            where=f"{self._destination.name}:{file.final}",
            expected=f"{file.digest} ({file.size} bytes)",
            found=found,
        )
