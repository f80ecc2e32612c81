"""Make a lost catalogue again from what storages say of themselves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import rebuild as catalogue
from dlm_core.catalogue import recovery
from dlm_core.catalogue.places import root_of
from dlm_core.errors import DlmError, InvalidValueError
from dlm_core.lifecycle.description import FOLDER, SITE, Index, newest_index, opened
from dlm_core.lifecycle.work import Context
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from dlm_core.transfers.checksums import manifest_digest
from dlm_core.types import ItemState, ManifestEntry, PayloadKind, ReplicaState, decode_path

_CHUNK = 2000
_MAX_TOLD = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a storage is now; what it is called and the rest it says itself."""

    interface: str
    root: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.interface}:{self.root}"


@dataclass(slots=True)
class RebuildReport:
    """What was made, and (the first 1000) what was not, with why."""

    storages: list[str] = field(default_factory=list)
    collections: int = 0
    holds: int = 0
    items: int = 0
    replicas: int = 0
    #: items that an older description tells differently: the newest one's word was taken
    differing: int = 0
    #: copies not taken over, by why
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def tell(self, problem: str) -> None:
        """Note what the operator has to know."""
        if len(self.problems) < _MAX_TOLD:
            self.problems.append(problem)


@dataclass(frozen=True, slots=True)
class _Source:
    place: Place
    storage: Storage
    index: Index


def rebuild(context: Context, places: Sequence[Place]) -> RebuildReport:
    """Fill an empty catalogue with locations, storages, collections, holds, items and replicas, all
    or nothing. No replica is READY before its bytes were read: a look at each is queued.

    Where descriptions differ the newest one is believed, and told; whatever cannot be read is told.

    Raises
    ------
    InvalidValueError
        a place has no description, or two places have that of the same storage.
    RestoreRefusedError
        if the catalogue is not empty.
    StorageUnavailableError, AccessDeniedError
        a storage cannot be read.
    """
    found: list[str] = []
    sources = sorted(_find(places, found), key=lambda s: s.index.exported_at, reverse=True)
    _must_differ(sources)
    report: RebuildReport = context.transact(lambda c: _fill(c, context, sources))
    report.problems[:0] = found
    return report


def _find(places: Sequence[Place], problems: list[str]) -> list[_Source]:
    sources = []
    for place in places:
        storage = open_storage(str(place), place.interface, place.root, place.config)
        storage.check()
        index, damaged = newest_index(storage)
        problems += damaged
        if index is None:
            raise InvalidValueError(
                what="storage", value=str(place),
                expected=f"one with a whole description in {FOLDER} ('dlm storage export')",
            )  # fmt: skip
        sources.append(_Source(place, storage, index))
    return sources


def _must_differ(sources: Sequence[_Source]) -> None:
    seen: dict[str, Place] = {}
    for source in sources:
        other = seen.setdefault(source.index.storage["storage_id"], source.place)
        if other is not source.place:
            raise InvalidValueError(
                what="storage", value=str(source.place),
                expected=f"another storage than {other}: both say that they are "
                f"{source.index.storage['name']}",
            )  # fmt: skip


def _fill(connection: Connection, context: Context, sources: Sequence[_Source]) -> RebuildReport:
    report = RebuildReport()
    catalogue.must_be_empty(connection)
    catalogue.look_up_by_key(connection)
    for source in sources:
        place = source.place
        catalogue.insert_storage(
            connection, source.index.storage, source.index.location,
            {"interface": place.interface, "config": dict(place.config),
             "root": root_of(place.interface, place.root)},
        )  # fmt: skip
        report.storages.append(source.index.storage["name"])
    holds = _collections(connection, sources, report)
    for source in sources:
        for prefix in sorted(source.index.files.keys() - {SITE}):
            _merge_file(connection, context, source, prefix, report)
    report.holds = sum(_hold(connection, hold, report) for hold in holds.values())
    told = "the descriptions of " + ", ".join(
        f"{s.index.storage['name']} ({s.index.exported_at})" for s in sources
    )
    recovery.distrust(connection, told, context.actor, context.clock())
    return report


def _collections(
    connection: Connection, sources: Sequence[_Source], report: RebuildReport
) -> dict[str, dict[str, Any]]:
    """Make all collections; the holds by key, of which the newest description is believed."""
    collections: dict[str, dict[str, Any]] = {}
    holds: dict[str, dict[str, Any]] = {}
    for source in sources:
        for line in _lines(source, SITE, report):
            one = json.loads(line)
            kept = collections if one["noun"] == "collection" else holds
            kept.setdefault(one["key"], one["told"])
    catalogue.insert_collections(connection, collections.values())
    report.collections = len(collections)
    return holds


def _hold(connection: Connection, hold: Mapping[str, Any], report: RebuildReport) -> bool:
    made = catalogue.insert_hold(connection, hold)
    if not made:
        report.tell(f"hold {hold['hold_id']} ({hold['reason']}): what it holds is not known here")
    return made


def _lines(source: _Source, prefix: str, report: RebuildReport) -> Iterator[str]:
    """The lines of a file; none of a damaged one, which is told."""
    file = source.index.files.get(prefix)
    if file is None:
        return
    try:
        with opened(source.storage, prefix, file) as lines:
            yield from lines
    except DlmError as error:
        if error.retryable:
            raise
        report.tell(f"{error}; what it tells was left out ({file.lines} lines)")


def _merge_file(
    connection: Connection,
    context: Context,
    source: _Source,
    prefix: str,
    report: RebuildReport,
) -> None:
    usable = _usable(source, _lines(source, prefix, report), report)
    while chunk := list(islice(usable, _CHUNK)):
        merged = catalogue.merge_lines(
            connection,
            source.index.storage["storage_id"],
            chunk,
            context.actor,
            context.clock(),
        )
        report.items += merged.items
        report.replicas += merged.replicas
        report.differing += merged.differing
        for uri, path, why in merged.refused:
            report.left_out["in conflict"] += 1
            report.tell(f"{uri}: its copy at {source.storage.name}, {path}: {why}")


def _usable(source: _Source, lines: Iterable[str], report: RebuildReport) -> Iterator[str]:
    for line in lines:
        one = json.loads(line)
        if one["state"] == ReplicaState.TRASHED:
            report.left_out["in the trash: its bytes stay below .dlm/trash"] += 1
        elif one["item_state"] == ItemState.INITIALISED:
            report.left_out["announced but never read: register it again"] += 1
        elif one["kind"] == PayloadKind.DIRECTORY and not _is_whole(one):
            report.left_out["in conflict"] += 1
            report.tell(f"{one['uri']} on {source.storage.name}: its manifest is not its digest's")
        else:
            yield line


def _is_whole(one: Mapping[str, Any]) -> bool:
    """True if a directory's digest is that of its manifest."""
    files = [ManifestEntry(decode_path(path), size, digest) for path, size, digest in one["files"]]
    return manifest_digest(files) == one["digest"]
