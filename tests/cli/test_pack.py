"""``dlm storage pack``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.site import Dlm, refused
from tests.servers import USER, DavServer


def test_a_storage_is_packed_by_command(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, settle: Callable[[], None]
) -> None:
    """Told first, then done; a lost index is made anew, one that is whole is not."""
    vault = tmp_path / "vault"
    vault.mkdir()
    terms = ("--config", "bundle_bytes=1MiB", "--config", "bundle_after_hours=0")
    added = dlm("storage", "add", "vault", "--location", "there", "--root", str(vault), *terms)
    assert added.code == 0, added.error
    for n in range(5):
        (vault / f"file-{n}").write_bytes(b"%d" % n * 100)
    assert dlm("register", "vault").code == 0
    settle()
    told = dlm("storage", "pack", "vault", "--dry-run")
    assert told.out.startswith("storage vault: would pack 5 files (500 B) into 1 bundles")
    assert (vault / "file-0").exists()
    done = dlm("storage", "pack", "vault", "--json").json
    assert (done["members"], done["bundles"], done["refused"]) == (5, 1, [])
    assert not (vault / "file-0").exists()
    refused(dlm("storage", "pack", "vault", "--reindex"), "DLM-101", 2)
    shutil.rmtree(vault / ".dlm/bundles/log")
    found = dlm("storage", "pack", "vault", "--reindex")
    assert found.out.startswith("storage vault: index made anew: 5 members in 1 bundles; 0 damaged")
    assert dlm("storage", "test", "vault").code == 0


def test_what_cannot_be_packed_is_refused(dlm: Dlm, storages: dict[str, Path]) -> None:
    """In one line."""
    refused(dlm("storage", "pack", "a"), "DLM-101", 2)
    refused(dlm("storage", "pack", "nowhere"), "DLM-102", 2)
    refused(dlm("storage", "pack", "a", "--dry-run", "--reindex"), "DLM-101", 2)
    root = str(storages["a"])
    wrong = ("storage", "add", "c", "--location", "here", "--root", root)
    refused(dlm(*wrong, "--config", "bundle_below=1MiB"), "DLM-101", 2)
    refused(dlm(*wrong, "--config", "bundle_bytes=many"), "DLM-101", 2)


def test_from_a_shell_without_its_credential_a_storage_tells_what_to_do(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rclonedav: DavServer,
) -> None:  # fmt: skip
    """Whichever command it is that opens it: a line with what would be right."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "key").write_text(rclonedav.password)
    terms = (f"user={USER}", "password=credential:key", "bundle_bytes=1MiB")
    root = rclonedav.make_collection()
    where = ("--location", "there", "--interface", "webdav", "--root", root)
    add = ("storage", "add", "vault", *where, *(w for term in terms for w in ("--config", term)))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    wanted = "systemd-run --pty --property=LoadCredential=key:"
    assert wanted in refused(dlm(*add), "DLM-101", 2)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert dlm(*add).code == 0
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert wanted in refused(dlm("storage", "test", "vault"), "DLM-101", 2)
    assert wanted in dlm("storage", "pack", "vault").error
    assert dlm("storage", "set", "vault", "--mode", "offline").code == 0
    assert wanted in dlm("storage", "back", "vault").error
