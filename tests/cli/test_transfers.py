"""``dlm link``, the limits of ``dlm storage``, ``dlm operations``, and what goes first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue import traffic
from dlm_core.lifecycle.work import Context
from dlm_core.settings import load_settings
from dlm_core.types import new_id
from tests.cli.site import Dlm, refused


def test_limits_of_a_storage_are_set_and_taken_away(dlm: Dlm, storages: dict[str, Path]) -> None:
    """With units; what is not named stays; 0 is no limit."""
    given = ("--max-bytes-per-second", "100M", "--max-concurrency", "8")
    assert dlm("storage", "set", "a", *given).code == 0
    shown = dlm("storage", "show", "a", "--json").json
    assert (shown["max_bytes_per_second"], shown["max_concurrency"]) == (100_000_000, 8)
    assert dlm("storage", "set", "a", "--max-concurrency", "0").code == 0
    shown = dlm("storage", "show", "a", "--json").json
    assert (shown["max_bytes_per_second"], shown["max_concurrency"]) == (100_000_000, None)
    assert dlm("storage", "set", "a", "--max-bytes-per-second", "unlimited").code == 0
    assert dlm("storage", "show", "a", "--json").json["max_bytes_per_second"] is None


@pytest.mark.parametrize(
    "given",
    [
        ("--max-bytes-per-second", "fast"), ("--max-bytes-per-second", "-5"),
        ("--max-bytes-per-second", "0.1"), ("--max-bytes-per-second", "100EB"),
        ("--max-concurrency", "many"), ("--max-concurrency", "-1"),
        ("--max-concurrency", "1000000"), ("--max-concurrency", "2.5"),
    ],
)  # fmt: skip
def test_a_limit_of_nonsense_is_one_clear_line(
    dlm: Dlm, storages: dict[str, Path], given: tuple[str, str]
) -> None:
    """For a storage and for a link; nothing is changed."""
    told = refused(dlm("storage", "set", "a", *given), "DLM-101", 2)
    assert given[1] in told or "100000000000000000000" in told
    refused(dlm("link", "set", "a", "b", *given), "DLM-101", 2)
    assert dlm("link", "list", "--json").json == []


def test_limits_of_a_link_are_set_and_taken_away(dlm: Dlm, storages: dict[str, Path]) -> None:
    """One direction only; a link without limits is not listed; both storages have to be known."""
    assert dlm("link", "set", "a", "b", "--max-bytes-per-second", "1MB/s").code == 0
    assert dlm("link", "set", "a", "b", "--max-concurrency", "3").code == 0
    assert dlm("link", "list", "--json").json == [
        {"source": "a", "destination": "b", "max_bytes_per_second": 1_000_000,
         "max_concurrency": 3}
    ]  # fmt: skip
    assert "1.0 MB" in dlm("link", "list").out
    assert dlm("link", "set", "a", "b", "--max-bytes-per-second", "0").code == 0
    assert dlm("link", "set", "a", "b", "--max-concurrency", "0").code == 0
    assert dlm("link", "list", "--json").json == []
    refused(dlm("link", "set", "a", "nowhere", "--max-concurrency", "3"), "DLM-102", 2)
    refused(dlm("link", "set", "a", "b"), "DLM-101", 2)


def test_what_is_at_work_is_listed(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], engine: Engine
) -> None:
    """With its bytes and worker, as long as its drainer tells; else the numbers by kind."""
    (storages["a"] / "x").write_bytes(b"payload")
    dlm("register", "a", "--scheme", "ska", "--target-phase", "LIQUID")
    settle()
    assert dlm("operations", "--running", "--json").json == []
    context = Context(engine, load_settings(), "user:test")
    with engine.connect() as connection:
        key = connection.exec_driver_sql("SELECT operation_id FROM operation").scalar()
    running = [
        {"operation_id": str(key), "step": "copy", "done_bytes": 5_000_000,
         "total_bytes": 7_000_000, "since": context.clock().isoformat()}
    ]  # fmt: skip
    context.transact(lambda c: traffic.beat(c, new_id(), "host:1", {}, running, context.clock()))
    (told,) = dlm("operations", "--running", "--json").json
    assert (told["uri"], told["storage"], told["worker"]) == ("ska:x", "a", "host:1")
    assert (told["done_bytes"], told["total_bytes"]) == (5_000_000, 7_000_000)
    assert "5.0 MB" in dlm("operations", "--running").out
    assert {"kind": "admit", "state": "DONE", "operations": 1} in json.loads(
        dlm("operations", "--json").out
    )


def test_what_goes_first_is_said_at_registration_and_later(
    dlm: Dlm, storages: dict[str, Path]
) -> None:
    """Priority and deadline stand at the item; a missed deadline stands in the status."""
    (storages["a"] / "x").write_bytes(b"payload")
    given = ("--priority", "-3", "--by", "2030-01-31T12:00Z")
    assert dlm("register", "a", "--scheme", "ska", *given).code == 0
    shown = dlm("item", "show", "ska:x", "--json").json
    assert (shown["priority"], shown["needed_by"]) == (-3, "2030-01-31T12:00:00Z")
    assert "deadline" not in dlm("status").out
    assert dlm("item", "set", "ska:x", "--by", "now").code == 0
    assert "copies missing at their deadline: of 1 items" in dlm("status").out
    assert dlm("status", "--json").json["deadlines"]["late"] == 1
    assert dlm("item", "set", "ska:x", "--by", "never", "--priority", "0").code == 0
    assert dlm("item", "show", "ska:x", "--json").json["priority"] == 0
    refused(dlm("item", "set", "ska:x"), "DLM-101", 2)
    refused(dlm("item", "set", "--priority", "1"), "DLM-106", 2)
    refused(dlm("item", "set", "ska:x", "--priority", "10"), "DLM-101", 2)
    refused(dlm("item", "set", "--collection", "none", "--priority", "1"), "DLM-102", 2)
    refused(dlm("register", "a", "--by", "soon"), "DLM-101", 2)
    refused(dlm("verify", "ska:x", "--priority", "-10"), "DLM-101", 2)
    assert dlm("verify", "ska:x", "--priority", "-1").code == 0
