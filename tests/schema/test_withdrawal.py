"""The database's rules of withdrawals: what was never let in, and nothing else."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection

from dlm_core.catalogue.engine import run
from dlm_core.types import new_id
from tests.schema.rules import (
    NOW,
    add_item,
    add_replica,
    add_storage,
    certify,
    insert,
    ready_item,
    refusal,
    set_item,
    set_replica,
)


def end(connection: Connection, uid: uuid.UUID, deletion_id: uuid.UUID) -> None:
    run(
        connection,
        "UPDATE replica SET state = 'DELETED', deletion_id = :id, released_at = :now "
        "WHERE uid = :uid",
        id=deletion_id,
        now=NOW,
        uid=uid,
    )


def test_what_is_on_its_way_ends_by_a_withdrawal_only(db: Connection) -> None:
    """A certificate of an expiry does not end a replica that nobody has looked at, nor does that of
    a withdrawal as long as there is work under way for it, or any other replica."""
    oid = add_item(db)
    uid = add_replica(db, oid, add_storage(db))
    assert "its item has not expired" in refusal(db, certify, uid, "release")
    withdrawn = certify(db, uid, "release", basis="withdrawn")
    assert refusal(db, end, uid, withdrawn) == ""
    insert(
        db, "operation", operation_id=new_id(), kind="copy", oid=oid, uid=uid, reason="r",
        actor="a", due_at=NOW, created_at=NOW,
    )  # fmt: skip
    assert "work under way" in refusal(db, end, uid, withdrawn)
    oid, _ = ready_item(db, 1)
    known = add_replica(db, oid, add_storage(db))
    for state in ("READY", "MISSING", "PENDING"):
        set_replica(db, known, state)
    withdrawn = certify(db, known, "release", basis="withdrawn")
    assert "it was let in before" in refusal(db, end, known, withdrawn)
    trashed = add_replica(db, oid, add_storage(db))
    for state in ("READY", "TRASHED"):
        set_replica(db, trashed, state)
    untrue = {"basis": "withdrawn", "from_state": "PENDING", "survivors": "[]"}
    assert "another replica" in refusal(db, certify, trashed, "release", **untrue)


def test_an_item_that_was_never_let_in_is_deleted_once_it_has_no_replicas(db: Connection) -> None:
    """It has no digest then; one that has been READY keeps its own."""
    oid = add_item(db, digest=None, size=None)
    uid = add_replica(db, oid, add_storage(db))
    assert "still has replicas" in refusal(db, set_item, oid, "DELETED")
    set_replica(db, uid, "DELETED")
    set_item(db, oid, "DELETED")
    other, _ = ready_item(db, 0)
    gone = "UPDATE data_item SET digest = NULL WHERE oid = :oid"
    assert refusal(db, run, gone, oid=other)
