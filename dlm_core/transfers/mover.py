"""Move payloads from one storage to another so that only whole, verified copies become visible.

POSIX, SFTP: written under a temporary name, flushed with the whole sub-batch, read back (or
proven by a digest that the far side computes: ``digest_many``), renamed without overwriting. Object
stores (``atomic_write``): a PUT appears whole or not at all and never replaces anything, so it goes
to its final name; the upload fails if the source's digest turns out wrong.
"""

from __future__ import annotations

import io
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from hashlib import md5, sha256
from typing import Any, cast

from dlm_core.errors import (
    DlmError,
    PathRefusedError,
    PayloadExistsError,
    StorageUnavailableError,
)
from dlm_core.storages.port import Storage, temp_path
from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers.beside import PROCESSES, Call, LostError
from dlm_core.transfers.bringing import bringing
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.pooled import MAX_CHUNK, TINY, Turns, at_once, in_chunks, near, together
from dlm_core.transfers.proving import Prover
from dlm_core.transfers.publishing import Publisher
from dlm_core.transfers.reading import HashingReader, Interrupted, Progress
from dlm_core.transfers.resuming import Resuming, write_in_parts
from dlm_core.transfers.tasks import (
    AT_ONCE,
    FEW,
    SMALL,
    TOGETHER,
    Copy,
    CopyResult,
    CopyTask,
    File,
    Lane,
    can_be_listed,
    groups,
    interrupted,
    last_at_work,
    of_destination,
    sub_batches,
)
from dlm_core.transfers.throttle import bare, held_back
from dlm_core.transfers.tiny import copy_each, read_whole
from dlm_core.types import PayloadKind

__all__ = ["CopyResult", "CopyTask", "Lane", "copy_batch", "last_at_work"]

# folders for temporary files: threads that make files in one folder wait for each other
_SLOTS = 16
#: processes beside that tiny files are given to first, and from how many files on: fewer are
#: copied before a process has begun
_PROCESSES = 2
_WORTH_PROCESSES = 250
_NOTHING: Mapping[str, bytes] = {}


def copy_batch(
    source: Storage,
    destination: Storage,
    tasks: Sequence[CopyTask],
    *,
    concurrency: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    resume_bytes: int | None = None,
    lane: Lane | None = None,
) -> Iterator[CopyResult]:
    """Copy payloads; yields a result for each task, a sub-batch at a time.

    An error of one payload is that payload's result. What an earlier try left whole at the
    destination is compared and adopted, anything else there is left alone
    (``PayloadExistsError``). Tasks not finished when ``stop`` is set are not yielded and leave
    nothing visible, but for files of a directory payload on an object store, which the next try
    adopts. Of a file above ``resume_bytes`` that was interrupted the next try need not copy again
    what came through, where the destination lets it: it is yielded with its ``partial`` file.

    Parameters
    ----------
    concurrency : files at once; by default what suits the storages.
    progress : told the bytes of each block that was read, from several threads.
    lane : limits on files at once that others have a part in, and who watches.
    """
    threads = concurrency or at_once(source, destination)
    files = sum(len(task.manifest) or 1 for task in tasks)
    mover = _Mover(source, destination, progress, stop, lane or Lane(), threads, files)
    if resume_bytes is not None:
        mover.resumed_above = resume_bytes
    going: deque[Future[list[CopyResult]]] = deque()
    with ThreadPoolExecutor(threads, "dlm-copy") as pool, ThreadPoolExecutor(AT_ONCE) as batches:
        for batch in sub_batches(tasks):
            going.append(batches.submit(mover.copy, batch, pool))
            # one more waits: who takes the results may be slow
            if len(going) > AT_ONCE:
                yield from going.popleft().result()
            if mover.stop.is_set():
                break
        while going:
            yield from going.popleft().result()


class _Mover:
    def __init__(
        self,
        source: Storage,
        destination: Storage,
        progress: Progress | None,
        stop: threading.Event | None,
        lane: Lane,
        threads: int,
        files: int,
    ) -> None:
        self.source, self.destination, self.lane = source, destination, lane
        self.near = near(source, destination)
        self.progress, self.stop = progress, stop or threading.Event()
        self.atomic = bool(getattr(destination, "atomic_write", False))
        self.part_size: Callable[[int], int] | None = getattr(destination, "part_size", None)
        self.read_many = getattr(source, "read_many", None)
        self.write_many = getattr(destination, "write_many", None)
        self.copy_from = getattr(destination, "copy_from", None)
        self.write_on = getattr(destination, "write_on", None)
        self.write_in_parts = getattr(destination, "write_in_parts", None)
        # what is not written together is written one after the other: few, where each takes long
        self.together = TOGETHER
        if self.write_many is None:
            most = TOGETHER if near(destination) else FEW
            self.together = min(most, getattr(source, "reads_at_once", TOGETHER))
        self.resumed_above = sys.maxsize
        self.outage: DlmError | None = None
        ends = {type(bare(source)), type(bare(destination))}
        self.beside = ends == {PosixStorage} and files >= _WORTH_PROCESSES
        self.turns = Turns(threads, PROCESSES.begin(_PROCESSES) if self.beside else 1)
        self.prover = Prover(source, destination, self.stop, lane, self._turn)
        self.publisher = Publisher(destination, self.near, self.stop, lane, self._turn)
        self.bringing = bringing(source, destination, self.prover, self.stop, lane)

    def copy(self, tasks: Sequence[CopyTask], pool: ThreadPoolExecutor) -> list[CopyResult]:
        """The results of one sub-batch; fewer than tasks only if ``stop`` is set."""
        return self.finish(self.write(tasks, pool), pool)

    def write(self, tasks: Sequence[CopyTask], pool: ThreadPoolExecutor) -> list[Copy]:
        """Bring the bytes of one sub-batch over; errors are kept beside the files."""
        # asked anew each time: limits change
        limited = self.lane.limited()
        plugged = self.bringing if self.bringing is not None and self.bringing.may() else None
        take_many = getattr(self.destination, "take_many", None)
        if limited or plugged is not None:
            take_many = None
        folder = temp_path(f"b/{uuid.uuid4().hex}") if take_many else None
        copies = [
            self._prepare(task, n // MAX_CHUNK % _SLOTS, folder) for n, task in enumerate(tasks)
        ]
        if plugged is not None and self.outage is None:
            plugged.bring(copies, pool, self._watching_all(copies))
        files = [file for copy in copies for file in copy.files if not file.made]
        if folder is not None:
            taken = [file for file in files if file.written.startswith(folder)]
            self._take_together(take_many, folder, taken)
            files = [file for file in files if not file.made]
        if (self.read_many or self.write_many) is not None and not limited:
            small = [file for file in files if file.size <= SMALL]
            list(pool.map(self._write_together, groups(small, self.together)))
            files = [file for file in files if file.size > SMALL]
        in_chunks(pool, self._write_chunk, files)
        return copies

    def finish(self, copies: Sequence[Copy], pool: ThreadPoolExecutor) -> list[CopyResult]:
        """Make durable, verify, show."""
        files = [file for copy in copies for file in copy.files]
        if self.atomic:
            self.prover.compare_etags(files)
        else:
            self._flush(files)
            self.prover.ask_for_digests(files)
        unproven = [file for file in files if not file.error and not file.proven]
        in_chunks(pool, self.prover.read_back, unproven, self.prover.opened_ahead)
        results = self.publisher.publish(copies, pool)
        stopped = self.stop.is_set()
        if not self.atomic:
            results = self.publisher.make_names_durable(results)
        self._clear_together(copies)
        if not stopped:
            return results
        return [
            replace(result, stopped=result.error is not None)
            for result in results
            if result.error is None or result.partial
        ]

    def _prepare(self, task: CopyTask, slot: int, folder: str | None) -> Copy:
        resumable = (
            self.write_on is not None
            and task.kind is PayloadKind.FILE
            and task.size > self.resumed_above
        )
        # all that may be gone on from is in one folder, where the next try looks
        name = f"l/{task.token}" if resumable else f"{slot:x}/{task.token}"
        written = task.destination_path if self.atomic else temp_path(name)
        if folder is not None and can_be_listed(task):
            written = f"{folder}/{task.source_path}"
        copy = Copy(task, written)
        if task.kind is PayloadKind.FILE:
            copy.files.append(
                File(
                    task.operation_id, task.source_path, written, task.destination_path,
                    task.size, task.digest, partial=task.partial,
                    resumable=resumable,
                )
            )  # fmt: skip
        elif not task.manifest:
            copy.error = PathRefusedError(
                storage=self.source.name, path=task.source_path, message="its manifest is empty"
            )
        for one in task.manifest if task.kind is PayloadKind.DIRECTORY else ():
            names = (task.source_path, written, task.destination_path)
            source, first, final = (f"{name}/{one.path}" for name in names)
            copy.files.append(File(task.operation_id, source, first, final, one.size, one.digest))
        return copy

    # --- write -----------------------------------------------------------------------------------

    def _take_together(self, take_many: Any, folder: str, files: Sequence[File]) -> None:
        """Have the destination take what it can in one go; what reads back right is proven.

        The rest is cleared and tried file by file, which tells whose fault it is.
        """
        begun = time.monotonic()
        told: dict[str, str] = {}
        if files and not self.stop.is_set():
            paths = [file.source for file in files]
            try:
                told = take_many(self.source, paths, folder, self.stop, self.progress)
            except DlmError:
                pass  # the same happens to each, and is told there
        each = (time.monotonic() - begun) / max(1, len(files))
        for file in files:
            file.seconds += each
            file.made = file.proven = told.get(file.source) == file.digest
        left = [file.written for file in files if not file.made]
        try:
            for path in left if told else [folder] * bool(files):
                self.destination.remove(path)
        except DlmError:
            pass  # the sweep finds it

    def _clear_together(self, copies: Sequence[Copy]) -> None:
        """The folder that a sub-batch was taken to has only empty ones by now, or leftovers."""
        top = temp_path("b/")
        written = [copy.written for copy in copies if copy.written.startswith(top)]
        for folder in {"/".join(path.split("/")[: top.count("/") + 1]) for path in written}:
            try:
                self.destination.remove(folder)
            except DlmError:
                pass  # the sweep finds it

    @contextmanager
    def _turn(self, files: Sequence[File]) -> Iterator[Call | None]:
        """Held while tiny files are at work between near storages; gives what calls the process
        that does the work, if there is one."""
        if not self._is_tiny(files):
            yield None
            return
        may = self.beside and not held_back(self.source, self.destination)
        with self.turns.one(), PROCESSES.one() if may else nullcontext() as call:
            yield call

    def _is_tiny(self, files: Sequence[File]) -> bool:
        return self.near and all(file.size <= TINY for file in files)

    def _write_chunk(self, files: Sequence[File]) -> list[None]:
        if not self._is_tiny(files):
            for file in files:
                self._write(file)
            return []
        self._each_tiny(files, self._write_small, self._turn(files))
        return []

    def _each_tiny(
        self,
        files: Sequence[File],
        work: Callable[[File], None],
        turn: AbstractContextManager[Call | None],
    ) -> None:
        """``work`` on files one after the other, in one place; or have them copied in a turn that
        has a process for it."""
        try:
            # who waits for a place keeps no turn meanwhile
            with self.lane.places(False, max(file.size for file in files)), turn as call:
                if call is not None:
                    self._copy_beside(call, files)
                    return
                for file in files:
                    self._attempt(file, partial(work, file), Lane())
        except Interrupted:
            for file in files:
                file.error = file.error or interrupted(self.source)

    def _copy_beside(self, call: Call, files: Sequence[File]) -> None:
        """As ``_attempt`` of each of ``files``."""
        if self.stop.is_set():
            raise Interrupted
        if self.outage is not None:
            for file in files:
                file.error = self.outage
            return
        wanted = [(file.source, file.written, file.size, file.digest) for file in files]
        try:
            ended = call(copy_each, bare(self.source), bare(self.destination), wanted)
        except LostError:
            # how far it came is not known: the next try has other temporary names
            message = "the process that copied to it ended"
            lost = StorageUnavailableError(storage=self.destination.name, message=message)
            ended = [(lost, 0.0)] * len(files)
        for file, (error, seconds) in zip(files, ended, strict=True):
            self._ended(file, error, seconds)

    def _ended(self, file: File, error: DlmError | None, seconds: float) -> None:
        """Note how a file went that was written together with others."""
        file.seconds += seconds
        if error is not None:
            self._note(file, error)
            return
        file.made = True
        if self.progress is not None:
            self.progress(file.size)

    def _write(self, file: File) -> None:
        def work() -> None:
            if file.size <= SMALL:
                self._write_small(file)
                return
            if not self._copied_there(file):
                self._write_large(file)
            file.made = True

        self._attempt(file, work, self.lane)

    def _attempt(self, file: File, work: Callable[[], None], lane: Lane) -> None:
        """Do ``work`` with a place in ``lane``; what it raises is kept beside the file."""
        if self.outage is not None:
            file.error = self.outage
            return
        begun = time.monotonic()
        try:
            if self.stop.is_set():
                raise Interrupted
            with lane.places(False, file.size):
                work()
        except Interrupted:
            file.error = interrupted(self.source)
        except DlmError as error:
            self._note(file, error)
        file.seconds += time.monotonic() - begun

    def _note(self, file: File, error: DlmError) -> None:
        if isinstance(error, PayloadExistsError):
            self._adopt(file, error)
            return
        file.error = error
        if isinstance(error, StorageUnavailableError):
            self._look_for_outage()

    def _write_together(self, files: Sequence[File]) -> None:
        """Small files that the source gives, or the destination takes, many of at once."""
        given = self._read_together(files)
        if self.write_many is None:
            self._each_tiny(files, partial(self._write_small, given=given), nullcontext())
            return
        data: dict[str, bytes] = {}

        def read_in(file: File) -> None:
            data[file.written] = self._read(file, given)

        self._each_tiny(files, read_in, self.turns.one() if near(self.source) else nullcontext())
        read = [file for file in files if file.written in data]
        if not read:
            return
        begun = time.monotonic()
        try:
            with self.lane.places(False, SMALL):
                errors = together(self.write_many, [(f.written, data[f.written]) for f in read])
        except Interrupted:
            errors = [interrupted(self.source)] * len(read)
        each = (time.monotonic() - begun) / len(read)
        for file, error in zip(read, errors, strict=True):
            self._ended(file, error, each)

    def _read_together(self, files: Sequence[File]) -> dict[str, bytes]:
        """What the source gives in one request; anything amiss is told by reading one by one."""
        if self.read_many is None or self.outage is not None or self.stop.is_set():
            return {}
        try:
            with self.lane.places(False, SMALL):
                wanted = [(file.source, file.size) for file in files]
                return cast(dict[str, bytes], self.read_many(wanted, self.stop))
        except (DlmError, Interrupted):
            return {}

    def _read(self, file: File, given: Mapping[str, bytes]) -> bytes:
        data = given.get(file.source, b"")
        if len(data) == file.size and f"sha256:{sha256(data).hexdigest()}" == file.digest:
            return data
        return read_whole(self.source, file.source, file.size, file.digest)

    def _write_small(self, file: File, given: Mapping[str, bytes] = _NOTHING) -> None:
        data = self._read(file, given)
        if self.part_size is not None:
            file.etag = md5(data, usedforsecurity=False).hexdigest()
        self.destination.write(file.written, io.BytesIO(data), file.size)
        file.made = True
        if self.progress is not None:
            self.progress(len(data))

    def _write_large(self, file: File) -> None:
        if file.resumable:
            Resuming(self.source, self.destination, self.stop, self._watching(file)).write(file)
            return
        if self.write_in_parts is not None and file.size > self.resumed_above:
            write_in_parts(self.source, self.destination, file, self.stop, self._watching(file))
            return
        part = self.part_size(file.size) if self.part_size is not None else None
        # what is read back need not be hashed twice: if it is wrong, the source is looked at
        file.direct = not self.atomic
        digest = None if file.direct else file.digest
        with self.source.open_read(file.source) as stream:
            where = f"{self.source.name}:{file.source}"
            reader = HashingReader(
                stream, file.size, digest, where, part, self.stop, self._watching(file)
            )
            self.destination.write(file.written, reader, file.size)
        file.etag = reader.etag()

    def _copied_there(self, file: File) -> bool:
        """Whether the destination could copy the file by itself."""
        tell = self._watching(file)

        def moved(size: int) -> None:
            if self.stop.is_set():
                raise Interrupted
            tell(size)

        file.direct = self.copy_from is not None and self.copy_from(
            self.source, file.source, file.written, file.size, moved
        )
        return file.direct

    def _watching(self, file: File) -> Progress:
        def moved(size: int) -> None:
            self.lane.watch(file.operation_id, "copy", size)
            if self.progress is not None:
                self.progress(size)

        return moved

    def _watching_all(self, copies: Sequence[Copy]) -> Progress | None:
        """Of one payload it is known whose bytes they are."""
        if len(copies) == 1 and copies[0].files:
            return self._watching(copies[0].files[0])
        return self.progress

    def _look_for_outage(self) -> None:
        """One look at both ends tells an outage from one file's trouble; the rest need not try."""
        for storage in (self.source, self.destination) if self.outage is None else ():
            try:
                storage.check()
            except StorageUnavailableError as error:
                self.outage = error
            except DlmError:
                pass  # of another kind: each file's own error tells

    def _adopt(self, file: File, error: PayloadExistsError) -> None:
        """What an earlier try left complete is as good as a new copy; anything else stays."""
        try:
            seen = observe(self.destination, file.written, stop=self.stop)
        except DlmError as failure:
            file.error = of_destination(failure, file)
            return
        if self.stop.is_set():
            file.error = interrupted(self.destination)
        elif (seen.size, seen.digest) == (file.size, file.digest):
            file.proven = True
        else:
            file.error = error

    def _flush(self, files: Sequence[File]) -> None:
        if not any(file.made for file in files):
            return
        try:
            self.destination.flush()
        except DlmError as error:
            for file in files:
                file.error = file.error or error
