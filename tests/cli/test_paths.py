"""``dlm storage add`` and ``set --path-rules``, and ``dlm storage path``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlm_core.types import uri_bucket
from tests.cli.site import Dlm, refused

TOML = r"""
[[rule]]
match = 'ska:(?P<block>eb-[0-9]+)/(?P<rest>.*)'
template = "{block}/{hash:2}/{rest}"

[[rule]]
steps = [
  { match = "lofar:(.*)", template = "/projects/{1}" },
  { match = "/projects/([^/]+)/(.*)", template = "lofar-{1}/{2}" },
]
"""
YAML = "- match: 'ska:(.*)'\n  template: 'all/{name}'\n"


def test_rules_come_from_a_file_and_are_tried_first(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """A dry run changes nothing; after the change each item is told where it would lie."""
    (storages["a"] / "eb-1").mkdir()
    (storages["a"] / "eb-1" / "x").write_bytes(b"1")
    assert dlm("register", "a", "--scheme", "ska").code == 0
    file = tmp_path / "rules.toml"
    file.write_text(TOML)
    usual = dlm("storage", "path", "b", "ska:eb-1/x").out
    tried = dlm("storage", "set", "b", "--path-rules", str(file), "--dry-run")
    head = uri_bucket("ska:eb-1/x")[:2]
    assert f"eb-1/{head}/x" in tried.out and "tried on 1 items: 1 by rule 1" in tried.out
    assert dlm("storage", "path", "b", "ska:eb-1/x").out == usual == "ska/eb-1/x\n"
    assert dlm("storage", "set", "b", "--path-rules", str(file)).code == 0
    assert dlm("storage", "path", "b", "ska:eb-1/x").out == f"eb-1/{head}/x\n"
    told = dlm("storage", "path", "b", "lofar:L1/a/b", "--json").json
    assert (told["path"], told["rule"], told["state"]) == ("lofar-L1/a/b", 2, None)
    assert dlm("storage", "path", "a", "ska:eb-1/x", "--json").json["path"] == "eb-1/x"
    assert dlm("storage", "show", "b", "--json").json["path_rules"][0]["steps"]
    assert dlm("storage", "set", "b", "--path-rules", "none").code == 0
    assert dlm("storage", "path", "b", "ska:eb-1/x").out == usual


def test_rules_that_would_let_copies_meet_are_refused(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """In one line that names both; the exit code is that of bad input."""
    for folder in ("1", "2"):
        (storages["a"] / folder).mkdir()
        (storages["a"] / folder / "x").write_bytes(b"1")
    dlm("register", "a", "--scheme", "ska")
    file = tmp_path / "rules.yaml"
    file.write_text(YAML)
    told = refused(dlm("storage", "set", "b", "--path-rules", str(file)), "DLM-107", 2)
    assert "ska:1/x" in told and "ska:2/x" in told


def test_a_new_storage_has_its_rules_from_the_first(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """They are tried on what is there as those of an old one are; rules that are refused leave no
    storage behind."""
    for folder in ("1", "2"):
        (storages["a"] / folder).mkdir()
        (storages["a"] / folder / "x").write_bytes(b"1")
    dlm("register", "a", "--scheme", "ska")
    root, file = tmp_path / "new", tmp_path / "rules.yaml"
    root.mkdir()
    where = dlm("storage", "show", "b", "--json").json["location"]
    add = ("storage", "add", "new", "--location", where, "--root", str(root), "--path-rules")
    file.write_text(YAML)
    told = refused(dlm(*add, str(file)), "DLM-107", 2)
    assert "ska:1/x" in told and "ska:2/x" in told
    for text in ("- match: '('\n", "- match: 'ska:(.*)'\n  template: '.dlm/{1}'\n"):
        file.write_text(text)
        refused(dlm(*add, str(file)), "DLM-101", 2)
    refused(dlm(*add, str(tmp_path / "none.yaml")), "DLM-101", 2)
    refused(dlm("storage", "show", "new"), "DLM-102", 2)
    file.write_text("- match: 'ska:(.*)/(.*)'\n  template: 'all/{1}-{2}'\n")
    done = dlm(*add, str(file))
    assert done.code == 0 and "tried on 2 items: 2 by rule 1" in done.out
    assert dlm("storage", "path", "new", "ska:1/x").out == "all/1-x\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rules.toml", "[[rule]\n"), ("rules.yaml", "a: [\n"), ("rules.json", "[]"),
        ("rules.toml", "other = 1\n"), ("rules.yaml", "[]"), ("rules.yaml", "- match: '('\n"),
        ("rules.yaml", "text"), ("none.toml", None),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_rules_is_refused(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, name: str, text: str | None
) -> None:
    """In one line."""
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(dlm("storage", "set", "b", "--path-rules", str(tmp_path / name)), "DLM-101", 2)
    refused(dlm("storage", "set", "b", "--mode", "offline", "--dry-run"), "DLM-101", 2)
    refused(dlm("storage", "path", "b", "no uri"), "DLM-101", 2)
    refused(dlm("storage", "path", "nowhere", "ska:x"), "DLM-102", 2)
