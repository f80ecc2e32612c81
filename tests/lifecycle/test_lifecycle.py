"""Replication, verification, expiry, restore and rebalancing on real files."""

import json
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from dlm_core.catalogue import deletions
from dlm_core.catalogue.operations import retry_failed
from dlm_core.errors import BlastRadiusError, CatalogueError, NotFoundError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner, propose_expiry
from dlm_core.lifecycle.rebalance import plan_rebalance, propose_rebalance
from dlm_core.lifecycle.register import Source, register_list
from dlm_core.lifecycle.replicate import (
    execute_copy,
    plan_replication,
    propose_replication,
)
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.storages import open as opening
from dlm_core.storages import staging
from dlm_core.types import OperationKind
from tests.site import make_site


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    site.add_storage("c", "C")
    return site


def request(site, oid, **where):
    return site.context.transact(
        lambda c: request_restore(c, oid=oid, actor="user:test", now=site.now,
                                  storage_id=where.get("storage_id"))
    )  # fmt: skip


def test_an_item_gets_the_copies_its_target_phase_needs(site):
    """SOLID from one LIQUID copy: one more at another location, verified, no temporary files."""
    oid = site.add_item("x/1.dat", b"payload", "a")
    site.settle()
    states = site.replicas(oid)
    assert sorted(states.values()) == ["READY", "READY"]
    (other,) = set(states) - {"a"}
    assert list(site.visible(other).values()) == [b"payload"]
    assert site.private(other, "tmp") == []
    item = site.item(oid)
    assert (item["phase_weight"], item["shortfall"]) == (4, None)


def test_planning_twice_plans_nothing_new(site):
    """A second look at an item whose copies are on their way queues nothing."""
    site.add_item("x", b"1", "a")
    assert plan_replication(site.context) == 1
    assert plan_replication(site.context) == 0
    assert site.query("SELECT count(*) AS n FROM operation")[0]["n"] == 1


def test_a_dry_run_changes_nothing(site):
    """propose_replication names the copy and its reason; the catalogue stays as it was."""
    site.add_item("x", b"1", "a")
    (proposal,) = propose_replication(site.context)
    assert proposal.uri == "test:x" and "SOLID" in proposal.copy.reason
    assert site.query("SELECT count(*) AS n FROM operation")[0]["n"] == 0
    assert plan_replication(site.context) == 1


def test_a_damaged_source_is_never_copied(site):
    """A source that no longer has its digest: nothing is written, it is looked at twice, set
    aside under a visible name, and the item is CORRUPTED as it was the only copy."""
    oid = site.add_item("x", b"good bytes", "a")
    (site.folder / "a" / "x").write_bytes(b"evil bytes")
    site.settle()
    site.advance(minutes=1)  # it is looked for before it is called lost
    site.settle()
    assert site.replicas(oid)["a"] == "CORRUPTED"
    assert site.item(oid)["state"] == "CORRUPTED"
    assert site.visible("b") == {} and site.visible("c") == {}
    assert len(site.private("a", "quarantine")) == 1


def test_damage_is_noticed_and_repaired_from_a_good_copy(site):
    """Verification finds flipped bytes, a second look confirms, the copy is made again."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    other = next(name for name in site.replicas(oid) if name != "a")
    (path,) = site.visible(other)
    (site.folder / other / path).write_bytes(b"evil bytes")
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, storage_id=site.storages[other]
        )
    )
    site.settle()
    assert site.visible(other) == {path: b"good bytes"}
    assert set(site.replicas(oid).values()) == {"READY"}
    history = site.query(
        "SELECT new_state FROM event WHERE noun = 'replica' AND action = 'state' AND uid = :uid "
        "ORDER BY seq",
        uid=site.replica(oid, other)["uid"],
    )
    states = [row["new_state"] for row in history]
    assert states == ["READY", "SUSPECT", "CORRUPTED", "PENDING", "READY"]


def test_a_vanished_payload_is_made_again(site):
    """A file that is gone from a storage that is well: MISSING, then copied again."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    (site.folder / "a" / "x").unlink()
    (site.folder / "a" / ".dlm").mkdir()  # as any in use has
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.settle()
    assert site.visible("a") == {"x": b"good bytes"}
    assert set(site.replicas(oid).values()) == {"READY"}


def test_an_outage_proves_nothing(site):
    """A storage whose root has vanished is down: its replicas stay READY, the look comes again."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    (site.folder / "a").rename(site.folder / "unmounted")
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid)["a"] == "READY"
    waiting = site.query("SELECT * FROM operation WHERE kind = 'verify' AND state = 'QUEUED'")
    assert waiting[0]["error_code"] == "DLM-301"


def expire(site, oid):
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = 'no longer wanted' "
        "WHERE oid = :oid",
        oid=oid,
        now=site.now,
    )


@pytest.mark.parametrize("broken", ["adapter", "stager"])
def test_a_broken_plug_in_stops_its_own_storage_only(site, tmp_path, monkeypatch, broken):
    """Whatever it raises when it is loaded: copies between the others are made, those to its own
    storage wait as in an outage."""
    (tmp_path / "dlm_test_no_licence.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module, caches = (
        (opening, opening.interfaces) if broken == "adapter" else (staging, staging.stagers)
    )
    point = EntryPoint("mine", "dlm_test_no_licence:opened", "")
    monkeypatch.setattr(module, "entry_points", lambda group: [point])
    caches.cache_clear()
    config = {"interface": "mine"} if broken == "adapter" else {"config": '{"stage": "mine"}'}
    site.add_storage("plugged", "P", **config)
    tape = {"stage": "command", "stage_command": "true"}
    site.add_storage("tape", "T", config=json.dumps(tape), phase="GAS")
    for name in ("a", "b", "plugged"):
        site.set_storage(name, phase="GAS")
    site.set_storage("c", mode="read_only")
    oid = site.add_item("f", b"payload", "a")
    try:
        report = site.settle()
    finally:
        caches.cache_clear()
    assert report.done == {"copy": 2} and report.retried == {"DLM-301": 1} and not report.failed
    assert site.replicas(oid) == {
        "a": "READY", "b": "READY", "tape": "READY", "plugged": "PENDING"
    }  # fmt: skip
    (told,) = site.query("SELECT error FROM operation WHERE error IS NOT NULL")
    assert "'mine'" in told["error"] and "no licence" in told["error"]


def test_an_expired_item_goes_in_two_steps_with_certificates(site):
    """Trash, grace, purge, absence: two certificates a replica, the item DELETED at the end."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    assert set(site.replicas(oid).values()) == {"TRASHED"}
    assert site.visible("a") == {} and len(site.private("a", "trash")) == 1
    site.advance(minutes=59)
    site.settle()
    assert set(site.replicas(oid).values()) == {"TRASHED"}, "the grace is not over"
    site.advance(minutes=2)
    site.settle()
    assert set(site.replicas(oid).values()) == {"DELETED"}
    assert site.item(oid)["state"] == "DELETED"
    assert site.private("a", "trash") == []
    certificates = site.query("SELECT * FROM deletion ORDER BY deletion_id")
    assert [c["step"] for c in certificates] == ["trash"] * 2 + ["purge"] * 2
    assert {c["reason"] for c in certificates} >= {"its item has expired: no longer wanted"}


def test_trash_can_be_restored_until_its_grace_ends(site):
    """dlm restore brings every copy back, read and READY; after the purge nothing is left to."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    assert request(site, oid) == 2
    site.settle()
    assert set(site.replicas(oid).values()) == {"READY"}
    assert site.visible("a") == {"x": b"good bytes"}
    assert site.item(oid)["state"] == "READY" and site.item(oid)["expires_at"] is None
    site.advance(hours=5)
    site.settle()
    assert set(site.replicas(oid).values()) == {"READY"}
    expire(site, oid)
    site.settle()
    site.advance(hours=5)
    site.settle()
    with pytest.raises(NotFoundError):
        request(site, oid)


def test_a_copy_that_was_missing_does_not_go_again_when_its_item_is_restored(site):
    """It was in no trash, and its certificate would tell of an item that has not expired."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    (other,) = site.replicas(oid).keys() - {"a"}
    (site.folder / other / site.replica(oid, other)["path"]).unlink()
    for state in ("SUSPECT", "MISSING"):
        site.execute(
            "UPDATE replica SET state = :state WHERE uid = :uid",
            state=state, uid=site.replica(oid, other)["uid"],
        )  # fmt: skip
    # so that it need not be made again
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.advance(seconds=1)
    expire(site, oid)
    site.work(plan=ExpiryPlanner(10, 10**9))
    assert site.replicas(oid) == {"a": "TRASHED", other: "TRASHED"}
    request(site, oid)
    site.work(OperationKind.RESTORE)
    for _ in range(2):
        site.advance(seconds=1)
        site.settle()
    assert site.item(oid)["state"] == "READY"
    assert site.replicas(oid) == {"a": "READY", other: "MISSING"}
    assert len(site.query("SELECT FROM deletion")) == 2


def test_a_restore_never_removes_a_file_that_somebody_put_in_its_place(site):
    """What lies where a copy was is not the DLM's: the restore FAILS, both files stay, and a retry
    brings the copy back once the place is free."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    (site.folder / "a" / "x").write_bytes(b"somebody's")
    request(site, oid, storage_id=site.storages["a"])
    site.settle()
    assert site.visible("a") == {"x": b"somebody's"}
    assert len(site.private("a", "trash")) == 1
    (failed,) = site.query("SELECT * FROM operation WHERE state = 'FAILED'")
    assert (failed["kind"], failed["error_code"]) == ("restore", "DLM-304")
    (site.folder / "a" / "x").unlink()
    site.context.transact(lambda c: retry_failed(c, site.now))
    site.settle()
    assert site.visible("a") == {"x": b"good bytes"}
    assert site.replicas(oid)["a"] == "READY"


def test_a_restore_finishes_what_an_object_store_left_half_way(site):
    """The copy is back whole, its source in the trash was not deleted yet: only that is left."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    (site.folder / "a" / "x").write_bytes(b"good bytes")
    request(site, oid, storage_id=site.storages["a"])
    site.settle()
    assert site.replicas(oid)["a"] == "READY"
    assert site.visible("a") == {"x": b"good bytes"} and site.private("a", "trash") == []


def trashed_on_a(site):
    """An item whose copy on a lies in the trash, with good ones on b and c."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
        oid=oid, s=site.storages["a"], now=site.now,
    )  # fmt: skip
    for _ in range(2):
        site.settle()
        site.advance(minutes=1)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY", "c": "READY"}
    return oid


def test_a_copy_planned_while_the_old_one_comes_back_sends_that_to_the_trash_again(site):
    """One live copy of an item on a storage: the restore gives way, and the work goes on."""
    oid = trashed_on_a(site)
    other = site.add_item("other", b"2", "b", target_phase="LIQUID")
    request(site, oid, storage_id=site.storages["a"])
    site.set_storage("c", mode="draining")
    plan_rebalance(site.context)
    plan_replication(site.context)
    states = "SELECT state FROM replica WHERE oid = :oid AND storage_id = :s ORDER BY uid"
    rows = site.query(states, oid=oid, s=site.storages["a"])
    assert [row["state"] for row in rows] == ["TRASHED", "PENDING"]
    site.advance(seconds=1)
    expire(site, other)
    site.settle()
    rows = site.query(states, oid=oid, s=site.storages["a"])
    assert [row["state"] for row in rows] == ["TRASHED", "READY"]
    assert site.visible("a") == {"test/x": b"good bytes"}
    assert set(site.replicas(other).values()) == {"TRASHED"}
    site.advance(hours=2)
    site.settle()
    assert site.private("a", "trash") == []


def test_trash_whose_place_is_taken_is_not_forgotten(site):
    """It is needed again and cannot come back: its purge stays queued until the item has what it
    needs, and then it goes."""
    oid = trashed_on_a(site)
    site.set_storage("c", mode="draining")
    plan_rebalance(site.context)
    plan_replication(site.context)
    site.advance(hours=2)
    site.work(OperationKind.PURGE)
    (purge,) = site.query("SELECT state, error_code FROM operation WHERE kind = 'purge'")
    assert (purge["state"], purge["error_code"]) == ("QUEUED", "DLM-501")
    for _ in range(3):
        site.settle()
        site.advance(hours=2)
    assert site.private("a", "trash") == []
    assert site.replicas(oid) == {"a": "READY", "b": "READY", "c": "DELETED"}


def test_a_restore_leaves_the_purge_of_what_cannot_come_back(site):
    """Two copies in the trash, one place taken anew: the other comes back, the first is purged
    when its grace is over."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    (other,) = set(site.replicas(oid)) - {"a"}
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    request(site, oid, storage_id=site.storages[other])
    site.settle()
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
        oid=oid, s=site.storages[other], now=site.now,
    )  # fmt: skip
    (site.folder / "a" / "x").write_bytes(b"good bytes")
    register_list(site.context, Source("a", "test"), ["x"])
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    site.settle()
    assert site.replicas(oid)[other] == "TRASHED"
    assert request(site, oid) == 1
    site.advance(hours=2)
    site.settle()
    assert site.private("a", "trash") == [] and site.replicas(oid)[other] == "READY"


def test_damage_in_the_trash_gets_its_second_look(site):
    """What comes back damaged is SUSPECT, looked at again, set aside and made anew."""
    oid = trashed_on_a(site)
    (name,) = site.private("a", "trash")
    (site.folder / "a" / ".dlm" / "trash" / name).write_bytes(b"evil bytes")
    site.set_storage("c", mode="draining")
    request(site, oid, storage_id=site.storages["a"])
    site.work(OperationKind.RESTORE)
    assert site.replicas(oid)["a"] == "SUSPECT"
    site.settle()
    assert site.replicas(oid)["a"] == "READY"
    assert len(site.private("a", "quarantine")) == 1


def test_a_replica_expires_only_once_the_copies_it_assumes_are_there(site):
    """A replica past its time waits: it is replaced first, and survivors are in its certificate."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
        oid=oid, s=site.storages["a"], now=site.now,
    )  # fmt: skip
    planner = ExpiryPlanner(10, 10**9)
    assert planner(site.context) == 0 and planner.refused == 1
    assert site.replicas(oid)["a"] == "READY"
    site.settle()
    site.advance(minutes=1)
    site.settle()
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY", "c": "READY"}
    (certificate,) = site.query("SELECT * FROM deletion")
    assert {s["storage"] for s in certificate["survivors"]} == {"b", "c"}
    assert certificate["survivor_weight"] == 4


def test_the_last_copy_never_goes_with_its_replica(site):
    """With nowhere to copy to, an expired replica stays for good."""
    for name in ("b", "c"):
        site.set_storage(name, mode="offline")
    oid = site.add_item("x", b"good bytes", "a", target_phase="PLASMA")
    site.execute("UPDATE replica SET expires_at = :now WHERE oid = :oid", oid=oid, now=site.now)
    for _ in range(3):
        site.settle()
        site.advance(hours=1)
    assert site.replicas(oid)["a"] == "READY"
    assert site.visible("a") == {"x": b"good bytes"}


def test_a_hold_keeps_item_and_trash(site):
    """Under a hold an item does not expire, and what is in the trash is not purged."""
    held, trashed = site.add_item("held", b"1", "a"), site.add_item("trashed", b"2", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, trashed)
    site.settle()
    site.execute(
        "INSERT INTO hold (hold_id, uri_prefix, reason, actor, created_at) "
        "VALUES (gen_random_uuid(), 'test:', 'audit', 'user:a', :now)",
        now=site.now,
    )
    expire(site, held)
    site.settle()
    site.advance(hours=2)
    site.settle()
    assert site.item(held)["state"] == "READY"
    assert set(site.replicas(trashed).values()) == {"TRASHED"}
    site.execute("UPDATE hold SET ends_at = :now", now=site.now)
    site.advance(hours=2)
    site.settle()
    assert set(site.replicas(trashed).values()) == {"DELETED"}


def test_a_survivor_that_is_gone_stops_the_purge_and_brings_the_trash_back(site):
    """At purge time survivors are looked at on their storages, not believed."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
        oid=oid, s=site.storages["a"], now=site.now,
    )  # fmt: skip
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED"
    other = next(n for n, s in site.replicas(oid).items() if s == "READY")
    for file in (site.folder / other).rglob("x"):
        file.unlink()
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["a"] == "READY"
    assert site.visible("a") == {"x": b"good bytes"}


def test_unmanaged_files_are_released_and_never_touched(engine, tmp_path):
    """A replica on an unmanaged storage ends in the catalogue only; its file stays."""
    site = make_site(engine, tmp_path)
    site.add_storage("theirs", "A", managed=False, mode="read_only", phase="GAS")
    site.add_storage("b", "B")
    site.add_storage("c", "C")
    oid = site.add_item("x", b"good bytes", "theirs")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    site.settle()
    site.advance(hours=2)
    site.settle()
    assert set(site.replicas(oid).values()) == {"DELETED"}
    assert site.visible("theirs") == {"x": b"good bytes"}
    assert site.replica(oid, "theirs")["released_at"] is not None


def test_a_storage_above_its_high_watermark_is_brought_below_its_low_one(site):
    """Coldest first, no item below its target at any time, nothing more than needed."""
    oids = [site.add_item(f"{n}", bytes(100), "a") for n in range(20)]
    for name in ("b", "c"):
        site.set_storage(name, capacity_bytes=100_000)
    site.settle()
    site.set_storage("a", capacity_bytes=2100, high_watermark=0.9, low_watermark=0.5)
    proposed = propose_rebalance(site.context)
    assert sum(one.size for one in proposed) == 1000
    for _ in range(6):
        site.settle()
        site.advance(minutes=20)
        weights = site.query("SELECT min(weight) AS n FROM item_phase")
        assert weights[0]["n"] >= 4
    kept = [oid for oid in oids if site.replicas(oid)["a"] == "READY"]
    assert len(kept) == 10 and kept == oids[10:]
    assert len(site.visible("a")) == 10


def test_a_drained_storage_ends_empty_and_may_then_retire(site):
    """Draining replaces every copy before it goes; retiring before that is refused."""
    oids = [site.add_item(f"{n}", b"1" * n, "a") for n in range(1, 6)]
    site.settle()
    site.set_storage("a", mode="draining")
    with pytest.raises(CatalogueError, match="drain it first"):
        site.set_storage("a", mode="retired", retired_at=site.now)
    for _ in range(6):
        site.settle()
        site.advance(minutes=20)
    assert site.visible("a") == {} and site.private("a", "trash") == []
    for oid in oids:
        assert site.replicas(oid) == {"a": "DELETED", "b": "READY", "c": "READY"}
    site.set_storage("a", mode="retired", retired_at=site.now)


def test_a_run_that_would_delete_too_much_deletes_nothing(site):
    """The blast radius is checked before the first certificate."""
    oids = [site.add_item(f"{n}", b"1", "a") for n in range(5)]
    site.settle()
    site.advance(seconds=1)
    for oid in oids:
        expire(site, oid)
    with pytest.raises(BlastRadiusError, match="DLM_MAX_DELETE_ITEMS=9: one run would trash 10"):
        ExpiryPlanner(9, 10**9)(site.context)
    assert site.query("SELECT count(*) AS n FROM deletion")[0]["n"] == 0


def test_expiry_can_be_looked_at_before_it_happens(site):
    """propose_expiry says what would go and what would be refused, and changes nothing."""
    oid = site.add_item("x", b"1", "a")
    site.settle()
    site.advance(seconds=1)
    expire(site, oid)
    assert [p.refusal for p in propose_expiry(site.context)] == [None, None]
    assert site.item(oid)["state"] == "READY"


def test_two_deletions_of_two_copies_of_one_item_take_turns(site):
    """Both copies of an item at once: one goes, the other is then the survivor that stays."""
    oid = site.add_item("x", b"1", "a", target_phase="LIQUID")
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :oid", oid=oid)
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    uids = [row["uid"] for row in site.query("SELECT uid FROM replica WHERE oid = :o", o=oid)]
    first = site.context.transact(lambda c: deletions.prove(c, [uids[0]]))
    assert first[0].refusal is None
    both = site.context.transact(lambda c: deletions.prove(c, uids))
    assert all(p.refusal for p in both)


@pytest.mark.parametrize("mode", ["draining", "read_only", "offline"])
def test_a_planned_copy_is_not_made_where_it_is_not_wanted_any_more(site, mode):
    """Between plan and copy the storage was closed: not a byte goes there, the copy goes
    elsewhere."""
    site.set_storage("c", mode="read_only")
    oid = site.add_item("x", b"good bytes", "a")
    plan_replication(site.context)
    site.set_storage("b", mode=mode)
    assert site.work(OperationKind.COPY).done["copy"] == 0
    assert site.replicas(oid) == {"a": "READY", "b": "MISSING"} and site.visible("b") == {}
    (copy,) = site.query("SELECT state, error FROM operation WHERE kind = 'copy'")
    assert copy["state"] == "CANCELLED" and copy["error"].endswith(f"storage b is {mode}")
    site.set_storage("c", mode="read_write")
    site.settle()
    assert site.replicas(oid)["c"] == "READY"


def test_the_grace_is_kept_to_its_last_second(site):
    """Nothing is purged before the grace ends, and then it is."""
    oid = site.add_item("x", b"good bytes", "a", target_phase="LIQUID")
    expire(site, oid)
    site.settle()
    site.advance(seconds=3599.5)
    site.settle()
    assert site.replicas(oid) == {"a": "TRASHED"} and site.private("a", "trash")
    site.advance(seconds=0.5)
    site.settle()
    assert site.replicas(oid) == {"a": "DELETED"} and site.private("a", "trash") == []


def test_psql_cannot_trash_without_a_certificate(site):
    """The database itself refuses the transition."""
    oid = site.add_item("x", b"1", "a")
    site.settle()
    with pytest.raises(CatalogueError):
        site.execute("UPDATE replica SET state = 'TRASHED' WHERE oid = :oid", oid=oid)


def test_a_drainer_that_never_runs_dry_ends_in_time(site, monkeypatch):
    """Where data come in day and night there is always more; what it has in hand it ends."""
    oid = site.add_item("x", b"good bytes", "a")
    ticks = iter(range(10**9))
    clock = SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr("dlm_core.lifecycle.work.time", clock)
    copy = {OperationKind.COPY: execute_copy}
    report = drain(site.context, copy, lambda c: plan_replication(c) or 1, most_seconds=20)
    assert report.planned > 1 and report.seconds < 60
    assert list(site.replicas(oid).values()) == ["READY", "READY"]
