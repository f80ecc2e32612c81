"""The mark of a storage: its key in the catalogue, kept at its place."""

from __future__ import annotations

from dlm_core.errors import PathRefusedError, PayloadNotFoundError
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.port import PRIVATE, Storage

MARK = f"{PRIVATE}/storage-id"


def mark_of(storage: Storage) -> str | None:
    """What the mark at the place of ``storage`` says; None if there is none.

    Raises
    ------
    StorageError
        if it cannot be read.
    """
    if isinstance(storage, Bundled):
        storage = storage.inner  # it is in no bundle, and there while an index is to be made anew
    try:
        with storage.open_read(MARK) as stream:
            return stream.read(100).decode("ascii", "replace").strip()
    except (PayloadNotFoundError, PathRefusedError):
        return None
