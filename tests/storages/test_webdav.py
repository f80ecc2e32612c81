"""What a WebDAV storage promises beyond the contract of all, on real servers."""

import io
import signal
import socket
import subprocess
import threading
import time
import uuid
from dataclasses import replace
from hashlib import sha256

import pytest

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.open import open_storage
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind
from tests.backends import open_dav
from tests.payloads import get, put
from tests.servers import USER, answering, wsgidav_server


@pytest.fixture
def dav(wsgidav):
    return open_dav(wsgidav)


def calls(storage):
    """Every call of the port that asks the server."""
    return [
        lambda: storage.stat("x"),
        lambda: storage.stat_many([f"{n}" for n in range(20)]),
        lambda: list(storage.walk()),
        lambda: storage.open_read("x"),
        lambda: storage.read_back("x"),
        lambda: storage.rename("x", "y"),
        lambda: storage.remove("x"),
        lambda: put(storage, "x"),
        lambda: put(storage, ".dlm/tmp/0/x"),
        storage.usage,
        storage.check,
    ]


def test_an_unreachable_server_is_an_outage_within_seconds():
    """A closed port: no call waits long, none says that nothing is there."""
    storage = open_storage("dead", "webdav", "http://127.0.0.1:9/x", {})
    for call in calls(storage):
        begun = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            call()
        assert time.monotonic() - begun < 20


def test_a_root_that_is_not_there_is_an_outage(wsgidav):
    """It says nothing of what was in it."""
    storage = open_storage("gone", "webdav", f"{wsgidav.url}/no-such", wsgidav.config)
    for call in calls(storage)[:9]:
        with pytest.raises(StorageUnavailableError):
            call()


def test_a_wrong_password_is_denied_and_not_shown(wsgidav, monkeypatch):
    """By every call."""
    monkeypatch.setenv("DLM_TEST_WRONG", "not-the-secret")
    config = {"user": USER, "password": "env:DLM_TEST_WRONG"}
    storage = open_storage("wrong", "webdav", wsgidav.url, config)
    for call in calls(storage):
        with pytest.raises(AccessDeniedError) as caught:
            call()
        assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "http://u:hunter2@host/x", "https:///x", "http://h/x?token=hunter2", "x"]
)
def test_a_root_that_is_no_plain_url_is_refused(url):
    """And not shown, for there may be a password in it."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", "webdav", url, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("config", [{"user": USER}, {"password": "env:HOME"}])
def test_a_user_has_a_password(config):
    """One without the other is a slip, and told before a server denies it."""
    for interface in ("webdav", "http"):
        with pytest.raises(InvalidValueError, match="go together"):
            open_storage("x", interface, "http://127.0.0.1:9/x", config)


@pytest.mark.parametrize(
    "name", ["new\nline", "\x7f", "back\\slash", "no utf-8 \udcff", "a?b", "a;b"]
)
def test_names_that_not_every_server_keeps_are_refused(dav, name):
    """Before anything is made; a move to such a name too."""
    put(dav, "x")
    for call in (lambda: put(dav, name), lambda: dav.rename("x", name)):
        with pytest.raises(PathRefusedError):
            call()
    assert [entry.path for entry in dav.walk()] == ["x"]


def test_what_appeared_while_it_was_written_stays(dav):
    """The MOVE that would show it is refused by the server, not by a look before."""

    class Rival(io.BytesIO):
        def read(self, size=-1):
            if not dav._look("x"):
                put(dav, "x", b"theirs")
            return super().read(size)

    with pytest.raises(PayloadExistsError):
        dav.write("x", Rival(b"ours"), 4)
    assert get(dav, "x") == b"theirs" and [e.path for e in dav.walk(".dlm")] == []


def test_a_redirect_is_not_followed_with_the_password(monkeypatch):
    """Another server is asked nothing, and told nothing."""
    monkeypatch.setenv("DLM_TEST_DAV", "hunter2")
    config = {"user": USER, "password": "env:DLM_TEST_DAV"}
    with answering(200) as (other, heard), answering(302, {"Location": f"{other}/x"}) as (url, _):
        storage = open_storage("x", "webdav", url, config)
        for call in calls(storage):
            with pytest.raises(StorageUnavailableError):
                call()
        assert heard == []


def test_a_redirect_to_what_is_no_url_is_an_outage():
    """As one to elsewhere is."""
    with answering(301, {"Location": "http://[bad"}) as (url, _):
        for call in calls(open_storage("x", "webdav", url, {})):
            with pytest.raises(StorageUnavailableError):
                call()


LIES = {
    "leaves the root": "<d:href>/elsewhere</d:href>",
    "something else": (
        "<d:href>/root/another</d:href><d:propstat><d:prop><d:resourcetype/></d:prop></d:propstat>"
    ),
    "cannot be understood": "<d:href>/root</d:href><d:broken",
}


@pytest.mark.parametrize("words", LIES)
def test_an_answer_about_something_else_is_an_outage(words):
    """What is not about the path that was asked for says nothing of it."""
    body = (
        f'<?xml version="1.0"?><d:multistatus xmlns:d="DAV:"><d:response>{LIES[words]}'
        "</d:response></d:multistatus>"
    )
    with answering(207, body=body.encode()) as (url, _):
        storage = open_storage("liar", "webdav", f"{url}/root", {})
        with pytest.raises(StorageUnavailableError, match=words):
            storage.stat("x")


_FOLDER = (
    "<d:propstat><d:prop><d:resourcetype><d:collection/></d:resourcetype></d:prop>"
    "<d:status>HTTP/1.1 200 OK</d:status></d:propstat>"
)
PARTIAL = {
    "cut short (RFC 5323)": "<d:href>/root/</d:href><d:status>HTTP/1.1 507 Full</d:status>",
    "a member is not told of": "<d:href>/root/x</d:href><d:status>HTTP/1.1 403 No</d:status>",
    "a member's kind is not told": (
        "<d:href>/root/x</d:href><d:propstat><d:prop><d:resourcetype/><d:getcontentlength/>"
        "</d:prop><d:status>HTTP/1.1 403 No</d:status></d:propstat>"
    ),
}


@pytest.mark.parametrize("words", PARTIAL)
def test_a_listing_that_says_that_it_is_partial_is_an_outage(words):
    """What a payload has would be forgotten, or a folder be taken for an empty file."""
    top = f"<d:response><d:href>/root/</d:href>{_FOLDER}</d:response>"
    part = f"<d:response>{PARTIAL[words]}</d:response>"
    body = f'<?xml version="1.0"?><d:multistatus xmlns:d="DAV:">{top}{part}</d:multistatus>'
    with answering(207, body=body.encode()) as (url, _):
        storage = open_storage("liar", "webdav", f"{url}/root", {})
        with pytest.raises(StorageUnavailableError):
            list(storage.walk())


@pytest.mark.parametrize(
    ("status", "error"),
    [(507, StorageFullError), (403, AccessDeniedError), (503, StorageUnavailableError)],
)
def test_a_status_is_told_in_the_words_of_the_port(status, error):
    """Whatever is asked."""
    with answering(status) as (url, _):
        storage = open_storage("x", "webdav", url, {})
        with pytest.raises(error):
            put(storage, ".dlm/tmp/0/x")
        with pytest.raises(error):
            storage.remove("x")


def test_an_answer_that_breaks_off_is_no_short_file():
    """Fewer bytes than were told: an outage, not the end of the file."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with open_storage("x", "webdav", url, {}).read_back("x") as stream:
            assert stream.read(5) == b"short"
            with pytest.raises(StorageUnavailableError):
                stream.read(5)


@pytest.mark.parametrize("secret", ["two\nlines", "n\u00f6-ascii"])
def test_a_token_that_cannot_stand_in_a_header_is_refused_and_not_shown(monkeypatch, secret):
    """In our words, instead of those of the HTTP client, which repeat it."""
    monkeypatch.setenv("DLM_TEST_TOKEN", secret)
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", "webdav", "http://127.0.0.1:9", {"token": "env:DLM_TEST_TOKEN"})
    assert secret not in str(caught.value) and "DLM_TEST_TOKEN" in str(caught.value)


def test_a_rotated_password_is_found_without_reopening(tmp_path):
    """The storage is the same object before and after."""
    with wsgidav_server(tmp_path) as server:
        storage = open_dav(server)
        put(storage, "x")
        server.stop()
        config = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(config.replace(server.password, "another-one"))
        server.start()
        with pytest.raises(AccessDeniedError):
            storage.stat("x")
        (tmp_path / "password").write_text("another-one\n")
        time.sleep(1.1)
        assert get(storage, "x") == b"payload"


def task(source, path, data):
    put(source, path, data)
    return CopyTask(
        uuid.uuid4(), path, path, PayloadKind.FILE, len(data),
        f"sha256:{sha256(data).hexdigest()}", (), uuid.uuid4().hex,
    )  # fmt: skip


class LoginPage:
    """Between us and the server: answers to one method with a page of its own, and 200."""

    def __init__(self, storage, method, url):
        self.wire, self.method = storage._wire, method
        self.page = open_storage("page", "webdav", url, {})._wire
        storage._wire = self

    def ask(self, method, *rest):
        return (self.page if method == self.method else self.wire).ask(method, *rest)

    def __getattr__(self, name):
        return getattr(self.wire, name)


def test_a_copy_that_was_not_moved_into_place_is_no_copy(dav, tmp_path):
    """A gateway answers with a page to log in, and 200: that is no word of the server."""
    (tmp_path / "in").mkdir()
    source = open_storage("in", "posix", str(tmp_path / "in"), {})
    with answering(200, {"Content-Type": "text/html"}, b"<html>Who are you?</html>") as told:
        gateway = LoginPage(dav, "MOVE", told[0])
        (result,) = copy_batch(source, dav, [task(source, "f/x", b"good bytes")])
        assert result.error.code == "DLM-301" and list(dav.walk()) == []
        put_aside = [lambda: dav.rename("z", ".dlm/trash/z"), lambda: put(dav, "y")]
        gateway.method = ""
        put(dav, "z")
        gateway.method = "MOVE"
        for call in put_aside:
            with pytest.raises(StorageUnavailableError):
                call()
    assert [entry.path for entry in dav.walk()] == ["z"]


def test_a_server_killed_in_a_copy_and_back(tmp_path):
    """Nothing shows meanwhile; afterwards the same payloads come through, and are whole."""
    (tmp_path / "in").mkdir()
    source = open_storage("in", "posix", str(tmp_path / "in"), {})
    data = {f"f/{n}": bytes([n]) * (6 << 20) for n in range(8)}
    tasks = [task(source, path, content) for path, content in data.items()]
    with wsgidav_server(tmp_path / "dav") as server:
        storage = open_dav(server)
        killed, lock = threading.Event(), threading.Lock()

        def kill(_):
            with lock:  # nobody goes on before it is dead
                if not killed.is_set():
                    server.stop(signal.SIGKILL)
                    killed.set()

        first = list(copy_batch(source, storage, tasks, progress=kill))
        assert killed.is_set() and {one.error.code for one in first} == {"DLM-301"}
        server.start()
        assert list(storage.walk()) == []
        # each try has names of its own: what the dead server kept half of is in nobody's way
        afresh = [replace(task, token=uuid.uuid4().hex) for task in tasks]
        again = list(copy_batch(source, storage, afresh))
        assert [one.error for one in again] == [None] * 8
        assert {entry.path: get(storage, entry.path) for entry in storage.walk()} == data


def test_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path):
    """A server on a file system of one megabyte."""
    small = tmp_path / "dav" / "root"
    with wsgidav_server(tmp_path / "dav") as server:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip("mounting is not permitted here")
        try:
            storage = open_storage("small", "webdav", server.url, server.config)
            with pytest.raises(StorageFullError):
                put(storage, "x", bytes(3 << 20))
            assert list(storage.walk()) == [] and list(storage.walk(".dlm")) == []
        finally:
            subprocess.run(["umount", "-l", str(small)], check=True)
