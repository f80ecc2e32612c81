"""The words of the DLM as types; the same words stand in SQL, CLI, REST and docs."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha1
from typing import Any
from urllib.parse import quote, unquote

import uuid_utils

from dlm_core.errors import InvalidValueError


class ItemState(StrEnum):
    INITIALISED = "INITIALISED"
    READY = "READY"
    CORRUPTED = "CORRUPTED"
    EXPIRED = "EXPIRED"
    DELETED = "DELETED"


class ReplicaState(StrEnum):
    PENDING = "PENDING"
    READY = "READY"
    SUSPECT = "SUSPECT"
    CORRUPTED = "CORRUPTED"
    MISSING = "MISSING"
    TRASHED = "TRASHED"
    DELETED = "DELETED"


class Phase(StrEnum):
    """Resilience class; :attr:`weight` is what one storage of the class gives an item."""

    PLASMA = "PLASMA"
    GAS = "GAS"
    LIQUID = "LIQUID"
    SOLID = "SOLID"

    @property
    def weight(self) -> int:
        return {"PLASMA": 0, "GAS": 1, "LIQUID": 2, "SOLID": 4}[self.value]

    @classmethod
    def from_weight(cls, weight: int) -> Phase:
        """The phase reached by a sum of weights: 4 and more is SOLID, 2 LIQUID, 1 GAS."""
        for phase in (cls.SOLID, cls.LIQUID, cls.GAS):
            if weight >= phase.weight:
                return phase
        return cls.PLASMA


class Interface(StrEnum):
    POSIX = "posix"
    S3 = "s3"


class StorageClass(StrEnum):
    DISK = "disk"
    OBJECT = "object"
    TAPE = "tape"


class StorageMode(StrEnum):
    READ_WRITE = "read_write"
    READ_ONLY = "read_only"
    DRAINING = "draining"
    OFFLINE = "offline"
    LOST = "lost"
    AUDITING = "auditing"
    RETIRED = "retired"


class OperationKind(StrEnum):
    ADMIT = "admit"
    COPY = "copy"
    VERIFY = "verify"
    TRASH = "trash"
    PURGE = "purge"
    RESTORE = "restore"
    STAGE = "stage"


class OperationState(StrEnum):
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class PayloadKind(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One file of a directory payload; ``path`` is relative to the payload, ``/``-separated."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen when a whole payload was read once.

    ``size`` in bytes, ``digest`` as ``sha256:<hex>``; for a directory the digest is that of its
    manifest (see :func:`dlm_core.transfers.checksums.manifest_digest`).
    """

    size: int
    digest: str
    content_type: str = "application/octet-stream"
    kind: PayloadKind = PayloadKind.FILE
    manifest: tuple[ManifestEntry, ...] = field(default=())
    #: MD5 of the bytes (hex), kept only where an ETag is to be compared
    md5: str | None = None


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): ordered by the time it was made."""
    return uuid.UUID(int=uuid_utils.uuid7().int)


def new_key() -> bytes:
    """The 16 bytes of a UUIDv7, for rows that are made in bulk: an object for each key would cost
    three times as much."""
    return uuid_utils.uuid7().int.to_bytes(16, "big")


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
# RFC 3986 pchar without the percent sign: what may stand unescaped in a path segment
_SAFE = "!$&'()*+,;=:@-._~/"


def make_uri(scheme: str, path: str | bytes) -> str:
    """The uri of a relative path, percent-encoded as RFC 3986 wants.

    Bytes that are no UTF-8 (surrogate escapes in a ``str``) are told by their octets, so any file
    name that POSIX allows has exactly one uri.

    Raises
    ------
    InvalidValueError
        if the scheme is none, or the path is empty, absolute or leaves its root.
    """
    if not _SCHEME.match(scheme):
        raise InvalidValueError(
            what="scheme", value=scheme, expected="a lower-case RFC 3986 scheme such as 'ska'"
        )
    return f"{scheme}:{encode_path(path)}"


def encode_path(path: str | bytes) -> str:
    """A relative path percent-encoded, the form in which the catalogue keeps replica paths.

    PostgreSQL's text holds no octets that are no UTF-8, POSIX names do.
    """
    try:
        raw = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidValueError(what="path", value=path, expected="UTF-8, or octets") from None
    parts = raw.split(b"/")
    if not raw or any(part in (b"", b".", b"..") for part in parts) or b"\0" in raw:
        raise InvalidValueError(
            what="path", value=path, expected="a relative path without '.', '..' or empty segments"
        )
    return quote(raw, safe=_SAFE)


def decode_path(encoded: str) -> str:
    """The path as adapters take it, from the catalogue's form (see :func:`encode_path`)."""
    return unquote(encoded, encoding="utf-8", errors="surrogateescape")


def uri_path(uri: str) -> str:
    """The relative path a uri tells (surrogate escapes for octets that are no UTF-8).

    Raises
    ------
    InvalidValueError
        if ``uri`` is not in the one form that :func:`make_uri` gives.
    """
    # programs give what is no text at all
    scheme, colon, rest = uri.partition(":") if isinstance(uri, str) else ("", "", "")
    path = decode_path(rest)
    if not colon or make_uri(scheme, path) != uri:
        raise InvalidValueError(
            what="uri", value=uri, expected="scheme:relative/path, percent-encoded (RFC 3986)"
        )
    return path


def uri_bucket(uri: str) -> str:
    """First five hex digits of sha-1(uri), for splitting work and comparing sites."""
    return sha1(uri.encode(), usedforsecurity=False).hexdigest()[:5]


def check_json(what: str, value: Mapping[str, Any]) -> None:
    """Tell what is no JSON object of PostgreSQL's before it gets there.

    Raises
    ------
    InvalidValueError
    """
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError(
            what=what, value=str(error), expected="a mapping that JSON can tell"
        ) from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise InvalidValueError(what=what, value="a NUL", expected="text without it")
