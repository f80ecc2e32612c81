"""``make crashpoints``: every point of every scenario, with a table; exit code 1 if one failed."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from dlm_core.catalogue import embedded, schema
from tests.crashpoints.run import Arena, crash_at, difference, reference
from tests.crashpoints.scenarios import SCENARIOS, Scenario


def main(wanted: list[str]) -> int:
    """Run the scenarios whose names contain one of ``wanted``, all if there are none."""
    home = Path(tempfile.mkdtemp(prefix="dlm-crash-"))
    total = failed = 0
    print(f"{'scenario':24} {'points':>7} {'failed':>7} {'seconds':>8}", flush=True)
    try:
        embedded.ensure_running(home, durable=False)
        arena = Arena(home, "template_dlm", home / "arena")
        arena.create(arena.template, "template1")
        schema.upgrade(arena.url(arena.template))
        for scenario in SCENARIOS:
            if not wanted or any(word in scenario.name for word in wanted):
                points, bad = _run(arena, scenario)
                total, failed = total + points, failed + bad
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    print(f"crash points: {total} failed: {failed}")
    return 1 if failed or not total else 0


def _run(arena: Arena, scenario: Scenario) -> tuple[int, int]:
    begun, failed = time.monotonic(), 0
    arena.prepare(scenario)
    expected, names = reference(arena, scenario)
    for at, name in enumerate(names, start=1):
        wrong = difference(expected, crash_at(arena, scenario, at))
        if wrong:
            failed += 1
            print(f"  {scenario.name}, point {at} ({name}):", *wrong[:6], sep="\n    ", flush=True)
    seconds = time.monotonic() - begun
    print(f"{scenario.name:24} {len(names):7} {failed:7} {seconds:8.1f}", flush=True)
    arena.drop(arena.prepared)
    return len(names), failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
