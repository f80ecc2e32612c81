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
from dlm_core.lifecycle.replicate import execute_copy
from dlm_core.lifecycle.work import Context, StoragePool, drain
from dlm_core.settings import Settings
from dlm_core.storages import s3
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind
from tests.fakes import Cut


def die() -> None:
    """As when memory runs out, once what was read is on its way."""
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, home: str, now: str, after: str, part: str, a: str, b: str) -> None:
    """Copy what is queued from storage ``a`` to ``b`` (arguments of open_storage, as JSON), up to
    ``after`` bytes."""
    s3.PART_SIZE = int(part)
    places: dict[str, Any] = {"a": json.loads(a), "b": json.loads(b)}

    def opened(row: Any) -> Any:
        storage = open_storage(row["name"], *places[row["name"]])
        return Cut(storage, int(after), die) if row["name"] == "a" else storage

    settings = Settings(home=Path(home), resume_bytes=1 << 20)
    context = Context(make_engine(url), settings, "user:test", storages=StoragePool(opened))
    context.clock = lambda: datetime.fromisoformat(now)
    drain(context, {OperationKind.COPY: execute_copy})


if __name__ == "__main__":
    main(*sys.argv[1:])
