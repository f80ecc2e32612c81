"""SSH connections for storages: one event loop in a thread, connections shared and reopened.

The adapters are called from many threads; all SSH runs in one loop, to which a call hands over a
coroutine and waits. Host keys are pinned, secrets are read at each connect, and nothing of the
user's own SSH (agent, ~/.ssh) is looked at: a storage is what the catalogue says.
"""

from __future__ import annotations

import asyncio
import atexit
import re
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncssh
from pydantic import BaseModel, ConfigDict, Field

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.config import is_host
from dlm_core.storages.secrets import SecretReference, read_secret
from dlm_core.storages.ssh_shell import Shell, ShellEnded

_T = TypeVar("_T")

_CONNECT_SECONDS = 10
_LOGIN_SECONDS = 30
# a peer that answers none of three of these is gone
_KEEPALIVE_SECONDS = 15
# put before the others: a third less work for both ends than ChaCha20, which comes first else
_FAST = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
# a machine that refused one more connection is left in peace for so long
_REFUSED_SECONDS = 60
# of a connection; OpenSSH lets it have ten of shells and SFTP together
_SHELLS = 8
# a connection that has so much to do wants another beside it
_ENOUGH = 8
_ENDING_SECONDS = 2
_ROOT = re.compile(
    r"(?P<user>[^/:\s]+)@(?P<host>\[[^\]\s]+\]|[^@:/\s\[\]]+)(?::(?P<port>\d{1,5}))?"
    r"(?P<path>/[^\0]*)"
)


class SshConfig(BaseModel):
    """What ``config`` of a storage behind SSH may hold. Secrets are named by reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host_keys: str = Field(
        description="Line of a known_hosts file, or the absolute path of such a file."
    )
    key: SecretReference | None = Field(None, description="The user's private key.")
    passphrase: SecretReference | None = Field(None, description="What the key is locked with.")
    password: SecretReference | None = None
    shell: bool = Field(False, description="Whether commands (sha256sum, sync) may be run there.")
    connections: int = Field(2, ge=1, le=32, description="Connections at once, at most.")


@dataclass(frozen=True, slots=True)
class Address:
    """Who is asked for where; ``path`` is absolute."""

    user: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def parse_address(name: str, root: str) -> Address:
    """``user@host:port/absolute/path``; ``:port`` may be left out.

    Raises
    ------
    InvalidValueError
        in a line that does not show the value: a password may stand in it.
    """
    found = _ROOT.fullmatch(root)
    port = int(found["port"] or 22) if found else 0
    host = found["host"].strip("[]") if found else ""
    if found is None or not 0 < port < 65536 or not is_host(host):
        raise InvalidValueError(
            what=f"root of storage {name}",
            value="(not shown)",
            expected="user@host:port/absolute/path, without a password",
        )
    return Address(found["user"], host, port, found["path"])


# --- the loop --------------------------------------------------------------------------------


class _Background:
    """The loop and its thread, made when first needed; there is never a second one."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = loop = asyncio.new_event_loop()
                thread = threading.Thread(target=loop.run_forever, name="dlm-ssh", daemon=True)
                thread.start()
                atexit.register(self._end, loop, thread)
            return self._loop

    @staticmethod
    def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """End what is at work at the end of the process: asyncio tells on standard error of what
        it finds unfinished then."""
        if thread.is_alive():  # not in a child of a fork
            with suppress(StillRunning):
                asyncio.run_coroutine_threadsafe(_end_others(), loop).result(_ENDING_SECONDS)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_ENDING_SECONDS)

    def has_begun(self) -> bool:
        return self._loop is not None


async def _end_others() -> None:
    """Cancel all tasks of this loop but the present one, and wait for their end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


_background = _Background()


def submit(work: Coroutine[Any, Any, _T]) -> Future[_T]:
    """Begin ``work`` in the loop; its result may be waited for from any other thread."""
    return asyncio.run_coroutine_threadsafe(work, _background.loop())


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``; it is cancelled if the waiting is interrupted."""
    future = submit(work)
    try:
        return future.result()
    finally:
        future.cancel()


def run_unless(stop: threading.Event | None, work: Coroutine[Any, Any, _T]) -> _T | None:
    """As :func:`run`, but None once ``stop`` is set. ``work`` ends in no TimeoutError."""
    future = submit(work)
    try:
        while stop is None or not stop.is_set():
            try:
                return future.result(timeout=0.5)
            except StillRunning:
                continue
        return None
    finally:
        future.cancel()


# --- connections -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Session:
    """A connection with an SFTP session on it; ``busy`` is the weight of what uses it."""

    connection: asyncssh.SSHClientConnection
    sftp: asyncssh.SFTPClient
    #: absolute path of the storage's root with all links resolved, in octets
    root: bytes
    busy: int = 0
    #: shells that wait for the next command
    _idle: list[Shell] = field(default_factory=list)
    #: shells that run a command, or are begun
    _at_work: int = 0
    _free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_SHELLS))

    def alive(self) -> bool:
        return not self.connection.is_closed()

    async def command(self, command: str, given: bytes) -> tuple[int | None, bytes, bytes]:
        """Run a command of a POSIX shell on the far side with ``given`` as its input; it may be
        run twice.

        Returns its exit status (None: no shell answers), what it printed, and what it complained
        of. It is ended there if nobody waits for it any more.
        """
        async with self._free:
            while True:
                with suppress(ShellEnded):  # one that was ended there meanwhile: a new one tells
                    if self._idle:
                        return await self._run(self._idle.pop(), command, given)
                try:
                    return await self._run(await self._one_more(), command, given)
                except asyncssh.ChannelOpenError as error:
                    if not self.alive():
                        raise
                    if not self._at_work:
                        return None, b"", error.reason.encode()
                    # the server's MaxSessions: one place less for good, and a shell that is there
                    await self._free.acquire()
                except ShellEnded as error:
                    if not self.alive():
                        raise asyncssh.ConnectionLost("the connection went") from None
                    return None, b"", error.complaint

    async def _one_more(self) -> Shell:
        self._at_work += 1
        try:
            return await Shell.begun(self.connection)
        finally:
            self._at_work -= 1

    async def _run(self, shell: Shell, command: str, given: bytes) -> tuple[int, bytes, bytes]:
        self._at_work += 1
        try:
            answer = await shell.run(command, given)
        except BaseException:
            shell.end()
            raise
        finally:
            self._at_work -= 1
        self._idle.append(shell)
        return answer

    async def has_shell(self) -> bool:
        """Whether commands are run there; a login script may print more than the command."""
        return b"dlm-shell" in (await self.command("echo dlm-shell", b""))[1]


class Connections:
    """The connections of one storage; used in the loop only.

    Another one is opened when all are busy, up to ``config.connections``. A machine that refuses
    more is served over those there are.
    """

    def __init__(self, name: str, address: Address, config: SshConfig) -> None:
        self._name, self.address, self._config = name, address, config
        self._sessions: list[Session] = []
        self._connecting = asyncio.Lock()
        self._patient_until = 0.0
        # when a connection failed last, and how
        self._failure: tuple[float, StorageError] | None = None

    def same_as(self, other: Connections) -> bool:
        """Whether both are the same user's on the same machine, who proves himself in the same way:
        another key may be good for other folders."""
        mine, theirs = self._config, other._config
        return (str(self.address), mine.key, mine.password, mine.passphrase) == (
            str(other.address), theirs.key, theirs.password, theirs.passphrase
        )  # fmt: skip

    @asynccontextmanager
    async def session(self, weight: int = 1) -> AsyncIterator[Session]:
        """A live session, counted as busier by ``weight`` while it is used.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
        """
        session = await self.borrow(weight)
        try:
            yield session
        finally:
            session.busy -= weight

    async def borrow(self, weight: int) -> Session:
        """As :meth:`session`; whoever calls takes ``weight`` from ``busy`` at the end."""
        begun, session = time.monotonic(), self._least_busy()
        if session is None or (session.busy >= _ENOUGH and self._may_connect()):
            async with self._connecting:
                session = self._least_busy()
                if session is None and self._failure is not None and self._failure[0] > begun:
                    raise self._failure[1]  # who waited meanwhile need not wait once more
                if session is None or (session.busy >= _ENOUGH and self._may_connect()):
                    session = await self._one_more(session)
        session.busy += weight
        return session

    def _least_busy(self) -> Session | None:
        self._sessions = [one for one in self._sessions if one.alive()]
        return min(self._sessions, key=lambda one: one.busy, default=None)

    def _may_connect(self) -> bool:
        free = len(self._sessions) < self._config.connections
        return free and time.monotonic() >= self._patient_until

    async def _one_more(self, there: Session | None) -> Session:
        try:
            session = await self._connect()
        except StorageError as error:
            if there is None or not there.alive():
                self._failure = time.monotonic(), error
                raise
            self._patient_until = time.monotonic() + _REFUSED_SECONDS
            return there
        self._sessions.append(session)
        return session

    async def _connect(self) -> Session:
        connection = None
        try:
            # what the configuration names is read in a thread: it may be on a slow disk
            options = await asyncio.to_thread(self._options)
            connection = await asyncssh.connect(**options)
            sftp = await connection.start_sftp_client(path_encoding=None)
            root = await sftp.realpath(self.address.path.encode("utf-8", "surrogateescape"))
        except (asyncssh.Error, OSError) as error:
            if connection is not None:
                connection.abort()
            raise self._failed(error) from None
        return Session(connection, sftp, root)

    def _options(self) -> dict[str, Any]:
        config, name = self._config, self._name
        try:
            keys = [self._key()] if config.key else None
            password = read_secret(name, config.password) if config.password else None
            known = asyncssh.import_known_hosts(read_host_keys(name, config.host_keys))
        except InvalidValueError as error:
            raise StorageUnavailableError(storage=name, message=str(error)) from None
        return {
            "host": self.address.host, "port": self.address.port,
            "username": self.address.user, "client_keys": keys, "password": password,
            "known_hosts": known, "config": None, "agent_path": None, "gss_host": None,
            "encryption_algs": _FAST, "compression_algs": ["none"],
            "connect_timeout": _CONNECT_SECONDS, "login_timeout": _LOGIN_SECONDS,
            "keepalive_interval": _KEEPALIVE_SECONDS,
        }  # fmt: skip

    def _key(self) -> asyncssh.SSHKey:
        config, name = self._config, self._name
        text = read_secret(name, config.key or "")
        passphrase = read_secret(name, config.passphrase) if config.passphrase else None
        try:
            return asyncssh.import_private_key(text + "\n", passphrase)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            # the library's own words may hold parts of the key
            raise AccessDeniedError(
                storage=name, path="",
                message=f"{config.key} is no private key, or its passphrase is another",
            ) from None  # fmt: skip

    def _failed(self, error: Exception) -> StorageError:
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            message = f"the host key of {self.address} is not the one in host_keys: refused"
        elif isinstance(error, asyncssh.PermissionDenied):
            return AccessDeniedError(
                storage=self._name, path="", message=f"{self.address} does not let us in"
            )
        elif isinstance(error, asyncssh.SFTPPermissionDenied):
            return AccessDeniedError(
                storage=self._name, path="", message=f"{self.address.path} may not be looked at"
            )
        elif isinstance(error, asyncssh.SFTPNoSuchFile):
            message = f"its root {self.address.path} is not there"
        else:
            message = f"{self.address}: {one_line(error)}"
        return StorageUnavailableError(storage=self._name, message=message)

    def close(self) -> None:
        """End all connections."""
        for session in self._sessions:
            session.connection.abort()
        self._sessions = []


def end(connections: Connections) -> None:
    """Have the loop close ``connections``, from any thread."""
    if _background.has_begun():
        _background.loop().call_soon_threadsafe(connections.close)


def read_host_keys(name: str, host_keys: str) -> str:
    """The lines of known_hosts that ``host_keys`` gives or names.

    Raises
    ------
    InvalidValueError
        if there are none.
    """
    text = host_keys
    if host_keys.startswith("/"):
        try:
            text = Path(host_keys).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
    try:
        asyncssh.import_known_hosts(text)
    except ValueError:
        text = ""
    if not any(map(_is_host_key, text.splitlines())):
        raise InvalidValueError(
            what=f"host_keys of storage {name}",
            value=host_keys,
            expected="a line of a known_hosts file or the path of one, see 'ssh-keyscan'",
        )
    return text


def _is_host_key(line: str) -> bool:
    """Whether a line of known_hosts has a key; asyncssh leaves out those that it cannot read."""
    words = line.split(None, 2 if line.startswith("@") else 1)
    for load in (asyncssh.import_public_key, asyncssh.import_certificate):
        with suppress(asyncssh.KeyImportError, IndexError):
            load(words[-1])
            return True
    return False


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return str(error).split("\n")[0][:300] or type(error).__name__
