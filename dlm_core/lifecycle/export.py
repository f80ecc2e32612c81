"""Let a storage carry a description of itself, from which a lost catalogue can be made again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import describe
from dlm_core.errors import InvalidValueError
from dlm_core.lifecycle.description import (
    FOLDER,
    SITE,
    File,
    Index,
    newest_index,
    publish,
    replace_damaged,
    write_index,
    write_lines,
)
from dlm_core.lifecycle.register import storage_by_name
from dlm_core.lifecycle.work import Context
from dlm_core.storages.port import Storage
from dlm_core.types import StorageMode

#: replicas in one file, about; files are split anew when they have four times as many
_LINES_WANTED = 5000
_LINES_MOST = 4 * _LINES_WANTED
_MOST_DIGITS = 4
_FILES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did: files written of how many, replicas described, bytes written."""

    storage: str
    generation: int
    written: int
    files: int
    replicas: int
    bytes: int
    removed: int


def export_storage(context: Context, name: str, *, full: bool = False) -> ExportReport:
    """Write what the catalogue knows of a storage onto it; only files of which something changed
    since the last time, unless ``full``.

    A crash at any point leaves the description before whole; what is left over is removed by the
    next export.

    Raises
    ------
    NotFoundError
    InvalidValueError
        if the DLM may not write to the storage now.
    ExportRunningError
        if somebody else exports it at this moment.
    PayloadExistsError
        if another DLM has exported it meanwhile.
    """
    row = storage_by_name(context, name)
    if not row["managed"] or row["mode"] not in (StorageMode.READ_WRITE, StorageMode.DRAINING):
        why = row["mode"] if row["managed"] else "not managed"
        raise InvalidValueError(
            what="storage", value=name, expected=f"one that may be written to; it is {why}"
        )
    storage = context.storages.open(row)
    storage.check()
    with describe.exporting(context.engine, context.actor, row["storage_id"], name):
        return _export(context, row, storage, full)


def _export(context: Context, row: Mapping[str, Any], storage: Storage, full: bool) -> ExportReport:
    before, _ = newest_index(storage)
    first = context.transact(describe.look_around)
    known = context.transact(lambda c: describe.load_progress(c, row["storage_id"]))
    count = context.transact(lambda c: describe.count_replicas(c, row["storage_id"]))
    trusted = None if full else _trusted(storage, before, known, first, count)
    digits = trusted.digits if trusted else _digits_for(count)
    # whatever ended before this moment is read below; nothing that ends later is taken for it
    around = context.transact(describe.look_around)
    prefixes = _prefixes(context, row, digits, known if trusted else None)
    kept = dict(trusted.files) if trusted else {}
    if trusted:
        prefixes |= _lost(storage, trusted)
    index = Index(
        generation=before.generation + 1 if before else 1,
        exported_at=context.clock().isoformat(),
        digits=digits,
        files=kept,
        **context.transact(lambda c: describe.describe_storage(c, row["storage_id"])),
    )
    written = _write_files(context, row, storage, index, sorted(prefixes))
    proof = _write_index(storage, index)
    progress = known if trusted and known else {**first, "low_seq": 0}
    context.transact(
        lambda c: describe.note_export(
            c, row["storage_id"], progress, around, (index.path, proof.digest), digits,
            context.clock(),
        )
    )  # fmt: skip
    keep = index.paths | (before.paths if before else set())
    removed = _remove_others(storage, keep)
    replicas = sum(file.lines for prefix, file in index.files.items() if prefix != SITE)
    size = sum(file.size for file in written)
    return ExportReport(
        row["name"], index.generation, len(written), len(index.files), replicas, size, removed
    )


def _trusted(
    storage: Storage,
    before: Index | None,
    known: Mapping[str, Any] | None,
    around: Mapping[str, Any],
    count: int,
) -> Index | None:
    """The index there, if it is the one that this catalogue wrote last, all events since are still
    in the log, and its files have not grown too large."""
    if before is None or known is None or known["index_path"] != before.path:
        return None
    with tempfile.TemporaryDirectory(prefix="dlm-export-") as folder:
        if write_index(Path(folder, "index"), before).digest != known["index_digest"]:
            return None
    if around["oldest_seq"] > known["low_seq"] + 1 or count > 16**before.digits * _LINES_MOST:
        return None
    return before


def _digits_for(count: int) -> int:
    """How many digits split ``count`` replicas into files of about the size wanted."""
    digits = 1
    while digits < _MOST_DIGITS and count > 16**digits * _LINES_WANTED:
        digits += 1
    return digits


def _prefixes(
    context: Context, row: Mapping[str, Any], digits: int, known: Mapping[str, Any] | None
) -> set[str]:
    """The files that are to be written: those with changes, or all if nothing is ``known``."""

    def look(connection: Connection) -> set[str]:
        if known is None:
            return describe.used_prefixes(connection, row["storage_id"], digits)
        return describe.changed_prefixes(connection, row["storage_id"], known)

    found: set[str] = context.transact(look)
    return found


def _lost(storage: Storage, index: Index) -> set[str]:
    """Files of ``index`` that are not there as large as they were."""
    paths = {prefix: file.path(prefix) for prefix, file in index.files.items()}
    entries = storage.stat_many(paths.values())
    found = {prefix: entries[path] for prefix, path in paths.items()}
    return {
        prefix
        for prefix, entry in found.items()
        if prefix != SITE and (entry is None or entry.size != index.files[prefix].size)
    }


def _write_files(
    context: Context,
    row: Mapping[str, Any],
    storage: Storage,
    index: Index,
    prefixes: Sequence[str],
) -> list[File]:
    """Write the files of ``prefixes`` and of the site; ``index`` then names them. Files that came
    out as they were are not counted."""
    before, written = dict(index.files), []
    for start in range(0, len(prefixes) + 1, _FILES_AT_ONCE):
        names = [*prefixes, SITE][start : start + _FILES_AT_ONCE]
        with tempfile.TemporaryDirectory(prefix="dlm-export-") as folder:
            made = {name: _describe(context, row, name, Path(folder)) for name in names}
            for name, file in made.items():
                index.files[name] = file
                if not file.lines and name != SITE:
                    del index.files[name]
            fresh = [(n, f.path(n), f) for n, f in made.items() if n in index.files]
            replace_damaged(storage, Path(folder), fresh)
        written += [file for name, _, file in fresh if before.get(name) != file]
    return written


def _describe(context: Context, row: Mapping[str, Any], name: str, folder: Path) -> File:
    def write(connection: Connection) -> File:
        if name == SITE:
            return write_lines(folder / name, describe.describe_site(connection))
        return write_lines(
            folder / name, describe.describe_prefix(connection, row["storage_id"], name)
        )

    made: File = context.transact(write)
    return made


def _write_index(storage: Storage, index: Index) -> File:
    with tempfile.TemporaryDirectory(prefix="dlm-export-") as folder:
        file = write_index(Path(folder, "index"), index)
        publish(storage, Path(folder), [("index", index.path, file)])
    return file


def _remove_others(storage: Storage, keep: Collection[str]) -> int:
    """Remove what neither this generation nor the one before names; how many files."""
    others = [entry.path for entry in storage.walk(FOLDER) if entry.path not in keep]
    for path in others:
        storage.remove(path)
    return len(others)


def export_due(context: Context, every: timedelta) -> Iterator[Callable[[], ExportReport]]:
    """An export for each storage whose newest one is older than ``every``, to be called one by one:
    one that fails does not keep the others from theirs."""
    before = context.clock() - every
    for name in context.transact(lambda c: describe.exports_due(c, before)):
        yield partial(export_storage, context, name)
