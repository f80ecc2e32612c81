"""What is to be copied, how it ended, and files on their way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from dlm_core.errors import DlmError, PayloadNotFoundError, StorageUnavailableError
from dlm_core.storages.port import Storage
from dlm_core.transfers.beside import Call
from dlm_core.types import ManifestEntry, PayloadKind

#: files up to this size are read whole: one read, one hash, one write
SMALL = 1 << 20
#: small files that are read or written in one call, where a storage has one
TOGETHER, FEW = 64, 16
_TOGETHER_BYTES = 4 << 20
_SUB_BATCH_FILES = 512
_SUB_BATCH_BYTES = 256 << 20
# the first one is smaller: what comes through soon tells that others may be claimed beside it, and
# sub-batches of several lengths do not all wait for the medium at the same time
_FIRST_FILES = 128
#: sub-batches at work at a time: one is written while another is flushed and verified
AT_ONCE = 2
# and one that waits for them
_TAKEN_UP = AT_ONCE + 1


@dataclass(frozen=True, slots=True)
class CopyTask:
    """One payload to copy. ``size`` in bytes and ``digest`` are what the catalogue says; ``token``
    names the temporary file and is unique for every try; ``partial`` is the temporary file that an
    earlier try left, and whose writer has ended."""

    operation_id: uuid.UUID
    source_path: str
    destination_path: str
    kind: PayloadKind
    size: int
    digest: str
    manifest: tuple[ManifestEntry, ...]
    token: str
    partial: str | None = None


@dataclass(frozen=True, slots=True)
class CopyResult:
    """How a task ended: ``error`` None means a verified, visible copy. ``seconds`` of work.
    ``partial`` is a temporary file from which the next try may go on."""

    task: CopyTask
    error: DlmError | None
    seconds: float
    partial: str | None = None
    #: it did not fail: it was asked to stop
    stopped: bool = False


@dataclass(slots=True)
class File:
    """One file on its way; a directory payload has several."""

    operation_id: uuid.UUID
    source: str
    #: where it is written first, and where it becomes visible
    written: str
    final: str
    size: int
    digest: str
    #: the ETag that an object store gives these bytes
    etag: str = ""
    #: it was copied without a look at its bytes: who is to blame for other ones is not known
    direct: bool = False
    #: where an earlier try left the first bytes
    partial: str | None = None
    #: another try may go on from what this one leaves
    resumable: bool = False
    #: this try left the first bytes
    kept: bool = False
    #: this try made it
    made: bool = False
    #: the bytes at the destination have been compared
    proven: bool = False
    error: DlmError | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Copy:
    """One payload on its way."""

    task: CopyTask
    written: str
    files: list[File] = field(default_factory=list)
    error: DlmError | None = None

    def kept(self) -> bool:
        """Whether the next try may go on from what was written."""
        return any(file.kept and file.error is not None for file in self.files)

    def first_error(self) -> DlmError | None:
        if self.error is not None:
            return self.error
        # asked several times of each file: no generator
        for file in self.files:
            if file.error is not None:
                return file.error
        return None


#: held while some files are at work; gives what calls a process that does it, if there is one
Turn = Callable[[Sequence[File]], AbstractContextManager[Call | None]]


def _anywhere(_: bool, __: int) -> AbstractContextManager[None]:
    return nullcontext()


def _unseen(_: uuid.UUID, __: str, ___: int) -> None:
    pass


def _unlimited() -> bool:
    return False


def _ours(_: uuid.UUID, storage: Storage) -> AbstractContextManager[Storage | None]:
    return nullcontext(storage)


@dataclass(frozen=True, slots=True)
class Lane:
    """The limits that a copy keeps besides its bytes' pace, and who watches it; by default none.

    ``places(back, size)`` is held while a file of ``size`` bytes is copied, or while it and others
    are read back (``back``).
    ``limited()`` says whether files at once are limited now: then none go in one request.
    ``watch(operation_id, step, size)`` is told of bytes of files that are not small, by block;
    ``step`` is copy or check.
    ``taking_back(operation_id, storage)`` is held while what a try made under its final name is
    removed from what it gives; it gives None to who has lost the operation: others may have found
    these files there, and made them theirs.
    """

    places: Callable[[bool, int], AbstractContextManager[None]] = _anywhere
    watch: Callable[[uuid.UUID, str, int], None] = _unseen
    taking_back: Callable[[uuid.UUID, Storage], AbstractContextManager[Storage | None]] = _ours
    limited: Callable[[], bool] = _unlimited


def sub_batches(tasks: Sequence[CopyTask]) -> Iterator[list[CopyTask]]:
    """In order, few enough at once to be flushed and verified together."""
    batch: list[CopyTask] = []
    size = files = 0
    most = _FIRST_FILES
    for task in tasks:
        more = len(task.manifest) or 1
        if batch and (files + more > most or size + task.size > _SUB_BATCH_BYTES):
            yield batch
            batch, size, files = [], 0, 0
            most = min(2 * most, _SUB_BATCH_FILES)
        batch.append(task)
        size += task.size
        files += more
    if batch:
        yield batch


def last_at_work(tasks: Sequence[CopyTask]) -> int:
    """How many tasks are left, or nearly so, when the last of them are at work."""
    left = size = files = 0
    for task in reversed(tasks):
        size, files = size + task.size, files + (len(task.manifest) or 1)
        if files > _TAKEN_UP * _SUB_BATCH_FILES or size > _TAKEN_UP * _SUB_BATCH_BYTES:
            break
        left += 1
    return left


def interrupted(storage: Storage) -> DlmError:
    """What is said of a file whose copying was stopped."""
    return StorageUnavailableError(storage=storage.name, message="interrupted")


def can_be_listed(task: CopyTask) -> bool:
    """Whether all names stand for themselves in a list with one name a line."""
    names = [task.source_path, *(one.path for one in task.manifest)]
    return all(name.isprintable() and "\\" not in name for name in names)


def groups(files: Sequence[File], most: int = TOGETHER) -> Iterator[list[File]]:
    """In order, ``most`` at once and few enough to be held in memory by every thread."""
    group: list[File] = []
    size = 0
    for file in files:
        if group and (len(group) == most or size + file.size > _TOGETHER_BYTES):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield group


def of_destination(error: DlmError, file: File) -> DlmError:
    """ "Not found" is said of sources only: the catalogue would suspect a good one."""
    if isinstance(error, PayloadNotFoundError):
        storage = error.details["storage"]
        return StorageUnavailableError(
            storage=storage, message=f"{file.final} went while it was looked at"
        )
    return error
