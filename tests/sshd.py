"""A real OpenSSH server for the tests: an sshd on a free loopback port, with throwaway keys."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.servers import free_port, packages_fetched_by_one

_SSHD = "/usr/sbin/sshd"
_READY_SECONDS = 60
_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication yes
MaxStartups 100
LogLevel ERROR
Subsystem sftp {sftp}
"""


class SshServer:
    """An sshd that may be stopped and started again; its key is in the variable ``key_name``."""

    def __init__(self, folder: Path, more: str = "", sftp: str = "internal-sftp") -> None:
        self.folder, self.user = folder, getpass.getuser()
        self.port = free_port()
        self.key_name = f"DLM_TEST_SSH_{uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("host", "user"):
            make_key(folder / name)
        config = _CONFIG.format(port=self.port, folder=folder, sftp=sftp)
        (folder / "config").write_text(config + more)
        os.environ[self.key_name] = (folder / "user").read_text()

    @property
    def host_keys(self) -> str:
        """The line of known_hosts."""
        kind, key = (self.folder / "host.pub").read_text().split()[:2]
        return f"[127.0.0.1]:{self.port} {kind} {key}"

    def root(self, folder: Path | str) -> str:
        """The root of a storage in ``folder``."""
        return f"{self.user}@127.0.0.1:{self.port}{folder}"

    def config(self, **more: object) -> dict[str, object]:
        """The config of a storage on this server, its key by reference."""
        return {"host_keys": self.host_keys, "key": f"env:{self.key_name}", **more}

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_SSHD, "-D", "-e", "-f", str(self.folder / "config")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                    if probe.recv(4) == b"SSH-":
                        return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"sshd does not come up: {(self.folder / 'log').read_text()}")

    def sessions(self) -> list[psutil.Process]:
        """The processes that serve connections."""
        return psutil.Process(self._process.pid).children(recursive=True) if self._process else []

    def stop(self, *, sessions: bool = True) -> None:
        """Kill it; ``sessions`` False lets live connections be."""
        if self._process is None:
            return
        others = self.sessions() if sessions else []
        for process in (self._process, *others):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        self._process = None


def make_key(path: Path) -> None:
    """A fresh pair of keys, at ``path`` and ``path.pub``."""
    path.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def ssh_server(folder: Path, more: str = "", sftp: str = "internal-sftp") -> Iterator[SshServer]:
    """A running server; ``more`` is added to its configuration, ``sftp`` serves files."""
    with packages_fetched_by_one():
        _need_sshd()
    server = SshServer(folder, more, sftp)
    server.start()
    try:
        yield server
    finally:
        lingering = server.sessions()
        server.stop()
        psutil.wait_procs(lingering, 5)
        del os.environ[server.key_name]


def _need_sshd() -> None:
    """Have Debian's server installed where we may; a person who is not root is told what to do."""
    root = os.geteuid() == 0
    if not Path(_SSHD).exists():
        if not root or shutil.which("apt-get") is None:
            pytest.skip("no /usr/sbin/sshd: install the package 'openssh-server'")
        install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq"]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*install, "update"], check=True, env=quiet)
        packages = ["--no-install-recommends", "openssh-server"]
        subprocess.run([*install, "install", "-y", *packages], check=True, env=quiet)
    if root:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
