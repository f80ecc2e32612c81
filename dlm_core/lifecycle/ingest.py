"""The two-step form of the SKA's ingest: an item first, then its payload, by whatever means."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Connection

from dlm_core.catalogue import items as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.items import Terms, check_key
from dlm_core.catalogue.urgency import Urgency, set_urgency
from dlm_core.errors import (
    AlreadyExistsError,
    IllegalTransitionError,
    InvalidValueError,
    NotFoundError,
)
from dlm_core.lifecycle.register import storage_by_name
from dlm_core.lifecycle.work import Context
from dlm_core.storages.port import PRIVATE
from dlm_core.types import (
    ItemState,
    OperationKind,
    PayloadKind,
    check_json,
    encode_path,
    new_id,
    uri_bucket,
    uri_path,
)

_DEFAULT_TERMS = Terms()


def init_data_item(
    context: Context,
    uri: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    terms: Terms = _DEFAULT_TERMS,
) -> uuid.UUID:
    """An INITIALISED item without a payload yet; its oid.

    Raises
    ------
    InvalidValueError
        if the uri is malformed, the metadata is no JSON object, or ``terms`` say when the copy
        expires, which :func:`set_uri` is told.
    NotFoundError
        if there is no such collection.
    AlreadyExistsError
        if there is such an item.
    """
    if terms.replica_expires_at is not None:
        raise InvalidValueError(
            what="terms", value="expiry of copies", expected="it given to set_uri, with the place"
        )
    _check_item(uri, metadata, terms, context.clock())
    oid: uuid.UUID = context.transact(
        lambda c: _insert_item(c, uri, metadata, terms, context.clock())
    )
    return oid


def _check_item(uri: str, metadata: Mapping[str, Any] | None, terms: Terms, now: datetime) -> None:
    uri_path(uri)
    terms.check(now)
    check_json("metadata", metadata or {})


def _insert_item(
    connection: Connection,
    uri: str,
    metadata: Mapping[str, Any] | None,
    terms: Terms,
    now: datetime,
) -> uuid.UUID:
    if rows(connection, "SELECT FROM data_item WHERE uri = :uri LIMIT 1", uri=uri):
        raise AlreadyExistsError(noun="data item", key=uri)
    catalogue.must_have_collection(connection, terms.collection_id)
    oid = new_id()
    run(
        connection,
        """INSERT INTO data_item (oid, uri, uri_bucket, target_phase, collection_id, owner,
                                  metadata, tags, expires_at, created_at)
           VALUES (:oid, :uri, :bucket, :phase, CAST(:collection AS uuid), :owner,
                   CAST(:metadata AS jsonb), CAST(:tags AS jsonb), CAST(:expires AS timestamptz),
                   :now)""",
        oid=oid,
        uri=uri,
        bucket=uri_bucket(uri),
        phase=terms.target_phase,
        collection=terms.collection_id,
        owner=terms.owner,
        metadata=catalogue.jsonb(metadata),
        tags=catalogue.jsonb(terms.tags),
        expires=terms.item_end(now),
        now=now,
    )
    if terms.urgency != Urgency():
        given = {"priority": terms.urgency.priority, "needed_by": terms.urgency.needed_by}
        set_urgency(connection, [oid], given)
    return oid


def set_uri(
    context: Context,
    oid: uuid.UUID,
    storage: str,
    path: str,
    kind: PayloadKind = PayloadKind.FILE,
    *,
    expires_at: datetime | None = None,
) -> uuid.UUID:
    """Tell where the payload of an INITIALISED item lies, or will; the uid of its replica, which
    expires at ``expires_at``. Telling the same place again changes nothing.

    Raises
    ------
    NotFoundError, IllegalTransitionError, InvalidValueError
    AlreadyExistsError
        if the item has another place on the storage, or the place is another item's.
    """
    where = _Where(storage_by_name(context, storage), _place(path), _kind(kind), expires_at)
    Terms(replica_expires_at=expires_at).check(context.clock())
    uid: uuid.UUID = context.transact(lambda c: _tell_place(c, oid, where, context.clock()))
    return uid


@dataclass(frozen=True, slots=True)
class _Where:
    """Where a payload lies: a storage's row and an encoded path."""

    storage: Mapping[str, Any]
    path: str
    kind: PayloadKind
    expires_at: datetime | None


def _tell_place(connection: Connection, oid: uuid.UUID, where: _Where, now: datetime) -> uuid.UUID:
    item = _item(connection, oid)
    if item["state"] != ItemState.INITIALISED:
        raise IllegalTransitionError(
            noun="item", key=item["uri"], old=item["state"], new="a first payload"
        )
    taken = rows(
        connection,
        """SELECT r.uid, r.oid, r.path, i.uri FROM replica r JOIN data_item i USING (oid)
            WHERE r.storage_id = :storage
              AND ((r.oid = :oid AND r.live) OR (r.path = :path AND r.owns_path))""",
        storage=where.storage["storage_id"],
        oid=oid,
        path=where.path,
    )
    for one in taken:
        if (one["oid"], one["path"]) == (oid, where.path):
            return cast(uuid.UUID, one["uid"])
        place = f"{where.storage['name']}:{one['path']}"
        raise AlreadyExistsError(noun=f"the payload of {one['uri']} at", key=place)
    run(
        connection,
        "UPDATE data_item SET kind = :kind WHERE oid = :oid AND kind <> :kind",
        kind=where.kind.value,
        oid=oid,
    )
    uid = new_id()
    catalogue.insert_replica(
        connection, oid, uid, where.storage["storage_id"], where.path, 0, None,
        where.expires_at, now,
    )  # fmt: skip
    return uid


def _kind(kind: str) -> PayloadKind:
    try:
        return PayloadKind(kind)
    except ValueError:
        known = " or ".join(PayloadKind)
        raise InvalidValueError(what="kind", value=kind, expected=known) from None


def _place(path: str) -> str:
    if not isinstance(path, str):
        raise InvalidValueError(what="path", value=path, expected="text")
    if path.split("/", 1)[0] == PRIVATE:
        raise InvalidValueError(
            what="path", value=path, expected=f"a place outside {PRIVATE}, which is the DLM's own"
        )
    return encode_path(path)


def set_state(context: Context, oid: uuid.UUID, state: str) -> None:
    """READY says that the payload has been written: its admission is queued, which reads it, at
    each place that was told. Saying it again changes nothing.

    Raises
    ------
    NotFoundError
        no such item, or no payload told by :func:`set_uri`.
    IllegalTransitionError
        for any other state or from any state but INITIALISED.
    """
    context.transact(lambda c: _queue_admission(c, context, oid, state))


def _queue_admission(connection: Connection, context: Context, oid: uuid.UUID, state: str) -> None:
    item = _item(connection, oid)
    if state != ItemState.READY or item["state"] != ItemState.INITIALISED:
        raise IllegalTransitionError(noun="item", key=item["uri"], old=item["state"], new=state)
    pending = rows(
        connection,
        """SELECT r.uid, EXISTS (
                  SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'admit'
                     AND o.state IN ('QUEUED', 'RUNNING')) AS asked
             FROM replica r WHERE r.oid = :oid AND r.state = 'PENDING' ORDER BY r.uid""",
        oid=oid,
    )
    if not pending:
        raise NotFoundError("payload of", item["uri"], "tell its place with set_uri first")
    now, why = context.clock(), "said to be written"
    admissions = [
        queue.NewOperation(OperationKind.ADMIT, oid, one["uid"], why, now)
        for one in pending
        if not one["asked"]
    ]
    queue.insert_operations(connection, admissions, context.actor, now)


def ingest_data_item(
    context: Context,
    uri: str,
    storage: str,
    path: str,
    *,
    kind: PayloadKind = PayloadKind.FILE,
    metadata: Mapping[str, Any] | None = None,
    terms: Terms = _DEFAULT_TERMS,
) -> uuid.UUID:
    """Both steps for a payload that is there already, in one transaction: the item's oid.

    Raises
    ------
    NotFoundError, InvalidValueError, AlreadyExistsError, IllegalTransitionError
        as the steps raise; no item was made.
    """
    _check_item(uri, metadata, terms, context.clock())
    row = storage_by_name(context, storage)
    where = _Where(row, _place(path), _kind(kind), terms.replica_expires_at)

    def ingest(connection: Connection) -> uuid.UUID:
        oid = _insert_item(connection, uri, metadata, terms, context.clock())
        _tell_place(connection, oid, where, context.clock())
        _queue_admission(connection, context, oid, ItemState.READY)
        return oid

    made: uuid.UUID = context.transact(ingest)
    return made


def set_metadata(context: Context, oid: uuid.UUID, metadata: Mapping[str, Any]) -> None:
    """Merge ``metadata`` into an item's, key by key at the top.

    Raises
    ------
    NotFoundError, InvalidValueError
    """
    check_json("metadata", metadata)

    def merge(connection: Connection) -> None:
        _item(connection, oid)
        run(
            connection,
            "UPDATE data_item SET metadata = metadata || CAST(:new AS jsonb) WHERE oid = :oid",
            new=catalogue.jsonb(metadata),
            oid=oid,
        )

    context.transact(merge)


def _item(connection: Connection, oid: uuid.UUID) -> Mapping[str, Any]:
    check_key("oid", oid)
    found = rows(connection, "SELECT * FROM data_item WHERE oid = :oid FOR NO KEY UPDATE", oid=oid)
    if not found:
        raise NotFoundError("data item", oid)
    return found[0]
