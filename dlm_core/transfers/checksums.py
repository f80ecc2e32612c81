"""Look at a payload's bytes once: size, digest, kind of content; and notice if they change."""

from __future__ import annotations

import mimetypes
import re
import threading
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256

from dlm_core.errors import (
    ChangedWhileReadError,
    InvalidValueError,
    PathRefusedError,
    PayloadNotFoundError,
)
from dlm_core.storages.port import ReadStream, Storage
from dlm_core.types import ManifestEntry, Observation, PayloadKind, encode_path

_BLOCK = 1 << 20
_UNKNOWN = "application/octet-stream"
_MAGIC = {
    b"SIMPLE  =": "application/fits",
    b"\x89HDF\r\n\x1a\n": "application/x-hdf5",
    b"\x1f\x8b": "application/gzip",
    b"PK\x03\x04": "application/zip",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"%PDF-": "application/pdf",
    b"CDF\x01": "application/x-netcdf",
}
_ANY_MAGIC = tuple(_MAGIC)
_SUFFIXES = re.compile(r"(\.[^./]+){1,2}\Z")
_SUM_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")


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
    with storage.open_read(path) as stream:
        first, size, digest = _read(stream, stop)
        unchanged = size == stream.size and stream.stamp() == stream.opened
    if not unchanged and not (stop is not None and stop.is_set()):
        raise ChangedWhileReadError(f"{storage.name}:{path}")
    return Observation(size, digest, content_type(path, first))


def _read(stream: ReadStream, stop: threading.Event | None) -> tuple[bytes, int, str]:
    first = block = stream.read(min(_BLOCK, stream.size + 1))
    hasher, size = sha256(block), len(block)
    while block and not (stop is not None and stop.is_set()):
        block = stream.read(_BLOCK if stream.size > size else 1)
        hasher.update(block)
        size += len(block)
    return first[:16], size, f"sha256:{hasher.hexdigest()}"


def content_type(path: str, first: bytes) -> str:
    """Media type by the first bytes where they tell, else by the name."""
    if first.startswith(_ANY_MAGIC):
        return next(name for magic, name in _MAGIC.items() if first.startswith(magic))
    suffixes = _SUFFIXES.search(path)
    return _type_of(suffixes[0]) if suffixes else _UNKNOWN


@lru_cache(maxsize=1000)
def _type_of(suffixes: str) -> str:
    return mimetypes.guess_type(f"x{suffixes}", strict=False)[0] or _UNKNOWN


def _observe_directory(storage: Storage, path: str, stop: threading.Event | None) -> Observation:
    entry = storage.stat(path)
    if entry is None:
        raise PayloadNotFoundError(storage=storage.name, path=path)
    if entry.kind != "directory":
        raise PathRefusedError(
            storage=storage.name, path=path, message=f"it is a {entry.kind}, not a directory"
        )
    entries = list(storage.walk(path))
    if not entries:
        raise PathRefusedError(
            storage=storage.name, path=path, message="a directory without files holds no payload"
        )
    manifest = []
    for one in entries:
        if stop is not None and stop.is_set():
            break
        seen = observe(storage, one.path, PayloadKind.FILE, stop)
        manifest.append(ManifestEntry(one.path[len(path) + 1 :], seen.size, seen.digest))
    if list(storage.walk(path)) != entries:
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


def parse_checksums(text: str) -> dict[str, str]:
    """Digests by path from the format of sha256sum(1), its escapes for odd names included.

    Raises
    ------
    InvalidValueError
        naming the first line that is none, or tells another digest of a path than one before.
    """
    found: dict[str, str] = {}
    # at newlines only: names may have what else ends a line for Python
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            raise InvalidValueError(
                what=f"checksums, line {number}", value=line[:80], expected="'<sha256>  <path>'"
            )
        escaped, digest, path = match.groups()
        if escaped:
            path = re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], path)
        path, digest = path.removeprefix("./"), f"sha256:{digest.lower()}"
        if found.setdefault(path, digest) != digest:
            raise InvalidValueError(
                what=f"checksums, line {number}", value=path, expected="one digest of each path"
            )
    return found
