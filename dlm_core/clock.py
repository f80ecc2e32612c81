"""The clock: the only place that reads the time; everything else takes ``now`` as an argument."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The present as an aware UTC time."""
    return datetime.now(UTC)
