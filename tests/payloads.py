"""Bytes into a storage, and out of it."""

from __future__ import annotations

import io

from dlm_core.storages.port import Storage


def put(storage: Storage, path: str, data: bytes = b"payload") -> str | None:
    """Write a file; its etag."""
    return storage.write(path, io.BytesIO(data), len(data))


def get(storage: Storage, path: str) -> bytes:
    """A file, read."""
    with storage.open_read(path) as stream:
        return stream.read()


def contents(storage: Storage) -> dict[str, bytes]:
    """All that a storage lists, read."""
    return {entry.path: get(storage, entry.path) for entry in storage.walk()}
