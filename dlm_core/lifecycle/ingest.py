"""The two-step form of the SKA's ingest: an item first, then its payload, by whatever means."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import Connection

from dlm_core.catalogue import items as catalogue
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.items import Terms
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
        if the uri is malformed.
    AlreadyExistsError
        if there is such an item.
    """
    uri_path(uri)
    terms.check(context.clock())
    oid = new_id()

    def insert(connection: Connection) -> None:
        if rows(connection, "SELECT FROM data_item WHERE uri = :uri LIMIT 1", uri=uri):
            raise AlreadyExistsError(noun="data item", key=uri)
        run(
            connection,
            """INSERT INTO data_item (oid, uri, uri_bucket, target_phase, collection_id, owner,
                                      metadata, expires_at, created_at)
               VALUES (:oid, :uri, :bucket, :phase, CAST(:collection AS uuid), :owner,
                       CAST(:metadata AS jsonb), CAST(:expires AS timestamptz), :now)""",
            oid=oid,
            uri=uri,
            bucket=uri_bucket(uri),
            phase=terms.target_phase,
            collection=terms.collection_id,
            owner=terms.owner,
            metadata=catalogue.jsonb(metadata),
            expires=terms.item_end(context.clock()),
            now=context.clock(),
        )

    context.transact(insert)
    return oid


def set_uri(
    context: Context,
    oid: uuid.UUID,
    storage: str,
    path: str,
    kind: PayloadKind = PayloadKind.FILE,
) -> uuid.UUID:
    """Tell where the payload of an INITIALISED item lies, or will; the uid of its replica. Telling
    the same place again changes nothing.

    Raises
    ------
    NotFoundError, IllegalTransitionError, InvalidValueError
    AlreadyExistsError
        if the item has another place on the storage, or the place is another item's.
    """
    place = _place(path)
    row = storage_by_name(context, storage)
    uid = new_id()

    def insert(connection: Connection) -> uuid.UUID:
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
            storage=row["storage_id"],
            oid=oid,
            path=place,
        )
        for one in taken:
            if (one["oid"], one["path"]) == (oid, place):
                return cast(uuid.UUID, one["uid"])
            where = f"{storage}:{one['path']}"
            raise AlreadyExistsError(noun=f"the payload of {one['uri']} at", key=where)
        run(
            connection,
            "UPDATE data_item SET kind = :kind WHERE oid = :oid AND kind <> :kind",
            kind=kind.value,
            oid=oid,
        )
        catalogue.insert_replica(
            connection, oid, uid, row["storage_id"], place, 0, None, None, context.clock()
        )
        return uid

    told: uuid.UUID = context.transact(insert)
    return told


def _place(path: str) -> str:
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

    def queue_admission(connection: Connection) -> None:
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

    context.transact(queue_admission)


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
    """Both steps for a payload that is there already: the item's oid.

    Raises
    ------
    NotFoundError, InvalidValueError
        no item was made.
    AlreadyExistsError, CatalogueError
        as the steps raise.
    """
    storage_by_name(context, storage)
    _place(path)
    oid = init_data_item(context, uri, metadata=metadata, terms=terms)
    set_uri(context, oid, storage, path, kind)
    set_state(context, oid, ItemState.READY)
    return oid


def set_metadata(context: Context, oid: uuid.UUID, metadata: Mapping[str, Any]) -> None:
    """Merge ``metadata`` into an item's, key by key at the top.

    Raises
    ------
    NotFoundError
    """

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
    found = rows(connection, "SELECT * FROM data_item WHERE oid = :oid FOR NO KEY UPDATE", oid=oid)
    if not found:
        raise NotFoundError("data item", oid)
    return found[0]
