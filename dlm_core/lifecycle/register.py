"""Registration: announce payloads where they lie, at the speed of the walk.

Announcing makes INITIALISED items with PENDING replicas and queues their admission
(:mod:`dlm_core.lifecycle.admit`), which reads the bytes.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import items as catalogue
from dlm_core.catalogue.checks import hasten_looks
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.items import Announcement, Terms
from dlm_core.catalogue.replicas import manifests_of
from dlm_core.catalogue.versions import add_version
from dlm_core.errors import (
    OF_DATA,
    DigestConflictError,
    DlmError,
    EmptySelectorError,
    InvalidValueError,
    NotFoundError,
    PayloadNotFoundError,
)
from dlm_core.lifecycle.sums import Sums
from dlm_core.lifecycle.survivors import doubt
from dlm_core.lifecycle.work import Context
from dlm_core.storages.port import PRIVATE, Entry, Storage
from dlm_core.storages.prefetch import Prefetched
from dlm_core.transfers.checksums import observe
from dlm_core.types import (
    ItemState,
    PayloadKind,
    ReplicaState,
    decode_path,
    encode_path,
    make_uri,
    new_id,
)

#: payloads announced by one transaction: few at first, so that they can be admitted while the rest
#: is looked for
_FIRST_CHUNK, _CHUNK = 125, 10_000
_DEFAULT_TERMS = Terms()
_MAX_TOLD = 1000
#: bytes; the catalogue keeps fewer of one payload
_LARGEST = 1 << 53
#: who changed a payload may put it right, or register it as a new version, before it is set aside
_TIME_TO_MEND = timedelta(hours=1)
_READ = (ReplicaState.READY, ReplicaState.SUSPECT, ReplicaState.CORRUPTED)
_GOING = "version {} is EXPIRED and going: 'dlm restore' keeps it; once gone, use --new-version"
_OTHER_BYTES = "it had other bytes when it was registered again"
_NO_PAYLOAD = {
    "directory": "a directory is registered by its files, or as a whole by --as-directory",
    "symlink": "a symbolic link is not registered",
}


@dataclass(slots=True)
class RegisterReport:
    """What a registration did: numbers, and what was refused with its reason (the first 1000)."""

    created: int = 0
    replicated: int = 0
    unchanged: int = 0
    new_versions: int = 0
    refused: int = 0
    skipped: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    # the walk goes on in a thread of its own
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def refuse(self, what: str, why: str) -> None:
        """Count something that was not registered though it was asked for."""
        with self._lock:
            self.refused += 1
            self._tell(what, why)

    def skip(self, what: str, why: str) -> None:
        """Count something that is no payload."""
        with self._lock:
            self.skipped += 1
            self._tell(what, why)

    def _tell(self, what: str, why: str) -> None:
        if len(self.reasons) < _MAX_TOLD:
            self.reasons.append((what, why))


@dataclass(frozen=True, slots=True)
class Source:
    """How paths on a storage become items: ``scheme:prefix + path``.

    Raises
    ------
    EmptySelectorError, InvalidValueError
        a pattern of ``as_directory`` is empty, or begins or ends with ``/``: it would match
        nothing, and each file of a directory payload be an item.
    """

    storage: str
    scheme: str = "file"
    uri_prefix: str = ""
    as_directory: Sequence[str] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)
    new_version: bool = False
    terms: Terms = field(default_factory=Terms)

    def __post_init__(self) -> None:
        for pattern in self.as_directory:
            if not pattern.strip():
                raise EmptySelectorError(expected="a pattern of folders such as '*.ms'")
            if pattern != pattern.strip("/"):
                raise InvalidValueError(
                    what="pattern of folders", value=pattern, expected="no '/' at its ends"
                )


def storage_by_name(context: Context, name: str) -> Mapping[str, Any]:
    """A storage's row.

    Raises
    ------
    NotFoundError
    """
    for row in context.transact(context.storages.load).values():
        if row["name"] == name:
            return row
    raise NotFoundError("storage", name, "see 'dlm storage list'")


def collection_id(context: Context, name: str) -> uuid.UUID:
    """The collection of a name, made if there is none yet.

    Raises
    ------
    InvalidValueError
        if the name is empty or does not fit on a line.
    """
    if not name.strip() or not name.isprintable():
        raise InvalidValueError(what="collection", value=name, expected="a name on one line")

    def find(connection: Connection) -> uuid.UUID:
        run(
            connection,
            "INSERT INTO collection (collection_id, name) VALUES (:id, :name) "
            "ON CONFLICT (name) DO NOTHING",
            id=new_id(),
            name=name,
        )
        found = rows(
            connection, "SELECT collection_id FROM collection WHERE name = :name", name=name
        )
        return found[0]["collection_id"]

    return context.transact(find)


def register_tree(
    context: Context,
    source: Source,
    path: str = "",
    progress: Callable[[RegisterReport], None] | None = None,
) -> RegisterReport:
    """Announce every file below ``path`` of a storage (and directories that match
    ``as_directory`` as one payload each). Memory stays bounded; registering again changes nothing.

    Raises
    ------
    NotFoundError
        no such storage, or no such collection as ``source.terms`` say.
    IllegalTransitionError
        it is offline, auditing, lost or retired (by now).
    InvalidValueError
        ``path`` itself is a link, which is registered where it leads to, or no file at all.
    PayloadNotFoundError, StorageUnavailableError, AccessDeniedError
        what the walk meets; chunks announced before stay announced.
    """
    row, storage = _open(context, source)
    report, top = RegisterReport(), path
    if path:
        entry = storage.stat(path)
        if entry is None:
            raise PayloadNotFoundError(storage=storage.name, path=path)
        if entry.kind not in ("file", "directory"):
            expected = f"a file or a folder, not a {entry.kind}"
            raise InvalidValueError(what="path", value=path, expected=expected)
        if entry.kind != "directory":
            top = path.rpartition("/")[0]
        entries: Iterable[Entry] = storage.walk(path) if entry.kind == "directory" else [entry]
        if entry.kind == "directory" and _matches(path, source.as_directory):
            entries = [entry]
    else:
        entries = storage.walk()
    payloads = _payloads(entries, source.as_directory, report)
    return _announce(context, source, row, storage, payloads, report, progress, top)


def register_list(
    context: Context,
    source: Source,
    paths: Iterable[str],
    progress: Callable[[RegisterReport], None] | None = None,
) -> RegisterReport:
    """Announce the payloads at ``paths`` of a storage; what is none, or not there, is refused.

    Raises
    ------
    NotFoundError, IllegalTransitionError, StorageUnavailableError, AccessDeniedError
        as :func:`register_tree` raises.
    """
    row, storage = _open(context, source)
    report = RegisterReport()

    def look() -> Iterator[Entry]:
        for path in paths:
            try:
                entry = storage.stat(path)
            except DlmError as error:
                report.refuse(path, str(error))
                continue
            if entry is None:
                report.refuse(path, str(PayloadNotFoundError(storage=storage.name, path=path)))
            elif entry.kind == "file" or directory_above(entry, source.as_directory) is not None:
                yield entry
            else:  # asked for by its name
                report.refuse(path, _no_payload(entry))

    payloads = _payloads(look(), source.as_directory, report)
    return _announce(context, source, row, storage, payloads, report, progress)


def _open(context: Context, source: Source) -> tuple[Mapping[str, Any], Storage]:
    """The row and the adapter of a source that can be read now."""
    source.terms.check(context.clock())
    row = storage_by_name(context, source.storage)
    catalogue.must_be_read(row)
    context.transact(lambda c: catalogue.must_have_collection(c, source.terms.collection_id))
    storage = context.storages.open(row)
    storage.check()
    return row, storage


def _payloads(
    entries: Iterable[Entry], as_directory: Sequence[str], report: RegisterReport
) -> Iterator[tuple[str, Entry, PayloadKind]]:
    """(path, entry, kind) of each payload; what lies in a directory payload belongs to it."""
    inside = ""
    for entry in entries:
        if inside and entry.path.startswith(inside):
            continue
        top = directory_above(entry, as_directory)
        if top is not None:
            inside = f"{top}/"
            yield top, entry, PayloadKind.DIRECTORY
        elif entry.kind == "file":
            yield entry.path, entry, PayloadKind.FILE
        else:
            # links are never followed: what they point to is registered where it lies
            report.skip(entry.path, _no_payload(entry))


def _no_payload(entry: Entry) -> str:
    return _NO_PAYLOAD.get(entry.kind, "neither file nor directory")


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatchcase(name, p) or fnmatchcase(path, p) for p in patterns)


def directory_above(entry: Entry, patterns: Sequence[str]) -> str | None:
    if not patterns:
        return None
    parts = entry.path.split("/")
    last = len(parts) if entry.kind == "directory" else len(parts) - 1
    for depth in range(1, last + 1):
        top = "/".join(parts[:depth])
        if _matches(top, patterns):
            return top
    return None


def _announce(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    storage: Storage,
    payloads: Iterator[tuple[str, Entry, PayloadKind]],
    report: RegisterReport,
    progress: Callable[[RegisterReport], None] | None,
    top: str | None = None,
) -> RegisterReport:
    sums = Sums(storage, source.checksums, top)
    chunks = _chunks(_announcements(source, sums, payloads, report))
    with closing(Prefetched(chunks)) as found:
        for chunk in found:
            _announce_chunk(context, source, row, storage, chunk, report)
            if progress is not None:
                progress(report)
    for name, why in sums.left():
        report.refuse(name, why)
    return report


def _chunks(announcements: Iterator[Announcement]) -> Iterator[list[Announcement]]:
    size = _FIRST_CHUNK
    while chunk := list(islice(announcements, size)):
        yield chunk
        size = min(4 * size, _CHUNK)


def _announce_chunk(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    storage: Storage,
    chunk: Sequence[Announcement],
    report: RegisterReport,
) -> None:
    try:
        merged = context.transact(
            partial(
                catalogue.announce,
                storage_id=row["storage_id"],
                announcements=chunk,
                terms=source.terms,
                actor=context.actor,
                now=context.clock(),
            )
        )
    except OF_DATA as error:
        # of one of them: which is not told
        if len(chunk) == 1:
            report.refuse(chunk[0].uri, str(error))
            return
        half = len(chunk) // 2
        for part in (chunk[:half], chunk[half:]):
            _announce_chunk(context, source, row, storage, part, report)
        return
    report.created += merged.created
    report.replicated += max(merged.replicated, 0)
    _renew(context, source, row, merged.gone, report)
    _look_closer(context, source, row, storage, merged.known, report)


def _announcements(
    source: Source,
    sums: Sums,
    payloads: Iterable[tuple[str, Entry, PayloadKind]],
    report: RegisterReport,
) -> Iterator[Announcement]:
    for path, entry, kind in payloads:
        try:
            uri = make_uri(source.scheme, source.uri_prefix + path)
        except InvalidValueError as error:
            report.refuse(path, str(error))
            continue
        if path.split("/", 1)[0] == PRIVATE:
            report.refuse(path, f"{PRIVATE} is the DLM's own")
            continue
        if entry.size >= _LARGEST:
            report.refuse(path, f"{entry.size} bytes are more than a file has")
            continue
        try:
            claimed = sums.of(path, kind)
        except DlmError as error:
            report.refuse(path, str(error))
            continue
        is_file = kind is PayloadKind.FILE
        yield Announcement(
            uri,
            encode_path(path),
            entry.size if is_file else 0,
            entry.mtime if is_file else None,
            kind,
            claimed,
        )


def _look_closer(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    storage: Storage,
    known: Sequence[Mapping[str, Any]],
    report: RegisterReport,
) -> None:
    """What was registered before: unchanged, touched, changed, or in conflict."""
    touched: list[tuple[uuid.UUID, float | None]] = []
    for one in known:
        same_place = one["path"] == one["announced_path"] and one["owner_uri"] == one["uri"]
        if not same_place:
            report.refuse(one["uri"], _conflict(one, source.storage))
            continue
        if one["item_state"] == ItemState.EXPIRED:
            # not unchanged: whoever registers it wants it kept, and it is going
            report.refuse(one["uri"], _GOING.format(one["version"]))
            continue
        try:
            looks_changed = _looks_changed(context, storage, one)
        except DlmError as error:
            report.refuse(one["uri"], str(error))
            continue
        if looks_changed:
            if _changed(context, source, row, storage, one, report):
                continue
            if one["kind"] == PayloadKind.FILE:
                touched.append((one["uid"], one["announced_mtime"]))
        if (why := _other_than_said(one)) is not None:
            report.refuse(one["uri"], why)
        else:
            report.unchanged += 1
    if touched:
        context.transact(lambda c: catalogue.update_mtimes(c, touched))


def _looks_changed(context: Context, storage: Storage, one: Mapping[str, Any]) -> bool:
    """Whether a known payload is worth reading: by size and time, of a directory by its files'."""
    if one["kind"] == PayloadKind.FILE:
        return (one["size"], one["mtime"]) != (one["announced_size"], one["announced_mtime"])
    if one["state"] not in _READ or one["item_kind"] != PayloadKind.DIRECTORY:
        return False
    top = decode_path(one["path"])
    found, newest = {}, 0.0
    for entry in storage.walk(top):
        found[encode_path(entry.path[len(top) + 1 :])] = entry.size
        newest = max(newest, entry.mtime)
    known = context.transact(lambda c: manifests_of(c, [one["oid"]])).get(one["oid"], ())
    read = one["checked_at"].timestamp()
    return newest >= read or found != {file["path"]: file["size"] for file in known}


def _other_than_said(one: Mapping[str, Any]) -> str | None:
    """How a known item whose bytes did not change is another than was announced, or None."""
    if one["claimed"] is not None and one["digest"] not in (None, one["claimed"]):
        told = f"is registered with digest {one['digest']}, the checksums say {one['claimed']}"
        if one["item_state"] == ItemState.INITIALISED:
            return (
                f"{told}; it was not let in yet: 'dlm withdraw' takes it back, then --new-version"
            )
        return told
    if one["claimed"] is not None and one["digest"] is None:
        return "was announced before without a checksum: register it again when it has been let in"
    # until it is admitted an item is a file by default
    if one["item_state"] != ItemState.INITIALISED and one["kind"] != one["item_kind"]:
        return f"is registered as a {one['item_kind']}, but there is a {one['kind']}"
    return None


def _conflict(one: Mapping[str, Any], storage: str) -> str:
    if one["owner_uri"] != one["uri"]:
        return f"its place {one['announced_path']} on {storage} is that of {one['owner_uri']}"
    return (
        f"has a copy on {storage} already, at {one['path']}; "
        f"one at {one['announced_path']} cannot be registered beside it"
    )


def _changed(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    storage: Storage,
    one: Mapping[str, Any],
    report: RegisterReport,
) -> bool:
    """Read a payload that looks changed; True if it is (refused, or a new version)."""
    if one["state"] == ReplicaState.PENDING or one["item_state"] == ItemState.INITIALISED:
        return False  # its admission reads it anyway
    try:
        seen = observe(storage, decode_path(one["path"]), PayloadKind(one["kind"]))
    except DlmError as error:
        report.refuse(one["uri"], str(error))
        return True
    if seen.digest == one["digest"]:
        if one["state"] == ReplicaState.SUSPECT:
            # put right: the look that was put off for that may come now
            context.transact(lambda c: hasten_looks(c, [one["uid"]], context.clock()))
        return False
    if not source.new_version:
        conflict = DigestConflictError(uri=one["uri"], registered=one["digest"], found=seen.digest)
        report.refuse(one["uri"], str(conflict))
        # what was read is what counts: it is no copy of its item, until a look finds it one again
        later = context.clock() + _TIME_TO_MEND
        context.transact(lambda c: doubt(c, context, [one], _OTHER_BYTES, later))
        return True
    announcement = Announcement(
        one["uri"], one["path"], one["announced_size"], one["announced_mtime"],
        PayloadKind(one["kind"]), one["claimed"],
    )  # fmt: skip
    _add_version(context, source, row, one["uid"], announcement, report)
    return True


def _renew(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    gone: Sequence[Mapping[str, Any]],
    report: RegisterReport,
) -> None:
    """What lies there again though its item has expired or is deleted: a new version, if it is said
    to be one. Else whatever brought it back would undo the deletion."""
    for one in gone:
        if not source.new_version:
            report.refuse(
                one["uri"],
                f"version {one['version']} is {one['state']} and gets no copies any more; register "
                "it as a new version (--new-version)",
            )
            continue
        announcement = Announcement(
            one["uri"], one["path"], one["size"], one["mtime"], PayloadKind(one["kind"]),
            one["digest"],
        )  # fmt: skip
        _add_version(context, source, row, None, announcement, report)


def _add_version(
    context: Context,
    source: Source,
    row: Mapping[str, Any],
    old_uid: uuid.UUID | None,
    announcement: Announcement,
    report: RegisterReport,
) -> None:
    version = context.transact(
        lambda c: add_version(
            c,
            row["storage_id"],
            old_uid,
            announcement,
            source.terms,
            context.actor,
            context.clock(),
        )
    )
    if version is None:
        report.refuse(announcement.uri, "its place was taken meanwhile; register it again")
    else:
        report.new_versions += 1
