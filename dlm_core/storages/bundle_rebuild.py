"""A lost index of bundles, made anew from what the bundles say of themselves.

The log also held what was removed and renamed since a bundle was made. That is lost with it: all
members lie again where they lay when they were packed, the removed ones too. Nothing is lost by
that; what the catalogue does not know is a stranger.
"""

from __future__ import annotations

import tarfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from dlm_core.errors import InvalidValueError, PayloadNotFoundError, StorageUnavailableError
from dlm_core.storages.bundle_base import write_base
from dlm_core.storages.bundle_index import Bundle
from dlm_core.storages.bundle_tar import (
    FOLDER,
    Member,
    list_path,
    parse_listing,
    read_tar,
    tar_path,
)
from dlm_core.storages.bundles import Bundled


@dataclass(slots=True)
class RebuildReport:
    """Bundles and members found; ``unreadable`` tars are left as they are and hold no member now;
    ``damaged`` members are in the index, and are not what it says."""

    storage: str
    bundles: int = 0
    members: int = 0
    unreadable: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def rebuild_index(storage: Bundled) -> RebuildReport:
    """Read all bundles of a storage and write its index anew; the newest of several has a path.

    Raises
    ------
    InvalidValueError
        if the index is whole: it knows more than the bundles do.
    StorageError
    """
    storage.inner.check()
    try:
        storage.index.refresh()
    except StorageUnavailableError:
        pass
    else:
        raise InvalidValueError(
            what="storage",
            value=storage.name,
            expected="one whose index is lost; this one's is whole",
        )
    report = RebuildReport(storage.name)
    found: dict[str, Member] = {}
    bundles: dict[str, Bundle] = {}
    for bundle, size in _tars(storage):
        members, damaged = _members(storage, bundle, report)
        bundles[bundle] = Bundle(size, len(members), sum(m.size for _, m in members))
        found.update({p: m for p, m in members if p not in found or p not in damaged})
    for member in found.values():
        bundles[member.bundle].live += 1
        bundles[member.bundle].live_bytes += member.size
    report.bundles, report.members = len(bundles), len(found)
    _publish(storage, found, bundles)
    return report


def _tars(storage: Bundled) -> list[tuple[str, int]]:
    """Bundles with their size, oldest first: their names begin with the time."""
    top = f"{FOLDER}/tar/"
    return sorted(
        (entry.path[len(top) : -len(".tar")], entry.size)
        for entry in storage.inner.walk(top.rstrip("/"))
        if entry.path.endswith(".tar")
    )


def _members(
    storage: Bundled, bundle: str, report: RebuildReport
) -> tuple[list[tuple[str, Member]], set[str]]:
    """By the tar's own index; where the tar is cut short, by the list that lies beside it. And
    which of them have other bytes by now."""
    listing, digests = None, {}
    with storage.inner.open_read(tar_path(bundle)) as stream, suppress(tarfile.TarError):
        for one in read_tar(stream, bundle):
            digests[one.offset] = one.digest
            listing = one.data if one.data is not None else listing
    members = list(_parsed(listing)) or list(_parsed(_beside(storage, bundle)))
    if not members:
        report.unreadable.append(tar_path(bundle))
    damaged = {path for path, m in members if digests.get(m.offset) != m.digest}
    report.damaged.extend(sorted(damaged))
    return members, damaged


def _parsed(listing: bytes | None) -> Iterator[tuple[str, Member]]:
    with suppress(ValueError):
        yield from parse_listing(listing or b"")


def _beside(storage: Bundled, bundle: str) -> bytes | None:
    with suppress(PayloadNotFoundError), storage.inner.open_read(list_path(bundle)) as stream:
        return stream.read(-1)
    return None


def _publish(storage: Bundled, found: dict[str, Member], bundles: dict[str, Bundle]) -> None:
    inner, index = storage.inner, storage.index
    number = (index.numbers() or [0])[-1]
    name = f"{number:016d}-{uuid.uuid4().hex}"
    # those whose members all lie in newer ones
    garbage = [one for one, bundle in bundles.items() if bundle.members and not bundle.live]
    kept = bundles.keys() - garbage
    head = {
        "bundles": {one: list(asdict(bundles[one]).values()) for one in sorted(kept)},
        "cleaning": _packed_singles(storage, found),
        "garbage": garbage,
    }
    write_base(inner, name, sorted(found.items()), head)
    index.append_fold(number, name)


def _packed_singles(storage: Bundled, found: dict[str, Member]) -> dict[str, list[str]]:
    """Single files that a bundle was made of and that still lie there: their cleaning goes on."""
    cleaning: dict[str, list[str]] = {}
    for entry in storage.inner.walk():
        member = found.get(entry.path)
        if member is not None and member.was(entry.size, entry.mtime):
            cleaning.setdefault(member.bundle, []).append(entry.path)
    return {bundle: sorted(paths) for bundle, paths in cleaning.items()}
