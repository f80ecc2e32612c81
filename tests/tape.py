"""A tape for tests: a POSIX folder whose files are moved to a silo, and commands that bring them
back. What stays is a sparse file of the same size, which reads as zeros: forgetting to stage shows.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parent.parent
_COMMAND = """\
#!{python} -IS
import sys
sys.path.insert(0, {checkout!r})
from tests.tape import main
main({base!r}, {verb!r})
"""


class Tape:
    """The storage manager of a folder: ``migrate`` moves bytes to the silo, ``deliver`` brings back
    what was asked for meanwhile.

    ``mode``: 'asks' (what is staged comes with ``deliver``), 'at_once', 'fails', 'hangs', 'lies'
    (the online command says that all is; staging comes with ``deliver``).
    """

    def __init__(self, root: Path, base: Path, mode: str = "asks") -> None:
        self.root, self.base = root, base
        (base / "silo").mkdir(parents=True)
        self.mode = mode
        for verb in ("stage", "online"):
            script = base / verb
            text = _COMMAND.format(
                python=sys.executable, checkout=str(_CHECKOUT), base=str(base), verb=verb
            )
            script.write_text(text)
            script.chmod(stat.S_IRWXU)

    @property
    def mode(self) -> str:
        return (self.base / "mode").read_text()

    @mode.setter
    def mode(self, value: str) -> None:
        (self.base / "mode").write_text(value)

    def config(self, *, online_command: bool = False, **terms: Any) -> dict[str, Any]:
        """The config of a storage on this tape; by its own look unless it is to ask a command."""
        found = {"stage": "command", "stage_command": [str(self.base / "stage")]} | terms
        return found | ({"online_command": [str(self.base / "online")]} if online_command else {})

    def migrate(self, pattern: str = "*") -> int:
        """Move the bytes of all files that are resident to the silo, or of those whose names are
        like ``pattern``; how many."""
        resident = [file for file in sorted(self.root.rglob(pattern)) if _is_resident(file)]
        for file in resident:
            status = file.stat()
            _in_silo(self.base, file).write_bytes(file.read_bytes())
            with file.open("wb") as stub:
                stub.truncate(status.st_size)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return len(resident)

    def deliver(self) -> int:
        """Bring back what was asked for since the last time; how many files."""
        asked = self.base / "wanted"
        lines = asked.read_text().splitlines() if asked.exists() else []
        asked.unlink(missing_ok=True)
        paths = [path for line in lines for path in json.loads(line)]
        _recall(self.base, paths)
        return len(paths)

    def calls(self, verb: str = "stage") -> list[list[str]]:
        """The paths of each call of a command, relative to the root."""
        log = self.base / "calls"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [[os.path.relpath(p, self.root) for p in paths] for v, paths in lines if v == verb]

    def stubs(self) -> list[str]:
        """Files whose bytes are in the silo."""
        files = (file for file in self.root.rglob("*") if file.is_file())
        return sorted(str(f.relative_to(self.root)) for f in files if not _is_resident(f))


def _is_resident(file: Path) -> bool:
    status = file.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_blocks * 512 >= status.st_size > 0


def _in_silo(base: Path, file: Path) -> Path:
    """By inode: what is renamed keeps its bytes, as in a real storage manager."""
    return base / "silo" / str(file.lstat().st_ino)


def _recall(base: Path, paths: Sequence[str]) -> None:
    for file in map(Path, paths):
        if not file.exists():
            continue  # moved or removed meanwhile
        silo = _in_silo(base, file)
        if silo.exists():
            status = file.stat()
            with file.open("r+b") as stub, silo.open("rb") as source:
                shutil.copyfileobj(source, stub)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            silo.unlink()


def main(base: str, verb: str) -> None:
    """The commands: ``stage`` and ``online``, with paths on standard input."""
    folder = Path(base)
    mode = (folder / "mode").read_text()
    paths = [os.fsdecode(path) for path in sys.stdin.buffer.read().split(b"\0") if path]
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps([verb, paths]) + "\n")
    if mode == "fails" and verb == "stage":
        sys.exit("\nno drive is free, password=hunter2 at https://op:pw@robot/\nand more")
    if mode == "hangs" and verb == "stage":
        time.sleep(60)
    if verb == "online":
        _tell_online(paths, mode)
    elif mode == "at_once":
        _recall(folder, paths)
    else:
        with (folder / "wanted").open("a") as wanted:
            wanted.write(json.dumps(paths) + "\n")


def _tell_online(paths: Sequence[str], mode: str) -> None:
    for path in paths:
        if mode == "lies" or (os.path.exists(path) and _is_resident(Path(path))):
            sys.stdout.buffer.write(os.fsencode(path) + b"\0")
