"""``make bench``: measure, print, and write benchmarks/results.json. ``--quick`` tries it out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import catalogue, moving, moving_dav, moving_pairs, moving_xrootd
from benchmarks.measure import Result, peaks, scratch, server, show

#: MB that a worker may take at most
_MEMORY = 400


def memory() -> Result:
    """The most that this process took during a move; a ratio above 1 is below the limit."""
    peak = max(peaks)
    case, value = "peak memory of a worker during the moves", round(peak)
    return {
        "case": case,
        "value": value,
        "unit": "MB",
        "limit": _MEMORY,
        "ratio": round(_MEMORY / peak, 3),
    }


def main() -> None:
    """Run all cases; each is a ratio to a bare limit of the same run."""
    quick = "--quick" in sys.argv
    found: list[Result] = []

    def take(results: Iterable[Result]) -> None:
        for row in results:
            show(row)
            found.append(row)

    with server() as home:
        for cases in (moving, moving_dav, moving_xrootd, moving_pairs):
            with scratch() as folder:
                take(cases.each(home, folder, quick))
        take([memory()])
        with scratch() as folder:
            take(catalogue.run_all(home, folder, quick))
    if not quick:
        target = Path(__file__).parent / "results.json"
        target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
