"""The stager that runs a site's own commands: for any tape library or storage manager."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dlm_core.errors import InvalidValueError, StorageUnavailableError
from dlm_core.storages.config import read_config
from dlm_core.storages.staging import Place

_LONGEST_LINE = 200
#: what was killed is waited for so long
_DEATH_SECONDS = 5.0
#: what a command may print of somebody's password is not repeated
_SECRET = re.compile(r"(?i)(://)[^/@\s]*@|((?:password|passwd|secret|token|key)\s*[=:]\s*)\S+")
#: variables that hold secrets, ours or others', are none of a command's business
_PRIVATE = re.compile(r"^DLM_|SECRET|PASSWORD|PASSWD|TOKEN", re.IGNORECASE)


def _words(value: Any) -> Any:
    """A command line is split as a shell would, but no shell ever sees it."""
    return shlex.split(value) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words), Field(min_length=1)]


class CommandConfig(BaseModel):
    """What a config with ``stage = command`` may hold beside the common terms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage_command: Words = Field(description="Brings online what it reads from standard input.")
    online_command: Words | None = Field(None, description="Prints those of them that are online.")
    order_command: Words | None = Field(None, description="Prints them as the medium likes them.")
    stage_timeout_seconds: float = Field(300, gt=0, le=86400, description="For either to end.")


def open_command_stager(place: Place, options: Mapping[str, Any]) -> CommandStager:
    """A stager by command.

    Raises
    ------
    InvalidValueError
        if a command is missing, or the storage is none whose files can be looked at without one.
    """
    config = read_config(CommandConfig, place.name, options)
    if config.online_command is None and place.interface != "posix":
        raise InvalidValueError(
            what=f"online_command of storage {place.name}",
            value="",
            expected="a command: only on posix can a file be looked at without one",
        )
    folder = os.path.realpath(place.root) if place.interface == "posix" else None
    return CommandStager(place.name, folder, config)


class CommandStager:
    """Runs commands that read paths from standard input, each ended by a NUL.

    Parameters
    ----------
    folder : the root of a POSIX storage: commands are told absolute paths. None: those relative to
        the root.
    """

    renames_read = False

    def __init__(self, name: str, folder: str | None, config: CommandConfig) -> None:
        self._name, self._folder, self._config = name, folder, config

    def stage(self, paths: Sequence[str]) -> None:
        self._run("stage_command", self._config.stage_command, paths)

    def order(self, paths: Sequence[str]) -> list[str]:
        """``paths`` as the command prints them; what it leaves out comes last."""
        if self._config.order_command is None:
            return list(paths)
        told = self._named(self._run("order_command", self._config.order_command, paths), paths)
        return [*dict.fromkeys([*told, *paths])]

    def online(self, paths: Sequence[str]) -> set[str]:
        if self._config.online_command is None:
            return {path for path in paths if self._is_resident(path)}
        told = self._run("online_command", self._config.online_command, paths)
        return set(self._named(told, paths))

    def _named(self, told: bytes, paths: Sequence[str]) -> list[str]:
        """Those of ``paths`` that a command printed, in its order."""
        names = {self._octets(path): path for path in paths}
        return [names[name] for name in told.split(b"\0") if name in names]

    def _octets(self, path: str) -> bytes:
        return os.fsencode(path if self._folder is None else f"{self._folder}/{path}")

    def _is_resident(self, path: str) -> bool:
        """A file whose blocks hold all its bytes; what a migration leaves behind has fewer."""
        try:
            status = os.lstat(self._octets(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unavailable(f"{path}: {error.strerror}") from error
        return stat.S_ISREG(status.st_mode) and status.st_blocks * 512 >= status.st_size

    def _run(self, what: str, words: Sequence[str], paths: Sequence[str]) -> bytes:
        """Run a command to its end; what it printed."""
        told = b"".join(self._octets(path) + b"\0" for path in paths)
        try:
            return self._printed(what, words, told)
        except OSError as error:
            reason = error.strerror or error
            raise self._unavailable(f"{what} cannot be run: {reason}") from None

    def _printed(self, what: str, words: Sequence[str], told: bytes) -> bytes:
        """Files, not pipes: a process that the command leaves running may keep those open."""
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as printed,
            tempfile.TemporaryFile() as complained,
        ):
            given.write(told)
            given.seek(0)
            process = subprocess.Popen(
                words, stdin=given, stdout=printed, stderr=complained, cwd="/",
                env=_environment(), start_new_session=True,
            )  # fmt: skip
            self._wait(what, process)
            if process.returncode:
                line = _first_line(complained)
                code = process.returncode
                raise self._unavailable(f"{what} ended with exit code {code}{line}")
            printed.seek(0)
            return printed.read()

    def _wait(self, what: str, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(self._config.stage_timeout_seconds)
        except subprocess.TimeoutExpired:
            seconds = self._config.stage_timeout_seconds
            raise self._unavailable(f"{what} did not end within {seconds:g} s") from None
        finally:
            if process.returncode is None:
                # its session is its own: whatever it has started goes with it; what runs as
                # somebody else (by sudo) may not be ended, and is left alone
                with suppress(PermissionError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(_DEATH_SECONDS)

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self._name, message=message)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not _PRIVATE.search(name)}


def _first_line(complained: Any) -> str:
    """The first line of what a command complained of, as much as fits and may be told."""
    complained.seek(0)
    text = complained.read(64 << 10).decode("utf-8", "replace")
    line = next((one.strip() for one in text.splitlines() if one.strip()), "")
    plain = "".join(char for char in line if char.isprintable())
    hidden = _SECRET.sub(lambda m: f"{m[1]}…@" if m[1] else f"{m[2]}…", plain)
    return f": {hidden[:_LONGEST_LINE]}" if hidden else ""
