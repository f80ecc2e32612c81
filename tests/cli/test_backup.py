"""``dlm backup``, ``dlm db restore``, ``dlm storage export`` and ``dlm rebuild``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.site import Dlm, refused

Settle = Callable[[], None]


@pytest.fixture
def other(other_database_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Change over to another catalogue, an empty one."""
    return lambda: monkeypatch.setenv("DLM_DATABASE_URL", other_database_url)


@pytest.fixture
def filled(dlm: Dlm, storages: dict[str, Path], settle: Settle) -> dict[str, Path]:
    """One item with two copies."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("register", "a", "--collection", "eb-1")
    settle()
    return storages


def test_a_backup_goes_round(
    dlm: Dlm, filled: object, tmp_path: Path, other: Callable[[], None]
) -> None:
    """Made, restored into another database, told in words, and confirmed once."""
    file = tmp_path / "x.dump"
    made = dlm("backup", str(file))
    assert made.code == 0 and "1 items, 2 replicas" in made.out
    assert dlm("backup", str(tmp_path), "--json").json["replicas"] == 2
    other()
    back = dlm("db", "restore", str(file))
    assert back.code == 0 and "no item expires before 'dlm db confirm'" in back.out
    assert "2 READY" in dlm("status").out
    assert dlm("db", "confirm").code == 0
    refused(dlm("db", "confirm"), "DLM-102", 2)
    assert dlm("db", "distrust", "a volume's snapshot").code == 0
    assert "recovered" in dlm("audit", "--since", "1h").out


def test_wrong_backups_are_refused_in_one_line(dlm: Dlm, filled: object, tmp_path: Path) -> None:
    """A file that is there, a folder that is not, a backup that is none, a database with items."""
    file = tmp_path / "x.dump"
    assert dlm("backup", str(file)).code == 0
    refused(dlm("backup", str(file)), "DLM-101", 2)
    refused(dlm("backup", str(tmp_path / "not" / "there")), "DLM-101", 2)
    refused(dlm("db", "restore", str(tmp_path / "not-there")), "DLM-101", 2)
    refused(dlm("db", "restore", str(file)), "DLM-507", 6)
    file.write_bytes(b"x")
    refused(dlm("db", "restore", str(file)), "DLM-400", 5)


def test_a_description_goes_round(
    dlm: Dlm,
    filled: dict[str, Path],
    tmp_path: Path,
    other: Callable[[], None],
) -> None:
    """Exported by command, rebuilt from folders named on the command line and from a file."""
    told = dlm("storage", "export", "a")
    assert told.code == 0
    assert "storage a carries description 1: 1 replicas in 2 files, 2 of them new" in told.out
    assert dlm("storage", "export", "b", "--full", "--json").json["replicas"] == 1
    other()
    listed = tmp_path / "storages.toml"
    listed.write_text(f"[[storage]]\ninterface = 'posix'\nroot = '{filled['b']}'\n")
    made = dlm("rebuild", "--storage", f"posix:{filled['a']}", "--from", str(listed))
    assert made.code == 0, made.error
    assert "1 items, 2 replicas, 1 collections, 0 holds on " in made.out
    assert "2 SUSPECT" in dlm("status").out
    again = dlm("rebuild", "--storage", f"posix:{filled['a']}", "--json")
    assert "is not empty" in refused(again, "DLM-507", 6)


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["rebuild"], "DLM-101", 2),
        (["rebuild", "--storage", "posix"], "DLM-101", 2),
        (["rebuild", "--storage", "posix:"], "DLM-101", 2),
        (["rebuild", "--storage", "tape:/x"], "DLM-101", 2),
        (["rebuild", "--storage", "posix:relative"], "DLM-101", 2),
        (["rebuild", "--storage", "posix:/,mount"], "DLM-101", 2),
        (["rebuild", "--storage", "posix:/not-there-at-all"], "DLM-301", 4),
        (["rebuild", "--from", "/not-there-at-all"], "DLM-101", 2),
        (["storage", "export", "nothing"], "DLM-102", 2),
    ],
)
def test_wrong_use_is_one_line(dlm: Dlm, arguments: list[str], code: str, exit_code: int) -> None:
    """What is wrong, and what would be right."""
    refused(dlm(*arguments), code, exit_code)


def test_a_storage_without_a_description_is_told(dlm: Dlm, tmp_path: Path) -> None:
    """Nothing to rebuild from: say how it would have come there."""
    line = refused(dlm("rebuild", "--storage", f"posix:{tmp_path}"), "DLM-101", 2)
    assert "dlm storage export" in line
    bad = tmp_path / "bad.toml"
    for text in ("[[storage]]\nroot='/x'\n", "storage = 3\n", "x = [", "storage = ['x']\n"):
        bad.write_text(text)
        refused(dlm("rebuild", "--from", str(bad)), "DLM-101", 2)
