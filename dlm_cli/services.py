"""The supervisor behind ``dlm up``: PostgreSQL, the Dagster daemon and the Dagster webserver.

Every process it starts, and every process those start, carries the home in its environment. By
that mark they are found again, also by the next supervisor after this one was killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from dlm_core.catalogue import embedded, schema
from dlm_core.catalogue.dsn import catalogue_url
from dlm_core.catalogue.engine import make_engine
from dlm_core.errors import (
    AlreadyRunningError,
    CatalogueUnavailableError,
    InvalidValueError,
    ServiceUnavailableError,
)
from dlm_core.lifecycle.work import Context, end_lost_leases
from dlm_core.settings import Settings

log = logging.getLogger("dlm.services")

MARK = "DLM_SUPERVISED_HOME"
_CHECKOUT = Path(__file__).resolve().parent.parent
_PACKAGED = _CHECKOUT / "dlm_pipelines"
_LOG_LIMIT_BYTES = 16 * 2**20
_LONGEST_DELAY = 30.0
#: a child that lived this long, in seconds, is taken for healthy: its back-off starts anew
_HEALTHY_AFTER = 60.0
#: a child that ends so often before all is up is reported, not tried again
_FAILURES_AT_START = 3
_HEALTH_QUERY = "{instance{daemonHealth{allDaemonStatuses{daemonType required healthy}}}}"


@dataclass
class Child:
    """One supervised process and its back-off."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    due: float = field(default=0.0)


def run_services(
    settings: Settings,
    ready: Callable[[str], None],
    stop: threading.Event,
    *,
    workspace: Path | None = None,
    timeout: float = 120,
) -> None:
    """Run all services until ``stop`` is set, then end them: workers first, PostgreSQL last.

    Parameters
    ----------
    ready
        Called once with the address of the UI, when UI and daemon answer.
    workspace
        A ``workspace.yaml``; None takes the DLM's own code location.
    timeout
        Seconds that the services may take to answer at the start.

    Raises
    ------
    AlreadyRunningError
        if another supervisor serves this home.
    CatalogueUnavailableError, SchemaMismatchError
        if the database cannot be started or upgraded.
    InvalidValueError
        if ``settings.webserver_host`` is no address of this machine.
    ServiceUnavailableError
        if daemon or webserver do not come up; their log is named.
    """
    with _only_one(settings.home):
        handler = _log_to(settings.home / "log" / "services.log")
        children: list[Child] = []
        try:
            end_processes(settings.home)
            schema.upgrade(catalogue_url(settings))
            _end_lost_leases(settings)
            workspace = lay_dagster_home(settings, workspace)
            _prepare_dagster(settings)
            port = _free_port(settings.webserver_host, settings.webserver_port)
            ui_url = _url(settings.webserver_host, port)
            children.extend(_children(settings, workspace, port))
            _keep_running(settings, children, ui_url, ready, stop, timeout)
        finally:
            _end_all(settings, children)
            log.removeHandler(handler)
            handler.close()


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Within it, Ctrl-C, SIGTERM and the end of the terminal set ``stop`` instead of ending the
    process.

    Only in the main thread.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_lost_leases(settings: Settings) -> None:
    engine = make_engine(catalogue_url(settings), pool_size=1)
    try:
        ended = end_lost_leases(Context(engine, settings, "system:up"))
    finally:
        engine.dispose()
    if ended:
        log.info("%d operations of workers that are gone are due again", ended)


def read_services(home: Path) -> dict[str, Any] | None:
    """What a living supervisor wrote of itself: ``ui_url`` and ``pids``; None if none lives."""
    try:
        descriptor = os.open(home / "run" / "services.lock", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_state(home)
    finally:
        os.close(descriptor)
    return None


def processes_of(home: Path) -> list[psutil.Process]:
    """All processes that services of ``home`` started, PostgreSQL and this process excepted."""
    mark, data = os.path.realpath(home), os.path.realpath(home / "postgres")
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get(MARK) != mark:
                continue
            # the server may have been started by one of them; it goes last
            if process.cwd() != data:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end_processes(home: Path, patience: float = 15) -> int:
    """End all processes of the services of ``home``; returns how many there were.

    SIGTERM lets run workers report and give their work back. Those that are left after
    ``patience`` seconds get SIGINT (a webserver with open pages), then SIGKILL.
    """
    count = 0
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGINT, 3.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + wait
        signalled: set[psutil.Process] = set()
        # looked for again and again: one that was just being started is no exception
        while (left := processes_of(home)) and time.monotonic() < end:
            for process in set(left) - signalled:
                _signal(process, number)
            count = max(count, len(signalled | set(left)))
            signalled.update(left)
            psutil.wait_procs(left, timeout=0.2)
        if not left:
            break
    return count


# --- start ----------------------------------------------------------------------------------------


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    for folder in (home, home / "run", home / "log"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(home / "run" / "services.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _locked(descriptor):
            state = _read_state(home) or {"ui_url": "still starting", "pids": {}}
            raise AlreadyRunningError(
                home=home, pid=state["pids"].get("supervisor", "?"), ui_url=state["ui_url"]
            )
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    # read_services holds the lock for an instant: one refusal is no proof of a supervisor
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def lay_dagster_home(settings: Settings, workspace: Path | None = None) -> Path:
    """Put the instance's configuration where ``DAGSTER_HOME`` will point; returns a workspace."""
    folder = settings.home / "dagster"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _lay(_shipped("dagster.yaml"), folder / "dagster.yaml")
    _lay(workspace or _shipped("workspace.yaml"), folder / "workspace.yaml")
    return folder / "workspace.yaml"


def _lay(source: Path, target: Path) -> None:
    # at once: a run that starts at this moment reads it, and of half of one or none Dagster makes
    # an instance of its own, without a word
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, fresh)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _shipped(name: str) -> Path:
    return next(f / name for f in (_PACKAGED, _CHECKOUT) if (f / name).is_file())


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment in which Dagster's processes find the same settings as this one has."""
    environment = dict(os.environ)
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            environment[f"DLM_{name.upper()}"] = str(plain)
    return environment | {
        "DLM_HOME": str(settings.home),
        "DAGSTER_HOME": str(settings.home / "dagster"),
        "PYTHONUNBUFFERED": "1",
        MARK: os.path.realpath(settings.home),
    }


def _prepare_dagster(settings: Settings) -> None:
    # in a process of its own: the supervisor stays small, and Dagster's import is heavy
    command = [sys.executable, "-m", "dlm_pipelines.instance"]
    path = settings.home / "log" / "prepare.log"
    with path.open("wb") as output:
        done = subprocess.run(
            command,
            env=child_environment(settings),
            cwd=settings.home / "dagster",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    if done.returncode:
        raise ServiceUnavailableError(service="Dagster's database", reason=f"{path} tells why")


def _children(settings: Settings, workspace: Path, port: int) -> list[Child]:
    python, options = sys.executable, ["-w", str(workspace)]
    host = ["-h", settings.webserver_host, "-p", str(port)]
    return [
        Child("daemon", [python, "-m", "dagster._daemon", "run", *options]),
        Child("webserver", [python, "-m", "dagster_webserver", *host, *options]),
    ]


def _free_port(host: str, wanted: int) -> int:
    """The wanted port, or any free one if that is taken."""
    for port in (wanted, 0):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = error.strerror
                continue
            return int(probe.getsockname()[1])
    raise InvalidValueError(
        what="DLM_WEBSERVER_HOST", value=host, expected=f"an address of this machine ({reason})"
    )


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


# --- run ------------------------------------------------------------------------------------------


def _keep_running(
    settings: Settings,
    children: list[Child],
    ui_url: str,
    ready: Callable[[str], None],
    stop: threading.Event,
    timeout: float,
) -> None:
    announced, end = False, time.monotonic() + timeout
    while not stop.is_set():
        # a list, so that all are looked at
        started = [_keep_database(settings), *(_keep_child(settings, c) for c in children)]
        for child in children:
            _keep_short(_log_of(settings, child))
        if any(started):
            try:
                _write_state(settings, children, ui_url)
            except OSError as error:  # a full disk is no reason to end what runs
                if not announced:
                    raise
                log.error("%s", error)
        if not announced and is_healthy(ui_url):
            announced = True
            ready(ui_url)
        failing = [child.name for child in children if child.failures >= _FAILURES_AT_START]
        if not announced and (failing or time.monotonic() > end):
            raise ServiceUnavailableError(
                service=" and ".join(failing) or "Dagster",
                reason=f"it does not come up, the logs in {settings.home / 'log'} tell why",
            )
        stop.wait(1.0 if announced else 0.3)


def _keep_database(settings: Settings) -> bool:
    """Start the embedded PostgreSQL if it does not run; True if it was started."""
    if settings.database_url is not None or embedded.running_pid(settings.home) is not None:
        return False
    log.warning("PostgreSQL is gone; it is started again")
    try:
        embedded.ensure_running(settings.home, settings.pg_bindir)
    except (CatalogueUnavailableError, OSError) as error:
        log.error("%s", error)
        return False
    return True


def _keep_child(settings: Settings, child: Child) -> bool:
    """Start a child that does not run and is due; True if it was started."""
    now = time.monotonic()
    if child.process is not None:
        code = child.process.poll()
        if code is None:
            return False
        child.failures = 0 if now - child.started > _HEALTHY_AFTER else child.failures + 1
        child.due = now + min(_LONGEST_DELAY, 0.5 * 2**child.failures)
        child.process = None
        log.warning("%s ended with %s; it is started again", child.name, code)
    if now < child.due:
        return False
    try:
        child.process, child.started = _spawn(settings, child), now
    except OSError as error:  # no memory, no room for its log
        child.failures += 1
        child.due = now + min(_LONGEST_DELAY, 0.5 * 2**child.failures)
        log.error("%s cannot be started: %s", child.name, error)
        return False
    return True


def _log_of(settings: Settings, child: Child) -> Path:
    return settings.home / "log" / f"{child.name}.log"


def _keep_short(path: Path) -> None:
    """Begin a log anew that has grown too long, under the hands of whoever appends to it."""
    if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
        with suppress(OSError):  # on a full disk what it had is what makes room
            shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)


def _spawn(settings: Settings, child: Child) -> subprocess.Popen[bytes]:
    path = _log_of(settings, child)
    with path.open("ab") as output:
        return subprocess.Popen(
            child.command,
            env=child_environment(settings),
            cwd=settings.home / "dagster",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is for the supervisor, who ends the others in order
            start_new_session=True,
        )


def is_healthy(ui_url: str) -> bool:
    """The webserver answers, and says that all daemons beat."""
    request = urllib.request.Request(
        f"{ui_url}/graphql",
        json.dumps({"query": _HEALTH_QUERY}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            data = json.load(answer)["data"]
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return False
    statuses = data["instance"]["daemonHealth"]["allDaemonStatuses"]
    return bool(statuses) and all(s["healthy"] for s in statuses if s["required"])


def _write_state(settings: Settings, children: list[Child], ui_url: str) -> None:
    pids = {child.name: child.process.pid for child in children if child.process}
    pids["supervisor"] = os.getpid()
    postgres = embedded.running_pid(settings.home) if settings.database_url is None else None
    if postgres is not None:
        pids["postgres"] = postgres
    path = settings.home / "run" / "services.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"ui_url": ui_url, "pids": pids}, indent=2) + "\n")
    fresh.replace(path)


def _read_state(home: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((home / "run" / "services.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state


# --- end ------------------------------------------------------------------------------------------


def _end_all(settings: Settings, children: list[Child]) -> None:
    end_processes(settings.home)
    for child in children:
        if child.process is not None:
            child.process.wait(timeout=10)
    if settings.database_url is None:
        embedded.stop(settings.home)
    (settings.home / "run" / "services.json").unlink(missing_ok=True)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _log_to(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return handler
