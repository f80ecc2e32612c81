"""``dlm storage lost``, ``back``, ``show`` of a drain, and ``retire --give-up``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from dlm_core.lifecycle.lost import plan_audits
from dlm_core.lifecycle.verify import execute_verify
from dlm_core.lifecycle.work import Context, drain
from dlm_core.settings import load_settings
from dlm_core.types import OperationKind
from tests.cli.site import Dlm, refused


def register(dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]) -> None:
    (storages["a"] / "x").write_bytes(b"payload")
    assert dlm("register", "a", "--scheme", "ska", "--target-phase", "LIQUID").code == 0
    settle()


def test_a_storage_is_declared_lost_and_what_it_held_alone_is_listed(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """First without changing anything; a reason is wanted; the replica is MISSING then."""
    register(dlm, storages, settle)
    tried = dlm("storage", "lost", "a", "--dry-run")
    assert tried.code == 0 and "ska:x" in tried.out and "would lose 1 replicas" in tried.out
    assert dlm("storage", "show", "a", "--json").json["mode"] == "read_write"
    refused(dlm("storage", "lost", "a"), "DLM-101", 2)
    refused(dlm("storage", "lost", "nowhere", "--reason", "r"), "DLM-102", 2)
    told = dlm("storage", "lost", "a", "--reason", "fire", "--json").json
    assert (told["replicas"], told["alone"]["items"]) == (1, 1)
    assert told["alone"]["listed"][0]["uri"] == "ska:x"
    shown = dlm("storage", "show", "a", "--json").json
    assert (shown["mode"], shown["mode_reason"]) == ("lost", "fire")
    assert shown["replicas_by_state"] == {"MISSING": 1}
    refused(dlm("storage", "set", "a", "--mode", "read_write"), "DLM-105", 2)
    assert "storage a" not in dlm("doctor").out


def test_a_storage_that_is_back_is_audited(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], engine: Engine
) -> None:
    """It is not used before; one that cannot be reached does not come back."""
    register(dlm, storages, settle)
    refused(dlm("storage", "back", "a"), "DLM-105", 2)
    dlm("storage", "lost", "a", "--reason", "unplugged")
    away = storages["a"].rename(storages["a"].parent / "away")
    refused(dlm("storage", "back", "a"), "DLM-301", 4)
    away.rename(storages["a"])
    assert dlm("storage", "back", "a").code == 0
    assert dlm("storage", "show", "a", "--json").json["mode"] == "auditing"
    context = Context(engine, load_settings(), "user:test")
    drain(context, {OperationKind.VERIFY: execute_verify}, plan_audits)
    shown = dlm("storage", "show", "a", "--json").json
    assert (shown["mode"], shown["replicas_by_state"]) == ("read_write", {"READY": 1})


def test_a_drain_is_shown_with_its_progress(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """Bytes left, share done, rate and end, in words and as JSON; nothing of it without a drain."""
    register(dlm, storages, settle)
    assert "drain" not in dlm("storage", "show", "a", "--json").json
    assert dlm("storage", "drain", "a").code == 0
    told = dlm("storage", "show", "a", "--json").json["drain"]
    assert (told["begun_bytes"], told["left_bytes"], told["done_fraction"]) == (7, 7, 0.0)
    settle()
    told = dlm("storage", "show", "a", "--json").json["drain"]
    assert (told["left_bytes"], told["done_fraction"], told["stuck_items"]) == (0, 1.0, 0)
    assert told["ends_at"] and told["bytes_per_second"] > 0
    words = dlm("storage", "show", "a").out
    assert "drain_left_bytes" in words and "100.0%" in words


def test_a_lost_storage_is_retired_with_a_word(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """Else it is refused for safety, and the message names the word."""
    register(dlm, storages, settle)
    assert "drain" in refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    assert "drain" in refused(dlm("storage", "retire", "a", "--give-up"), "DLM-501", 6)
    dlm("storage", "lost", "a", "--reason", "fire")
    assert "--give-up" in refused(dlm("storage", "retire", "a"), "DLM-501", 6)
    assert dlm("storage", "retire", "a", "--give-up").code == 0
    refused(dlm("storage", "lost", "a", "--reason", "fire"), "DLM-105", 2)
