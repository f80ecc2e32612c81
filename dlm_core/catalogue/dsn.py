"""Which databases the settings mean, and their addresses in the forms that drivers want."""

from __future__ import annotations

import re

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import URL

from dlm_core.catalogue import embedded
from dlm_core.errors import CatalogueUnavailableError, InvalidValueError
from dlm_core.settings import Settings

#: a machine that vanished ends no connection: without these a worker waits for it for hours, and
#: no standby takes its place. Seconds, but for the last: milliseconds
_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}


def catalogue_url(settings: Settings) -> str:
    """The libpq URL of the catalogue; starts the embedded server if it is that and sleeps.

    Raises
    ------
    CatalogueUnavailableError
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return embedded.ensure_running(settings.home, settings.pg_bindir)


def dagster_dsn(settings: Settings) -> str:
    """The libpq address of Dagster's database: the one given, or ``dagster`` beside the catalogue.

    Beside a catalogue that is given, the database is made if it is missing.

    Raises
    ------
    CatalogueUnavailableError
    """
    if settings.dagster_database_url is not None:
        return settings.dagster_database_url.get_secret_value()
    catalogue = catalogue_url(settings)
    if settings.database_url is None:
        return embedded.database_url(settings.home, "dagster")
    _create_database(catalogue, "dagster")
    return make_conninfo(catalogue, dbname="dagster")


def sqlalchemy_url(dsn: str, driver: str) -> URL:
    """A libpq address (URL or ``key=value``, one host or several) for a driver of SQLAlchemy.

    ``driver`` is ``psycopg`` or ``psycopg2``. Passwords are in the result. A connection to a machine
    that vanished ends after half a minute, unless the address says otherwise.

    Raises
    ------
    InvalidValueError
        if libpq would not understand it; the value is not repeated, it may hold a password.
    """
    try:
        parts = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value}
    except psycopg.ProgrammingError:
        # libpq's message repeats the part it could not read, which may be the password
        raise InvalidValueError(
            what="database address", value="…", expected="a libpq URL, percent-encoded"
        ) from None
    hosts = parts.pop("host", "").split(",")
    ports = parts.pop("port", "5432").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    if len(ports) != len(hosts) or not all(re.fullmatch("[0-9]{0,5}", port) for port in ports):
        raise InvalidValueError(
            what="database address", value="…", expected="a port, or one for each host"
        )
    # a host in the query may be a socket's folder, or an IPv6 address with colons of its own
    where = {"host": ",".join(hosts), "port": ",".join(port or "5432" for port in ports)}
    if len(hosts) == 1:
        where = {"host": hosts[0], "port": ports[0]} if hosts[0] else {"port": ports[0]}
    return URL.create(
        f"postgresql+{driver}",
        username=parts.pop("user", None),
        password=parts.pop("password", None),
        database=parts.pop("dbname", None),
        query={**_PATIENCE, **parts, **where},
    )


def _create_database(beside: str, name: str) -> None:
    try:
        with psycopg.connect(beside, autocommit=True, connect_timeout=10) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if found.fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg.errors.DuplicateDatabase:
        return
    except psycopg.Error as error:
        raise CatalogueUnavailableError(
            reason=str(error).strip().split("\n")[0],
            hint=f"make the database {name!r} or set DLM_DAGSTER_DATABASE_URL",
        ) from error
