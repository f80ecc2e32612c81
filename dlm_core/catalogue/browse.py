"""Look at items: find, list, explain."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.expiring import item_due
from dlm_core.errors import IllegalTransitionError, InvalidValueError, NotFoundError
from dlm_core.types import uri_path

#: above every character that may follow a prefix, in bytewise order
_END = "\U0010ffff"
_LAST_VERSION = 2**31 - 1

_LOST = """state IN ('READY', 'CORRUPTED') AND NOT EXISTS (
  SELECT FROM replica r JOIN storage s USING (storage_id)
   WHERE r.oid = i.oid AND r.state = 'READY' AND s.mode NOT IN ('lost', 'retired'))"""

# one round trip: the newest version (or the one asked for) and its replicas as JSON
_ITEM = text(
    """SELECT i.oid, i.uri, i.version, i.name, i.state, i.kind, i.size, i.digest, i.content_type,
              i.target_phase, i.phase_weight, i.shortfall, i.collection_id, i.owner, i.metadata,
              i.tags, i.created_at, i.expires_at, i.expiry_reason, coalesce(u.priority, 0) AS priority,
              u.needed_by,
              (SELECT coalesce(json_agg(json_build_object('uid', r.uid, 'storage', s.name,
                 'state', r.state, 'path', r.path, 'size', r.size, 'phase', s.phase,
                 'checked_at', r.checked_at, 'expires_at', r.expires_at) ORDER BY r.uid), '[]')
                 FROM replica r JOIN storage s USING (storage_id) WHERE r.oid = i.oid) AS replicas
         FROM data_item i LEFT JOIN urgency u USING (oid)
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
        what = uri if version is None else f"{uri}#{version}"
        raise NotFoundError("data item", what, _hint(connection, uri, version))
    item = dict(row)
    for replica in item["replicas"]:  # JSON has no times
        for key in ("checked_at", "expires_at"):
            if replica[key] is not None:
                replica[key] = datetime.fromisoformat(replica[key])
    return item


def _hint(connection: Connection, uri: str, version: int | None) -> str:
    """The newest version, the first item below the uri, or one below a folder above it."""
    newest = "SELECT max(version) AS n FROM data_item WHERE uri = :uri"
    if version is not None and (n := rows(connection, newest, uri=uri)[0]["n"]) is not None:
        return f"its newest version is {n}"
    prefix = uri
    while prefix:
        near = rows(
            connection,
            "SELECT uri FROM data_item WHERE uri >= :low AND uri < :high ORDER BY uri LIMIT 1",
            low=prefix,
            high=prefix + _END,
        )
        if near:
            return f"did you mean {near[0]['uri']!r}?"
        prefix = re.sub(r"[^/:]*[/:]?$", "", prefix)
    return "see 'dlm item list'"


def list_items(
    connection: Connection,
    *,
    state: str | None = None,
    prefix: str | None = None,
    collection: str | None = None,
    storage: str | None = None,
    below_target: bool = False,
    lost: bool = False,
    limit: int = 100,
    after: str | None = None,
) -> list[dict[str, Any]]:
    """Items by uri and version, ``limit`` at a time (a keyset page).

    Parameters
    ----------
    prefix : how the uri begins; with ``*`` (anything) or ``?`` (one character) a whole pattern
    collection, storage : names; items with a replica there that is not DELETED
    lost : only those that have not expired and of which no good copy is known
    after : ``uri`` or ``uri#version`` of the last item of the page before

    Raises
    ------
    NotFoundError
        no such collection or storage.
    InvalidValueError
        ``after`` is none of these.
    """
    conditions, values = _conditions(connection, state, prefix, collection, storage)
    if below_target:
        conditions.append("shortfall IS NOT NULL")
    if lost:
        conditions.append(_LOST)
    if after:
        uri, mark, version = after.partition("#")
        uri_path(uri)
        if mark and not re.fullmatch("[1-9][0-9]{0,9}", version):
            raise InvalidValueError(what="after", value=after, expected="uri#version")
        conditions.append("(uri, version) > (:after, :after_version)")
        values["after"] = uri
        values["after_version"] = int(version) if mark else _LAST_VERSION
    return rows(
        connection,
        f"""SELECT oid, uri, version, state, kind, size, digest, target_phase, phase_weight,
                   shortfall, expires_at FROM data_item i
             WHERE {" AND ".join(conditions) or "true"}
             ORDER BY uri, version LIMIT :limit""",
        **values,
        limit=limit,
    )


def _conditions(
    connection: Connection,
    state: str | None,
    prefix: str | None,
    collection: str | None,
    storage: str | None,
) -> tuple[list[str], dict[str, Any]]:
    conditions: list[str] = []
    values: dict[str, Any] = {}
    if state is not None:
        conditions.append("state = :state")
        values["state"] = state
    if prefix:
        literal = re.split(r"[*?]", prefix, maxsplit=1)[0]
        # a range of the index on both sides: a page that is not full ends where the prefix does
        conditions.append("uri >= :low AND uri < :high")
        values |= {"low": literal, "high": literal + _END}
        if literal != prefix:
            escaped = re.sub(r"([\\%_])", r"\\\1", prefix)
            conditions.append("uri LIKE :pattern")
            values["pattern"] = escaped.replace("*", "%").replace("?", "_")
    if collection is not None:
        conditions.append("collection_id = :collection")
        values["collection"] = _id_of(connection, "collection", collection)
    if storage is not None:
        conditions.append(
            """EXISTS (SELECT FROM replica r WHERE r.oid = i.oid AND r.storage_id = :storage
                          AND r.state <> 'DELETED')"""
        )
        values["storage"] = _id_of(connection, "storage", storage)
    return conditions, values


def _id_of(connection: Connection, noun: str, name: str) -> uuid.UUID:
    # the noun is ours, never a user's
    found = rows(connection, f"SELECT {noun}_id AS id FROM {noun} WHERE name = :name", name=name)
    if not found:
        raise NotFoundError(noun, name)
    key: uuid.UUID = found[0]["id"]
    return key


def names_of(
    connection: Connection, oids: Iterable[str | uuid.UUID]
) -> dict[str, tuple[str, int | None]]:
    """(uri, version) by oid (as text); the version is None where there is no other."""
    found = rows(
        connection,
        """SELECT i.oid, i.uri, i.version, EXISTS (SELECT FROM data_item x WHERE x.uri = i.uri
                                                     AND x.version <> i.version) AS several
             FROM data_item i WHERE i.oid = ANY(CAST(:oids AS uuid[]))""",
        oids=list({str(oid) for oid in oids}),
    )
    return {
        str(row["oid"]): (row["uri"], row["version"] if row["several"] else None) for row in found
    }


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
        "plans": rows(
            connection,
            """SELECT DISTINCT p.plan_id, p.state, p.reason, p.valid_until
                 FROM plan_reserved k JOIN plan p USING (plan_id) WHERE k.oid = :oid""",
            oid=oid,
        ),
        "operations": rows(
            connection,
            """SELECT o.kind, o.state, s.name AS storage, o.reason, o.attempts, o.due_at, o.actor,
                      o.priority, o.deadline,
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


def underway(
    connection: Connection, uri: str, version: int | None, now: datetime
) -> tuple[str, ...]:
    """What is being done about an item or due by now; nothing when it is at rest.

    What is to be done later (a purge after its grace, say), or waits for a person, does not count.
    """
    oid = get_item(connection, uri, version)["oid"]
    found = rows(
        connection,
        """SELECT DISTINCT o.kind || ' ' || o.state AS told FROM replica r
             JOIN operation o ON o.uid = r.uid
            WHERE r.oid = :oid AND (o.state = 'RUNNING'
               OR o.state = 'QUEUED'
              AND (o.due_at <= :now OR o.attempts > 0 OR o.error_code IS NOT NULL))
           UNION ALL
           SELECT 'planning' FROM evaluation WHERE oid = :oid AND due_at <= :now""",
        oid=oid,
        now=now,
    )
    expiring = ["expiry"] if item_due(connection, oid, now) else []
    return tuple(sorted(row["told"] for row in found) + expiring)


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
    InvalidValueError
        if it is to expire without a reason.
    IllegalTransitionError
        for an item that is not READY, CORRUPTED or INITIALISED.
    """
    why = _reason(expires_at, reason)
    oid: uuid.UUID = get_item(connection, uri, version)["oid"]
    # expiry may have it locked at this moment: what counts is its state after that
    if not run(
        connection,
        """UPDATE data_item SET expiry_reason = :reason, expires_at = CASE
                  -- greatest() passes over NULL: 'never' would become 'at once'
                  WHEN CAST(:at AS timestamptz) IS NULL THEN NULL
                  ELSE greatest(CAST(:at AS timestamptz), created_at) END
            WHERE oid = :oid AND state NOT IN ('EXPIRED', 'DELETED')""",
        at=expires_at,
        reason=why,
        oid=oid,
    ):
        state = get_item(connection, uri, version)["state"]
        raise IllegalTransitionError(noun="item", key=uri, old=state, new="another time of expiry")
    return oid


def _reason(expires_at: datetime | None, reason: str) -> str | None:
    """Why something is to expire: it stands in the certificate."""
    if expires_at is None:
        return None
    if not reason.strip():
        raise InvalidValueError(what="reason", value=reason, expected="why it may go")
    return reason


def set_replica_expiry(
    connection: Connection,
    uri: str,
    storage: str,
    expires_at: datetime | None,
    reason: str,
    version: int | None = None,
) -> uuid.UUID:
    """When the copy of an item on a storage is to leave (None: never), and why; its uid.

    It leaves once the other copies suffice.

    Raises
    ------
    NotFoundError
        no such item or storage, or no copy there that is neither trashed nor deleted.
    InvalidValueError
        if it is to leave without a reason.
    """
    why = _reason(expires_at, reason)
    item = get_item(connection, uri, version)
    found = rows(
        connection,
        """UPDATE replica SET expiry_reason = :reason, expires_at = CASE
                  WHEN CAST(:at AS timestamptz) IS NULL THEN NULL
                  ELSE greatest(CAST(:at AS timestamptz), created_at) END
            WHERE oid = :oid AND storage_id = :storage AND live
           RETURNING uid""",
        at=expires_at,
        reason=why,
        oid=item["oid"],
        storage=_id_of(connection, "storage", storage),
    )
    if not found:
        raise NotFoundError("copy on", storage, f"see 'dlm item show {uri}'")
    uid: uuid.UUID = found[0]["uid"]
    return uid


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
