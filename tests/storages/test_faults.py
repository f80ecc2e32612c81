"""What the DLM does when a storage lies, lags or fails: the real lifecycle on faulty storages.

The table in docs/faults.md names these tests.
"""

import os
import shutil
import threading
from datetime import timedelta

import pytest

from dlm_core.catalogue.operations import retry_failed
from dlm_core.clock import utc_now
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import StoragePool, drain
from dlm_core.storages.open import open_storage
from dlm_core.transfers.sweep import sweep_temp
from dlm_core.types import OperationKind
from tests.fakes import Hooked
from tests.faulty import ALWAYS, Fault, Faulty
from tests.site import make_site, reopen

GOOD = b"good bytes"


class Faults:
    """The faulty storages of a site by name, made when they are first opened."""

    def __init__(self, seed=0, rates=None):
        self.by_name, self.seed, self.rates = {}, seed, rates

    def __call__(self, row):
        if row["name"] not in self.by_name:
            inner = open_storage(row["name"], row["interface"], row["root"], row["config"])
            self.by_name[row["name"]] = Faulty(inner, self.seed + len(self.by_name), self.rates)
            self.by_name[row["name"]].concurrency = 1
        return self.by_name[row["name"]]

    def __getitem__(self, name):
        return self.by_name[name]

    def values(self):
        return self.by_name.values()


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    for name in ("a", "b"):
        site.add_storage(name, name.upper())
    return site


@pytest.fixture
def faults(site):
    faults = Faults()
    reopen(site, faults)
    site.context.transact(lambda c: [faults(row) for row in site.context.storages.load(c).values()])
    return faults


def add_c(site, faults):
    """A third place to copy to."""
    site.add_storage("c", "C")
    site.context.transact(lambda c: [faults(row) for row in site.context.storages.load(c).values()])


def rounds(site, count=4):
    """The sensors' work over some hours."""
    for _ in range(count):
        site.settle()
        site.advance(hours=1)


def admit(site, count=4):
    for _ in range(count):
        drain(site.context, {OperationKind.ADMIT: execute_admit})
        site.advance(hours=1)


def verify(site, **where):
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, **where)
    )


def whole(site, oid):
    """Check that the item is READY at its target and each READY replica has the right bytes."""
    item = site.item(oid)
    assert (item["state"], item["shortfall"]) == ("READY", None)
    ready = [name for name, state in site.replicas(oid).items() if state == "READY"]
    assert len(ready) >= 2
    for name in ready:
        path = site.replica(oid, name)["path"]
        assert (site.folder / name / path).read_bytes() == GOOD


def surplus_in_trash(site):
    """An item with one copy in the trash of ``a`` and one survivor on ``b``."""
    oid = site.add_item("x", GOOD, "a")
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE storage_id = :s",
        now=site.now, s=site.storages["a"],
    )  # fmt: skip
    site.settle()
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}
    return oid


def expired_in_trash(site):
    oid = site.add_item("x", GOOD, "a")
    site.settle()
    site.advance(seconds=1)
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    site.settle()
    assert set(site.replicas(oid).values()) == {"TRASHED"}
    return oid


def operations(site, kind, state):
    return site.query(
        "SELECT * FROM operation WHERE kind = :kind AND state = :state", kind=kind, state=state
    )


# --- listings -------------------------------------------------------------------------------------


def test_what_a_listing_leaves_out_is_announced_by_the_next(site, faults):
    """Nothing is concluded from absence: the rest is registered, and the missing one later."""
    for n in range(4):
        (site.folder / "a" / f"f{n}").write_bytes(b"%d" % n)
    faults["a"].arm(Fault.LISTING_INCOMPLETE)
    assert register_tree(site.context, Source("a", "test")).created == 3
    admit(site)
    faults["a"].arm(Fault.LISTING_INCOMPLETE)
    register_tree(site.context, Source("a", "test"))
    register_tree(site.context, Source("a", "test"))
    admit(site)
    states = site.query("SELECT state FROM replica")
    assert [row["state"] for row in states] == ["READY"] * 4


def test_a_partial_listing_makes_no_manifest(site, faults):
    """A directory is listed before and after it is read: what differs is looked at again."""
    for name in ("1", "2", "3"):
        file = site.folder / "a" / "t.ms" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    register_tree(site.context, Source("a", "test", as_directory=["*.ms"]))
    faults["a"].arm(Fault.LISTING_INCOMPLETE, only="t.ms")
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert site.query("SELECT state FROM data_item") == [{"state": "INITIALISED"}]
    admit(site)
    assert site.query("SELECT count(*) AS n FROM manifest_file") == [{"n": 3}]
    faults["a"].arm(Fault.LISTING_INCOMPLETE, only="t.ms")
    verify(site, storage_id=site.storages["a"])
    site.work(OperationKind.VERIFY)
    assert site.query("SELECT state FROM replica") == [{"state": "READY"}]


def test_what_a_stale_listing_shows_is_read_before_it_is_believed(site, faults):
    """An item whose payload is gone is never READY, and says why."""
    for name in ("there", "gone"):
        (site.folder / "a" / name).write_bytes(b"x")
    list(faults["a"].walk())
    (site.folder / "a" / "gone").unlink()
    faults["a"].arm(Fault.LISTING_STALE)
    assert register_tree(site.context, Source("a", "test")).created == 2
    admit(site)
    states = {r["name"]: r["state"] for r in site.query("SELECT name, state FROM data_item")}
    assert states == {"there": "READY", "gone": "INITIALISED"}
    assert operations(site, "admit", "FAILED")[0]["error_code"] == "DLM-303"


# --- stat and removal -----------------------------------------------------------------------------


def test_a_survivor_that_is_only_said_to_be_there_stops_the_purge(site, faults):
    """It has to open with its size: the trashed copy is brought back, and the lost one made."""
    oid = surplus_in_trash(site)
    path = site.replica(oid, "b")["path"]
    faults["b"].stat(path)
    (site.folder / "b" / path).unlink()
    faults["b"].arm(Fault.GHOST, ALWAYS)
    site.advance(hours=2)
    rounds(site)
    assert site.replicas(oid)["a"] == "READY"
    assert site.visible("a") == {"x": GOOD}


def test_a_directory_whose_files_are_gone_is_no_survivor(site, faults):
    """A purge looks at the files of a directory payload, not only at its folder."""
    for name in ("1", "2"):
        file = site.folder / "a" / "t.ms" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    register_tree(site.context, Source("a", "test", as_directory=["*.ms"]))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    (row,) = site.query("SELECT oid FROM data_item")
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE storage_id = :s",
        now=site.now, s=site.storages["a"],
    )  # fmt: skip
    site.settle()
    assert site.replicas(row["oid"]) == {"a": "TRASHED", "b": "READY"}
    (site.folder / "b" / site.replica(row["oid"], "b")["path"] / "2").unlink()
    site.advance(hours=2)
    rounds(site)
    assert site.replicas(row["oid"])["a"] == "READY"
    assert site.visible("a") == {"t.ms/1": b"x", "t.ms/2": b"x"}


def test_a_removal_that_stat_denies_is_tried_again(site, faults):
    """Gone is only what a look confirms; an unknown outcome is "may still be there"."""
    oid = expired_in_trash(site)
    site.advance(hours=2)
    faults["a"].arm(Fault.GHOST, only="trash")
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED"
    assert operations(site, "purge", "QUEUED")[0]["error_code"] == "DLM-301"
    rounds(site)
    assert set(site.replicas(oid).values()) == {"DELETED"}


def test_a_removal_whose_reply_is_lost_is_done_once_more(site, faults):
    """Removing what is gone is fine: the second try confirms."""
    oid = expired_in_trash(site)
    site.advance(hours=2)
    faults["a"].arm(Fault.DELETE_REPLY_LOST, only="trash")
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED"
    rounds(site)
    assert set(site.replicas(oid).values()) == {"DELETED"}
    assert site.private("a", "trash") == []


def test_a_removal_that_is_only_said_to_be_done_is_not_believed(site, faults):
    """As long as the bytes are there the replica is not DELETED."""
    oid = expired_in_trash(site)
    site.advance(hours=2)
    faults["a"].arm(Fault.DELETE_NOT_DONE, 2, only="trash")
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED" and len(site.private("a", "trash")) == 1
    rounds(site)
    assert set(site.replicas(oid).values()) == {"DELETED"}
    assert site.private("a", "trash") == []


def test_a_move_to_the_trash_that_is_only_said_to_be_done_is_done_again(site, faults):
    """As long as the bytes are in their place they are not said to be gone."""
    oid = site.add_item("x", GOOD, "a")
    site.settle()
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    faults["a"].arm(Fault.RENAME_NOT_DONE, only="x")
    site.settle()
    assert "still there after its move" in operations(site, "trash", "QUEUED")[0]["error"]
    rounds(site)
    assert set(site.replicas(oid).values()) == {"DELETED"} and site.visible("a") == {}


def test_a_way_back_that_is_only_said_to_be_done_is_done_again(site, faults):
    """What is not in its place then is in the trash yet, and not MISSING."""
    oid = expired_in_trash(site)
    faults["a"].arm(Fault.RENAME_NOT_DONE, only="trash")
    site.context.transact(
        lambda c: request_restore(c, oid=oid, storage_id=None, actor="u", now=site.now)
    )
    site.work(OperationKind.RESTORE)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}
    site.advance(minutes=1)
    site.work(OperationKind.RESTORE)
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    whole(site, oid)
    events = site.query("SELECT new_state FROM event WHERE noun = 'replica'")
    assert "MISSING" not in {event["new_state"] for event in events}


# --- bytes ----------------------------------------------------------------------------------------


def test_a_write_cut_short_never_becomes_visible(site, faults):
    """It is read back before it gets its name; the next try makes it whole."""
    oid = site.add_item("x", GOOD, "a")
    faults["b"].arm(Fault.WRITE_CUT_SHORT)
    site.settle()
    assert site.visible("b") == {} and site.replicas(oid)["b"] == "PENDING"
    assert site.private("b", "tmp") == []
    rounds(site)
    whole(site, oid)


def test_a_bit_that_flips_at_rest_is_found_set_aside_and_mended(site, faults):
    """By verification; the second look confirms, and the copy is made again from a good one."""
    oid = site.add_item("x", GOOD, "a")
    faults["b"].arm(Fault.BIT_FLIPPED)
    site.settle()
    assert GOOD not in site.visible("b").values()
    verify(site)
    rounds(site)
    whole(site, oid)
    assert len(site.private("b", "quarantine")) == 1


def test_a_survivor_with_a_flipped_bit_stops_the_purge(engine, tmp_path):
    """One whose last check is older than DLM_PROOF_MAX_AGE_SECONDS is read whole before."""
    site = make_site(engine, tmp_path, proof_max_age_seconds=60)
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    faults = Faults()
    reopen(site, faults)
    oid = surplus_in_trash(site)
    faults["b"].flip(site.replica(oid, "b")["path"])
    for file in (tmp_path / "b").rglob("*"):
        os.utime(file, (1, 1))  # else it would be read for having been written since
    site.advance(hours=2)
    rounds(site)
    assert site.replicas(oid)["a"] == "READY" and site.visible("a") == {"x": GOOD}


@pytest.mark.parametrize("storage", ["a", "b"])
def test_a_read_that_differs_once_condemns_nothing(site, faults, storage):
    """As source, as read-back, in verification: a second look decides."""
    oid = site.add_item("x", GOOD, "a")
    faults[storage].arm(Fault.READ_DIFFERS_ONCE)
    rounds(site)
    whole(site, oid)
    faults[storage].arm(Fault.READ_DIFFERS_ONCE)
    verify(site)
    rounds(site)
    whole(site, oid)
    assert len(faults[storage].struck) == 2
    assert site.private(storage, "quarantine") == []


# --- refusals and outages -------------------------------------------------------------------------


def test_a_storage_that_denies_gets_no_copy_and_loses_none(site, faults):
    """The copy goes elsewhere; a look that is denied proves nothing and is told as FAILED."""
    add_c(site, faults)
    oid = site.add_item("x", GOOD, "a")
    for name in ("b", "c"):
        faults[name].arm(Fault.PERMISSION_LOST, ALWAYS)
    site.settle()
    assert site.replicas(oid)["a"] == "READY"
    faults["c"].heal()
    rounds(site)
    whole(site, oid)
    assert site.replicas(oid)["c"] == "READY"
    faults["c"].arm(Fault.PERMISSION_LOST, ALWAYS)
    verify(site, storage_id=site.storages["c"])
    rounds(site, 1)
    assert site.replicas(oid)["c"] == "READY"
    assert operations(site, "verify", "FAILED")[0]["error_code"] == "DLM-306"


def test_a_survivor_that_may_not_be_looked_at_puts_the_purge_off(site, faults):
    """Denied is not seen: the trash stays until it can be proven."""
    oid = surplus_in_trash(site)
    faults["b"].arm(Fault.PERMISSION_LOST, ALWAYS)
    site.advance(hours=2)
    rounds(site)
    assert site.replicas(oid)["a"] == "TRASHED" and len(site.private("a", "trash")) == 1
    faults["b"].heal()
    rounds(site)
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"}


def test_a_full_disk_sends_the_copy_elsewhere(site, faults):
    """Nothing half-written stays on it."""
    add_c(site, faults)
    oid = site.add_item("x", GOOD, "a")
    for name in ("b", "c"):
        faults[name].arm(Fault.FULL, 1)
    rounds(site)
    whole(site, oid)
    assert site.private("b", "tmp") == site.private("c", "tmp") == []


@pytest.mark.parametrize("call", ["tmp", "x", "trash", ""])
def test_a_call_that_times_out_is_tried_again(site, faults, call):
    """Also when it was done: what is there is compared and adopted."""
    oid = site.add_item("x", GOOD, "a")
    for storage in faults.values():
        storage.arm(Fault.TIMEOUT, 2, only=call)
    rounds(site)
    whole(site, oid)
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    for storage in faults.values():
        storage.arm(Fault.TIMEOUT, 2, only=call)
    rounds(site, 6)
    assert set(site.replicas(oid).values()) == {"DELETED"}
    assert [site.private(name, "tmp") + site.private(name, "trash") for name in "ab"] == [[], []]


def test_an_empty_folder_in_the_place_of_a_disk_is_an_outage(site):
    """As below one that is not mounted on its server: no copy there is MISSING, to who has looked
    before and to who comes new, nothing is written there, and all is as before when it is back."""
    oid, root, away = site.add_item("x", GOOD, "a"), site.folder / "b", site.folder / "away"
    site.settle()
    root.rename(away)
    root.mkdir()
    verify(site)
    site.settle()
    assert "is its disk mounted?" in operations(site, "verify", "QUEUED")[0]["error"]
    site.context.storages = StoragePool()
    other = site.add_item("y", GOOD, "a")
    rounds(site)
    assert [*root.iterdir()] == [] and site.replicas(other)["b"] == "PENDING"
    root.rmdir()
    away.rename(root)
    site.context.storages = StoragePool()
    site.context.transact(lambda c: retry_failed(c, site.now))
    rounds(site)
    whole(site, oid)
    whole(site, other)
    events = site.query("SELECT new_state FROM event WHERE noun = 'replica'")
    assert "MISSING" not in {event["new_state"] for event in events}


def test_the_last_purge_where_nothing_is_left_is_finished(site):
    """Its worker was lost before it could say so: in a bucket, which has no folders and may be
    without a mark, nothing at all is there then, and that is no outage."""
    oid = site.add_item("x", GOOD, "a")
    site.settle()
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    site.work(OperationKind.TRASH, plan=ExpiryPlanner(10, 1 << 30))
    assert set(site.replicas(oid).values()) == {"TRASHED"}
    for name in "ab":
        shutil.rmtree(site.folder / name)
        (site.folder / name).mkdir()
    site.context.storages = StoragePool()
    site.advance(days=30)
    site.work(OperationKind.PURGE)
    assert set(site.replicas(oid).values()) == {"DELETED"}


def test_a_storage_that_is_gone_and_back_changes_nothing(site, faults):
    """Its replicas stay READY, its work waits, nothing is purged on its word; then all goes on."""
    oid = surplus_in_trash(site)
    faults["b"].arm(Fault.GONE, ALWAYS)
    verify(site)
    site.advance(hours=2)
    rounds(site)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}
    assert len(site.private("a", "trash")) == 1
    faults["b"].heal()
    rounds(site)
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"}


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [-3, 3])
def test_a_storage_whose_clock_is_wrong_makes_no_new_version(site, faults, days):
    """Other times of change are a reason to read, and the bytes are the same."""
    (site.folder / "a" / "x").write_bytes(GOOD)
    register_tree(site.context, Source("a", "test"))
    admit(site)
    faults["a"].skew = timedelta(days=days).total_seconds()
    faults["a"].arm(Fault.CLOCK_SKEW, ALWAYS)
    report = register_tree(site.context, Source("a", "test"))
    assert (report.unchanged, report.refused, report.new_versions) == (1, 0, 0)
    rounds(site)
    whole(site, site.query("SELECT oid FROM data_item")[0]["oid"])


def test_a_temporary_file_swept_too_early_is_no_copy(site, faults):
    """A storage whose clock is days behind makes a running copy look left behind: the copy finds
    that out, and the next try makes it."""
    oid = site.add_item("x", GOOD, "a")
    faults["b"].skew = -timedelta(days=5).total_seconds()
    faults["b"].arm(Fault.CLOCK_SKEW, ALWAYS)
    swept = threading.Event()

    def sweep(call, path):
        if call == "flush" and not swept.is_set():
            swept.set()
            assert sweep_temp(faults["b"], timedelta(days=2), utc_now()) == 1

    opened = {"a": faults["a"], "b": Hooked(faults["b"], sweep)}
    reopen(site, lambda row: opened[row["name"]])
    site.settle()
    assert site.replicas(oid)["b"] == "PENDING" and site.visible("b") == {}
    rounds(site)
    whole(site, oid)


# --- everything at once ---------------------------------------------------------------------------

_STORM = {
    fault: 0.04
    for fault in Fault
    if fault not in (Fault.BIT_FLIPPED, Fault.CLOCK_SKEW, Fault.LISTING_STALE)
}


def storm(site, seed):
    """Copies, moves and expiry while everything fails by chance; what struck in the end."""
    faults = Faults(1000 * seed, _STORM)
    reopen(site, faults)
    oids = [site.add_item(f"s{n}", GOOD, "a") for n in range(6)]
    gone = site.add_item("old", b"old", "a")
    rounds(site, 2)
    add_c(site, faults)
    site.execute("UPDATE data_item SET expires_at = :now WHERE oid = :o", now=site.now, o=gone)
    site.set_storage("a", mode="draining")
    verify(site)
    rounds(site, 4)
    for storage in faults.values():
        storage.heal()
    for _ in range(6):
        site.context.transact(lambda c: retry_failed(c, site.now))
        rounds(site, 2)
    return oids, gone, faults


_SEEDS = [0, 1, 2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(3, 60))]


@pytest.mark.parametrize("seed", _SEEDS)
def test_a_storm_of_faults_loses_nothing(site, seed):
    """Once it is over every item has its copies, the drained storage is empty, the expired gone."""
    oids, gone, faults = storm(site, seed)
    assert sum(len(storage.struck) for storage in faults.values()) > 10
    verify(site)
    rounds(site, 2)
    for oid in oids:
        whole(site, oid)
        assert site.replicas(oid)["a"] == "DELETED"
    assert site.item(gone)["state"] == "DELETED"
    assert site.visible("a") == {} and site.private("a", "trash") == []


def test_a_fault_by_chance_strikes_again_from_its_seed(tmp_path):
    """The same calls with the same seed meet the same faults."""

    def story(seed):
        root = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        storage = Faulty(open_storage("x", "posix", str(root), {}), seed, {Fault.GHOST: 0.3})
        (root / "f").write_bytes(b"1")
        storage.stat("f")
        (root / "f").unlink()
        return [storage.stat("f") is None for _ in range(50)]

    assert story(1) == story(1) != story(2)
