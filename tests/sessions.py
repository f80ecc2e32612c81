"""Other sessions of a test's database: until they wait, until they are gone."""

from __future__ import annotations

import threading
import time

import psycopg
from sqlalchemy import Engine, text

_PATIENCE_SECONDS = 60
_WAITING = """
  SELECT count(*) FROM pg_stat_activity
   WHERE datname = current_database() AND wait_event_type = 'Lock'"""
_OTHERS = """
  SELECT FROM pg_stat_activity WHERE datname = current_database()
     AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


def until_it_waits(engine: Engine, thread: threading.Thread) -> None:
    """Until another session of this database, which is the thread's, waits for a lock."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.execute(text(_WAITING)).scalar_one():
            assert thread.is_alive(), "it did not wait"
            assert time.monotonic() < deadline, "it neither waits nor ends"
            time.sleep(0.01)


def end_sessions(engine: Engine) -> None:
    """Dispose of the engine, and wait until its sessions and those of programs that have ended
    (pg_dump) are gone: the server notices a little later."""
    engine.dispose()
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(_OTHERS).fetchone() is not None:
            assert time.monotonic() < deadline, "a session goes on"
            time.sleep(0.01)
