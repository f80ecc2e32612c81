"""The lifecycle by Dagster's own daemon and sensors, as processes; nothing is started by hand."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dlm_cli.services import processes_of, read_services
from dlm_core.catalogue import embedded
from dlm_core.catalogue.engine import make_engine
from dlm_core.clock import utc_now
from dlm_core.errors import (
    CatalogueUnavailableError,
    InvalidValueError,
)
from dlm_core.lifecycle.register import Source, register_tree
from dlm_pipelines.launch import LaunchedRun, _ask, launch_job, switched_off
from tests.leftovers import kill
from tests.site import Site, make_site

pytestmark = pytest.mark.timeout(600)

_MB = 1 << 20
_SMALL = 10_000
#: seconds; a machine that is busy with other things takes several times as long as another
_PATIENCE = 180
_ENVIRONMENT = {
    "DLM_WEBSERVER_PORT": "0",
    "DLM_LEASE_SECONDS": "3",
    "DLM_LINGER_SECONDS": "15",
    "DLM_BATCH_SIZE": "8",
    "DLM_MAX_DRAINERS": "1",
    "DLM_RETRY_BASE_SECONDS": "0.5",
    "DLM_RETRY_MAX_SECONDS": "2",
}


class Up:
    """``dlm up`` as a process, and a site of three storages at three locations on its catalogue."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home = home
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DLM_")}
        command = [sys.executable, "-c", "from dlm_cli.main import main; main()", "up"]
        self.process = subprocess.Popen(
            command,
            env=environment | _ENVIRONMENT | {"DLM_HOME": str(self.home)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "UI:" in line:
                break
        self.engine = make_engine(embedded.database_url(self.home))
        self.site: Site = make_site(self.engine, folder, home=self.home)
        self.site.context.clock = utc_now
        self.site.add_storage("source", "observatory")
        for name, location in (("a", "centre"), ("b", "archive")):
            # one at a time, so that there is a middle of the copying to be killed in
            self.site.add_storage(name, location, concurrency=1)
        self.truth: dict[str, bytes] = {}

    @property
    def services(self) -> dict[str, Any]:
        found = read_services(self.home)
        assert found is not None
        return found

    def register(self, folder: str, count: int, size: int) -> None:
        """Write new files into ``folder`` of the source and announce them."""
        root = self.site.folder / "source" / folder
        root.mkdir()
        for number in range(count):
            data = os.urandom(size)
            (root / f"{number}").write_bytes(data)
            self.truth[f"{folder}/{number}"] = data
        report = register_tree(self.site.context, Source("source", "test"), folder)
        assert report.created == count

    def unfinished(self) -> int:
        """Items below their target phase, and operations that are not done."""
        found = self.query(
            "SELECT (SELECT count(*) FROM data_item"
            "         WHERE state <> 'READY' OR shortfall IS NOT NULL)"
            " + (SELECT count(*) FROM operation WHERE state <> 'DONE')"
            " + (SELECT count(*) FROM evaluation) AS n"
        )
        return int(found[0]["n"])

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of a query, also right after the server was killed."""
        end = time.monotonic() + 30
        while True:
            try:
                return self.site.query(sql, **parameters)
            except CatalogueUnavailableError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def running_copy(self) -> int | None:
        """The pid of a worker that is copying."""
        found = self.query(
            "SELECT worker FROM operation WHERE kind = 'copy' AND state = 'RUNNING' LIMIT 1"
        )
        return int(found[0]["worker"].rpartition(":")[2]) if found else None

    def end(self) -> None:
        self.engine.dispose()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.communicate()
        kill(processes_of(self.home))
        embedded.stop(self.home)


class Watcher(threading.Thread):
    """Looks at two storages all the time: no file may ever be visible before it is whole."""

    def __init__(self, site: Site, size: int) -> None:
        super().__init__(name="watcher")
        self.roots = [site.folder / name for name in ("a", "b")]
        self.sizes, self.over = {size, _SMALL}, threading.Event()
        self.halves: set[str] = set()

    def run(self) -> None:
        while not self.over.wait(0.02):
            for root in self.roots:
                self.halves |= self._look(root / "test")

    def _look(self, root: Path) -> set[str]:
        # with what costs least: what is watched should not wait for the watcher
        found: set[str] = set()
        for folder in os.scandir(root) if root.exists() else ():
            with os.scandir(folder) as files:
                found |= {file.path for file in files if file.stat().st_size not in self.sizes}
        return found

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


@pytest.fixture(scope="module")
def up(run_folder: Path) -> Iterator[Up]:
    # more on the storages than memory should hold
    folder = Path(tempfile.mkdtemp(prefix="dlm-e2e-"))
    up = Up(run_folder / "e2e", folder)
    try:
        yield up
    finally:
        up.end()
        shutil.rmtree(folder)


def test_registered_files_become_solid_by_sensors(up: Up) -> None:
    """Announced, the files are admitted and copied until each item has its target phase."""
    up.register("first", 40, _SMALL)
    _eventually(lambda: up.unfinished() == 0, every=0.3)
    _all_right(up)
    wanted = {"registration_job", "replication_job", "rebalance_job"}
    _eventually(lambda: wanted <= {name for name, _ in _runs(up)}, every=0.3)
    # the maintenance is due at an hour of the night
    assert {name for name, _ in _runs(up)} - {"maintenance_job"} == wanted


def test_a_job_is_launched_from_outside(up: Up) -> None:
    """Its end and numbers are told; a config that does not fit, or no such job, in one line."""
    url = up.services["ui_url"]
    states: list[str] = []
    run = launch_job(
        url, "replication", {"dry_run": True}, wait=True, timeout=_PATIENCE, on_update=states.append
    )
    assert (run.status, run.metadata["dry_run"], run.metadata["proposed"]) == ("SUCCESS", True, 0)
    assert states[-1] == "SUCCESS" and run.url.startswith(url)
    for config in ({"batch_size": "many"}, {"no_such": 1}, {"batch_size": {"env": "NO_SUCH"}}):
        with pytest.raises(InvalidValueError) as caught:
            launch_job(url, "replication", config)
        assert "\n" not in str(caught.value) and next(iter(config)) in str(caught.value)
    run = launch_job(url, "replication", {"batch_size": 0}, wait=True, timeout=_PATIENCE)
    assert run.status == "FAILURE"
    assert run.error and run.error.startswith("DLM-101: DLM_BATCH_SIZE 0 is not valid")
    with pytest.raises(InvalidValueError, match="one of expiry, maintenance, rebalance"):
        launch_job(url, "nonsense")


def test_a_sensor_that_is_switched_off_is_told(up: Up) -> None:
    """By the doctor: nothing of its kind would start by itself, and nobody know why."""
    url = up.services["ui_url"]
    assert switched_off(url) == []
    found = _graphql(
        up,
        """{ repositoriesOrError { ... on RepositoryConnection { nodes {
             sensors { name sensorState { id } } } } } }""",
    )
    (node,) = found["repositoriesOrError"]["nodes"]
    sensor = next(one for one in node["sensors"] if one["name"] == "expiry_sensor")
    stop = "mutation($i: String!) { stopSensor(id: $i) { __typename } }"

    def stopped() -> bool:
        # a tick under way ends by writing the state that it began with
        _graphql(up, stop, i=sensor["sensorState"]["id"])
        return switched_off(url) == ["expiry_sensor"]

    _eventually(stopped)


def test_a_cancelled_run_gives_its_work_back(up: Up) -> None:
    """Terminated from the UI in mid-copy, nothing is left leased, and the next run completes it."""
    up.register("cancelled", 24, 4 * _MB)
    with Watcher(up.site, 4 * _MB) as watcher:
        _eventually(up.running_copy)
        (run_id,) = [i for name, i in _runs(up, "STARTED") if name == "replication_job"]
        _graphql(up, "mutation($i: String!) { terminateRun(runId: $i) { __typename } }", i=run_id)
        # before run monitoring would call it cancelled
        _eventually(lambda: _status(up, run_id) == "CANCELED", seconds=90)
        events = up.query("SELECT error_code FROM operation WHERE error_code = 'DLM-600'")
        assert not events, "leases ran out instead of being given back"
        _eventually(lambda: up.unfinished() == 0, every=0.3)
    assert not watcher.halves
    _all_right(up)


@pytest.mark.parametrize("victim", ["worker", "daemon", "postgres"])
def test_kill_9_in_mid_copy(up: Up, victim: str) -> None:
    """Whatever is killed, everything completes, and no half file is ever visible."""
    up.register(victim, 24, 4 * _MB)
    with Watcher(up.site, 4 * _MB) as watcher:
        worker = _eventually(up.running_copy)
        pid = worker if victim == "worker" else up.services["pids"][victim]
        os.kill(pid, signal.SIGKILL)
        assert up.unfinished(), "all was copied before the kill"
        _eventually(lambda: up.unfinished() == 0, every=0.3)
    assert not watcher.halves
    _all_right(up)


@pytest.mark.slow
def test_a_run_whose_worker_died_unseen_ends(up: Up) -> None:
    """With the code server gone too, nobody tells; run monitoring finds the process gone."""
    run = launch_job(up.services["ui_url"], "verification", {"linger_seconds": 600})
    _eventually(lambda: _status(up, run.run_id) == "STARTED")
    worker = _eventually(lambda: _worker_of(up, run))
    server = worker.parent()
    assert "grpc" in server.cmdline()
    server.kill()
    worker.kill()
    _eventually(lambda: _status(up, run.run_id) == "FAILURE")
    query = """query($i: ID!) { runOrError(runId: $i) { ... on Run { eventConnection { events {
      ... on RunFailureEvent { message } } } } } }"""
    events = _graphql(up, query, i=run.run_id)["runOrError"]["eventConnection"]["events"]
    assert any(f"its process {worker.pid} is gone" in e.get("message", "") for e in events)


def _worker_of(up: Up, run: LaunchedRun) -> psutil.Process | None:
    query = """query($i: ID!) { runOrError(runId: $i) { ... on Run { eventConnection { events {
      ... on EngineEvent { metadataEntries { label ... on TextMetadataEntry { text } } }
      } } } } }"""
    found = _graphql(up, query, i=run.run_id)["runOrError"]
    for event in found["eventConnection"]["events"]:
        for entry in event.get("metadataEntries", ()):
            if entry["label"] == "pid":
                return psutil.Process(int(entry["text"]))
    return None


def _runs(up: Up, *statuses: str) -> list[tuple[str, str]]:
    query = """query($f: RunsFilter) { runsOrError(filter: $f) { ... on Runs {
      results { jobName runId } } } }"""
    filters = {"statuses": list(statuses)} if statuses else {}
    found = _graphql(up, query, f=filters)["runsOrError"]["results"]
    return [(one["jobName"], one["runId"]) for one in found]


def _status(up: Up, run_id: str) -> str:
    query = "query($i: ID!) { runOrError(runId: $i) { ... on Run { status } } }"
    return str(_graphql(up, query, i=run_id)["runOrError"].get("status"))


def _graphql(up: Up, query: str, **variables: Any) -> dict[str, Any]:
    return _ask(up.services["ui_url"], query, variables)


def _all_right(up: Up) -> None:
    """The bytes on every storage are those that were written, and nothing else is there."""
    seen = [up.site.visible(name) for name in ("source", "a", "b")]
    assert seen[0] == up.truth
    copies: dict[str, int] = dict.fromkeys(up.truth, 0)
    for storage in seen[1:]:
        for path, data in storage.items():
            original = path.removeprefix("test/")
            assert data == up.truth[original]
            copies[original] += 1
    assert min(copies.values()) >= 1
    assert not up.query("SELECT FROM replica WHERE state <> 'READY'")


def _eventually(look: Callable[[], Any], *, every: float = 0.05, seconds: float = _PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(every)
    return found
