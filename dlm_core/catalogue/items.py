"""Set-based statements of registration: announce, admit, watch."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from dlm_core.catalogue.engine import KEY, copy_rows, rows, run
from dlm_core.catalogue.replicas import CHECKED
from dlm_core.catalogue.urgency import STEP, Urgency
from dlm_core.errors import IllegalTransitionError, InvalidValueError, NotFoundError
from dlm_core.types import (
    Observation,
    PayloadKind,
    Phase,
    StorageMode,
    check_json,
    encode_path,
    new_key,
    uri_bucket,
)

_NOT_READ = (StorageMode.OFFLINE, StorageMode.AUDITING, StorageMode.LOST, StorageMode.RETIRED)
#: of the catalogue's moments
_END_OF_TIME = datetime(2200, 1, 1, tzinfo=UTC)
_STAGED = {
    "uri": "text", "uri_bucket": "text", "path": "text", "size": "int8", "mtime": "float8",
    "kind": "text", "digest": "text", "oid": KEY, "uid": KEY, "operation_id": KEY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Announcement:
    """A payload that is said to lie on a storage; ``path`` is encoded, ``size`` in bytes.

    ``digest`` is a claim (``sha256:<hex>``) to be compared when the payload is read.
    """

    uri: str
    path: str
    size: int
    mtime: float | None = None
    kind: PayloadKind = PayloadKind.FILE
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all items of one registration."""

    target_phase: str = "SOLID"
    collection_id: uuid.UUID | None = None
    owner: str | None = None
    tags: dict[str, Any] | None = None
    item_expires_at: datetime | None = None
    replica_expires_at: datetime | None = None
    urgency: Urgency = field(default_factory=Urgency)

    def check(self, now: datetime) -> None:
        """Refuse what would end before it began, and what :meth:`check_words` refuses.

        Raises
        ------
        InvalidValueError
        """
        ends = {
            "expiry of items": self.item_expires_at,
            "expiry of copies": self.replica_expires_at,
            "deadline": self.urgency.needed_by,
        }
        for what, end in ends.items():
            if end is not None:
                _check_end(what, end, now)
        self.check_words()

    def check_words(self) -> None:
        """Refuse a phase that is none, a collection that has no key, an owner that cannot be shown
        on a line, and tags that are no JSON object.

        Raises
        ------
        InvalidValueError
        """
        if self.target_phase not in list(Phase):
            expected = ", ".join(Phase)
            raise InvalidValueError(
                what="target phase", value=self.target_phase, expected=f"one of {expected}"
            )
        if self.collection_id is not None:
            check_key("collection", self.collection_id)
        owner = self.owner
        if owner is not None:
            if not isinstance(owner, str) or not (owner.strip() and owner.isprintable()):
                raise InvalidValueError(what="owner", value=owner, expected="a name on one line")
        check_json("tags", self.tags or {})

    def item_end(self, now: datetime) -> datetime | None:
        """When an item that is announced now expires; a time that came meanwhile is now."""
        return self.item_expires_at and max(self.item_expires_at, now)


def _check_end(what: str, end: datetime, now: datetime) -> None:
    # programs give what they have
    if not isinstance(end, datetime) or end.tzinfo is None:
        raise InvalidValueError(what=what, value=str(end), expected="a datetime with its zone")
    # of who said 'now' a moment ago it is not the past
    if end < now - timedelta(minutes=1):
        told = f"{end:%Y-%m-%dT%H:%M:%SZ}"
        raise InvalidValueError(what=what, value=told, expected="a time to come")
    if end >= _END_OF_TIME:
        raise InvalidValueError(what=what, value=str(end), expected="a time before 2200")


def check_key(what: str, key: object) -> None:
    """Refuse what is no UUID.

    Raises
    ------
    InvalidValueError
    """
    try:
        uuid.UUID(str(key))
    except ValueError:
        raise InvalidValueError(what=what, value=key, expected="a key, a UUID") from None


def must_have_collection(connection: Connection, collection_id: uuid.UUID | None) -> None:
    """Refuse the key of a collection that is not there; None is no collection.

    Raises
    ------
    NotFoundError
    """
    found = "SELECT FROM collection WHERE collection_id = CAST(:id AS uuid)"
    if collection_id is not None and not rows(connection, found, id=collection_id):
        raise NotFoundError("collection", collection_id)


@dataclass(frozen=True, slots=True)
class Merged:
    """What a chunk of announcements did: numbers, the rows that need a closer look, and those of
    items that have gone: they get no copies any more."""

    created: int
    replicated: int
    known: list[dict[str, Any]]
    gone: list[dict[str, Any]] = field(default_factory=list)


def announce(
    connection: Connection,
    storage_id: uuid.UUID,
    announcements: Iterable[Announcement],
    terms: Terms,
    actor: str,
    now: datetime,
) -> Merged:
    """Merge a chunk: new items with a PENDING replica, new replicas of known items, and an admit
    operation for each. ``known`` are rows whose item has a live replica on the storage, or whose
    path there belongs to another item; ``gone`` are other rows of EXPIRED or DELETED items.

    Raises
    ------
    IllegalTransitionError
        if the storage is not read from: see :func:`must_be_read`.
    """
    must_be_read(_must_be_in_use(connection, storage_id))
    copy_rows(
        connection,
        "announced",
        _STAGED,
        (
            (a.uri, uri_bucket(a.uri), a.path, a.size, a.mtime, a.kind.value, a.digest,
             new_key(), new_key(), new_key())
            for a in announcements
        ),
    )  # fmt: skip
    merging = _Merging(connection, storage_id, terms, actor, now)
    if not _settle_taken(connection, storage_id):
        try:
            # most often all is new: to look for each row whether it is costs as much as its index
            with connection.begin_nested():
                return merging("")
        except IntegrityError:
            pass
    return merging(" ON CONFLICT DO NOTHING")


@dataclass(frozen=True, slots=True)
class _Merging:
    """Items, replicas and operations of the chunk that is staged."""

    connection: Connection
    storage_id: uuid.UUID
    terms: Terms
    actor: str
    now: datetime

    def __call__(self, conflict: str) -> Merged:
        """Merge; ``conflict`` says what becomes of rows that are there already."""
        count = _count(self.connection)
        created = self._insert_items(conflict)
        gone: list[dict[str, Any]] = []
        if created != count:
            _settle_known(self.connection)
            gone = _take_gone(self.connection, self.storage_id)
            count -= len(gone)
        new = self._insert_replicas(conflict)
        # a staged uid is in the catalogue only if it was made just now
        made = "" if new == count else " AND EXISTS (SELECT FROM replica r WHERE r.uid = a.uid)"
        self._insert_operations(made)
        known = [] if new == count else _known(self.connection, self.storage_id)
        return Merged(created, new - created, known, gone)

    def _insert_items(self, conflict: str) -> int:
        return run(
            self.connection,
            f"""INSERT INTO data_item (oid, uri, uri_bucket, kind, size, digest, target_phase,
                                       collection_id, owner, tags, expires_at, created_at)
                SELECT oid, uri, uri_bucket, kind, size, digest, :phase, CAST(:collection AS uuid),
                       :owner, CAST(:tags AS jsonb), CAST(:expires AS timestamptz), :now
                  FROM announced{conflict}""",
            phase=self.terms.target_phase,
            collection=self.terms.collection_id,
            owner=self.terms.owner,
            tags=Jsonb(self.terms.tags or {}),
            expires=self.terms.item_end(self.now),
            now=self.now,
        )

    def _insert_replicas(self, conflict: str) -> int:
        return run(
            self.connection,
            f"""INSERT INTO replica (uid, oid, storage_id, path, size, mtime, expires_at,
                                     created_at, accessed_at, check_from)
                SELECT uid, oid, :storage, path, size, mtime, CAST(:expires AS timestamptz), :now,
                       :now, :now FROM announced{conflict}""",
            storage=self.storage_id,
            expires=self.terms.replica_expires_at,
            now=self.now,
        )

    def _insert_operations(self, made: str) -> None:
        """An admit operation and its urgency for each replica that was made."""
        urgency = self.terms.urgency
        run(
            self.connection,
            f"""INSERT INTO operation (operation_id, kind, oid, uid, reason, actor, due_at,
                                       created_at, priority, deadline)
                SELECT operation_id, 'admit', oid, uid, 'announced', :actor, :now, :now,
                       :priority, :needed_by FROM announced a WHERE true{made}""",
            priority=urgency.priority * STEP,
            needed_by=urgency.needed_by,
            actor=self.actor,
            now=self.now,
        )
        if urgency != Urgency():
            run(
                self.connection,
                f"""INSERT INTO urgency (oid, priority, needed_by)
                    SELECT DISTINCT oid, CAST(:priority AS int2), CAST(:needed_by AS timestamptz)
                      FROM announced a WHERE true{made}
                    ON CONFLICT DO NOTHING""",
                priority=urgency.priority,
                needed_by=urgency.needed_by,
            )


def must_be_read(storage: Mapping[str, Any]) -> None:
    """What registration asks of a storage: offline, auditing, lost and retired ones are not read.

    Raises
    ------
    IllegalTransitionError
    """
    if storage["mode"] in _NOT_READ:
        name, mode = storage["name"], storage["mode"]
        raise IllegalTransitionError(noun="storage", key=name, old=mode, new="use")


def _must_be_in_use(connection: Connection, storage_id: uuid.UUID) -> dict[str, Any]:
    """Refuse a retired or lost storage; one that is to be retired now waits for us, or we for it.
    Returns its name and mode."""
    found = rows(
        connection,
        """SELECT name, mode FROM storage
            WHERE storage_id = :id AND mode NOT IN ('retired', 'lost') FOR KEY SHARE""",
        id=storage_id,
    )
    if not found:
        known = rows(
            connection, "SELECT name, mode FROM storage WHERE storage_id = :id", id=storage_id
        )
        name, mode = known[0].values() if known else (storage_id, "retired")
        raise IllegalTransitionError(noun="storage", key=name, old=mode, new="use")
    return found[0]


def jsonb(value: Mapping[str, Any] | None) -> Jsonb:
    """A mapping as a jsonb parameter; None is an empty one."""
    return Jsonb(dict(value or {}))


def _count(connection: Connection) -> int:
    return int(rows(connection, "SELECT count(*) AS n FROM announced")[0]["n"])


def _settle_taken(connection: Connection, storage_id: uuid.UUID) -> int:
    """A place that is another item's makes no new item: the key that is there already is refused.
    Returns how many places are taken."""
    return run(
        connection,
        """UPDATE announced a SET oid = r.oid FROM replica r
            WHERE r.storage_id = :storage AND r.path = a.path AND r.owns_path""",
        storage=storage_id,
    )


def _settle_known(connection: Connection) -> None:
    """Announcements of uris that were there before belong to the newest version of the item."""
    run(
        connection,
        """UPDATE announced a SET oid = i.oid FROM (
             SELECT DISTINCT ON (uri) uri, oid FROM data_item
              WHERE uri IN (SELECT uri FROM announced) ORDER BY uri, version DESC) i
            WHERE a.uri = i.uri AND a.oid <> i.oid""",
    )
    # against a withdrawal at this moment, which ends an item that has no other announcement
    run(
        connection,
        """SELECT FROM data_item WHERE state = 'INITIALISED'
              AND oid = ANY(ARRAY(SELECT oid FROM announced)) ORDER BY oid FOR KEY SHARE""",
    )


def _take_gone(connection: Connection, storage_id: uuid.UUID) -> list[dict[str, Any]]:
    """Take announcements of EXPIRED and DELETED items off the chunk: nothing keeps copies of them.
    What still lies where it is said to lie is known."""
    return rows(
        connection,
        """DELETE FROM announced a USING data_item i
            WHERE i.oid = a.oid AND i.state IN ('EXPIRED', 'DELETED') AND NOT EXISTS (
                  SELECT FROM replica r WHERE r.storage_id = :storage
                     AND ((r.oid = a.oid AND r.live) OR (r.path = a.path AND r.owns_path)))
           RETURNING a.uri, a.path, a.size, a.mtime, a.kind, a.digest, i.state, i.version""",
        storage=storage_id,
    )


def _known(connection: Connection, storage_id: uuid.UUID) -> list[dict[str, Any]]:
    return rows(
        connection,
        """SELECT a.uri, a.path AS announced_path, a.size AS announced_size, a.digest AS claimed,
                  a.mtime AS announced_mtime, a.kind, i.kind AS item_kind, r.uid, r.oid, r.path, r.size, r.mtime,
                  r.state, r.checked_at, i.digest, i.state AS item_state, i.version, i.uri AS owner_uri
             FROM announced a
             JOIN LATERAL (
               SELECT * FROM replica r
                WHERE r.storage_id = :storage
                  AND ((r.oid = a.oid AND r.live) OR (r.path = a.path AND r.owns_path))
                ORDER BY (r.oid = a.oid) DESC LIMIT 1) r ON true
             JOIN data_item i ON i.oid = r.oid
            WHERE r.uid <> a.uid""",
        storage=storage_id,
    )


def update_mtimes(connection: Connection, pairs: Sequence[tuple[uuid.UUID, float | None]]) -> None:
    """Payloads that were touched but not changed: keep their new time."""
    run(
        connection,
        """UPDATE replica r SET mtime = u.mtime
             FROM unnest(CAST(:uids AS uuid[]), CAST(:times AS float8[])) AS u(uid, mtime)
            WHERE r.uid = u.uid""",
        uids=[uid for uid, _ in pairs],
        times=[mtime for _, mtime in pairs],
    )


def insert_replica(
    connection: Connection,
    oid: uuid.UUID,
    uid: uuid.UUID,
    storage_id: uuid.UUID,
    path: str,
    size: int,
    mtime: float | None,
    expires_at: datetime | None,
    now: datetime,
) -> None:
    """One announced replica.

    Raises
    ------
    IllegalTransitionError
        if the storage is retired.
    """
    _must_be_in_use(connection, storage_id)
    run(
        connection,
        """INSERT INTO replica (uid, oid, storage_id, path, size, mtime, expires_at, created_at,
                                accessed_at, check_from)
           VALUES (:uid, :oid, :storage, :path, :size, :mtime, CAST(:expires AS timestamptz),
                   :now, :now, :now)""",
        uid=uid, oid=oid, storage=storage_id, path=path, size=size, mtime=mtime,
        expires=expires_at, now=now,
    )  # fmt: skip


# --- admission ------------------------------------------------------------------------------------

_ADMITTED = {
    "uid": "uuid", "oid": "uuid", "size": "int8", "digest": "text", "kind": "text",
    "content_type": "text", "metadata": "jsonb",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Admitted:
    """A payload that was read, with what its metadata extractors found."""

    uid: uuid.UUID
    oid: uuid.UUID
    seen: Observation
    metadata: dict[str, Any]


def select_announced(
    connection: Connection, uids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, dict[str, Any]]:
    """What admission has to know of replicas, by uid; ``path`` is encoded."""
    found = rows(
        connection,
        """SELECT r.uid, r.oid, r.storage_id, r.path, r.size, r.state, i.kind,
                  i.digest AS item_digest
             FROM replica r JOIN data_item i USING (oid) WHERE r.uid = ANY(:uids)""",
        uids=list(uids),
    )
    return {row["uid"]: row for row in found}


def admit(connection: Connection, admitted: Sequence[Admitted], now: datetime) -> set[uuid.UUID]:
    """INITIALISED items become READY with what was seen, their manifests are kept, and replicas
    with the item's bytes become READY. Returns the uids that did; others had other bytes."""
    copy_rows(
        connection,
        "admitted",
        _ADMITTED,
        (
            (a.uid, a.oid, a.seen.size, a.seen.digest, a.seen.kind.value, a.seen.content_type,
             Jsonb(a.metadata) if a.metadata else None)
            for a in admitted
        ),
    )  # fmt: skip
    run(
        connection,
        """UPDATE data_item i SET state = 'READY', size = a.size, digest = a.digest, kind = a.kind,
                  content_type = a.content_type, metadata = i.metadata || coalesce(a.metadata, '{}')
             FROM admitted a WHERE i.oid = a.oid AND i.state = 'INITIALISED'
              AND (i.digest IS NULL OR i.digest = a.digest)""",
    )
    _insert_manifests(connection, admitted)
    refused = rows(
        connection,
        f"""WITH let_in AS (
             UPDATE replica r SET state = 'READY', size = a.size, digest = a.digest,
                    checked_at = :now, check_from = {CHECKED}
               FROM admitted a, data_item i
              WHERE r.uid = a.uid AND i.oid = a.oid AND r.state = 'PENDING'
                AND i.state IN ('READY', 'CORRUPTED', 'EXPIRED')
                AND i.digest = a.digest AND i.size = a.size
             RETURNING r.uid)
           SELECT uid FROM admitted a WHERE NOT EXISTS (SELECT FROM let_in WHERE let_in.uid = a.uid)""",
        now=now,
    )
    return {one.uid for one in admitted} - {row["uid"] for row in refused}


def _insert_manifests(connection: Connection, admitted: Sequence[Admitted]) -> None:
    if not any(one.seen.manifest for one in admitted):
        return
    copy_rows(
        connection,
        "admitted_file",
        {"oid": "uuid", "path": "text", "size": "int8", "digest": "text"},
        (
            (one.oid, encode_path(entry.path), entry.size, entry.digest)
            for one in admitted
            for entry in one.seen.manifest
        ),
    )
    run(
        connection,
        """INSERT INTO manifest_file SELECT f.* FROM admitted_file f
             JOIN data_item i USING (oid) JOIN admitted a USING (oid) WHERE i.digest = a.digest
           ON CONFLICT DO NOTHING""",
    )


def item_by_uri(connection: Connection, uri: str, *, lock: bool = False) -> dict[str, Any] | None:
    """The newest version of an item, or None."""
    found = rows(
        connection,
        "SELECT * FROM data_item WHERE uri = :uri ORDER BY version DESC LIMIT 1"
        + (" FOR NO KEY UPDATE" if lock else ""),
        uri=uri,
    )
    return found[0] if found else None
