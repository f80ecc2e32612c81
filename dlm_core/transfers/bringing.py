"""Have other people's movers bring the files of a sub-batch, and prove what they brought.

A mover writes to names that are used for nothing else. What lies there is made durable, listed,
and compared with the catalogue's digests; a payload that is whole and alone under its name goes on
to be renamed. All else is cleared and copied by our own way, under other names: a mover that is
still at work, against its contract, spoils nothing of ours.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dlm_core.errors import DlmError
from dlm_core.storages.port import Storage, temp_path
from dlm_core.transfers.plugged import Brought, Mover, in_one_line, log, suitable
from dlm_core.transfers.pooled import in_chunks
from dlm_core.transfers.proving import Prover
from dlm_core.transfers.reading import Interrupted, Progress
from dlm_core.transfers.tasks import Copy, File, Lane, can_be_listed
from dlm_core.transfers.throttle import bare, held_back

#: size by path, None for what is no file
_Listing = Mapping[str, int | None]


class Bringing:
    """The mover of a link, at work for its sub-batches."""

    def __init__(
        self,
        mover: Mover,
        source: Storage,
        destination: Storage,
        prover: Prover,
        stop: threading.Event,
        lane: Lane,
    ) -> None:
        self._mover, self._source, self._destination = mover, source, destination
        self._prover, self._stop, self._lane = prover, stop, lane

    def may(self) -> bool:
        """Whether nothing is limited that it could not keep to; asked anew for each sub-batch."""
        return not self._lane.limited() and not held_back(self._source, self._destination)

    def bring(
        self, copies: Sequence[Copy], pool: ThreadPoolExecutor, progress: Progress | None
    ) -> None:
        """Copies that came through have the files that were brought, made and proven; the others
        are as they were."""
        folder = temp_path(f"b/{uuid.uuid4().hex}")
        # names that no list of names could hold, and what an earlier try began, go our own way
        tries = {
            f"{folder}/{n}": copy
            for n, copy in enumerate(copies)
            if copy.error is None and can_be_listed(copy.task) and not copy.task.partial
        }
        if not tries or self._stop.is_set():
            return
        files = {name: _files_below(name, copy) for name, copy in tries.items()}
        begun = time.monotonic()
        self._call([file for some in files.values() for file in some], progress)
        whole = self._whole(folder, files)
        checked = [file for name in whole for file in files[name]]
        self._prover.ask_for_digests(checked)
        unproven = [file for file in checked if not file.proven]
        in_chunks(pool, self._prover.read_back, unproven, self._prover.opened_ahead)
        each = (time.monotonic() - begun) / sum(map(len, files.values()))
        taken = [name for name in whole if not any(file.error for file in files[name])]
        for name, copy in tries.items():
            if name in taken:
                copy.written, copy.files = name, files[name]
            for file in copy.files:
                file.seconds = each
                file.made = file.proven = name in taken
        self._clear(folder, [name for name in tries if name not in taken] if taken else [folder])

    def _call(self, files: Sequence[File], progress: Progress | None) -> None:
        wanted = [Brought(file.source, file.written, file.size) for file in files]
        try:
            with self._lane.places(False, max(file.size for file in files)):
                self._mover.bring(
                    bare(self._source), bare(self._destination), wanted, self._stop, progress
                )
        except Interrupted:
            pass  # there was no place for it
        except Exception as error:  # noqa: BLE001 - whatever others' code raises
            log.warning(
                "mover %s failed from %s to %s, what is missing is copied without it: %s",
                self._mover.name, self._source.name, self._destination.name, in_one_line(error),
            )  # fmt: skip

    def _whole(self, folder: str, files: Mapping[str, Sequence[File]]) -> list[str]:
        """The names under which there are all files, of the right size, and nothing else: a
        stranger in a directory would become visible with it."""
        try:
            self._destination.flush()
            found: dict[str, dict[str, int | None]] = defaultdict(dict)
            for entry in self._destination.walk(folder):
                name = "/".join(entry.path.split("/")[: folder.count("/") + 2])
                found[name][entry.path] = entry.size if entry.kind == "file" else None
        except DlmError:
            return []  # nothing came, or what came cannot be seen: our own way tells
        whole = [name for name, some in files.items() if found.get(name) == _wanted(some)]
        for name in whole:
            for file in files[name]:
                file.made = True
        return whole

    def _clear(self, folder: str, names: Sequence[str]) -> None:
        try:
            for name in names:
                self._destination.remove(name)
        except DlmError:
            pass  # the sweep finds it


def bringing(
    source: Storage, destination: Storage, prover: Prover, stop: threading.Event, lane: Lane
) -> Bringing | None:
    """None unless a mover suits these two, and nothing is visible at the destination before it is
    renamed: an object store has no temporary names."""
    if getattr(destination, "atomic_write", False):
        return None
    mover = suitable(bare(source), bare(destination))
    if mover is None:
        return None
    return Bringing(mover, source, destination, prover, stop, lane)


def _files_below(name: str, copy: Copy) -> list[File]:
    """The files of ``copy`` as they are tried under another name."""
    return [
        replace(file, written=name + file.written[len(copy.written) :], resumable=False)
        for file in copy.files
    ]


def _wanted(files: Sequence[File]) -> _Listing:
    return {file.written: file.size for file in files}
