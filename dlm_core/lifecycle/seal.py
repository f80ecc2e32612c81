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
    end, total = time.monotonic() + patience_seconds, 0
    while not context.stop.is_set():
        sealed: int | None = context.transact(lambda c: seals.seal_days(c, horizon))
        if sealed == 0:
            return total
        if sealed is not None:
            total += sealed
        elif time.monotonic() >= end:
            return None
        else:
            context.stop.wait(_POLL_SECONDS)
    return None
