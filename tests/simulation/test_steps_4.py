"""A quarter of the suite's 20,000 steps."""

from __future__ import annotations

import pytest

from tests.simulation.steps import nothing_is_lost


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(16, 21))
def test_nothing_is_lost_in_a_thousand_steps(engine, seed):
    """Every promise holds after every step, whatever comes in between."""
    nothing_is_lost(engine, seed)
