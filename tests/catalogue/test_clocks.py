"""The clocks of the machines that share a catalogue."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_core import clock
from dlm_core.catalogue import engine as transactions
from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import ClockSkewError
from dlm_core.lifecycle.work import Context
from dlm_core.settings import Settings


@pytest.mark.parametrize(
    ("seconds", "told"), [(960, r"9\d\d s ahead of"), (-960, r"9\d\d s behind")]
)
def test_a_machine_whose_clock_is_off_does_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: int, told: str
) -> None:
    """More than a quarter of a lease away from the server's: nothing is done, and it says why."""
    _shift(monkeypatch, seconds)
    context = Context(engine, Settings(lease_seconds=3600), "user:test")

    def work(connection: Any) -> None:
        run(connection, "INSERT INTO location (location_id, name) VALUES (gen_random_uuid(), 'x')")

    with pytest.raises(ClockSkewError, match=told):
        context.transact(work)
    monkeypatch.undo()
    assert context.transact(lambda c: rows(c, "SELECT name FROM location")) == []


@pytest.mark.parametrize("seconds", [840, -840])
def test_clocks_that_differ_a_little_are_no_matter(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """What a lease bears is borne."""
    _shift(monkeypatch, seconds)
    context = Context(engine, Settings(lease_seconds=3600), "user:test")
    assert context.transact(lambda c: rows(c, "SELECT 1 AS n")) == [{"n": 1}]


def test_an_answer_that_came_late_is_no_skew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's time lies between the question and its answer, however long that took."""
    times = iter([timedelta(minutes=-90), timedelta(minutes=90)])
    monkeypatch.setattr(transactions, "utc_now", lambda: clock.utc_now() + next(times))
    context = Context(engine, Settings(lease_seconds=3600), "user:test")
    assert context.transact(lambda c: rows(c, "SELECT 1 AS n")) == [{"n": 1}]


def _shift(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    by = timedelta(seconds=seconds)
    monkeypatch.setattr(transactions, "utc_now", lambda: clock.utc_now() + by)
