"""What storages by rclone promise beyond the contract of all, with its real daemon."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import pytest

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadExistsError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.open import open_storage
from dlm_core.storages.rclone_daemon import Daemon, daemon
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind
from tests.backends import open_dav_by_rclone, open_memory_by_rclone, open_s3_by_rclone
from tests.leftovers import lives
from tests.payloads import contents, get, put
from tests.servers import USER, answering, web_server


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return open_storage("in", "posix", str(tmp_path / "in"), {})


@pytest.fixture
def remote(tmp_path):
    (tmp_path / "out").mkdir()
    return open_storage("out", "rclone", str(tmp_path / "out"), {"type": "local"})


def task(source, path, data, digest=None):
    put(source, path, data)
    return CopyTask(
        uuid.uuid4(), path, f"to/{path}", PayloadKind.FILE, len(data),
        digest or f"sha256:{sha256(data).hexdigest()}", (), uuid.uuid4().hex,
    )  # fmt: skip


def kill_daemon():
    process = daemon().process
    process.send_signal(signal.SIGKILL)
    process.wait(60)


# --- the daemon -----------------------------------------------------------------------------------


def test_all_storages_of_a_process_share_one_daemon(tmp_path, remote):
    """And its socket lies in a folder that only its user may enter."""
    put(remote, "x")
    first = daemon()
    other = open_storage("other", "rclone", str(tmp_path), {"type": "local"})
    assert [entry.path for entry in other.walk()] == ["out/x"] and daemon() is first
    assert first.folder.stat().st_mode & 0o777 == 0o700


def test_a_daemon_that_was_killed_is_started_again(remote):
    """The next call is answered by another, to which the remotes are told anew."""
    put(remote, "x")
    kill_daemon()
    assert get(remote, "x") == b"payload"


def test_a_daemon_killed_in_a_call_is_an_outage(remote):
    """Nobody knows what it did; what was being written is not there."""

    class Killing(io.BytesIO):
        def read(self, size=-1):
            kill_daemon()
            return super().read(size)

    data = bytes(5 << 20)
    with pytest.raises(StorageUnavailableError):
        remote.write("x", Killing(data), len(data))
    assert remote.stat("x") is None
    put(remote, "x")


def test_a_daemon_killed_while_it_takes_many_loses_nothing(source, remote):
    """What it did not finish is copied alone, by the next daemon, or at the next try."""
    data = {f"f/{n:02}": os.urandom(4 << 20) for n in range(24)}
    tasks = [task(source, path, content) for path, content in data.items()]
    first = daemon()
    killed = threading.Event()

    def kill(_):
        if not killed.is_set():
            killed.set()
            first.process.kill()

    results = list(copy_batch(source, remote, tasks, progress=kill))
    first.process.wait(60)
    assert killed.is_set() and daemon() is not first
    failed = [one.task for one in results if one.error is not None]
    assert all(one.error.retryable for one in results if one.error is not None)
    again = list(copy_batch(source, remote, failed))
    assert [one.error for one in again] == [None] * len(failed)
    assert contents(remote) == {f"to/{path}": content for path, content in data.items()}


STARTER = """
import threading, time
from dlm_core.storages.rclone_daemon import Daemon, daemon
started = []
thread = threading.Thread(target=lambda: started.append(daemon()))
thread.start()
thread.join()
time.sleep(0.3)
print(started[0].process.pid, started[0].folder, started[0].alive(), flush=True)
time.sleep(60)
"""


def test_the_daemon_ends_with_its_owner():
    """Also when that is killed; not when the thread that first needed it ends. The next process
    that needs one removes the folder."""
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE) as owner:
        pid, folder, alive = owner.stdout.readline().decode().split()
        assert alive == "True" and lives(int(pid))
        owner.kill()
    deadline = time.monotonic() + 60
    while lives(int(pid)):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
    kill_daemon()
    daemon()
    assert not Path(folder).exists()


def test_a_forked_process_has_a_daemon_of_its_own(remote):
    """The parent's would end its calls with the parent."""
    put(remote, "x")
    first, pid = daemon().process.pid, os.fork()
    if pid == 0:
        code = 2
        try:
            own = daemon()
            own.process.kill()
            code = int(own.process.pid == first)
        finally:
            os._exit(code)  # whatever comes: two would go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert get(remote, "x") == b"payload" and daemon().process.pid == first


def test_a_folder_in_the_way_of_a_file_stays(wsgidav):
    """Where the backend would replace it by the file: WebDAV's MOVE, as rclone asks for it."""
    storage = open_dav_by_rclone(wsgidav)
    put(storage, "x", b"mine")
    put(storage, "folder/y", b"theirs")
    with pytest.raises(PayloadExistsError):
        storage.rename("x", "folder")
    with pytest.raises(PayloadExistsError):
        storage.rename("folder", "x")
    assert contents(storage) == {"x": b"mine", "folder/y": b"theirs"}


# --- secrets --------------------------------------------------------------------------------------


def test_a_listing_that_leaves_something_out_costs_nothing_when_a_tree_moves(remote, monkeypatch):
    """What was not moved, since something else came to lie there meanwhile, stays and is told."""
    put(remote, "tree/x", b"mine")
    put(remote, "moved/x", b"another's")
    look = remote._look
    monkeypatch.setattr(remote, "_look", lambda path: None if path == "moved" else look(path))
    monkeypatch.setattr(remote, "_list", lambda folder: [])
    with pytest.raises(StorageUnavailableError, match="not moved whole"):
        remote.rename("tree", "moved")
    monkeypatch.undo()
    assert contents(remote) == {"tree/x": b"mine", "moved/x": b"another's"}


def test_a_secret_is_nowhere_but_in_memory(wsgidav, tmp_path):
    """Not in the list of processes, not in an environment, not in a file of the daemon's."""
    storage = open_dav_by_rclone(wsgidav)
    put(storage, "x")
    running = daemon()
    told = running.call("config/dump", {})
    hidden = [one["pass"] for one in told.values() if one.get("type") == "webdav"]
    assert hidden
    secrets = [text.encode() for text in (wsgidav.password, *hidden)]
    family = [os.getpid(), running.process.pid]
    places = [Path(f"/proc/{pid}/{what}") for pid in family for what in ("cmdline", "environ")]
    places += [file for file in running.folder.rglob("*") if file.is_file()]
    assert len(places) >= 4
    for place in places:
        assert not any(secret in place.read_bytes() for secret in secrets), place
    assert running.call("config/paths", {})["config"] == ""


def test_a_wrong_password_is_denied_and_not_shown(wsgidav, tmp_path):
    """A rotated one is found without reopening."""
    secret = tmp_path / "secret"
    secret.write_text("not-the-secret")
    storage = open_dav_by_rclone(wsgidav, secret_pass=f"file:{secret}")
    for call in (storage.check, lambda: storage.stat("x"), lambda: put(storage, "x")):
        with pytest.raises(AccessDeniedError) as caught:
            call()
        assert "not-the-secret" not in str(caught.value)
    secret.write_text(wsgidav.password)
    put(storage, "x")
    assert get(storage, "x") == b"payload"


@pytest.mark.parametrize(
    "config",
    [
        {"type": "webdav", "pass": "hunter2"},
        {"type": "s3", "secret_access_key": "hunter2"},
        {"type": "b2", "key": "hunter2"},
        {"type": "webdav", "bearer_token": "hunter2"},
        {"type": "webdav", "secret_pass": "hunter2"},
        {"type": "webdav,pass=hunter2"},
        {"type": "webdav", "url": "https://dlm:hunter2@dav.example.org"},
        {"type": "webdav", "url": "https://dav.example.org/a?sig=1&token=hunter2"},
        {"type": "alias", "remote": ":http,url='https://x.example.org/?hunter2':"},
        {"type": "http", "url": "http://x/", "headers": "Authorization,hunter2"},
        {"type": "azureblob", "sas_url": "https://x.example.org/?sig=hunter2"},
        {"type": "azurefiles", "connection_string": "AccountKey=hunter2"},
        {"type": "storj", "access_grant": "hunter2"},
        {"type": "s3", "sse_customer_key_base64": "hunter2"},
        {"type": "iclouddrive", "cookies": "hunter2"},
    ],
)
def test_a_secret_given_where_a_reference_belongs_is_refused(config):
    """And not shown."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", "rclone", ".", config)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "secret", ["hunter2-hunter2", 'hunter2"hunter2\\', "hunter2/hunter2", "hunter2\u2028hunter2",
               "hunter2%zzhunter2", "hunter2\nhunter2", "hunter2@hunter2?"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "config", "given"),
    [
        ("http", {"url": "http://127.0.0.1:9/", "secret_headers": "env:DLM_TEST_GIVEN"}, "{}"),
        ("webdav", {"secret_url": "env:DLM_TEST_GIVEN"}, "http://user:{}@127.0.0.1:9/"),
        ("http", {"secret_url": "env:DLM_TEST_GIVEN"}, "http://127.0.0.1:9/?sign={}"),
    ],
)
def test_no_spelling_of_a_secret_is_in_an_error(monkeypatch, kind, config, given, secret):
    """rclone repeats what it cannot read, in quotes and with escapes of Go's."""
    monkeypatch.setenv("DLM_TEST_GIVEN", given.format(secret))
    storage = open_storage("x", "rclone", ".", {"type": kind, **config})
    with pytest.raises(StorageUnavailableError) as caught:
        storage.check()
    assert "hunter2" not in str(caught.value)


def test_a_backend_that_is_not_there_is_told():
    """In one line, without what it was asked with."""
    storage = open_storage("x", "rclone", ".", {"type": "nosuchthing"})
    with pytest.raises(StorageUnavailableError, match="nosuchthing") as caught:
        storage.check()
    assert "\n" not in str(caught.value) and "parameters" not in str(caught.value)


# --- many at once ---------------------------------------------------------------------------------


def test_many_files_are_taken_in_one_request(source, remote, monkeypatch):
    """Without a write for each; the progress tells of all bytes; nothing temporary stays."""
    data = {f"f/{n} ü#'": os.urandom(1000) for n in range(40)}
    tasks = [task(source, path, content) for path, content in data.items()]
    monkeypatch.setattr(remote, "write", None)
    told = []
    results = list(copy_batch(source, remote, tasks, progress=told.append))
    assert [one.error for one in results] == [None] * 40 and sum(told) == 40_000
    assert contents(remote) == {f"to/{path}": content for path, content in data.items()}
    assert list(remote.walk(".dlm")) == [] and remote._list(".dlm/tmp/b") == []


def test_a_damaged_source_among_many_is_told_as_such(source, remote):
    """The others come through."""
    tasks = [task(source, f"f/{n}", b"%d" % n) for n in range(9)]
    tasks.append(task(source, "f/bad", b"rotten", digest=f"sha256:{'0' * 64}"))
    results = {one.task.source_path: one.error for one in copy_batch(source, remote, tasks)}
    assert results.pop("f/bad").code == "DLM-401" and set(results.values()) == {None}
    assert len(contents(remote)) == 9 and list(remote.walk(".dlm")) == []


def test_a_full_disk(tmp_path, source):
    """Told as one; what fits comes through and no part of anything is visible."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        storage = open_storage("small", "rclone", str(small), {"type": "local"})
        with pytest.raises(StorageFullError):
            put(storage, "x", bytes(5 << 20))
        tasks = [task(source, f"f/{n}", os.urandom(900_000)) for n in range(5)]
        results = list(copy_batch(source, storage, tasks))
        assert {one.error.code for one in results if one.error} == {"DLM-302"}
        assert all(len(content) == 900_000 for content in contents(storage).values())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- http -----------------------------------------------------------------------------------------


def test_a_web_server_is_read_from_only(tmp_path, source):
    """Its pages are walked, its files read and copied; every change is refused."""
    data = {"a/one": b"1", "a/b/two words #?": b"22", "three": bytes(3 << 20)}
    with web_server(tmp_path / "web") as url:
        for path, content in data.items():
            file = tmp_path / "web" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        storage = open_storage("web", "http", url, {})
        storage.check()
        assert contents(storage) == data and storage.stat("nothing") is None
        assert observe(storage, "three").size == 3 << 20
        for change in (
            lambda: put(storage, "x"),
            lambda: storage.rename("three", "four"),
            lambda: storage.remove("three"),
        ):
            with pytest.raises(AccessDeniedError, match="only read from"):
                change()
        digest = f"sha256:{sha256(data['three']).hexdigest()}"
        one = CopyTask(
            uuid.uuid4(), "three", "here", PayloadKind.FILE, 3 << 20, digest, (), uuid.uuid4().hex
        )
        assert [result.error for result in copy_batch(storage, source, [one])] == [None]
        assert get(source, "here") == data["three"]


def test_a_web_server_that_is_down_is_an_outage():
    """Nothing is said to be missing."""
    storage = open_storage("web", "http", "http://127.0.0.1:9/x", {})
    for call in (storage.check, lambda: storage.stat("x"), lambda: list(storage.walk())):
        with pytest.raises(StorageUnavailableError):
            call()


@pytest.mark.parametrize("status", [0, 500, 503])
@pytest.mark.parametrize("folder", ["404", "no such file", "file not found"])
def test_what_a_file_is_called_is_no_word_of_the_server(folder, status):
    """A server that is in trouble with one folder does not say that nothing is there, whatever the
    name is that rclone tells with the error."""
    place = quote(folder)
    page = f'<html><a href="{place}/">{folder}/</a></html>'.encode()
    with answering(200, {"Content-Type": "text/html"}, page, {f"/{place}": status}) as told:
        web = open_storage("web", "http", told[0], {})
        for call in (
            lambda: web.stat(f"{folder}/x"),
            lambda: web.stat_many([f"{folder}/{n}" for n in range(9)]),
            lambda: list(web.walk()),
            lambda: get(web, f"{folder}/x"),
            lambda: web.read_back(f"{folder}/x"),
        ):
            with pytest.raises(StorageUnavailableError):
                call()


def test_a_web_server_is_asked_with_the_password(monkeypatch):
    """As a header, which no error and no list of processes shows."""
    monkeypatch.setenv("DLM_TEST_WEB", "pass,word\"'")
    config = {"user": USER, "password": "env:DLM_TEST_WEB"}
    page = b"<html><body><a href='x'>x</a></body></html>"
    with answering(200, {"Content-Type": "text/html"}, page) as (url, heard):
        open_storage("web", "http", url, config).check()
    wanted = "Basic " + b64encode(f"{USER}:pass,word\"'".encode()).decode()
    assert heard and {headers.get("Authorization") for _, _, headers in heard} == {wanted}


# --- backends that can copy and cannot move -------------------------------------------------------


@pytest.fixture(params=["s3", "memory"])
def copying(request):
    """A bucket on SeaweedFS by rclone's S3 backend, and one in its memory."""
    if request.param == "memory":
        return open_memory_by_rclone()
    return open_s3_by_rclone(request.getfixturevalue("s3"))


def commands(monkeypatch):
    """The names of what the daemon is asked for from now on."""
    asked, call = [], Daemon.call
    monkeypatch.setattr(
        Daemon, "call", lambda self, *a, **b: asked.append(a[0]) or call(self, *a, **b)
    )
    return asked


def test_without_a_move_a_file_is_copied_read_back_and_deleted(copying, monkeypatch):
    """rclone's own move would delete the source unread."""
    put(copying, "a/x", b"payload")
    asked = commands(monkeypatch)
    copying.rename("a/x", "b/y")
    assert contents(copying) == {"b/y": b"payload"}
    order = [
        f"operations/{what}" for what in ("copyfile", "hashsumfile", "hashsumfile", "deletefile")
    ]
    assert [one for one in asked if one in {*order, "operations/movefile"}] == order
    put(copying, "a/x", b"other")
    with pytest.raises(PayloadExistsError):
        copying.rename("a/x", "b/y")
    assert contents(copying) == {"a/x": b"other", "b/y": b"payload"}


def test_without_a_move_a_tree_is_copied_read_back_and_deleted_by_name(copying, monkeypatch):
    """Names of any kind; nothing that was not compared goes."""
    for name in ("one", "sub/two words", "sub/#3 ü"):
        put(copying, f"tree/{name}", name.encode())
    asked = commands(monkeypatch)
    copying.rename("tree", "to/tree")
    wanted = {f"to/tree/{name}": name.encode() for name in ("one", "sub/two words", "sub/#3 ü")}
    assert contents(copying) == wanted
    assert asked.count("operations/deletefile") == 3 and "sync/move" not in asked


@pytest.mark.parametrize("what", ["file", "tree"])
def test_a_copy_that_is_other_bytes_costs_the_source_nothing(copying, monkeypatch, what):
    """Something else got to the new place meanwhile: an error, and the source stays."""
    put(copying, "tree/x", b"payload")
    call = Daemon.call

    def interfere(self, command, parameters):
        found = call(self, command, parameters)
        if command in ("operations/copyfile", "sync/copy"):
            copying.remove("to/x")
            copying._upload("to", "x", io.BytesIO(b"PAYLOAD"), 7)
        return found

    monkeypatch.setattr(Daemon, "call", interfere)
    pair = ("tree/x", "to/x") if what == "file" else ("tree", "to")
    with pytest.raises(StorageUnavailableError, match="after a copy"):
        copying.rename(*pair)
    assert get(copying, "tree/x") == b"payload"
