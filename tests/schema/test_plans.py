"""What sensors and queues ask is answered from partial indexes whose size follows the due work.

The very statements that the functions send are explained, on a catalogue of 50,000 items.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, event

from dlm_core.catalogue import (
    browse,
    capacity,
    checks,
    deletions,
    embedded,
    expiring,
    operations,
    replicas,
    traffic,
    urgency,
    watches,
)
from dlm_core.catalogue import plans as approval
from dlm_core.catalogue.engine import begin, make_engine, rows, run
from dlm_core.catalogue.status import status
from dlm_core.lifecycle.expire import plan_batch
from dlm_core.lifecycle.work import Context
from dlm_core.settings import load_settings
from dlm_core.types import OperationKind, new_id
from tests.schema.rules import DIGEST, NOW, add_storage

ITEMS = 50_000
#: 8 kB pages; what is smaller, an empty partition say, may be read through
MUCH = 100
LATER = NOW + timedelta(days=1)
KINDS = list(OperationKind)
LIMITS = approval.Limits(10**6, 10**15, 10**6, 10**15, 0.5, 100)

_FILL = (
    """CREATE TEMPORARY TABLE made ON COMMIT DROP AS
       SELECT uuid7_floor(CAST(:now AS timestamptz) + n * interval '1 ms') AS oid, n
         FROM generate_series(1, :items) n""",
    """INSERT INTO data_item (oid, uri, uri_bucket, size, digest, created_at)
       SELECT oid, 'test:folder-' || n % 500 || '/item-' || n, '01234', n, :digest, :now
         FROM made""",
    "UPDATE data_item SET state = 'READY'",
    """INSERT INTO replica (uid, oid, storage_id, path, size, created_at, accessed_at)
       SELECT gen_random_uuid(), oid, s, 'p' || n, n, :now,
              CAST(:now AS timestamptz) + n * interval '1 s'
         FROM made, unnest(CAST(:storages AS uuid[])) s""",
    "UPDATE replica SET state = 'READY', digest = :digest, checked_at = created_at",
    """INSERT INTO operation (operation_id, kind, state, oid, uid, reason, actor, due_at,
                              finished_at)
       SELECT uuid7_floor(CAST(:now AS timestamptz) - interval '40 days' + n * interval '1 ms'),
              'copy', 'DONE', r.oid, r.uid, 'test', 'test', :now,
              CAST(:now AS timestamptz) - interval '30 days'
         FROM made JOIN replica r USING (oid)
        WHERE r.storage_id = (CAST(:storages AS uuid[]))[1]""",
    # the due work: a little of everything
    """UPDATE operation SET state = 'QUEUED', finished_at = NULL
        WHERE operation_id IN (SELECT operation_id FROM operation ORDER BY 1 LIMIT 200)""",
    """UPDATE operation SET state = 'RUNNING', lease_token = gen_random_uuid(), lease_until = :now
        WHERE operation_id IN (
          SELECT operation_id FROM operation WHERE state = 'QUEUED' LIMIT 20)""",
    """UPDATE operation SET state = 'FAILED', error_code = 'DLM-300', finished_at = :now
        WHERE operation_id IN (SELECT operation_id FROM operation WHERE state = 'DONE' LIMIT 20)""",
    """UPDATE data_item SET expires_at = created_at
        WHERE oid IN (SELECT oid FROM data_item ORDER BY oid LIMIT 100)""",
    """UPDATE replica SET expires_at = created_at, expiry_reason = 'test'
        WHERE uid IN (SELECT uid FROM replica ORDER BY uid LIMIT 100)""",
    "UPDATE data_item SET shortfall = 'test' WHERE oid IN (SELECT oid FROM data_item LIMIT 50)",
    "DELETE FROM evaluation WHERE oid NOT IN (SELECT oid FROM data_item ORDER BY oid LIMIT 100)",
    "SELECT dlm_fold_tally()",
)


def _second_page(c: Connection) -> list[dict[str, Any]]:
    storage = rows(c, "SELECT storage_id FROM storage LIMIT 1")[0]["storage_id"]
    return replicas.select_unmarked(c, storage, 100, replicas.select_unmarked(c, storage, 100)[-1])


@pytest.fixture(scope="module")
def site(postgres_home: Path, template_database: str) -> Iterator[Engine]:
    """A catalogue with much that is at rest and little that is due; gone after these tests."""
    name = f"plans_{uuid.uuid4().hex}"
    admin = embedded.database_url(postgres_home, "postgres")
    with psycopg.connect(admin, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {template_database}".encode())
    engine = make_engine(embedded.database_url(postgres_home, name))
    try:
        with engine.begin() as connection:
            storages = [add_storage(connection), add_storage(connection)]
            values = {"now": NOW, "items": ITEMS, "digest": DIGEST, "storages": storages}
            for statement in _FILL:
                run(
                    connection,
                    statement,
                    **{k: v for k, v in values.items() if f":{k}" in statement},
                )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
            connection.exec_driver_sql("VACUUM FULL ANALYZE evaluation")
        yield engine
    finally:
        engine.dispose()
        with psycopg.connect(admin, autocommit=True) as server:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def recorded(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """The statements sent within it, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, _x: Any, _many: bool) -> None:
        sent.append((statement, values))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


class Plan:
    """What a function's statements would read, by their plans."""

    def __init__(self, connection: Connection) -> None:
        self.scanned: set[str] = set()
        self.indexes: set[str] = set()
        self._pages = self._ask(connection, "SELECT relname, relpages FROM pg_class")
        self._parents = self._ask(
            connection,
            "SELECT inhrelid::regclass::text, inhparent::regclass::text FROM pg_inherits",
        )

    @staticmethod
    def _ask(connection: Connection, sql: str) -> dict[str, Any]:
        return {row[0]: row[1] for row in connection.exec_driver_sql(sql)}

    def take(self, node: dict[str, Any]) -> None:
        """Note what a node and those below it read."""
        relation = node.get("Relation Name", "")
        if node["Node Type"] == "Seq Scan" and self._pages.get(relation, 0) >= MUCH:
            self.scanned.add(relation)
        if "Index Name" in node:
            self.indexes.add(self._parents.get(node["Index Name"], node["Index Name"]))
        for child in node.get("Plans", []):
            self.take(child)


def plan_of(engine: Engine, work: Callable[[Connection], Any]) -> Plan:
    """Run ``work``, explain each statement it sent, undo everything."""
    with engine.connect() as connection:
        plan = Plan(connection)
        run(connection, "SELECT set_config('dlm.now', :now, true)", now=NOW.isoformat())
        savepoint = connection.begin_nested()
        with recorded(engine) as sent:
            work(connection)
        savepoint.rollback()
        assert sent, "nothing was asked"
        for statement, values in sent:
            if not statement.startswith("LOCK"):
                plan.take(_explained(connection, statement, values))
        connection.rollback()
    return plan


def _explained(
    connection: Connection, statement: str, values: Any, options: str = ""
) -> dict[str, Any]:
    cursor = connection.connection.cursor()
    # the plan for these values, as the first executions on a connection get it
    cursor.execute(f"EXPLAIN ({options}FORMAT JSON) {statement}", values, prepare=False)
    found: dict[str, Any] = cursor.fetchone()[0][0]["Plan"]
    return found


CASES: dict[str, tuple[Callable[[Connection], Any], set[str]]] = {
    "due operations are counted": (
        lambda c: operations.count_due(c, KINDS, LATER),
        {"operation_due", "operation_lease"},
    ),
    "due operations are claimed": (
        lambda c: operations.claim_operations(
            c, OperationKind.COPY, token=new_id(), worker="w", limit=100,
            lease=timedelta(seconds=60), now=LATER,
        ),
        {"operation_due"},
    ),
    "what is not for a busy storage is claimed": (
        lambda c: operations.claim_operations(
            c, OperationKind.COPY, token=new_id(), worker="w", limit=100,
            lease=timedelta(seconds=60), now=LATER, avoid=[new_id()], most_bytes=1,
        ),
        {"operation_due"},
    ),
    "what would be late is put first": (
        lambda c: urgency.hasten(c, LATER),
        {"operation_deadline"},
    ),
    "missed deadlines are counted": (lambda c: urgency.deadlines(c, NOW, LATER), set()),
    "an item's urgency is changed": (
        lambda c: urgency.set_urgency(
            c, [rows(c, "SELECT oid FROM data_item ORDER BY oid LIMIT 1")[0]["oid"]],
            {"priority": 1},
        ),
        {"replica_item_storage", "operation_uid"},
    ),
    "a drainer tells what it does": (
        lambda c: traffic.beat(c, new_id(), "w", {"x": 1}, [], LATER), set(),
    ),
    "what is at work is listed": (lambda c: traffic.list_running(c, LATER), set()),
    "leases that ran out are released": (
        lambda c: operations.release_expired_leases(c, KINDS, LATER, 8),
        {"operation_lease"},
    ),
    "whose an unfinished upload is": (
        lambda c: operations.owned_on(
            c, rows(c, "SELECT storage_id FROM storage LIMIT 1")[0]["storage_id"],
            [f"p{n}/table" for n in range(100)],
        ),
        {"replica_storage_path", "operation_uid"},
    ),
    # a list this short is read through, or by evaluation_due: no matter
    "evaluations are counted": (lambda c: replicas.count_evaluations_due(c, LATER), set()),
    "what has expired is counted": (
        lambda c: expiring.count_expiry_due(c, LATER),
        {"replica_expiring", "data_item_expiring"},
    ),
    "expired replicas are selected": (
        lambda c: rows(c, expiring.EXPIRED, now=LATER, limit=1000),
        {"replica_expiring"},
    ),
    "items expire": (
        lambda c: expiring.expire_items(c, LATER, 1000),
        {"data_item_expiring"},
    ),
    "what has expired is listed in lots": (
        lambda c: expiring.list_due(c, LATER, 1000, 10**6),
        {"replica_expiring", "data_item_expiring"},
    ),
    "replicas of a lot are looked up": (
        lambda c: rows(
            c, expiring.EXPIRED_OF_LOT, uids=_some(c).keys()[0], now=LATER, limit=1000
        ),
        {"replica_pkey"},
    ),
    "items of a lot expire": (
        lambda c: expiring.expire_items(c, LATER, 1000, _some(c)),
        {"data_item_pkey"},
    ),
    "refused deletions are resumed": (
        lambda c: replicas.resume_deletions(
            c,
            # in the order of an index: the table may begin with pages of dead rows
            [one["oid"] for one in rows(c, "SELECT oid FROM data_item ORDER BY oid LIMIT 100")],
            LATER,
        ),
        {"replica_refused"},
    ),
    "full storages are found": (
        # what leaves comes by replica_leaving or replica_expiring, which hold the same rows
        lambda c: capacity.storages_to_relieve(c, LATER),
        {"replica_coldest"},
    ),
    "the coldest replicas are selected": (
        lambda c: replicas.select_unmarked(
            c, rows(c, "SELECT storage_id FROM storage LIMIT 1")[0]["storage_id"], 1000
        ),
        {"replica_coldest"},
    ),
    "those behind them are selected": (_second_page, {"replica_coldest"}),
    "storages with checks due are found": (
        lambda c: checks.storages_with_checks_due(c, LATER),
        {"replica_check"},
    ),
    "looks that failed are counted": (
        lambda c: checks.count_failed_looks(c, LATER),
        {"operation_failed"},
    ),
    "the copies of lost items are found": (
        lambda c: checks.select_unasked(
            c, None,
            [one["oid"] for one in rows(c, "SELECT oid FROM data_item ORDER BY oid LIMIT 100")],
        ),
        {"replica_item_storage", "operation_uid"},
    ),
    "checks are selected": (
        lambda c: checks.select_checks(c, checks.lock_budgets(c, LATER)[0], LATER, 1000),
        {"replica_check"},
    ),
    "the oldest looks are told": (
        lambda c: checks.check_overview(c, LATER),
        {"replica_check"},
    ),
    "the limits are looked at": (
        lambda c: approval.find_stop(c, LATER, LIMITS, expiring.Due(1, 1), expiring.Due(0, 0)),
        set(),
    ),
    "approved plans are found": (lambda c: approval.approved_plans(c, LATER), set()),
    "waiting plans are found": (approval.waiting_plans, set()),
    "the status is told": (
        lambda c: status(c, NOW),
        {"operation_due", "operation_failed", "operation_ended", "data_item_below_target"},
    ),
    "one item is found": (
        lambda c: browse.get_item(c, "test:folder-7/item-7"),
        {"data_item_uri_version_key", "replica_item_storage"},
    ),
    "a page of a folder is listed": (
        lambda c: browse.list_items(c, prefix="test:folder-7/", limit=50),
        {"data_item_uri_version_key"},
    ),
    "an item is explained": (
        lambda c: browse.explain_item(c, "test:folder-7/item-7"),
        {"data_item_uri_version_key", "replica_item_storage", "operation_uid"},
    ),
    "an item's events are listed": (
        lambda c: browse.item_events(c, browse.get_item(c, "test:folder-7/item-7")["oid"]),
        {"event_oid"},
    ),
    "watches are counted": (lambda c: watches.count_watches_due(c, LATER), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_no_question_reads_the_catalogue(site: Engine, name: str) -> None:
    """The partial index made for it answers each question; nothing big is read through."""
    work, wanted = CASES[name]
    plan = plan_of(site, work)
    assert plan.scanned == set()
    assert wanted <= plan.indexes


def test_what_is_taken_from_a_long_list_comes_by_its_index(site: Engine) -> None:
    """With all items on the planner's list, a batch is counted and taken by evaluation_due."""
    with site.connect() as connection:
        run(
            connection,
            """INSERT INTO evaluation (oid, due_at) SELECT oid, created_at FROM data_item
               ON CONFLICT (oid) DO NOTHING""",
        )
        run(connection, "ANALYZE evaluation")
        plan = Plan(connection)
        with recorded(site) as sent:
            replicas.take_evaluations(connection, LATER, 1000)
        plan.take(_explained(connection, *sent[0]))
        connection.rollback()
    assert "evaluation_due" in plan.indexes


@pytest.mark.parametrize(
    "index",
    ["operation_due", "operation_lease", "operation_failed", "data_item_expiring",
     "data_item_below_target", "replica_expiring", "replica_leaving", "replica_refused"],
)  # fmt: skip
def test_an_index_of_due_work_is_as_small_as_the_work(site: Engine, index: str) -> None:
    """50,000 items and 150,000 rows at rest leave these indexes at a few pages."""
    with site.connect() as connection:
        found = rows(
            connection,
            """SELECT sum(c.relpages)::bigint AS pages, sum(c.reltuples)::bigint AS entries
                 FROM pg_class c
                WHERE c.oid = CAST(:index AS regclass) OR c.oid IN (
                  SELECT inhrelid FROM pg_inherits WHERE inhparent = CAST(:index AS regclass))""",
            index=index,
        )[0]
    assert found["entries"] <= 500
    assert found["pages"] < 300


def _some(connection: Connection) -> expiring.Lot:
    """Replicas of which none is due, and their items."""
    found = rows(connection, "SELECT uid, oid FROM replica ORDER BY uid LIMIT 1000")
    return expiring.Lot(
        b"".join(row["uid"].bytes for row in found), b"".join(row["oid"].bytes for row in found)
    )


def test_a_deletion_reads_no_table_through(site: Engine) -> None:
    """Select, prove, certify and mark a batch: triggers too look items and replicas up by key, and
    none is read that is not concerned."""
    context = Context(site, load_settings(), "user:test", clock=lambda: LATER)
    kept: list[dict[str, Any]] = []

    def batch(connection: Connection) -> None:
        run(
            connection,
            """UPDATE data_item SET expires_at = created_at WHERE oid IN (
                 SELECT oid FROM data_item WHERE state = 'READY' ORDER BY oid DESC LIMIT 500)""",
        )
        before = _read_through(connection)
        granted, refused = plan_batch(connection, context, 1000)
        after = _read_through(connection)
        kept.append({"looked_at": len(granted) + len(refused), "before": before, "after": after})

    context.rehearse(batch)
    (found,) = kept
    before, after = found["before"], found["after"]
    assert found["looked_at"] == 1000
    for table in ("data_item", "replica"):
        assert after[table]["scans"] == before[table]["scans"]
        assert after[table]["fetched"] - before[table]["fetched"] < 12 * 1000


def test_a_proof_knows_how_many_good_copies_it_weighs(site: Engine) -> None:
    """Where they are taken for a few, older servers compare each with each of those that go: that
    takes seventy times as long."""
    with begin(site, "user:test", LATER) as connection:
        found = rows(
            connection, "SELECT uid FROM replica WHERE state = 'READY' ORDER BY uid LIMIT 2000"
        )
        assert len(deletions.prove(connection, [row["uid"] for row in found])) == 2000
        plan = rows(connection, "EXPLAIN (FORMAT json) SELECT FROM copy WHERE state = 'READY'")
        counted = rows(connection, "SELECT count(*) AS n FROM copy WHERE state = 'READY'")[0]["n"]
        connection.rollback()
    expected = plan[0]["QUERY PLAN"][0]["Plan"]["Plan Rows"]
    assert counted >= 2000
    assert 0.5 * counted < expected < 2 * counted


def test_the_share_of_a_collection_that_goes_is_counted_from_what_goes(site: Engine) -> None:
    """The items of a large collection that stay are not looked at, each time that one is due."""
    with site.connect() as connection:
        run(connection, "SELECT set_config('dlm.now', :now, true)", now=NOW.isoformat())
        run(connection, "INSERT INTO collection (collection_id, name) VALUES (:id, 'all')",
            id=new_id())  # fmt: skip
        run(connection, "UPDATE data_item SET collection_id = c.collection_id FROM collection c")
        run(connection, "ANALYZE data_item")
        plan = Plan(connection)
        with recorded(site) as sent:
            approval.find_stop(connection, LATER, LIMITS, expiring.Due(1, 1), expiring.Due(0, 0))
        plan.take(_explained(connection, *sent[-1]))
        connection.rollback()
    assert {"data_item_expiring", "data_item_expired"} <= plan.indexes


def _read_through(connection: Connection) -> dict[str, dict[str, int]]:
    """Sequential scans of the large tables in this transaction so far, and rows by indexes."""
    found = rows(
        connection,
        """SELECT relname, seq_scan AS scans, idx_tup_fetch AS fetched
             FROM pg_stat_xact_user_tables WHERE relname IN ('data_item', 'replica')""",
    )
    return {row["relname"]: row for row in found}


def test_a_claim_reads_what_it_takes_of_a_long_queue(site: Engine) -> None:
    """Of 20,000 copies that wait a claim of 100 reads some hundred rows: a drainer that works a
    long queue off would else read it through for each of its claims."""
    with site.connect() as connection:
        run(connection, "SELECT set_config('dlm.now', :now, true)", now=NOW.isoformat())
        run(
            connection,
            """UPDATE operation SET state = 'QUEUED', finished_at = NULL, priority = oid_hash % 3
                 FROM (SELECT operation_id AS id, abs(hashtext(oid::text)) AS oid_hash
                         FROM operation WHERE state = 'DONE' LIMIT 20000) o
                WHERE operation_id = o.id""",
        )
        connection.commit()
    try:
        with site.connect() as connection:
            # not analysed since, as a queue that has just been filled
            with recorded(site) as sent:
                _claim_copies(connection, 100)
            connection.rollback()
            explained = _explained(connection, *sent[0], "ANALYZE, ")
            connection.rollback()
        assert _rows_read(explained) < 2000
    finally:
        with site.begin() as connection:
            run(connection, "SELECT set_config('dlm.now', :now, true)", now=NOW.isoformat())
            run(
                connection,
                """UPDATE operation SET state = 'DONE', finished_at = :now, priority = 0
                    WHERE operation_id IN (SELECT operation_id FROM operation
                      WHERE state = 'QUEUED' ORDER BY operation_id OFFSET 180)""",
                now=NOW,
            )


def _claim_copies(connection: Connection, limit: int) -> None:
    operations.claim_operations(
        connection, OperationKind.COPY, token=new_id(), worker="w", limit=limit,
        lease=timedelta(seconds=60), now=LATER,
    )  # fmt: skip


def _rows_read(node: dict[str, Any]) -> int:
    """Rows that the scans of tables and indexes gave, or looked at in vain."""
    below = sum(_rows_read(child) for child in node.get("Plans", []))
    if "Relation Name" not in node or node["Node Type"] == "ModifyTable":
        return below
    found = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    return below + int(found * node["Actual Loops"])
