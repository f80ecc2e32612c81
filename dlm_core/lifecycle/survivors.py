"""A purge looks at the survivors on their storages before it removes anything.

A survivor that is offline on a cold storage is not recalled for that: it has to be there with its
size, and its bytes read within ``stage_proof_days``. One that was read longer ago proves nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection

from dlm_core.catalogue import deletions as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas
from dlm_core.catalogue.checks import put_looks_off
from dlm_core.catalogue.items import update_mtimes
from dlm_core.errors import DlmError, IntegrityError, PathRefusedError, PayloadNotFoundError
from dlm_core.lifecycle.staging import is_cold
from dlm_core.lifecycle.work import Context
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.port import Entry, Storage
from dlm_core.transfers.checksums import observe
from dlm_core.types import OperationKind, PayloadKind, ReplicaState, decode_path

Row = Mapping[str, Any]
Manifests = Mapping[uuid.UUID, Sequence[Row]]


def look_at_survivors(context: Context, proofs: Sequence[catalogue.Proof]) -> set[uuid.UUID]:
    """Look on their storages at the survivors that ``proofs`` name.

    A survivor whose last check is older than ``proof_max_age_seconds``, or of which the storage
    tells another time of change or other content than then, is read whole. Of the others a file
    must be told of and open with its size, a directory have the files of its manifest. One that is
    not becomes SUSPECT, with a second look queued. Returns the uids that could not be seen, an
    outage included: they prove nothing now.
    """
    begun = context.clock()
    wanted = {uid for p in proofs for uid in p.survivors}
    if not wanted:
        return set()
    storages = context.transact(context.storages.load)
    rows = context.transact(lambda c: catalogue.survivor_details(c, list(wanted)))
    trees = [row["oid"] for row in rows if row["kind"] == PayloadKind.DIRECTORY]
    manifests = context.transact(lambda c: replicas.manifests_of(c, trees)) if trees else {}
    unseen: set[uuid.UUID] = set()
    absent: list[Row] = []
    read: list[_Read] = []
    for storage_id in {row["storage_id"] for row in rows}:
        mine = [row for row in rows if row["storage_id"] == storage_id]
        storage = context.storages.open(storages[storage_id])
        try:
            away, unproven = _offline(context, storage, mine, manifests)
            wrong = _not_as_catalogued(context, storage, mine, manifests, away, read)
        except DlmError:
            unseen.update(row["uid"] for row in mine)
            continue
        unseen |= unproven
        absent.extend(wrong)
    if read:
        # of what is written to from here on the storage tells a later time
        context.transact(lambda c: _note(c, read, begun))
    if absent:
        reason = "not found as catalogued when a purge looked at its survivors"
        context.transact(lambda c: doubt(c, context, absent, reason, context.clock()))
    return unseen | {row["uid"] for row in absent}


def _offline(
    context: Context, storage: Storage, rows: Sequence[Row], manifests: Manifests
) -> tuple[set[uuid.UUID], set[uuid.UUID]]:
    """The survivors that could be read only after staging; and those of them whose bytes were read
    too long ago to be believed unread."""
    if not is_cold(storage):
        return set(), set()
    cold = cast(ColdStorage, storage)
    oldest = context.clock() - timedelta(days=cold.terms.stage_proof_days)
    files = {row["uid"]: _files(row, manifests) for row in rows}
    online = cold.look(sorted({path for paths in files.values() for path in paths}))
    away = {uid for uid, paths in files.items() if not online.issuperset(paths)}
    return away, {row["uid"] for row in rows if row["uid"] in away and row["checked_at"] < oldest}


def _files(row: Row, manifests: Manifests) -> list[str]:
    path = decode_path(row["path"])
    if row["kind"] == PayloadKind.FILE:
        return [path]
    return [f"{path}/{decode_path(one['path'])}" for one in manifests.get(row["oid"], ())]


def _not_as_catalogued(
    context: Context,
    storage: Storage,
    rows: Sequence[Row],
    manifests: Manifests,
    away: Collection[uuid.UUID],
    read: list[_Read],
) -> list[Row]:
    """Those that do not look, or read, as they should; of those ``away`` nothing is read. Those
    that read well are added to ``read``."""
    oldest = context.clock() - timedelta(seconds=context.settings.proof_max_age_seconds)
    files = [row for row in rows if row["kind"] == PayloadKind.FILE]
    entries = storage.stat_many([decode_path(row["path"]) for row in files])

    def good(row: Row) -> bool:
        path = decode_path(row["path"])
        if row["kind"] == PayloadKind.DIRECTORY:
            found = _listed(storage, path)
            told = {entry.path: entry.size for entry in found} == {
                f"{path}/{decode_path(one['path'])}": one["size"]
                for one in manifests.get(row["oid"], ())
            }
        else:
            entry = entries.get(path)
            found = [] if entry is None else [entry]
            told = entry is not None and entry.kind == "file" and entry.size == row["size"]
        if not told or row["uid"] in away:
            return told
        if row["checked_at"] < oldest or any(_is_another(entry, row) for entry in found):
            well = _reads_well(storage, row)
            if well:
                mtime = None if row["mtime"] is None else found[0].mtime
                read.append(_Read(row, mtime))
            return well
        return row["kind"] == PayloadKind.DIRECTORY or _opens(storage, path, row["size"])

    with ThreadPoolExecutor(storage.concurrency, "dlm-look") as pool:
        return [row for row, is_good in zip(rows, pool.map(good, rows), strict=True) if not is_good]


def _opens(storage: Storage, path: str, size: int) -> bool:
    """A look may be answered from a cache that still has what is gone; opening asks again."""
    try:
        with storage.open_read(path) as stream:
            return stream.size == size
    except (PayloadNotFoundError, PathRefusedError):
        return False


def _listed(storage: Storage, path: str) -> list[Entry]:
    try:
        return list(storage.walk(path))
    except (PayloadNotFoundError, PathRefusedError):
        return []


def _is_another(entry: Entry, row: Row) -> bool:
    """Whether a file was changed since its bytes were read, by what the storage says of it: it has
    another time than at its registration, was written later if it was not registered there, or has
    another content."""
    if row["mtime"] is None and entry.mtime > row["checked_at"].timestamp():
        return True
    if row["mtime"] is not None and not _same_time(entry.mtime, row["mtime"]):
        return True
    stamp = content_stamp(entry)
    return None not in (stamp, row["told_stamp"]) and stamp != row["told_stamp"]


def _same_time(one: float, other: float) -> bool:
    """Some servers tell whole seconds where they are asked for one file."""
    whole = one.is_integer() or other.is_integer()
    return int(one) == int(other) if whole else one == other


def content_stamp(entry: Entry) -> str | None:
    """What a storage says of a file's content without its being read; None if it says nothing."""
    return None if entry.etag is None else f"{entry.size} {entry.etag}"


@dataclass(frozen=True, slots=True)
class _Read:
    """A survivor that was read and matched; ``mtime`` is the file's, if it was registered there."""

    row: Row
    mtime: float | None


def _note(connection: Connection, read: Sequence[_Read], when: datetime) -> None:
    """They were read, not before ``when``: the next purge need not, unless they changed since."""
    seen = [replicas.Seen(r.row["uid"], r.row["size"], r.row["digest"]) for r in read]
    replicas.mark_ready(connection, seen, when, only_from=[ReplicaState.READY])
    touched = [(r.row["uid"], r.mtime) for r in read if r.mtime is not None]
    update_mtimes(connection, touched)


def _reads_well(storage: Storage, row: Row) -> bool:
    try:
        seen = observe(storage, decode_path(row["path"]), PayloadKind(row["kind"]))
    except (PayloadNotFoundError, IntegrityError):
        return False
    return (seen.digest, seen.size) == (row["digest"], row["size"])


def doubt(
    connection: Connection, context: Context, rows: Sequence[Row], reason: str, when: datetime
) -> None:
    """READY replicas of ``rows`` (uid, oid) become SUSPECT, and are looked at from ``when`` on."""
    turned = replicas.mark_state(
        connection,
        [row["uid"] for row in rows],
        ReplicaState.SUSPECT,
        only_from=[ReplicaState.READY],
    )
    # one that is queued may come sooner than who has to put it right
    queued = put_looks_off(connection, list(turned), when)
    left = [row for row in rows if row["uid"] in turned - queued]
    look_again(connection, context, left, reason, when)


def look_again(
    connection: Connection, context: Context, rows: Sequence[Row], reason: str, when: datetime
) -> None:
    """Queue a look at doubted replicas, before everything else that is due ``when`` it is."""
    looks = [
        queue.NewOperation(OperationKind.VERIFY, row["oid"], row["uid"], reason, when, None, -1)
        for row in rows
    ]
    queue.insert_operations(connection, looks, context.actor, context.clock())
