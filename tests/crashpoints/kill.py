"""Run a scenario in a process of its own that kills itself at a point: what a real crash does."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from tests.crashpoints.points import Points, kill_process
from tests.crashpoints.run import act
from tests.crashpoints.scenarios import SCENARIOS


def main(url: str, folder: str, name: str, now: str, at: str) -> None:
    """Act on the site in ``folder`` and its database until point ``at``."""
    scenario = next(one for one in SCENARIOS if one.name == name)
    act(url, Path(folder), scenario, datetime.fromisoformat(now), Points(int(at), kill_process))


if __name__ == "__main__":
    main(*sys.argv[1:])
