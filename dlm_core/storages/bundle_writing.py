"""Files of an index of bundles that appear whole, durable, and over nothing."""

from __future__ import annotations

import uuid
from contextlib import suppress
from hashlib import sha256
from io import BytesIO

from dlm_core.errors import PayloadExistsError, PayloadNotFoundError, StorageError
from dlm_core.storages.bundle_base import read_back
from dlm_core.storages.port import Storage, temp_path


def write_new(storage: Storage, path: str, data: bytes) -> None:
    """Write a small file so that it appears whole, durable, and over nothing.

    Raises
    ------
    PayloadExistsError
    """
    if getattr(storage, "atomic_write", False):
        storage.write(path, BytesIO(data), len(data))
        return
    written = temp_path(f"bundle/{uuid.uuid4().hex}")
    storage.write(written, BytesIO(data), len(data))
    try:
        storage.flush()  # else a name might outlive a crash that the bytes did not
        read_back(storage, written, sha256(data).digest())
        storage.rename(written, path)
    except BaseException:
        with suppress(StorageError):
            storage.remove(written)
        raise


def write_record(storage: Storage, path: str, data: bytes) -> None:
    """As :func:`write_new`, of a path that others want at the same moment, in other processes too.

    Where only a folder can be had once it is the folder of ``path`` that is renamed to its place.

    Raises
    ------
    PayloadExistsError
    """
    if getattr(storage, "exclusive", None) != "folder":
        write_new(storage, path, data)
        return
    written, (folder, _, name) = temp_path(f"bundle/{uuid.uuid4().hex}"), path.rpartition("/")
    digest = sha256(data).digest()
    try:
        storage.write(f"{written}/{name}", BytesIO(data), len(data))
        storage.flush()
        read_back(storage, f"{written}/{name}", digest)
        storage.rename(written, folder)
    except BaseException:
        with suppress(StorageError):
            storage.remove(written)
        raise
    with suppress(PayloadNotFoundError), storage.open_read(path) as stream:
        if sha256(stream.read(-1)).digest() == digest:
            return
    raise PayloadExistsError(storage=storage.name, path=path)
