"""What becomes visible by one call of rclone's: each file ends as if it had been the only one."""

import threading
import uuid
from hashlib import sha256

import pytest

from dlm_core.errors import PayloadExistsError, PayloadNotFoundError, StorageUnavailableError
from dlm_core.storages.open import open_storage
from dlm_core.storages.rclone_daemon import Daemon, RcloneError, daemon
from dlm_core.storages.rclone_many import move_groups
from dlm_core.storages.wire import WireError
from dlm_core.transfers import tasks
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.throttle import Pace, paced
from dlm_core.types import PayloadKind
from tests.backends import open_dav_by_rclone, open_memory_by_rclone
from tests.payloads import contents, get, put

NAMES = [f"{folder}/{n}" for folder in "ab" for n in range(4)]


@pytest.fixture(params=["local", "webdav"])
def remote(request, tmp_path):
    """A folder, and a server whose MOVE replaces what is there when rclone asks for it."""
    if request.param == "webdav":
        return open_dav_by_rclone(request.getfixturevalue("wsgidav"))
    (tmp_path / "out").mkdir()
    return open_storage("out", "rclone", str(tmp_path / "out"), {"type": "local"})


@pytest.fixture
def written(remote):
    """Files below a temporary folder, and where they are to go."""
    for name in NAMES:
        put(remote, f".dlm/tmp/b/{name}", name.encode())
    return [(f".dlm/tmp/b/{name}", f"to/{name}") for name in NAMES]


def calls(monkeypatch, change=None):
    """The names of what the daemon is asked for from now on; ``change`` stands before it."""
    asked, real = [], Daemon.call

    def call(self, command, parameters):
        asked.append(command)
        return (change or real)(self, command, parameters)

    monkeypatch.setattr(Daemon, "call", call)
    return asked


def moving(what):
    """A change of ``sync/move`` only, which is told how to make the real call."""
    real = Daemon.call

    def change(self, command, parameters):
        if command != "sync/move":
            return real(self, command, parameters)
        return what(lambda: real(self, command, parameters), parameters)

    return change


def all_of(names=NAMES):
    return {f"to/{name}": name.encode() for name in names}


def test_many_move_in_one_call(remote, written, monkeypatch):
    """To folders that are not there without a look for each, nor a call for each."""
    looks, look = [], Daemon.look
    monkeypatch.setattr(Daemon, "look", lambda *a: looks.append(a[2]) or look(*a))
    asked = calls(monkeypatch)
    assert remote.rename_many(written) == [None] * 8
    assert asked.count("sync/move") == 1 and "operations/movefile" not in asked
    assert looks == ["to/a", "to/b"]
    assert contents(remote) == all_of() and list(remote.walk(".dlm/tmp")) == []


def test_what_is_there_already_stays(remote, written, monkeypatch):
    """A listing that leaves it out costs it nothing: each is asked for by name. The others move."""
    put(remote, "to/a/1", b"theirs")
    put(remote, "to/b/2/folder", b"theirs")
    look = remote._list
    partial = {"to/a", "to/b"}
    monkeypatch.setattr(remote, "_list", lambda f: [] if f in partial else look(f))
    errors = dict(zip(NAMES, remote.rename_many(written), strict=True))
    assert isinstance(errors.pop("a/1"), PayloadExistsError)
    assert isinstance(errors.pop("b/2"), PayloadExistsError)
    assert set(errors.values()) == {None}
    monkeypatch.undo()
    left = {"a/1", "b/2"}
    wanted = all_of(set(NAMES) - left) | {"to/a/1": b"theirs", "to/b/2/folder": b"theirs"}
    assert contents(remote) == wanted
    assert {get(remote, f".dlm/tmp/b/{name}") for name in left} == {b"a/1", b"b/2"}


def test_a_source_that_went_is_told_of_alone(remote, written, monkeypatch):
    """After the look and before the move; rclone passes over what it does not find."""

    def lose(call, _):
        remote.remove(".dlm/tmp/b/a/3")
        return call()

    calls(monkeypatch, moving(lose))
    errors = dict(zip(NAMES, remote.rename_many(written), strict=True))
    assert isinstance(errors.pop("a/3"), PayloadNotFoundError) and set(errors.values()) == {None}
    assert contents(remote) == all_of(set(NAMES) - {"a/3"})


@pytest.mark.parametrize("error", [RcloneError("not all of it", 500), WireError("gone"), None])
def test_a_call_that_moved_some_is_not_believed_about_the_others(
    remote, written, monkeypatch, error
):
    """Whether it fails, breaks off or says that all is well: each is looked at by name, and what
    was not moved is moved by itself."""

    def some(call, parameters):
        with open(parameters["_filter"]["FilesFromRaw"][0], "r+", encoding="utf-8") as file:
            names = file.readlines()
            file.seek(0)
            file.truncate()
            file.writelines(names[:3])
        told = call()
        if error is not None:
            raise error
        return told

    asked = calls(monkeypatch, moving(some))
    assert remote.rename_many(written) == [None] * 8
    assert asked.count("operations/movefile") == 5
    assert contents(remote) == all_of()


def test_a_count_is_not_believed_where_a_file_is_still_there(remote, written, monkeypatch):
    """rclone says that it moved all and did not: what the old folder still has moves alone."""
    real = Daemon.call

    def lie(self, command, parameters):
        told = {"sync/move": {}, "core/stats": {"renames": 8, "errors": 0}}
        return told[command] if command in told else real(self, command, parameters)

    asked = calls(monkeypatch, lie)
    assert remote.rename_many(written) == [None] * 8
    assert asked.count("operations/movefile") == 8 and contents(remote) == all_of()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_daemon_that_dies_in_the_middle(remote, written, monkeypatch, when):
    """The next one is asked what became of each; nothing is lost, nothing is said twice."""

    def die(call, _):
        process = daemon().process
        if when == "after":
            call()
        process.kill()
        process.wait(60)
        return call()

    asked = calls(monkeypatch, moving(die))
    assert remote.rename_many(written) == [None] * 8
    assert contents(remote) == all_of()
    assert asked.count("operations/movefile") == (8 if when == "before" else 0)


def test_an_outage_is_told_of_each(remote, written, monkeypatch):
    """Nothing is said to be missing or done."""

    def down(*_):
        raise WireError("no answer")

    monkeypatch.setattr(Daemon, "call", down)
    monkeypatch.setattr(Daemon, "look", down)
    errors = remote.rename_many(written)
    assert {type(error) for error in errors} == {StorageUnavailableError}
    monkeypatch.undo()
    assert contents(remote) == {}


def test_one_of_a_batch_meets_another_file(remote, tmp_path):
    """End to end: it fails, what was there stays, the others come through, nothing temporary is
    left."""
    source = open_storage("in", "posix", str(tmp_path), {})
    put(remote, "to/a/1", b"theirs")
    tasks = []
    for name in NAMES:
        put(source, f"in/{name}", name.encode())
        digest = f"sha256:{sha256(name.encode()).hexdigest()}"
        kind, token = PayloadKind.FILE, uuid.uuid4().hex
        one = CopyTask(uuid.uuid4(), f"in/{name}", f"to/{name}", kind, 3, digest, (), token)
        tasks.append(one)
    errors = {one.task.destination_path: one.error for one in copy_batch(source, remote, tasks)}
    assert isinstance(errors.pop("to/a/1"), PayloadExistsError)
    assert set(errors.values()) == {None}
    assert contents(remote) == all_of() | {"to/a/1": b"theirs"}
    assert list(remote.walk(".dlm/tmp")) == []


def test_without_a_move_each_is_copied_and_read_back(monkeypatch):
    """rclone's own move would delete sources unread."""
    storage = open_memory_by_rclone()
    for name in NAMES:
        put(storage, f"from/{name}", name.encode())
    asked = calls(monkeypatch)
    pairs = [(f"from/{name}", f"to/{name}") for name in NAMES]
    assert storage.rename_many(pairs) == [None] * 8
    assert "sync/move" not in asked and asked.count("operations/hashsumfile") == 16
    assert contents(storage) == all_of()


def test_what_moves_together():
    """Files that keep their names below one folder each; what lies in a folder stays together as
    long as there are not too many."""
    pairs = [("t/1/x", "a/x"), ("t/2/x", "b/y"), ("t/1/z", "a/z"), ("t/1/new\nline", "a/new\nline")]
    assert list(move_groups(pairs)) == [("t/1", "a", ["x", "z"])]
    names = [f"{n // 100}/{n:03}" for n in range(600)]
    found = list(move_groups((f"t/b/{name}", name) for name in names))
    assert [(old, new, len(some)) for old, new, some in found] == [("t/b", "", 200)] * 3
    assert [name for _, _, some in found for name in some] == names
    flat = list(move_groups((f"t/{n:03}", f"flat/{n:03}") for n in range(300)))
    assert [len(some) for _, _, some in flat] == [256, 44]


def test_a_limit_that_is_set_meanwhile_reaches_the_next_request(tmp_path, monkeypatch):
    """What goes together cannot be held back, so no more goes together from then on."""
    monkeypatch.setattr(tasks, "_FIRST_FILES", 4)
    monkeypatch.setattr(tasks, "_SUB_BATCH_FILES", 4)
    source, remote = (tmp_path / name for name in ("in", "out"))
    for folder in (source, remote):
        folder.mkdir()
    source = open_storage("in", "posix", str(source), {})
    remote = open_storage("out", "rclone", str(remote), {"type": "local"})
    pace, taken = Pace(None, threading.Event()), []

    def take_many(*rest):
        pace.set(1e9)
        taken.append(rest)
        return type(remote).take_many(remote, *rest)

    monkeypatch.setattr(remote, "take_many", take_many)
    wanted = []
    for n in range(40):
        put(source, f"f/{n}", b"x")
        digest = f"sha256:{sha256(b'x').hexdigest()}"
        wanted.append(
            CopyTask(
                uuid.uuid4(), f"f/{n}", f"to/{n}", PayloadKind.FILE, 1, digest, (),
                uuid.uuid4().hex,
            )
        )  # fmt: skip
    results = list(copy_batch(source, paced(remote, [pace]), wanted))
    assert [result.error for result in results] == [None] * 40
    assert len(taken) <= tasks.AT_ONCE
