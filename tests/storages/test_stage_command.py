"""The stager that runs commands: names, answers, faults; and the gate in front of the bytes."""

import errno
import io
import os
import sys
import tempfile
import time
from importlib.metadata import EntryPoint

import pytest

from dlm_core.errors import (
    InvalidValueError,
    NotOnlineError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages import staging
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.open import open_storage
from tests.tape import Tape

ODD = ["a b", "-rf", "quo'te\"$(x)`;", "new\nline", "ünï/星", "\udcff\udcfe.dat", "*"]


#: as of a command that knows of no file yet
NOTHING_ONLINE = {"stage": "command", "stage_command": "true", "online_command": "true"}


@pytest.fixture
def tape(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    return Tape(root, tmp_path / "hsm", "at_once")


def opened(tape, **config):
    return open_storage("tape", "posix", str(tape.root), tape.config(**config))


@pytest.mark.parametrize("by_command", [False, True])
def test_any_name_is_staged_in_one_call(tape, by_command):
    """Paths go through standard input, each ended by a NUL: no name is special."""
    storage = opened(tape, online_command=by_command)
    for name in ODD:
        storage.write(name, io.BytesIO(b"bytes"), 5)
    tape.migrate()
    assert storage.look(ODD) == set()
    for opening in (
        lambda: storage.open_read(ODD[0]),
        lambda: storage.open_read_at(ODD[0], 2),
        lambda: storage.open_range(ODD[0], 2, 1),
    ):
        with pytest.raises(NotOnlineError):
            opening()
    storage.stage(ODD)
    assert tape.calls() == [ODD]
    assert storage.look([*ODD, "gone"]) == set(ODD)
    for name in ODD:
        with storage.open_read(name) as stream:
            assert stream.read() == b"bytes"


def test_many_are_looked_at_in_one_call_and_remembered(tape):
    """After one look for all, opening each asks no command again; what was written is online."""
    storage = opened(tape, online_command=True)
    names = [f"{n}" for n in range(30)]
    for name in names:
        storage.write(name, io.BytesIO(b"x"), 1)
    storage.rename("0", "zero")
    storage.open_read("zero").close()
    assert tape.calls("online") == []
    other = opened(tape, online_command=True)
    assert other.look(names[1:]) == set(names[1:])
    for name in names[1:]:
        other.open_read(name).close()
    assert len(tape.calls("online")) == 1


def test_what_was_just_written_is_online_however_it_was_written(tape):
    """A large file that may be gone on with, and one that the kernel copied, under their new names
    too; what it says that it could not copy is none."""
    storage = open_storage("tape", "posix", str(tape.root), NOTHING_ONLINE)
    storage.write_on("d/x", io.BytesIO(b"bytes"), 0)
    other = open_storage("other", "posix", str(tape.root), {})
    assert storage.copy_from(other, "d/x", "y", 5, lambda _: None)
    for name in ("d/x", "y"):
        storage.rename(name, f"{name}-new")
        storage.open_read(f"{name}-new").close()
    assert not storage.copy_from(other, "d/x-new", "z", 4, lambda _: None)
    other.write("z", io.BytesIO(b"bytes"), 5)
    with pytest.raises(NotOnlineError):
        storage.open_read("z")


def test_many_that_are_renamed_at_once_are_still_online(tape):
    """As those that are renamed one by one; what stayed where it was has no new name."""
    storage = open_storage("tape", "posix", str(tape.root), NOTHING_ONLINE)
    for name in ("x", "y", "there"):
        storage.write(name, io.BytesIO(b"x"), 1)
    moved, refused = storage.rename_many([("x", "d/x"), ("y", "there")])
    assert moved is None and isinstance(refused, PayloadExistsError)
    for name in ("d/x", "y", "there"):
        storage.open_read(name).close()
    open_storage("other", "posix", str(tape.root), {}).write("x", io.BytesIO(b"x"), 1)
    with pytest.raises(NotOnlineError):
        storage.open_read("x")


def test_where_a_rename_reads_many_are_not_renamed_at_once(tape):
    """Each is looked at first."""
    storage = open_storage("tape", "posix", str(tape.root), NOTHING_ONLINE)
    assert ColdStorage(storage.inner, storage.stager, storage.terms).rename_many is not None
    storage.stager.renames_read = True
    cold = ColdStorage(storage.inner, storage.stager, storage.terms)
    assert getattr(cold, "rename_many", None) is None
    cold.write("x", io.BytesIO(b"x"), 1)
    with pytest.raises(NotOnlineError):
        cold.rename("x", "y")


def test_temporary_files_are_read_as_they_are(tape):
    """They are ours, and of this moment: a command need not know of them. Trash may be offline."""
    storage = open_storage("tape", "posix", str(tape.root), NOTHING_ONLINE)
    for name in (".dlm/tmp/l/x", ".dlm/trash/x"):
        open_storage("other", "posix", str(tape.root), {}).write(name, io.BytesIO(b"x"), 1)
    for opening in (storage.open_read, lambda path: storage.open_range(path, 0, 1)):
        opening(".dlm/tmp/l/x").close()
        with pytest.raises(NotOnlineError):
            opening(".dlm/trash/x")


def test_what_is_no_file_is_told_as_ever(tape):
    """Nothing there, a folder, a link: the adapter's own words, and nothing is staged."""
    storage = opened(tape)
    (tape.root / "folder").mkdir()
    os.symlink("/etc/hostname", tape.root / "link")
    with pytest.raises(PayloadNotFoundError):
        storage.open_read("nothing")
    for name in ("folder", "link"):
        with pytest.raises(PathRefusedError):
            storage.open_read(name)


def test_the_medium_may_say_in_which_order_it_is_asked(tape):
    """order_command sorts before calls are cut; what it invents is left out, what it forgets is
    asked for last."""
    script = (
        "import sys; told = sys.stdin.buffer.read().split(b'\\0')[:-1]; "
        "sys.stdout.buffer.write(b'\\0'.join([*told[:0:-1], b'/etc/passwd', told[1], b'']))"
    )
    command = [sys.executable, "-c", script]
    opened(tape, order_command=command, stage_batch=2).stage(["a", "b", "c", "d"])
    assert tape.calls() == [["d", "c"], ["b", "a"]]


def test_a_command_that_leaves_a_process_behind_has_ended(tape):
    """What goes on in the background may keep its output open: the call returns all the same."""
    command = [sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '30'])"]
    opened(tape, stage_command=command, stage_timeout_seconds=25).stage(["x"])


@pytest.mark.parametrize(("command", "words"), [
    (["/not/there"], "stage_command cannot be run: No such file"),
    ([sys.executable, "-c", "import sys; sys.exit(3)"], "stage_command ended with exit code 3"),
    ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "ended with exit code -9"),
    (["sleep", "30"], "stage_command did not end within 0.2 s"),
])  # fmt: skip
def test_a_command_that_does_not_do_its_work_is_an_outage(tape, command, words):
    """Missing, failing, killed or hanging: said in one line, to be tried again."""
    storage = opened(
        tape, stage_command=command, stage_timeout_seconds=0.2 if "30" in command else 60
    )
    with pytest.raises(StorageUnavailableError, match=words):
        storage.stage(["x"])


def test_a_command_that_may_not_be_ended_is_left_alone(tape, monkeypatch):
    """By sudo, say: it runs as somebody else. It is an outage as any that takes too long."""

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", refused)
    storage = opened(tape, stage_command="sleep 20", stage_timeout_seconds=0.2)
    begun = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="did not end within"):
        storage.stage(["x"])
    assert time.monotonic() - begun < 15


def test_no_room_for_what_a_command_is_told_is_an_outage(tape, monkeypatch):
    """Its input and output are temporary files here."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageUnavailableError, match=r"stage_command.*No space"):
        opened(tape).stage(["x"])


def test_a_command_sees_no_secret_of_ours(tape, monkeypatch):
    """Variables of the DLM, and those named like secrets, are not in its environment."""
    monkeypatch.setenv("DLM_DATABASE_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("SITE_HSM", "robot-1")
    hidden = "'hunter2' not in str(os.environ) and os.environ['SITE_HSM'] == 'robot-1'"
    script = f"import os, sys; sys.exit(not ({hidden}))"
    opened(tape, stage_command=[sys.executable, "-c", script]).stage(["x"])


@pytest.mark.parametrize("config", [
    {"stage": "command"}, {"stage_command": "x"}, {"stage": "nothing"}, {"stage": "s3"},
    {"stage": "command", "stage_command": []}, {"stage": "command", "stage_command": "'"},
    {"stage": "command", "stage_command": "x", "stage_tier": "Bulk"},
    {"stage": "command", "stage_command": "x", "other": "1"},
])  # fmt: skip
def test_a_config_that_does_not_fit_is_refused_when_the_storage_is_opened(tmp_path, config):
    """In one line, before anything is done."""
    with pytest.raises(InvalidValueError):
        open_storage("tape", "posix", str(tmp_path), config)


def test_only_on_posix_can_one_look_without_a_command(sshd, tmp_path):
    """Elsewhere an online_command is required."""
    config = sshd.config(shell=False) | {"stage": "command", "stage_command": "true"}
    with pytest.raises(InvalidValueError, match="online_command"):
        open_storage("far", "sftp", sshd.root(tmp_path), config)
    cold = open_storage("far", "sftp", sshd.root(tmp_path), config | {"online_command": "cat"})
    cold.write("x", io.BytesIO(b"x"), 1)
    assert cold.look(["x", "y"]) == {"x", "y"}


class Jammed:
    """A stager of somebody else's whose every call fails in a way of its own."""

    def __init__(self, place, options):
        pass

    def stage(self, paths):
        raise KeyError("drive")

    def online(self, paths):
        return None


class Robot:
    """A stager of somebody else's."""

    def __init__(self, place, options):
        self.place, self.options, self.asked = place, options, []

    def stage(self, paths):
        self.asked.append(list(paths))

    def online(self, paths):
        return {path for path in paths if any(path in one for one in self.asked)}


def test_a_stager_that_fails_in_a_way_of_its_own_is_an_outage(tmp_path, monkeypatch):
    """Of its storage: whoever works on many goes on with the others."""
    point = EntryPoint("jammed", f"{__name__}:Jammed", "dlm.stagers")
    monkeypatch.setattr(EntryPoint, "load", lambda _: Jammed)
    monkeypatch.setattr(staging, "entry_points", lambda group: [point])
    staging.stagers.cache_clear()
    try:
        storage = open_storage("tape", "posix", str(tmp_path), {"stage": "jammed"})
        (tmp_path / "x").write_bytes(b"x")
        with pytest.raises(StorageUnavailableError, match="drive"):
            storage.stage(["x"])
        for asking in (lambda: storage.look(["x"]), lambda: storage.open_read("x")):
            with pytest.raises(StorageUnavailableError, match="stager"):
                asking()
    finally:
        staging.stagers.cache_clear()


def test_others_add_stagers_by_entry_point(tmp_path, monkeypatch):
    """The group dlm.stagers: called with the storage's place and the keys that are its own."""
    point = EntryPoint("robot", f"{__name__}:Robot", "dlm.stagers")
    monkeypatch.setattr(EntryPoint, "load", lambda _: Robot)
    monkeypatch.setattr(staging, "entry_points", lambda group: [point])
    staging.stagers.cache_clear()
    try:
        config = {"stage": "robot", "stage_drives": "4", "stage_batch": 2, "mount": "/"}
        storage = open_storage("tape", "posix", str(tmp_path), config)
        assert storage.stager.options == {"stage_drives": "4"}
        assert storage.stager.place.config == {"mount": "/"}
        (tmp_path / "x").write_bytes(b"x")
        with pytest.raises(NotOnlineError):
            storage.open_read("x")
        storage.stage(["x", "y", "z"])
        assert storage.stager.asked == [["x", "y"], ["z"]]
        storage.open_read("x").close()
    finally:
        staging.stagers.cache_clear()
