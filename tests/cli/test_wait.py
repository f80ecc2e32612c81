"""``dlm item wait``: until nothing is being done about an item."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.site import Dlm, refused

URI = "file:x"


@pytest.fixture
def item(dlm: Dlm, storages: dict[str, Path]) -> str:
    """A file that was announced on one of two storages."""
    (storages["a"] / "x").write_bytes(b"12345")
    assert dlm("register", "a").code == 0
    return URI


def underway(dlm: Dlm) -> str:
    """What it waits for."""
    result = dlm("item", "wait", URI, "--timeout", "0s")
    refused(result, "DLM-601", 1)
    return result.out.strip()


def test_every_step_of_a_life_is_waited_for(
    dlm: Dlm, item: str, settle: Callable[[], None]
) -> None:
    """Announced, doubted, expired: each is told while it is due, and is over when all is done; the
    purge of what is in the trash, days later, is not waited for."""
    at_rest = (0, f"{URI} is at rest\n")
    assert underway(dlm) == "admit QUEUED"
    settle()
    result = dlm("item", "wait", item)
    assert (result.code, result.out) == at_rest
    dlm("verify", item)
    assert underway(dlm) == "verify QUEUED"
    settle()
    dlm("expire", item, "--reason", "superseded")
    assert underway(dlm) == "expiry"
    settle()
    result = dlm("item", "wait", item)
    assert (result.code, result.out) == at_rest
    dlm("restore", item)
    assert underway(dlm) == "restore QUEUED"


def test_what_waits_for_a_person_is_not_waited_for(
    dlm: Dlm, item: str, settle: Callable[[], None]
) -> None:
    """An item under a hold does not expire, however long one waits."""
    settle()
    assert dlm("hold", "add", item, "--reason", "a paper").code == 0
    dlm("expire", item, "--reason", "superseded")
    assert dlm("item", "wait", item).code == 0


def test_a_copy_that_leaves_is_waited_for(dlm: Dlm, item: str, settle: Callable[[], None]) -> None:
    """The expiry of one copy counts as that of the item does."""
    settle()
    assert dlm("expire", item, "--storage", "b", "--reason", "room is needed").code == 0
    assert "expiry" in underway(dlm)


def test_an_item_that_is_not_there_is_no_wait(dlm: Dlm, item: str) -> None:
    """A wrong uri and a wrong duration are told at once."""
    refused(dlm("item", "wait", "file:nothing"), "DLM-102", 2)
    refused(dlm("item", "wait", item, "--timeout", "soon"), "DLM-101", 2)
