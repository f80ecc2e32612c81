"""Chunks of announcements: all new, partly known, and the same from two at once."""

import threading

import pytest

from dlm_core.catalogue.engine import begin, rows
from dlm_core.catalogue.items import Announcement, Terms, announce
from dlm_core.catalogue.urgency import Urgency
from tests.schema.rules import NOW, add_storage
from tests.sessions import until_it_waits

ACTOR = "user:test"


@pytest.fixture
def storages(engine):
    with begin(engine, ACTOR) as connection:
        return [add_storage(connection), add_storage(connection)]


def tell(connection, storage, *names, **terms):
    """Announce ``test:<name>`` at ``<name>``, or (uri's name, path)."""
    pairs = [(name, name) if isinstance(name, str) else name for name in names]
    chunk = [Announcement(f"test:{uri}", path, 3) for uri, path in pairs]
    merged = announce(connection, storage, chunk, Terms(**terms), ACTOR, NOW)
    return merged.created, merged.replicated, len(merged.known)


def counts(engine):
    with begin(engine, ACTOR) as connection:
        return {
            table: rows(connection, f"SELECT count(*) AS n FROM {table}")[0]["n"]
            for table in ("data_item", "replica", "operation", "urgency")
        }


def test_a_new_chunk_makes_items_with_a_replica_and_an_operation_each(engine, storages):
    """Their keys are UUIDv7 and agree; nothing is urgent that was not said to be."""
    with begin(engine, ACTOR) as connection:
        assert tell(connection, storages[0], "a", "b") == (2, 0, 0)
        found = rows(
            connection,
            """SELECT i.oid, r.uid, o.operation_id FROM data_item i JOIN replica r USING (oid)
                 JOIN operation o ON (o.uid, o.oid) = (r.uid, r.oid)""",
        )
    assert len(found) == 2
    assert all(key.version == 7 for row in found for key in row.values())
    assert counts(engine)["urgency"] == 0


def test_what_is_known_is_merged_and_the_rest_is_new(engine, storages):
    """A known uri elsewhere gets a second replica, a taken place none, and only what was made is
    admitted, with its urgency."""
    urgent = {"urgency": Urgency(priority=-2)}
    with begin(engine, ACTOR) as connection:
        tell(connection, storages[0], "a", "b")
    with begin(engine, ACTOR) as connection:
        assert tell(connection, storages[1], "a", "new", **urgent) == (1, 1, 0)
        assert tell(connection, storages[1], "a", "new", "c", ("other", "a")) == (1, 0, 3)
    assert counts(engine) == {"data_item": 4, "replica": 5, "operation": 5, "urgency": 2}


def test_what_is_twice_in_a_chunk_is_one_item(engine, storages):
    """Whichever comes first is made; the other is told as known."""
    with begin(engine, ACTOR) as connection:
        assert tell(connection, storages[0], "a", ("a", "b"), "c") == (2, 0, 1)
    assert counts(engine) == {"data_item": 2, "replica": 2, "operation": 2, "urgency": 0}


def test_of_two_that_announce_the_same_the_second_finds_it_known(engine, storages):
    """It waits for the first, and neither fails."""
    found = []

    def second():
        with begin(engine, ACTOR) as connection:
            found.append(tell(connection, storages[0], "b", "a"))

    thread = threading.Thread(target=second)
    with begin(engine, ACTOR) as connection:
        assert tell(connection, storages[0], "a") == (1, 0, 0)
        thread.start()
        until_it_waits(engine, thread)
        assert not found
    thread.join(60)
    assert found == [(1, 0, 1)]
    assert counts(engine)["operation"] == 2
