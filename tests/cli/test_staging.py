"""``dlm stage``, and what is told of a storage that stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.site import Dlm, refused
from tests.tape import Tape


@pytest.fixture
def tape(dlm: Dlm, storages: dict[str, Path], tmp_path: Path) -> Tape:
    """A third storage, on tape, added by command."""
    root = tmp_path / "tape"
    root.mkdir()
    found = Tape(root, tmp_path / "hsm")
    assert dlm("location", "add", "vault").code == 0
    added = dlm(
        "storage", "add", "tape", "--location", "vault", "--root", str(root), "--class", "tape",
        "--config", "stage=command", "--config", f"stage_command='{found.base}/stage'",
    )  # fmt: skip
    assert added.code == 0, added.error
    return found


def test_items_are_staged_by_hand_and_it_is_told(
    dlm: Dlm, tape: Tape, settle: Callable[[], None]
) -> None:
    """One request for what is named; status, the storage and the item tell that it waits."""
    for name in ("x", "y"):
        (tape.root / name).write_bytes(b"bytes")
    assert dlm("register", "tape", "--scheme", "t").code == 0
    for name in ("a", "b"):
        dlm("storage", "set", name, "--mode", "read_only")
    settle()
    tape.migrate()
    assert dlm("stage", "t:x", "t:y").out.startswith("2 copies will be staged")
    assert dlm("stage", "t:x").out.startswith("0 copies")
    settle()
    assert tape.calls() == [["x", "y"]]
    assert "storage tape: 2 files wait for staging, since" in dlm("status").out
    assert dlm("status", "--json").json["staging"][0]["files"] == 2
    assert dlm("storage", "show", "tape", "--json").json["staging"]["asked"] == 2
    assert "staging_files" in dlm("storage", "show", "tape").out
    told = dlm("item", "why", "t:x").out
    assert (
        "stage on tape, due" in told
        and ": asked for [DLM-308:" in told
        and "waits for staging since" in told
    )
    # between two looks nothing is due; it is waited for all the same
    refused(dlm("item", "wait", "t:x", "--timeout", "0s"), "DLM-601", 1)


def test_terms_are_changed_and_tried(dlm: Dlm, tape: Tape) -> None:
    """Only keys about staging, and the mount; what does not fit changes nothing."""
    assert dlm("storage", "set", "tape", "--config", "stage_batch=7").code == 0
    assert dlm("storage", "show", "tape", "--json").json["config"]["stage_batch"] == "7"
    before = dlm("storage", "show", "tape", "--json").json["config"]
    for pair in ("stage_batch=none", "host=x", "mount=x", "stage=robot", "stage_command="):
        refused(dlm("storage", "set", "tape", "--config", pair), "DLM-101", 2)
    assert dlm("storage", "show", "tape", "--json").json["config"] == before
    pairs = ("stage=", "stage_command=", "stage_batch=")
    options = [word for pair in pairs for word in ("--config", pair)]
    assert dlm("storage", "set", "tape", *options).code == 0
    assert dlm("storage", "set", "tape", "--config", "mount=/").code == 0
    assert dlm("storage", "show", "tape", "--json").json["config"] == {"mount": "/"}


def test_what_cannot_be_staged_is_refused(dlm: Dlm, tape: Tape) -> None:
    """Nothing named, or nothing known by that name."""
    refused(dlm("stage"), "DLM-106", 2)
    refused(dlm("stage", "t:nothing"), "DLM-102", 2)
    refused(dlm("stage", "--collection", "nothing"), "DLM-102", 2)
