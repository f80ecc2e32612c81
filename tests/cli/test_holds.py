"""``dlm hold``: from the words of a user to what the expiry leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.site import Dlm, refused

Settle = Callable[[], None]


def _items(dlm: Dlm, storages: dict[str, Path], settle: Settle, *names: str) -> None:
    for name in names:
        (storages["a"] / name).parent.mkdir(parents=True, exist_ok=True)
        (storages["a"] / name).write_bytes(name.encode())
    dlm("register", "a", "--scheme", "ska", "--collection", "eb-1")
    settle()


def _state(dlm: Dlm, uri: str) -> str:
    return str(dlm("item", "show", uri, "--json").json["state"])


@pytest.mark.parametrize(
    "selector",
    [["ska:x/1"], ["--collection", "eb-1"], ["--matching", "ska:x/"],
     ["--matching", "ska:*1"], ["--all"]],
)  # fmt: skip
def test_a_hold_keeps_what_it_matches_until_it_is_released(
    dlm: Dlm, storages: dict[str, Path], settle: Settle, selector: list[str]
) -> None:
    """Held, the item does not expire though it is due; released, it does."""
    _items(dlm, storages, settle, "x/1")
    added = dlm("hold", "add", *selector, "--reason", "audit 7", "--as", "kim")
    assert added.code == 0, added.error
    assert dlm("expire", "ska:x/1", "--reason", "old").code == 0
    settle()
    assert _state(dlm, "ska:x/1") == "READY"
    (hold,) = dlm("hold", "list", "ska:x/1", "--json").json
    assert (hold["reason"], hold["actor"], hold["ends_at"]) == ("audit 7", "user:kim", None)
    assert "audit 7" in dlm("item", "why", "ska:x/1").out
    assert dlm("hold", "release", hold["hold_id"]).code == 0
    assert dlm("hold", "list", "--json").json == []
    assert dlm("hold", "list", "--ended", "--json").json[0]["in_force"] is False
    settle()
    assert _state(dlm, "ska:x/1") == "EXPIRED"


def test_a_lock_is_only_lengthened(dlm: Dlm, storages: dict[str, Path], settle: Settle) -> None:
    """Neither released nor shortened, by whomever; and a lock has an end."""
    _items(dlm, storages, settle, "1")
    refused(dlm("hold", "add", "ska:1", "--reason", "law", "--lock"), "DLM-101", 2)
    until = ["--until", "2190-01-01T00:00Z"]
    assert dlm("hold", "add", "ska:1", "--reason", "law", "--lock", *until).code == 0
    key = dlm("hold", "list", "--json").json[0]["hold_id"]
    refused(dlm("hold", "release", key), "DLM-505", 6)
    refused(dlm("hold", "extend", key, "--until", "2180-01-01T00:00Z"), "DLM-505", 6)
    assert dlm("hold", "extend", key, "--until", "2195-01-01T00:00Z").code == 0
    assert dlm("hold", "list", "--json").json[0]["ends_at"] == "2195-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--reason", "r"], "DLM-106"),
        (["--reason", "r", "--matching", ""], "DLM-106"),
        (["--reason", "r", "--matching", "*"], "DLM-106"),
        (["--reason", "r", "--matching", "*:x"], "DLM-106"),
        (["--reason", "r", "--matching", "ska:", "--all"], "DLM-106"),
        (["--reason", "r", "ska:nothing"], "DLM-102"),
        (["--reason", "r", "--collection", "nothing"], "DLM-102"),
        (["--all"], "DLM-101"),
        (["--all", "--reason", "r", "--until", "2020-01-01T00:00Z"], "DLM-101"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    dlm: Dlm, storages: dict[str, Path], arguments: list[str], code: str
) -> None:
    """An empty selector, one that matches every scheme, two at once, no reason, a past end."""
    refused(dlm("hold", "add", *arguments), code, 2)
    assert dlm("hold", "list", "--json").json == []


def test_selectors_are_shown_as_they_were_written(dlm: Dlm, storages: dict[str, Path]) -> None:
    """Also with characters that mean something in SQL."""
    for selector in ("ska:a_b%25/*.ms", "ska:a/?", "ska:plain_/"):
        assert dlm("hold", "add", "--matching", selector, "--reason", "r").code == 0
    shown = [one["target"] for one in dlm("hold", "list", "--json").json]
    assert shown == ["ska:plain_/", "ska:a/?", "ska:a_b%25/*.ms"]
