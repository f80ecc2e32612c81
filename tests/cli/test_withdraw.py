"""``dlm withdraw``: what it prints, and its exit codes."""

from __future__ import annotations

from typing import Any

from tests.cli.site import Dlm, refused


def test_what_was_announced_by_mistake_is_withdrawn(dlm: Dlm, storages: Any) -> None:
    """By its name or as one that failed, with a reason; what is wrong is one line and no change."""
    (storages["a"] / "typo").write_text("x")
    assert dlm("register", "a", "--scheme", "t").code == 0
    refused(dlm("withdraw"), "DLM-106", 2)
    refused(dlm("withdraw", "t:typo", "--failed", "--reason", "r"), "DLM-106", 2)
    refused(dlm("withdraw", "t:typo"), "DLM-101", 2)
    refused(dlm("withdraw", "t:tpyo", "--reason", "r"), "DLM-102", 2)
    done = dlm("withdraw", "t:typo", "--reason", "the wrong scheme")
    assert (done.code, done.out) == (0, "1 announcements withdrawn, and 1 items with them\n")
    refused(dlm("withdraw", "t:typo", "--reason", "again"), "DLM-105", 2)
    assert dlm("withdraw", "--failed", "--reason", "r").out.startswith("0 announcements")
    told = dlm("item", "why", "t:typo").out
    assert "is DELETED" in told and "release certificate" in told and "the wrong scheme" in told
    assert dlm("item", "show", "t:typo").code == 0
    assert "DELETED" in dlm("item", "events", "t:typo").out
    assert dlm("status").code == 0
