"""Where copies go: the pure planner."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from dlm_core.lifecycle.decide import (
    ItemView,
    ReplicaView,
    Space,
    StorageView,
    decide_copies,
    weight_of,
)
from dlm_core.types import Phase

NOW = datetime(2026, 6, 1, tzinfo=UTC)
A, B, C = (uuid.UUID(int=n) for n in (1, 2, 3))


def storage(n, location=A, weight=2, mode="read_write", managed=True, free=1e12):
    return StorageView(
        uuid.UUID(int=n), f"s{n}", location, weight, mode, managed, "disk", free, 0.5
    )


def replica(where, state="READY", **more):
    return ReplicaView(uuid.uuid4(), where.storage_id, state, **more)


def decide(replicas, storages, *, target="SOLID", size=10, state="READY", waited=False):
    views = {s.storage_id: s for s in storages}
    item = ItemView(uuid.UUID(int=99), state, size, target, waited)
    return decide_copies(item, replicas, views, Space(storages), NOW)


def test_two_liquid_copies_at_two_locations_make_solid():
    """LIQUID at A and LIQUID at B: nothing is missing."""
    a, b = storage(1, A), storage(2, B)
    decision = decide([replica(a), replica(b)], [a, b])
    assert (decision.copies, decision.shortfall, decision.weight) == ((), None, 4)


def test_a_second_volume_at_the_same_location_is_no_second_failure_domain():
    """Two LIQUID copies at one location stay LIQUID, and the planner says what is impossible."""
    a1, a2 = storage(1, A), storage(2, A)
    decision = decide([replica(a1), replica(a2)], [a1, a2])
    assert decision.weight == 2
    assert decision.copies == ()
    assert decision.impossible and "has a copy already" in decision.shortfall


def test_pending_copies_are_expected_but_never_reached():
    """A copy on its way stops further planning; the phase does not rise."""
    a, b = storage(1, A), storage(2, B)
    decision = decide([replica(a), replica(b, "PENDING")], [a, b])
    assert decision.copies == () and decision.weight == 2
    assert decision.shortfall and not decision.impossible


def test_a_copy_on_a_storage_that_is_drained_is_not_counted_on():
    """It is a source, and another copy is made before it goes."""
    a, b, c = storage(1, A), storage(2, B, mode="draining"), storage(3, C)
    decision = decide([replica(a), replica(b)], [a, b, c])
    assert [copy.storage_id for copy in decision.copies] == [c.storage_id]


def test_the_fewest_copies_are_made():
    """One SOLID storage is taken rather than two LIQUID ones."""
    buffer = storage(1, A, weight=0, mode="read_only", managed=False)
    solid = storage(2, B, weight=4)
    decision = decide([replica(buffer)], [buffer, storage(3, A), storage(4, C), solid])
    assert [copy.storage_id for copy in decision.copies] == [solid.storage_id]


def test_modes_management_and_space_are_respected():
    """Read-only, draining, offline, retired, unmanaged and full storages take no copy."""
    source = storage(1, A)
    others = [
        storage(2, B, mode="read_only"),
        storage(3, B, mode="draining"),
        storage(4, B, mode="offline"),
        storage(5, B, mode="retired"),
        storage(6, B, managed=False),
        storage(7, B, free=9),
    ]
    decision = decide([replica(source)], [source, *others], size=10)
    assert decision.copies == () and decision.impossible
    for words in ("read_only", "draining", "offline", "not managed", "no space"):
        assert words in decision.shortfall
    assert "s5" not in decision.shortfall


def test_an_item_without_any_source_is_corrupted():
    """All replicas damaged or gone: nothing is copied over anything, the lost ones are looked for,
    and only then is the item CORRUPTED; they are looked for after that too."""
    a, b = storage(1, A), storage(2, B)
    lost = [replica(a, "CORRUPTED"), replica(b, "MISSING")]
    decision = decide(lost, [a, b])
    assert decision.item_state is None and decision.search and decision.impossible
    decision = decide(lost, [a, b], waited=True)
    assert decision.item_state == "CORRUPTED" and decision.copies == () and decision.search


def test_a_suspect_copy_waits_for_its_second_look():
    """A lone SUSPECT replica is no source and no reason to give the item up."""
    a, b = storage(1, A), storage(2, B)
    decision = decide([replica(a, "SUSPECT")], [a, b])
    assert decision.item_state is None and decision.copies == ()


def test_a_damaged_replica_is_made_again_in_its_place():
    """CORRUPTED at B with a good copy at A: the same replica is copied again."""
    a, b = storage(1, A), storage(2, B)
    bad = replica(b, "CORRUPTED")
    decision = decide([replica(a), bad], [a, b])
    assert [copy.uid for copy in decision.copies] == [bad.uid]


def test_a_replica_whose_time_is_over_is_not_counted_on():
    """An expired replica is replaced before it may go."""
    a, b, c = storage(1, A), storage(2, B), storage(3, C)
    leaving = replica(b, expires_at=NOW - timedelta(seconds=1))
    decision = decide([replica(a), leaving], [a, b, c])
    assert [copy.storage_id for copy in decision.copies] == [c.storage_id]
    assert decision.weight == 4  # it still is there


def test_a_storage_that_failed_is_left_alone_for_a_while():
    """excluded_until in the future keeps a storage out; in the past it is asked again."""
    a, b = storage(1, A), storage(2, B)
    failed = replica(b, "MISSING", excluded_until=NOW + timedelta(hours=1))
    assert decide([replica(a), failed], [a, b]).impossible
    later = replace(failed, excluded_until=NOW - timedelta(hours=1))
    assert decide([replica(a), later], [a, b]).copies


def test_space_is_not_promised_twice():
    """Within a batch the second item no longer fits where the first went."""
    a, b = storage(1, A), storage(2, B, free=15)
    views = {s.storage_id: s for s in (a, b)}
    space = Space([a, b])
    first, second = (
        decide_copies(ItemView(uuid.uuid4(), "READY", 10, "SOLID"), [replica(a)], views, space, NOW)
        for _ in range(2)
    )
    assert first.copies and not second.copies


STATES = ("PENDING", "READY", "SUSPECT", "CORRUPTED", "MISSING")


@st.composite
def sites(draw):
    storages = [
        storage(
            n,
            draw(st.sampled_from([A, B, C])),
            draw(st.sampled_from([0, 1, 2, 4])),
            draw(st.sampled_from(["read_write", "read_only", "draining", "offline", "retired"])),
            draw(st.booleans()),
            draw(st.sampled_from([5, 1e9])),
        )
        for n in range(1, draw(st.integers(1, 6)) + 1)
    ]
    held = draw(st.lists(st.sampled_from(storages), unique=True, max_size=4))
    replicas = [replica(s, draw(st.sampled_from(STATES))) for s in held]
    return storages, replicas


@given(sites(), st.sampled_from(list(Phase)))
def test_every_decision_is_sound(site, target):
    """For any site: no target is chosen twice, each target may be written and has room, a copy is
    planned only if a READY source exists, and without shortfall the target phase is reached."""
    storages, replicas = site
    views = {s.storage_id: s for s in storages}
    decision = decide(replicas, storages, target=target)
    chosen = [views[copy.storage_id] for copy in decision.copies]
    live = {r.storage_id for r in replicas if r.state in ("PENDING", "READY", "SUSPECT")}
    assert len({s.storage_id for s in chosen}) == len(chosen)
    assert all(s.mode == "read_write" and s.managed and s.free >= 10 for s in chosen)
    assert not live & {s.storage_id for s in chosen}
    ready = [r for r in replicas if r.state == "READY"]
    assert ready or not chosen
    if decision.shortfall is None:
        assert sum(weight_of(ready, views).values()) >= target.weight
