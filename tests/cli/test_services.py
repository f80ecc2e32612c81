"""The supervisor with the real daemon, webserver and PostgreSQL as processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from dlm_cli import services
from dlm_cli.services import processes_of, read_services, run_services
from dlm_core.catalogue import embedded
from dlm_core.errors import AlreadyRunningError, ServiceUnavailableError
from dlm_core.settings import load_settings
from tests.leftovers import kill

pytestmark = pytest.mark.timeout(600)

_DEFINITIONS = """
import time
import dagster as dg

@dg.op
def wait():
    time.sleep(600)

@dg.job
def waiting_job():
    wait()

defs = dg.Definitions(jobs=[waiting_job])
"""

_UP = """
import sys, threading
from pathlib import Path
from dlm_cli.services import run_services, stop_on_signals
from dlm_core.settings import load_settings
stop = threading.Event()
with stop_on_signals(stop):
    settings = load_settings(home=sys.argv[1], webserver_port=0)
    run_services(settings, print, stop, workspace=Path(sys.argv[2]), timeout=300)
"""

_LAUNCH = """
mutation { launchRun(executionParams: {mode: "default", selector: {jobName: "waiting_job",
  repositoryName: "__repository__", repositoryLocationName: "probe"}})
  { __typename ... on LaunchRunSuccess { run { runId } } } }
"""


class Site:
    """A home with a workspace, and the supervisors that a test starts on it."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.workspace = folder / "workspace.yaml"
        module = folder / "probe.py"
        module.write_text(_DEFINITIONS)
        entry = {"python_file": {"relative_path": str(module), "location_name": "probe"}}
        self.workspace.write_text(json.dumps({"load_from": [entry]}))
        self.supervisors: list[subprocess.Popen[str]] = []

    def running(self) -> subprocess.Popen[str]:
        """The supervisor that the test before left at work, or a new one."""
        latest = self.supervisors[-1] if self.supervisors else None
        return latest if latest is not None and latest.poll() is None else self.up()

    def up(self) -> subprocess.Popen[str]:
        """Start a supervisor; returns when it says that all is ready."""
        command = [sys.executable, "-c", _UP, str(self.home), str(self.workspace)]
        supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.supervisors.append(supervisor)
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline().startswith("http://127.0.0.1:")
        return supervisor

    @property
    def state(self) -> dict[str, Any]:
        state = read_services(self.home)
        assert state is not None
        return state

    def graphql(self, query: str) -> Any:
        body = json.dumps({"query": query}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.state['ui_url']}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def launch(self) -> str:
        """Launch the job that waits; returns the run's id when its worker is at work."""
        run_id: str = self.graphql(_LAUNCH)["launchRun"]["run"]["runId"]
        _eventually(lambda: self.status(run_id) == "STARTED")
        return run_id

    def status(self, run_id: str) -> str:
        query = f'{{runOrError(runId: "{run_id}") {{... on Run {{status}}}}}}'
        status: str = self.graphql(query)["runOrError"]["status"]
        return status

    def end(self) -> None:
        for supervisor in self.supervisors:
            if supervisor.poll() is None:
                supervisor.kill()
            supervisor.communicate()
        kill(processes_of(self.home))
        embedded.stop(self.home)


@pytest.fixture(scope="module")
def site(run_folder: Path) -> Iterator[Site]:
    """One home for all tests that leave it at work: a start takes most of their time."""
    with _made(run_folder) as site:
        yield site


@pytest.fixture
def another_site(run_folder: Path) -> Iterator[Site]:
    with _made(run_folder) as site:
        yield site


@contextmanager
def _made(run_folder: Path) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(dir=run_folder))
    site = Site(folder)
    try:
        yield site
    finally:
        site.end()
        shutil.rmtree(folder)


def _lives(process: psutil.Process) -> bool:
    """One that has ended may wait for long to be collected by the machine's first process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_up_and_ctrl_c_and_up_again(site: Site) -> None:
    """Ctrl-C ends everything, a run's worker too; the next start finds the data again."""
    supervisor = site.running()
    assert set(site.state["pids"]) == {"supervisor", "daemon", "webserver", "postgres"}
    with pytest.raises(AlreadyRunningError, match=f"process {supervisor.pid}, http"):
        run_services(load_settings(home=site.home), print, threading.Event())
    run_id = site.launch()
    workers = processes_of(site.home)

    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=120) == 0
    assert not any(_lives(process) for process in workers)
    assert embedded.running_pid(site.home) is None
    assert read_services(site.home) is None

    site.up()
    assert site.status(run_id) in {"FAILURE", "CANCELED"}


def test_what_is_killed_is_started_again(site: Site) -> None:
    """kill -9 of PostgreSQL, the daemon and the webserver: each is started again, with its data."""
    site.running()
    before = site.state["pids"]
    catalogue = embedded.database_url(site.home)
    with psycopg.connect(catalogue, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    for name in ("postgres", "daemon", "webserver"):
        os.kill(before[name], signal.SIGKILL)

    _eventually(lambda: _all_anew(site.state["pids"], before))
    _eventually(lambda: _answers(site))
    with psycopg.connect(catalogue) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)
    assert site.state["pids"]["supervisor"] == before["supervisor"]


def test_kill_9_of_everything(site: Site) -> None:
    """After kill -9 of all processes the next start works, and the lost run counts no longer."""
    supervisor = site.running()
    run_id = site.launch()
    postgres = embedded.running_pid(site.home)
    assert postgres is not None
    server = psutil.Process(postgres)
    supervisor.kill()
    kill([*processes_of(site.home), server])

    site.up()
    assert site.status(run_id) == "FAILURE"


@pytest.mark.slow
def test_leftovers_of_a_killed_supervisor_are_ended(site: Site) -> None:
    """The next supervisor ends the daemon of a killed one, so that no two ever work at once."""
    site.running().kill()
    left = processes_of(site.home)
    assert left
    site.up()
    assert not any(_lives(process) for process in left)


def test_a_log_that_grew_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody goes on writing it; what was in it is kept once."""
    monkeypatch.setattr(services, "_LOG_LIMIT_BYTES", 10)
    path = tmp_path / "daemon.log"
    with path.open("ab", buffering=0) as log:
        for line in (b"first line\n", b"then\n", b"second line\n"):
            log.write(line)
            services._keep_short(path)
    assert path.read_bytes() == b""
    assert path.with_suffix(".log.1").read_bytes() == b"then\nsecond line\n"


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_end_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log that fills it is begun anew, though no copy of it can be kept; what cannot be started
    or written now is tried again."""
    settings = load_settings(home=tmp_path)
    for name in ("log", "dagster"):
        (tmp_path / name).mkdir()
    log = tmp_path / "log" / "daemon.log"
    stop, begun = threading.Event(), []
    monkeypatch.setattr(services, "_LOG_LIMIT_BYTES", 3)
    monkeypatch.setattr(services, "is_healthy", lambda _: True)
    monkeypatch.setattr(embedded, "running_pid", lambda _: None)
    child = services.Child("daemon", ["sleep", "600"])

    def refused(*_: Any, **__: Any) -> None:
        stop.set()
        _full()

    def ready(_: str) -> None:
        for module, name in ((embedded, "ensure_running"), (services, "_write_state"),
                             (shutil, "copyfile")):  # fmt: skip
            monkeypatch.setattr(module, name, _full)
        monkeypatch.setattr(subprocess, "Popen", refused)
        log.write_bytes(b"much")
        begun.append(child.process)
        child.process.kill()
        child.process.wait()

    monkeypatch.setattr(embedded, "ensure_running", lambda *_: "")
    monkeypatch.setattr(services, "_write_state", lambda *_: None)
    services._keep_running(settings, [child], "", ready, stop, 60)
    assert begun and child.process is None
    assert child.failures >= 2, "it was tried again"
    assert log.read_bytes() == b""


def test_what_dagster_reads_is_whole_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'dlm env' lays it out anew while runs start: of half of a dagster.yaml, or of an empty one,
    Dagster would make an instance of its own."""
    settings = load_settings(home=tmp_path)
    services.lay_dagster_home(settings)
    before = (tmp_path / "dagster" / "dagster.yaml").read_bytes()

    def cut(_: Path, target: Path) -> None:
        target.write_bytes(before[:10])
        _full()

    monkeypatch.setattr(shutil, "copyfile", cut)
    with pytest.raises(OSError, match="No space"):
        services.lay_dagster_home(settings)
    assert (tmp_path / "dagster" / "dagster.yaml").read_bytes() == before
    assert {f.name for f in (tmp_path / "dagster").iterdir()} == {"dagster.yaml", "workspace.yaml"}


@pytest.mark.slow
def test_a_service_that_cannot_start_is_reported(another_site: Site) -> None:
    """A daemon that ends at once again and again is an error that names the logs."""
    site = another_site
    site.workspace.write_text("load_from: nonsense")
    settings = load_settings(home=site.home, webserver_port=0)
    with pytest.raises(ServiceUnavailableError, match=r"logs in .* tell why"):
        run_services(settings, print, threading.Event(), workspace=site.workspace)
    assert embedded.running_pid(site.home) is None
    assert not processes_of(site.home)


def _all_anew(now: dict[str, int], before: dict[str, int]) -> bool:
    # one that waits for its back-off is not among them
    names = set(before) - {"supervisor"}
    return now.keys() == before.keys() and all(now[name] != before[name] for name in names)


def _answers(site: Site) -> bool:
    try:
        return bool(site.graphql("{version}"))
    except OSError:
        return False


def _eventually(condition: Callable[[], bool]) -> None:
    # long: a busy machine takes several times as long as another
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.3)
