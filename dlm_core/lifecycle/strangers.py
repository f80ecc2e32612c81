"""What lies in a replica's place and is not its bytes: somebody else's, and not ours to remove."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlm_core.errors import PathRefusedError
from dlm_core.lifecycle.quarantine import is_payload
from dlm_core.lifecycle.staging import is_cold
from dlm_core.storages.port import Entry, Storage
from dlm_core.types import PayloadKind, decode_path

Row = Mapping[str, Any]


def is_strangers(storage: Storage, path: str, row: Row) -> bool:
    """Whether the replica ``row`` has lost its place: where a file was, a folder may be made for
    other payloads, and who overwrites a file that was registered where it lies makes another of
    it, as does who works on one in a directory payload, whoever brought that there. What was
    touched and has its size is read; that costs something for few only.

    Raises
    ------
    PathRefusedError
        if other files lie in a directory payload: they would go with it.
    StorageError
        if the storage cannot tell.
    """
    entry = storage.stat(path)
    if entry is None:
        return False
    # what is on tape was staged only if a rename reads it, else it cannot be read now
    readable = not is_cold(storage) or getattr(storage, "renames_read", False)
    if row["kind"] == PayloadKind.DIRECTORY:
        if entry.kind == "directory":
            resized, touched = _worked_on(storage, path, row)
            return resized or (touched and readable and not is_payload(storage, path, row))
        return entry.kind == "file"
    if entry.kind != "file":
        return entry.kind == "directory"
    if row["mtime"] is None:
        return False  # a copy of ours, whatever a bad disk made of it
    if entry.size != row["size"]:
        return True
    return _is_touched(entry, row["mtime"]) and readable and not is_payload(storage, path, row)


def _worked_on(storage: Storage, path: str, row: Row) -> tuple[bool, bool]:
    """Whether files of a directory payload have other sizes than they had, which the row's
    ``manifest`` tells by name, and whether some were written to since they were read last."""
    known = {f"{path}/{decode_path(name)}": size for name, size in row["manifest"].items()}
    found = list(storage.walk(path))
    others = sorted(entry.path for entry in found if entry.path not in known)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise PathRefusedError(
            storage=storage.name, path=path,
            message=f"{others[0]!r}{more} in it is not of the payload: move away, then 'dlm retry'",
        )  # fmt: skip
    read = 0.0 if row["checked_at"] is None else row["checked_at"].timestamp()
    resized = any(entry.size != known[entry.path] for entry in found)
    return resized, any(entry.mtime > read for entry in found)


def _is_touched(entry: Entry, known: float) -> bool:
    """By the time of change that its registration saw."""
    # a member of a bundle may have lost its fraction
    whole = entry.mtime.is_integer() or known.is_integer()
    return int(entry.mtime) != int(known) if whole else entry.mtime != known
