"""Locations and storages in the catalogue."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from dlm_core.catalogue import places
from dlm_core.catalogue.capacity import note_usage
from dlm_core.errors import (
    AlreadyExistsError,
    DeletionRefusedError,
    IllegalTransitionError,
    InvalidValueError,
    NotFoundError,
)
from dlm_core.lifecycle.rebalance import plan_rebalance
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Any, tmp_path: Any) -> Site:
    site = make_site(engine, tmp_path)
    site.context.transact(lambda c: places.add_location(c, "here", now=site.now))
    return site


def add(site: Site, name: str, **values: Any) -> Any:
    chosen = {"location": "here", "interface": "posix", "root": f"/{name}", "phase": "LIQUID",
              "now": site.now, **values}  # fmt: skip
    return site.context.transact(lambda c: places.add_storage(c, name, **chosen))


def get(site: Site, name: str) -> dict[str, Any]:
    return site.context.transact(lambda c: places.get_storage(c, name))


def change(site: Site, name: str, **changes: Any) -> None:
    site.context.transact(lambda c: places.set_storage(c, name, changes))


def waiting(site: Site) -> int:
    return site.query("SELECT count(*) AS n FROM evaluation")[0]["n"]


def test_a_storage_is_told_as_it_was_added(site: Site) -> None:
    """Everything given comes back; what was not has the documented defaults."""
    add(site, "a", options={"capacity_bytes": 1000, "trash_grace": timedelta(days=3)})
    found = get(site, "a")
    assert (found["location"], found["mode"], found["phase"]) == ("here", "read_write", "LIQUID")
    assert (found["high_watermark"], found["low_watermark"]) == (0.9, 0.8)
    assert found["trash_grace"] == timedelta(days=3)
    assert (found["used_bytes"], found["capacity_bytes"], found["fill_fraction"]) == (0, 1000, 0.0)
    names = [row["name"] for row in site.context.transact(places.list_storages)]
    assert names == ["a"]


def test_names_and_places_are_unique(site: Site) -> None:
    """A second location or storage of a name, or a second storage of a place, is refused."""
    add(site, "a")
    with pytest.raises(AlreadyExistsError):
        add(site, "a", root="/else")
    with pytest.raises(AlreadyExistsError):
        add(site, "b", root="/a")
    with pytest.raises(AlreadyExistsError):
        site.context.transact(lambda c: places.add_location(c, "here", now=site.now))


S3 = {"interface": "s3", "config": {"endpoint": "http://here"}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"root": "/a"}, {"root": "/a/"}),
        ({"root": "/a"}, {"root": "//./a", "config": {"mount": "/"}}),
        ({"root": "/a"}, {"root": "/a/inside"}),
        ({"root": "/a/inside"}, {"root": "/a"}),
        ({"root": "/"}, {"root": "/a", "managed": False}),
        ({"root": "bucket", **S3}, {"root": "bucket/", **S3}),
        ({"root": "bucket/p", **S3}, {"root": "bucket", **S3}),
    ],
)
def test_no_storage_is_inside_another(
    site: Site, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """One file would count as two copies, or go with another item's that is deleted."""
    add(site, "a", **first)
    with pytest.raises(AlreadyExistsError):
        add(site, "b", **second)


def test_places_that_only_look_alike_are_two(site: Site) -> None:
    """Names that begin alike, the same bucket elsewhere; and one inside what is only read."""
    add(site, "a", root="/a", managed=False, mode="read_only")
    add(site, "inside", root="/a/inside")
    add(site, "beside", root="/ab")
    add(site, "s", root="bucket", **S3)
    add(site, "t", root="bucket", interface="s3", config={"endpoint": "http://there"})
    add(site, "u", root="bucket-2", **S3)
    found = site.context.transact(places.list_storages)
    assert {row["name"] for row in found} >= {"a", "inside", "beside", "s", "t", "u"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("has space", {}),
        ("", {}),
        ("x" * 64, {}),
        ("a", {"options": {"high_watermark": 0.5}}),
        ("a", {"options": {"low_watermark": 0.95}}),
        ("a", {"options": {"high_watermark": 1.5}}),
        ("a", {"options": {"capacity_bytes": 0}}),
        ("a", {"options": {"concurrency": 5000}}),
    ],
)
def test_values_that_make_no_sense_are_told_in_words(site: Site, name: str, values: Any) -> None:
    """Each bad value is an InvalidValueError, not the name of a constraint."""
    with pytest.raises(InvalidValueError):
        add(site, name, **values)
    assert site.context.transact(places.list_storages) == []


def test_an_unknown_location_or_storage_is_not_found(site: Site) -> None:
    """Names that are not there raise NotFoundError."""
    with pytest.raises(NotFoundError):
        add(site, "a", location="nowhere")
    with pytest.raises(NotFoundError):
        get(site, "a")
    with pytest.raises(NotFoundError):
        change(site, "a", mode="offline")


def test_fill_is_of_the_given_capacity_or_as_the_storage_tells(site: Site) -> None:
    """With a capacity given the catalogue's own bytes count, else what the storage told."""
    root = site.add_storage("a", "A", capacity_bytes=1000)
    assert root.is_dir()
    site.add_item("x", b"1234567890", "a")
    assert get(site, "a")["fill_fraction"] == pytest.approx(0.01)
    add(site, "b")
    assert get(site, "b")["fill_fraction"] is None
    storage_id = get(site, "b")["storage_id"]
    site.context.transact(lambda c: note_usage(c, storage_id, 2000, 500, site.now))
    assert get(site, "b")["fill_fraction"] == pytest.approx(0.25)
    assert get(site, "b")["capacity_bytes"] == 2000


def test_a_draining_that_is_called_off_keeps_the_replicas(site: Site) -> None:
    """Replicas marked to leave by the draining stay; one that expires for a reason of its own
    does not."""
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    stays = site.add_item("x", b"1", "a")
    leaves = site.add_item("y", b"2", "a")
    site.settle()
    later = site.now + timedelta(days=1)
    site.execute(
        "UPDATE replica SET expires_at = :later, expiry_reason = 'mine' WHERE oid = :oid",
        later=later, oid=leaves,
    )  # fmt: skip
    change(site, "a", mode="draining")
    site.execute(
        """UPDATE replica SET expires_at = :now, expiry_reason = 'drain: storage a'
            WHERE oid = :oid AND storage_id = :a""",
        now=site.now, oid=stays, a=site.storages["a"],
    )  # fmt: skip
    change(site, "a", mode="read_write")
    assert site.replica(stays, "a")["expires_at"] is None
    assert site.replica(leaves, "a")["expires_at"] == later


def test_a_drain_does_not_wait_for_a_replicas_own_later_expiry(site: Site) -> None:
    """It leaves like the others; called off before it went, it has its own expiry again."""
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    oid = site.add_item("x", b"1", "a", target_phase="LIQUID")
    later = site.now + timedelta(days=90)
    mine = "UPDATE replica SET expires_at = :later, expiry_reason = 'mine' WHERE oid = :oid"
    site.execute(mine, later=later, oid=oid)
    change(site, "a", mode="draining")
    plan_rebalance(site.context)
    found = site.replica(oid, "a")
    assert found["expires_at"] == site.now and found["expiry_reason"].startswith("drain: ")
    change(site, "a", mode="read_write")
    found = site.replica(oid, "a")
    assert (found["expires_at"], found["expiry_reason"]) == (later, "mine")
    assert (found["own_expires_at"], found["own_expiry_reason"]) == (None, None)
    change(site, "a", mode="draining")
    for _ in range(4):
        site.settle()
        site.advance(hours=2)
    assert site.visible("a") == {} and site.replicas(oid) == {"a": "DELETED", "b": "READY"}


def test_a_change_of_phase_makes_its_items_be_looked_at(site: Site) -> None:
    """When a storage gives less than before, the items on it get the copies they now lack."""
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    site.add_storage("c", "C")
    oid = site.add_item("x", b"1", "a")
    site.settle()
    assert site.item(oid)["phase_weight"] == 4
    assert waiting(site) == 0
    change(site, "a", phase="GAS")
    site.settle()
    assert len(site.replicas(oid)) == 3


def test_room_that_appears_is_used_at_once(site: Site) -> None:
    """An item that lacks a copy gets it when a storage is added or comes back, without waiting."""
    site.add_storage("a", "A")
    oid = site.add_item("x", b"1", "a")
    site.settle()
    assert site.item(oid)["shortfall"]
    (site.folder / "b").mkdir()
    add(site, "b", root=str(site.folder / "b"))
    assert site.item(oid)["shortfall"], "both storages are at one place now"
    site.context.transact(lambda c: places.add_location(c, "there", now=site.now))
    (site.folder / "c").mkdir()
    add(site, "c", root=str(site.folder / "c"), location="there")
    site.settle()
    assert site.item(oid)["shortfall"] is None


def test_a_storage_with_replicas_is_not_retired(site: Site) -> None:
    """The refusal counts the replicas by state; an empty storage is retired, twice is once, and
    nothing brings it back."""
    site.add_storage("a", "A")
    site.add_item("x", b"1", "a")
    site.add_item("y", b"1", "a")
    with pytest.raises(DeletionRefusedError, match="2 READY"):
        site.context.transact(lambda c: places.retire_storage(c, "a", site.now))
    add(site, "b")
    for _ in range(2):
        site.context.transact(lambda c: places.retire_storage(c, "b", site.now))
    assert get(site, "b")["mode"] == "retired"
    with pytest.raises(IllegalTransitionError):
        change(site, "b", mode="read_write")


def test_a_drained_storage_can_be_retired(site: Site) -> None:
    """Draining moves everything elsewhere and the trash runs out; then retiring works."""
    for name, location in (("a", "A"), ("b", "B"), ("c", "C")):
        site.add_storage(name, location)
    oid = site.add_item("x", b"1", "a")
    site.settle()
    change(site, "a", mode="draining")
    for _ in range(4):
        site.advance(hours=2)
        site.settle()
    site.context.transact(lambda c: places.retire_storage(c, "a", site.now))
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY", "c": "READY"}
    assert site.item(oid)["shortfall"] is None
