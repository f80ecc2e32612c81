"""``make bench``: measure, print, and write benchmarks/results.json. ``--quick`` tries it out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import catalogue, moving, moving_dav, moving_xrootd
from benchmarks.measure import scratch, server, show


def main() -> None:
    """Run all cases; each is a ratio to a bare limit of the same run."""
    quick = "--quick" in sys.argv
    with server() as home, scratch() as folder:
        found = catalogue.run_all(home, folder, quick)
        found += moving.run_all(home, folder, quick) + moving_dav.run_all(home, folder, quick)
        found += moving_xrootd.run_all(home, folder, quick)
    for row in found:
        show(row)
    if not quick:
        target = Path(__file__).parent / "results.json"
        target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
