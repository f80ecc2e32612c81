"""What goes first: by the items' urgency, by what a loss would cost, by when it is needed."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from dlm_core.catalogue.status import status
from dlm_core.catalogue.urgency import Urgency, deadlines, forget_met, items_in, set_urgency
from dlm_core.errors import InvalidValueError, NotFoundError
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.types import OperationKind
from tests.sessions import until_it_waits
from tests.site import Site, make_site

_HOUR = timedelta(hours=1)


@pytest.fixture
def site(engine, tmp_path) -> Site:
    """Three storages at three places; an item is SOLID on two."""
    site = make_site(engine, tmp_path, batch_size=1)
    for name in "abc":
        site.add_storage(name, name.upper(), phase="LIQUID" if name == "a" else "GAS")
    return site


def queued(site: Site) -> list[tuple[str, int]]:
    """Names of items with copies queued, as they would be claimed, with the priority."""
    found = site.query(
        """SELECT i.name, o.priority FROM operation o JOIN data_item i USING (oid)
            WHERE o.state = 'QUEUED' ORDER BY o.priority, o.due_at, o.operation_id"""
    )
    return [(row["name"], row["priority"]) for row in found]


def change(site: Site, oids: list[Any], **changes: Any) -> None:
    site.context.transact(lambda c: set_urgency(c, oids, changes))


def test_the_copy_that_rescues_goes_before_the_one_that_makes_safer_still(site: Site) -> None:
    """Of an item with one good copy the first new one goes before the second of any."""
    for name in "xy":
        site.add_item(name, b"x", "a")
    plan_replication(site.context)
    assert queued(site) == [("x", -5), ("y", -5), ("x", 0), ("y", 0)]


def test_an_urgent_item_goes_before_others(site: Site) -> None:
    """Said before the plan or after it, the copies of an item move; 0 again forgets it."""
    site.add_item("x", b"x", "a")
    later, sooner = (site.add_item(name, b"x", "a") for name in ("later", "sooner"))
    change(site, [sooner], priority=-2)
    plan_replication(site.context)
    change(site, [later], priority=3)
    assert [name for name, _ in queued(site)] == [
        "sooner", "sooner", "x", "x", "later", "later",
    ]  # fmt: skip
    assert queued(site)[0] == ("sooner", -25)
    change(site, [sooner, later], priority=0)
    assert {priority for _, priority in queued(site)} == {-5, 0}
    assert site.query("SELECT * FROM urgency") == []
    told = site.query("SELECT detail FROM event WHERE action = 'urgency' AND oid = :o", o=sooner)
    assert [row["detail"]["priority"] for row in told] == [-2, 0]


def test_copies_are_made_in_the_order_of_their_priority(site: Site) -> None:
    """One claim after the other takes what is first."""
    for name in "xyz":
        site.add_item(name, b"x", "a")
    plan_replication(site.context)
    last = site.item(site.query("SELECT oid FROM data_item WHERE name = 'z'")[0]["oid"])["oid"]
    change(site, [last], priority=-1)
    site.context.settings = site.context.settings.model_copy(update={"links_at_once": 1})
    site.work(OperationKind.COPY)
    made = site.query(
        """SELECT i.name FROM replica r JOIN data_item i USING (oid)
            JOIN event e ON e.uid = r.uid AND e.new_state = 'READY' AND e.old_state = 'PENDING'
            WHERE r.storage_id <> :a ORDER BY e.seq""",
        a=site.storages["a"],
    )
    assert [row["name"] for row in made][:2] == ["z", "z"]


def test_what_would_miss_its_deadline_goes_first_and_is_told(site: Site) -> None:
    """An hour before it is needed it passes everything else; status counts it, and after its time
    as late, until its copies are there."""
    urgent = site.add_item("urgent", b"x", "a")
    needed = site.add_item("needed", b"x", "a")
    change(site, [needed], needed_by=site.now + 3 * _HOUR)
    change(site, [urgent], priority=-9)
    plan_replication(site.context)
    assert queued(site)[0][0] == "urgent"
    site.now += 2.5 * _HOUR
    plan_replication(site.context)
    assert queued(site)[0] == ("needed", -100)

    def told() -> dict[str, Any]:
        return site.context.transact(lambda c: status(c, site.now))["deadlines"]

    assert (told()["late"], told()["near"]) == (0, 1)
    site.now += _HOUR
    assert (told()["late"], told()["near"]) == (1, 0)
    assert site.context.transact(lambda c: forget_met(c, site.now)) == 0
    site.settle()
    assert (told()["late"], told()["near"]) == (0, 0)
    assert site.context.transact(lambda c: forget_met(c, site.now)) == 1
    assert site.query("SELECT oid FROM urgency") == [{"oid": urgent}]


def test_what_cannot_be_copied_in_time_is_told_too(site: Site) -> None:
    """Not only what is queued: an item that no storage can take misses its deadline as well."""
    for name in "bc":
        site.set_storage(name, mode="read_only")
    oid = site.add_item("x", b"x", "a")
    change(site, [oid], needed_by=site.now - _HOUR)
    plan_replication(site.context)
    assert queued(site) == []
    found = site.context.transact(lambda c: deadlines(c, site.now, site.now))
    assert (found["late"], found["earliest"]) == (1, site.now - _HOUR)


def test_a_collection_means_all_in_it(site: Site) -> None:
    """Items of collections within it too; an unknown one is told."""
    site.execute(
        """INSERT INTO collection (collection_id, name, parent_id) VALUES
           ('00000000-0000-7000-8000-000000000001', 'outer', NULL),
           ('00000000-0000-7000-8000-000000000002', 'inner',
            '00000000-0000-7000-8000-000000000001')"""
    )
    oids = [site.add_item(name, b"x", "a") for name in "xyz"]
    for oid, number in zip(oids[:2], (1, 2), strict=True):
        site.execute(
            "UPDATE data_item SET collection_id = CAST(:c AS uuid) WHERE oid = :o",
            c=f"00000000-0000-7000-8000-00000000000{number}",
            o=oid,
        )
    assert site.context.transact(lambda c: items_in(c, "outer")) == oids[:2]
    with pytest.raises(NotFoundError):
        site.context.transact(lambda c: items_in(c, "none"))


def test_a_priority_out_of_range_is_refused() -> None:
    """-9 to 9 it is."""
    with pytest.raises(InvalidValueError, match="-9 \\(first\\) to 9"):
        Urgency(10)


def test_two_who_say_the_same_at_once_move_what_is_queued_once(site: Site) -> None:
    """The second waits for the first, and finds nothing to change."""
    oid = site.add_item("x", b"x", "a")
    plan_replication(site.context)
    second = threading.Thread(target=change, args=(site, [oid]), kwargs={"priority": 2})

    def first(connection: Connection) -> None:
        set_urgency(connection, [oid], {"priority": 2})
        second.start()
        until_it_waits(site.context.engine, second)

    site.context.transact(first)
    second.join()
    assert queued(site) == [("x", 15), ("x", 20)]
