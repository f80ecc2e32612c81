"""What a command advises is what helps, and what it shows is what would be done."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dlm_cli.services import stop_on_signals
from tests.cli.site import Dlm, refused


def register(dlm: Dlm, *more: str, phase: str = "LIQUID") -> None:
    assert dlm("register", "a", "--scheme", "ska", "--target-phase", phase, *more).code == 0


def test_a_storage_that_cannot_retire_says_what_is_to_be_done_or_waited_for(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """To drain it; nothing while its drain goes on; to wait for its trash; to withdraw what was
    announced and never let in, of which the drain tells too."""
    (storages["a"] / "x").write_bytes(b"x")
    register(dlm)
    settle()
    assert "drain it first" in refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    dlm("storage", "drain", "a")
    assert "its drain goes on" in refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    settle()
    told = refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    assert "(1 TRASHED); what is in its trash goes by itself" in told
    dlm("storage", "set", "a", "--mode", "read_write")
    (storages["a"] / "y").write_bytes(b"y")
    register(dlm, "y")
    dlm("storage", "drain", "a")
    told = refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    assert "(1 PENDING, 1 TRASHED)" in told and "then dlm withdraw URI" in told
    assert dlm("storage", "show", "a", "--json").json["drain"]["announced"] == 1


def test_older_versions_are_followed_by_what_is_told(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """The hint of a restore, checks and retries name the version where there are several."""
    (storages["a"] / "it's x").write_bytes(b"1")
    register(dlm, phase="SOLID")
    settle()
    (storages["a"] / "it's x").write_bytes(b"other")
    register(dlm, "--new-version")
    settle()
    uri = "ska:it's%20x"
    assert dlm("expire", uri, "--version", "1", "--reason", "r").code == 0
    due = dlm("expire", "--dry-run", "--json").json
    assert {(one["uri"], one["version"]) for one in due} == {(uri, 1)}
    assert "b" in [one["storage"] for one in due]
    settle()
    told = dlm("restore", uri, "--version", "1")
    assert told.out.endswith("dlm item why 'ska:it'\"'\"'s%20x' --version 1\n")
    settle()
    assert "copies will be read again" in dlm("verify", uri, "--version", "1").out
    assert "0 queued" in dlm("retry", "--item", uri, "--version", "1").out
    refused(dlm("verify", "--all", "--version", "1"), "DLM-101", 2)
    refused(dlm("retry", "--version", "1"), "DLM-101", 2)


def test_a_dry_run_of_expiry_tells_the_limit_that_stops_it(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Else it would show what is not going to happen."""
    for name in "xy":
        (storages["a"] / name).write_bytes(b"x")
    register(dlm)
    settle()
    for name in "xy":
        dlm("expire", f"ska:{name}", "--reason", "r")
    assert dlm("expire", "--dry-run").error == ""
    monkeypatch.setenv("DLM_MAX_DELETE_ITEMS", "1")
    told = dlm("expire", "--dry-run", "--json")
    assert len(told.json) == 2
    assert "nothing of it would be trashed: stopped by DLM_MAX_DELETE_ITEMS=1" in told.error


def test_wrong_checksums_are_taken_back_by_withdrawing(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], tmp_path: Path
) -> None:
    """Registering again with the right ones is refused, and says how."""
    (storages["a"] / "x").write_bytes(b"x")
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  x\n")
    register(dlm, "--checksums", str(sums))
    settle()
    sums.write_text(f"{hashlib.sha256(b'x').hexdigest()}  x\n")
    again = dlm("register", "a", "--scheme", "ska", "--checksums", str(sums))
    assert again.code == 2 and "'dlm withdraw' takes it back" in again.out + again.error
    assert dlm("withdraw", "ska:x", "--reason", "wrong sums").code == 0
    register(dlm, "--checksums", str(sums), "--new-version")
    settle()
    assert dlm("item", "show", "ska:x", "--json").json["state"] == "READY"


def test_the_embedded_server_is_stopped_only_where_it_is_ours(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that the site gave; none that runs is fine."""
    assert "DLM_DATABASE_URL" in refused(dlm("db", "stop"), "DLM-101", 2)
    monkeypatch.delenv("DLM_DATABASE_URL")
    stopped = dlm("db", "stop")
    assert (stopped.code, stopped.out) == (0, "it was not running\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_stops_services_in_order(ignored: bool) -> None:
    """As Ctrl-C does; under nohup they go on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        stop = threading.Event()
        with stop_on_signals(stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.wait(0.2) is not ignored
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
