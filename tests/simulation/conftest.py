"""An engine for stories, and machines that forget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.simulation.machine import Lifecycle
from tests.simulation.run import quick_engine


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh catalogue."""
    engine = quick_engine(database_url)
    Lifecycle.engine = engine
    yield engine
    # no test inherits another's findings
    Lifecycle.broken = None
    engine.dispose()
