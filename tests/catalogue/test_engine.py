"""Transactions: what ends them, and which are tried again."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine

from dlm_core.catalogue.engine import Texts, begin, copy_into, rows, run, transact
from dlm_core.catalogue.operations import NewOperation, insert_operations
from dlm_core.errors import CatalogueError, CatalogueUnavailableError
from dlm_core.types import OperationKind
from tests.schema.rules import NOW, ready_item

ACTOR = "user:test"


def queue(connection: Connection, oid: Any, uid: Any) -> int:
    """Queue a check; by COPY, as all operations are."""
    check = NewOperation(OperationKind.VERIFY, oid, uid, "test", NOW)
    return insert_operations(connection, [check], ACTOR, NOW)


def test_a_connection_that_is_lost_while_rows_are_copied_is_told_as_any_other(
    engine: Engine,
) -> None:
    """The driver's own error would end a drainer as a fault of the program."""

    def cut(connection: Connection) -> None:
        (mine,) = rows(connection, "SELECT pg_backend_pid() AS pid")
        with begin(engine, ACTOR) as other:
            run(other, "SELECT pg_terminate_backend(:pid, 5000)", **mine)
        copy_into(connection, "tally", {"noun": "text"}, [("item",)])

    with pytest.raises(CatalogueUnavailableError):
        transact(engine, ACTOR, cut)


@given(
    values=st.lists(st.uuids())
    | st.lists(st.integers(-(2**63), 2**63 - 1))
    | st.lists(st.integers(2**63 - 2, 2**63 + 2))
    | st.lists(st.none() | st.integers(-5, 5))
    | st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_arrive_as_they_were_given(engine: Engine, values: list[Any]) -> None:
    """Keys and numbers by our own way of writing them, what they do not fit by the driver's."""
    kind = next((type(one) for one in values if one is not None), str)
    name = {uuid.UUID: "uuid", int: "numeric", str: "text"}[kind]
    with begin(engine, ACTOR) as connection:
        (row,) = rows(connection, f"SELECT CAST(:v AS {name}[]) AS v", v=values)
        assert row["v"] == values
        if kind is str and None not in values:
            (row,) = rows(connection, "SELECT CAST(:v AS text[]) AS v", v=Texts(values))
            assert row["v"] == values


def test_rows_that_break_a_rule_are_refused_by_the_database(engine: Engine) -> None:
    """In COPY as in any statement."""
    with pytest.raises(CatalogueError, match="null value"):
        transact(engine, ACTOR, lambda c: copy_into(c, "tally", {"noun": "text"}, [("item",)]))


def test_a_deadlock_while_rows_are_copied_is_tried_again(engine: Engine) -> None:
    """Queueing an operation waits for its replica: two who do so crosswise, and both have it."""
    with begin(engine, ACTOR, NOW) as connection:
        oid, (first, second) = ready_item(connection)
    locked, tries = threading.Event(), []
    lock = "SELECT FROM replica WHERE uid = :uid FOR UPDATE"

    def other() -> None:
        with begin(engine, ACTOR) as connection:
            run(connection, lock, uid=second)
            run(connection, "SET LOCAL deadlock_timeout = '1h'")  # not the one who gives way
            locked.set()
            run(connection, lock, uid=first)

    def mine(connection: Connection) -> int:
        tries.append(1)
        run(connection, "SET LOCAL deadlock_timeout = '100ms'")
        run(connection, lock, uid=first)
        if len(tries) == 1:
            thread.start()
            locked.wait()
            _until(engine, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return queue(connection, oid, second)

    thread = threading.Thread(target=other)
    assert transact(engine, ACTOR, mine, NOW) == 1
    thread.join()
    assert len(tries) == 2


def _until(engine: Engine, question: str) -> None:
    while not transact(engine, ACTOR, lambda c: rows(c, question)):
        time.sleep(0.01)
