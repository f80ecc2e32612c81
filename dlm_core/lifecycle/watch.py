"""Watched folders: what appears there and stops growing is registered."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import watches as catalogue
from dlm_core.catalogue.items import Terms, must_have_collection
from dlm_core.catalogue.operations import count_due
from dlm_core.catalogue.urgency import Urgency
from dlm_core.catalogue.watches import count_watches_due
from dlm_core.errors import (
    CatalogueError,
    CatalogueUnavailableError,
    IllegalTransitionError,
    InputError,
    InvalidValueError,
    PathRefusedError,
    StorageError,
)
from dlm_core.lifecycle.register import (
    RegisterReport,
    Source,
    directory_above,
    register_list,
    storage_by_name,
)
from dlm_core.lifecycle.work import Context, log
from dlm_core.storages.port import PRIVATE, Storage
from dlm_core.types import OperationKind, StorageMode, decode_path, encode_path, make_uri

#: names of what is still being written
_UNFINISHED = (".part", ".tmp", ".partial")
#: what was refused is looked at again after this, or when it changes
_REFUSED_WAIT = timedelta(hours=1)
_SHORTEST = timedelta(seconds=1)
#: refusals of a look that are logged; the watch has all
_TOLD = 20


def add_watch(
    context: Context,
    source: Source,
    path: str = "",
    *,
    interval: timedelta = timedelta(seconds=30),
) -> uuid.UUID:
    """Watch a folder of a storage from now on; the watch's id.

    ``source`` says how its payloads become items. The folder may come into being later.

    Raises
    ------
    InvalidValueError
        see :func:`check_watch` and :func:`is_there`.
    PathRefusedError, IllegalTransitionError
        see :func:`is_there`.
    NotFoundError, AlreadyExistsError
        no such storage or collection; watched already.
    """
    check_watch(source, interval)
    is_there(context, source.storage, path)
    options = _options(source)
    row = storage_by_name(context, source.storage)
    encoded = encode_path(path) if path else ""

    def add(connection: Connection) -> uuid.UUID:
        must_have_collection(connection, source.terms.collection_id)
        return catalogue.add_watch(
            connection, row["storage_id"], encoded, source.scheme, options, interval,
            context.clock(),
        )  # fmt: skip

    return context.transact(add)


def check_watch(source: Source, interval: timedelta) -> None:
    """Refuse what no watch can be.

    Raises
    ------
    InvalidValueError
        if it would be looked at more often than once a second, the uris would be none, the terms
        are none, or ``source`` has what is of one registration: checksums, or a moment.
    """
    if interval < _SHORTEST:
        raise InvalidValueError(what="interval", value=str(interval), expected="at least 1s")
    make_uri(source.scheme, f"{source.uri_prefix}x")  # told once, not at every look
    terms = source.terms
    terms.check_words()
    once = (source.checksums, terms.item_expires_at, terms.replica_expires_at)
    if source.as_directory and source.new_version:
        raise InvalidValueError(
            what="watch", value="new versions", expected="files: known directories are not read"
        )
    if any(once) or terms.urgency.needed_by is not None:
        raise InvalidValueError(
            what="watch", value=source.storage, expected="no checksums and no moments: it goes on"
        )


def is_there(context: Context, storage: str, path: str) -> bool:
    """Whether a storage has a folder to be watched, or cannot be asked (now).

    Raises
    ------
    InvalidValueError, PathRefusedError
        what is there, or leads there, is no folder; or it is the DLM's own.
    IllegalTransitionError
        the storage is retired or lost: it is not looked at.
    NotFoundError
    """
    row = storage_by_name(context, storage)
    if row["mode"] in (StorageMode.RETIRED, StorageMode.LOST):
        raise IllegalTransitionError(noun="storage", key=storage, old=row["mode"], new="watched")
    if path.split("/", 1)[0] == PRIVATE:
        raise InvalidValueError(what="path", value=path, expected="a folder that is not the DLM's")
    if row["mode"] in (StorageMode.OFFLINE, StorageMode.AUDITING):
        return True
    try:
        entry = context.storages.open(row).stat(path) if path else None
    except PathRefusedError:
        raise
    except StorageError:
        return True
    if entry is not None and entry.kind != "directory":
        raise InvalidValueError(what="path", value=path, expected=f"a folder, not a {entry.kind}")
    return entry is not None or not path


def _options(source: Source) -> dict[str, Any]:
    terms = source.terms
    found = {
        "uri_prefix": source.uri_prefix,
        "as_directory": list(source.as_directory),
        "new_version": source.new_version,
        "target_phase": terms.target_phase,
        "collection_id": terms.collection_id and str(terms.collection_id),
        "owner": terms.owner,
        "tags": terms.tags,
        "priority": terms.urgency.priority,
    }
    return {key: value for key, value in found.items() if value}


def _source(watch: Mapping[str, Any]) -> Source:
    """What :func:`add_watch` was told."""
    options = watch["options"]
    collection = options.get("collection_id")
    terms = Terms(
        options.get("target_phase", "SOLID"),
        uuid.UUID(collection) if collection else None,
        options.get("owner"),
        options.get("tags"),
        urgency=Urgency(options.get("priority", 0)),
    )
    return Source(
        watch["storage"],
        watch["scheme"],
        options.get("uri_prefix", ""),
        tuple(options.get("as_directory", ())),
        new_version=options.get("new_version", False),
        terms=terms,
    )


def scan_watches(context: Context) -> RegisterReport:
    """Look at every watched folder that is due, and announce what has settled."""
    total = RegisterReport()
    for watch in context.transact(lambda c: catalogue.claim_watches(c, context.clock())):
        try:
            report = _scan(context, watch)
        except CatalogueUnavailableError:
            raise
        except (StorageError, InputError, CatalogueError) as error:
            # it is down, or out of use; it is looked at again after its interval, and neither the
            # other folders are held up nor the admissions
            log.warning("watched folder %s:%s: %s", watch["storage"], watch["path"], error)
            _note_failure(context, watch, str(error))
            continue
        total.created += report.created
        total.refused += report.refused
        total.reasons.extend(report.reasons)
    return total


def _note_failure(context: Context, watch: Mapping[str, Any], why: str) -> None:
    """Let the list of watches tell it, as a refusal of the folder, until a look finds otherwise."""
    told = why.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    folder = {"path": watch["path"], "size": 0, "mtime": 0.0, "refusal": told}

    def note(connection: Connection) -> None:
        catalogue.forget_entry(connection, watch["watch_id"], watch["path"])
        catalogue.put_off_entries(connection, watch["watch_id"], [folder], context.clock())

    context.transact(note)


def plan_registration(context: Context) -> int:
    """The planner of the registration drainer: the number of items announced by watches."""
    return scan_watches(context).created


def count_registration_due(connection: Connection, now: datetime) -> int:
    """Admissions and watched folders that are due."""
    due = count_due(connection, [OperationKind.ADMIT], now)
    return due + count_watches_due(connection, now)


def _scan(context: Context, watch: dict[str, Any]) -> RegisterReport:
    source = _source(watch)
    storage = context.storages.open(storage_by_name(context, watch["storage"]))
    storage.check()
    settle = timedelta(seconds=context.settings.watch_settle_seconds)
    seen = list(_finished(storage, decode_path(watch["path"]), source.as_directory))
    settled = context.transact(
        lambda c: catalogue.settled_entries(
            c, watch["watch_id"], watch["storage_id"], seen, settle, context.clock()
        )
    )
    report = register_list(context, source, [decode_path(entry["path"]) for entry in settled])
    for what, why in report.reasons[:_TOLD]:
        log.warning("watched folder %s:%s: %s: %s", watch["storage"], watch["path"], what, why)
    if report.refused:
        # it may be large, was read to know that it changed, and is no other after the next interval
        later = context.clock() + _REFUSED_WAIT
        told = dict(report.reasons)
        refused = [
            {**entry, "refusal": told.get(path) or told.get(_uri(source, path))}
            for entry in settled
            for path in [decode_path(entry["path"])]
        ]
        context.transact(lambda c: catalogue.put_off_entries(c, watch["watch_id"], refused, later))
    return report


def _uri(source: Source, path: str) -> str:
    try:
        return make_uri(source.scheme, source.uri_prefix + path)
    except InvalidValueError:
        return ""


def _finished(
    storage: Storage, folder: str, as_directory: Sequence[str]
) -> Iterator[tuple[str, int, float]]:
    """(encoded path, bytes, time of change) of payloads that nobody seems to write at; of a
    directory payload the sum and the latest of its files, whatever their names."""
    if folder and storage.stat(folder) is None:
        return
    directories: dict[str, tuple[int, float]] = {}
    for entry in storage.walk(folder):
        top = directory_above(entry, as_directory)
        payload = entry.path if top is None else top
        below = payload[len(folder) :].strip("/")
        # in a folder that is being written too, whatever its files are called
        left_alone = any(
            part.startswith(".") or part.endswith(_UNFINISHED) for part in below.split("/")
        )
        if entry.kind != "file" or left_alone:
            continue
        if top is None:
            yield encode_path(entry.path), entry.size, entry.mtime
        else:
            size, newest = directories.get(top, (0, 0.0))
            directories[top] = size + entry.size, max(newest, entry.mtime)
    for top, (size, newest) in directories.items():
        yield encode_path(top), size, newest
