"""Look at items: find, list, explain."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import IllegalTransitionError, NotFoundError

# one round trip: the newest version (or the one asked for) and its replicas as JSON
_ITEM = text(
    """SELECT i.oid, i.uri, i.version, i.name, i.state, i.kind, i.size, i.digest, i.content_type,
              i.target_phase, i.phase_weight, i.shortfall, i.collection_id, i.owner, i.metadata,
              i.tags, i.created_at, i.expires_at, i.expiry_reason,
              (SELECT coalesce(json_agg(json_build_object('uid', r.uid, 'storage', s.name,
                 'state', r.state, 'path', r.path, 'size', r.size, 'phase', s.phase,
                 'checked_at', r.checked_at, 'expires_at', r.expires_at) ORDER BY r.uid), '[]')
                 FROM replica r JOIN storage s USING (storage_id) WHERE r.oid = i.oid) AS replicas
         FROM data_item i
        WHERE i.uri = :uri AND (CAST(:version AS integer) IS NULL OR i.version = :version)
        ORDER BY i.version DESC LIMIT 1"""
)


def get_item(connection: Connection, uri: str, version: int | None = None) -> dict[str, Any]:
    """An item (its newest version unless told) with its replicas.

    Raises
    ------
    NotFoundError
        with a uri that begins alike, if there is one.
    """
    row = connection.execute(_ITEM, {"uri": uri, "version": version}).mappings().first()
    if row is None:
        raise NotFoundError("data item", uri, _hint(connection, uri))
    return dict(row)


def _hint(connection: Connection, uri: str) -> str:
    near = rows(
        connection,
        "SELECT uri FROM data_item WHERE uri >= :uri ORDER BY uri LIMIT 1",
        uri=uri.rpartition("/")[0] or uri.partition(":")[0],
    )
    return f"did you mean {near[0]['uri']!r}?" if near else "see 'dlm item list'"


def list_items(
    connection: Connection,
    *,
    state: str | None = None,
    prefix: str | None = None,
    collection: str | None = None,
    below_target: bool = False,
    limit: int = 100,
    after: str | None = None,
) -> list[dict[str, Any]]:
    """Items by uri, ``limit`` at a time from the one that follows ``after`` on (a keyset page)."""
    conditions, values = ["uri > :after"], {"after": after or "", "limit": limit}
    for condition, key, value in (
        ("state = :state", "state", state),
        ("starts_with(uri, :prefix) AND uri >= :prefix", "prefix", prefix),
        (
            "collection_id = (SELECT collection_id FROM collection WHERE name = :collection)",
            "collection",
            collection,
        ),
    ):
        if value is not None:
            conditions.append(condition)
            values[key] = value
    if below_target:
        conditions.append("shortfall IS NOT NULL")
    return rows(
        connection,
        f"""SELECT oid, uri, version, state, kind, size, digest, target_phase, phase_weight,
                   shortfall, expires_at FROM data_item WHERE {" AND ".join(conditions)}
             ORDER BY uri, version LIMIT :limit""",
        **values,
    )


def uris_of(connection: Connection, oids: Sequence[str | uuid.UUID]) -> dict[str, str]:
    """Uris by oid (as text)."""
    found = rows(
        connection,
        "SELECT oid, uri FROM data_item WHERE oid = ANY(CAST(:oids AS uuid[]))",
        oids=[str(oid) for oid in oids],
    )
    return {str(row["oid"]): row["uri"] for row in found}


def item_events(connection: Connection, oid: uuid.UUID, limit: int = 1000) -> list[dict[str, Any]]:
    """The newest ``limit`` events of an item and its replicas, oldest first."""
    found = rows(
        connection,
        """SELECT e.seq, e.at, e.noun, e.action, s.name AS storage, e.old_state, e.new_state,
                  e.actor, e.detail
             FROM event e LEFT JOIN storage s USING (storage_id)
            WHERE e.oid = :oid ORDER BY e.seq DESC LIMIT :limit""",
        oid=oid,
        limit=limit,
    )
    return found[::-1]


def explain_item(connection: Connection, uri: str, version: int | None = None) -> dict[str, Any]:
    """Why an item has the copies it has: what it needs and has, each replica with its reasons and
    certificates, holds, what is queued, running and failed, and when it is looked at again.

    Raises
    ------
    NotFoundError
    """
    item = get_item(connection, uri, version)
    oid = item["oid"]
    return {
        **{key: value for key, value in item.items() if key not in ("metadata", "replicas")},
        "reached_weight": _weight(connection, oid),
        "replicas": _replicas(connection, oid),
        "holds": rows(
            connection,
            """SELECT h.hold_id, h.reason, h.actor, h.ends_at FROM data_item i,
                      LATERAL holds_on(i.oid, i.uri, i.collection_id) h WHERE i.oid = :oid""",
            oid=oid,
        ),
        "operations": rows(
            connection,
            """SELECT o.kind, o.state, s.name AS storage, o.reason, o.attempts, o.due_at, o.actor,
                      o.error_code, o.error, o.finished_at
                 FROM replica r JOIN storage s USING (storage_id) JOIN operation o ON o.uid = r.uid
                WHERE r.oid = :oid ORDER BY o.operation_id DESC LIMIT 50""",
            oid=oid,
        ),
        "certificates": rows(
            connection,
            """SELECT d.deletion_id, d.step, d.basis, s.name AS storage, d.reason, d.survivors,
                      d.survivor_weight, d.actor, d.proved_at, d.valid_until
                 FROM replica r JOIN deletion d ON d.uid = r.uid
                 JOIN storage s ON s.storage_id = d.storage_id
                WHERE r.oid = :oid ORDER BY d.deletion_id""",
            oid=oid,
        ),
        "looked_at_again": (
            rows(connection, "SELECT due_at FROM evaluation WHERE oid = :oid", oid=oid)
            or [{"due_at": None}]
        )[0]["due_at"],
    }


def _weight(connection: Connection, oid: uuid.UUID) -> int:
    found = rows(connection, "SELECT weight FROM item_phase WHERE oid = :oid", oid=oid)
    return int(found[0]["weight"]) if found else 0


def _replicas(connection: Connection, oid: uuid.UUID) -> list[dict[str, Any]]:
    return rows(
        connection,
        """SELECT r.uid, s.name AS storage, l.name AS location, s.mode, s.phase, r.state, r.path,
                  r.size, r.checked_at, r.expires_at, r.expiry_reason, r.trashed_at, r.absent_at
             FROM replica r JOIN storage s USING (storage_id) JOIN location l USING (location_id)
            WHERE r.oid = :oid ORDER BY r.uid""",
        oid=oid,
    )


def set_item_expiry(
    connection: Connection,
    uri: str,
    expires_at: datetime | None,
    reason: str,
    version: int | None = None,
) -> uuid.UUID:
    """When an item is to expire (None: never), and why; its oid.

    Raises
    ------
    NotFoundError
    IllegalTransitionError
        for an item that is not READY, CORRUPTED or INITIALISED.
    """
    item = get_item(connection, uri, version)
    if item["state"] in ("EXPIRED", "DELETED"):
        raise IllegalTransitionError(
            noun="item", key=uri, old=item["state"], new="another time of expiry"
        )
    run(
        connection,
        """UPDATE data_item SET expiry_reason = :reason, expires_at = CASE
                  -- greatest() passes over NULL: 'never' would become 'at once'
                  WHEN CAST(:at AS timestamptz) IS NULL THEN NULL
                  ELSE greatest(CAST(:at AS timestamptz), created_at) END WHERE oid = :oid""",
        at=expires_at,
        reason=reason if expires_at else None,
        oid=item["oid"],
    )
    oid: uuid.UUID = item["oid"]
    return oid


def failed_operations(connection: Connection, limit: int = 50) -> list[dict[str, Any]]:
    """The newest FAILED operations, with their item."""
    return rows(
        connection,
        """SELECT o.operation_id, o.kind, i.uri, s.name AS storage, o.error_code, o.error,
                  o.attempts, o.finished_at
             FROM operation o JOIN data_item i USING (oid) JOIN replica r ON r.uid = o.uid
             JOIN storage s USING (storage_id)
            WHERE o.state = 'FAILED' ORDER BY o.finished_at DESC LIMIT :limit""",
        limit=limit,
    )


