"""A storage behind SFTP, and one behind XRootD, by command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlm_core.storages.conformance import CHECKS
from tests.cli.site import Dlm, Result, refused
from tests.sshd import SshServer
from tests.xrootd import XrootdServer


@pytest.fixture
def server(sshd: SshServer) -> SshServer:
    return sshd


def add(dlm: Dlm, server: SshServer, root: Path, **config: str) -> Result:
    """``dlm storage add far`` on ``server``."""
    root.mkdir(exist_ok=True)
    dlm("location", "add", "hpc")
    pairs = {"host_keys": server.host_keys, "key": f"env:{server.key_name}", **config}
    options = [part for key, value in pairs.items() for part in ("--config", f"{key}={value}")]
    at = ["--location", "hpc", "--interface", "sftp", "--root", server.root(root)]
    return dlm("storage", "add", "far", *at, *options)


@pytest.mark.parametrize("shell", ["true", "false"])
def test_it_is_added_and_tested(dlm: Dlm, server: SshServer, tmp_path: Path, shell: str) -> None:
    """Every check of the contract passes, and nothing is left there; no secret is printed."""
    added = add(dlm, server, tmp_path / "far", shell=shell)
    assert added.code == 0, added.error
    tested = dlm("storage", "test", "far")
    assert (
        tested.code == 0
        and f"of {len(CHECKS)} checks passed" in tested.out
        and "FAILED" not in tested.out
    )
    left = [file.name for file in (tmp_path / "far").rglob("*") if file.is_file()]
    assert left == ["storage-id"]
    shown = dlm("storage", "show", "far").out
    secret = os.environ[server.key_name].splitlines()[3]
    assert server.key_name in shown and secret not in shown + tested.out + added.out


def test_nothing_is_at_work_at_the_end_of_a_command(server: SshServer, tmp_path: Path) -> None:
    """asyncio would tell of it on standard error: "Task was destroyed but it is pending!"."""
    config = server.config()
    script = f"""
import asyncio, atexit
from dlm_core.storages import ssh
from dlm_core.storages.open import open_storage
atexit.register(lambda: print(len(asyncio.all_tasks(ssh._background.loop()))))
storage = open_storage("far", "sftp", {server.root(tmp_path)!r}, {config!r})
storage.check()
assert asyncio.all_tasks(ssh._background.loop())
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


def test_an_xrootd_server_is_added_and_tested(dlm: Dlm, xrootd: XrootdServer) -> None:
    """The same; one that is not there is not added."""
    dlm("location", "add", "hpc")
    at = ["--location", "hpc", "--interface", "xrootd", "--config"]
    keytab = f"keytab={xrootd.config['keytab']}"
    refused(
        dlm("storage", "add", "far", *at, keytab, "--root", xrootd.root("nowhere")), "DLM-301", 4
    )
    added = dlm("storage", "add", "far", *at, keytab, "--root", xrootd.make_root())
    assert added.code == 0, added.error
    tested = dlm("storage", "test", "far")
    assert tested.code == 0 and f"{len(CHECKS)} of {len(CHECKS)} checks passed" in tested.out


def test_what_cannot_be_used_is_not_added(dlm: Dlm, server: SshServer, tmp_path: Path) -> None:
    """An unknown host, a key given and not named, one that is not there: a line with a code."""
    other = server.host_keys.replace("127.0.0.1", "127.0.0.2")
    for config, code, exit_code in (
        ({"host_keys": other}, "DLM-301", 4),
        ({"key": "hunter2hunter2"}, "DLM-101", 2),
        ({"key": "env:DLM_TEST_UNSET"}, "DLM-301", 4),
        ({"shell": "perhaps"}, "DLM-101", 2),
    ):
        told = refused(add(dlm, server, tmp_path / "far", **config), code, exit_code)
        assert "hunter2" not in told
    assert dlm("storage", "list", "--json").json == []
