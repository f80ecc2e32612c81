"""``make bench``: measure, print, and write benchmarks/results.json. ``--quick`` tries it out."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from benchmarks import catalogue, moving, moving_dav, moving_xrootd
from benchmarks.measure import Result, scratch, server, show

#: MB that a worker may take at most
_MEMORY = 400


def memory() -> Result:
    """Peak memory of this process, which was the worker of all moves, and the bare tools besides;
    a ratio above 1 is below the limit."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "case": "peak memory of the worker of all moves",
        "value": round(peak),
        "unit": "MB",
        "limit": _MEMORY,
        "ratio": round(_MEMORY / peak, 3),
    }


def main() -> None:
    """Run all cases; each is a ratio to a bare limit of the same run."""
    quick = "--quick" in sys.argv
    with server() as home, scratch() as folder:
        found = moving.run_all(home, folder, quick) + moving_dav.run_all(home, folder, quick)
        found += moving_xrootd.run_all(home, folder, quick)
        # before the cases that fill a catalogue with a million items from this very process
        found.append(memory())
        found += catalogue.run_all(home, folder, quick)
    for row in found:
        show(row)
    if not quick:
        target = Path(__file__).parent / "results.json"
        target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
