"""A storage is declared lost, comes back, or is drained: what counts, and what is made again."""

from __future__ import annotations

import shutil
from datetime import timedelta

import pytest

from dlm_core.catalogue.lost import storages_in_audit
from dlm_core.catalogue.places import drains, get_storage, retire_storage, set_storage
from dlm_core.errors import (
    DeletionRefusedError,
    IllegalTransitionError,
    InvalidValueError,
    NotFoundError,
    StorageUnavailableError,
)
from dlm_core.lifecycle import lost
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.lost import lose_storage, plan_audits, propose_loss, take_back
from dlm_core.lifecycle.rebalance import plan_rebalance
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.work import StoragePool, _open_row, drain
from dlm_core.types import OperationKind
from tests.fakes import Hooked
from tests.site import make_site, reopen

N = 6


@pytest.fixture
def site(engine, tmp_path):
    """Items on a, copied to b; c has room."""
    site = make_site(engine, tmp_path)
    for name in "abc":
        site.add_storage(name, name.upper())
    site.set_storage("c", mode="read_only")
    site.oids = [site.add_item(f"{n}", b"payload %d" % n, on="a") for n in range(N)]
    site.settle()
    site.set_storage("c", mode="read_write")
    assert all(site.replicas(oid) == {"a": "READY", "b": "READY"} for oid in site.oids)
    return site


def states(site, storage):
    found = site.query(
        "SELECT state, count(*) AS n FROM replica WHERE storage_id = :s GROUP BY 1",
        s=site.storages[storage],
    )
    return {row["state"]: row["n"] for row in found}


def mode(site, storage):
    return site.query("SELECT mode FROM storage WHERE name = :n", n=storage)[0]["mode"]


def audit(site):
    """What the verification job does until nothing more happens; other jobs too."""

    def plan(context):
        return plan_audits(context) + plan_replication(context)

    site.work(plan=plan)


def by_hand(site, action):
    return site.context.transact(action)


# --- lost -----------------------------------------------------------------------------------------


def test_a_lost_storage_counts_no_more_and_its_copies_are_made_again(site):
    """All its replicas are MISSING, the rest is made at another location; the reason is kept."""
    alone = site.add_item("alone", b"only here", on="b")
    found = lose_storage(site.context, "b", "the controller burnt")
    assert (found["replicas"], found["alone"]["items"]) == (N + 1, 1)
    assert found["alone"]["listed"][0]["uri"] == "test:alone"
    assert states(site, "b") == {"MISSING": N + 1} and mode(site, "b") == "lost"
    site.settle()
    assert all(
        site.replicas(oid) == {"a": "READY", "b": "MISSING", "c": "READY"} for oid in site.oids
    )
    assert site.item(alone)["state"] == "CORRUPTED"
    assert all(site.item(oid)["shortfall"] is None for oid in site.oids)
    event = site.query("SELECT * FROM event WHERE noun = 'storage' AND new_state = 'lost'")[0]
    assert (event["detail"], event["actor"]) == ({"reason": "the controller burnt"}, "user:test")
    # it went with its storage: no look of verification found it
    assert site.query("SELECT FROM event WHERE action = 'doubted'") == []


def test_what_a_storage_holds_alone_is_listed_before(site):
    """A dry run changes nothing; a limit cuts the list, not the count."""
    for number in range(3):
        site.add_item(f"alone/{number}", b"x", on="b")
    found = propose_loss(site.context, "b", limit=2)
    assert (found["replicas"], found["alone"]["items"], found["alone"]["bytes"]) == (N + 3, 3, 3)
    assert [one["uri"] for one in found["alone"]["listed"]] == ["test:alone/0", "test:alone/1"]
    assert mode(site, "b") == "read_write" and states(site, "b") == {"READY": N + 3}
    assert found["alone"]["offline"] == 0
    site.set_storage("a", mode="offline")
    found = propose_loss(site.context, "b")
    assert (found["alone"]["items"], found["alone"]["offline"]) == (3, N)


def test_losing_is_done_in_batches_and_completed_when_it_was_interrupted(site, monkeypatch):
    """Done again it takes what is left."""
    monkeypatch.setattr(lost, "_BATCH", 2)
    wanted = site.context.transact
    calls = []

    def until_fifth(work):
        calls.append(work)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return wanted(work)

    monkeypatch.setattr(type(site.context), "transact", lambda self, work: until_fifth(work))
    with pytest.raises(KeyboardInterrupt):
        lose_storage(site.context, "b", "burnt")
    monkeypatch.setattr(type(site.context), "transact", lambda self, work: wanted(work))
    assert states(site, "b") == {"MISSING": 4, "READY": N - 4}
    assert lose_storage(site.context, "b", "burnt")["replicas"] == N - 4
    assert states(site, "b") == {"MISSING": N}
    site.settle()
    assert all(site.replicas(oid)["c"] == "READY" for oid in site.oids)


def test_a_certificate_that_names_it_is_good_no_more(site):
    """A copy in the trash whose survivor was lost is not purged, it comes back."""
    oid = site.oids[0]
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
        now=site.now, oid=oid, s=site.storages["a"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.settle()
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}
    lose_storage(site.context, "b", "burnt")
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["a"] == "READY" and site.replicas(oid)["b"] == "MISSING"
    assert "0" in site.visible("a")


def test_no_deletion_rests_on_a_lost_storage(site):
    """Also before the first batch: the mode alone tells."""
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.set_storage("b", mode="lost")
    for oid in site.oids:
        site.execute(
            "UPDATE replica SET expires_at = :now WHERE oid = :oid AND storage_id = :s",
            now=site.now, oid=oid, s=site.storages["a"],
        )  # fmt: skip
    site.set_storage("c", mode="read_only")
    site.settle()
    assert all(site.replicas(oid)["a"] == "READY" for oid in site.oids)


def test_work_to_a_lost_storage_ends(site):
    """Queued copies to it and looks at it are cancelled and say why; nothing is tried for ever."""
    more = [site.add_item(f"more/{n}", b"x", on="a") for n in range(3)]
    site.set_storage("c", mode="offline")
    plan_replication(site.context)
    assert states(site, "b")["PENDING"] == 3
    found = lose_storage(site.context, "b", "burnt")
    assert found["operations_ended"] == 3
    ended = site.query("SELECT error FROM operation WHERE state = 'CANCELLED'")
    assert {row["error"] for row in ended} == {"storage b was declared lost: burnt"}
    site.set_storage("c", mode="read_write")
    site.settle()
    assert all(site.replicas(oid)["c"] == "READY" for oid in more)
    assert site.query("SELECT FROM operation WHERE state IN ('QUEUED', 'RUNNING')") == []


@pytest.mark.parametrize("lost_one", ["a", "d"])
def test_it_is_lost_while_copies_run(site, lost_one):
    """As a source: a copy that was whole is one, what was there alone is told as lost. As a
    destination: nothing that a worker still writes there is believed, it is made elsewhere."""
    site.add_storage("d", "D")
    for name in "bc":
        site.set_storage(name, mode="read_only")
    fresh = [site.add_item(f"fresh/{n}", b"fresh %d" % n, on="a") for n in range(4)]
    happened = []

    def hook(call, path):
        if call == "write" and not happened:
            happened.append(path)
            lose_storage(site.context, lost_one, "burnt in the middle")
            if lost_one == "a":
                shutil.rmtree(site.folder / "a")
                (site.folder / "a").mkdir()

    reopen(site, lambda row: Hooked(_open_row(row), hook) if row["name"] == "d" else _open_row(row))
    site.work(OperationKind.COPY, plan=plan_replication)
    assert happened
    site.context.storages = StoragePool()
    for name in "bc":
        site.set_storage(name, mode="read_write")
    site.advance(minutes=5)
    site.settle()
    assert set(states(site, lost_one)) == {"MISSING"}
    for oid in fresh:
        copies = [*site.replicas(oid).values()].count("READY")
        if lost_one == "d":
            assert copies == 2
        else:
            assert site.item(oid)["state"] == ("READY" if copies else "CORRUPTED")
            assert copies in (0, 2)
    for name in "bcd":
        assert all(data.startswith((b"payload", b"fresh")) for data in site.visible(name).values())


def test_a_drain_that_was_under_way_does_not_mark_its_lost_copies(site):
    """The marks of the drain go with the mode."""
    by_hand(site, lambda c: set_storage(c, "b", {"mode": "draining"}))
    plan_rebalance(site.context)
    lose_storage(site.context, "b", "burnt while drained")
    assert site.query("SELECT FROM replica WHERE storage_id = :s AND expires_at IS NOT NULL",
                      s=site.storages["b"]) == []  # fmt: skip


def test_items_that_expire_go_though_a_copy_was_lost(site):
    """Its record ends without anything being touched on the lost storage."""
    lose_storage(site.context, "b", "burnt")
    site.execute("UPDATE data_item SET expires_at = :now, expiry_reason = 'over'", now=site.now)
    site.settle()
    site.advance(hours=2)
    site.settle()
    assert {site.item(oid)["state"] for oid in site.oids} == {"DELETED"}
    assert len(site.visible("b")) == N, "what may be there still is left alone"


def test_modes_that_make_no_sense_are_refused(site):
    """A lost storage is not simply set to work again, a retired one is not lost, and a reason is
    wanted."""
    with pytest.raises(InvalidValueError):
        lose_storage(site.context, "b", " ")
    with pytest.raises(IllegalTransitionError):
        take_back(site.context, "b")
    lose_storage(site.context, "b", "burnt")
    with pytest.raises(IllegalTransitionError):
        by_hand(site, lambda c: set_storage(c, "b", {"mode": "read_write"}))
    by_hand(site, lambda c: set_storage(c, "b", {"capacity_bytes": 10**9}))
    by_hand(site, lambda c: retire_storage(c, "c", site.now))
    with pytest.raises(IllegalTransitionError):
        lose_storage(site.context, "c", "burnt")


def test_a_lost_storage_is_retired_by_an_explicit_word(site):
    """Without the word it is refused; then its copies stay MISSING, and it never comes back."""
    lose_storage(site.context, "b", "burnt")
    with pytest.raises(DeletionRefusedError, match="--give-up"):
        by_hand(site, lambda c: retire_storage(c, "b", site.now))
    with pytest.raises(DeletionRefusedError, match="drain"):
        by_hand(site, lambda c: retire_storage(c, "a", site.now, give_up=True))
    by_hand(site, lambda c: retire_storage(c, "b", site.now, give_up=True))
    assert mode(site, "b") == "retired" and states(site, "b") == {"MISSING": N}
    with pytest.raises(IllegalTransitionError):
        take_back(site.context, "b")


def test_what_was_asked_of_a_storage_that_is_given_up_ends(site):
    """A restore that waited for a lost storage is told that it will not come."""
    oid = site.oids[0]
    site.execute(
        "UPDATE data_item SET target_phase = 'LIQUID', expires_at = :now WHERE oid = :oid",
        now=site.now, oid=oid,
    )  # fmt: skip
    site.settle()
    lose_storage(site.context, "b", "burnt")
    by_hand(
        site,
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["b"], actor="user:test", now=site.now
        ),
    )
    site.work()
    by_hand(site, lambda c: retire_storage(c, "b", site.now, give_up=True))
    left = site.query(
        "SELECT o.kind, o.state, o.error FROM operation o JOIN replica r USING (uid) "
        "WHERE r.storage_id = :s AND o.kind = 'restore'",
        s=site.storages["b"],
    )
    assert [(row["kind"], row["state"]) for row in left] == [("restore", "CANCELLED")]
    assert "retired" in left[0]["error"]


def test_what_lay_in_the_trash_of_a_storage_that_is_given_up_ends(site):
    """Also a way back that was asked for; none is any more. Where no purge is on its way, as after
    one that FAILED, one is asked for: the items that expired are DELETED."""
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    site.settle()
    assert states(site, "b") == {"TRASHED": N}
    lose_storage(site.context, "b", "burnt")
    wish = {"storage_id": site.storages["b"], "actor": "user:test", "now": site.now}
    by_hand(site, lambda c: request_restore(c, oid=site.oids[0], **wish))
    site.execute(
        "UPDATE operation SET state = 'FAILED', error_code = 'DLM-301', finished_at = :now "
        "WHERE uid = :u AND kind = 'purge' AND state = 'QUEUED'",
        now=site.now, u=site.replica(site.oids[1], "b")["uid"],
    )  # fmt: skip
    by_hand(site, lambda c: retire_storage(c, "b", site.now, give_up=True))
    with pytest.raises(NotFoundError):
        by_hand(site, lambda c: request_restore(c, oid=site.oids[2], **wish))
    site.advance(hours=2)
    site.settle()
    assert {site.item(oid)["state"] for oid in site.oids} == {"DELETED"}
    assert site.query("SELECT FROM operation WHERE state IN ('QUEUED', 'RUNNING')") == []


def test_what_is_needed_does_not_wait_for_a_storage_that_was_given_up(site):
    """A trashed copy there does not come back; its record ends when the item has its copies."""
    oid = site.oids[0]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)
    site.execute(
        "UPDATE replica SET expires_at = :n WHERE oid = :o AND storage_id = :s",
        n=site.now, o=oid, s=site.storages["b"],
    )  # fmt: skip
    site.settle()
    lose_storage(site.context, "b", "burnt")
    by_hand(site, lambda c: retire_storage(c, "b", site.now, give_up=True))
    site.set_storage("c", mode="read_only")
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "TRASHED"}
    assert site.query("SELECT FROM operation WHERE kind = 'restore'") == []
    site.set_storage("c", mode="read_write")
    for _ in range(2):
        site.advance(hours=7)
        site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "DELETED", "c": "READY"}


def test_what_was_only_announced_keeps_no_lost_storage_from_being_given_up(site):
    """Nothing of it will ever be seen there."""
    (site.folder / "b" / "new").write_bytes(b"announced")
    register_tree(site.context, Source("b", "test"), "new")
    lose_storage(site.context, "b", "burnt")
    by_hand(site, lambda c: retire_storage(c, "b", site.now, give_up=True))
    assert states(site, "b") == {"MISSING": N + 1}
    assert site.query("SELECT FROM operation WHERE state IN ('QUEUED', 'RUNNING')") == []


# --- back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("was", ["read_only", "draining"])
def test_after_an_audit_a_storage_is_what_it_was_before(site, was):
    """Nobody asked for more: the mode of before the loss, over offline and lost, is kept."""
    site.set_storage("b", mode=was)
    site.set_storage("b", mode="offline")
    lose_storage(site.context, "b", "unplugged")
    take_back(site.context, "b")
    audit(site)
    assert mode(site, "b") == was
    site.set_storage("b", mode="read_write")
    site.set_storage("b", mode="offline")
    take_back(site.context, "b")
    audit(site)
    assert mode(site, "b") == "read_write"


@pytest.mark.parametrize("was", ["lost", "offline"])
def test_a_storage_that_comes_back_is_read_before_it_counts(site, was):
    """Good copies are READY again, files that are gone MISSING, damaged ones set aside and made
    again; only then the storage takes part. Nothing else is copied meanwhile."""
    site.set_storage("c", mode="read_only")
    if was == "lost":
        lose_storage(site.context, "b", "unplugged")
    else:
        site.set_storage("b", mode="offline")
    files = sorted((site.folder / "b" / "test").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"rotten!!!")
    take_back(site.context, "b")
    assert mode(site, "b") == "auditing"
    assert by_hand(site, storages_in_audit) == ["b"]
    plan_audits(site.context)
    assert states(site, "b") == {"SUSPECT": N}
    plan_replication(site.context)
    site.advance(days=1)
    assert plan_replication(site.context) >= 0
    assert site.query("SELECT FROM operation WHERE kind = 'copy' AND state = 'QUEUED'") == []
    audit(site)
    assert mode(site, "b") == "read_write" and by_hand(site, storages_in_audit) == []
    site.advance(days=1)
    site.settle()
    assert states(site, "b") == {"READY": N}
    assert len(site.private("b", "quarantine")) == 1
    assert all(site.item(oid)["shortfall"] is None for oid in site.oids)


def test_nothing_is_deleted_on_the_strength_of_what_was_not_read(site):
    """While the audit lasts its copies are no survivors; afterwards they are."""
    site.set_storage("c", mode="read_only")
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.set_storage("b", mode="offline")
    take_back(site.context, "b")
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE storage_id = :s",
        now=site.now, s=site.storages["a"],
    )  # fmt: skip
    for _ in range(2):
        site.work(OperationKind.TRASH, plan=ExpiryPlanner(100, 2**30))
        assert states(site, "a") == {"READY": N}
        plan_audits(site.context)  # now they are SUSPECT
        assert mode(site, "b") == "auditing"
        site.advance(hours=1)
    audit(site)
    site.advance(hours=1)
    site.work(OperationKind.TRASH, plan=ExpiryPlanner(100, 2**30))
    assert states(site, "a") == {"TRASHED": N} and states(site, "b") == {"READY": N}


def test_an_item_that_was_lost_with_its_only_copy_is_good_again(site):
    """The copy is read; the item is READY and gets its second copy."""
    oid = site.add_item("alone", b"only here", on="b")
    lose_storage(site.context, "b", "unplugged")
    site.settle()
    assert site.item(oid)["state"] == "CORRUPTED"
    take_back(site.context, "b")
    audit(site)
    site.settle()
    assert site.item(oid)["state"] == "READY" and site.item(oid)["shortfall"] is None


def test_an_audit_goes_on_in_batches_wherever_it_was_interrupted(site, monkeypatch):
    """How far it got is in the catalogue; what was not doubted yet counts as little."""
    monkeypatch.setattr(lost, "_BATCH", 4)
    site.set_storage("b", mode="offline")
    take_back(site.context, "b")
    assert plan_audits(site.context) == 4
    assert states(site, "b") == {"READY": N - 4, "SUSPECT": 4}
    assert mode(site, "b") == "auditing"
    audit(site)
    assert states(site, "b") == {"READY": N} and mode(site, "b") == "read_write"


def test_what_an_audit_reads_once_and_finds_different_is_read_again(site):
    """It was doubted because of its storage: one bad look is no proof."""
    site.set_storage("b", mode="offline")
    take_back(site.context, "b")
    plan_audits(site.context)
    flips = []

    class Flaky:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def open_read(self, path):
            if path == "test/0" and not flips:
                flips.append(path)
                return self.inner.open_read("test/1")
            return self.inner.open_read(path)

    reopen(site, lambda row: Flaky(_open_row(row)) if row["name"] == "b" else _open_row(row))
    audit(site)
    assert flips and states(site, "b") == {"READY": N}
    assert site.private("b", "quarantine") == []


def test_a_storage_that_is_not_there_does_not_come_back(site):
    """It is looked at first; an outage leaves it lost."""
    lose_storage(site.context, "b", "unplugged")
    (site.folder / "b").rename(site.folder / "elsewhere")
    with pytest.raises(StorageUnavailableError):
        take_back(site.context, "b")
    assert mode(site, "b") == "lost"


def test_it_is_lost_again_in_the_middle_of_its_audit(site):
    """The looks end with it."""
    site.set_storage("b", mode="offline")
    take_back(site.context, "b")
    plan_audits(site.context)
    assert lose_storage(site.context, "b", "it smells")["operations_ended"] == N
    assert states(site, "b") == {"MISSING": N}
    audit(site)
    assert mode(site, "b") == "lost"


# --- drain ----------------------------------------------------------------------------------------


def test_a_drain_tells_how_far_it_is_and_goes_on_after_an_interruption(site):
    """Bytes left, rate and end; a worker that is stopped in the middle loses nothing."""
    by_hand(site, lambda c: set_storage(c, "b", {"mode": "draining"}))
    size = sum(site.item(oid)["size"] for oid in site.oids)
    (told,) = by_hand(site, lambda c: drains(c, site.now))
    assert (told["storage"], told["left_bytes"], told["begun_bytes"]) == ("b", size, size)
    assert (told["done_fraction"], told["ends_at"]) == (0.0, None)
    site.set_storage("c", concurrency=1)
    plan_rebalance(site.context)
    plan_replication(site.context)
    done = []

    def hook(call, path):
        if call == "write":
            done.append(path)
            if len(done) == 2:
                site.context.stop.set()

    reopen(site, lambda row: Hooked(_open_row(row), hook) if row["name"] == "c" else _open_row(row))
    drain(site.context, {OperationKind.COPY: execute_copy}, None)
    site.context.stop.clear()
    site.context.storages = StoragePool()
    assert states(site, "b") == {"READY": N}
    site.advance(hours=1)
    site.work(OperationKind.TRASH, plan=ExpiryPlanner(100, 2**30))
    (told,) = by_hand(site, lambda c: drains(c, site.now))
    assert 0 < told["left_bytes"] < size and told["stuck_items"] == 0
    assert told["ends_at"] > site.now and 0 < told["done_fraction"] < 1
    site.settle()
    (told,) = by_hand(site, lambda c: drains(c, site.now))
    assert (told["left_bytes"], told["done_fraction"], told["ends_at"]) == (0, 1.0, site.now)
    assert told["bytes_per_second"] == size / 3600
    site.advance(hours=2)
    site.settle()
    by_hand(site, lambda c: retire_storage(c, "b", site.now))
    assert by_hand(site, lambda c: drains(c, site.now)) == []
    assert all(site.replicas(oid)["c"] == "READY" for oid in site.oids)


def test_a_drain_of_an_empty_storage_is_at_its_end(site):
    """Nothing was there, nothing is left."""
    by_hand(site, lambda c: set_storage(c, "c", {"mode": "draining"}))
    (told,) = by_hand(site, lambda c: drains(c, site.now))
    assert (told["left_bytes"], told["done_fraction"], told["ends_at"]) == (0, 1.0, site.now)


def test_a_drain_tells_what_is_stuck(site):
    """Items that no other storage can take; a drain that is given up tells nothing any more."""
    site.set_storage("c", mode="read_only")
    by_hand(site, lambda c: set_storage(c, "b", {"mode": "draining"}))
    site.settle()
    (told,) = by_hand(site, lambda c: drains(c, site.now + timedelta(hours=1)))
    assert told["stuck_items"] == N and told["ends_at"] is None
    by_hand(site, lambda c: set_storage(c, "b", {"mode": "read_write"}))
    assert by_hand(site, lambda c: get_storage(c, "b"))["drain_since"] is None


def test_what_was_only_announced_on_a_lost_storage_waits_and_says_why(site):
    """It was never seen: it is not admitted from there, and is once the storage is back."""
    (site.folder / "b" / "new").write_bytes(b"announced")
    register_tree(site.context, Source("b", "test"), "new")
    assert lose_storage(site.context, "b", "unplugged")["alone"]["items"] == 1
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    (ended,) = site.query("SELECT state, error FROM operation WHERE kind = 'admit'")
    assert (ended["state"], ended["error"]) == ("FAILED", "storage b is lost")
    assert states(site, "b")["PENDING"] == 1
    take_back(site.context, "b")
    audit(site)
    site.execute("UPDATE operation SET state = 'QUEUED', finished_at = NULL WHERE kind = 'admit'")
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert states(site, "b") == {"READY": N + 1}


def test_a_way_back_from_the_trash_waits_for_its_storage(site):
    """A restore on a lost storage is put off: what lies in the copy's place there says nothing of
    the trash. It is done when the storage is back."""
    oid = site.oids[0]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)
    site.execute(
        "UPDATE replica SET expires_at = :n, expiry_reason = 'test' "
        "WHERE oid = :o AND storage_id = :s",
        n=site.now, o=oid, s=site.storages["b"],
    )  # fmt: skip
    site.settle()
    assert site.replicas(oid)["b"] == "TRASHED"
    lose_storage(site.context, "b", "broken")
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["b"], actor="user:test", now=site.now
        )
    )
    site.settle()
    assert site.replicas(oid)["b"] == "TRASHED"
    take_back(site.context, "b")
    for _ in range(3):
        audit(site)
        site.advance(hours=1)
        site.settle()
    assert mode(site, "b") == "read_write" and site.replicas(oid)["b"] == "READY"
