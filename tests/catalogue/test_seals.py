"""The log is sealed day by day; what is changed, removed or added afterwards is named."""

from __future__ import annotations

import threading
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from dlm_core.catalogue.engine import rows, run, transact
from dlm_core.catalogue.seals import (
    Checked,
    audit_horizon,
    drop_month,
    newest_seals,
    seal_days,
    verify_seals,
)
from dlm_core.errors import CatalogueError, InvalidValueError
from dlm_core.lifecycle.seal import seal_log
from tests.site import make_site

#: a month with a partition of its own, long over on any machine
FIRST = date(2024, 2, 27)
DAYS = 6


@pytest.fixture
def log(engine: Engine) -> Engine:
    """Six days of events and certificates in two months, one day without any; sealed."""

    def write(c: Connection) -> None:
        run(c, "SELECT dlm_ensure_partitions(CAST('2024-02-01' AS timestamptz), 2)")
        run(
            c,
            """INSERT INTO event (at, noun, action, actor, detail)
               SELECT d + n * interval '7 hours', 'replica', 'refused', 'user:a',
                      jsonb_build_object('n', n)
                 FROM generate_series(CAST(:first AS timestamptz), :last, interval '1 day') d,
                      generate_series(0, 3) n
                WHERE extract(day FROM d AT TIME ZONE 'UTC') <> 29""",
            first=datetime(2024, 2, 27, tzinfo=UTC),
            last=datetime(2024, 3, 3, tzinfo=UTC),
        )
        # of replicas that there are not
        run(c, "SET LOCAL session_replication_role = replica")
        run(
            c,
            """INSERT INTO deletion (deletion_id, step, basis, uid, oid, storage_id, from_state,
                 survivors, survivor_weight, target_phase, holds_examined, reason, actor, proved_at,
                 valid_until)
               SELECT CAST(left(uuid7_floor(d)::text, 14) || '7' ||
                           right(gen_random_uuid()::text, 21) AS uuid),
                      'purge', 'item_expired', gen_random_uuid(), gen_random_uuid(),
                      gen_random_uuid(), 'TRASHED', '[]', 0, 'SOLID', 0, 'old', 'run:x', d,
                      d + interval '1 hour'
                 FROM generate_series(CAST(:first AS timestamptz), :last, interval '9 hours') d""",
            first=datetime(2024, 2, 27, tzinfo=UTC),
            last=datetime(2024, 3, 3, 23, tzinfo=UTC),
        )

    transact(engine, "test", write)
    assert _seal(engine)
    return engine


def _seal(engine: Engine) -> int:
    """Seal all that is over, a month in each transaction; how many days."""
    horizon, total = transact(engine, "test", audit_horizon), 0
    while sealed := transact(engine, "test", lambda c: seal_days(c, horizon)):
        assert sealed <= 2 * 31
        total += sealed
    return total


def _verify(engine: Engine, anchor: str | None = None) -> Checked:
    return transact(engine, "test", lambda c: verify_seals(c, anchor))


def _tamper(engine: Engine, *statements: str) -> None:
    """As a superuser who switches the triggers off."""
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in statements:
            assert connection.execute(text(statement)).rowcount


def _some(engine: Engine, feed: str, day: str = "2024-03-01") -> Any:
    key = {"event": "seq", "deletion": "deletion_id"}[feed]
    time = {"event": "at", "deletion": "proved_at"}[feed]
    found = transact(
        engine, "test",
        lambda c: rows(c, f"SELECT {key} AS key FROM {feed} WHERE {time} >= '{day} 00:00Z' "
                          f"ORDER BY {time} LIMIT 2"),
    )  # fmt: skip
    return found[1]["key"]


def test_an_untouched_log_verifies_and_sealing_again_changes_nothing(log: Engine) -> None:
    """Days without rows are sealed too; the present day is not."""
    found = _verify(log)
    assert found.findings == [] and found.rows == 20 + 16
    before = transact(log, "test", lambda c: rows(c, "SELECT * FROM audit_seal ORDER BY 1, 2"))
    assert _seal(log) == 0
    after = transact(log, "test", lambda c: rows(c, "SELECT * FROM audit_seal ORDER BY 1, 2"))
    assert before == after
    assert {row["rows"] for row in before if row["day"] == date(2024, 2, 29)} == {0, 2}
    assert max(row["day"] for row in before) < datetime.now(UTC).date()


@pytest.mark.parametrize("feed", ["event", "deletion"])
@pytest.mark.parametrize("act", ["changed", "missing", "added"])
def test_one_row_is_named(log: Engine, feed: str, act: str) -> None:
    """A row that was changed, is missing, or was added: its day and its key are told."""
    key, name = _some(log, feed), {"event": "event", "deletion": "certificate"}[feed]
    column = {"event": "seq", "deletion": "deletion_id"}[feed]
    if act == "changed":
        _tamper(log, f"UPDATE {feed} SET actor = 'user:innocent' WHERE {column} = '{key}'")
    elif act == "missing":
        _tamper(log, f"DELETE FROM {feed} WHERE {column} = '{key}'")
    elif feed == "event":
        _tamper(log, "INSERT INTO event (seq, at, noun, action, actor) "
                     "VALUES (987654321, '2024-03-01 12:00Z', 'audit', 'x', 'user:b')")  # fmt: skip
        key = 987654321
    else:
        key = "018df7e2-0000-7000-8000-00000000002a"
        _tamper(log, f"""INSERT INTO deletion SELECT '{key}', step, basis, uid, oid, storage_id,
            from_state, survivors, survivor_weight, target_phase, holds_examined, reason, plan_id,
            actor, proved_at, valid_until, xid, size FROM deletion LIMIT 1""")  # fmt: skip
    (finding,) = _verify(log).findings
    assert (finding.feed, finding.day) == (feed, date(2024, 3, 1))
    assert act in finding.problem
    assert finding.row is not None and finding.row.startswith(f"{name} {key}")


def test_several_rows_are_told_by_day(log: Engine) -> None:
    """Which rows cannot be told then; on which days and how many can."""
    _tamper(log, "DELETE FROM event WHERE at >= '2024-03-01 00:00Z' AND at < '2024-03-02 00:00Z'",
            "UPDATE event SET actor = 'x' || seq WHERE at < '2024-02-28 00:00Z'")  # fmt: skip
    found = [(one.day, one.problem, one.row) for one in _verify(log).findings]
    assert found == [
        (date(2024, 2, 27), "a row was changed", None),
        (date(2024, 3, 1), "4 rows are missing", None),
    ]


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE audit_seal SET rows = 3 WHERE feed = 'event' AND day = '2024-03-01'", "changed"),
        ("DELETE FROM audit_seal WHERE feed = 'event' AND day = '2024-02-28'", "are missing after"),
        ("DELETE FROM audit_seal WHERE feed = 'event' AND day < '2024-03-01'", "before this day"),
    ],
)
def test_the_seals_themselves_are_looked_at(log: Engine, statement: str, problem: str) -> None:
    """A seal that was changed or is missing, in the middle or at the start."""
    _tamper(log, statement)
    assert any(problem in one.problem for one in _verify(log).findings)


def test_a_chain_that_was_written_anew_lacks_the_anchor(log: Engine) -> None:
    """All rows and seals consistent again: a seal that was noted elsewhere tells."""
    anchor = transact(log, "test", newest_seals)["event"]
    assert _verify(log, anchor).findings == []
    _tamper(log, "UPDATE event SET actor = 'user:innocent' WHERE at < '2024-02-28 00:00Z'",
            "DELETE FROM audit_seal WHERE feed = 'event'")  # fmt: skip
    assert _seal(log)
    assert _verify(log).findings == []
    (finding,) = _verify(log, anchor).findings
    assert "written anew" in finding.problem


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit_seal",
        "TRUNCATE audit_seal",
        "UPDATE audit_seal SET rows = rows + 1",
        "UPDATE audit_seal SET dropped_at = now() WHERE rows > 0",
    ],
)
def test_seals_are_not_changed_with_plain_sql(log: Engine, statement: str) -> None:
    """Nor is a day called dropped whose rows are there."""
    with pytest.raises(CatalogueError):
        transact(log, "test", lambda c: run(c, statement))


def test_a_month_dropped_by_retention_is_no_tampering(log: Engine) -> None:
    """The seals stay, marked; rows that turn up there afterwards are told; who did it is logged."""
    assert transact(log, "user:a", lambda c: drop_month(c, "event", date(2024, 2, 1))) == 8
    found = _verify(log)
    assert (found.findings, found.dropped_days) == ([], 3)
    logged = transact(log, "t", lambda c: rows(c, "SELECT * FROM event WHERE noun = 'audit'"))
    assert [(row["action"], row["actor"]) for row in logged] == [("dropped", "user:a")]
    with pytest.raises(InvalidValueError, match="not dropped before"):
        transact(log, "user:a", lambda c: drop_month(c, "event", date(2024, 2, 1)))
    _tamper(log, "INSERT INTO event (at, noun, action, actor) "
                 "VALUES ('2024-02-27 12:00Z', 'replica', 'refused', 'user:b')")  # fmt: skip
    assert [one.problem for one in _verify(log).findings] == [
        "1 rows on a day whose rows were dropped"
    ]


def test_a_month_that_is_not_over_is_not_dropped(log: Engine) -> None:
    """Days that are not sealed keep their rows."""
    with pytest.raises(InvalidValueError, match="all sealed"):
        transact(log, "t", lambda c: drop_month(c, "event", datetime.now(UTC).date()))


def test_a_day_is_sealed_only_when_its_transactions_have_ended(log: Engine, tmp_path: Any) -> None:
    """A transaction from before the horizon may have rows that nobody sees: sealing waits."""
    context = make_site(log, tmp_path).context
    with log.connect() as other:
        other.execute(
            text("INSERT INTO event (noun, action, actor) VALUES ('replica', 'refused', 'y')")
        )
        assert seal_log(context, 0.3) is None
        timer = threading.Timer(0.5, other.rollback)
        timer.start()
        assert seal_log(context, 20) == 0
        timer.join()


def test_the_hashes_are_the_same_for_every_session(log: Engine) -> None:
    """Neither time zone nor date style of a session changes what is computed."""
    question = text(
        """SELECT string_agg(digest || rows, ',' ORDER BY digest) FROM (
             SELECT digest, rows FROM audit_digests('event', '2024-02-01', '2024-03-31')
             UNION ALL SELECT audit_seal_of(s), 0 FROM audit_seal s) d"""
    )
    answers = set()
    for zone, style in (
        ("UTC", "ISO, YMD"),
        ("Asia/Tokyo", "German"),
        ("America/Lima", "SQL, DMY"),
    ):
        with log.begin() as connection:
            connection.execute(text(f"SET LOCAL TimeZone = '{zone}'"))
            connection.execute(text(f"SET LOCAL DateStyle = '{style}'"))
            answers.add(connection.execute(question).scalar())
    assert len(answers) == 1 and answers != {None}


def test_the_last_sealed_day_is_over_for_an_hour(engine: Engine) -> None:
    """A client whose clock is a little behind makes keys of the day before."""
    horizon = transact(engine, "t", audit_horizon)
    assert horizon.last_day <= (datetime.now(UTC) - timedelta(hours=1)).date() - timedelta(days=1)


#: another value of a column, by its name or its type
_OTHER = {
    "noun": "'item'",
    "step": "'release'",
    "basis": "'replica_expired'",
    "from_state": "'READY'",
    "target_phase": "'GAS'",
    "survivors": "'[2]'",
    "deletion_id": "CAST(left(deletion_id::text, 24) || 'ffffffffffff' AS uuid)",
    "text": "coalesce({0}, '') || 'x'",
    "uuid": "gen_random_uuid()",
    "jsonb": """'{{"other": 1}}'""",
    "xid8": "CAST('5' AS xid8)",
    "timestamp with time zone": "{0} + interval '1 ms'",
    "smallint": "coalesce({0}, 0) + 1",
    "integer": "coalesce({0}, 0) + 1",
    "bigint": "coalesce({0}, 0) + 1",
}


@pytest.mark.parametrize("feed", ["event", "deletion"])
def test_every_column_is_sealed(log: Engine, feed: str) -> None:
    """Whatever is changed in a row, columns of later schemas too, its day has another digest."""
    key, column = _some(log, feed), {"event": "seq", "deletion": "deletion_id"}[feed]
    digest = text("SELECT digest FROM audit_digests(:f, '2024-03-01', '2024-03-01')")
    with log.connect() as connection:
        connection.execute(text("SET session_replication_role = replica"))
        if feed == "deletion":  # so that any other basis is allowed
            connection.execute(text("UPDATE deletion SET survivors = '[1]'"))
        before = connection.execute(digest, {"f": feed}).scalar_one()
        columns = connection.execute(
            text(
                """SELECT column_name, data_type FROM information_schema.columns
                    WHERE table_name = :feed"""
            ),
            {"feed": feed},
        ).all()
        for name, kind in columns:
            other = (_OTHER.get(name) or _OTHER[kind]).format(name)
            with connection.begin_nested() as point:
                changed = f"UPDATE {feed} SET {name} = {other} WHERE {column} = '{key}'"
                assert connection.execute(text(changed)).rowcount == 1
                assert connection.execute(digest, {"f": feed}).scalar_one() != before, name
                point.rollback()
        connection.rollback()
    assert len(columns) > 10
