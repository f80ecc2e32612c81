"""``dlm plan``: what a limit stopped is shown, approved and rejected."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dlm_core.errors import BlastRadiusError
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.work import Context
from dlm_core.settings import load_settings
from tests.cli.site import Dlm, refused

Settle = Callable[[], None]


def _stop(dlm: Dlm, storages: dict[str, Path], settle: Settle, engine: Engine) -> str:
    """Three items that are to go, where one run may trash two copies; the plan that waits."""
    for name in ("x", "y", "z"):
        (storages["a"] / name).write_bytes(b"12345")
    dlm("register", "a", "--scheme", "ska")
    settle()
    for name in ("x", "y", "z"):
        dlm("expire", f"ska:{name}", "--reason", "campaign 7 is over")
    with pytest.raises(BlastRadiusError):
        ExpiryPlanner(2, 10**9)(Context(engine, load_settings(), "sensor:expiry"))
    (plan,) = dlm("plan", "list", "--json").json
    return str(plan["plan_id"])


def test_a_plan_is_shown_approved_and_then_done(
    dlm: Dlm, storages: dict[str, Path], settle: Settle, engine: Engine
) -> None:
    """The list and the plan tell what was stopped, by what, and what would go; once approved it is
    waited for, and the log names the plan."""
    plan = _stop(dlm, storages, settle, engine)
    shown = dlm("plan", "show", plan).out
    assert "stopped by DLM_MAX_DELETE_ITEMS is 2" in shown and "campaign 7 is over" in shown
    assert "ska:x" in shown and "proposed by sensor:expiry" in shown
    found = dlm("plan", "show", plan, "--json").json
    assert (found["operations"], len(found["entries"]), found["state"]) == (6, 6, "PROPOSED")
    assert f"plan {plan}, PROPOSED" in dlm("item", "why", "ska:x").out
    assert dlm("item", "wait", "ska:x").code == 0, "a person has to decide"
    approved = dlm("plan", "approve", plan, "--as", "kim", "--reason", "looked at it")
    assert approved.code == 0 and "is approved until" in approved.out
    assert dlm("item", "wait", "ska:x", "--timeout", "0s").out == "expiry\n"
    assert f"user:kim plan {plan} approved: looked at it" in dlm("audit").out
    settle()
    assert dlm("item", "wait", "ska:x").code == 0
    found = dlm("plan", "show", plan, "--json").json
    assert (found["state"], found["trashed"]) == ("DONE", 6)
    assert found["decisions"][0]["actor"] == "user:kim"
    refused(dlm("plan", "approve", plan), "DLM-105", 2)


def test_two_people_are_asked_for_where_the_site_says_so(
    dlm: Dlm, storages: dict[str, Path], settle: Settle, engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One person twice is not two."""
    monkeypatch.setenv("DLM_APPROVALS", "2")
    plan = _stop(dlm, storages, settle, engine)
    for _ in range(2):
        assert "by 1 more" in dlm("plan", "approve", plan, "--as", "kim").out
    settle()
    assert dlm("item", "show", "ska:x", "--json").json["state"] == "READY"
    assert "is approved until" in dlm("plan", "approve", plan, "--as", "lee").out


def test_what_a_rejected_plan_names_stays(
    dlm: Dlm, storages: dict[str, Path], settle: Settle, engine: Engine
) -> None:
    """A reason is asked for."""
    plan = _stop(dlm, storages, settle, engine)
    refused(dlm("plan", "reject", plan), "DLM-100", 2)
    assert dlm("plan", "reject", plan, "--reason", "no").code == 0
    settle()
    assert dlm("item", "show", "ska:x", "--json").json["state"] == "READY"


@pytest.mark.parametrize("command", [["show"], ["approve"], ["reject", "--reason", "r"]])
def test_a_plan_that_is_not_there_is_told(dlm: Dlm, storages: object, command: list[str]) -> None:
    """An unknown key, and what is none."""
    refused(dlm("plan", *command, str(uuid.uuid4())), "DLM-102", 2)
    refused(dlm("plan", *command, "the-first"), "DLM-101", 2)
