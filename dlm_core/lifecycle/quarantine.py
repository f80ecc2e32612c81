"""What was set aside as damaged: put there, and looked at again before anything is called lost.

A storage that reads good bytes wrongly twice has its replica condemned. The bytes are whole in
quarantine; here they are found and brought back. So they are from the trash, where they lie if the
catalogue is of the time before, or its storage did not tell of them once.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue import replicas as catalogue
from dlm_core.errors import (
    IntegrityError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
)
from dlm_core.lifecycle.fence import Fence
from dlm_core.lifecycle.work import Claim
from dlm_core.storages.port import QUARANTINE, Storage, quarantine_path, trash_path
from dlm_core.transfers.checksums import observe
from dlm_core.types import PayloadKind, decode_path

Row = Mapping[str, Any]
#: (operation, replica) of what is to be moved
Pair = tuple[uuid.UUID, uuid.UUID]


def set_aside(
    connection: Connection,
    claim: Claim,
    details: Mapping[uuid.UUID, Row],
    damaged: Sequence[Pair],
    storage: Storage,
) -> dict[uuid.UUID, StorageError | None]:
    """Quarantine what is still this worker's to judge; by uid the error if that failed."""
    operations = {uid: operation_id for operation_id, uid in damaged}
    guarded = Fence(connection).around(storage)
    return {
        uid: _quarantine(guarded, details[uid], [operations[uid], claim.token])
        for uid in _still_ours(connection, claim, details, damaged)
    }


def is_aside(storage: Storage, operation_id: uuid.UUID, uid: uuid.UUID) -> bool:
    """Whether an earlier try of this operation set a replica's bytes aside before it was lost.

    Raises
    ------
    StorageError
        if the storage cannot tell.
    """
    return storage.stat(quarantine_path(str(uid), operation_id.hex)) is not None


def _still_ours(
    connection: Connection, claim: Claim, details: Mapping[uuid.UUID, Row], pairs: Sequence[Pair]
) -> list[uuid.UUID]:
    """Locked: a copy may have been trashed, or made again in its place, since it was looked at."""
    held = queue.lock_claimed(connection, claim.token, [operation_id for operation_id, _ in pairs])
    uids = [uid for operation_id, uid in pairs if operation_id in held]
    now = catalogue.replica_details(connection, uids, lock=True)
    return [uid for uid in uids if now[uid]["state"] == details[uid]["state"]]


def _quarantine(storage: Storage, row: Row, tokens: Sequence[uuid.UUID]) -> StorageError | None:
    """Move damaged bytes to a visible place, the first of some that is free; the error if that
    failed."""
    for token in tokens:
        try:
            storage.rename(decode_path(row["path"]), quarantine_path(str(row["uid"]), token.hex))
            break
        except PayloadExistsError:
            continue  # of an earlier try that an object store was left with half done
        except PayloadNotFoundError:
            break  # gone already
        except StorageError as error:
            return error
    return None


def find_good(storage: Storage, rows: Sequence[Row]) -> dict[uuid.UUID, str]:
    """Where in quarantine, or in the trash, the good bytes of replicas lie, by uid; those without
    any are left out.

    Raises
    ------
    StorageError
        if the storage cannot tell.
    """
    found: dict[uuid.UUID, str] = {}
    aside = list_aside(storage, {str(row["uid"]) for row in rows})
    for row in rows:
        for path in sorted(aside.get(str(row["uid"]), ())):
            if is_payload(storage, path, row):
                found[row["uid"]] = path
                break
    return found


def list_aside(storage: Storage, wanted: Collection[str]) -> dict[str, set[str]]:
    """Paths in quarantine and in the trash, by the uid of the replica they were, of those
    ``wanted``.

    Raises
    ------
    StorageError
        if the storage cannot tell.
    """
    aside: dict[str, set[str]] = defaultdict(set)
    trash = {trash_path(uid): uid for uid in wanted}
    for path, found in storage.stat_many(trash).items():
        if found is not None:
            aside[trash[path]].add(path)
    if storage.stat(QUARANTINE) is None:
        return aside
    try:
        for entry in storage.walk(QUARANTINE):
            # <uid>.<token>, which is a file or a directory payload
            name = entry.path.removeprefix(f"{QUARANTINE}/").split("/", 1)[0]
            uid = name.partition(".")[0]
            if uid in wanted:
                aside[uid].add(f"{QUARANTINE}/{name}")
    except PayloadNotFoundError:
        pass  # cleared away at this moment
    return aside


def is_payload(storage: Storage, path: str, row: Row) -> bool:
    """True if what lies at ``path`` is read as the bytes of the replica's item."""
    try:
        seen = observe(storage, path, PayloadKind(row["kind"]))
    except (PayloadNotFoundError, PathRefusedError, IntegrityError):
        return False  # nothing, or of another kind
    return (seen.digest, seen.size) == (row["item_digest"], row["item_size"])


def bring_back(
    connection: Connection,
    claim: Claim,
    details: Mapping[uuid.UUID, Row],
    found: Mapping[Pair, str],
    storage: Storage,
) -> dict[uuid.UUID, StorageError | None]:
    """Move good bytes from where they were found to their place, which must be free; by uid the
    error if that failed. They count only when they have been read there."""
    paths = {uid: path for (_, uid), path in found.items()}
    moved: dict[uuid.UUID, StorageError | None] = {}
    guarded = Fence(connection).around(storage)
    for uid in _still_ours(connection, claim, details, list(found)):
        try:
            guarded.rename(paths[uid], decode_path(details[uid]["path"]))
            moved[uid] = None
        except StorageError as error:
            moved[uid] = error
    back = {uid: paths[uid] for uid, error in moved.items() if error is None}
    if back:
        catalogue.note_brought_back(connection, back)
    return moved
