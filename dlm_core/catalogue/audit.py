"""Questions that go through whole tables, for audits and reports; never asked by a sensor."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows
from dlm_core.types import decode_path


def items_truly_below_target(connection: Connection) -> int:
    """READY items whose verified replicas, weighed afresh, do not give their target phase."""
    found = rows(
        connection,
        """SELECT count(*) AS n FROM data_item i LEFT JOIN item_phase p USING (oid)
            WHERE i.state IN ('READY', 'CORRUPTED')
              AND coalesce(p.weight, 0) < phase_weight(i.target_phase)""",
    )
    return int(found[0]["n"])


def items_lost(connection: Connection, not_there: Sequence[uuid.UUID] = ()) -> int:
    """Items that have not expired and have no READY replica but those ``not_there``."""
    found = rows(
        connection,
        """SELECT count(*) AS n FROM data_item i
            WHERE i.state IN ('READY', 'CORRUPTED')
              AND NOT EXISTS (SELECT FROM replica r WHERE r.oid = i.oid AND r.state = 'READY'
                                 AND r.uid <> ALL (CAST(:not_there AS uuid[])))""",
        not_there=list(not_there),
    )
    return int(found[0]["n"])


def count_certificates(connection: Connection) -> int:
    """Deletion certificates, of every step."""
    return int(rows(connection, "SELECT count(*) AS n FROM deletion")[0]["n"])


def digests_by_path(connection: Connection) -> dict[str, str]:
    """Digest of every item by the path that its uri tells."""
    found = rows(connection, "SELECT uri, digest FROM data_item WHERE digest IS NOT NULL")
    return {decode_path(row["uri"].partition(":")[2]): row["digest"] for row in found}


def ready_on(connection: Connection, storage_id: uuid.UUID) -> list[dict[str, Any]]:
    """READY replicas on a storage."""
    return rows(
        connection,
        """SELECT uid, oid, path, size FROM replica
            WHERE storage_id = :storage AND state = 'READY' ORDER BY path""",
        storage=storage_id,
    )


def replicas_on(connection: Connection, storage: str, minimum: int) -> list[dict[str, Any]]:
    """READY replicas of at least ``minimum`` bytes on a storage, with their uri, in uri order."""
    return rows(
        connection,
        """SELECT r.uid, r.oid, r.path, r.size, i.uri
             FROM replica r JOIN data_item i USING (oid) JOIN storage s USING (storage_id)
            WHERE s.name = :storage AND r.state = 'READY' AND r.size >= :minimum
            ORDER BY i.uri LIMIT 10""",
        storage=storage,
        minimum=minimum,
    )


def replica_history(connection: Connection, uid: uuid.UUID) -> list[str]:
    """The states a replica has been in, oldest first."""
    found = rows(
        connection,
        """SELECT new_state FROM event WHERE uid = :uid AND noun = 'replica'
              AND action IN ('created', 'state') ORDER BY seq""",
        uid=uid,
    )
    return [row["new_state"] for row in found]
