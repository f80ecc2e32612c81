"""What tests of the database's own rules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine

from tests.schema.rules import set_clock


@pytest.fixture
def db(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that is undone."""
    with engine.connect() as connection:
        set_clock(connection)
        yield connection
        connection.rollback()
