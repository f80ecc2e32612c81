"""Engine, transactions, and the translation of database errors into ours."""

from __future__ import annotations

import random
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from struct import pack
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg import adapters
from psycopg.abc import DumperKey
from psycopg.adapt import Dumper, PyFormat
from psycopg.pq import Format
from psycopg.types.array import ListDumper
from sqlalchemy import Connection, Engine, create_engine, exc, text

from dlm_core.catalogue.dsn import sqlalchemy_url
from dlm_core.clock import utc_now
from dlm_core.errors import (
    CatalogueError,
    CatalogueUnavailableError,
    ClockSkewError,
    DataRefusedError,
    DlmError,
    TooLongError,
)

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]

#: deadlock_detected and serialization_failure: nothing happened, try the transaction again
_TRY_AGAIN = {"40P01", "40001"}
_TRIES = 6
#: program_limit_exceeded: of what we write, a name that does not fit into an index
_LIMIT = "54000"
#: what our own triggers refuse
_REFUSED = "DL001"
#: read_only_sql_transaction
_READ_ONLY = "25006"
_TO_WRITE = "if a standby was reached, DLM_DATABASE_URL lacks the primary, or target_session_attrs=read-write"
#: type of a column of uuids that are given as bytes (types.new_key) to copy_rows and copy_into
KEY = "key"
#: rows that :func:`each` makes at once
_FETCHED = 1000


class Texts:
    """Many texts as one parameter, an array of text; in a list each costs twenty times as much."""

    __slots__ = ("texts",)

    def __init__(self, texts: Collection[str]) -> None:
        self.texts = texts


class _ArrayDumper(Dumper):
    """PostgreSQL's binary form of a one-dimensional array (``array_recv`` in its sources), made at
    once: psycopg asks a dumper for each element, which costs up to ten times as much."""

    format = Format.BINARY
    element: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.oid = adapters.types[cls.element].array_oid

    def dump(self, obj: Any) -> bytes:
        elements = self.elements(obj)
        head = (1, 0, adapters.types[self.element].oid, len(elements), 1)
        return pack("!iiIii", *head) + b"".join(elements)

    @abstractmethod
    def elements(self, obj: Any) -> list[bytes]:
        """Length and bytes of each element."""


class _TextsDumper(_ArrayDumper):
    element = "text"

    def elements(self, obj: Texts) -> list[bytes]:
        encoded = [one.encode() for one in obj.texts]
        return [pack("!i", len(one)) + one for one in encoded]


class _KeysDumper(_ArrayDumper):
    element = "uuid"

    def elements(self, obj: list[uuid.UUID]) -> list[bytes]:
        return [b"\0\0\0\x10" + one.bytes for one in obj]


class _NumbersDumper(_ArrayDumper):
    element = "int8"

    def elements(self, obj: list[int]) -> list[bytes]:
        return [pack("!iq", 8, one) for one in obj]


class _ListDumper(ListDumper):
    """psycopg's own, but for lists of keys and of whole numbers."""

    def get_key(self, obj: list[Any], format: PyFormat) -> DumperKey:
        kind = _kind_of(obj)
        return (self.cls, kind) if kind else super().get_key(obj, format)

    def upgrade(self, obj: list[Any], format: PyFormat) -> Any:
        kind = _kind_of(obj)
        return kind(self.cls, self._tx) if kind else super().upgrade(obj, format)


def _kind_of(values: list[Any]) -> type[_ArrayDumper] | None:
    types = set(map(type, values))
    if types == {uuid.UUID}:
        return _KeysDumper
    fits = types == {int} and min(values) >= -(2**63) and max(values) < 2**63
    return _NumbersDumper if fits else None


adapters.register_dumper(list, _ListDumper)
adapters.register_dumper(Texts, _TextsDumper)


# Work is looked up by key, a batch at a time: a plan that reads the whole catalogue instead, since
# the planner takes the disk for one that seeks, would cost what the catalogue's size is.
_BEGIN = text(
    "SELECT set_config('dlm.actor', :a, true), set_config('dlm.now', :n, true), "
    "set_config('random_page_cost', '1.1', true), set_config('jit', 'off', true), "
    "clock_timestamp() AS server"
)


def make_engine(url: str, *, pool_size: int = 8) -> Engine:
    """An engine on the catalogue.

    ``url`` is an address as libpq takes it, of one host or of a primary with standbys:
    ``postgresql://user@a:5432,b:5432/dlm?target_session_attrs=read-write``.
    """
    return create_engine(
        sqlalchemy_url(url, "psycopg"),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        # whose plans and caches are warm is taken again
        pool_use_lifo=True,
        connect_args={"application_name": "dlm"},
    )


@contextmanager
def begin(
    engine: Engine, actor: str, now: datetime | None = None, tolerance: timedelta | None = None
) -> Iterator[Connection]:
    """A transaction in the name of ``actor`` (``user:…``, ``sensor:…``, ``rule:…``).

    ``now`` is what the catalogue takes for the present; None means its own clock. ``tolerance`` is
    by how much this machine's clock may differ from the server's; None: they are not compared.

    Raises
    ------
    ClockSkewError
        nothing was done.
    CatalogueUnavailableError
        if the server cannot be reached or went away; nothing was changed, unless that was while it
        committed: then all was, or nothing.
    TooLongError
        if a name does not fit into an index.
    DataRefusedError
        if it is what was given that the database refused.
    CatalogueError
        if the database refused; the message is the database's reason.
    """
    try:
        with engine.begin() as connection:
            asked = utc_now()
            told = connection.execute(
                _BEGIN,
                {"a": actor, "n": now.isoformat() if now else ""},
            ).one()
            if tolerance is not None:
                _compare_clocks(asked, told.server, tolerance)
            yield connection
    except (exc.DBAPIError, psycopg.Error) as error:
        # what COPY meets comes from the driver itself
        raise _translated(error) from error


def _compare_clocks(asked: datetime, told: datetime, tolerance: timedelta) -> None:
    """The server told its time after ``asked`` and before now, both of this machine's clock. One
    that runs ahead would let expire what is not due, and take leases that others still hold."""
    ahead, behind = asked - told, told - utc_now()
    if max(ahead, behind) > tolerance:
        raise ClockSkewError(
            seconds=max(ahead, behind).total_seconds(),
            way="ahead of" if ahead > behind else "behind",
            allowed=tolerance.total_seconds(),
        )


@contextmanager
def alone(
    engine: Engine, actor: str, work: int, storage_id: uuid.UUID, refusal: DlmError
) -> Iterator[None]:
    """Nobody else does this ``work`` (the first key of an advisory lock) on a storage meanwhile;
    ``refusal`` is raised if somebody does."""
    with begin(engine, actor) as connection:
        taken = rows(
            connection,
            "SELECT pg_try_advisory_xact_lock(:work, hashtext(:storage)) AS taken",
            work=work,
            storage=str(storage_id),
        )
        if not taken[0]["taken"]:
            raise refusal
        yield


def transact(
    engine: Engine,
    actor: str,
    work: Callable[[Connection], T],
    now: datetime | None = None,
    tolerance: timedelta | None = None,
) -> T:
    """Run ``work`` in a transaction, again if the database chose it as a deadlock's victim.

    ``work`` must have no effect outside the database but such as may be tried again. Raises as
    :func:`begin`.
    """
    for attempt in range(_TRIES):
        try:
            with begin(engine, actor, now, tolerance) as connection:
                return work(connection)
        except CatalogueError as error:
            cause = error.__cause__
            state = getattr(getattr(cause, "orig", cause), "sqlstate", None)
            if state not in _TRY_AGAIN or attempt == _TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
    raise AssertionError("unreachable")


def must_take_writes(connection: Connection) -> None:
    """Refuse a server that takes no writes, as a standby.

    Raises
    ------
    CatalogueError
    """
    if rows(connection, "SHOW transaction_read_only")[0]["transaction_read_only"] == "on":
        raise CatalogueError(message=f"the server takes no writes; {_TO_WRITE}")


# to look for the parameters of a statement costs as much as some rows of it
_parsed = lru_cache(maxsize=1024)(text)


def rows(connection: Connection, sql: str, **parameters: object) -> list[dict[str, Any]]:
    """The rows of a query as dictionaries."""
    result = connection.execute(_parsed(sql), parameters)
    # RowMapping looks every key up again; this is five times faster
    keys = tuple(result.keys())
    return [dict(zip(keys, row, strict=True)) for row in result.all()]


def each(connection: Connection, sql: str, **parameters: object) -> Iterator[dict[str, Any]]:
    """The rows of a query as dictionaries, one after the other: for many that are not kept."""
    result = connection.execute(_parsed(sql), parameters)
    keys = tuple(result.keys())
    for some in result.partitions(_FETCHED):
        for row in some:
            yield dict(zip(keys, row, strict=True))


def run(connection: Connection, sql: str, **parameters: object) -> int:
    """Execute a statement; the number of rows it touched."""
    return connection.execute(_parsed(sql), parameters).rowcount


def copy_rows(connection: Connection, table: str, columns: Mapping[str, str], records: Any) -> None:
    """Stage ``records`` (tuples) in the temporary ``table`` by binary COPY and analyse it.

    ``columns`` maps names to PostgreSQL types, or to :data:`KEY`, always the same of one ``table``.
    Both are ours, never a user's. The table is empty after the transaction and stays with the
    connection: to make one costs as much as a hundred rows, and leaves dead rows in the server's
    own catalogue.
    """
    body = ", ".join(f"{name} {'uuid' if kind == KEY else kind}" for name, kind in columns.items())
    run(connection, f"CREATE TEMPORARY TABLE IF NOT EXISTS {table} ({body}) ON COMMIT DELETE ROWS")
    run(connection, f"DELETE FROM pg_temp.{table}")  # of an earlier call in this transaction
    copy_into(connection, table, columns, records)
    run(connection, f"ANALYZE {table}")


def copy_into(connection: Connection, table: str, columns: Mapping[str, str], records: Any) -> None:
    """Append ``records`` (tuples of ``columns``) to a ``table`` by binary COPY."""
    cursor = connection.connection.cursor()
    with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)") as copy:
        # on the wire a uuid is its bytes
        copy.set_types(["bytea" if kind == KEY else kind for kind in columns.values()])
        for record in records:
            copy.write_row(record)


def _translated(error: exc.DBAPIError | psycopg.Error) -> DlmError:
    told = error.orig if isinstance(error, exc.DBAPIError) else error
    lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
    diagnosis = getattr(told, "diag", None)
    message = getattr(diagnosis, "message_primary", None) or str(told).split("\n")[0]
    state = getattr(told, "sqlstate", None)
    if state == _LIMIT:
        return TooLongError(message=message)
    if state == _REFUSED or isinstance(told, psycopg.DataError | psycopg.IntegrityError):
        return DataRefusedError(message=message)
    if lost or isinstance(error, exc.OperationalError | psycopg.OperationalError):
        if state not in _TRY_AGAIN:
            hint = "is it running? it is where DLM_DATABASE_URL says; unset, 'dlm up' starts it"
            return CatalogueUnavailableError(reason=message, hint=hint)
    if state == _READ_ONLY:
        message += f"; {_TO_WRITE}"
    return CatalogueError(message=message)
