"""What the benchmarks share: a site on a fresh durable PostgreSQL, timing, the form of a result."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from dlm_core.catalogue import embedded, schema
from dlm_core.catalogue.engine import make_engine
from dlm_core.lifecycle.work import Context
from dlm_core.settings import Settings

Result = dict[str, Any]


def result(case: str, value: float, unit: str, limit: float) -> Result:
    """A row of results.json: ours, and the bare limit of the same run; higher is better."""
    return {
        "case": case,
        "value": round(value, 3),
        "unit": unit,
        "limit": round(limit, 3),
        "ratio": round(value / limit, 3),
    }


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes. It begins with clean disk caches: what the one before left to be
    written would be paid by the next."""
    os.sync()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def beside(bare: Callable[[int], Any], ours: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of ours, and of the bare limit: the mean of one before and one after.

    ``bare`` is told its number, so that it can write to a place of its own.
    """
    times = [seconds(work) for work in (lambda: bare(0), ours, lambda: bare(1))]
    return times[1], (times[0] + times[2]) / 2


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dlm-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server() -> Iterator[Path]:
    """The home of an embedded PostgreSQL, fsync on."""
    with scratch() as home:
        embedded.ensure_running(home)
        try:
            yield home
        finally:
            embedded.stop(home)


@contextmanager
def context(home: Path, **settings: Any) -> Iterator[Context]:
    """A core context on a new catalogue."""
    name = f"bench_{uuid.uuid4().hex}"
    with psycopg.connect(embedded.database_url(home, "postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    url = embedded.database_url(home, name)
    schema.upgrade(url)
    engine = make_engine(url)
    gc.freeze()  # as a run's process does
    try:
        yield Context(engine, Settings(home=home, **settings), "user:bench")
    finally:
        engine.dispose()
