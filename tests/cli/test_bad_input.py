"""Whatever is wrong is told in one line, with a code, and nothing is changed."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue.engine import begin, rows
from tests.cli.site import Dlm, refused

#: what is wrong, and the code that tells of it
_WRONG = [
    (["nonsense"], "DLM-100"),
    (["storage", "add"], "DLM-100"),
    (["item", "list", "--limit", "0"], "DLM-100"),
    (["item", "list", "--state", "FINE"], "DLM-101"),
    (["item", "show", "test:nothing"], "DLM-102"),
    (["item", "why", "test:nothing"], "DLM-102"),
    (["item", "events", "test:nothing"], "DLM-102"),
    (["location", "add", "has space"], "DLM-101"),
    (["location", "add", "x", "--country", "Germany"], "DLM-101"),
    (["location", "add", "here"], "DLM-103"),
    (["storage", "show", "nope"], "DLM-102"),
    (["storage", "set", "nope", "--mode", "offline"], "DLM-102"),
    (["storage", "set", "a", "--mode", "asleep"], "DLM-101"),
    (["storage", "set", "a", "--capacity", "much"], "DLM-101"),
    (["storage", "set", "a", "--low-watermark", "0.95"], "DLM-101"),
    (["storage", "set", "a", "--trash-grace", "7 parsecs"], "DLM-101"),
    (["storage", "add", "c", "--location", "here", "--root", "relative"], "DLM-101"),
    (["storage", "add", "c", "--location", "here", "--root", "/x", "--config", "k"], "DLM-101"),
    (["register", "nope"], "DLM-102"),
    (["register", "a", "--expires", "2030-01-01T00:00"], "DLM-101"),
    (["register", "a", "--scheme", "Not A Scheme"], "DLM-101"),
    (["register", "a", "--tag", "novalue"], "DLM-101"),
    (["register", "a", "--owner", ""], "DLM-101"),
    (["register", "a", "--as-directory", "", "--collection", "typo"], "DLM-106"),
    (["register", "a", "--as-directory", "*.ms/"], "DLM-101"),
    (["watch", "add", "a", "--as-directory", "", "--collection", "typo"], "DLM-106"),
    (["register", "a", "/etc"], "DLM-101"),
    (["register", "a", "--collection", "two\nlines"], "DLM-101"),
    (["watch", "add", "a", "--owner", "\x1b[2J"], "DLM-101"),
    (["expire"], "DLM-106"),
    (["expire", "test:nothing"], "DLM-101"),
    (["expire", "test:nothing", "--reason", "r"], "DLM-102"),
    (["expire", "test:nothing", "--reason", " "], "DLM-101"),
    (["restore", "test:nothing"], "DLM-102"),
    (["verify"], "DLM-106"),
    (["verify", "--storage", "nope"], "DLM-102"),
    (["watch", "remove", "a", "x"], "DLM-102"),
    (["watch", "add", "a", "/etc"], "DLM-101"),
    (["withdraw", "--failed", "--reason", "r", "--version", "1"], "DLM-101"),
    (["expire", "--dry-run", "--version", "1"], "DLM-101"),
    (["watch", "add", "a", "--every", "often"], "DLM-101"),
    (["watch", "add", "a", "--scheme", "No Scheme"], "DLM-101"),
    (["register", "a", "--expires", "2300-01-01T00:00Z"], "DLM-101"),
    (["register", "a", "--prefix", "/absolute/"], "DLM-101"),
    (["item", "show", "file:x", "--version", "2147483648"], "DLM-100"),
    (["item", "show", "\udcff"], "DLM-100"),
    (["storage", "add", "a\nb", "--location", "here", "--root", "relative"], "DLM-101"),
    (["storage", "path", "a", "file:x", "--version", "2147483648"], "DLM-100"),
    (["db", "distrust", ""], "DLM-101"),
    (["verify", "--storage", ""], "DLM-102"),
    (["retry", "--item", ""], "DLM-102"),
    (["retry", "--kind", ""], "DLM-101"),
    (["watch", "add", "a", "--every", "0s"], "DLM-101"),
    (["watch", "add", "a", "--target-phase", "METAL"], "DLM-101"),
    (["watch", "add", "a", "--collection", ""], "DLM-101"),
    (["watch", "add", "nope", "--collection", "typo"], "DLM-102"),
    (["watch", "add", "a", ".dlm", "--collection", "typo"], "DLM-101"),
    (["register", "a", "--expires", "2001-01-01T00:00Z"], "DLM-101"),
    (["register", "a", "--replica-expires", "2001-01-01T00:00Z"], "DLM-101"),
    (["register", "a", "--by", "2001-01-01T00:00Z"], "DLM-101"),
    (["item", "set", "file:x", "--by", "2001-01-01T00:00Z"], "DLM-101"),
    (["register", "a", "--collection", ""], "DLM-101"),
    (["item", "list", "--after", "junk"], "DLM-101"),
    (["item", "list", "--after", "file:x#junk"], "DLM-101"),
    (["item", "list", "--after", "file:x#"], "DLM-101"),
    (["item", "list", "--after", "file:x#0"], "DLM-101"),
    (["link", "set", "a", "a", "--max-concurrency", "3"], "DLM-101"),
    (["storage", "set", "a"], "DLM-101"),
    (["storage", "set", "a", "--capacity", "0"], "DLM-101"),
    (["storage", "set", "a", "--config", "mount=", "--phase", "GAS"], "DLM-101"),
    (["storage", "set", "a", "--path-rules", "none", "--capacity", "1TB"], "DLM-101"),
    (["storage", "set", "a", "--path-rules", "none", "--config", "mount="], "DLM-101"),
    (["expire", "file:x", "--at", "now", "--never"], "DLM-101"),
    (["expire", "file:x", "--dry-run"], "DLM-101"),
    (["expire", "--dry-run", "--storage", "a"], "DLM-101"),
    (["verify", "file:x", "--all"], "DLM-101"),
    (["register", "a", "x", "--list", "-"], "DLM-101"),
    (["hold", "add", "file:x", "--reason", "r", "--version", "99999999999"], "DLM-100"),
    (["run", "replication", "--timeout", "5"], "DLM-101"),
    (["run", "expiry", "--dry-run", "--config", "dry_run=false"], "DLM-101"),
    (["run", "expiry", "--dry-run", "--config", "dry_run=no"], "DLM-101"),
]


def test_bad_input_is_one_line_and_exit_code_2(dlm: Dlm, storages: Any, engine: Engine) -> None:
    """Whatever is wrong with the arguments: one line on stderr with a code, nothing on stdout, and
    nothing is changed. In one catalogue, since nothing is: each case would cost one of its own."""

    def told() -> list[dict[str, Any]]:
        with begin(engine, "test") as connection:
            return rows(connection, "SELECT count(*) AS n, max(seq) AS last FROM event")

    before = told()
    for arguments, code in _WRONG:
        result = dlm(*arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert f" {code}: " in refused(result, code, 2), arguments
    assert told() == before


@pytest.mark.parametrize(
    "more",
    [
        ["a", "--tag", "novalue"],
        ["nope"],
        ["a", "--by", "soon"],
        ["a", "--expires", "2001-01-01T00:00Z"],
    ],
)
def test_a_refused_registration_makes_no_collection(
    dlm: Dlm, storages: Any, engine: Engine, more: list[str]
) -> None:
    """Nothing is changed by what is refused."""
    assert dlm("register", *more, "--collection", "typo").code == 2
    with begin(engine, "test") as connection:
        assert rows(connection, "SELECT name FROM collection") == []


def test_an_empty_name_of_a_storage_does_not_stand_for_all(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """A shell's unset variable must not let the whole item expire."""
    (storages["a"] / "x").write_bytes(b"x")
    dlm("register", "a")
    settle()
    refused(dlm("expire", "file:x", "--storage", "", "--reason", "r"), "DLM-102", 2)
    assert dlm("item", "show", "file:x", "--json").json["expires_at"] is None


def test_a_folder_is_watched_once(dlm: Dlm, storages: Any) -> None:
    """A second watch on it is refused by name."""
    assert dlm("watch", "add", "a", "in").code == 0
    assert "'in'" in refused(dlm("watch", "add", "a", "in", "--every", "1m"), "DLM-103", 2)


def test_json_tells_names_that_are_no_utf8(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """What was refused with such a name is told as any other."""
    (tmp_path / "names").write_bytes(b"\xff\n")
    told = dlm("register", "a", "--list", str(tmp_path / "names"), "--json")
    assert (told.code, told.json["refused"]) == (2, 1)
    assert told.json["reasons"][0]["path"] == "\udcff"


def test_a_storage_that_is_not_there_is_not_added(dlm: Dlm, tmp_path: Path) -> None:
    """The root is looked at before the storage gets into the catalogue."""
    dlm("location", "add", "here")
    root = str(tmp_path / "missing")
    result = dlm("storage", "add", "x", "--location", "here", "--root", root)
    refused(result, "DLM-301", 4)
    assert dlm("storage", "list", "--json").json == []


def test_a_storage_on_a_mounted_disk_knows_its_mount(dlm: Dlm, tmp_path: Path) -> None:
    """So the empty folder below a disk that went is no empty storage; who knows better says so."""
    dlm("location", "add", "here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        added = dlm("storage", "add", "x", "--location", "here", "--root", root)
        assert "unless something is mounted at /dev/shm" in added.out
        other = str(tmp_path)
        dlm("storage", "add", "y", "--location", "here", "--root", other, "--config", "mount=/")
        shown = {one["name"]: one["config"] for one in dlm("storage", "list", "--json").json}
        assert shown == {"x": {"mount": "/dev/shm"}, "y": {"mount": "/"}}


def test_a_secret_is_neither_kept_nor_repeated(dlm: Dlm, storages: Any) -> None:
    """A key given outright in a storage's config is refused, and not printed."""
    result = dlm(
        "storage", "add", "c", "--location", "here", "--interface", "s3", "--root", "bucket",
        "--config", "secret_access_key=hunter2",
    )  # fmt: skip
    assert "hunter2" not in refused(result, "DLM-101", 2)


@pytest.mark.parametrize("value", ["inf", "nan", "1e12", "-1"])
def test_a_time_that_is_none_is_refused(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """One that no clock can reach would end each run in the middle."""
    monkeypatch.setenv("DLM_LEASE_SECONDS", value)
    assert "DLM_LEASE_SECONDS" in refused(dlm("status"), "DLM-101", 2)


def test_a_home_that_cannot_be_used_is_told(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Below a file, on a disk that is full, without the right to write: one line with the path."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("DLM_DATABASE_URL")
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "file" / "home"))
    told = refused(dlm("db", "upgrade"), "DLM-209", 3)
    assert str(tmp_path / "file") in told


def test_a_home_of_nobody_is_refused(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """~name is a user's home."""
    monkeypatch.setenv("DLM_HOME", "~no-such-user/dlm")
    assert "DLM_HOME" in refused(dlm("status"), "DLM-101", 2)


def test_a_user_without_a_name_is_known_by_number(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under any number; who did what is told all the same."""

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert dlm("location", "add", "here").code == 0
    assert dlm("hold", "add", "--all", "--reason", "r").code == 0
    (hold,) = dlm("hold", "list", "--json").json
    assert hold["actor"] == f"user:{os.getuid()}"


def test_a_mistyped_home_is_told_and_not_made(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What only looks or registers starts no second, empty catalogue."""
    monkeypatch.delenv("DLM_DATABASE_URL")
    for command in (["status"], ["register", "a"], ["backup", str(tmp_path / "b")]):
        told = refused(dlm(*command), "DLM-201", 3)
        assert str(tmp_path / "home") in told and "dlm up" in told
    assert not (tmp_path / "home").exists()


def test_settings_that_make_no_sense_name_the_variable(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong DLM_ variable is told by name."""
    monkeypatch.setenv("DLM_BATCH_SIZE", "many")
    assert "DLM_BATCH_SIZE" in refused(dlm("status"), "DLM-101", 2)


def test_a_database_that_does_not_answer_is_told(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No server at the address: one line, exit code 3, and what says where it is."""
    monkeypatch.setenv("DLM_DATABASE_URL", f"postgresql://dlm@/dlm?host={tmp_path}")
    told = refused(dlm("status"), "DLM-201", 3)
    assert "DLM_DATABASE_URL" in told and "embedded" not in told


def test_a_database_without_schema_says_what_to_run(
    dlm: Dlm, monkeypatch: pytest.MonkeyPatch, empty_database_url: str
) -> None:
    """An empty database is refused with the command that helps, which then helps."""
    monkeypatch.setenv("DLM_DATABASE_URL", empty_database_url)
    assert "dlm db upgrade" in refused(dlm("status"), "DLM-202", 3)
    refused(dlm("db", "check"), "DLM-202", 3)
    assert dlm("db", "upgrade").code == 0
    assert dlm("db", "check").code == 0
    assert dlm("status").code == 0


def test_a_job_cannot_be_launched_without_services(dlm: Dlm) -> None:
    """Without 'dlm up' on this home: one line that says so, exit code 3."""
    assert "dlm up" in refused(dlm("run", "replication"), "DLM-203", 3)
