"""Debian's XRootD server for the tests, fetched into the virtual environment, not installed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from tests.servers import Server, free_port, packages_fetched_by_one, running

_CACHE = Path(sys.prefix, "xrootd")
#: the second is what a server runs to fetch from another one
_PACKAGES = ("xrootd-server", "xrootd-client")
_LIBRARIES = ("xrootd", "libxrd", "libtinyxml")
_NOBODY = "65534"
_CONFIG = """
xrd.port {port}
xrd.allow host 127.0.0.1
xrd.allow host localhost
all.export /
oss.localroot {root}
all.adminpath {folder}/admin
all.pidpath {folder}/admin
xrootd.seclib libXrdSec.so
sec.protocol sss -s {folder}/keytab
sec.protbind * only sss
xrootd.async off
"""
_FETCHES = "ofs.tpc autorm pgm {programs}/usr/bin/xrdcp --server\n"


@dataclass
class XrootdServer(Server):
    """A server whose users prove themselves with a keytab; ``folder`` is what it serves."""

    folder: Path = Path()

    def root(self, path: str = "") -> str:
        """The root of a storage in the folder ``path`` of what it serves."""
        return f"root://127.0.0.1:{self.port}//{path}"

    def make_root(self) -> str:
        """The root of a storage in a new folder."""
        name = uuid.uuid4().hex
        (self.folder / name).mkdir()
        return self.root(name)

    @property
    def config(self) -> dict[str, str]:
        """The config of a storage on it: its keytab by reference."""
        return {"keytab": f"file:{self.folder.parent}/keytab"}


@contextmanager
def xrootd_server(folder: Path, more: str = "", *, fetches: bool = True) -> Iterator[XrootdServer]:
    """A running server with its data below ``folder``; ``more`` is added to its configuration.
    ``fetches``: whether it makes third-party copies."""
    programs = _programs()
    root = folder / "root"
    root.mkdir(parents=True)
    (folder / "admin").mkdir(mode=0o700)
    server = XrootdServer([], folder / "log", free_port(), folder=root)
    libraries = next(programs.glob("usr/lib/*/libXrdServer.so.*")).parent
    # the keytab is what it proves itself with where it fetches a file
    server.environment = {
        "LD_LIBRARY_PATH": str(libraries), "XrdSecSSSKT": str(folder / "keytab"),
    }  # fmt: skip
    (folder / "keytab").touch(mode=0o600)
    (folder / "keytab").write_bytes(_keytab())
    more += _FETCHES.format(programs=programs) if fetches else ""
    config = _CONFIG.format(port=server.port, folder=folder, root=root) + more
    (folder / "config").write_text(config)
    xrootd = [str(programs / "usr/bin/xrootd"), "-c", str(folder / "config"), "-n", "dlm"]
    server.command = [*_not_as_root(), *xrootd]
    with running(server):
        yield server


def make_keytab(path: Path) -> None:
    """A fresh key of the user 'dlm' at ``path``, in place of what is there."""
    programs = _programs()
    libraries = next(programs.glob("usr/lib/*/libXrdServer.so.*")).parent
    path.unlink(missing_ok=True)
    subprocess.run(
        [str(programs / "usr/bin/xrdsssadmin"), "-k", "dlm", "-u", "dlm", "add", str(path)],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)}, input=b"y\n", check=True,
        capture_output=True,
    )  # fmt: skip
    path.chmod(0o600)


@lru_cache(maxsize=1)
def _keytab() -> bytes:
    """One for all servers of this process: the client keeps to the first that it is shown."""
    with tempfile.TemporaryDirectory() as folder:
        make_keytab(Path(folder, "keytab"))
        return Path(folder, "keytab").read_bytes()


def _not_as_root() -> list[str]:
    """XRootD refuses to be root; in a namespace of its own it is nobody and reads our files."""
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "-U", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("XRootD does not run as root, and there are no user namespaces here")
    return prefix


def _programs() -> Path:
    """Where Debian's packages of the server are unpacked; they are fetched once."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("no XRootD server: this machine has no apt-get to fetch Debian's")
    with Path(f"{_CACHE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _CACHE.exists():
            _fetch(Path(f"{_CACHE}.part"))
    return _CACHE


def _fetch(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if not _download(part) and os.geteuid() == 0:
        update = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq", "update"]
        with packages_fetched_by_one():
            subprocess.run(update, check=False)  # without it there is nothing to fetch, told below
        _download(part)
    packages = list(part.glob("*.deb"))
    found = {one.name.partition("_")[0] for one in packages}
    if missing := set(_PACKAGES) - found:
        pytest.skip(f"no XRootD server: apt-get knows no package {min(missing)!r}")
    for package in packages:
        subprocess.run(["dpkg", "-x", str(package), str(part)], check=True)
        package.unlink()
    part.rename(_CACHE)


def _download(part: Path) -> bool:
    """Fetch the package and those of its own libraries that it needs; the rest is everywhere."""
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    command = ["apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in kinds), *_PACKAGES]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    needed = {line for line in told.splitlines() if line.startswith(_LIBRARIES)}
    if not needed.issuperset(_PACKAGES):
        return False
    fetch = subprocess.run(
        ["apt-get", "-qq", "download", *sorted(needed)], cwd=part, capture_output=True, check=False
    )
    return fetch.returncode == 0
