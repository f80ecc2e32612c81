"""The embedded PostgreSQL: what it makes, survives and refuses."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from dlm_core.catalogue import embedded
from dlm_core.catalogue.dsn import catalogue_url, dagster_dsn, sqlalchemy_url
from dlm_core.errors import CatalogueUnavailableError, InvalidValueError
from dlm_core.settings import load_settings
from tests.memory import fast_folder


@pytest.fixture
def home(run_folder: Path) -> Iterator[Path]:
    """A home in a folder that only we may pass, ended and removed after the test."""
    top = Path(tempfile.mkdtemp(dir=run_folder))
    home = top / "home"
    yield home
    for path in (home, *top.glob("*/**/postgres")):
        embedded.stop(path.parent if path.name == "postgres" else path)
    shutil.rmtree(top)


def _value(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
        assert row is not None
        return row[0]


def _execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def test_first_start_makes_both_databases_private_and_durable(home: Path) -> None:
    """The first start makes 'dlm' and 'dagster', checksums and fsync on, by a private socket."""
    url = embedded.ensure_running(home)
    assert _value(url, "SELECT current_setting('data_checksums')") == "on"
    assert _value(url, "SELECT current_setting('fsync')") == "on"
    assert _value(url, "SELECT current_setting('listen_addresses')") == ""
    assert _value(embedded.database_url(home, "dagster"), "SELECT current_database()") == "dagster"
    for folder in (home, home / "run", home / "postgres"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "run" / ".s.PGSQL.5432").stat().st_mode) == 0o700


def test_starting_again_and_stopping(home: Path) -> None:
    """A running server is used as it is; after a stop the next start finds the data."""
    url = embedded.ensure_running(home)
    pid = embedded.running_pid(home)
    _execute(url, "CREATE TABLE kept AS SELECT 7 AS n")
    assert embedded.ensure_running(home) == url
    assert embedded.running_pid(home) == pid
    assert embedded.stop(home)
    assert embedded.running_pid(home) is None
    assert not embedded.stop(home)
    assert _value(embedded.ensure_running(home), "SELECT n FROM kept") == 7


def test_kill_9_of_the_server_keeps_what_was_committed(home: Path) -> None:
    """After kill -9 of the server, its stale lock files do not hinder a start with the data."""
    url = embedded.ensure_running(home)
    _execute(url, "CREATE TABLE kept AS SELECT 7 AS n")
    with psycopg.connect(url):
        pid = embedded.running_pid(home)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        _wait_until_gone(pid)
    assert embedded.running_pid(home) is None
    assert _value(embedded.ensure_running(home), "SELECT n FROM kept") == 7


def test_a_stale_pid_that_belongs_to_another_process_is_no_server(home: Path) -> None:
    """A pid file whose id was given to another living process is not taken for a server."""
    embedded.ensure_running(home)
    pid = embedded.running_pid(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _wait_until_gone(pid)
    file = home / "postgres" / "postmaster.pid"
    lines = file.read_text().split("\n")
    file.write_text("\n".join([str(os.getppid()), *lines[1:]]))
    assert embedded.running_pid(home) is None
    assert _value(embedded.ensure_running(home), "SELECT 1") == 1


_UNCOLLECTED = """
import ctypes, subprocess, sys, time
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans become ours
code = "import sys; from pathlib import Path; from dlm_core.catalogue import embedded as e; "
def do(call):
    command = [sys.executable, "-c", code + f"e.{call}(Path(sys.argv[1]))", sys.argv[1]]
    subprocess.run(command, check=True)
do("ensure_running")
begun = time.monotonic()
do("stop")
print(time.monotonic() - begun)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's subreapers")
def test_a_dead_server_that_nobody_collects_is_not_waited_for(home: Path) -> None:
    """In a container whose first process collects no orphans, the server that was stopped stays a
    zombie; it is down all the same."""
    command = [sys.executable, "-c", _UNCOLLECTED, str(home)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150).stdout
    assert float(told) < 25


def test_two_starters_at_once_start_one_server(home: Path) -> None:
    """Processes that start the same home at once all get the one server."""
    program = "import sys; from pathlib import Path; from dlm_core.catalogue import embedded as e;"
    program += "h = Path(sys.argv[1]); e.ensure_running(h); print(e.running_pid(h))"
    command = [sys.executable, "-c", program, str(home)]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {starter.communicate(timeout=120)[0].strip() for starter in starters}
    assert answers == {str(embedded.running_pid(home))}


def test_a_crash_in_the_middle_of_the_first_start_leaves_no_half_cluster(home: Path) -> None:
    """What an interrupted initdb left behind is cleared; only a whole cluster gets the name."""
    leftover = home / "postgres.new"
    leftover.mkdir(parents=True, mode=0o700)
    (leftover / "PG_VERSION").write_text("18\n")
    home.chmod(0o700)
    assert _value(embedded.ensure_running(home), "SELECT 1") == 1
    assert not leftover.exists()


def test_a_home_too_deep_for_a_socket_gets_a_short_private_one(home: Path) -> None:
    """Where the path is too long for a socket, a private folder with a short name is taken."""
    deep = home / ("a" * 60) / ("ü 'b\" %c$(x)" * 4)
    folder = embedded.socket_folder(deep)
    try:
        url = embedded.ensure_running(deep)
        assert _value(url, "SELECT 1") == 1
        assert len(os.fsencode(folder)) < 60
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # two spellings of one home mean one server
        link = home / "link"
        link.symlink_to(deep)
        assert embedded.database_url(link) == url
    finally:
        embedded.stop(deep)
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_short_folder_that_others_may_enter_is_refused(home: Path, mode: int) -> None:
    """A prepared folder with a wider mode is refused: its maker could stand between."""
    deep = home / ("a" * 100)
    folder = embedded.socket_folder(deep)
    folder.mkdir()
    folder.chmod(mode)
    try:
        with pytest.raises(CatalogueUnavailableError, match="no folder of ours with mode 0700"):
            embedded.ensure_running(deep)
    finally:
        folder.rmdir()


def test_a_symbolic_link_in_place_of_the_short_folder_is_refused(home: Path) -> None:
    """A symbolic link is no private folder, wherever it leads."""
    deep = home / ("b" * 100)
    target = home / "target"
    target.mkdir(parents=True, mode=0o700)
    folder = embedded.socket_folder(deep)
    folder.symlink_to(target)
    try:
        with pytest.raises(CatalogueUnavailableError, match="mode 0700"):
            embedded.ensure_running(deep)
    finally:
        folder.unlink()


def test_missing_programs_are_told(home: Path) -> None:
    """Without programs the error names where it looked and the variable to set."""
    with pytest.raises(CatalogueUnavailableError, match="DLM_PG_BINDIR"):
        embedded.ensure_running(home, bindir=home / "nothing")


def test_data_of_another_version_is_not_touched(home: Path) -> None:
    """Data of a major version for which there are no programs is left alone, and told."""
    embedded.ensure_running(home)
    embedded.stop(home)
    (home / "postgres" / "PG_VERSION").write_text("14\n")
    with pytest.raises(CatalogueUnavailableError, match=r"PostgreSQL 14 .*looked at"):
        embedded.ensure_running(home)


@pytest.mark.parametrize("version", [b"junk\n", b"", b"\xff"])
def test_data_whose_version_cannot_be_read_is_not_touched(home: Path, version: bytes) -> None:
    """It is told by the file that a crash or somebody has spoilt."""
    data = home / "postgres"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_bytes(version)
    with pytest.raises(CatalogueUnavailableError, match="PG_VERSION names no version"):
        embedded.ensure_running(home)


def test_a_home_may_have_any_name(home: Path) -> None:
    """Quotes, blanks, dollars and backslashes mean something to shells and to PostgreSQL."""
    odd = home.with_name("h o'm\"e$x #1%20\\n")
    try:
        assert _value(embedded.ensure_running(odd), "SELECT 1") == 1
    finally:
        embedded.stop(odd)


def test_the_callers_own_libpq_variables_do_not_disturb(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PGDATA, PGPORT and PGOPTIONS of the caller mean another server and are not followed."""
    for name, value in {"PGDATA": "/nowhere", "PGPORT": "1", "PGLOCALEDIR": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    url = embedded.ensure_running(home)
    assert _value(url, "SELECT current_setting('port')") == "5432"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user for the server")
def test_as_root_without_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where user namespaces are blocked, setpriv is taken, and the data is found that way again."""
    top = Path(tempfile.mkdtemp(prefix="dlm-pg-", dir=fast_folder()))
    home = top / "home"
    try:
        with monkeypatch.context() as patch:
            works = embedded._works
            patch.setattr(embedded, "_works", lambda p: p[0] != "unshare" and works(p))
            with pytest.raises(CatalogueUnavailableError, match=f"cannot pass {top}"):
                embedded.ensure_running(home)
            top.chmod(0o711)
            _execute(embedded.ensure_running(home), "CREATE TABLE kept AS SELECT 7 AS n")
        assert (home / "postgres").stat().st_uid == 65534
        assert embedded.stop(home)
        assert _value(embedded.ensure_running(home), "SELECT n FROM kept") == 7
    finally:
        embedded.stop(home)
        shutil.rmtree(top)


def test_addresses_for_drivers() -> None:
    """libpq addresses, with one host, several, or a socket, become those of SQLAlchemy."""
    several = "postgresql://u:p%40w@a:5432,b:5433/db?target_session_attrs=read-write"
    url = sqlalchemy_url(several, "psycopg2")
    assert (url.query["host"], url.query["port"]) == ("a,b", "5432,5433")
    assert (url.password, url.query["target_session_attrs"]) == ("p@w", "read-write")
    assert sqlalchemy_url("postgresql://a,b/db", "psycopg").query["port"] == "5432,5432"
    socket = sqlalchemy_url("postgresql://dlm@/x?host=/a%20b&port=1", "psycopg")
    assert (socket.query["host"], socket.database) == ("/a b", "x")
    with pytest.raises(InvalidValueError) as caught:
        sqlalchemy_url("postgresql://u:secret%zz@h/db", "psycopg")
    assert "secret" not in str(caught.value)


def test_dagster_gets_a_database_beside_a_given_catalogue(postgres_home: Path) -> None:
    """With only the catalogue given, Dagster's database is made and used beside it."""
    _execute(embedded.database_url(postgres_home), "DROP DATABASE dagster")
    given = embedded.database_url(postgres_home)
    settings = load_settings(home=postgres_home / "unused", database_url=given)
    assert catalogue_url(settings) == given
    for _ in range(2):
        assert _value(dagster_dsn(settings), "SELECT current_database()") == "dagster"


def _wait_until_gone(pid: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.05)
