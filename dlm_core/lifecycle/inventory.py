"""What really lies on a storage, by one listing, beside what the catalogue counts there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from dlm_core.catalogue.places import get_storage
from dlm_core.catalogue.replicas import known_paths
from dlm_core.errors import AccessDeniedError, InvalidValueError, PayloadNotFoundError
from dlm_core.lifecycle.work import Context
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, Entry, Storage, trash_path
from dlm_core.types import encode_path

_PAGE = 1000
#: paths of files that are not the DLM's which are kept as examples
_EXAMPLES = 20


@dataclass(slots=True)
class Share:
    """So many files and their bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, entry: Entry) -> None:
        self.files += 1
        self.bytes += entry.size


@dataclass(slots=True)
class Inventory:
    """The files found on a storage: at places of replicas, in the trash, else the DLM's own, and
    anybody else's, with the first paths of these; and what a bucket with versions keeps besides."""

    copies: Share = field(default_factory=Share)
    trash: Share = field(default_factory=Share)
    own: Share = field(default_factory=Share)
    foreign: Share = field(default_factory=Share)
    #: None if these keys may not list them
    old_versions: Share | None = field(default_factory=Share)
    examples: list[str] = field(default_factory=list)


def take_inventory(context: Context, name: str) -> Inventory:
    """List a whole storage and tell whose the files are; nothing is changed.

    A file is a copy if a replica that is not DELETED has its path, or that of a folder above it.
    What a copy's bytes are is not looked at.

    Raises
    ------
    NotFoundError, StorageError
    """
    row = context.transact(lambda c: get_storage(c, name))
    storage = open_storage(name, row["interface"], row["root"], row["config"])
    found = Inventory()
    entries = iter(_everything(storage))
    while page := list(islice(entries, _PAGE)):
        _count_page(context, row["storage_id"], page, found)
    if (listed := getattr(storage, "old_versions", None)) is not None:
        found.old_versions = _versions(listed())
    return found


def _versions(listed: Iterator[Entry]) -> Share | None:
    share = Share()
    try:
        for entry in listed:
            share.add(entry)
    except AccessDeniedError:
        return None
    return share


def _count_page(
    context: Context, storage_id: uuid.UUID, page: Sequence[Entry], found: Inventory
) -> None:
    above = {entry.path: _places(entry.path) for entry in page}
    wanted = set(chain.from_iterable(above.values()))
    known = context.transact(lambda c: known_paths(c, storage_id, wanted))
    for entry in page:
        _count(found, entry, not known.isdisjoint(above[entry.path]))


def _everything(storage: Storage) -> Iterator[Entry]:
    return chain(storage.walk(), _private(storage))


def _private(storage: Storage) -> Iterator[Entry]:
    try:
        yield from storage.walk(PRIVATE)
    except PayloadNotFoundError:
        return  # nothing was ever written there


def _places(path: str) -> list[str]:
    """The path and the folders above it, as the catalogue has them."""
    try:
        parts = encode_path(path).split("/")
    except InvalidValueError:
        return []  # no replica can be called so
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _count(found: Inventory, entry: Entry, known: bool) -> None:
    if known:
        found.copies.add(entry)
    elif entry.path.startswith(trash_path("")):
        found.trash.add(entry)
    elif entry.path.startswith(f"{PRIVATE}/"):
        found.own.add(entry)
    else:
        found.foreign.add(entry)
        if len(found.examples) < _EXAMPLES:
            found.examples.append(entry.path)
