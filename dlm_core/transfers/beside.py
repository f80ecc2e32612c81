"""Processes beside ours that work on tiny files: the interpreter runs one thread of a process at a
time, and of tiny files its own work is most.

Such a process is handed a function and what it takes, and answers with what that gives. It knows no
catalogue, imports little, and ends with the pipe to it, however its parent ended.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

#: without the site's packages, of which nothing is needed: it is there in a twentieth of a second
_PYTHON = (sys.executable, "-I", "-S", "-c")
_BEGIN = f"import sys; sys.path.append(sys.argv[1]); from {__name__} import serve; serve()"
_PACKAGES = str(Path(__file__).resolve().parents[2])

#: ``call(work, *arguments)``: what ``work(*arguments)`` gives in the process; pickle has to know
#: all of that. Raises LostError, also if ``work`` raises: it tells the errors that it knows of.
Call = Callable[..., Any]


class LostError(Exception):
    """The process ended before it had answered, or its work raised an error."""


class _Process:
    """One process; one thread at a time calls it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*_PYTHON, _BEGIN, _PACKAGES], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._requests = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        self._begun = self.lost = False

    def has_begun(self) -> bool:
        """Nobody waits for that."""
        if not self._begun:
            look = select.poll()
            look.register(self._answers)
            self._begun = bool(look.poll(0))
            self.lost = self._begun and not self._answers.read(1)
        return self._begun

    def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        # until it has answered, whatever happens: the answer to one call is none to the next
        self.lost = True
        try:
            _send(self._requests, (work, arguments))
            answer = pickle.load(self._answers)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise LostError from None
        self.lost = False
        return answer

    def end(self) -> None:
        """Have it end once it has done what it is at."""
        with suppress(OSError):
            self._requests.close()
        self._process.wait()
        self._answers.close()


class Processes:
    """As many processes as there are processors, each begun when it is wanted and kept until ours
    ends; one that was lost has no successor."""

    def __init__(self) -> None:
        self._free: list[_Process] = []
        self._begun = 0
        self._more = _processors() if _processors() > 1 else 0
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Call | None]:
        """What calls one of them, if one is free and has begun."""
        process = self._take()
        try:
            yield process.call if process is not None else None
        finally:
            if process is not None:
                self._put(process)

    def begin(self, count: int) -> int:
        """Have ``count`` of them, so that they are there when they are wanted; how many there are,
        which may be fewer."""
        with self._lock:
            while self._more and self._begun < count:
                self._begin()
            return self._begun

    def _begin(self) -> None:
        self._more -= 1
        self._begun += 1
        with suppress(OSError):
            self._free.append(_Process())

    def _take(self) -> _Process | None:
        with self._lock:
            if not self._free and self._more:
                self._begin()
            if self._free and self._free[-1].has_begun():
                return self._free.pop()
        return None

    def _put(self, process: _Process) -> None:
        if process.lost:
            process.end()
            return
        with self._lock:
            self._free.append(process)

    def end(self) -> None:
        """End them all, and wait for that."""
        with self._lock:
            self._more = 0
            while self._free:
                self._free.pop().end()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _send(pipe: IO[bytes], what: Any) -> None:
    pipe.write(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))
    pipe.flush()


def serve() -> None:
    """What such a process does: answer until nobody asks."""
    # of a terminal's interrupt it is told by its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    answers.write(b"!")
    answers.flush()
    # who asks may be killed while it does, or before it is answered
    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        while True:
            work, arguments = pickle.load(requests)
            _send(answers, work(*arguments))


#: those of this process
PROCESSES = Processes()
atexit.register(PROCESSES.end)
