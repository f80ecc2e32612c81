"""What the tests start does not outlive them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_ROOT = Path(__file__).resolve().parents[1]
_RUN = """
import os, subprocess, sys
from pathlib import Path
from tests.leftovers import ended_with_us
with ended_with_us(Path(sys.argv[1])):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    # away from us as a server goes: a group of its own, a parent that ends at once
    away = f"import subprocess; print(subprocess.Popen({sleep!r}).pid, flush=True)"
    subprocess.run([sys.executable, "-c", away], start_new_session=True, check=True)
    named = subprocess.Popen([*sleep, sys.argv[1]], env={})
    print(named.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, None])
def test_no_end_leaves_anything_behind(tmp_path: Path, number: int | None) -> None:
    """Ctrl-C, kill -9 or the usual end: neither a process that took our environment with it, nor
    one that only names our folder, nor the folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(folder)], cwd=_ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert run.stdin is not None and run.stdout is not None
    started = [psutil.Process(int(run.stdout.readline())) for _ in range(2)]
    if number is not None:
        run.send_signal(number)
    run.stdin.close()
    run.wait(60)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    end = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
