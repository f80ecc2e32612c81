"""Real servers for tests, on free loopback ports, each a process that is ended by its id."""

from __future__ import annotations

import base64
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

USER = "dlm"
_GIVEN: set[int] = set()


@dataclass
class Server:
    """A server process on a port of its own; it can be killed and started again."""

    command: Sequence[str]
    log: Path
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"no server on port {self.port}: {self.log.read_text()[-500:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, with SIGKILL if it does not go."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class DavServer(Server):
    """A WebDAV server with one user; ``folder`` is what it serves."""

    folder: Path = Path()
    password: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_collection(self) -> str:
        """The URL of a new collection, made through the server: some keep what they listed."""
        name = uuid.uuid4().hex
        basic = base64.b64encode(f"{USER}:{self.password}".encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("MKCOL", f"/{name}/", headers={"Authorization": f"Basic {basic}"})
        assert connection.getresponse().status == 201
        connection.close()
        return f"{self.url}/{name}"

    @property
    def config(self) -> dict[str, str]:
        """The config of a storage on it: its password by reference."""
        return {"user": USER, "password": f"file:{self.folder.parent}/password"}


@dataclass
class ArchiveServer(Server):
    """moto's S3: the one with archive classes and RestoreObject, and that keeps only the newest of
    an upload's parts, as S3 does. It accepts any key and checks no checksum, so nothing else is
    tested against it."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, *, looks: int = 2) -> str:
        """A new bucket; a restore is over after so many HEADs of its object."""
        name = f"b{uuid.uuid4().hex}"
        transition = {"progression": "manual", "times": looks}
        body = json.dumps({"model_name": "s3::keyrestore", "transition": transition})
        self._ask("POST", "/moto-api/state-manager/set-transition", body)
        self._ask("PUT", f"/{name}", "")
        return name

    def _ask(self, verb: str, path: str, body: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(verb, path, body, {"Content-Type": "application/json"})
        assert connection.getresponse().status in (200, 201)
        connection.close()


@contextmanager
def archive_server(folder: Path) -> Iterator[ArchiveServer]:
    """A moto server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = ArchiveServer(command, folder / "moto.log", port)
    with running(server):
        yield server


def free_port() -> int:
    """A loopback port that is free, and below those that the system gives to who asks for any: it
    is still free when its server comes up, and comes up again. Clients remember servers by their
    ports, so that none is given twice."""
    while True:
        port = 10_000 + secrets.randbelow(6_000)
        if port in _GIVEN:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _GIVEN.add(port)
            return port


@contextmanager
def packages_fetched_by_one() -> Iterator[None]:
    """Nobody else fetches packages meanwhile: one of two 'apt-get update' fails, and what another
    worker is just installing is there before it can be used."""
    with Path(tempfile.gettempdir(), f"dlm-test-apt-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tool(name: str) -> str:
    """A program that a wheel brought."""
    return str(Path(sysconfig.get_path("scripts"), name))


@contextmanager
def running(server: Server) -> Iterator[None]:
    """``server``, until the end of the block."""
    server.start()
    try:
        yield
    finally:
        server.stop()


def _dav(folder: Path, log: str) -> DavServer:
    root = folder / "root"
    root.mkdir(parents=True)
    server = DavServer([], folder / log, free_port(), folder=root, password=secrets.token_hex(12))
    (folder / "password").write_text(server.password)
    return server


@contextmanager
def wsgidav_server(folder: Path) -> Iterator[DavServer]:
    """WsgiDAV from its wheel, on cheroot."""
    server = _dav(folder, "wsgidav.log")
    config = {
        "host": "127.0.0.1",
        "port": server.port,
        "provider_mapping": {"/": str(server.folder)},
        "simple_dc": {"user_mapping": {"*": {USER: {"password": server.password}}}},
        "http_authenticator": {"accept_digest": False, "default_to_digest": False},
        "logging": {"enable": False},
        "verbose": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    server.command = [tool("wsgidav"), "--config", str(folder / "config.json")]
    with running(server):
        yield server


@contextmanager
def rclone_webdav_server(folder: Path, *, folding: bool = False) -> Iterator[DavServer]:
    """'rclone serve webdav' from its wheel; ``folding``: case and the forms of a letter make no
    other name, as on some file systems."""
    server = _dav(folder, "rclone.log")
    server.command = [
        tool("rclone"), "serve", "webdav", str(server.folder), "--addr", f"127.0.0.1:{server.port}",
        "--vfs-case-insensitive" if folding else "--no-unicode-normalization",
    ]  # fmt: skip
    server.environment = {
        "RCLONE_CONFIG": os.devnull, "RCLONE_USER": USER, "RCLONE_PASS": server.password,
    }  # fmt: skip
    with running(server):
        yield server


@contextmanager
def rclone_web_server(folder: Path) -> Iterator[str]:
    """'rclone serve http' of ``folder``, which sends ranges; its URL."""
    port = free_port()
    command = [tool("rclone"), "serve", "http", str(folder), "--addr", f"127.0.0.1:{port}"]
    server = Server(command, folder.parent / "rclone-web.log", port)
    server.environment = {"RCLONE_CONFIG": os.devnull}
    with running(server):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Python's own web server, with pages that list ``folder``; its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    server = Server([*command, "--directory", str(folder)], folder.parent / "web.log", port)
    with running(server):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def answering(
    status: int,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    other: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer to everything, but for ``other`` statuses of targets with
    these in them (0: it hangs up); yields its URL and what it was told."""
    heard: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heard.append((self.command, self.path, dict(self.headers)))
            told = next((s for name, s in (other or {}).items() if name in self.path), status)
            if not told:
                self.close_connection = True
                return
            self.send_response(told)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer
        do_PROPFIND = do_MKCOL = do_MOVE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()
