"""PostgreSQL's own client programs: found by version, run without a secret in sight."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dlm_core.catalogue import embedded
from dlm_core.errors import BackupError, MissingProgramError

_PROGRAMS = ("pg_dump", "pg_restore", "psql")


def find_programs(server: int, bindir: Path | None = None) -> Path:
    """The folder with pg_dump, pg_restore and psql that fit a server.

    Parameters
    ----------
    server
        Major version of the server. The same one is taken, else the next newer: newer programs
        read older servers, not the reverse.
    bindir
        The only folder to look at; None looks at the wheel's, Debian's and the search path.

    Raises
    ------
    MissingProgramError
        telling what was looked at.
    """
    versions = {folder: _version(folder) for folder in _folders(bindir)}
    fitting = [(v, n, f) for n, (f, v) in enumerate(versions.items()) if v and v >= server]
    if fitting:
        return min(fitting)[2]
    looked = ", ".join(f"{v or 'none'} in {f}" for f, v in versions.items()) or "nothing"
    raise MissingProgramError(programs=", ".join(_PROGRAMS), version=server, looked=looked)


def _folders(bindir: Path | None) -> Iterator[Path]:
    yield from embedded.candidates(bindir)
    found = shutil.which("pg_dump") if bindir is None else None
    if found:
        # not resolved: Debian's wrapper chooses by the program's name
        yield Path(found).parent


def _version(folder: Path) -> int | None:
    if not all((folder / name).is_file() for name in _PROGRAMS):
        return None
    command = [str(folder / "pg_dump"), "--version"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\) (\d+)", answer.stdout)
    return int(match[1]) if match else None


def address(url: str) -> tuple[str, dict[str, str]]:
    """A libpq address for a command line, and the environment that holds its password: anybody on
    the machine may read a command line."""
    parts = conninfo_to_dict(url)
    password = parts.pop("password", None)
    environment = {**os.environ, "LC_ALL": "C"}
    if password:
        environment["PGPASSWORD"] = str(password)
    return make_conninfo("", **parts), environment


def run_program(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; what it printed.

    Raises
    ------
    BackupError
        with what it said last.
    """
    try:
        ended = subprocess.run(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise BackupError(what=Path(command[0]).name, reason=str(error)) from error
    if ended.returncode:
        raise BackupError(what=Path(command[0]).name, reason=last_words(ended.stderr))
    return ended.stdout


def last_words(text: str) -> str:
    """The end of what a program said, in one line."""
    return " ".join(" ".join(text.strip().splitlines()[-3:]).split())[-500:] or "no message"
