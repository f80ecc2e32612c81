"""Look at a payload's bytes once: size, digest, kind of content; and know if it changed meanwhile."""

from __future__ import annotations

import mimetypes
import threading
from collections.abc import Iterable
from hashlib import sha256
from typing import BinaryIO

from dlm_core.errors import ChangedWhileReadError, PathRefusedError, PayloadNotFoundError
from dlm_core.storages.port import Entry, Storage
from dlm_core.types import ManifestEntry, Observation, PayloadKind, encode_path

_BLOCK = 1 << 20
_MAGIC = (
    (b"SIMPLE  =", "application/fits"),
    (b"\x89HDF\r\n\x1a\n", "application/x-hdf5"),
    (b"\x1f\x8b", "application/gzip"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"%PDF-", "application/pdf"),
    (b"CDF\x01", "application/x-netcdf"),
)


def observe(
    storage: Storage,
    path: str,
    kind: PayloadKind = PayloadKind.FILE,
    stop: threading.Event | None = None,
) -> Observation:
    """Read a whole payload once.

    A directory's size is the sum of its files', its digest that of its manifest. Symbolic links
    and special files in a directory payload are refused: a copy of them would not hold the bytes.
    When ``stop`` is set the reading ends early and what is returned must not be used.

    Raises
    ------
    PayloadNotFoundError, PathRefusedError, StorageUnavailableError, AccessDeniedError
    ChangedWhileReadError
        if size or time of change differ before and after.
    """
    if kind is PayloadKind.DIRECTORY:
        return _observe_directory(storage, path, stop)
    before = _must_be_file(storage, path)
    with storage.open_read(path) as stream:
        first, size, digest = _read(stream, stop)
    after = storage.stat(path)
    changed = after is None or (after.size, after.mtime, after.etag) != (
        before.size,
        before.mtime,
        before.etag,
    )
    if (changed or size != before.size) and not (stop and stop.is_set()):
        raise ChangedWhileReadError(f"{storage.name}:{path}")
    return Observation(size, digest, content_type(path, first))


def _must_be_file(storage: Storage, path: str) -> Entry:
    entry = storage.stat(path)
    if entry is None:
        raise PayloadNotFoundError(storage=storage.name, path=path)
    if entry.kind != "file":
        raise PathRefusedError(
            storage=storage.name, path=path, message=f"it is a {entry.kind}, not a file"
        )
    return entry


def _read(stream: BinaryIO, stop: threading.Event | None) -> tuple[bytes, int, str]:
    first = block = stream.read(_BLOCK)
    hasher, size = sha256(block), len(block)
    while block and not (stop is not None and stop.is_set()):
        block = stream.read(_BLOCK)
        hasher.update(block)
        size += len(block)
    return first[:16], size, f"sha256:{hasher.hexdigest()}"


def content_type(path: str, first: bytes) -> str:
    """Media type by the first bytes where they tell, else by the name."""
    for magic, name in _MAGIC:
        if first.startswith(magic):
            return name
    return mimetypes.guess_type(path, strict=False)[0] or "application/octet-stream"


def _observe_directory(storage: Storage, path: str, stop: threading.Event | None) -> Observation:
    entry = storage.stat(path)
    if entry is None:
        raise PayloadNotFoundError(storage=storage.name, path=path)
    if entry.kind != "directory":
        raise PathRefusedError(
            storage=storage.name, path=path, message=f"it is a {entry.kind}, not a directory"
        )
    names = [found.path for found in storage.walk(path)]
    manifest = []
    for name in names:
        if stop is not None and stop.is_set():
            break
        seen = observe(storage, name, PayloadKind.FILE, stop)
        manifest.append(ManifestEntry(name[len(path) + 1 :], seen.size, seen.digest))
    if [found.path for found in storage.walk(path)] != names:
        raise ChangedWhileReadError(f"{storage.name}:{path}")
    ordered = tuple(sorted(manifest, key=lambda one: one.path.encode("utf-8", "surrogateescape")))
    return Observation(
        sum(one.size for one in ordered),
        manifest_digest(ordered),
        "inode/directory",
        PayloadKind.DIRECTORY,
        ordered,
    )


def manifest_digest(entries: Iterable[ManifestEntry]) -> str:
    """Digest of a directory payload: sha256 over one line a file, in octet order of the paths.

    A line is ``<sha256 hex>  <size>  <path, percent-encoded>\\n``. Empty folders are not told.
    """
    hasher = sha256()
    for one in sorted(entries, key=lambda e: e.path.encode("utf-8", "surrogateescape")):
        line = f"{one.digest.removeprefix('sha256:')}  {one.size}  {encode_path(one.path)}\n"
        hasher.update(line.encode("ascii"))
    return f"sha256:{hasher.hexdigest()}"
