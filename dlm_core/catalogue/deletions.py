"""Certificates and what they allow: trash, purge, release. Every proof is made under locks.

A proof locks the items and then *all* their replicas in key order, so that two deletions of two
copies of one item take turns, and is made of the rows as they are once they are locked: at READ
COMMITTED a locking statement returns what the transaction that it waited for has written.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import KEY, copy_rows, each, rows, run
from dlm_core.catalogue.expiring import (
    EXPIRED,
    EXPIRED_OF_LOT,
    EXPIRED_OF_PLAN,
    WITH_ITEM,
    Lot,
)
from dlm_core.catalogue.replicas import Seen
from dlm_core.types import OperationState, new_key

#: how refusals begin that are not for want of copies
_HELD = "under a hold"
RECOVERED = "the catalogue was recovered"


def prove_expired(
    connection: Connection,
    now: datetime,
    limit: int,
    lot: Lot | None = None,
    plan_id: uuid.UUID | None = None,
) -> list[Proof]:
    """As :func:`prove`, of the ``limit`` replicas that are due to be deleted, longest due first:
    those that no plan names; of a ``lot``, or also of a plan, only those that it names.

    Those on storages where the DLM may not write now (offline, or read-only though managed) wait.
    """
    query = EXPIRED
    named: dict[str, Any] = {}
    if lot is not None:
        query, named = EXPIRED_OF_LOT, {"uids": lot.keys()[0]}
    if plan_id is not None:
        query, named = EXPIRED_OF_PLAN, {**named, "plan": plan_id}
    return _prove(connection, query, due=now, now=now, limit=limit, **named)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found about one replica that is to go; ``refusal`` None means it may."""

    uid: uuid.UUID
    oid: uuid.UUID
    uri: str
    storage_id: uuid.UUID
    path: str
    state: str
    size: int
    basis: str
    survivors: list[uuid.UUID]
    survivor_weight: int
    reason: str
    trashed_at: datetime | None
    managed: bool
    trash_grace: timedelta | None
    refusal: str | None

    @property
    def waits(self) -> bool:
        """True if what refuses it is no lack of copies: it is not needed again for that."""
        return self.refusal is not None and self.refusal.startswith((_HELD, RECOVERED))


def prove(connection: Connection, uids: Sequence[uuid.UUID]) -> list[Proof]:
    """Lock items and replicas, then prove for each uid whether it may go.

    A survivor is a READY replica, not among ``uids``, not leaving, on a storage that is read-write
    or read-only; survivors are weighed by location. An item that is EXPIRED needs none. Any hold
    refuses. After a recovery of the catalogue only what was looked at since counts: survivors, and
    the copy itself, whose place may be another's by now; an EXPIRED item waits to be confirmed.
    """
    return _prove(
        connection, "SELECT uid, oid FROM replica WHERE uid = ANY(:uids)", uids=list(uids)
    )


def _prove(
    connection: Connection, going: str, due: datetime | None = None, **parameters: object
) -> list[Proof]:
    """Prove for the replicas that the query ``going`` names, and that are ``due`` if that is given.

    What a lock was waited for is seen as it is then: the proof is made of the locked rows alone.
    Keys come as arrays, so that each is looked up: a join would read all between the first and the
    last, as cheap as the planner takes that to be.
    """
    run(connection, "LOCK TABLE hold IN SHARE MODE")
    run(connection, "DROP TABLE IF EXISTS pg_temp.going, pg_temp.item, pg_temp.copy, pg_temp.proof")
    if not run(connection, f"CREATE TEMPORARY TABLE going ON COMMIT DROP AS {going}", **parameters):
        return []
    run(connection, "ANALYZE going")
    run(
        connection,
        """CREATE TEMPORARY TABLE item ON COMMIT DROP AS
           SELECT oid, uri, collection_id, state, target_phase, expiry_reason FROM data_item
            WHERE oid = ANY(ARRAY(SELECT oid FROM going))
            ORDER BY oid FOR NO KEY UPDATE""",
    )
    run(
        connection,
        """CREATE TEMPORARY TABLE copy ON COMMIT DROP AS
           SELECT uid, oid, storage_id, path, state, size, trashed_at, checked_at, expires_at,
                  expiry_reason, delete_after FROM replica
            WHERE oid = ANY(ARRAY(SELECT oid FROM going))
            ORDER BY uid FOR NO KEY UPDATE""",
    )
    if due is not None:
        # somebody may have taken it back while its lock was waited for
        run(
            connection,
            """DELETE FROM going USING copy WHERE copy.uid = going.uid
                  AND (copy.delete_after IS NULL OR copy.delete_after > :due)""",
            due=due,
        )
    # of all that the proof filters by: where READY ones are taken for few they are compared with
    # what goes pair by pair
    run(connection, "ANALYZE item (oid), copy (uid, oid, state, storage_id, expires_at)")
    made = f"CREATE TEMPORARY TABLE proof ON COMMIT DROP AS {_PROVE}"
    run(connection, made, with_item=WITH_ITEM)
    return [_proof(row) for row in each(connection, _PROVEN)]


# its rows stay in the database: certificates are made of them
_PROVE = """
WITH known AS MATERIALIZED (
  SELECT coalesce(proof_floor(), '-infinity') AS floor, recovery_unconfirmed() AS unconfirmed,
         dlm_now() AS now),
target AS (
  SELECT r.uid, r.oid, r.storage_id, r.path, r.state, r.size, r.trashed_at, s.trash_grace,
         -- on what is lost there is nothing to remove: the record alone ends
         s.managed AND s.mode NOT IN ('lost', 'retired') AS managed,
         r.state IN ('READY', 'SUSPECT') AND (r.checked_at IS NULL OR r.checked_at < known.floor) AS unseen,
         known.unconfirmed,
         i.uri, i.collection_id, i.state AS item_state, i.target_phase,
         CASE WHEN r.expiry_reason = :with_item THEN concat_ws(': ', r.expiry_reason, left(i.expiry_reason, 1000))
              ELSE coalesce(r.expiry_reason, i.expiry_reason, 'its time is over') END AS reason
    FROM going g JOIN copy r USING (uid) JOIN item i ON i.oid = r.oid JOIN storage s USING (storage_id)
    CROSS JOIN known),
place AS MATERIALIZED (
  SELECT s.storage_id, s.mode, s.name AS storage, s.location_id, l.name AS location,
         phase_weight(s.phase) AS weight
    FROM storage s JOIN location l USING (location_id)),
good AS (
  SELECT r.oid, r.uid, s.storage_id, s.storage, s.location_id, s.location, s.weight,
         r.checked_at, r.checked_at >= known.floor AS seen
    FROM copy r JOIN place s USING (storage_id) CROSS JOIN known
   WHERE r.state = 'READY' AND s.mode IN ('read_write', 'read_only')
     AND (r.expires_at IS NULL OR r.expires_at > known.now)
     AND NOT EXISTS (SELECT FROM going g WHERE g.uid = r.uid)),
weighed AS (
  SELECT oid, sum(best) AS weight, sum(said) AS said FROM (
    SELECT oid, location_id, max(weight) FILTER (WHERE seen) AS best, max(weight) AS said
      FROM good GROUP BY oid, location_id) b GROUP BY oid),
named AS (
  SELECT oid, array_agg(uid ORDER BY uid) AS uids,
         jsonb_agg(jsonb_build_object('uid', uid, 'storage', storage, 'location', location,
           'weight', weight, 'checked_at', checked_at) ORDER BY uid) AS survivors
    FROM good WHERE seen GROUP BY oid)
SELECT t.*, CASE t.item_state WHEN 'EXPIRED' THEN 'item_expired' ELSE 'replica_expired' END AS basis,
       n.uids, coalesce(n.survivors, '[]') AS survivors, coalesce(w.weight, 0)::smallint AS survivor_weight,
       coalesce(w.said, 0)::smallint AS said_weight,
       phase_weight(t.target_phase) AS needed,
       (SELECT count(*) FROM hold) AS holds_examined,
       CASE WHEN EXISTS (SELECT FROM hold)
            THEN (SELECT string_agg(h.reason, '; ') FROM holds_on(t.oid, t.uri, t.collection_id) h) END AS held
  FROM target t LEFT JOIN named n USING (oid) LEFT JOIN weighed w USING (oid)
"""
_PROVEN = """
SELECT uid, oid, uri, storage_id, path, state, size, basis, uids, survivor_weight, said_weight, needed,
       target_phase, reason, trashed_at, managed, trash_grace, held, unseen, unconfirmed
  FROM proof ORDER BY uid"""


def _proof(row: dict[str, Any]) -> Proof:
    basis, survivors, refusal = row["basis"], row["uids"] or [], None
    if row["held"]:
        refusal = f"{_HELD}: {row['held']}"
    elif basis == "item_expired" and row["unconfirmed"]:
        refusal = f"{RECOVERED}: no item goes before a person said 'dlm db confirm'"
    elif row["unseen"]:
        refusal = f"{RECOVERED}: this copy was not looked at since"
    elif (
        basis == "replica_expired" and row["survivor_weight"] < row["needed"] <= row["said_weight"]
    ):
        refusal = f"{RECOVERED}: the copies that would be left were not all looked at since"
    elif basis == "replica_expired" and row["survivor_weight"] < row["needed"]:
        refusal = (
            f"the copies that would be left give {row['survivor_weight']} of the {row['needed']} "
            f"that {row['target_phase']} needs"
        )
    elif basis == "replica_expired" and not survivors:
        refusal = "no verified copy would be left"
    return Proof(
        row["uid"], row["oid"], row["uri"], row["storage_id"], row["path"], row["state"],
        row["size"], basis, survivors, row["survivor_weight"], row["reason"], row["trashed_at"],
        row["managed"], row["trash_grace"], refusal,
    )  # fmt: skip


def certify(
    connection: Connection,
    proofs: Sequence[tuple[Proof, str]],
    *,
    actor: str,
    now: datetime,
    valid_for: timedelta,
    plan_id: uuid.UUID | None = None,
) -> None:
    """Write a certificate for each (proof, step) and name it in the replica's row.

    The proofs are those that :func:`prove` made in this transaction. Step 'trash' moves the replica
    to TRASHED in the same statement; 'purge' and 'release' only certify, the replica is DELETED
    once the bytes are confirmed absent.
    """
    if not proofs:
        return
    columns = {"deletion_id": KEY, "operation_id": KEY, "step": "text", "uid": "uuid"}
    certificates = ((new_key(), new_key(), step, proof.uid) for proof, step in proofs)
    copy_rows(connection, "certificate", columns, certificates)
    run(
        connection,
        """INSERT INTO deletion (deletion_id, step, basis, uid, oid, storage_id, from_state, survivors,
                                 survivor_weight, target_phase, holds_examined, reason, size,
                                 plan_id, actor, proved_at, valid_until)
           SELECT c.deletion_id, c.step, p.basis, p.uid, p.oid, p.storage_id, p.state, p.survivors,
                  p.survivor_weight, p.target_phase, p.holds_examined, p.reason, p.size,
                  CAST(:plan AS uuid), :actor, :now,
                  CAST(:now AS timestamptz) + CAST(:valid AS interval)
             FROM certificate c JOIN proof p USING (uid)""",
        plan=plan_id,
        actor=actor,
        now=now,
        valid=valid_for,
    )
    run(
        connection,
        """UPDATE replica r SET deletion_id = c.deletion_id,
                  state = CASE c.step WHEN 'trash' THEN 'TRASHED' ELSE r.state END
             FROM certificate c
            WHERE r.uid = c.uid AND r.uid = ANY(ARRAY(SELECT uid FROM certificate))""",
    )


def queue_trashing(
    connection: Connection, *, actor: str, now: datetime, plan_id: uuid.UUID | None = None
) -> None:
    """Queue the move of the bytes of what :func:`certify` trashed in this transaction; what else
    was queued to be read or written there is cancelled."""
    run(
        connection,
        """UPDATE operation SET state = 'CANCELLED', finished_at = :now
            WHERE uid = ANY(ARRAY(SELECT uid FROM certificate)) AND kind IN ('copy', 'verify')
              AND state = 'QUEUED'""",
        now=now,
    )
    run(
        connection,
        """INSERT INTO operation (operation_id, kind, oid, uid, plan_id, reason, actor, due_at,
                                  created_at)
           SELECT c.operation_id, 'trash', p.oid, p.uid, CAST(:plan AS uuid), p.reason, :actor,
                  :now, :now
             FROM certificate c JOIN proof p USING (uid) WHERE c.step = 'trash'""",
        plan=plan_id,
        actor=actor,
        now=now,
    )


def note_refusals(connection: Connection, refused: Sequence[Proof]) -> None:
    """Write refused deletions into the log, each once: when it is asked for again after having been
    put off, nothing new was decided."""
    run(
        connection,
        """INSERT INTO event (noun, action, oid, uid, storage_id, actor, detail)
           SELECT 'replica', 'refused', r.oid, r.uid, r.storage_id, dlm_actor(),
                  jsonb_build_object('reason', u.reason)
             FROM unnest(CAST(:uids AS uuid[]), CAST(:reasons AS text[])) AS u(uid, reason)
             JOIN replica r USING (uid) WHERE r.delete_after = r.expires_at""",
        uids=[proof.uid for proof in refused],
        reasons=[proof.refusal for proof in refused],
    )


def mark_trashed(connection: Connection, uids: Sequence[uuid.UUID], now: datetime) -> None:
    """The bytes of trashed replicas are out of the way: their paths are free."""
    run(
        connection,
        "UPDATE replica SET trashed_at = :now WHERE uid = ANY(:uids) AND state = 'TRASHED'",
        uids=list(uids),
        now=now,
    )


def undo_trash(connection: Connection, seen: Sequence[Seen], now: datetime) -> set[uuid.UUID]:
    """Replicas out of the trash whose bytes were read and are the item's: READY, never expiring,
    and so is their item if it had expired. Those that were."""
    uids = [one.uid for one in seen]
    run(
        connection,
        """UPDATE data_item SET state = 'READY', expires_at = NULL, expiry_reason = NULL
            WHERE state = 'EXPIRED'
              AND oid IN (SELECT oid FROM replica WHERE uid = ANY(:uids) AND state = 'TRASHED')""",
        uids=uids,
    )
    found = rows(
        connection,
        """UPDATE replica r SET state = 'READY', size = u.size, digest = u.digest,
                  checked_at = :now, check_from = :now, trashed_at = NULL, mtime = NULL,
                  expires_at = NULL, expiry_reason = NULL,
                  own_expires_at = NULL, own_expiry_reason = NULL
             FROM unnest(CAST(:uids AS uuid[]), CAST(:sizes AS bigint[]),
                         CAST(:digests AS text[])) AS u(uid, size, digest)
            WHERE r.uid = u.uid AND r.state = 'TRASHED' RETURNING r.uid""",
        now=now,
        uids=uids,
        sizes=[one.size for one in seen],
        digests=[one.digest for one in seen],
    )
    return {row["uid"] for row in found}


def let_stay(connection: Connection, oids: Sequence[uuid.UUID]) -> None:
    """Copies that were to go with their item, and whose item came back, do not go: those that are
    missing or damaged are made again."""
    run(
        connection,
        """UPDATE replica r SET expires_at = NULL, expiry_reason = NULL
             FROM data_item i
            WHERE i.oid = r.oid AND i.state = 'READY' AND r.oid = ANY(:oids)
              AND r.deletable_at IS NOT NULL AND r.expiry_reason = :reason""",
        oids=list(oids),
        reason=WITH_ITEM,
    )


#: a trashed replica whose place on its storage, which was not given up, nothing of its path or its
#: item has taken, nor is on its way back to; of several in the trash the newest
_PLACE_IS_FREE = """
  r.uid = ANY(:uids) AND r.state = 'TRASHED'
  AND r.storage_id IN (SELECT storage_id FROM storage WHERE mode <> 'retired') AND NOT EXISTS (
    SELECT FROM replica x WHERE x.storage_id = r.storage_id AND x.uid <> r.uid
       AND x.state <> 'DELETED' AND (x.path = r.path OR x.oid = r.oid)
       AND (x.trashed_at IS NULL OR (x.uid = ANY(:uids) AND x.uid > r.uid)))"""


def free_places(connection: Connection, uids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Those of trashed replicas that :func:`take_back_path` could bring back."""
    found = rows(connection, f"SELECT uid FROM replica r WHERE {_PLACE_IS_FREE}", uids=list(uids))
    return [row["uid"] for row in found]


def take_back_path(connection: Connection, uids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Reserve the paths of trashed replicas again, before their bytes are moved back there.

    Returns those that got theirs: where a newer copy has taken the place, or is on its way back
    itself, nothing is brought back.
    """
    found = rows(
        connection,
        f"UPDATE replica r SET trashed_at = NULL WHERE {_PLACE_IS_FREE} RETURNING r.uid",
        uids=list(uids),
    )
    return {row["uid"] for row in found}


def trashed_from(connection: Connection, uids: Sequence[uuid.UUID]) -> dict[uuid.UUID, str]:
    """The state that each of trashed replicas was in before, as its certificate has it."""
    found = rows(
        connection,
        """SELECT DISTINCT ON (uid) uid, from_state FROM deletion
            WHERE uid = ANY(:uids) AND step = 'trash' ORDER BY uid, deletion_id DESC""",
        uids=list(uids),
    )
    return {row["uid"]: row["from_state"] for row in found}


def displaced(connection: Connection, uids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Those of trashed replicas whose item has a newer copy on their storage by now."""
    found = rows(
        connection,
        """SELECT r.uid FROM replica r WHERE r.uid = ANY(:uids) AND EXISTS (
             SELECT FROM replica x WHERE x.storage_id = r.storage_id AND x.oid = r.oid
                AND x.uid <> r.uid AND x.live)""",
        uids=list(uids),
    )
    return {row["uid"] for row in found}


def mark_deleted(
    connection: Connection, uids: Sequence[uuid.UUID], now: datetime, *, released: bool
) -> set[uuid.UUID]:
    """Replicas whose bytes are confirmed absent (or released to their owner) become DELETED; an
    expired item follows its last replica. The database wants a valid certificate."""
    column = "released_at" if released else "absent_at"
    found = rows(
        connection,
        f"""UPDATE replica SET state = 'DELETED', {column} = :now
             WHERE uid = ANY(:uids) AND state = 'TRASHED' RETURNING uid, oid""",
        uids=list(uids),
        now=now,
    )
    run(
        connection,
        """UPDATE data_item i SET state = 'DELETED', phase_weight = 0
            WHERE i.oid = ANY(:oids) AND i.state = 'EXPIRED'
              AND NOT EXISTS (SELECT FROM replica r WHERE r.oid = i.oid AND r.state <> 'DELETED')""",
        oids=list({row["oid"] for row in found}),
    )
    return {row["uid"] for row in found}


def survivor_details(connection: Connection, uids: Sequence[uuid.UUID]) -> list[dict[str, Any]]:
    """Where the replicas that a proof names lie, to be looked at on their storages."""
    return rows(
        connection,
        """SELECT r.uid, r.oid, r.storage_id, r.path, r.checked_at, r.mtime, r.told_stamp, i.kind,
                  i.size, i.digest
             FROM replica r JOIN data_item i USING (oid) WHERE r.uid = ANY(:uids)""",
        uids=list(uids),
    )


def cancel_operations(
    connection: Connection,
    uids: Sequence[uuid.UUID],
    kinds: Sequence[str],
    now: datetime,
    state: OperationState = OperationState.QUEUED,
) -> int:
    """Cancel operations of replicas that are QUEUED, or FAILED if nothing is left to try again;
    running ones are left alone."""
    return run(
        connection,
        """UPDATE operation SET state = 'CANCELLED', finished_at = :now
            WHERE uid = ANY(:uids) AND kind = ANY(:kinds) AND state = :state""",
        uids=list(uids),
        kinds=list(kinds),
        now=now,
        state=state.value,
    )


def count_active(connection: Connection, uid: uuid.UUID, kinds: Sequence[str]) -> int:
    """Operations of a replica that are queued or running."""
    found = rows(
        connection,
        """SELECT count(*) AS n FROM operation WHERE uid = :uid AND kind = ANY(:kinds)
              AND state IN ('QUEUED', 'RUNNING')""",
        uid=uid,
        kinds=list(kinds),
    )
    return int(found[0]["n"])


def newest_trashed(
    connection: Connection, oid: uuid.UUID, storage_id: uuid.UUID | None
) -> list[dict[str, Any]]:
    """Trashed replicas of an item, on storages that are not given up, locked, newest first."""
    return rows(
        connection,
        """SELECT uid, oid, storage_id, path, trashed_at, size FROM replica
            WHERE oid = :oid AND state = 'TRASHED'
              AND storage_id IN (SELECT storage_id FROM storage WHERE mode <> 'retired')
              AND (CAST(:storage AS uuid) IS NULL OR storage_id = :storage)
            ORDER BY uid DESC FOR NO KEY UPDATE""",
        oid=oid,
        storage=storage_id,
    )
