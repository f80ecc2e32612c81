"""A catalogue of an older schema that has data in it is upgraded where it stands."""

from __future__ import annotations

from alembic import command

from dlm_core.catalogue import schema
from dlm_core.catalogue.engine import begin, make_engine, rows, run
from tests.schema.rules import NOW, insert, ready_item, set_clock, set_item, set_replica
from tests.schema.test_rules import new_id, refusal


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
