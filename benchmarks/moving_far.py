"""Copies to a storage behind a protocol through a drainer, beside a bare tool that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, beside, context, peaking, result
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.places import add_location, add_storage
from dlm_core.catalogue.status import status
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import Context, drain
from dlm_core.types import OperationKind


@dataclass(frozen=True)
class Far:
    """A place on a server, as the catalogue has it."""

    interface: str
    root: str
    config: dict[str, Any]


def sets(quick: bool) -> dict[str, tuple[int, int]]:
    """Files and bytes of each: A many small ones, B few large ones."""
    if quick:
        return {"A": (500, 10_000), "B": (4, 20_000_000)}
    return {"A": (5000, 10_000), "B": (20, 10**8)}


def one_move(
    home: Path,
    source: Path,
    fars: Sequence[Far],
    label: str,
    bare: Callable[[int], Any],
    what: str = "",
    held: Far | None = None,
) -> Result:
    """All files of ``source`` to each of ``fars`` by a catalogue of its own, beside ``bare``, which
    is given the number of its run. They are taken from the same files at ``held``, if it is given.
    """
    held = held or Far("posix", str(source), {})
    files = [path for path in source.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    value, unit = (len(files), "files/s") if label == "A" else (total / 1e6, "MB/s")

    def rounds() -> Iterator[Callable[[], Any]]:
        for far in fars:
            with context(home) as core:
                _sites(core, held, far)
                register_tree(core, Source("a", "bench"))
                drain(core, {OperationKind.ADMIT: execute_admit})
                _plan(core)
                yield partial(peaking, partial(drain, core, {OperationKind.COPY: execute_copy}))
                _check(core, 2 * len(files))

    ours, limit = beside(bare, rounds())
    case = f"move {held.interface}-{fars[0].interface} {label}{what}"
    return result(case, value / ours, unit, value / limit)


def _sites(core: Context, source: Far, far: Far) -> None:
    now = core.clock()

    def make(connection: Any) -> None:
        for name, location, place in (("a", "here", source), ("far", "there", far)):
            add_location(connection, location, now=now)
            add_storage(
                connection, name, location=location, interface=place.interface, root=place.root,
                phase="LIQUID", config=place.config, now=now,
            )  # fmt: skip
        run(connection, "UPDATE storage SET mode = 'offline' WHERE name = 'far'")

    core.transact(make)


def _plan(core: Context) -> None:
    """Queue the copies; not before, so that registration is no part of what is measured."""
    due = (
        "INSERT INTO evaluation SELECT oid, now() FROM data_item "
        "ON CONFLICT (oid) DO UPDATE SET due_at = now()"
    )
    core.transact(lambda c: run(c, "UPDATE storage SET mode = 'read_write' WHERE name = 'far'"))
    core.transact(lambda c: run(c, due))
    plan_replication(core)


def _check(core: Context, ready: int) -> None:
    """A benchmark of copies that were not made is worth nothing."""
    found = core.transact(lambda c: status(c, core.clock()))["replicas"]
    if found.get("READY") == ready:
        return
    sql = "SELECT error_code, error FROM operation WHERE error_code IS NOT NULL LIMIT 3"
    why = core.transact(lambda c: rows(c, sql))
    raise SystemExit(f"not all copies were made: {found} {why}")
