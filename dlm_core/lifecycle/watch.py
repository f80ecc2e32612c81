"""Watched folders: what appears there and stops growing is registered."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import items as catalogue
from dlm_core.catalogue.items import count_watches_due
from dlm_core.catalogue.operations import count_due
from dlm_core.errors import InputError, StorageError
from dlm_core.lifecycle.register import RegisterReport, Source, register_list, storage_by_name
from dlm_core.lifecycle.work import Context, log
from dlm_core.storages.port import Storage
from dlm_core.types import OperationKind, decode_path, encode_path

#: names of what is still being written
_UNFINISHED = (".part", ".tmp", ".partial")
#: what was refused is looked at again after this, or when it changes
_REFUSED_WAIT = timedelta(hours=1)


def add_watch(
    context: Context,
    storage: str,
    path: str = "",
    *,
    scheme: str = "file",
    uri_prefix: str = "",
    interval: timedelta = timedelta(seconds=30),
) -> uuid.UUID:
    """Watch a folder of a storage from now on; the watch's id.

    Raises
    ------
    NotFoundError, AlreadyExistsError
        no such storage; watched already.
    """
    row = storage_by_name(context, storage)
    encoded = encode_path(path) if path else ""
    options = {"uri_prefix": uri_prefix}
    return context.transact(
        lambda c: catalogue.add_watch(
            c, row["storage_id"], encoded, scheme, options, interval, context.clock()
        )
    )


def scan_watches(context: Context) -> RegisterReport:
    """Look at every watched folder that is due, and announce what has settled."""
    total = RegisterReport()
    for watch in context.transact(lambda c: catalogue.claim_watches(c, context.clock())):
        try:
            report = _scan(context, watch)
        except (StorageError, InputError) as error:
            # it is down, or out of use; it is looked at again after its interval, and neither the
            # other folders are held up nor the admissions
            log.warning("watched folder %s:%s: %s", watch["storage"], watch["path"], error)
            continue
        total.created += report.created
        total.refused += report.refused
        total.reasons.extend(report.reasons)
    return total


def plan_registration(context: Context) -> int:
    """The planner of the registration drainer: the number of items announced by watches."""
    return scan_watches(context).created


def count_registration_due(connection: Connection, now: datetime) -> int:
    """Admissions and watched folders that are due."""
    due = count_due(connection, [OperationKind.ADMIT], now)
    return due + count_watches_due(connection, now)


def _scan(context: Context, watch: dict[str, Any]) -> RegisterReport:
    storage = context.storages.open(storage_by_name(context, watch["storage"]))
    storage.check()
    settle = timedelta(seconds=context.settings.watch_settle_seconds)
    seen = list(_finished(storage, decode_path(watch["path"])))
    settled = context.transact(
        lambda c: catalogue.settled_entries(
            c, watch["watch_id"], watch["storage_id"], seen, settle, context.clock()
        )
    )
    source = Source(watch["storage"], watch["scheme"], watch["options"].get("uri_prefix", ""))
    report = register_list(context, source, [decode_path(entry["path"]) for entry in settled])
    if report.refused:
        # it may be large, was read to know that it changed, and is no other after the next interval
        later = context.clock() + _REFUSED_WAIT
        context.transact(lambda c: catalogue.put_off_entries(c, watch["watch_id"], settled, later))
    return report


def _finished(storage: Storage, folder: str) -> Iterator[tuple[str, int, float]]:
    if folder and storage.stat(folder) is None:
        return
    for entry in storage.walk(folder):
        below = entry.path[len(folder) :].strip("/")
        hidden = any(part.startswith(".") for part in below.split("/"))
        if entry.kind == "file" and not hidden and not entry.path.endswith(_UNFINISHED):
            yield encode_path(entry.path), entry.size, entry.mtime
