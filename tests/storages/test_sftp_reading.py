"""Reading over SFTP: streams, and many small files at once, from a real OpenSSH server."""

import hashlib
import os
import threading
import time
import uuid
from pathlib import Path

import pytest

from dlm_core.errors import (
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages import ssh
from dlm_core.storages.open import open_storage
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind
from tests.payloads import put
from tests.storages.test_sftp import at


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def far(sshd, root):
    return at(sshd, root)


@pytest.mark.parametrize("shell", [False, True])
def test_of_many_that_are_read_at_once_each_is_told_by_itself_what_it_lacks(
    sshd, root, tmp_path, shell
):
    """Gone, grown, shrunk by as much, changed, a link, a pipe: good ones are copied whatever lies
    beside them, and no other bytes are."""
    storage, data = at(sshd, root, shell=shell), {f"{n:02}": os.urandom(1000) for n in range(70)}
    for name, one in data.items():
        put(storage, name, one)
    (root / "00").unlink()
    (root / "10").write_bytes(data["10"] + b"more")
    (root / "11").write_bytes(data["11"][:-4])
    (root / "20").write_bytes(bytes(1000))
    (root / "30").rename(tmp_path / "elsewhere")
    (root / "30").symlink_to(tmp_path / "elsewhere" / "nothing")
    (tmp_path / "copies").mkdir()
    copies = open_storage("copies", "posix", str(tmp_path / "copies"), {})
    tasks = [
        CopyTask(
            uuid.uuid4(), name, name, PayloadKind.FILE, 1000,
            f"sha256:{hashlib.sha256(one).hexdigest()}", (), uuid.uuid4().hex,
        )
        for name, one in data.items()
    ]  # fmt: skip
    results = list(copy_batch(storage, copies, tasks))
    ended = {result.task.source_path: result.error and result.error.code for result in results}
    wrong = {"00": "DLM-303", "10": "DLM-401", "11": "DLM-401", "20": "DLM-401", "30": "DLM-305"}
    assert {name: code for name, code in ended.items() if code} == wrong
    for name in set(data) - set(wrong):
        assert (tmp_path / "copies" / name).read_bytes() == data[name]
    assert {entry.path for entry in copies.walk()} == set(data) - set(wrong)


@pytest.mark.parametrize("shell", [False, True])
def test_many_that_are_read_at_once_are_one_request_for_all(sshd, root, shell):
    """Not a stream for each: that costs several times what the bytes do."""
    storage = at(sshd, root, shell=shell)
    for n in range(5):
        put(storage, f"{n}", bytes([n]) * 300_000)
    storage.open_read = None
    found = storage.read_many([(f"{n}", 300_000) for n in range(5)])
    assert found == {f"{n}": bytes([n]) * 300_000 for n in range(5)}
    assert storage.read_many([]) == {}


@pytest.mark.parametrize("shell", [False, True])
def test_a_pipe_in_a_files_place_holds_nothing_up(sshd, root, shell):
    """cat would wait for somebody to write."""
    storage = at(sshd, root, shell=shell)
    put(storage, "x")
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("x")
    begun = time.monotonic()
    for odd in ("pipe", "link"):
        assert odd not in storage.read_many([("x", 7), (odd, 7)])
    assert storage.read_many([("x", 7)]) == {"x": b"payload"}
    assert time.monotonic() - begun < 30


def test_what_grew_is_not_held_in_memory(sshd, root, monkeypatch):
    """However large it is by now: the far side sends no more than there should be."""
    storage, printed = at(sshd, root, shell=True), []
    for name in "abc":
        put(storage, name, b"x" * 100)
    os.truncate(root / "b", 1 << 40)
    command = ssh.Session.command

    async def watched(session, *arguments):
        answer = await command(session, *arguments)
        printed.append(len(answer[1]))
        return answer

    monkeypatch.setattr(ssh.Session, "command", watched)
    assert storage.read_many([(name, 100) for name in "abc"]) == {}
    assert printed == [301]
    assert storage.read_many([(name, 100) for name in "ac"]) == dict.fromkeys("ac", b"x" * 100)


def test_a_reading_of_many_that_is_stopped_ends(sshd, root):
    """Soon, and gives nothing."""
    storage = at(sshd, root, shell=True)
    with (root / "big").open("wb") as file:
        file.truncate(8 << 30)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    begun = time.monotonic()
    assert storage.read_many([("big", 8 << 30)], stop) == {}
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("size", [100, 5 << 20])
@pytest.mark.parametrize("change", [-50, 50])
def test_a_file_that_changes_while_it_is_read_is_noticed(far, root, size, change):
    """Shorter or longer than it was: what is read and the stamp both tell."""
    (root / "x").write_bytes(bytes(size))
    os.utime(root / "x", (1e9, 1e9))
    with far.open_read("x") as stream:
        os.truncate(root / "x", size + change)
        assert stream.size == size and stream.stamp() != stream.opened
        assert len(stream.read()) >= min(size, size + change)


def test_a_file_that_another_takes_the_place_of_is_noticed(far, root):
    """By the stamp, though the one that was opened is read to its end."""
    put(far, "x", b"first")
    with far.open_read("x") as stream:
        (root / "y").write_bytes(b"second")
        os.replace(root / "y", root / "x")
        assert stream.read() == b"first" and stream.stamp() != stream.opened


def test_reading_what_goes_meanwhile_is_no_wonder(far, root):
    """It was opened, so it is read; then it is not there."""
    (root / "x").write_bytes(bytes(9 << 20))
    with far.open_read("x") as stream:
        (root / "x").unlink()
        assert len(stream.read()) == 9 << 20 and stream.stamp() is None
    with pytest.raises(PayloadNotFoundError):
        far.open_read("x")


def test_a_file_that_cannot_be_read_is_closed_again(sshd):
    """A server has few handles, and a bad disk many such files. (The memory of the server's own
    process is a file that opens, and whose first byte is not there.)"""
    far = at(sshd, Path("/proc/self"), connections=1)
    before = len(list(far.walk("fd")))
    for _ in range(10):
        with pytest.raises(StorageUnavailableError):
            far.open_read("mem")
    assert len(list(far.walk("fd"))) == before
