"""Sealing the log, once a day is over and whoever may have written in it has ended."""

from __future__ import annotations

import time

from dlm_core.catalogue import seals
from dlm_core.lifecycle.work import Context

_POLL_SECONDS = 0.2


def seal_log(context: Context, patience_seconds: float = 30.0) -> int | None:
    """Seal the days that are over; how many, or None if a long transaction stood in the way for
    ``patience_seconds`` (the next call goes on)."""
    horizon = context.transact(seals.audit_horizon)
    end = time.monotonic() + patience_seconds
    while True:
        sealed: int | None = context.transact(lambda c: seals.seal_days(c, horizon))
        if sealed is not None or time.monotonic() >= end or context.stop.is_set():
            return sealed
        context.stop.wait(_POLL_SECONDS)
