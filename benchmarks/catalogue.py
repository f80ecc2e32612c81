"""The catalogue against the bare database: registration, expiry, lookup, a sensor's question."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, context, result, seconds
from dlm_core.catalogue import browse, items
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.items import Announcement, Terms
from dlm_core.catalogue.places import add_location, add_storage
from dlm_core.catalogue.replicas import count_evaluations_due
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.work import Context

_CHUNK = 10_000
_NO_LIMIT = 10**15
_REGISTERED = dict.fromkeys(("data_item", "replica", "event", "operation"), "true")


def places(core: Context, folder: Path) -> dict[str, uuid.UUID]:
    """Three LIQUID storages at three locations."""

    def make(connection: Any) -> dict[str, uuid.UUID]:
        found = {}
        for name in ("a", "b", "c"):
            (folder / name).mkdir(exist_ok=True)
            add_location(connection, name, now=core.clock())
            found[name] = add_storage(
                connection, name, location=name, interface="posix", root=str(folder / name),
                phase="LIQUID", now=core.clock(),
            )  # fmt: skip
        return found

    return core.transact(make)


def announcements(count: int, start: int = 0) -> Iterator[Announcement]:
    """Made-up payloads."""
    return (
        Announcement(f"bench:{n // 1000}/file-{n}.dat", f"{n // 1000}/file-{n}.dat", n)
        for n in range(start, start + count)
    )


def announce(core: Context, storage_id: uuid.UUID, count: int) -> None:
    """Announce in chunks, as a registration does."""
    for start in range(0, count, _CHUNK):
        part = announcements(min(_CHUNK, count - start), start)
        core.transact(
            lambda c, p=part: items.announce(c, storage_id, p, Terms(), core.actor, core.clock())
        )


def registration(home: Path, folder: Path, count: int, rounds: int) -> Result:
    """Items, replicas, events and operations, against a binary COPY of the same rows into the
    same tables without foreign keys and triggers; means of some rounds."""
    times, limits = [], []
    for _ in range(rounds):
        with context(home) as core:
            storage_id = places(core, folder)["a"]
            times.append(seconds(partial(announce, core, storage_id, count)))
            limits.append(_bare_copy(core, _REGISTERED)[0])
    ours, limit = statistics.fmean(times), statistics.fmean(limits)
    return result("registration of metadata", count / ours, "items/s", count / limit)


def _bare_copy(core: Context, written: dict[str, str]) -> tuple[float, int]:
    """Seconds for the bare COPY of rows that were written (tables with a condition each) into empty
    tables of the same columns, checks and indexes; and how many rows that is."""
    data: dict[str, bytes] = {}
    found = 0

    def prepare(connection: Any) -> None:
        nonlocal found
        cursor = connection.connection.cursor()
        for table, condition in written.items():
            columns = _columns(connection, table)
            cursor.execute(
                f"CREATE TABLE bare_{table} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS "
                "INCLUDING INDEXES INCLUDING GENERATED)"
            )
            if kept := _storage_parameters(connection, table):
                cursor.execute(f"ALTER TABLE bare_{table} SET ({kept})")
            source = f"(SELECT {columns} FROM {table} WHERE {condition})"
            with cursor.copy(f"COPY {source} TO STDOUT (FORMAT BINARY)") as copy:
                data[table] = b"".join(bytes(block) for block in copy)
            found += cursor.rowcount

    core.transact(prepare)

    def load(connection: Any) -> None:
        cursor = connection.connection.cursor()
        for table in written:
            columns = _columns(connection, table)
            with cursor.copy(f"COPY bare_{table} ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
                copy.write(data[table])

    return seconds(lambda: core.transact(load)), found


def _storage_parameters(connection: Any, table: str) -> str | None:
    """What LIKE leaves out: the fillfactor."""
    found = rows(
        connection,
        """SELECT array_to_string(reloptions, ', ') AS kept FROM pg_class
            WHERE oid = CAST(:table AS regclass)""",
        table=table,
    )
    return found[0]["kept"]


def _columns(connection: Any, table: str) -> str:
    found = rows(
        connection,
        """SELECT string_agg(column_name, ', ' ORDER BY ordinal_position) AS c
             FROM information_schema.columns
            WHERE table_schema = 'public' AND table_name = :table AND is_generated = 'NEVER'""",
        table=table,
    )
    return str(found[0]["c"])


def fill(core: Context, count: int) -> None:
    """READY items with three READY replicas each, made in the database."""
    # what the triggers would do, at the speed of the tables; keys in the order of time, as the DLM
    # makes them
    key = (
        "(left(uuid7_floor(now() - interval '2 hours' + {} * interval '1 ms')::text, 14) || '7' "
        "|| substr(gen_random_uuid()::text, 16))::uuid"
    )
    sql = f"""
      SET LOCAL session_replication_role = replica;
      INSERT INTO data_item (oid, uri, uri_bucket, size, digest, state)
        SELECT {key.format("n")}, 'fill:' || n / 1000 || '/' || n, lpad(to_hex(n % 1048576), 5, '0'),
               1000, 'sha256:' || repeat('0', 64), 'READY' FROM generate_series(1, {count}) n;
      INSERT INTO replica (uid, oid, storage_id, path, size, state, digest, checked_at)
        SELECT {key.format("row_number() OVER ()")}, oid, storage_id, 'fill/' || uri, 1000, 'READY',
               'sha256:' || repeat('0', 64), now()
          FROM data_item, (SELECT storage_id FROM storage) s;
      INSERT INTO tally SELECT 'item', NULL, state, count(*), sum(size) FROM data_item GROUP BY state;
      INSERT INTO tally SELECT 'replica', storage_id, state, count(*), sum(size) FROM replica
        GROUP BY storage_id, state"""

    def make(connection: Any) -> None:
        connection.connection.cursor().execute(sql)

    core.transact(make)
    with core.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


def expiry(core: Context, storage_id: uuid.UUID, expiring: int, rounds: int) -> Result:
    """Select, prove, certify and mark expired replicas among all, as a drainer does: the rows that
    this writes (certificates, operations, events, evaluations, replicas), against their bare COPY;
    means of some rounds."""
    times, limits, count = [], [], 0
    for _ in range(rounds):
        core.transact(partial(_let_expire, storage_id=storage_id, count=expiring))
        begun = core.transact(
            lambda c: rows(c, "SELECT now() AS at, max(seq) AS seq FROM event")[0]
        )
        planner = ExpiryPlanner(_NO_LIMIT, _NO_LIMIT)
        times.append(seconds(partial(planner, core)))
        if planner.trashed_items != expiring:
            raise SystemExit(f"{planner.trashed_items} of {expiring} replicas were trashed")
        new = f"proved_at >= '{begun['at']}'"
        written = {
            "deletion": new, "operation": f"created_at >= '{begun['at']}'", "evaluation": "true",
            "event": f"seq > {begun['seq']}",
            "replica": f"deletion_id IN (SELECT deletion_id FROM deletion WHERE {new})",
        }  # fmt: skip
        limit, count = _bare_copy(core, written)
        limits.append(limit)
        core.transact(partial(_drop_bare, tables=written))
    ours, limit = statistics.fmean(times), statistics.fmean(limits)
    return result(f"expiry of {expiring} replicas", count / ours, "rows/s", count / limit)


def _let_expire(connection: Any, storage_id: uuid.UUID, count: int) -> None:
    run(
        connection,
        """UPDATE replica SET expires_at = now(), expiry_reason = 'bench' WHERE uid IN (
             SELECT uid FROM replica WHERE storage_id = :s AND live AND expires_at IS NULL LIMIT :n)""",
        s=storage_id,
        n=count,
    )
    run(connection, "DELETE FROM evaluation")


def _drop_bare(connection: Any, tables: Iterable[str]) -> None:
    for table in tables:
        run(connection, f"DROP TABLE bare_{table}")


def lookup(core: Context, count: int) -> Result:
    """One item by uri with its replicas: the core function against the bare prepared SQL."""
    uris = [f"fill:{n // 1000}/{n}" for n in range(1, count, max(count // 2000, 1))]
    ours, bare = [], []
    with core.engine.connect() as connection:
        cursor = connection.connection.cursor()
        sql = (
            "SELECT i.*, r.*, s.name FROM data_item i LEFT JOIN replica r USING (oid) "
            "LEFT JOIN storage s USING (storage_id) WHERE i.uri = %s AND i.version = 1"
        )
        # in turns, so that what else this machine does falls on both
        for uri in uris:
            ours.append(seconds(lambda u=uri: browse.get_item(connection, u)))
            bare.append(seconds(lambda u=uri: cursor.execute(sql, (u,), prepare=True).fetchall()))
    return result(
        "lookup by uri, p50", 1 / statistics.median(ours), "1/s", 1 / statistics.median(bare)
    )


def sensor(core: Context) -> float:
    """Median seconds of a sensor's question with nothing due."""
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        core.transact(lambda c: count_evaluations_due(c, core.clock()))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def run_all(home: Path, folder: Path, quick: bool) -> list[Result]:
    """All cases of this module."""
    small, large = (2_000, 20_000) if quick else (10_000, 1_000_000)
    expiring = 2_000 if quick else 50_000
    found = [registration(home, folder, *((20_000, 1) if quick else (100_000, 3)))]
    with context(home) as core:
        places(core, folder)
        fill(core, small)
        at_small = sensor(core)
    limits = dict.fromkeys(("max_delete_items_per_day", "max_delete_bytes_per_day"), _NO_LIMIT)
    with context(home, **limits, max_delete_fraction=1) as core:
        storages = places(core, folder)
        fill(core, large)
        at_large = sensor(core)
        found.append(lookup(core, large))
        found.append(expiry(core, storages["a"], expiring, 1 if quick else 3))
    name = f"sensor with nothing due, {large} items against {small}"
    found.append(result(name, 1 / at_large, "1/s", 1 / at_small))
    return found
