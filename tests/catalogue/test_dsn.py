"""Addresses of databases: several hosts, a primary with standbys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import create_engine, make_url, text

from dlm_core.catalogue import embedded
from dlm_core.catalogue.dsn import sqlalchemy_url
from dlm_core.catalogue.engine import make_engine, must_take_writes, rows, transact
from dlm_core.errors import CatalogueError, InvalidValueError


@pytest.fixture(scope="module")
def standby(run_folder: Path) -> Iterator[Path]:
    """The home of a second server which, like a standby, takes no writes."""
    home = run_folder / "standby"
    try:
        url = embedded.ensure_running(home, durable=False)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            connection.execute("SELECT pg_reload_conf()")
        while not _takes_no_writes(url):  # it is told, and does so a little later
            time.sleep(0.01)
        yield home
    finally:
        embedded.stop(home)


def _takes_no_writes(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SHOW default_transaction_read_only").fetchone() == ("on",)


def several(database_url: str, standby: Path) -> str:
    """A host that is not there, one that takes no writes, and the primary, in this order."""
    primary = conninfo_to_dict(database_url)
    name = str(primary["dbname"])
    second = conninfo_to_dict(embedded.database_url(standby, name))
    _mirror(standby, name)
    hosts = ("/nonexistent", second["host"], primary["host"])
    ports = (5432, second.get("port", 5432), primary.get("port", 5432))
    return (
        f"postgresql://{primary['user']}@/{primary['dbname']}"
        f"?host={','.join(map(str, hosts))}&port={','.join(map(str, ports))}"
        "&target_session_attrs=read-write&connect_timeout=5"
    )


def _mirror(standby: Path, name: str) -> None:
    """A standby has the databases of its primary."""
    url = embedded.database_url(standby, "postgres")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"CREATE DATABASE {name}".encode())


def test_the_host_that_takes_writes_is_found(database_url: str, standby: Path) -> None:
    """The catalogue connects past a dead host and a standby, and can write."""
    engine = make_engine(several(database_url, standby))
    try:
        found = transact(
            engine,
            "user:test",
            lambda c: rows(
                c,
                "INSERT INTO location (location_id, name) "
                "VALUES (gen_random_uuid(), 'here') RETURNING name",
            ),
        )
    finally:
        engine.dispose()
    assert found == [{"name": "here"}]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize(
    "dsn", ["postgresql://[::1]:5433,[::2]/dlm", "host=::1,::2 port=5433,5432 dbname=dlm"]
)
def test_hosts_may_have_colons(dsn: str, driver: str) -> None:
    """Several IPv6 addresses reach the driver as they were given."""
    # as a string and back: Dagster's storage takes it so
    url = make_url(sqlalchemy_url(dsn, driver).render_as_string(hide_password=False))
    _, found = create_engine(url).dialect.create_connect_args(url)
    assert (found["host"], found["port"]) == ("::1,::2", "5433,5432")


def test_a_machine_that_vanished_is_not_waited_for(database_url: str) -> None:
    """Libpq asks whether it is there, for both drivers, unless the address says how."""
    given = sqlalchemy_url(make_conninfo(database_url, keepalives_idle=7), "psycopg")
    usual = sqlalchemy_url(database_url, "psycopg2")
    for url, idle in ((given, "7"), (usual, "15")):
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                driver = connection.connection.driver_connection
                assert driver is not None
                found = (
                    driver.get_dsn_parameters()
                    if url.drivername.endswith("psycopg2")
                    else driver.info.get_parameters()
                )
        finally:
            engine.dispose()
        assert (found["keepalives_idle"], found["tcp_user_timeout"]) == (idle, "30000")


def test_a_server_that_takes_no_writes_is_told(database_url: str) -> None:
    """With what would be right: a standby may have been reached."""
    options = "-c default_transaction_read_only=on"
    engine = make_engine(make_conninfo(database_url, options=options))
    try:
        with pytest.raises(CatalogueError, match="target_session_attrs=read-write"):
            transact(engine, "user:test", must_take_writes)
        with pytest.raises(CatalogueError, match="target_session_attrs=read-write"):
            transact(engine, "user:test", lambda c: rows(c, "CREATE TABLE t () "))
    finally:
        engine.dispose()


@pytest.mark.parametrize("dsn", ["host=a,b,c port=1,2", "host=a port=1,2", "host=a,b port=x"])
def test_ports_that_fit_no_hosts_are_refused(dsn: str) -> None:
    """In one line, as everything that libpq would not understand."""
    with pytest.raises(InvalidValueError, match="a port, or one for each host"):
        sqlalchemy_url(dsn, "psycopg")


def test_dagster_finds_it_too(database_url: str, standby: Path) -> None:
    """With the driver that Dagster uses."""
    url = sqlalchemy_url(several(database_url, standby), "psycopg2")
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            answer = connection.execute(text("SHOW transaction_read_only")).scalar()
    finally:
        engine.dispose()
    assert answer == "off"
