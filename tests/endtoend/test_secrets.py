"""A secret is in its file and its variable and nowhere else, whatever is done with its storage."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from dlm_cli.s3_server import S3Server
from dlm_cli.services import processes_of
from dlm_core.catalogue import embedded
from tests.leftovers import kill

pytestmark = pytest.mark.timeout(400)

#: enough for some to be tried on each of two buckets
FILES = 16


class Installation:
    """``dlm up`` and the command line as processes on a home of their own."""

    def __init__(self, folder: Path, secret: str) -> None:
        self.folder, self.home = folder, folder / "home"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DLM_", "AWS_"))}
        self.environment = kept | {
            "DLM_HOME": str(self.home), "DLM_WEBSERVER_PORT": "0", "DLM_LINGER_SECONDS": "2",
            "DLM_RETRY_BASE_SECONDS": "0.5", "SITE_SECRET": secret, "COLUMNS": "200",
        }  # fmt: skip
        self.said: list[str] = []
        self.services = self.start("up")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        program = "from dlm_cli.main import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def dlm(self, *arguments: str) -> str:
        """Run a command; what it said is kept."""
        out = self.start(*arguments).communicate(timeout=180)[0]
        self.said.append(out)
        return out

    def wait_up(self) -> None:
        assert self.services.stdout is not None
        for line in self.services.stdout:
            if "UI:" in line:
                return

    def end(self) -> None:
        self.services.send_signal(signal.SIGINT)
        try:
            self.said.append(self.services.communicate(timeout=120)[0])
        except subprocess.TimeoutExpired:
            self.services.kill()
        kill(processes_of(self.home))
        embedded.stop(self.home)


class ProcessList(threading.Thread):
    """Reads the command lines of all processes over and over, as ``ps`` does."""

    def __init__(self, *wanted: str) -> None:
        super().__init__(name="ps", daemon=True)
        self.wanted, self.over, self.found = [w.encode() for w in wanted], threading.Event(), set()
        self.looked = 0

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.looked += 1
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                    line = file.read()
                    self.found |= {line for one in self.wanted if one in line}


@pytest.fixture
def installation(s3: S3Server, run_folder: Path) -> Iterator[Installation]:
    folder = Path(tempfile.mkdtemp(dir=run_folder))
    made = Installation(folder, s3.secret_key)
    try:
        made.wait_up()
        yield made
    finally:
        made.end()
        shutil.rmtree(folder)


def test_no_secret_shows_anywhere(installation: Installation, s3: S3Server) -> None:
    """Keys that work and a key that is wrong, used by jobs and commands. Then looked for in every
    table, the whole home (database, event log, run config, compute logs), the process list, and
    all that was printed."""
    wrong = secrets.token_hex(20)
    watcher = ProcessList(s3.secret_key, wrong)
    watcher.start()
    _use(installation, s3, wrong)
    watcher.over.set()
    watcher.join()
    values = [s3.secret_key, wrong]
    assert watcher.looked > 10 and watcher.found == set()
    assert _tables_with(installation.home, values) == []
    assert "storage" in _tables_with(installation.home, ["env:SITE_SECRET"]), "it looks nowhere"
    installation.end()
    assert _files_with(installation.home, values) == []
    assert _files_with(installation.home, ["DLM-306"]) != [], "it looks nowhere"
    printed = "\n".join(installation.said)
    assert "denies access" in printed and "env:SITE_SECRET" in printed
    assert not any(value in printed for value in values)
    assert _files_with(installation.folder, [wrong]) == [installation.folder / "secret"]


def _use(installation: Installation, server: S3Server, wrong: str) -> None:
    """Copies to a good bucket, then failures on another whose key is rotated to a wrong one."""
    dlm, files = installation.dlm, installation.folder / "files"
    files.mkdir()
    for number in range(FILES):
        (files / f"{number}").write_bytes(os.urandom(1000))
    key = installation.folder / "secret"
    key.write_text(server.secret_key)
    (installation.folder / "access").write_text(server.access_key)
    for location in ("here", "there", "beyond"):
        dlm("location", "add", location)
    dlm("storage", "add", "disk", "--location", "here", "--root", str(files))
    for name, location, secret in (
        ("good", "there", "env:SITE_SECRET"), ("bad", "beyond", f"file:{key}"),
    ):  # fmt: skip
        out = dlm(
            "storage", "add", name, "--location", location, "--interface", "s3",
            "--root", f"{server.bucket}/{name}", "--config", f"endpoint={server.endpoint}",
            "--config", f"access_key=file:{installation.folder / 'access'}",
            "--config", f"secret_key={secret}",
        )  # fmt: skip
        assert "added" in out
    key.write_text(wrong)
    dlm("register", "disk", "--scheme", "test")
    _eventually(lambda: _is_settled(installation.home))
    _eventually(lambda: _all_copied(dlm))
    for command in (
        ["storage", "set", "good", "--mode", "offline"], ["run", "replication", "--wait"],
        ["storage", "list", "--json"], ["storage", "show", "good", "--json"],
        ["storage", "show", "bad"], ["storage", "test", "bad"], ["doctor"],
        ["audit", "--since", "1d"], ["status"],
    ):  # fmt: skip
        dlm(*command)


def _is_settled(home: Path) -> bool:
    """As :func:`_all_copied`, without two commands each time, which the services would wait for."""
    query = "SELECT count(*) FROM data_item WHERE state = 'READY' AND shortfall IS NULL"
    with psycopg.connect(embedded.database_url(home)) as connection:
        return connection.execute(query).fetchone() == (FILES,)


def _all_copied(dlm: Callable[..., str]) -> bool:
    ready = json.loads(dlm("item", "list", "--state", "READY", "--json"))
    lacking = json.loads(dlm("item", "list", "--below-target", "--json"))
    return len(ready) == FILES and not lacking


def _eventually(holds: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(1)


def _tables_with(home: Path, values: list[str]) -> list[str]:
    """Tables of all databases of the server whose rows have one of ``values``."""
    with psycopg.connect(embedded.database_url(home, "postgres")) as connection:
        names = connection.execute("SELECT datname FROM pg_database WHERE datallowconn").fetchall()
    found, looked = [], 0
    for (name,) in names:
        with psycopg.connect(embedded.database_url(home, name)) as connection:
            tables = connection.execute(
                "SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'm', 'v', 'p')"
                " AND relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_|^info')"
            ).fetchall()
            for (table,) in tables:
                looked += 1
                with connection.cursor().copy(f"COPY (SELECT * FROM {table}) TO STDOUT") as copy:
                    text = b"".join(bytes(block) for block in copy)
                found += [table for value in values if value.encode() in text]
    assert looked > 40
    return found


def _files_with(folder: Path, values: list[str]) -> list[Path]:
    wanted = [value.encode() for value in values]
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and any(value in file.read_bytes() for value in wanted)
    ]
