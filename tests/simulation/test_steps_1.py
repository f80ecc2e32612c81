"""A quarter of the suite's steps."""

from __future__ import annotations

import pytest

from tests.simulation.steps import nothing_is_lost, seeds


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", seeds(1))
def test_nothing_is_lost_in_so_many_steps(engine, seed):
    """Every promise holds after every step, whatever comes in between."""
    nothing_is_lost(engine, seed)
