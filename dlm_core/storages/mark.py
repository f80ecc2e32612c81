"""The mark of a storage: its key in the catalogue, kept at its place."""

from __future__ import annotations

from dlm_core.errors import (
    PathRefusedError,
    PayloadNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.port import PRIVATE, Storage

MARK = f"{PRIVATE}/storage-id"
#: there is a mark, and nothing can be said of it before it is staged
OFFLINE = "offline"


def mark_of(storage: Storage) -> str | None:
    """What the mark at the place of ``storage`` says; None if there is none, OFFLINE if it is there
    and a stager does not say that it is online: nothing is recalled.

    Raises
    ------
    StorageError
        if it cannot be read.
    """
    if isinstance(storage, Bundled):
        storage = storage.inner  # it is in no bundle, and there while an index is to be made anew
    if not isinstance(storage, ColdStorage):
        return _read(storage)
    entry = storage.inner.stat(MARK)
    if entry is None or entry.kind != "file":
        return None
    # a stager that lies gives a stub, which may read as zeros
    mark = _read(storage.inner) if _is_online(storage) else OFFLINE
    return OFFLINE if mark is not None and not mark.strip("\0") else mark


def must_show_something(storage: Storage) -> None:
    """Refuse to conclude anything from what is not there where nothing is, not even the mark, as in
    the folder below a disk that is not mounted on its server.

    Raises
    ------
    StorageUnavailableError
    StorageError
        if it cannot tell.
    """
    if storage.stat(PRIVATE) is None and next(iter(storage.walk()), None) is None:
        message = (
            "nothing is there, not even its mark: is its disk mounted? In the place of one that is "
            f"lost, an empty one needs a folder {PRIVATE}"
        )
        raise StorageUnavailableError(storage=storage.name, message=message)


def _is_online(storage: ColdStorage) -> bool:
    try:
        return MARK in storage.look([MARK])
    except StorageError:
        return False  # the storage is there; only what brings its files online is not


def _read(storage: Storage) -> str | None:
    try:
        with storage.open_read(MARK) as stream:
            return stream.read(100).decode("ascii", "replace").strip()
    except (PayloadNotFoundError, PathRefusedError):
        return None
