"""Show the copies of a sub-batch that were proven, and clear away what the others left."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from unicodedata import normalize

from dlm_core.errors import (
    DestinationDamagedError,
    DlmError,
    PathRefusedError,
    PayloadExistsError,
)
from dlm_core.storages.port import Storage, remove_file
from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers.beside import Call, LostError
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.pooled import in_chunks, together
from dlm_core.transfers.tasks import (
    Copy,
    CopyResult,
    Lane,
    Turn,
    interrupted,
    of_destination,
)
from dlm_core.transfers.throttle import bare
from dlm_core.types import PayloadKind


class Publisher:
    """Renames what was written under temporary names; on an object store all is visible already.

    Parameters
    ----------
    near : no network protocol of ours is between us and the destination.
    turn : held while some copies are renamed; may give what calls a process that does it.
    """

    def __init__(
        self, destination: Storage, near: bool, stop: threading.Event, lane: Lane, turn: Turn
    ) -> None:
        self.destination, self.near = destination, near
        self.stop, self.lane, self._turn = stop, lane, turn
        self.atomic = bool(getattr(destination, "atomic_write", False))
        self.rename_many = getattr(destination, "rename_many", None)

    def publish(self, copies: Sequence[Copy], pool: ThreadPoolExecutor) -> list[CopyResult]:
        # far away all of them in one request, near by few at a time
        far = {} if self.near else self._rename_together(copies)

        def settle(some: Sequence[Copy]) -> list[CopyResult]:
            with self._turn([]) as call:
                renamed = self._rename_together(some, call) if self.near else far
                return [self._settle(copy, renamed) for copy in some]

        if self.atomic and all(copy.task.kind is PayloadKind.FILE for copy in copies):
            return settle(copies)  # what is whole is visible: nothing to wait for the pool for
        return in_chunks(pool, settle, copies)

    def _rename_together(
        self, copies: Sequence[Copy], call: Call | None = None
    ) -> dict[str, DlmError | None]:
        """How the renaming of each verified copy ended, by temporary name; or nothing."""
        if self.rename_many is None:
            return {}
        good = [copy for copy in copies if copy.first_error() is None]
        pairs = [(copy.written, copy.task.destination_path) for copy in good]
        renaming = self.rename_many
        if call is not None:
            renaming = partial(call, PosixStorage.rename_many, bare(self.destination))
        try:
            errors = together(renaming, pairs)
        except LostError:
            errors = together(self.rename_many, pairs)
        return {copy.written: error for copy, error in zip(good, errors, strict=True)}

    def _settle(self, copy: Copy, renamed: Mapping[str, DlmError | None]) -> CopyResult:
        error = copy.first_error()
        if error is None:
            error = self._look_for_strangers(copy) if self.atomic else self._reveal(copy, renamed)
        if error is not None:
            self._clear(copy, error)
        kept = copy.written if copy.kept() else None
        return CopyResult(copy.task, error, sum(file.seconds for file in copy.files), kept)

    def _reveal(self, copy: Copy, renamed: Mapping[str, DlmError | None]) -> DlmError | None:
        try:
            if (failure := renamed.get(copy.written)) is not None:
                raise failure
            if copy.written not in renamed:
                self.destination.rename(copy.written, copy.task.destination_path)
        except PayloadExistsError as error:
            return self._same_already(copy, error)
        except DlmError as error:
            return of_destination(error, copy.files[0])
        return None

    def _same_already(self, copy: Copy, error: DlmError) -> DlmError | None:
        task = copy.task
        try:
            seen = observe(self.destination, task.destination_path, task.kind, self.stop)
            if self.stop.is_set():
                return interrupted(self.destination)
            if (seen.size, seen.digest) != (task.size, task.digest):
                return error
            if self._has_other_names(task.destination_path):
                return error  # of another item with the same bytes, maybe
            self.destination.remove(copy.written)
        except PathRefusedError:
            return error  # something of another kind
        except DlmError as failure:
            return of_destination(failure, copy.files[0])
        return None

    def _has_other_names(self, path: str) -> bool:
        """Whether what is there is told of under another spelling too: the storage takes upper and
        lower case for one, or forms of Unicode, so that what has this name may be called otherwise.
        """
        folder, slash, name = path.rpartition("/")
        spellings = {path.swapcase(), f"{folder}{slash}{name.swapcase()}"}
        spellings |= {normalize(form, path) for form in ("NFC", "NFD")}
        for spelling in spellings - {path}:
            with suppress(PathRefusedError):
                if self.destination.stat(spelling) is not None:
                    return True
        return False

    def _look_for_strangers(self, copy: Copy) -> DlmError | None:
        """On an object store a directory is what begins with its name: nothing else may."""
        if copy.task.kind is PayloadKind.FILE:
            return None
        mine = {file.written for file in copy.files}
        try:
            for entry in self.destination.walk(copy.written):
                if entry.path not in mine:
                    return PayloadExistsError(storage=self.destination.name, path=entry.path)
        except DlmError as error:
            return of_destination(error, copy.files[0])
        return None

    def make_names_durable(self, results: list[CopyResult]) -> list[CopyResult]:
        if not any(result.error is None for result in results):
            return results
        try:
            self.destination.flush()
        except DlmError as error:
            return [replace(result, error=result.error or error) for result in results]
        return results

    def _clear(self, copy: Copy, error: DlmError) -> None:
        """Take back what was written by this try, and only that."""
        if copy.kept():
            return
        try:
            if not self.atomic:
                self.destination.remove(copy.written)
                return
            # after an outage the next try adopts the files that came through
            made = [
                file.written
                for file in copy.files
                if file.made
                and (isinstance(file.error, DestinationDamagedError) or not error.retryable)
            ]
            if made:
                with self.lane.taking_back(copy.task.operation_id, self.destination) as storage:
                    if storage is None:
                        return
                    for path in made:
                        remove_file(storage, path)
        except DlmError:
            pass  # the sweep finds it; the task's own error is the one to tell
