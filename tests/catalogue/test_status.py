"""The state of everything in numbers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dlm_core.catalogue.status import status
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Any, tmp_path: Any) -> Site:
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A", capacity_bytes=1000)
    site.add_storage("b", "B")
    return site


def ask(site: Site) -> dict[str, Any]:
    return site.context.transact(lambda c: status(c, site.now))


def test_an_empty_catalogue_has_a_status(site: Site) -> None:
    """Nothing there: empty counts, zero bytes, the storages with their fill."""
    found = ask(site)
    assert (found["items"], found["replicas"], found["operations"]) == ({}, {}, {})
    assert found["bytes"] == {"items": 0, "replicas": 0}
    told = {storage["name"]: storage for storage in found["storages"]}
    assert told["a"]["fill_fraction"] == 0
    assert told["b"]["fill_fraction"] is None


def test_counts_follow_what_happens(site: Site) -> None:
    """Items, replicas and bytes by state, queued and done operations, and what is missing."""
    site.add_item("x", b"12345", "a")
    before = ask(site)
    assert before["items"] == {"READY": 1}
    assert before["replicas"] == {"READY": 1}
    assert before["items_to_evaluate"] == 1
    site.settle()
    found = ask(site)
    assert found["replicas"] == {"READY": 2}
    assert found["bytes"] == {"items": 5, "replicas": 10}
    assert found["operations"] == {"copy": {"DONE": 1}}
    assert (found["items_below_target_phase"], found["items_to_evaluate"]) == (0, 0)
    told = {storage["name"]: storage for storage in found["storages"]}
    assert told["a"]["used_bytes"] == 5
    assert told["a"]["fill_fraction"] == pytest.approx(0.005)


def test_what_ended_within_a_day_is_counted_whenever_it_was_queued(site: Site) -> None:
    """A purge is queued with its grace before it, and a copy may wait for days."""
    oid = site.add_item("x", b"12345", "a")
    site.settle()
    site.execute("UPDATE data_item SET expires_at = :now WHERE oid = :oid", now=site.now, oid=oid)
    site.settle()
    assert ask(site)["operations"]["purge"] == {"QUEUED": 2}
    site.advance(days=8)
    site.settle()
    assert ask(site)["operations"] == {"purge": {"DONE": 2}}
    site.advance(hours=25)
    assert ask(site)["operations"] == {}


def test_items_without_enough_copies_are_counted(site: Site) -> None:
    """An item whose target phase cannot be reached is below target."""
    site.set_storage("b", mode="offline")
    site.add_item("x", b"12345", "a")
    site.settle()
    assert ask(site)["items_below_target_phase"] == 1


def test_failed_operations_stay_visible_and_old_done_ones_do_not(site: Site) -> None:
    """FAILED is counted for ever, DONE for a day from its queueing on."""
    oid = site.add_item("x", b"12345", "a")
    site.settle()
    assert ask(site)["operations"] == {"copy": {"DONE": 1}}
    site.execute(
        """INSERT INTO operation (operation_id, kind, state, oid, uid, reason, actor, due_at,
                                  error_code, finished_at)
           SELECT uuid7_floor(CAST(:now AS timestamptz) - interval '90 days'), 'verify', 'FAILED',
                  oid, uid, 'test', 'test', :now, 'DLM-300', :now FROM replica WHERE oid = :oid
            LIMIT 1""",
        oid=oid, now=site.now,
    )  # fmt: skip
    # ids carry the time of this machine's clock
    site.now = datetime.now(UTC) + timedelta(hours=25)
    assert ask(site)["operations"] == {"verify": {"FAILED": 1}}
