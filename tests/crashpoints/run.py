"""Interrupt a scenario at one point, recover, and compare with the run that nothing interrupted."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psycopg
from sqlalchemy import Engine

from dlm_core.catalogue import embedded
from dlm_core.catalogue.engine import make_engine
from dlm_core.clock import utc_now
from dlm_core.lifecycle.description import FOLDER, SITE, newest_index, opened, read_index
from dlm_core.lifecycle.pack import pack_due
from dlm_core.storages.bundle_tar import FOLDER as BUNDLES
from dlm_core.storages.bundle_tar import tar_path
from dlm_core.storages.bundles import Bundled, split_bundling
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, Storage
from dlm_core.transfers.sweep import sweep_temp
from tests.crashpoints.points import Crash, CrashingStorage, Points, end_connections, watch_commits
from tests.crashpoints.scenarios import SCENARIOS, Scenario
from tests.schema.rules import must_be_told
from tests.site import Site, make_site, reopen

State = dict[str, Any]
_LONG = timedelta(hours=2)
# the points come in the same order each time
_ONE_BY_ONE: dict[str, Any] = {"links_at_once": 1}
_BUNDLING = {"bundle_bytes": 1 << 20}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Servers:
    """A bucket of an S3 server, an SSH server that leads into any folder, and a collection of a
    WebDAV server, with the configs of storages there."""

    bucket: str = ""
    s3: dict[str, str] = field(default_factory=dict)
    ssh: str = ""
    sftp: dict[str, object] = field(default_factory=dict)
    collection: str = ""
    dav: dict[str, str] = field(default_factory=dict)


@dataclass
class Arena:
    """A database server and a folder; a prepared scenario is kept in both to start from."""

    postgres_home: Path
    template: str
    folder: Path
    #: how the servers are reached
    servers: Servers = field(default_factory=Servers)
    prepared: str = ""
    now: datetime | None = None
    objects: Storage | None = None
    kept_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def live(self) -> Path:
        return self.folder / "site"

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def prepare(self, scenario: Scenario) -> None:
        """Make what the scenario starts from, once."""
        self.prepared = f"kept_{uuid.uuid4().hex}"
        self.create(self.prepared, self.template)
        shutil.rmtree(self.live, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)
        self.live.mkdir(parents=True)
        engine = make_engine(embedded.database_url(self.postgres_home, self.prepared))
        must_be_told(engine)
        site = make_site(engine, self.live, **_ONE_BY_ONE | scenario.settings)
        self.objects = self._add_far(site, scenario.far) if scenario.far else None
        scenario.prepare(site)
        self.now = site.now
        self.kept_objects = read_all(self.objects) if self.objects else {}
        engine.dispose()
        shutil.copytree(self.live, self.kept)

    def _add_far(self, site: Site, kind: str) -> Storage | None:
        """A posix storage a, and b of that kind, at two locations; b if its files lie elsewhere."""
        site.add_storage("a", "A")
        folder = site.add_storage("b", "B", **{"class": "object" if kind == "s3" else "disk"})
        servers, new = self.servers, uuid.uuid4().hex
        interface, root, config, bundling = {
            "s3": ("s3", f"{servers.bucket}/{new}", servers.s3, {}),
            "sftp": ("sftp", f"{servers.ssh}{folder}", servers.sftp, {}),
            "bundled": ("posix", str(folder), {}, _BUNDLING),
            "bundled dav": ("webdav", f"{servers.collection}/{new}", servers.dav, _BUNDLING),
        }[kind]
        if interface == "webdav":
            # what its collection is made by leaves nothing else behind
            top = open_storage("top", "webdav", servers.collection, servers.dav)
            top.write(f"{new}/x", io.BytesIO(), 0)
            top.remove(f"{new}/x")
        site.execute(
            "UPDATE storage SET interface = :interface, root = :root, "
            "config = CAST(:config AS jsonb) WHERE name = 'b'",
            interface=interface, root=root, config=json.dumps({**config, **bundling}),
        )  # fmt: skip
        elsewhere = interface in ("s3", "webdav")
        return open_storage("b", interface, root, config) if elsewhere else None

    def start(self) -> str:
        """A fresh copy of what was prepared, in the same places; its database's name."""
        shutil.rmtree(self.live)
        shutil.copytree(self.kept, self.live)
        if self.objects is not None:
            for top in {path.partition("/")[0] for path in read_all(self.objects)}:
                self.objects.remove(top)
            for path, data in self.kept_objects.items():
                self.objects.write(path, io.BytesIO(data), len(data))
        name = f"run_{uuid.uuid4().hex}"
        self.create(name, self.prepared)
        return name

    def create(self, name: str, template: str) -> None:
        """A database like ``template``."""
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it still."""
        self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        """How a database is reached."""
        return embedded.database_url(self.postgres_home, name)

    def _execute(self, statement: str) -> None:
        url = embedded.database_url(self.postgres_home, "postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement.encode())


def read_all(storage: Storage) -> dict[str, bytes]:
    """Every file of a storage by path, the DLM's own included."""
    found = {}
    for folder in ("", PRIVATE):
        if folder and storage.stat(folder) is None:
            continue
        for entry in storage.walk(folder):
            with storage.open_read(entry.path) as stream:
                found[entry.path] = stream.read(-1)
    return found


def attach(engine: Engine, folder: Path, scenario: Scenario, now: datetime) -> Site:
    """A new process's view of a site that is there."""
    site = make_site(engine, folder, **_ONE_BY_ONE | scenario.settings)
    site.now = now
    rows = site.query("SELECT name, storage_id FROM storage")
    site.storages = {row["name"]: row["storage_id"] for row in rows}
    return site


def open_row(row: Mapping[str, Any]) -> Storage:
    """The real adapter of a storage's row."""
    return open_storage(row["name"], row["interface"], row["root"], row["config"])


def open_crashing(row: Mapping[str, Any], points: Points) -> Storage:
    """The same, whose calls are points; of one with bundles, those of what lies beneath."""
    bundling, rest = split_bundling(row["name"], row["config"])
    inner = cast(Storage, CrashingStorage(open_row({**row, "config": rest}), points))
    return inner if bundling is None else cast(Storage, Bundled(inner, bundling))


def act(url: str, folder: Path, scenario: Scenario, now: datetime, points: Points) -> datetime:
    """Run the scenario with its points counted; the time at its end, or at its crash."""
    engine = make_engine(url)
    try:
        site = attach(engine, folder, scenario, now)
        reopen(site, lambda row: open_crashing(row, points))
        watch_commits(engine, points)
        try:
            scenario.act(site)
        except Crash:
            pass
        return site.now
    finally:
        end_connections(engine)


def recover(url: str, folder: Path, scenario: Scenario, now: datetime) -> State:
    """A new process: the queue, the commands again, the sensors, the daily housekeeping (what a
    packing left undone, the sweep); the state after it.

    Long enough that graces, leases and back-offs are over in every run.
    """
    engine = make_engine(url)
    try:
        site = attach(engine, folder, scenario, now)
        site.advance(hours=1)  # leases have run out
        site.work()
        end = site.now + _LONG
        while site.now < end:
            scenario.act(site)
        for tidy_up in pack_due(site.context):
            tidy_up()  # a storage's mtimes are later than the site's clock: nothing new is packed
        for row in site.query("SELECT * FROM storage"):
            # files have the time of this machine, whatever the site's clock says
            sweep_temp(open_row(row), timedelta(0), utc_now() + timedelta(hours=1))
        return describe(site)
    finally:
        engine.dispose()


def describe(site: Site) -> State:
    """The catalogue without times and chance, and every file on every storage."""
    items = "SELECT uri, version, state, kind, size, digest, target_phase, phase_weight, shortfall, expires_at IS NOT NULL AS expires, expiry_reason FROM data_item ORDER BY uri, version"  # noqa: E501
    replicas = "SELECT i.uri, s.name, r.state, r.path, r.size, r.digest, r.expires_at IS NOT NULL AS expires, r.expiry_reason, r.trashed_at IS NOT NULL AS trashed, r.absent_at IS NOT NULL AS absent, r.excluded_until FROM replica r JOIN data_item i USING (oid) JOIN storage s USING (storage_id) ORDER BY i.uri, s.name, r.state, r.path"  # noqa: E501
    unfinished = "SELECT o.kind, o.state, i.uri, s.name FROM operation o JOIN data_item i USING (oid) JOIN replica r ON r.uid = o.uid JOIN storage s ON s.storage_id = r.storage_id WHERE o.state NOT IN ('DONE', 'CANCELLED') ORDER BY 1, 2, 3, 4"  # noqa: E501
    certificates = "SELECT DISTINCT d.step, d.basis, i.uri, s.name, d.reason FROM deletion d JOIN data_item i USING (oid) JOIN storage s USING (storage_id) ORDER BY 1, 2, 3, 4, 5"  # noqa: E501
    usage = "SELECT s.name, u.used_bytes, u.trashed_bytes FROM storage_usage u JOIN storage s USING (storage_id) ORDER BY 1"  # noqa: E501
    manifest = "SELECT i.uri, m.path, m.size, m.digest FROM manifest_file m JOIN data_item i USING (oid) ORDER BY 1, 2"  # noqa: E501
    sources = {"items": items, "replicas": replicas, "unfinished": unfinished,
               "certificates": certificates, "usage": usage, "manifest": manifest}  # fmt: skip
    state: State = {name: site.query(sql) for name, sql in sources.items()}
    state["files"] = _files(site)
    state["bundled"] = [line for row in site.query("SELECT * FROM storage ORDER BY name")
                        for line in _bundled(row)]  # fmt: skip
    state["described"] = [line for row in site.query("SELECT * FROM storage ORDER BY name")
                          for line in _described(row)]  # fmt: skip
    return state


def _described(row: Mapping[str, Any]) -> list[str]:
    """What a storage says of itself, and the files there that it should have removed."""
    storage = open_row(row)
    index, problems = newest_index(storage)
    if index is None:
        return problems
    told = list(problems)
    for prefix, file in index.files.items():
        with opened(storage, prefix, file) as lines:
            told += [
                " ".join(str(one[key]) for key in ("uri", "path", "state", "digest", "tags"))
                for one in map(json.loads, lines)
                if prefix != SITE
            ]
    keep = index.paths | read_index(storage, index.generation - 1).paths
    left = [entry.path for entry in storage.walk(FOLDER) if entry.path not in keep]
    return [f"{row['name']}: {line}" for line in sorted(told + left)]


def _bundled(row: Mapping[str, Any]) -> list[str]:
    """The members of a storage's bundles, and how many tars there are; one that the index does not
    name, or is not there, is told. Lists of bundles that went go later, with the index's fold."""
    storage = open_row(row)
    if not isinstance(storage, Bundled):
        return []
    members = storage.index.look(lambda: [path for path, _ in storage.index.since("", "")])
    named = {tar_path(bundle) for bundle in storage.index.bundles}
    files = [entry.path for entry in storage.inner.walk(tar_path("").rpartition("/")[0])]
    there = {path for path in files if path.endswith(".tar")}
    wrong = [f"{path} is in one only of index and storage" for path in named ^ there]
    return [f"{row['name']}: {len(named)} bundles", *wrong, *sorted(members)]


def _files(site: Site) -> dict[str, bytes]:
    """Contents by path; the ids in names of the DLM's own files replaced by what they stand for."""
    meaning = {
        str(row["uid"]): row["uri"]
        for row in site.query("SELECT r.uid, i.uri FROM replica r JOIN data_item i USING (oid)")
    }
    found = {}
    for row in site.query("SELECT * FROM storage"):
        for path, data in read_all(open_row(row)).items():
            parts = path.split("/")
            if path.startswith((FOLDER, BUNDLES)):
                continue  # full of times and ids: see _described and _bundled
            if parts[0] == PRIVATE and len(parts) > 2:
                parts[2] = meaning.get(parts[2].split(".")[0], parts[2])
            found["/".join([row["name"], *parts])] = data
    return found


def reference(arena: Arena, scenario: Scenario) -> tuple[State, list[str]]:
    """The state that the uninterrupted run reaches, and the names of its points."""
    assert arena.now is not None
    name, points = arena.start(), Points()
    try:
        end = act(arena.url(name), arena.live, scenario, arena.now, points)
        state = recover(arena.url(name), arena.live, scenario, end)
    finally:
        arena.drop(name)
    assert not [path for path in state["files"] if "/.dlm/tmp/" in path]
    return state, points.names


def crash_at(arena: Arena, scenario: Scenario, at: int) -> State:
    """The state after a crash at one point and the recovery from it."""
    assert arena.now is not None
    name = arena.start()
    try:
        points = Points(at)
        end = act(arena.url(name), arena.live, scenario, arena.now, points)
        assert len(points.names) == at, "the points do not come in the same order each time"
        return recover(arena.url(name), arena.live, scenario, end)
    finally:
        arena.drop(name)


def kill_at(arena: Arena, scenario: Scenario, at: int) -> tuple[int, State]:
    """As :func:`crash_at`, by SIGKILL of a process of its own; its exit code too."""
    assert arena.now is not None
    name = arena.start()
    try:
        command = [sys.executable, "-m", "tests.crashpoints.kill", arena.url(name),
                   str(arena.live), scenario.name, arena.now.isoformat(), str(at)]  # fmt: skip
        code = subprocess.run(command, check=False, timeout=120, cwd=_ROOT).returncode
        end = arena.now + timedelta(hours=scenario.rounds)
        return code, recover(arena.url(name), arena.live, scenario, end)
    finally:
        arena.drop(name)


def difference(expected: State, found: State) -> list[str]:
    """What is not as it should be, a line each."""
    lines = []
    for part, wanted in expected.items():
        is_map = isinstance(wanted, dict)
        want = [f"{k}: {v!r}" for k, v in wanted.items()] if is_map else [str(r) for r in wanted]
        have = found[part]
        got = [f"{k}: {v!r}" for k, v in have.items()] if is_map else [str(r) for r in have]
        lines += [f"{part} lacks {line}" for line in want if line not in got]
        lines += [f"{part} has {line}" for line in got if line not in want]
        if len(want) != len(got):
            lines.append(f"{part}: {len(got)} instead of {len(want)}")
    return lines


def exhaust(home: Path, servers: Servers, name: str) -> tuple[int, list[str], str]:
    """How many points a scenario has, what failed at which, and its line of the table."""
    scenario = next(one for one in SCENARIOS if one.name == name)
    begun, bad = time.monotonic(), []
    arena = Arena(home, "template_dlm", home / name.replace(" ", "-"), servers)
    arena.prepare(scenario)
    expected, names = reference(arena, scenario)
    for at, point in enumerate(names, start=1):
        wrong = difference(expected, crash_at(arena, scenario, at))
        if wrong:
            bad.append(f"  point {at} ({point}): " + "\n    ".join(wrong[:6]))
    arena.drop(arena.prepared)
    seconds = time.monotonic() - begun
    return len(names), bad, f"{name:24} {len(names):7} {len(bad):7} {seconds:8.1f}"
