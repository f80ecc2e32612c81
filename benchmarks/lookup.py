"""One item by uri with its replicas, through the core function and by bare prepared SQL."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from dlm_core.catalogue import embedded, schema
from dlm_core.catalogue.browse import get_item
from dlm_core.catalogue.engine import make_engine

_LIMIT = 3.0
_FILL = """
  INSERT INTO location (location_id, name) VALUES (gen_random_uuid(), 'here');
  INSERT INTO storage (storage_id, name, location_id, interface, class, root, phase)
    SELECT gen_random_uuid(), 's' || n, location_id, 'posix', 'disk', '/s' || n, 'LIQUID'
      FROM location, generate_series(1, 3) n;
  INSERT INTO data_item (oid, uri, uri_bucket, size, digest, metadata, created_at)
    SELECT uuid7_floor('2026-01-01Z'::timestamptz + n * interval '1 ms'), 'bench:item-' || n,
           '01234', n, 'sha256:' || repeat('a', 64), '{"telescope": "x", "band": 3}', '2026-01-01Z'
      FROM generate_series(1, %d) n;
  UPDATE data_item SET state = 'READY';
  INSERT INTO replica (uid, oid, storage_id, path, size, created_at, accessed_at)
    SELECT gen_random_uuid(), oid, storage_id, name, size, '2026-01-01Z', '2026-01-01Z'
      FROM data_item i, (SELECT storage_id FROM storage) s;
  UPDATE replica SET state = 'READY', digest = 'sha256:' || repeat('a', 64),
         checked_at = created_at;
"""
_BARE = """
  SELECT i.*, r.*, s.name FROM data_item i LEFT JOIN replica r USING (oid)
    LEFT JOIN storage s USING (storage_id) WHERE i.uri = %s AND i.version = 1"""


def run(quick: bool) -> list[dict[str, Any]]:
    """The p50 of a lookup in microseconds, and its ratio to bare prepared SQL (at most 3)."""
    count = 10_000 if quick else 100_000
    home = Path(tempfile.mkdtemp(prefix="dlm-bench-"))
    try:
        url = embedded.ensure_running(home)
        schema.upgrade(url)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in (_FILL % count).split(";\n"):
                if statement.strip():
                    connection.execute(statement.encode())
            connection.execute("VACUUM ANALYZE")
        return _measure(url, count, 1000 if quick else 5000)
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def _measure(url: str, count: int, tries: int) -> list[dict[str, Any]]:
    chance = random.Random(1)
    uris = [f"bench:item-{chance.randint(1, count)}" for _ in range(tries)]
    engine = make_engine(url)
    with psycopg.connect(url) as bare, engine.connect() as connection:
        ways: dict[str, Callable[[str], Any]] = {
            "bare": lambda uri: bare.execute(_BARE, [uri], prepare=True).fetchall(),
            "core": lambda uri: get_item(connection, uri),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        # in turns, so that what else this machine does falls on both
        for uri in uris:
            for name, look in ways.items():
                begun = time.perf_counter()
                look(uri)
                took[name].append(time.perf_counter() - begun)
    engine.dispose()
    p50 = {name: statistics.median(times) * 1e6 for name, times in took.items()}
    return [
        {"case": "lookup by uri, bare prepared SQL", "value": p50["bare"], "unit": "us p50",
         "limit": None, "ratio": None},
        {"case": "lookup by uri, core function", "value": p50["core"], "unit": "us p50",
         "limit": _LIMIT, "ratio": p50["core"] / p50["bare"]},
    ]  # fmt: skip
