"""``make simulate STEPS=… SEED=…``: many steps, and the shortest story of a violation."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from dlm_core.catalogue import embedded, schema
from tests.memory import fast_folder
from tests.schema.rules import let_time_be_told
from tests.simulation.machine import Lifecycle
from tests.simulation.mixed import Mixed
from tests.simulation.run import quick_engine, simulate

MACHINES = {"folders": Lifecycle, "mixed": Mixed}


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="about so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--machine",
        choices=MACHINES,
        default="mixed",
        help="folders only, or all kinds of storages",
    )
    chosen = parser.parse_args()
    # not below the working folder, whose path may be too long for a socket
    home = Path(tempfile.mkdtemp(prefix="dlm-sim-", dir=fast_folder()))
    begun, stop = time.monotonic(), threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def tell(steps: int) -> None:
        seconds = time.monotonic() - begun
        sys.stdout.write(f"{steps} steps, {seconds:.0f} s, {steps / seconds:.0f} a second\n")
        sys.stdout.flush()

    try:
        embedded.ensure_running(home, durable=False)
        url = embedded.database_url(home)
        schema.upgrade(url)
        let_time_be_told(url)
        engine = quick_engine(url)
        machine = MACHINES[chosen.machine]
        result = simulate(engine, chosen.steps, chosen.seed, tell, machine=machine, stop=stop)
        engine.dispose()
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    for what, count in sorted(result.seen.items()):
        sys.stdout.write(f"{count:8} {what}\n")
    if result.violation is not None:
        sys.stdout.write(f"\n{result.violation}\nafter\n")
        sys.stdout.writelines(f"  {n}. {line}\n" for n, line in enumerate(result.story, 1))
    violations = int(result.violation is not None)
    sys.stdout.write(f"steps: {result.steps} violations: {violations} seed: {chosen.seed}\n")
    return violations


if __name__ == "__main__":
    sys.exit(main())
