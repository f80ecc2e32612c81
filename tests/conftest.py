"""A real PostgreSQL for the tests: one server a worker, one fresh database a test."""

from __future__ import annotations

import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine

from dlm_core.catalogue import embedded, schema
from dlm_core.catalogue.engine import make_engine
from tests.leftovers import ended_with_us
from tests.memory import fast_folder
from tests.schema.rules import let_time_be_told

# once, here: a fixture that is imported into several places is one of each, servers and all
pytest_plugins = ["tests.backends"]

_TEMPLATE = "dlm_template"

#: the files that take longest, first of all: at the end one would keep a worker busy while the
#: others have nothing to do. Two that start Dagster's services do not go beside each other.
_FIRST = (
    "endtoend/test_daemon.py",
    "simulation/test_steps_1.py",
    "simulation/test_steps_2.py",
    "simulation/test_steps_3.py",
    "simulation/test_steps_4.py",
    "cli/test_services.py",
    "crashpoints/test_crashpoints.py",
    "transfers/test_mover.py",
    "endtoend/test_secrets.py",
    "simulation/test_simulation.py",
    "catalogue/test_embedded.py",
    "cli/test_commands.py",
    "lifecycle/test_backup.py",
    "lifecycle/test_far.py",
    "lifecycle/test_staging.py",
    "storages/test_conformance.py",
)

# how long an example takes tells of the machine only
settings.register_profile(
    "tests", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job: Dagster would ignore SIGTERM like it, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the others stay as they are."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(_FIRST)}
    gone = [str(path) for path in places if not path.exists()]
    if gone:
        raise pytest.UsageError(f"_FIRST names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of this run's; it goes with all that the run started, however the run ends."""
    # not pytest's own folder, whose path may be too long for a socket
    folder = Path(tempfile.mkdtemp(prefix="dlm-test-", dir=fast_folder()))
    try:
        with ended_with_us(folder, tmp_path_factory.getbasetemp()):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_home(run_folder: Path) -> Iterator[Path]:
    """The home of an embedded server without crash safety; gone at the end."""
    home = run_folder / "home"
    try:
        embedded.ensure_running(home, durable=False)
        yield home
    finally:
        embedded.stop(home)


@pytest.fixture(scope="session")
def template_database(postgres_home: Path) -> str:
    """The name of a database with the newest schema, which every test gets a copy of."""
    _execute(postgres_home, f"CREATE DATABASE {_TEMPLATE}")
    url = embedded.database_url(postgres_home, _TEMPLATE)
    schema.upgrade(url)
    let_time_be_told(url)
    return _TEMPLATE


@pytest.fixture
def empty_database_url(postgres_home: Path) -> Iterator[str]:
    """The URL of an empty database, dropped after the test."""
    with _database(postgres_home, "template1") as url:
        yield url


@pytest.fixture
def database_url(postgres_home: Path, template_database: str) -> Iterator[str]:
    """The URL of a fresh catalogue, dropped after the test."""
    with _database(postgres_home, template_database) as url:
        yield url


@pytest.fixture
def other_database_url(postgres_home: Path, template_database: str) -> Iterator[str]:
    """The URL of a second fresh catalogue, dropped after the test."""
    with _database(postgres_home, template_database) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh catalogue."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@contextmanager
def _database(home: Path, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    # a copy of its files costs half of what writing its blocks to the log does
    _execute(home, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    try:
        yield embedded.database_url(home, name)
    finally:
        _execute(home, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(home: Path, statement: str) -> None:
    url = embedded.database_url(home, "postgres")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())
