"""Packing of storages that keep small files in bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from dlm_core.catalogue.packing import digests_at, packing
from dlm_core.errors import InvalidValueError
from dlm_core.lifecycle.register import storage_by_name
from dlm_core.lifecycle.traffic import pacing
from dlm_core.lifecycle.work import Context
from dlm_core.storages.bundle_rebuild import RebuildReport, rebuild_index
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.packing import PackReport, finish, pack
from dlm_core.storages.port import Entry
from dlm_core.transfers.throttle import paced
from dlm_core.types import StorageMode


class Packs(Protocol):
    """One storage's packing, to be called."""

    def __call__(self) -> PackReport: ...


def pack_storage(context: Context, name: str, *, dry_run: bool = False) -> PackReport:
    """Pack what is due on a storage: only files of READY replicas, with the catalogue's digests.

    Raises
    ------
    NotFoundError
    InvalidValueError
        if it keeps no bundles, or the DLM may not write to it now.
    PackingError
        if somebody else packs it at this moment.
    StorageError
        what was begun is undone, now or by the next one.
    """
    row, storage = _bundled(context, name)

    def known(entries: Sequence[Entry]) -> Mapping[str, str | None]:
        paths = [entry.path for entry in entries]
        return context.transact(lambda c: digests_at(c, row["storage_id"], paths))

    with _alone(context, row, storage) as held_back:
        return pack(held_back, known, context.clock(), dry_run=dry_run, stop=context.stop)


def finish_packing(context: Context, name: str) -> PackReport:
    """Clear away what a packing or a removal that died left on a storage, and pack nothing.

    Raises
    ------
    NotFoundError, InvalidValueError, PackingError, StorageError
        as for :func:`pack_storage`.
    """
    row, storage = _bundled(context, name)
    with _alone(context, row, storage) as held_back:
        return finish(held_back)


def rebuild_storage_index(context: Context, name: str) -> RebuildReport:
    """Make the lost index of a storage's bundles anew from the bundles.

    Raises
    ------
    NotFoundError, PackingError, StorageError
    InvalidValueError
        as for :func:`pack_storage`, or if the index is whole.
    """
    row, storage = _bundled(context, name)
    with _alone(context, row, storage) as held_back:
        return rebuild_index(held_back)


def pack_due(context: Context) -> Iterator[Packs]:
    """For each storage with bundles that may be written to, what packs it; for one that is being
    drained, what clears away there: it retires as soon as nothing of the catalogue's is on it."""
    work = {StorageMode.READ_WRITE: pack_storage, StorageMode.DRAINING: finish_packing}
    for row in context.transact(context.storages.load).values():
        if row["managed"] and row["mode"] in work and "bundle_bytes" in row["config"]:
            yield partial(work[row["mode"]], context, row["name"])


@contextmanager
def _alone(context: Context, row: Mapping[str, Any], storage: Bundled) -> Iterator[Bundled]:
    """Nobody else packs the storage meanwhile, and it is read and written no faster than its limit
    lets; one that changes is learnt of on the way."""
    with (
        packing(context.engine, context.actor, row["storage_id"], row["name"]),
        context.traffic.telling(context),
        pacing(context, row) as pace,
    ):
        yield storage.over(lambda adapter: paced(adapter, [pace]))


def _bundled(context: Context, name: str) -> tuple[Mapping[str, Any], Bundled]:
    row = storage_by_name(context, name)
    if not row["managed"] or row["mode"] not in (StorageMode.READ_WRITE, StorageMode.DRAINING):
        why = row["mode"] if row["managed"] else "not managed"
        raise InvalidValueError(
            what="storage", value=name, expected=f"one that may be written to; it is {why}"
        )
    storage = context.storages.open(row)
    if not isinstance(storage, Bundled):
        storage.check()  # one that cannot be opened says why
        raise InvalidValueError(
            what="storage", value=name, expected="one whose config has bundle_bytes"
        )
    storage.inner.check()
    return row, storage
