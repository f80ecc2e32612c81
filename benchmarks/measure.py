"""What the benchmarks share: a site on a fresh durable PostgreSQL, timing, the form of a result."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
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


def beside(bare: Callable[[int], Any], rounds: Iterable[Callable[[], Any]]) -> tuple[float, float]:
    """Seconds of ours and of the bare limit, which is taken before, between and after the rounds of
    ours: machines are never the same for long. Both are means.

    ``bare`` is told its number, so that it can write to a place of its own; what ``rounds`` does
    before it gives the next one is not measured.
    """
    limits, times = [seconds(lambda: bare(0))], []
    for number, work in enumerate(rounds, start=1):
        times.append(seconds(work))
        limits.append(seconds(partial(bare, number)))
    return fmean(times), fmean(limits)


def _resident(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most since the peak was begun anew."""
    status = Path("/proc/self/status").read_text()
    (found,) = (line.split()[1] for line in status.splitlines() if line.startswith(f"{what}:"))
    return int(found) * 1024 / 1e6


#: MB that a worker takes at most, of each move
peaks: list[float] = []
_BEGUN = _resident("VmRSS")


def peaking(work: Callable[[], Any]) -> None:
    """Do ``work``, and note in ``peaks`` what a worker takes at most that does nothing else: what
    other cases and bare tools left in this process is not of it."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    peaks.append(_BEGUN + _resident("VmHWM") - before)


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


def make_files(folder: Path, count: int, size: int) -> None:
    """``count`` files of ``size`` random bytes, a hundred a folder."""
    for n in range(count):
        path = folder / f"{n // 100:03}" / f"{n:05}.dat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


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


def main(cases: Callable[[Path, Path, bool], Iterator[Result]]) -> None:
    """Run some cases by themselves, and print them as they come; ``--quick`` tries them out."""
    with server() as home, scratch() as folder:
        for row in cases(home, folder, "--quick" in sys.argv):
            show(row)


def show(row: Result) -> None:
    """Print a result."""
    line = "{case:55} {value:>12} {unit:10} limit {limit:>12}  ratio {ratio}"
    print(line.format(**row), flush=True)
