"""A catalogue of an older schema that has data in it is upgraded where it stands."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection

from dlm_core.catalogue import schema
from dlm_core.catalogue.engine import begin, make_engine, rows, run
from dlm_core.errors import CatalogueError, SchemaMismatchError
from dlm_core.types import new_id
from tests.schema.rules import (
    NOW,
    add_item,
    add_replica,
    add_storage,
    insert,
    ready_item,
    refusal,
    set_clock,
    set_item,
    set_replica,
    ways,
)


def test_what_was_there_before_is_there_and_keeps_its_rules(empty_database_url: str) -> None:
    """Holds, certificates and events of revision 0001 stay; the old hold still forbids."""
    engine = make_engine(empty_database_url)
    with begin(engine, "test") as connection:
        command.upgrade(schema._config(connection), "0001")
        run(connection, "SELECT dlm_ensure_partitions(now(), 3)")
        set_clock(connection)
        gone, (uid, _) = ready_item(connection)
        set_replica(connection, uid, "TRASHED")
        held, _ = ready_item(connection)
        insert(connection, "hold", hold_id=new_id(), oid=held, reason="r", actor="user:a",
               created_at=NOW)  # fmt: skip
        before = rows(connection, "SELECT count(*) AS n FROM event")
    schema.upgrade(empty_database_url)
    with begin(engine, "test", NOW) as connection:
        assert schema.check(connection) == schema.expected_revision()
        assert rows(connection, "SELECT count(*) AS n FROM event") == before
        assert rows(connection, "SELECT oid, size FROM deletion") == [{"oid": gone, "size": None}]
        assert "under a hold" in refusal(connection, set_item, held, "EXPIRED")
        storage = rows(connection, "SELECT DISTINCT verify_every_days AS d FROM storage")
        assert storage == [{"d": 90}]
    engine.dispose()


def test_a_catalogue_of_newer_software_is_left_alone(empty_database_url: str) -> None:
    """Its revision is not known here: nothing is upgraded, and no upgrade is advised."""
    schema.upgrade(empty_database_url)
    engine = make_engine(empty_database_url)
    with begin(engine, "test") as connection:
        run(connection, "UPDATE alembic_version SET version_num = '9999'")
    told = "is at 9999, .* newer software has upgraded it"
    with pytest.raises(SchemaMismatchError, match=told):
        schema.upgrade(empty_database_url)
    with pytest.raises(SchemaMismatchError, match=told), begin(engine, "test") as connection:
        schema.check(connection)
    engine.dispose()


def test_what_the_predicates_said_of_state_the_new_columns_say(empty_database_url: str) -> None:
    """Of every state, with and without an end, trashed or not: an index of 0012 has the rows that
    its predecessor had, the next check counts from the last look, and nothing is told anew."""
    engine = make_engine(empty_database_url)
    with begin(engine, "test") as connection:
        command.upgrade(schema._config(connection), "0011")
        run(connection, "SELECT dlm_ensure_partitions(now(), 3)")
        set_clock(connection)
        for way in ways(connection, "replica", "PENDING").values():
            for end in (None, NOW):
                oid, _ = ready_item(connection)
                uid = add_replica(connection, oid, add_storage(connection), expires_at=end)
                for state in way[1:]:
                    set_replica(connection, uid, state)
        for way in ways(connection, "item", "INITIALISED").values():
            oid = add_item(connection, expires_at=NOW)
            for state in way[1:]:
                set_item(connection, oid, state)
        run(
            connection,
            """UPDATE replica SET trashed_at = checked_at
                WHERE state = 'TRASHED' AND expires_at IS NULL""",
        )
        run(
            connection,
            """UPDATE replica SET told_at = checked_at + interval '1 day' WHERE state = 'READY'""",
        )
        before = _said(connection)
    schema.upgrade(empty_database_url)
    with begin(engine, "test", NOW) as connection:
        assert _said(connection) == before
        for table, of in _OLD.items():
            for new, old in of.items():
                wrong = f"SELECT * FROM {table} WHERE ({new}) IS DISTINCT FROM ({old})"
                assert rows(connection, wrong) == [], new
        late = "SELECT * FROM replica WHERE check_from > greatest(checked_at, told_at)"
        assert rows(connection, late) == []
        early = "SELECT max(greatest(checked_at, told_at) - check_from) AS n FROM replica"
        assert rows(connection, early) == [{"n": timedelta()}]
    engine.dispose()


#: what the columns of 0012 stand for, by table
_OLD = {
    "data_item": {
        "expiring_at": "CASE WHEN state IN ('READY', 'CORRUPTED') THEN expires_at END",
        "coalesce(expired, false)": "state = 'EXPIRED'",
    },
    "replica": {
        "coalesce(live, false)": "state NOT IN ('TRASHED', 'DELETED')",
        "coalesce(owns_path, false)": "state <> 'DELETED' AND trashed_at IS NULL",
        "deletable_at IS NOT NULL": """expires_at IS NOT NULL
            AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING')""",
        "coalesce(deletable_at, delete_after)": "delete_after",
    },
}


def _said(connection: Connection) -> list[Any]:
    """What is counted, told, and on the list of what is looked at."""
    return [
        rows(connection, "SELECT count(*) AS n, max(seq) AS last FROM event"),
        rows(connection, "SELECT * FROM tally ORDER BY noun, storage_id, state, n, bytes"),
        rows(connection, "SELECT * FROM evaluation ORDER BY oid"),
    ]


def test_roots_are_spelled_in_one_way_after_an_upgrade(empty_database_url: str) -> None:
    """They were kept as they were typed; one that cannot be put right is named, and nothing is
    changed then."""
    engine = make_engine(empty_database_url)
    roots = {"/data/a/": "/data/a", "//b": "/b", "/c/./d//e/.": "/c/d/e", "/": "/", "/f": "/f"}
    with begin(engine, "test") as connection:
        command.upgrade(schema._config(connection), "0015")
        # what is only read may lie within another one
        for root in roots:
            add_storage(connection, root=root, managed=False)
        wrong = add_storage(connection, root="data/x", name="odd")
        run(connection, "INSERT INTO collection (collection_id, name) VALUES (:i, ' ')", i=new_id())
        full = add_storage(connection, root="/full", observed_total_bytes=2**62)
    with pytest.raises(CatalogueError, match="storage odd: its root data/x"):
        schema.upgrade(empty_database_url)
    with begin(engine, "test") as connection:
        assert rows(connection, "SELECT version_num AS v FROM alembic_version") == [{"v": "0015"}]
        mend = "UPDATE storage SET root = '/data/x' WHERE storage_id = :id"
        run(connection, mend, id=wrong)
    schema.upgrade(empty_database_url)
    with begin(engine, "test") as connection:
        found = {row["root"] for row in rows(connection, "SELECT root FROM storage")}
        assert found == {*roots.values(), "/data/x", "/full"}
        total = "SELECT observed_total_bytes AS n FROM storage WHERE storage_id = :id"
        assert rows(connection, total, id=full) == [{"n": 2**60 - 1}]
        assert rows(connection, "SELECT name LIKE 'collection-%' AS ok FROM collection")[0]["ok"]
    engine.dispose()


def test_owners_can_be_shown_after_an_upgrade(empty_database_url: str) -> None:
    """What cannot be shown on a line was taken before; the item's state and events stay."""
    engine = make_engine(empty_database_url)
    owners = {"": None, "a\nb": "a b", "\x1b": None, "Zoë": "Zoë"}
    with begin(engine, "test") as connection:
        command.upgrade(schema._config(connection), "0016")
        run(connection, "SELECT dlm_ensure_partitions(now(), 3)")
        keys = {owner: add_item(connection, owner=owner, content_type="") for owner in owners}
        before = rows(connection, "SELECT count(*) AS n FROM event")
    schema.upgrade(empty_database_url)
    with begin(engine, "test") as connection:
        for owner, shown in owners.items():
            found = rows(
                connection,
                "SELECT owner, content_type, state FROM data_item WHERE oid = :oid",
                oid=keys[owner],
            )
            assert [tuple(row.values()) for row in found] == [
                (shown, "application/octet-stream", "INITIALISED")
            ]
        assert rows(connection, "SELECT count(*) AS n FROM event") == before
    engine.dispose()
