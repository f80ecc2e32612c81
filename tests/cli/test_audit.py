"""``dlm audit``: who did what, why, with which certificate; and whether the log is as written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text

from tests.cli.site import Dlm, refused

Settle = Callable[[], None]


def test_every_step_of_a_deletion_is_told_with_who_and_why(
    dlm: Dlm, storages: dict[str, Path], settle: Settle
) -> None:
    """From the registration to the trash: a person's words, a certificate with its survivors."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("register", "a", "--scheme", "ska")
    settle()
    assert dlm("expire", "ska:x", "--reason", "ticket 42", "--storage", "b").code == 0
    assert dlm("expire", "ska:x", "--reason", "ticket 43").code == 0
    settle()
    entries = [
        json.loads(line) for line in dlm("audit", "--since", "1h", "--json").out.splitlines()
    ]
    assert all(entry["who"] for entry in entries)
    made = [e for e in entries if e["noun"] == "replica" and e["action"] == "created"]
    assert [e["storage"] for e in made] == ["a", "b"] and made[1]["why"]
    trashed = [e for e in entries if e["new_state"] == "TRASHED"]
    assert {e["certificate"]["step"] for e in trashed} == {"trash"}
    assert {"ticket 42", "its item has expired: ticket 43"} >= {e["why"] for e in trashed}
    (expired,) = (e for e in entries if e["new_state"] == "EXPIRED")
    assert (expired["why"], expired["uri"]) == ("ticket 43", "ska:x")
    lines = dlm("audit").out.splitlines()
    assert len(lines) == len(entries)
    assert any("ticket 43" in line and "READY → EXPIRED" in line for line in lines)
    assert dlm("audit", "--since", "2199-01-01T00:00Z").out == ""
    refused(dlm("audit", "--since", "yesterday"), "DLM-101", 2)


def test_an_operation_that_failed_for_good_is_in_the_log(
    dlm: Dlm, storages: dict[str, Path], settle: Settle
) -> None:
    """With its error; and that somebody let it be tried again."""
    (storages["a"] / "x").write_bytes(b"1")
    dlm("register", "a")
    (storages["a"] / "x").unlink()
    settle()
    dlm("retry")
    entries = [json.loads(line) for line in dlm("audit", "--json").out.splitlines()]
    found = [(e["action"], e["new_state"]) for e in entries if e["noun"] == "operation"]
    assert found == [("admit", "FAILED"), ("admit", "QUEUED")]


def test_a_changed_row_fails_the_verification(dlm: Dlm, engine: Engine, storages: object) -> None:
    """Exit code 1, and the row is named; an untouched log passes."""
    with engine.begin() as c:
        c.execute(text("INSERT INTO event (at, noun, action, actor) "
                       "VALUES ('2024-03-01 12:00Z', 'replica', 'refused', 'user:b')"))  # fmt: skip
        seq = c.execute(text("SELECT seq FROM event WHERE actor = 'user:b'")).scalar()
    assert dlm("audit", "seal").code == 0
    whole = dlm("audit", "verify")
    assert whole.code == 0 and "as they were sealed" in whole.out
    head = dlm("audit", "verify", "--json").json["heads"]["event"]
    assert dlm("audit", "verify", "--anchor", head).code == 0
    assert dlm("audit", "verify", "--anchor", "0" * 64).code == 1
    with engine.begin() as c:
        c.execute(text("SET LOCAL session_replication_role = replica"))
        c.execute(text("UPDATE event SET action = 'y' WHERE actor = 'user:b'"))
    bad = dlm("audit", "verify")
    assert bad.code == 1
    assert f"event 2024-03-01: a row was changed: event {seq} " in bad.out


def test_a_month_is_dropped_only_when_it_is_meant(dlm: Dlm, storages: object) -> None:
    """--yes, a month, and all its days sealed."""
    refused(dlm("audit", "drop", "2024-03"), "DLM-101", 2)
    refused(dlm("audit", "drop", "March", "--yes"), "DLM-101", 2)
    for month in ("2024-03", "2026-11", "9999-12", "0001-01"):
        refused(dlm("audit", "drop", month, "--yes"), "DLM-101", 2)
