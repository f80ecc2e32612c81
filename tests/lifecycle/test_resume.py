"""A large copy that was interrupted goes on where it was, and never from what somebody writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dlm_core.catalogue.operations import owned_on, partials_on
from dlm_core.clock import utc_now
from dlm_core.errors import StorageUnavailableError
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import drain
from dlm_core.storages import s3
from dlm_core.storages.open import open_storage
from dlm_core.transfers.sweep import sweep_parts, sweep_temp
from dlm_core.types import OperationKind
from tests.backends import s3_config
from tests.fakes import Cut
from tests.lifecycle.killed import wait_for_arrival
from tests.site import Site, make_site, reopen
from tests.sshd import SshServer, ssh_server
from tests.wire import line_to

_MB = 1 << 20
_PART = 5 << 20
# of the 5 MiB that a worker has sent when it is killed, some were still on the wire
_ARRIVED = 4 << 20
_DATA = os.urandom(16 * _MB)
_COPY = {OperationKind.COPY: execute_copy}


#: where an interrupted copy is gone on from, if its worker says that it has ended
EVERYWHERE = pytest.mark.parametrize(
    "site", ["posix", "sftp", "sftp_shell", "s3", "xrootd"], indirect=True
)
ON_DISK = pytest.mark.parametrize("site", ["posix"], indirect=True)


@pytest.fixture(params=["posix", "sftp", "sftp_shell", "s3"])
def site(engine, tmp_path, request, monkeypatch) -> Site:
    """Storage b is a folder, one behind sshd, or a bucket behind a line that counts; files above a
    megabyte are resumed."""
    monkeypatch.setattr(s3, "PART_SIZE", _PART)
    site = make_site(engine, tmp_path, resume_bytes=_MB)
    site.add_storage("a", "A")
    root = site.add_storage("b", "B")
    site.far = ("posix", str(root), {})
    if "sftp" in request.param:
        server: SshServer = request.getfixturevalue("sshd")
        site.far = far(server, root, shell=request.param == "sftp_shell")
    site.line = None
    if request.param == "xrootd":
        xrootd = request.getfixturevalue("xrootd")
        site.far = ("xrootd", xrootd.make_root(), xrootd.config)
    if request.param == "s3":
        site.line = request.getfixturevalue("s3_line")
        bucket = request.getfixturevalue("s3")
        config = s3_config(bucket) | {"endpoint": f"http://127.0.0.1:{site.line.port}"}
        site.far = ("s3", f"{bucket.bucket}/{uuid.uuid4().hex}", config)
    return site


@pytest.fixture
def s3_line(s3):
    with line_to(int(s3.endpoint.rpartition(":")[2])) as line:
        yield line


def far(server: SshServer, root: Any, *, shell: bool) -> Any:
    return "sftp", server.root(root), server.config(shell=shell)


def cut(site: Site, after: int, how: Callable[[], None]) -> Cut:
    """Let the reading from a be cut after so many bytes, most of which have arrived; b as it is."""

    def then() -> None:
        wait_for_arrival(open_storage("b", *site.far))
        how()

    source = Cut(open_storage("a", "posix", str(site.folder / "a"), {}), after, then)
    reopen(site, lambda row: source if row["name"] == "a" else open_storage("b", *site.far))
    return source


def went_over(site: Site, source: Cut) -> int:
    """Bytes that were brought over so far: to a bucket counted on the line, and for all else what
    was read from the source."""
    return site.line.sent if site.line else source.read


def visible(site: Site) -> dict[str, bytes]:
    """Files on b, and what is told of it."""
    storage, found = open_storage("b", *site.far), {}
    for entry in storage.walk():
        with storage.open_read(entry.path) as stream:
            found[entry.path] = stream.read()
    return found


def left_over(site: Site) -> list[str]:
    """Temporary files on b, and what has become of no object."""
    if site.far[0] == "xrootd":
        return [entry.path for entry in open_storage("b", *site.far).walk(".dlm/tmp")]
    if not site.line:
        return site.private("b", "tmp")
    parts = open_storage("b", *site.far)._parts  # type: ignore[attr-defined]
    return [one.key for one in parts._unfinished(parts._s3.prefix)]


def unavailable() -> None:
    raise StorageUnavailableError(storage="a", message="the line is cut")


def partial(site: Site) -> str | None:
    (row,) = site.query("SELECT partial, state FROM operation")
    assert row["state"] == "QUEUED"
    return row["partial"]


@EVERYWHERE
def test_a_copy_goes_on_after_an_outage(site: Site) -> None:
    """What came through is not read from the source again; the copy is whole; nothing stays."""
    oid = site.add_item("x", _DATA, "a")
    source = cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = partial(site)
    assert left is not None or site.line
    assert len(left_over(site)) == 1
    assert visible(site) == {}
    before = went_over(site, source)
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.replicas(oid)["b"] == "READY"
    assert visible(site) == {"test/x": _DATA}
    assert left_over(site) == []
    # over SFTP the last megabytes before a cut are written again
    assert went_over(site, source) - before < len(_DATA)
    assert source.read >= len(_DATA)


@EVERYWHERE
def test_a_copy_goes_on_after_a_drainer_was_stopped(site: Site) -> None:
    """Its try does not count, and the next drainer goes on."""
    site.add_item("x", _DATA, "a")
    source = cut(site, 12 * _MB, site.context.stop.set)
    plan_replication(site.context)
    drain(site.context, _COPY)
    assert partial(site) is not None or site.line
    assert site.query("SELECT attempts FROM operation") == [{"attempts": 0}]
    site.context.stop.clear()
    before = went_over(site, source)
    drain(site.context, _COPY)
    assert visible(site) == {"test/x": _DATA}
    # over SFTP the last megabytes before a cut are written again
    assert went_over(site, source) - before < len(_DATA)


@pytest.mark.parametrize("site", ["sftp", "posix", "xrootd"], indirect=True)
@pytest.mark.parametrize("limited", [False, True])
def test_a_copy_to_tape_goes_on_too(site: Site, limited: bool) -> None:
    """What was just written is read back, and so is what an earlier try left, whatever the site's
    command knows of the DLM's temporary files; beneath a limit of bytes a second too."""
    interface, root, config = site.far
    cold = {"stage": "command", "stage_command": "true", "online_command": "true"}
    site.far = interface, root, config | cold
    if limited:
        site.set_storage("b", max_bytes_per_second=1 << 30)
    oid = site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    assert partial(site) is not None
    site.advance(minutes=5)
    report = drain(site.context, _COPY)
    assert report.done == {"copy": 1}, report
    assert site.replicas(oid)["b"] == "READY" and left_over(site) == []


@ON_DISK
def test_damage_to_what_was_left_is_not_the_sources(site: Site) -> None:
    """A flipped byte in the partial file: the copy is made anew, the source stays READY."""
    oid = site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = site.folder / "b" / (partial(site) or "")
    with left.open("r+b") as file:
        file.seek(1000)
        file.write(b"flipped")
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.replicas(oid) == {"a": "READY", "b": "PENDING"}
    assert site.query("SELECT error_code FROM operation") == [{"error_code": "DLM-402"}]
    assert site.visible("b") == {} and site.private("b", "tmp") == []
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.visible("b") == {"test/x": _DATA}


def kill_in_the_middle(site: Site, url: str) -> None:
    """Let a worker copy 12 MB and be killed."""
    command = [
        sys.executable, "-m", "tests.lifecycle.killed", url, str(site.folder / "home"),
        site.now.isoformat(), str(12 * _MB), str(_PART),
        json.dumps(["posix", str(site.folder / "a"), {}]), json.dumps(site.far),
    ]  # fmt: skip
    done = subprocess.run(command, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL


def test_a_copy_goes_on_after_its_worker_was_killed(site: Site, database_url) -> None:
    """By SIGKILL, without a word, in the middle: when its lease is over another goes on where it
    was, and nothing of it stays."""
    oid = site.add_item("x", _DATA, "a")
    source = cut(site, 1 << 60, unavailable)
    plan_replication(site.context)
    kill_in_the_middle(site, database_url)
    assert visible(site) == {} and len(left_over(site)) == 1
    site.advance(hours=1)
    before = went_over(site, source)
    drain(site.context, _COPY)
    assert went_over(site, source) - before < len(_DATA) - _ARRIVED
    assert visible(site) == {"test/x": _DATA} and left_over(site) == []
    assert site.replicas(oid)["b"] == "READY"


@pytest.mark.parametrize("site", ["sftp", "sftp_shell"], indirect=True)
def test_an_older_server_makes_no_copy_by_itself(site: Site, database_url, tmp_path) -> None:
    """OpenSSH before version 9 has no 'copy-data': a command copies where one may be run, else the
    copy begins anew, and the sweep clears what the killed worker left."""
    shell = bool(site.far[2]["shell"])
    with ssh_server(tmp_path / "old", sftp="internal-sftp -P copy-data") as server:
        site.far = far(server, site.folder / "b", shell=shell)
        site.add_item("x", _DATA, "a")
        source = cut(site, 1 << 60, unavailable)
        plan_replication(site.context)
        kill_in_the_middle(site, database_url)
        site.advance(hours=1)
        drain(site.context, _COPY)
        assert visible(site) == {"test/x": _DATA}
        assert (source.read < len(_DATA) - _ARRIVED) == shell
        assert len(left_over(site)) == (not shell)


@pytest.mark.parametrize("site", ["posix", "sftp", "sftp_shell", "s3"], indirect=True)
def test_what_a_worker_may_still_write_does_no_harm(site: Site) -> None:
    """A worker whose lease ran out did not say that it has ended: nobody writes to its file, but to
    a copy that the storage made of it; an object names the parts that it is made of. What the late
    one writes then goes nowhere."""
    oid = site.add_item("x", _DATA, "a")
    asleep, awake = threading.Event(), threading.Event()

    def sleep() -> None:
        asleep.set()
        assert awake.wait(120)

    source = cut(site, 12 * _MB, sleep)
    plan_replication(site.context)
    late = threading.Thread(target=drain, args=(site.context, _COPY))
    late.start()
    assert asleep.wait(60)
    site.advance(hours=1)
    before = went_over(site, source)
    drain(replace(site.context, worker="another"), _COPY)
    assert visible(site) == {"test/x": _DATA}
    assert went_over(site, source) - before < len(_DATA)
    awake.set()
    late.join(60)
    assert visible(site) == {"test/x": _DATA}
    assert site.replicas(oid)["b"] == "READY"
    assert left_over(site) == []


@ON_DISK
def test_what_a_queued_copy_goes_on_from_is_not_swept(site: Site) -> None:
    """However old it is; anything else of that age is."""
    site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = partial(site)
    other = site.folder / "b/.dlm/tmp/0/other"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"x")
    storage = open_storage("b", "posix", str(site.folder / "b"), {})
    kept = site.context.transact(lambda c: partials_on(c, site.storages["b"]))
    assert kept == {left}
    later = site.now + timedelta(days=3650)
    assert sweep_temp(storage, timedelta(days=2), later, kept) == 1
    assert site.private("b", "tmp") == [(left or "").removeprefix(".dlm/tmp/")]


@pytest.mark.parametrize("site", ["s3"], indirect=True)
def test_an_upload_that_a_queued_copy_goes_on_from_is_not_swept(site: Site) -> None:
    """However old it is; once nobody wants the copy any more its parts go."""
    site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    storage, on = open_storage("b", *site.far), site.storages["b"]

    def sweep() -> int:
        def owned(paths: Any) -> Any:
            return site.context.transact(lambda c: owned_on(c, on, paths))

        return sweep_parts(storage, timedelta(days=2), utc_now() + timedelta(days=9), owned)

    assert sweep() == 0 and len(left_over(site)) == 1
    site.execute("UPDATE operation SET state = 'FAILED', finished_at = now()")
    assert sweep() == 1 and left_over(site) == []


@ON_DISK
def test_whose_the_path_of_an_upload_is(site: Site) -> None:
    """A replica's, or below one that is a directory; of others' nothing is known."""
    site.add_item("x y", b"1", "a")
    plan_replication(site.context)
    asked = ["test/x y", "test/x y/table/file", "test/x", "test", "//", "../x"]
    for name, awaited in (("a", False), ("b", True)):
        paths = [path if name == "b" else path.removeprefix("test/") for path in asked]
        found = site.context.transact(lambda c, p=paths, n=name: owned_on(c, site.storages[n], p))
        assert found == dict.fromkeys(paths[:2], awaited)
