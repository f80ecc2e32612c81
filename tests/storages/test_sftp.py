"""What an SFTP storage promises beyond the contract of all, on a real OpenSSH server."""

import asyncio
import hashlib
import io
import logging
import os
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dlm_core.errors import (
    AccessDeniedError,
    DlmError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages import sftp_clone, ssh
from dlm_core.storages.open import open_storage
from tests.payloads import put
from tests.sshd import SshServer, make_key, ssh_server

ODD = ("new\nline", "back\\slash", "tab\t", "not utf-8 \udcff", "-rf", "$(true)", "a" * 255)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def far(sshd, root):
    return at(sshd, root)


@pytest.fixture
def own(tmp_path):
    """A server that a test may stop and change."""
    with ssh_server(tmp_path / "own") as server:
        yield server


def at(server: SshServer, root: Path, **config: object):
    return open_storage("far", "sftp", server.root(root), server.config(**config))


def calls(storage):
    """Every call of the port that asks the server."""
    return [
        lambda: storage.stat("x"),
        lambda: storage.stat_many(["x", "y"]),
        lambda: list(storage.walk()),
        lambda: storage.open_read("x"),
        lambda: put(storage, "x"),
        lambda: put(storage, "x", bytes(2 << 20)),
        lambda: storage.rename("x", "y"),
        lambda: storage.remove("x"),
        storage.usage,
        storage.check,
    ]


# --- getting in ------------------------------------------------------------------------------


def test_a_changed_host_key_is_refused(own, root):
    """In one line that says so; a host of which no key is given is refused as well."""
    make_key(root / "other")
    kind, key = (root / "other.pub").read_text().split()[:2]
    for line in (f"[127.0.0.1]:{own.port} {kind} {key}", f"elsewhere.example {kind} {key}"):
        storage = at(own, root, host_keys=line)
        for call in calls(storage):
            with pytest.raises(StorageUnavailableError, match=r"host key of .* refused") as caught:
                call()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["", " ", "h", "# h", "h ssh-ed25519", "h ssh-ed25519 xx", "@cert-authority h xx", "h xx"],
)
def test_a_host_key_that_is_none_is_refused(own, root, line):
    """When the storage is opened; among others in a file one that cannot be read is no matter."""
    with pytest.raises(InvalidValueError, match="ssh-keyscan"):
        at(own, root, host_keys=line)
    if "h" in line[:1]:
        at(own, root, host_keys=f"other ssh-new AAAA\n{own.host_keys}")


def test_host_keys_may_be_in_a_file(own, root, tmp_path):
    """It is read at each connect, so that a key can be rolled over; without keys none is opened."""
    known = tmp_path / "known"
    with pytest.raises(InvalidValueError, match="ssh-keyscan"):
        at(own, root, host_keys=str(known))
    known.write_text(own.host_keys)
    assert at(own, root, host_keys=str(known)).check() is None
    config = {"key": f"env:{own.key_name}"}
    with pytest.raises(InvalidValueError, match="host_keys"):
        open_storage("far", "sftp", own.root(root), config)


def test_a_wrong_key_or_password_is_denied(sshd, root, monkeypatch, tmp_path):
    """By every call; nothing of the secret is shown."""
    make_key(tmp_path / "other")
    monkeypatch.setenv("DLM_TEST_WRONG", (tmp_path / "other").read_text())
    monkeypatch.setenv("DLM_TEST_GARBAGE", "-----BEGIN hunter2hunter2")
    monkeypatch.setenv("DLM_TEST_PASSWORD", "hunter2hunter2")
    wrong = (
        {"key": "env:DLM_TEST_WRONG"},
        {"key": "env:DLM_TEST_GARBAGE"},
        {"key": None, "password": "env:DLM_TEST_PASSWORD"},
    )
    for config in wrong:
        storage = at(sshd, root, **config)
        for call in calls(storage)[:2]:
            with pytest.raises(AccessDeniedError) as caught:
                call()
            assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_locked_key_is_opened_with_its_passphrase(sshd, root, tmp_path, monkeypatch):
    """Which is a secret of its own."""
    locked = tmp_path / "locked"
    locked.write_bytes((sshd.folder / "user").read_bytes())
    locked.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", str(locked)], check=True)
    monkeypatch.setenv("DLM_TEST_PASSPHRASE", "open sesame")
    key = {"key": f"file:{locked}"}
    assert at(sshd, root, **key, passphrase="env:DLM_TEST_PASSPHRASE").check() is None
    with pytest.raises(AccessDeniedError, match="passphrase"):
        at(sshd, root, **key).check()


def test_a_rotated_key_is_found_at_the_next_connect(own, root, tmp_path):
    """The old one is not kept; no restart is needed."""
    key = tmp_path / "key"
    key.write_text((own.folder / "user").read_text())
    storage = at(own, root, key=f"file:{key}")
    storage.check()
    own.stop()
    make_key(own.folder / "user")
    own.start()
    with pytest.raises(AccessDeniedError):
        storage.check()
    key.write_text((own.folder / "user").read_text())
    assert storage.check() is None


@pytest.mark.parametrize(
    "root", ["host/path", "me@host", "me@host:x/path", "me:hunter2@host:22/path", "me@host:0/path"]
)
def test_a_root_of_another_form_is_refused(root):
    """A password that somebody put into it is not shown."""
    with pytest.raises(InvalidValueError, match="user@host:port/absolute") as caught:
        open_storage("far", "sftp", root, {"host_keys": "host ssh-ed25519 AA", "key": "env:K"})
    assert "hunter2" not in str(caught.value)


def test_no_secret_is_shown(sshd, root, caplog, monkeypatch):
    """Not in the log at its most talkative, not among the processes, not in any object's repr."""
    secret = os.environ[sshd.key_name].splitlines()[3]
    caplog.set_level(logging.DEBUG)
    storage = at(sshd, root, shell=True)
    told = ""
    for call in calls(storage):
        try:
            call()
        except DlmError as error:
            told += str(error)
    assert secret not in told + caplog.text
    assert secret not in repr(vars(storage)) + repr(vars(storage.connections))
    lines = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert not any(secret in line for line in lines)


# --- losing the connection -------------------------------------------------------------------


def test_a_server_that_is_gone_is_an_outage(own, root):
    """Within seconds, by every call; when it is back the same storage works again."""
    storage = at(own, root)
    put(storage, "kept")
    own.stop()
    for call in calls(storage):
        begun = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            call()
        assert time.monotonic() - begun < 20
    own.start()
    assert storage.stat("kept").size == 7


def test_a_machine_that_says_nothing_is_waited_for_once(sshd, root, monkeypatch):
    """By all who ask at that time together, not by each after the other."""
    monkeypatch.setattr(ssh, "_LOGIN_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        config = sshd.config(host_keys=sshd.host_keys.replace(str(sshd.port), str(port)))
        storage = open_storage("far", "sftp", f"me@127.0.0.1:{port}{root}", config)
        begun, outages = time.monotonic(), []

        def ask():
            with pytest.raises(StorageUnavailableError) as caught:
                storage.stat("x")
            outages.append(caught.value)

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outages) == 16 and time.monotonic() - begun < 24


def test_a_root_that_is_gone_is_an_outage(far, root):
    """As on disk: it says nothing of what was in it."""
    put(far, "x")
    root.rename(root.with_name("elsewhere"))
    for call in calls(far):
        with pytest.raises(StorageUnavailableError, match="root"):
            call()


def test_a_machine_that_takes_no_more_connections_is_used_over_those_there_are(own, root):
    """Eight large files at once when it stops listening after the first connection."""
    storage = at(own, root, connections=4)
    storage.check()
    own_process = own._process
    sessions = own.sessions()
    own.stop(sessions=False)
    try:
        data = os.urandom(3 << 20)
        threads = [threading.Thread(target=put, args=(storage, f"{n}", data)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(root / f"{n}").read_bytes() == data for n in range(8)] == [True] * 8
    finally:
        for process in sessions:
            if process.pid != own_process.pid:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        own.start()


def test_no_more_connections_are_opened_than_allowed(own, root):
    """Whatever the number of threads."""
    storage = at(own, root, connections=2)
    threads = [
        threading.Thread(target=put, args=(storage, f"{n}", bytes(2 << 20))) for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(root.iterdir())) == 16
    ports = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == own.port]
    assert 1 <= len(ports) <= 2


def test_an_upload_that_breaks_off_leaves_nothing(far, root):
    """An error of the source, in the middle of a large file."""

    class Broken(io.RawIOBase):
        left = 3 << 20

        def read(self, size=-1):
            self.left -= size
            if self.left < 0:
                raise ConnectionResetError("gone")
            return bytes(size)

    with pytest.raises(ConnectionResetError):
        far.write("x", Broken(), 9 << 20)
    assert list(root.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------


def test_symbolic_links_lead_nowhere(far, root, tmp_path):
    """Neither as a folder on the way nor as the file; what they point at stays as it is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    put(far, "mine")
    (root / "folder").symlink_to(outside)
    (root / "link").symlink_to(outside / "file")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    refused = (
        lambda: far.stat("folder/file"),
        lambda: far.stat_many(["mine", "folder/file"]),
        lambda: far.open_read("folder/file"),
        lambda: far.open_read("link"),
        lambda: put(far, "folder/new"),
        lambda: put(far, "dangling/new"),
        lambda: far.rename("mine", "folder/mine"),
        lambda: far.rename("folder/file", "stolen"),
        lambda: far.remove("folder/file"),
        lambda: list(far.walk("folder")),
    )
    for call in refused:
        with pytest.raises(PathRefusedError):
            call()
    with pytest.raises(PayloadExistsError):
        put(far, "link")
    assert {entry.path: entry.kind for entry in far.walk()} == {
        "dangling": "symlink", "folder": "symlink", "link": "symlink", "mine": "file",
    }  # fmt: skip
    far.remove("folder")
    assert [file.name for file in outside.iterdir()] == ["file"]


def test_a_tree_with_a_link_in_it_is_removed_without_what_it_points_at(far, root, tmp_path):
    """The link goes, its target stays."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"theirs")
    put(far, "tree/a/b")
    (root / "tree/a/link").symlink_to(tmp_path / "outside")
    far.remove("tree")
    assert list(root.iterdir()) == [] and (tmp_path / "outside/file").exists()


def test_a_file_where_a_folder_is_wanted_is_told(far):
    """And is not taken for something absent."""
    put(far, "x")
    with pytest.raises(PathRefusedError, match="folder"):
        put(far, "x/y")
    assert far.stat("x/y") is None


def test_special_files_are_not_read(far, root):
    """A fifo would keep the server waiting for somebody who writes."""
    os.mkfifo(root / "fifo")
    with pytest.raises(PathRefusedError):
        far.open_read("fifo")
    assert far.stat("fifo").kind == "other"


def test_a_server_that_lets_nobody_write_says_so(own, root):
    """Permission that was lost while we were connected: denied, and nothing is there."""
    storage = at(own, root)
    put(storage, "kept")
    own.stop()
    with (own.folder / "config").open("a") as file:
        file.write("ForceCommand internal-sftp -R\n")
    own.start()
    for call in (
        lambda: put(storage, "new"),
        lambda: put(storage, "large", bytes(2 << 20)),
        lambda: storage.rename("kept", "moved"),
        lambda: storage.remove("kept"),
    ):
        with pytest.raises(AccessDeniedError):
            call()
    assert [entry.path for entry in storage.walk()] == ["kept"]


def test_a_full_disk_is_told_as_such(sshd, root):
    """Small and large files: told as full, nothing half-written stays, and it can be read."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(root)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only who may mount can have a small disk")
    try:
        storage = at(sshd, root)
        put(storage, "kept")
        for size in (5 << 20, 50 << 20):
            with pytest.raises(StorageFullError):
                put(storage, "large", bytes(size))
        for n in range(5):
            put(storage, f"small-{n}", bytes(500_000))
        with pytest.raises(StorageFullError):
            put(storage, "one too many", bytes(700_000))
        usage = storage.usage()
        assert usage.total == 3 << 20 and 2_500_000 < usage.used <= usage.total
        assert storage.stat("large") is None and storage.stat("kept").size == 7
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


# --- names, digests --------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [False, True])
def test_any_name_that_the_far_side_takes(sshd, root, shell):
    """Is written, listed, read, told a digest of, renamed and removed as what it is."""
    storage = at(sshd, root, shell=shell)
    for name in ODD:
        put(storage, f"d/{name}", os.fsencode(name))
    assert {entry.path for entry in storage.walk()} == {f"d/{name}" for name in ODD}
    told = storage.digest_many([f"d/{name}" for name in ODD])
    wanted = {f"d/{n}": "sha256:" + hashlib.sha256(os.fsencode(n)).hexdigest() for n in ODD}
    assert told == (wanted if shell else {})
    asked = [(f"d/{name}", len(os.fsencode(name))) for name in ODD]
    assert storage.read_many(asked) == {f"d/{name}": os.fsencode(name) for name in ODD}
    for name in ODD:
        with storage.open_read(f"d/{name}") as stream:
            assert stream.read() == os.fsencode(name)
        storage.rename(f"d/{name}", f"e/{name}")
        storage.remove(f"e/{name}")
    assert list(storage.walk()) == []


@pytest.mark.parametrize("name", ["a" * 256, "nul\0"])
def test_names_that_no_file_can_have_are_refused(far, name):
    """As on disk."""
    with pytest.raises(PathRefusedError):
        put(far, name)


def test_of_what_is_not_there_no_digest_is_told(sshd, root):
    """The others' are."""
    storage = at(sshd, root, shell=True)
    put(storage, "x", b"")
    assert storage.digest_many(["nothing", "x"]) == {
        "x": "sha256:" + hashlib.sha256(b"").hexdigest()
    }
    assert storage.digest_many([]) == {}


def test_a_shell_that_is_promised_and_not_there_is_noticed(own, root):
    """A check says what to set; no digest is believed."""
    own.stop()
    with (own.folder / "config").open("a") as file:
        file.write("ForceCommand internal-sftp\n")
    own.start()
    storage = at(own, root, shell=True)
    with pytest.raises(StorageUnavailableError, match="shell=false"):
        storage.check()
    put(storage, "x")
    assert storage.digest_many(["x"]) == {}
    with pytest.raises(StorageUnavailableError, match="shell=false"):
        storage.flush()
    assert at(own, root).check() is None


@pytest.mark.parametrize("sessions", [2, 3])
def test_a_machine_that_lets_few_commands_run_at_once_gets_no_more(tmp_path, root, sessions):
    """Each over a connection is a session, as the files are: of more than it lets none fails."""
    with ssh_server(tmp_path / "own", f"MaxSessions {sessions}\n") as server:
        storage = at(server, root, shell="true", connections=1)

        def work(n):
            for step in range(4):
                put(storage, f"{n}/{step}")
                storage.flush()
                told = storage.digest_many([f"{n}/{step}"], threading.Event())
                assert told == {f"{n}/{step}": f"sha256:{hashlib.sha256(b'payload').hexdigest()}"}

        storage.stat("x")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def test_a_machine_that_lets_no_command_run_beside_the_files_says_so(tmp_path, root):
    """What is to be done about it, and no outage of the machine."""
    with ssh_server(tmp_path / "own", "MaxSessions 1\n") as server:
        with pytest.raises(StorageUnavailableError, match="say shell=false"):
            at(server, root, shell="true").check()
        at(server, root).check()


def test_a_hashing_that_is_stopped_ends(sshd, root):
    """Soon, and tells nothing."""
    storage = at(sshd, root, shell=True)
    with (root / "big").open("wb") as file:
        file.truncate(8 << 30)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    begun = time.monotonic()
    assert storage.digest_many(["big"], stop) == {}
    assert time.monotonic() - begun < 30


# --- durability, copies of its own ------------------------------------------------------------


def test_of_two_flushes_none_ends_before_what_the_other_took(sshd, root, monkeypatch):
    """Without a shell: a folder that one flush has begun to make durable is not durable yet, and if
    that fails the other one is told so as well."""
    storage = at(sshd, root)
    put(storage, "folder/x")
    begun, go_on, tried = threading.Event(), threading.Event(), []

    async def fails(_session, folders):
        tried.append(set(folders))
        if len(tried) == 1:
            begun.set()
            await asyncio.to_thread(go_on.wait, 60)
        raise StorageUnavailableError(storage="far", message="the medium is gone")

    monkeypatch.setattr(storage, "_sync_folders", fails)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(storage.flush)
        assert begun.wait(60)
        second = pool.submit(storage.flush)
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        for flush in (first, second):
            with pytest.raises(StorageUnavailableError):
                flush.result(60)
    assert tried[0] == tried[1] >= {"folder"}


@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize("copy_data", [False, True])
def test_a_file_is_cloned_on_the_far_side(tmp_path, monkeypatch, shell, copy_data):
    """In pieces, so that it can be stopped: exactly the bytes that are asked for, of a file that
    may have grown. Where neither the server nor a command can, nothing is left; so it is if the
    file has fewer, the name is taken, or it is stopped in between."""
    monkeypatch.setattr(sftp_clone, "CHUNK", 1 << 20)
    data, size = os.urandom((4 << 20) + 77), (3 << 20) + 5
    sftp = "internal-sftp" + ("" if copy_data else " -P copy-data")
    with ssh_server(tmp_path / "sshd", sftp=sftp) as server:
        (tmp_path / "it's a \n root").mkdir()
        root = server.root(tmp_path / "it's a \n root")
        far = open_storage("far", "sftp", root, server.config(shell=shell))
        put(far, "a b", data)
        told: list[int] = []
        done = far.copy_from(far, "a b", "new/c\n'd", size, told.append)
        assert done == (shell or copy_data)
        if not done:
            assert far.stat("new/c\n'd") is None and not told
            return
        assert told == [1 << 20] * 3 + [5]
        with far.open_read("new/c\n'd") as stream:
            assert stream.read() == data[:size]
        with pytest.raises(PayloadExistsError):
            far.copy_from(far, "a b", "new/c\n'd", size, told.append)
        assert not far.copy_from(far, "a b", "e", len(data) + 1, told.append)

        def stop(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            far.copy_from(far, "a b", "e", size, stop)
        assert far.stat("e") is None


def test_a_file_of_another_storage_is_cloned_if_the_same_key_opens_both(own, tmp_path, monkeypatch):
    """Through one connection; links on the way to it are refused, and it is told whose it is that
    is not there. Another key may be good for other folders."""
    for name in ("one", "other", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "y").write_bytes(b"y" * 9)
    (tmp_path / "one" / "link").symlink_to(tmp_path / "outside")
    one, other = at(own, tmp_path / "one"), at(own, tmp_path / "other", shell=True, connections=1)
    put(one, "x", b"x" * 9)
    assert other.copy_from(one, "x", "new/x", 9, lambda _: None)
    with other.open_read("new/x") as stream:
        assert stream.read() == b"x" * 9
    with pytest.raises(PathRefusedError, match="storage far refuses"):
        other.copy_from(one, "link/y", "y", 9, lambda _: None)
    with pytest.raises(PayloadNotFoundError):
        other.copy_from(one, "nothing", "y", 9, lambda _: None)
    monkeypatch.setenv("ANOTHER_KEY", os.environ[own.key_name])
    stranger = at(own, tmp_path / "one", key="env:ANOTHER_KEY")
    assert not other.copy_from(stranger, "x", "z", 9, lambda _: None)
    assert sorted(entry.path for entry in other.walk()) == ["new/x"]


def test_a_copy_to_a_name_that_is_taken_leaves_nothing_open(own, root):
    """The source is opened first."""
    far = at(own, root, connections=1)
    for name in ("x", "taken"):
        put(far, name)

    def open_there():
        found = {}
        for process in own.sessions():
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = process.num_fds()
        return found

    before = open_there()  # a session that is about to end may be among them
    for _ in range(10):
        with pytest.raises(PayloadExistsError):
            far.copy_from(far, "x", "taken", 7, lambda _: None)
    assert all(count <= before.get(pid, 0) for pid, count in open_there().items())
