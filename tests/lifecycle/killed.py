"""A worker that the kernel kills in the middle of a large copy, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from dlm_core.catalogue.engine import make_engine
from dlm_core.errors import PayloadNotFoundError
from dlm_core.lifecycle.replicate import execute_copy
from dlm_core.lifecycle.work import Context, StoragePool, drain
from dlm_core.settings import Settings
from dlm_core.storages import s3
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind
from tests.fakes import Cut

#: of 12 MB that were read so many are there, in whole parts or blocks
ARRIVED = 10 << 20


def wait_for_arrival(storage: Any) -> None:
    """Until most of what was read is in temporary files or parts of uploads on ``storage``."""
    deadline = time.monotonic() + 60
    while _arrived(storage) < ARRIVED:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _arrived(storage: Any) -> int:
    if parts := getattr(storage, "_parts", None):
        begun = [one for one in parts._unfinished(parts._s3.prefix) if parts._look(one)]
        return sum(one.size() for one in begun)
    try:
        return sum(entry.size for entry in storage.walk(".dlm/tmp"))
    except PayloadNotFoundError:
        return 0


def main(url: str, home: str, now: str, after: str, part: str, a: str, b: str) -> None:
    """Copy what is queued from storage ``a`` to ``b`` (arguments of open_storage, as JSON), up to
    ``after`` bytes."""
    s3.PART_SIZE = int(part)
    places: dict[str, Any] = {"a": json.loads(a), "b": json.loads(b)}

    def die() -> None:
        """As when memory runs out."""
        wait_for_arrival(open_storage("b", *places["b"]))
        os.kill(os.getpid(), signal.SIGKILL)

    def opened(row: Any) -> Any:
        storage = open_storage(row["name"], *places[row["name"]])
        return Cut(storage, int(after), die) if row["name"] == "a" else storage

    settings = Settings(home=Path(home), resume_bytes=1 << 20)
    context = Context(make_engine(url), settings, "user:test", storages=StoragePool(opened))
    context.clock = lambda: datetime.fromisoformat(now)
    drain(context, {OperationKind.COPY: execute_copy})


if __name__ == "__main__":
    main(*sys.argv[1:])
