"""Move payloads from one storage to another so that only whole, verified copies become visible.

POSIX: written under a temporary name, flushed with the whole sub-batch, read back, renamed without
overwriting. Object stores (``atomic_write``): a PUT appears whole or not at all and never replaces
anything, so it goes to its final name; the upload fails if the source's digest turns out wrong.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import md5, sha256
from typing import BinaryIO, cast

from dlm_core.errors import (
    DestinationDamagedError,
    DlmError,
    PayloadExistsError,
    SourceDamagedError,
    StorageUnavailableError,
)
from dlm_core.storages.port import Entry, Storage, temp_path
from dlm_core.transfers.checksums import observe
from dlm_core.types import ManifestEntry, PayloadKind

_BLOCK = 1 << 20
_SUB_BATCH_FILES = 512
_SUB_BATCH_BYTES = 1 << 30

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class CopyTask:
    """One payload to copy. ``size`` in bytes and ``digest`` are what the catalogue says; ``token``
    names the temporary file and is unique for every try."""

    operation_id: uuid.UUID
    source_path: str
    destination_path: str
    kind: PayloadKind
    size: int
    digest: str
    manifest: tuple[ManifestEntry, ...]
    token: str


@dataclass(frozen=True, slots=True)
class CopyResult:
    """How a task ended: ``error`` None means a verified, visible copy."""

    task: CopyTask
    error: DlmError | None
    seconds: float


@dataclass(slots=True)
class _File:
    """One file on its way; a directory payload has several."""

    task: CopyTask
    source: str
    #: where it is written first, and where it becomes visible
    written: str
    final: str
    size: int
    digest: str
    etags: tuple[str, ...] = ()
    adopted: bool = False
    error: DlmError | None = None
    seconds: float = 0.0


class Interrupted(Exception):
    """Raised inside a read when the copying is to stop."""


class HashingReader:
    """A stream that computes digests of what is read, and fails before its end if they are wrong.

    Failing inside the read makes an upload abort: nothing becomes visible at the destination.
    With ``part_size`` the MD5 of each part is kept, for comparison with an object store's ETag.
    """

    def __init__(
        self,
        stream: BinaryIO,
        file: _File,
        where: str,
        part_size: int | None,
        stop: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        self._stream, self._file, self._where = stream, file, where
        self._stop, self._progress = stop, progress
        self._sha, self._left, self._part_size = sha256(), file.size, part_size
        self._parts: list[bytes] = []
        self._part, self._part_left = md5(usedforsecurity=False), part_size or 0

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; raises before handing out the last ones if they are not right."""
        if self._stop is not None and self._stop.is_set():
            raise Interrupted
        try:
            block = self._stream.read(_BLOCK if size is None or size < 0 else size)
        except OSError as error:
            # the source's trouble, which the destination must not take for its own
            raise StorageUnavailableError(storage=self._where, message=str(error)) from error
        self._sha.update(block)
        self._left -= len(block)
        if self._part_size:
            self._count_parts(block)
        if self._left <= 0:
            self._finish(block)
        elif not block:
            self._wrong(f"only {self._file.size - self._left} bytes")
        if self._progress is not None and block:
            self._progress(len(block))
        return block

    def _finish(self, block: bytes) -> None:
        if self._left < 0 or (block and self._stream.read(1)):
            self._wrong(f"more than {self._file.size} bytes")
        found = f"sha256:{self._sha.hexdigest()}"
        if found != self._file.digest:
            self._wrong(found)

    def _wrong(self, found: str) -> None:
        raise SourceDamagedError(where=self._where, expected=self._file.digest, found=found)

    def _count_parts(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            taken = view[: self._part_left]
            self._part.update(taken)
            self._part_left -= len(taken)
            view = view[len(taken) :]
            if not self._part_left:
                self._close_part()

    def _close_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part = md5(usedforsecurity=False)
        self._part_left = self._part_size or 0

    def etags(self) -> tuple[str, ...]:
        """The ETag that S3 gives these bytes: MD5 of a single part, or of the parts' MD5s."""
        if not self._part_size:
            return ()
        if self._file.size <= self._part_size:
            # a file of exactly one part was closed when it was full
            single = self._parts[0] if self._parts else self._part.digest()
            return (single.hex(),)
        parts = list(self._parts)
        if self._part_left != self._part_size:
            parts.append(self._part.digest())
        joined = md5(b"".join(parts), usedforsecurity=False).hexdigest()
        return (f"{joined}-{len(parts)}",)


def copy_batch(
    source: Storage,
    destination: Storage,
    tasks: Sequence[CopyTask],
    *,
    concurrency: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Iterator[CopyResult]:
    """Copy payloads; yields a result for each task, a sub-batch at a time.

    ``concurrency`` defaults to the destination's; ``progress`` is told bytes as they are read. An
    error of one payload is that payload's result. Tasks not finished when ``stop`` is set are not
    yielded and leave nothing visible; what an earlier try left whole at the destination is
    compared and adopted, anything else there is left alone (``PayloadExistsError``).
    """
    mover = _Mover(source, destination, progress, stop)
    threads = concurrency or max(1, min(source.concurrency, destination.concurrency))
    if getattr(destination, "atomic_write", False) or getattr(source, "atomic_write", False):
        threads = concurrency or max(source.concurrency, destination.concurrency)
    with ThreadPoolExecutor(threads, "dlm-copy") as pool:
        for batch in _sub_batches(tasks):
            if stop is not None and stop.is_set():
                return
            yield from mover.copy(batch, pool)


def _sub_batches(tasks: Sequence[CopyTask]) -> Iterator[list[CopyTask]]:
    batch: list[CopyTask] = []
    size = 0
    for task in tasks:
        if batch and (len(batch) >= _SUB_BATCH_FILES or size + task.size > _SUB_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += task.size
    if batch:
        yield batch


class _Mover:
    def __init__(
        self,
        source: Storage,
        destination: Storage,
        progress: Progress | None,
        stop: threading.Event | None,
    ) -> None:
        self.source, self.destination = source, destination
        self.progress, self.stop = progress, stop
        self.atomic = bool(getattr(destination, "atomic_write", False))
        self.part_size: int | None = getattr(destination, "part_size", None)
        self.read_back = getattr(destination, "read_back", destination.open_read)

    def copy(self, tasks: Sequence[CopyTask], pool: ThreadPoolExecutor) -> list[CopyResult]:
        files = [file for task in tasks for file in self._files(task)]
        if self.atomic:
            list(pool.map(self._write, files))
            self._compare_etags(files)
            list(pool.map(self._verify, [f for f in files if not f.error and not f.adopted]))
        else:
            list(pool.map(self._write, files))
            self._flush(files)
            list(pool.map(self._verify, [f for f in files if not f.error]))
        return self._publish(tasks, files, pool)

    def _files(self, task: CopyTask) -> list[_File]:
        first = task.destination_path if self.atomic else temp_path(task.token)
        if task.kind is PayloadKind.FILE:
            return [
                _File(task, task.source_path, first, task.destination_path, task.size, task.digest)
            ]
        return [
            _File(
                task,
                f"{task.source_path}/{one.path}",
                f"{first}/{one.path}",
                f"{task.destination_path}/{one.path}",
                one.size,
                one.digest,
            )
            for one in task.manifest
        ]

    def _write(self, file: _File) -> None:
        begun = time.monotonic()
        try:
            where = f"{self.source.name}:{file.source}"
            with self.source.open_read(file.source) as stream:
                reader = HashingReader(
                    stream, file, where, self.part_size, self.stop, self.progress
                )
                self.destination.write(file.written, cast(BinaryIO, reader), file.size)
                file.etags = reader.etags()
        except PayloadExistsError as error:
            self._adopt(file, error)
        except Interrupted:
            file.error = StorageUnavailableError(storage=self.source.name, message="interrupted")
        except DlmError as error:
            file.error = error
        file.seconds += time.monotonic() - begun

    def _adopt(self, file: _File, error: PayloadExistsError) -> None:
        """What an earlier try left complete is as good as a new copy; anything else stays."""
        try:
            seen = observe(self.destination, file.written)
        except DlmError as failure:
            file.error = failure
            return
        if (seen.size, seen.digest) == (file.size, file.digest):
            file.adopted = True
        else:
            file.error = error

    def _flush(self, files: Sequence[_File]) -> None:
        try:
            self.destination.flush()
        except DlmError as error:
            for file in files:
                file.error = file.error or error

    def _compare_etags(self, files: Sequence[_File]) -> None:
        """One listing tells the ETags of the whole sub-batch; they are digests of the bytes there.

        A file whose ETag is of another kind (encrypted by a key service, say) is read back.
        """
        waiting = [file for file in files if not file.error and not file.adopted and file.etags]
        if not waiting:
            return
        try:
            entries = self.destination.stat_many([file.written for file in waiting])
        except DlmError:
            return  # read them back instead
        for file in waiting:
            entry: Entry | None = entries.get(file.written)
            if entry is not None and entry.size == file.size:
                file.adopted = (entry.etag or "").strip('"') in file.etags

    def _verify(self, file: _File) -> None:
        begun = time.monotonic()
        try:
            hasher, size = sha256(), 0
            with self.read_back(file.written) as stream:
                while block := stream.read(_BLOCK):
                    hasher.update(block)
                    size += len(block)
            found = f"sha256:{hasher.hexdigest()}"
            if (found, size) != (file.digest, file.size):
                where = f"{self.destination.name}:{file.final}"
                file.error = DestinationDamagedError(
                    where=where,
                    expected=f"{file.digest} ({file.size} bytes)",
                    found=f"{found} ({size} bytes)",
                )
        except DlmError as error:
            file.error = error
        file.seconds += time.monotonic() - begun

    def _publish(
        self, tasks: Sequence[CopyTask], files: Sequence[_File], pool: ThreadPoolExecutor
    ) -> list[CopyResult]:
        by_task: dict[uuid.UUID, list[_File]] = {task.operation_id: [] for task in tasks}
        for file in files:
            by_task[file.task.operation_id].append(file)
        stopped = self.stop is not None and self.stop.is_set()

        def settle(task: CopyTask) -> CopyResult:
            mine = by_task[task.operation_id]
            error = next((file.error for file in mine if file.error), None)
            if error is None and not self.atomic:
                error = self._reveal(task)
            if error is not None:
                self._clear(task, mine)
            return CopyResult(task, error, sum(file.seconds for file in mine))

        results = list(pool.map(settle, tasks))
        if not self.atomic:
            results = self._make_names_durable(results)
        if stopped:
            return [result for result in results if result.error is None]
        return results

    def _reveal(self, task: CopyTask) -> DlmError | None:
        try:
            if task.kind is PayloadKind.DIRECTORY and not task.manifest:
                return PayloadExistsError(storage=self.destination.name, path="(empty directory)")
            self.destination.rename(temp_path(task.token), task.destination_path)
        except PayloadExistsError as error:
            return self._same_already(task, error)
        except DlmError as error:
            return error
        return None

    def _same_already(self, task: CopyTask, error: DlmError) -> DlmError | None:
        try:
            seen = observe(self.destination, task.destination_path, task.kind)
            if (seen.size, seen.digest) != (task.size, task.digest):
                return error
            self.destination.remove(temp_path(task.token))
        except DlmError as failure:
            return failure
        return None

    def _make_names_durable(self, results: list[CopyResult]) -> list[CopyResult]:
        try:
            self.destination.flush()
        except DlmError as error:
            return [replace(result, error=result.error or error) for result in results]
        return results

    def _clear(self, task: CopyTask, files: Sequence[_File]) -> None:
        """Take back what was written by this try, and only that."""
        try:
            if not self.atomic:
                self.destination.remove(temp_path(task.token))
                return
            for file in files:
                if isinstance(file.error, DestinationDamagedError):
                    self.destination.remove(file.written)
        except DlmError:
            pass  # the sweep finds it; the task's own error is the one to tell
