"""Tiny files between disks are copied by processes beside ours."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dlm_core import errors
from dlm_core.errors import DlmError, PayloadNotFoundError, SourceDamagedError
from dlm_core.storages.open import open_storage
from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers import beside, mover
from dlm_core.transfers.beside import LostError, Processes
from dlm_core.transfers.mover import CopyResult, CopyTask, copy_batch
from dlm_core.transfers.throttle import paced
from dlm_core.types import ManifestEntry, PayloadKind
from tests.leftovers import lives
from tests.transfers.test_mover import task

COUNT = 300


@pytest.fixture
def ends(tmp_path: Path) -> tuple[PosixStorage, PosixStorage]:
    for name in ("source", "far"):
        (tmp_path / name).mkdir()
    return tuple(open_storage(n, "posix", str(tmp_path / n), {}) for n in ("source", "far"))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """One for each thread; all have begun, and are those of the movers of this test."""
    monkeypatch.setattr(beside, "_processors", lambda: 4)
    those = Processes()
    assert those.begin(4) == 4
    until(lambda: all(one.has_begun() for one in those._free))
    monkeypatch.setattr(mover, "PROCESSES", those)
    yield those
    those.end()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def here(*_: object) -> None:
    raise AssertionError("this is the other processes' work")


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process opens, writes and renames nothing."""
    for call in ("write", "open_read", "read_back", "rename"):
        monkeypatch.setattr(PosixStorage, call, here, raising=True)


def tasks(source: PosixStorage) -> list[CopyTask]:
    return [task(source, f"{n % 7}/{n}", b"%d" % n) for n in range(COUNT)]


def copied(ends: tuple[PosixStorage, PosixStorage], wanted: list[CopyTask]) -> list[CopyResult]:
    results = list(copy_batch(*ends, wanted))
    assert len(results) == len(wanted)
    assert [one.path for one in ends[1].walk(".dlm")] == []
    return results


@pytest.mark.usefixtures("processes")
def test_many_tiny_files_are_copied_beside(ends, nothing_here):
    """All of the work on them is; directory payloads too, and names that are no UTF-8."""
    wanted = tasks(ends[0])
    odd = task(ends[0], "odd \udcff\n'\"", b"odd")
    whole = task(ends[0], "run.ms/a", b"table")
    entry = ManifestEntry("a", 5, whole.digest)
    tree = CopyTask(
        whole.operation_id, "run.ms", "copy/run.ms", PayloadKind.DIRECTORY, 5, "", (entry,), "tree"
    )
    assert {one.error for one in copied(ends, [*wanted, odd, tree])} == {None}
    for one in [*wanted, odd, whole]:
        made = Path(ends[1].root, one.destination_path)
        assert made.read_bytes() == Path(ends[0].root, one.source_path).read_bytes()


@pytest.mark.usefixtures("processes", "nothing_here")
def test_what_goes_wrong_there_is_told_here(ends):
    """A damaged source, one that is gone, and one that may not be there: the others are copied."""
    wanted = tasks(ends[0])
    Path(ends[0].root, wanted[5].source_path).write_bytes(b"x")
    Path(ends[0].root, wanted[6].source_path).unlink()
    Path(ends[0].root, wanted[7].source_path).unlink()
    Path(ends[0].root, wanted[7].source_path).symlink_to("/etc/passwd")
    results = {one.task.source_path: one.error for one in copied(ends, wanted)}
    assert [getattr(results[wanted[n].source_path], "code", None) for n in (4, 5, 6, 7)] == [
        None, "DLM-401", "DLM-303", "DLM-305",
    ]  # fmt: skip
    assert sum(error is None for error in results.values()) == COUNT - 3
    for n in (5, 6, 7):
        assert not Path(ends[1].root, wanted[n].destination_path).exists()


@pytest.mark.usefixtures("processes")
def test_bytes_that_changed_on_the_medium_are_noticed_there(ends, monkeypatch):
    """What is read back differs: it is not shown, and is tried again."""
    wanted, spoilt = tasks(ends[0]), []
    source, destination = (Path(one.root) for one in ends)
    first = iter([True])
    usual = beside._Process.call

    def spoil(self, work, *arguments):
        ended = usual(self, work, *arguments)
        # nobody else reads or shows what this call has just written
        if work.__name__ == "copy_each" and next(first, False):
            (destination / arguments[2][0][1]).write_bytes(b"?")
            spoilt.append(arguments[2][0][0])
        return ended

    monkeypatch.setattr(beside._Process, "call", spoil)
    bad = [one for one in copied(ends, wanted) if one.error is not None]
    assert [one.error.code for one in bad] == ["DLM-402"] and bad[0].error.retryable
    assert [bad[0].task.source_path] == spoilt and (source / spoilt[0]).read_bytes() != b"?"
    assert not (destination / bad[0].task.destination_path).exists()


@pytest.mark.parametrize("step", ["copy_each", "look_at_each", "rename_many"])
def test_a_process_that_is_killed_loses_nothing(ends, processes, monkeypatch, step):
    """In the middle of each step: what it was at is tried again or done here, what is shown is
    whole, and the next batch finds the rest of the way."""
    wanted, killed = tasks(ends[0]), []
    first = iter([True])
    usual = beside._Process.call

    def call(self, work, *arguments):
        if work.__name__ == step and next(first, False):
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)
        return usual(self, work, *arguments)

    monkeypatch.setattr(beside._Process, "call", call)
    failed = [one for one in copied(ends, wanted) if one.error is not None]
    assert all(one.error.retryable for one in failed) and len(failed) <= 32
    assert killed and not psutil.pid_exists(killed[0])
    again = [task(ends[0], one.task.source_path, data(ends[0], one.task)) for one in failed]
    assert {one.error for one in copied(ends, again)} <= {None}
    for one in wanted:
        made = Path(ends[1].root, one.destination_path)
        assert made.read_bytes() == data(ends[0], one)


def data(source: PosixStorage, one: CopyTask) -> bytes:
    return Path(source.root, one.source_path).read_bytes()


@pytest.mark.usefixtures("processes")
def test_a_limit_is_kept_here(ends, monkeypatch):
    """Bytes a second are counted by this process, so it copies by itself what has such a limit."""
    taken = []

    class Limit:
        limited = True
        take = staticmethod(taken.append)

    monkeypatch.setattr(beside._Process, "call", here)
    results = copy_batch(paced(ends[0], [Limit]), ends[1], tasks(ends[0]))
    assert {one.error for one in results} == {None}
    assert sum(taken) == sum(len(b"%d" % n) for n in range(COUNT))


def test_few_files_need_no_process(ends, monkeypatch):
    """They are copied before one has begun."""
    monkeypatch.setattr(subprocess, "Popen", here)
    monkeypatch.setattr(mover, "PROCESSES", Processes())
    assert {one.error for one in copied(ends, tasks(ends[0])[:100])} == {None}


def test_where_no_process_can_begin_the_work_is_done_here(ends, monkeypatch):
    """No memory, no more processes allowed: that is no error of a copy."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(beside, "_processors", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(mover, "PROCESSES", Processes())
    assert {one.error for one in copied(ends, tasks(ends[0]))} == {None}


def test_an_interrupt_of_the_terminal_is_the_parents(processes):
    """Its processes are told by it, and go on meanwhile."""
    with processes.one() as call:
        pid = call(os.getpid)
        os.kill(pid, signal.SIGINT)
        assert call(os.getpid) == pid != os.getpid()
    with processes.one() as call, pytest.raises(LostError):
        call(os._exit, 1)


def test_an_answer_that_was_not_taken_is_none_to_the_next_call(processes, monkeypatch):
    """However a call ends without one: renamed or not would be said of other files. That process
    is not called again, nor is one whose work failed."""

    def fail(_: object) -> None:
        raise MemoryError

    with processes.one() as call, monkeypatch.context() as patch:
        patch.setattr(pickle, "load", fail)
        with pytest.raises(MemoryError):
            call(os.getpid)
    with processes.one() as call, pytest.raises(LostError):
        call(divmod, 1, 0)
    assert len(processes._free) == 2
    with processes.one() as call:
        assert call(divmod, 7, 2) == (3, 1)


def test_they_end_with_their_parent():
    """Also when that is killed, and cannot tell them."""
    script = (
        "import os, signal, time\n"
        "from dlm_core.transfers import beside\n"
        "beside._processors = lambda: 2\n"
        "those = beside.Processes()\n"
        "those.begin(2)\n"
        "while not all(one.has_begun() for one in those._free): time.sleep(0.01)\n"
        "print(*[one._process.pid for one in those._free], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(lives(pid) for pid in pids))


def kinds(kind: type[DlmError] = DlmError) -> Iterator[type[DlmError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


def test_every_error_can_be_told_by_another_process():
    """With its text, its code, and what it tells of."""
    for error in (
        PayloadNotFoundError(storage="a", path="x y"),
        SourceDamagedError(where="a:x", expected="1", found="2"),
        errors.NotFoundError("storage", "x", "see there"),
    ):
        told = pickle.loads(pickle.dumps(error))
        assert (type(told), str(told), told.details) == (type(error), str(error), error.details)
    for kind in kinds():
        assert kind.__reduce__ is DlmError.__reduce__
