"""Recoveries: after one, what an old catalogue says is no proof until it was looked at."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue import schema
from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import NotFoundError
from dlm_core.types import new_id

#: transactions that no server had between a backup and its loss
_AHEAD = 10**12
# Later than any look that the old catalogue knows of, whatever the clocks of the workers said. The
# feed's transaction ids go on behind those that readers of the old one may have seen since.
_MARK = """
INSERT INTO recovery (recovery_id, recovered_at, source, actor, last_seq, xid_shift)
SELECT {key}, greatest({now}::timestamptz, (SELECT max(checked_at) + interval '1 microsecond' FROM replica)),
       {source}, {actor}, coalesce(max(e.seq), 0),
       greatest(0, coalesce(max(e.xid::text::numeric + coalesce((
         SELECT r.xid_shift FROM recovery r WHERE r.last_seq < e.seq
          ORDER BY r.last_seq DESC, r.recovery_id DESC LIMIT 1), 0)), 0)
         + {ahead} - pg_current_xact_id()::text::numeric)
  FROM event e;
DO $$ BEGIN
  IF to_regclass('storage_export') IS NOT NULL THEN
    DELETE FROM storage_export;
  END IF;
END $$;
"""


def mark_sql(source: str, actor: str, now: datetime) -> str:
    """Statements that mark a catalogue of any schema as recovered from ``source`` at ``now``."""
    table = (schema.schema_folder() / "sql" / "0004_recovery_table.sql").read_text("utf-8")
    mark = sql.SQL(_MARK).format(
        ahead=sql.Literal(_AHEAD),
        key=sql.Literal(str(new_id())),
        now=sql.Literal(now.isoformat()),
        source=sql.Literal(source),
        actor=sql.Literal(actor),
    )
    return table + mark.as_string(None)


def distrust(connection: Connection, source: str, actor: str, now: datetime) -> None:
    """Mark this catalogue as an old one, brought back from ``source`` by other means than ours."""
    connection.connection.cursor().execute(mark_sql(source, actor, now))
    _note(connection, "recovered", actor, {"source": source})


def note_recovery(connection: Connection) -> None:
    """Write the newest recovery into the log; what made it could not yet, in an older schema."""
    newest = recoveries(connection)[-1]
    _note(connection, "recovered", newest["actor"], {"source": newest["source"]})


def recoveries(connection: Connection) -> list[dict[str, Any]]:
    """All recoveries, oldest first."""
    return rows(
        connection,
        """SELECT recovered_at, source, actor, confirmed_at, confirmed_by FROM recovery
            ORDER BY recovery_id""",
    )


def confirm(connection: Connection, actor: str, now: datetime) -> int:
    """A person has seen that holds and times of expiry are right: items may expire again. Copies go
    only beside others that were looked at since, all the same. Returns how many recoveries.

    Raises
    ------
    NotFoundError
        if none waits.
    """
    confirmed = run(
        connection,
        "UPDATE recovery SET confirmed_at = :now, confirmed_by = :actor WHERE confirmed_at IS NULL",
        now=now,
        actor=actor,
    )
    if not confirmed:
        raise NotFoundError("recovery", "unconfirmed")
    _note(connection, "recovery confirmed", actor, {"recoveries": confirmed})
    return confirmed


def _note(connection: Connection, action: str, actor: str, detail: dict[str, Any]) -> None:
    run(
        connection,
        "INSERT INTO event (noun, action, actor, detail) VALUES ('audit', :action, :actor, :detail)",
        action=action,
        actor=actor,
        detail=Jsonb(detail),
    )


def proof_floor(connection: Connection) -> datetime | None:
    """A look before this moment is no proof; None: all looks are."""
    floor: datetime | None = rows(connection, "SELECT proof_floor() AS at")[0]["at"]
    return floor


def unconfirmed_floor(connection: Connection) -> datetime | None:
    """As :func:`proof_floor` as long as a person has to confirm a recovery, else None."""
    found = rows(connection, "SELECT CASE WHEN recovery_unconfirmed() THEN proof_floor() END AS at")
    floor: datetime | None = found[0]["at"]
    return floor


def is_unproven(row: Mapping[str, Any], floor: datetime | None) -> bool:
    """True if a replica's row is known from a catalogue before ``floor`` only."""
    return floor is not None and (row["checked_at"] is None or row["checked_at"] < floor)


def select_unproven(
    connection: Connection, oids: Collection[uuid.UUID]
) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """(uid, oid) of those items' copies that nobody looked at since the newest recovery and that
    wait for no look."""
    found = rows(
        connection,
        """SELECT r.uid, r.oid FROM replica r
            WHERE r.oid = ANY(:oids) AND r.state IN ('READY', 'SUSPECT')
              AND (r.checked_at IS NULL OR r.checked_at < proof_floor())
              AND NOT EXISTS (SELECT FROM operation o WHERE o.uid = r.uid AND o.kind = 'verify'
                                 AND o.state IN ('QUEUED', 'RUNNING'))""",
        oids=list(oids),
    )
    return [(row["uid"], row["oid"]) for row in found]
