"""Two transactions at one moment, forced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

from dlm_core.errors import DlmError
from tests.site import Site

WAITING = """
  SELECT count(*) FROM pg_stat_activity
   WHERE datname = current_database() AND wait_event_type = 'Lock'"""
_PATIENCE_SECONDS = 60


@dataclass
class Second:
    """What the second one met."""

    waited: bool = False
    result: Any = None
    error: DlmError | None = None
    done: threading.Event = field(default_factory=threading.Event)


def overlap(
    site: Site, first: Callable[[Connection], Any], second: Callable[[], Any], *, undo: bool = False
) -> Second:
    """Do ``first`` in a transaction, start ``second`` beside it, and end the transaction (undone if
    asked) only when the second one waits for its locks or is through without."""
    met = Second()

    def run() -> None:
        try:
            met.result = second()
        except DlmError as error:
            met.error = error
        finally:
            met.done.set()

    class Undone(Exception):
        pass

    thread = threading.Thread(target=run)

    def held_open(connection: Connection) -> None:
        first(connection)
        thread.start()
        met.waited = _waits(site, met)
        if undo:
            raise Undone

    try:
        site.context.transact(held_open)
    except Undone:
        pass
    thread.join(_PATIENCE_SECONDS)
    assert not thread.is_alive(), "the second one waits for ever"
    return met


def _waits(site: Site, met: Second) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with site.context.engine.connect() as connection:
            if connection.execute(text(WAITING)).scalar_one():
                return True
        if met.done.wait(0.02):
            return False
    raise AssertionError("the second one neither waits nor ends")
