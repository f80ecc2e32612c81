"""What leaves a storage, and what does not leave it after all."""

from pathlib import Path

import pytest

from dlm_core.catalogue.capacity import storages_to_observe, storages_to_relieve
from dlm_core.catalogue.places import set_storage
from dlm_core.catalogue.replicas import select_unmarked
from dlm_core.errors import StorageUnavailableError
from dlm_core.lifecycle.rebalance import ASK_AGAIN, _drain, plan_rebalance, propose_rebalance
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.work import _open_row
from dlm_core.storages.port import Usage
from tests.fakes import Wrapped
from tests.site import make_site, reopen


class Measured(Wrapped):
    """A disk of 2100 bytes with nothing on it but payloads of 100, trash included."""

    folder: Path

    def usage(self):
        files = [one for one in self.folder.rglob("*") if one.is_file()]
        return Usage(2100, sum(100 for one in files if one.stat().st_size == 100))


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    for name, location in (("a", "A"), ("b", "B"), ("c", "C")):
        site.add_storage(name, location)
        site.set_storage(name, capacity_bytes=100_000)

    def opened(row):
        storage = _open_row(row)
        if row["name"] != "a":
            return storage
        measured = Measured(storage)
        measured.folder = tmp_path / "a"
        return measured

    reopen(site, opened)
    return site


def test_what_was_purged_since_a_storage_was_asked_does_not_leave_twice(site):
    """It is asked again before anything leaves: what it told earlier counts what is gone by now."""
    oids = [site.add_item(f"{n}", bytes(100), "a") for n in range(20)]
    site.settle()
    site.set_storage("a", capacity_bytes=None, high_watermark=0.9, low_watermark=0.5)
    for _ in range(40):
        site.settle()
        site.advance(minutes=7)
    kept = [oid for oid in oids if site.replicas(oid)["a"] == "READY"]
    assert len(kept) == 10


def test_nothing_leaves_for_a_drain_that_was_called_off_meanwhile(site):
    """Whoever found the storage to be drained looks again before it marks anything."""
    oid = site.add_item("x", bytes(100), "a")
    site.settle()
    site.set_storage("a", mode="draining")
    (found,) = site.context.transact(lambda c: storages_to_relieve(c, site.now))
    site.context.transact(lambda c: set_storage(c, "a", {"mode": "read_write"}))
    assert site.context.transact(lambda c: _drain(c, site.context, found)) == []
    assert site.replica(oid, "a")["expires_at"] is None


def test_a_storage_of_others_that_is_drained_is_replaced_and_its_files_are_left(site):
    """What lies there is copied elsewhere and then released; nobody touches a file of theirs."""
    site.add_storage("theirs", "T", managed=False, mode="read_only")
    oid = site.add_item("x", b"good bytes", "theirs", target_phase="LIQUID")
    site.settle()
    assert site.replicas(oid) == {"theirs": "READY"}
    site.set_storage("theirs", mode="draining")
    for _ in range(6):
        site.settle()
        site.advance(minutes=20)
    found = site.replicas(oid)
    assert found.pop("theirs") == "DELETED" and list(found.values()) == ["READY"]
    assert site.visible("theirs") == {"x": b"good bytes"}
    assert list((site.folder / "theirs").iterdir()) == [site.folder / "theirs" / "x"]
    site.set_storage("theirs", mode="retired", retired_at=site.now)


@pytest.fixture
def crowded(site, monkeypatch):
    """The seven coldest copies on a are needed there, the warmest is surplus; three are looked at
    together."""
    monkeypatch.setattr("dlm_core.lifecycle.rebalance._BATCH", 3)
    site.set_storage("c", mode="read_only")
    for n in range(7):
        site.add_item(f"cold-{n}", bytes(100), "a")
    site.settle()
    site.advance(days=1)
    warm = site.add_item("warm", bytes(100), "a")
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=warm)
    site.settle()
    site.set_storage("a", capacity_bytes=1000, high_watermark=0.75, low_watermark=0.7)
    return site, warm


def test_cold_copies_that_cannot_leave_do_not_hide_a_warmer_one_that_can(crowded):
    """They are passed over, however many they are."""
    site, warm = crowded
    assert [one.oid for one in propose_rebalance(site.context)] == [warm]
    assert plan_rebalance(site.context) == 1
    assert site.replica(warm, "a")["expires_at"] == site.now
    site.settle()
    assert site.replicas(warm) == {"a": "TRASHED", "b": "READY"}


def test_a_storage_that_nothing_can_leave_is_looked_at_again_later(crowded):
    """Not at once, and not after a look that was broken off."""
    site, warm = crowded
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :oid", oid=warm)
    put_off = "SELECT rebalance_after FROM storage WHERE name = 'a'"
    site.context.stop.set()
    assert plan_rebalance(site.context) == 0
    assert site.query(put_off) == [{"rebalance_after": None}]
    site.context.stop.clear()
    assert plan_rebalance(site.context) == 0
    assert site.query(put_off)[0]["rebalance_after"] > site.now


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pages_of_candidates_show_each_once(site, size):
    """Coldest first, then largest, though many are of one age and one size."""
    for day in range(3):
        for n in range(4):
            site.add_item(f"{day}-{n}", bytes(100 + n // 2), "a")
        site.advance(days=1)
    on = site.storages["a"]
    found, last = [], None
    while page := site.context.transact(lambda c, after=last: select_unmarked(c, on, size, after)):
        found += page
        last = page[-1]
    expected = site.query("SELECT uid FROM replica ORDER BY accessed_at, size DESC, uid")
    assert [row["uid"] for row in found] == [row["uid"] for row in expected]
    assert [row["size"] for row in found] == [101, 101, 100, 100] * 3


@pytest.mark.parametrize("batch", [5, 4, 2000])
def test_a_copy_that_may_leave_is_found_behind_those_that_may_not(site, monkeypatch, batch):
    """The coldest of a full storage have no other place: what is surplus among the warmer ones goes
    all the same, whatever is looked at at once, and then it is not asked again for a while."""
    monkeypatch.setattr("dlm_core.lifecycle.rebalance._BATCH", batch)
    cold = [site.add_item(f"cold-{n}", bytes(100), "a") for n in range(12)]
    site.advance(hours=1)
    warm = [site.add_item(f"warm-{n}", bytes(100), "a") for n in range(3)]
    site.settle()
    for name in "bc":
        site.set_storage(name, mode="read_only")
    for oid in warm:
        site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.set_storage("a", capacity_bytes=1600, high_watermark=0.9, low_watermark=0.8)
    site.settle()
    site.advance(hours=2)
    site.settle()
    gone = [oid for oid in warm if site.replicas(oid)["a"] == "DELETED"]
    assert len(gone) == 3
    assert {site.replicas(oid)["a"] for oid in cold} == {"READY"}
    site.set_storage("a", low_watermark=0.5, high_watermark=0.6)
    site.settle()
    (row,) = site.query("SELECT rebalance_after FROM storage WHERE name = 'a'")
    assert row["rebalance_after"] >= site.now


class Telling(Wrapped):
    """Tells of its capacity what the test says, or raises it."""

    answers: list[object]

    def usage(self):
        (answer,) = self.answers
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def told(site):
    """What storage b answers from now on; it has no capacity given."""
    answers: list[object] = [Usage(1000, 100)]

    def opened(row):
        storage = _open_row(row)
        if row["name"] == "b":
            storage = Telling(storage)
            storage.answers = answers
        return storage

    reopen(site, opened)
    site.set_storage("b", capacity_bytes=None)
    site.set_storage("c", mode="read_only")
    plan_rebalance(site.context)
    return answers


def observed(site):
    (row,) = site.query("SELECT observed_total_bytes AS n FROM storage WHERE name = 'b'")
    return row["n"]


def to_be_asked(site):
    before = site.now - ASK_AGAIN
    return [row["name"] for row in site.context.transact(lambda c: storages_to_observe(c, before))]


def test_copies_that_are_on_their_way_take_room_of_what_a_storage_told(site, told):
    """It told its use before they were planned: each batch of a plan would promise it once more."""
    for n in range(4):
        site.add_item(f"{n}", bytes(300), "a")
        plan_replication(site.context)
    assert len(site.query("SELECT uid FROM replica WHERE state = 'PENDING'")) == 2


@pytest.mark.parametrize(
    "answer", [None, Usage(-1, 5), StorageUnavailableError(storage="b", message="away")]
)
def test_a_storage_that_gives_no_answer_for_once_is_not_taken_as_having_room(site, told, answer):
    """What it told is kept, and it is asked again after ten minutes: not never, and not at once."""
    told[:] = [answer]
    site.advance(minutes=11)
    assert to_be_asked(site) == ["b"]
    plan_rebalance(site.context)
    assert observed(site) == 1000 and to_be_asked(site) == []
    told[:] = [Usage(2000, 100)]
    site.advance(minutes=11)
    plan_rebalance(site.context)
    assert observed(site) == 2000


def test_a_storage_that_tells_nothing_for_a_day_cannot_tell(site, told):
    """A quota that was lifted, say; it is still asked, for it may have one again."""
    told[:] = [None]
    for _ in range(2):
        site.advance(hours=13)
        plan_rebalance(site.context)
    assert observed(site) is None
    told[:] = [Usage(3000, 100)]
    site.advance(hours=2)
    plan_rebalance(site.context)
    assert observed(site) == 3000


def test_a_storage_is_asked_anew_when_its_capacity_is_no_longer_given(site, told):
    """At once, and what it told before is forgotten."""
    for capacity in (500, None):
        site.context.transact(lambda c, n=capacity: set_storage(c, "b", {"capacity_bytes": n}))
    assert observed(site) is None and to_be_asked(site) == ["b"]
