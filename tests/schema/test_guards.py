"""What the guards of revision 0003 refuse, with psql too."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dlm_core.catalogue.engine import rows, run
from tests.schema.rules import add_item, add_replica, add_storage, ready_item, refusal, set_replica
from tests.sessions import until_it_waits

_RETIRE = "UPDATE storage SET mode = 'retired', retired_at = now() WHERE storage_id = :id"


def retire(connection: Connection, storage: uuid.UUID) -> None:
    run(connection, _RETIRE, id=storage)


def test_a_retired_storage_takes_no_replica(db: Connection) -> None:
    """Nor does a batch go in of which one would lie there."""
    oid, storage, other = add_item(db), add_storage(db), add_storage(db)
    retire(db, storage)
    assert "is retired and takes no replicas" in refusal(db, add_replica, oid, storage)
    both = """INSERT INTO replica (uid, oid, storage_id, path, size)
              SELECT gen_random_uuid(), :oid, storage_id, 'x', 1 FROM storage
               WHERE storage_id IN (:a, :b)"""
    assert "is retired" in refusal(db, run, both, oid=oid, a=storage, b=other)
    assert refusal(db, add_replica, oid, other) == ""


@pytest.mark.parametrize("first", ["copy", "retirement"])
def test_of_a_copy_and_a_retirement_at_once_the_second_is_refused(
    engine: Engine, first: str
) -> None:
    """It waits for the first one, and then sees what that did: plain SQL on either side."""
    with engine.begin() as connection:
        oid, storage = add_item(connection), add_storage(connection)
    actions: dict[str, Callable[[Connection], object]] = {
        "copy": lambda c: add_replica(c, oid, storage),
        "retirement": lambda c: retire(c, storage),
    }
    second = actions[next(name for name in actions if name != first)]
    refusals: list[str] = []

    def come_second() -> None:
        try:
            with engine.begin() as connection:
                second(connection)
        except DBAPIError as error:
            refusals.append(str(error.orig))

    thread = threading.Thread(target=come_second)
    with engine.begin() as connection:
        actions[first](connection)
        thread.start()
        until_it_waits(engine, thread)
    thread.join(60)
    (refused,) = refusals
    assert ("still has replicas" if first == "copy" else "is retired") in refused


def test_a_condemned_copy_may_be_doubted_again(db: Connection) -> None:
    """CORRUPTED goes back to SUSPECT when its bytes were found, never straight to READY."""
    _, (uid, _) = ready_item(db)
    for state in ("SUSPECT", "CORRUPTED"):
        set_replica(db, uid, state)
    assert "cannot go from CORRUPTED to READY" in refusal(db, set_replica, uid, "READY")
    set_replica(db, uid, "SUSPECT")
    set_replica(db, uid, "READY")
    found = rows(db, "SELECT state FROM replica WHERE uid = :uid", uid=uid)
    assert found == [{"state": "READY"}]
