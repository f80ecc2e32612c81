"""What the tests start ends with them, however they end: Ctrl-C and kill -9 run no clean-up.

A process of its own holds a pipe from the one that runs the tests. When that is gone the pipe
closes; then what carries the run's mark in its environment is ended, and what is of its process
group and names one of its folders in the command line (sshd wipes its environment).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

#: not DLM_*: some tests start a site with none of those
_MARK = "TESTS_OF_DLM"
_ROOT = Path(__file__).resolve().parents[1]
#: seconds; what was just being started shows up a little later
_LOOKS, _BETWEEN = 5, 0.5


@contextmanager
def ended_with_us(*folders: Path) -> Iterator[None]:
    """Within it, whatever is started with our environment or names one of ``folders`` does not
    outlive this process, and neither does the first of them."""
    mark, before = uuid.uuid4().hex, os.environ.get(_MARK)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "tests.leftovers", mark, str(os.getpgrp()), *map(str, folders)],
        stdin=subprocess.PIPE, cwd=_ROOT, start_new_session=True,
    )  # fmt: skip
    os.environ[_MARK] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = before
        # not waited for: there is nothing to end if all was cleaned up in order
        assert watcher.stdin is not None
        watcher.stdin.close()


def kill(processes: Iterable[psutil.Process]) -> None:
    """kill -9 of those that have not ended meanwhile, as some do with those that started them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def lives(pid: int) -> bool:
    """One that has ended may wait for long to be collected by the machine's first process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _left(mark: str, group: int, folders: Sequence[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline()) + " "
            names = any(f"{folder}{end}" in line for folder in folders for end in "/ ")
            ours = names and os.getpgid(process.pid) == group
            if ours or process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def main(mark: str, group: str, *folders: str) -> None:
    """Wait for the end of standard input, then end what is left."""
    sys.stdin.buffer.read()
    for _ in range(_LOOKS):
        kill(_left(mark, int(group), folders))
        time.sleep(_BETWEEN)
    shutil.rmtree(folders[0], ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
