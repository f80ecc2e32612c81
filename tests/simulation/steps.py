"""The suite's steps: 4,000, and 20,000 of 20 seeds with what is slow. In four files, since the
suite's workers share out files."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.simulation.machine import Lifecycle
from tests.simulation.mixed import Mixed
from tests.simulation.run import simulate

STEPS = 1000


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
    machine = Mixed if seed % 2 else Lifecycle
    result = simulate(engine, STEPS, seed, machine=machine)
    assert result.violation is None, "\n".join([result.violation or "", *result.story])
    assert result.steps >= STEPS
