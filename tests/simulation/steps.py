"""The steps of the suite: 1,600 of four seeds, and 17,600 of 20 with what is slow. Four files, as
its workers share out files."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.simulation.machine import Lifecycle
from tests.simulation.mixed import Mixed
from tests.simulation.run import simulate

STEPS, FEWER = 1000, 400


def seeds(quarter: int) -> list[object]:
    """Five, four of them for the longer run."""
    first = 5 * quarter - 4
    return [
        first,
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(first + 1, first + 5)),
    ]


def nothing_is_lost(engine: Engine, seed: int) -> None:
    """Every promise holds after every step; else the shortest story that breaks one is shown. Every
    other seed has bundles and tapes among its storages."""
    machine, steps = Mixed if seed % 2 else Lifecycle, FEWER if seed % 5 == 1 else STEPS
    result = simulate(engine, steps, seed, machine=machine)
    assert result.violation is None, "\n".join([result.violation or "", *result.story])
    assert result.steps >= steps
