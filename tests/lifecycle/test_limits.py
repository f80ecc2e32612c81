"""The blast radius: limits that stop expiry, plans that wait, people who let them go on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import count

import pytest
from sqlalchemy import event, text

from dlm_core.catalogue import expiring, plans
from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import (
    BlastRadiusError,
    CatalogueError,
    IllegalTransitionError,
    StorageUnavailableError,
    TooManyErrorsError,
)
from dlm_core.lifecycle.expire import ExpiryPlanner, plan_batch, stop_on_errors
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.work import drain
from dlm_core.storages.open import open_storage
from dlm_core.types import OperationKind, new_id
from tests.fakes import Hooked
from tests.lifecycle.overlap import WAITING
from tests.site import ALL, make_site, reopen

MANY = 10**9
WEEK = timedelta(days=7)


@pytest.fixture
def build(engine, tmp_path):
    """A site of one storage whose settings the test chooses."""

    def make(**settings):
        site = make_site(engine, tmp_path, **settings)
        site.add_storage("a", "A")
        return site

    return make


def add(site, number, name="x", **columns):
    """Items that a LIQUID copy suffices."""
    return [
        site.add_item(f"{name}/{n}", b"12345", "a", target_phase="LIQUID", **columns)
        for n in range(number)
    ]


def expire(site, oids, reason="old"):
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = :r WHERE oid = ANY(:oids)",
        now=site.now, oids=oids, r=reason,
    )  # fmt: skip


def collection(site, name, parent=None):
    key = new_id()
    site.execute(
        "INSERT INTO collection (collection_id, name, parent_id) VALUES (:k, :n, :p)",
        k=key, n=name, p=parent,
    )  # fmt: skip
    return key


def stopped(site, items=MANY, size=MANY):
    """Run the planner into a limit; the error and the plan that waits."""
    with pytest.raises(BlastRadiusError) as caught:
        ExpiryPlanner(items, size)(site.context)
    plan = site.context.transact(lambda c: plans.get_plan(c, caught.value.details["plan"]))
    return str(caught.value), plan


def approve(site, plan, who="user:kim", valid=WEEK):
    return site.context.transact(
        lambda c: plans.approve_plan(c, plan["plan_id"], actor=who, now=site.now, valid_for=valid)
    )


def reject(site, plan, who="user:kim"):
    site.context.transact(
        lambda c: plans.reject_plan(c, plan["plan_id"], actor=who, now=site.now, reason="no")
    )


def trashed(site):
    return site.query("SELECT count(*) AS n FROM replica WHERE state = 'TRASHED'")[0]["n"]


def test_a_stop_names_the_limit_what_was_found_and_the_command(build):
    """And stores what would have gone, with reasons and a hash, in the name of who found it."""
    site = build()
    expire(site, add(site, 3), "campaign 7 is over")
    told, plan = stopped(site, items=2)
    assert told == (
        f"stopped by DLM_MAX_DELETE_ITEMS=2: one run would trash 3 replicas; nothing of that was "
        f"trashed, it waits as plan {plan['plan_id']}; look at it with 'dlm plan show "
        f"{plan['plan_id']}', go on with 'dlm plan approve {plan['plan_id']}'"
    )
    assert (plan["state"], plan["operations"], plan["bytes"]) == ("PROPOSED", 3, 15)
    assert plan["actor"] == "user:test"
    assert {e["reason"] for e in plan["entries"]} == {"campaign 7 is over"}
    assert trashed(site) == 0
    assert site.query("SELECT state FROM data_item") == [{"state": "READY"}] * 3


def test_what_waits_is_left_alone_and_other_things_go_on(build):
    """No second plan for the same; what becomes due later is looked at by itself."""
    site = build()
    expire(site, add(site, 3))
    stopped(site, items=2)
    assert ExpiryPlanner(2, MANY)(site.context) == 0
    expire(site, add(site, 2, "later"))
    assert ExpiryPlanner(2, MANY)(site.context) == 2
    assert site.query("SELECT count(*) AS n FROM plan") == [{"n": 1}]


def test_an_approved_plan_lets_exactly_its_replicas_through(build):
    """Past the limit, with certificates that name the plan; and nothing that came later."""
    site = build()
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    expire(site, add(site, 4, "later"))
    assert approve(site, plan)["state"] == "APPROVED"
    with pytest.raises(BlastRadiusError, match="would trash 4 replicas"):
        ExpiryPlanner(2, MANY)(site.context)
    found = site.query("SELECT plan_id FROM deletion")
    assert found == [{"plan_id": plan["plan_id"]}] * 3 and trashed(site) == 3
    after = site.context.transact(lambda c: plans.get_plan(c, plan["plan_id"]))
    assert (after["trashed"], after["state"]) == (3, "DONE")


def test_an_approved_plan_touches_no_other_replica(build):
    """A copy whose time is over as well is neither trashed nor put off by a plan that does not name
    it."""
    site = build()
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    (other,) = add(site, 1, "later")
    site.execute("UPDATE replica SET expires_at = :n WHERE oid = :o", n=site.now, o=other)
    approve(site, plan)
    (lot,) = site.context.transact(lambda c: expiring.list_planned(c, plan["plan_id"], MANY))
    also = site.replica(other, "a")["uid"].bytes
    granted, refused = site.context.transact(
        lambda c: plan_batch(
            c, site.context, MANY, expiring.Lot(lot.uids + also, lot.oids), plan["plan_id"]
        )
    )
    assert len(granted) == 3 and refused == []
    assert other not in {proof.oid for proof in granted}


def test_what_is_approved_is_still_proven(build):
    """A hold that comes after the approval, and a copy that is needed: refused as always."""
    site = build()
    held, last, free = add(site, 3)
    expire(site, [held, free])
    site.execute("UPDATE replica SET expires_at = :n WHERE oid = :o", n=site.now, o=last)
    _, plan = stopped(site, items=2)
    approve(site, plan)
    site.execute(
        "INSERT INTO hold (hold_id, oid, reason, actor, created_at) VALUES (:k, :o, 'r', 'a', :n)",
        k=new_id(), o=held, n=site.now,
    )  # fmt: skip
    assert ExpiryPlanner(2, MANY)(site.context) == 1
    states = [site.item(oid)["state"] for oid in (held, last, free)]
    assert states == ["READY", "READY", "EXPIRED"]
    # nothing to do with it now: no sensor asks for a run
    assert site.context.transact(lambda c: plans.approved_plans(c, site.now)) == []


def test_a_rejected_plan_stays_and_can_be_approved_after_all(build):
    """A rejection takes an approval back, has no end, and is told by 'dlm item why'."""
    site = build()
    oids = add(site, 3)
    expire(site, oids)
    _, plan = stopped(site, items=2)
    approve(site, plan)
    reject(site, plan)
    site.advance(days=300)
    assert ExpiryPlanner(MANY, MANY)(site.context) == 0
    approve(site, plan)
    assert ExpiryPlanner(2, MANY)(site.context) == 3


def test_two_people_have_to_approve_where_the_site_says_so(build):
    """The same person twice is one; a rejection between starts again."""
    site = build(approvals=2)
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    for who in ("user:kim", "user:kim"):
        assert approve(site, plan, who)["state"] == "PROPOSED"
    reject(site, plan, "user:lee")
    assert approve(site, plan, "user:lee")["state"] == "REJECTED"
    assert ExpiryPlanner(2, MANY)(site.context) == 0
    assert approve(site, plan, "user:kim")["state"] == "APPROVED"
    assert ExpiryPlanner(2, MANY)(site.context) == 3


def test_approvals_and_proposals_run_out(build):
    """What is not done in time is looked at anew; what has run out cannot be approved."""
    site = build(plan_seconds=3600)
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    site.advance(hours=1)
    with pytest.raises(IllegalTransitionError, match="run out"):
        approve(site, plan)
    _, again = stopped(site, items=2)
    assert again["plan_id"] != plan["plan_id"]
    assert again["content_hash"] == plan["content_hash"]
    approve(site, again, valid=timedelta(hours=1))
    assert approved(site) == [again["plan_id"]]
    site.advance(hours=1)
    assert approved(site) == []
    stopped(site, items=2)


def approved(site):
    """The plans that are acted on now, as who looks for them and who acts on one sees it."""

    def look(connection):
        found = plans.approved_plans(connection, site.now)
        ids = [row["plan_id"] for row in rows(connection, "SELECT plan_id FROM plan")]
        assert found == [one for one in ids if plans.lock_approved(connection, one, site.now)]
        return found

    return site.context.transact(look)


@pytest.mark.parametrize("limit", ["items", "bytes"])
def test_a_day_has_a_limit_of_its_own(build, limit):
    """Runs of two, five in 24 hours: the third stops; a day later it goes on by itself."""
    day = {"max_delete_items_per_day": 5} if limit == "items" else {"max_delete_bytes_per_day": 25}
    site = build(**day)
    for name in ("one", "two"):
        expire(site, add(site, 2, name))
        assert ExpiryPlanner(2, MANY)(site.context) == 2
        site.advance(hours=1)
    expire(site, add(site, 2, "three"))
    told, _ = stopped(site)
    assert f"DLM_MAX_DELETE_{limit.upper()}_PER_DAY={next(iter(day.values()))}" in told
    assert "4 replicas (20 bytes) were trashed in the last 24 hours" in told
    site.advance(hours=24)
    assert ExpiryPlanner(2, MANY)(site.context) == 2


def test_what_was_approved_is_not_counted_against_the_day(build):
    """Somebody has looked at it."""
    site = build(max_delete_items_per_day=3)
    expire(site, add(site, 4))
    _, plan = stopped(site)
    approve(site, plan)
    expire(site, add(site, 3, "later"))
    assert ExpiryPlanner(MANY, MANY)(site.context) == 7


def test_most_of_a_collection_does_not_go_by_itself(build):
    """Of ten items six are too many, at once or bit by bit; five are not, nor small collections."""
    site = build(max_delete_fraction=0.5, delete_fraction_min_items=10)
    large, small = collection(site, "large"), collection(site, "small")
    oids = add(site, 10, "large", collection_id=large)
    expire(site, add(site, 9, "small", collection_id=small))
    expire(site, oids[:5])
    assert ExpiryPlanner(MANY, MANY)(site.context) == 14
    expire(site, oids[5:6])
    told, plan = stopped(site)
    assert "DLM_MAX_DELETE_FRACTION=0.5: 6 items of collection 'large' would go" in told
    approve(site, plan)
    assert ExpiryPlanner(MANY, MANY)(site.context) == 1


def test_the_share_of_a_collection_is_of_all_that_lies_in_it(build):
    """A dataset of blocks, each too small to be looked at: six of its twelve files are enough, at
    once or bit by bit, and a block that goes whole beside many others is not."""
    site = build(max_delete_fraction=0.4, delete_fraction_min_items=10)
    dataset = collection(site, "dataset")
    blocks = [collection(site, f"block-{n}", dataset) for n in range(4)]
    oids = [add(site, 3, f"block-{n}", collection_id=key) for n, key in enumerate(blocks)]
    expire(site, oids[0])
    assert ExpiryPlanner(MANY, MANY)(site.context) == 3
    expire(site, oids[1])
    told, plan = stopped(site)
    assert "6 items of collection 'dataset' would go, of 1" in told
    approve(site, plan)
    assert ExpiryPlanner(MANY, MANY)(site.context) == 3


def test_a_run_ends_when_too_many_deletions_fail(build):
    """Six of fifty is more than a tenth: it stops after that batch, and says with what."""
    site = build(batch_size=50)
    expire(site, add(site, 120))
    ExpiryPlanner(MANY, MANY)(site.context)
    left = iter(range(6))

    def fail(call, path):
        if call == "rename" and next(left, None) is not None:
            raise StorageUnavailableError(storage="a", message="no answer")

    reopen(site, lambda row: Hooked(open_storage(row["name"], "posix", row["root"], {}), fail))
    with pytest.raises(TooManyErrorsError, match="6 of 50 deletions failed, most with DLM-301"):
        drain(site.context, ALL, guard=stop_on_errors)
    assert len(site.private("a", "trash")) == 44


def test_five_of_fifty_failures_are_borne(build):
    """A tenth is not more than a tenth; what failed is tried again."""
    site = build(batch_size=50)
    expire(site, add(site, 50))
    ExpiryPlanner(MANY, MANY)(site.context)
    left = iter(range(5))

    def fail(call, path):
        if call == "rename" and next(left, None) is not None:
            raise StorageUnavailableError(storage="a", message="no answer")

    reopen(site, lambda row: Hooked(open_storage(row["name"], "posix", row["root"], {}), fail))
    drain(site.context, ALL, guard=stop_on_errors)
    site.advance(minutes=1)
    drain(site.context, ALL, guard=stop_on_errors)
    assert len(site.private("a", "trash")) == 50


class Between:
    """Does something once as others would meanwhile: within the third batch of a run, or as the
    next transaction after its second begins."""

    def __init__(self, action, within=True):
        self.action, self.within, self.locks = action, within, 0

    def __call__(self, statement):
        # twice in a batch: before items expire, and before proofs
        self.locks += statement.startswith("LOCK TABLE hold")
        if self.locks >= 4 and (self.locks == 5 if self.within else "set_config" in statement):
            self.locks = -100
            self.action()


@pytest.fixture
def statements(engine, monkeypatch):
    """What is sent to the database, one lot after the other; ``statements.append`` is called with
    each."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._LOTS_AT_ONCE", 1)
    told = []

    def note(connection, cursor, statement, *_):
        for listen in told:
            listen(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield told
    event.remove(engine, "before_cursor_execute", note)


def test_what_is_due_is_counted_once_however_many_batches_it_takes(build, statements, monkeypatch):
    """Ten batches of items, and of surplus copies, count as often as two: what a batch costs
    follows the batch."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build()
    site.add_storage("b", "B")
    counts = []
    statements.append(lambda sent: counts.append(sent) if "sum(size)" in sent else None)
    for number, name in ((2, "few"), (10, "many")):
        surplus = add(site, number, name)
        site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = ANY(:o)", o=surplus)
        plan_replication(site.context)
        site.work(OperationKind.COPY)
        site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = ANY(:o)", o=surplus)
        site.execute("UPDATE replica SET expires_at = :n WHERE storage_id = :s AND oid = ANY(:o)",
                     n=site.now, s=site.storages["a"], o=surplus)  # fmt: skip
        expire(site, add(site, number, f"{name}-more"))
        counts.clear()
        assert ExpiryPlanner(MANY, MANY)(site.context) == 2 * number
        assert len(counts) <= 4


def test_lots_that_are_worked_on_at_once_take_each_replica_once(build, monkeypatch):
    """Two copies of each item, often in different lots, go; the third, which their certificates
    name, stays."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 7)
    monkeypatch.setattr("dlm_core.lifecycle.expire._LOTS_AT_ONCE", 4)
    site = build()
    site.add_storage("b", "B")
    oids = [site.add_item(f"x/{n}", b"12345", "a", target_phase="SOLID") for n in range(40)]
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    site.add_storage("c", "C")
    site.execute("UPDATE replica SET expires_at = :n", n=site.now)
    plan_replication(site.context)
    site.work(OperationKind.COPY)
    assert {tuple(site.replicas(oid)) for oid in oids} == {("a", "b", "c")}
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    assert ExpiryPlanner(80, MANY)(site.context) == 80
    left = {"a": "TRASHED", "b": "TRASHED", "c": "READY"}
    assert all(site.replicas(oid) == left for oid in oids)
    certified = site.query("SELECT uid, survivors FROM deletion")
    assert len({one["uid"] for one in certified}) == len(certified) == 80
    kept = {str(site.replica(oid, "c")["uid"]) for oid in oids}
    assert {s["uid"] for one in certified for s in one["survivors"]} == kept


def test_what_becomes_due_during_a_run_is_not_trashed_uncounted(build, statements, monkeypatch):
    """What was counted goes; what somebody let expire meanwhile is counted by itself, with what
    went, and stops at the limit."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build()
    oids, later = add(site, 8), add(site, 5, "later")
    expire(site, oids)
    statements.append(Between(lambda: expire(site, later)))
    told, plan = stopped(site, items=10)
    assert "one run would trash 13 replicas" in told
    assert {site.item(oid)["state"] for oid in oids} == {"EXPIRED"}
    assert {site.item(oid)["state"] for oid in later} == {"READY"}
    assert plan["operations"] == 5 and trashed(site) == 8


def test_a_count_is_not_relied_on_for_long(build, statements, monkeypatch):
    """After a minute, or ten times what it took, all is counted again: what became due meanwhile
    stops what is left."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    minutes = count(0, 61)
    monkeypatch.setattr("dlm_core.lifecycle.expire.monotonic", lambda: float(next(minutes)))
    site = build()
    later = add(site, 5, "later")
    expire(site, add(site, 30))
    statements.append(Between(lambda: expire(site, later)))
    told, plan = stopped(site, items=32)
    assert "one run would trash 35 replicas" in told
    assert plan["operations"] == 15 and trashed(site) == 20


def test_an_item_that_expires_during_a_run_does_not_go_with_a_counted_copy(
    build, statements, monkeypatch
):
    """Of it one surplus copy was counted, which still needs its survivors; that the item goes is
    looked at by the limit on collections first."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build(max_delete_fraction=0.5, delete_fraction_min_items=10)
    oids = add(site, 10, collection_id=collection(site, "all"))
    site.execute("UPDATE replica SET expires_at = :n", n=site.now)
    statements.append(Between(lambda: expire(site, oids)))
    told, _ = stopped(site)
    assert "DLM_MAX_DELETE_FRACTION" in told and trashed(site) == 0
    assert {site.item(oid)["state"] for oid in oids} == {"READY"}


def test_what_another_run_put_into_a_plan_is_left_by_the_first(build, statements, monkeypatch):
    """Two runs at once: as soon as the limit of the second is reached, the first trashes nothing
    more of what waits now."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build()
    expire(site, add(site, 8))
    statements.append(Between(lambda: stopped(site, items=3)))
    assert ExpiryPlanner(10, MANY)(site.context) == 4
    assert trashed(site) == 4


def test_a_plan_whose_approval_is_taken_back_goes_no_further(build, statements, monkeypatch):
    """Somebody rejects it while a run is at work on it: the batches that are left stay."""
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build()
    expire(site, add(site, 8))
    _, plan = stopped(site, items=3)
    approve(site, plan)
    statements.append(Between(lambda: reject(site, plan), within=False))
    assert ExpiryPlanner(3, MANY)(site.context) == 4
    assert trashed(site) == 4


def test_who_rejects_a_plan_waits_for_batches_that_have_begun_and_for_no_others(build, engine):
    """Batches overlap: those that come later would let who rejects it wait for the last of all."""
    site = build()
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    approve(site, plan)
    at_work = partial(plans.lock_approved, plan_id=plan["plan_id"], now=site.now)
    with ThreadPoolExecutor() as pool, engine.begin() as begun:
        assert at_work(begun)
        rejected = pool.submit(reject, site, plan)
        until(engine, lambda waiting: waiting == 1)
        later = pool.submit(site.context.transact, at_work)
        until(engine, lambda waiting: waiting == 2 or later.done())
    assert rejected.result() is None and later.result() is False


def until(engine, enough):
    """Wait until so many sessions wait for a lock."""
    # in autocommit: a transaction keeps seeing the sessions that there were at its first look
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
        while not enough(looking.execute(text(WAITING)).scalar_one()):
            time.sleep(0.02)


def test_more_than_a_run_may_trash_is_seen_beyond_what_it_keeps_in_mind(build, monkeypatch):
    """Keys are kept of some; all are counted, as far as the limit: nothing goes if it is passed."""
    monkeypatch.setattr("dlm_core.catalogue.expiring._MOST_IN_LOTS", 4)
    monkeypatch.setattr("dlm_core.lifecycle.expire._COUNTED", 4)
    monkeypatch.setattr("dlm_core.lifecycle.expire._PLAN_BATCH", 2)
    site = build()
    expire(site, add(site, 9))
    stopped_at, plan = stopped(site, items=8)
    assert "would trash 9 replicas" in stopped_at and plan["operations"] == 9
    assert trashed(site) == 0
    approve(site, plan)
    expire(site, add(site, 9, "later"))
    assert ExpiryPlanner(9, MANY)(site.context) == 18


def test_an_item_that_is_locked_keeps_no_run_spinning(build, engine):
    """Somebody has it open in psql: the run leaves it for the next one."""
    site = build()
    held, free = add(site, 2)
    expire(site, [held, free])
    with engine.connect() as other, other.begin():
        run(other, "SELECT FROM data_item WHERE oid = :o FOR UPDATE", o=held)
        assert ExpiryPlanner(MANY, MANY)(site.context) == 1
    assert ExpiryPlanner(MANY, MANY)(site.context) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE plan SET state = 'APPROVED'",
        "UPDATE plan SET content_hash = repeat('0', 64)",
        "UPDATE plan SET approvals = 1",
        "DELETE FROM plan_entry",
        "UPDATE plan_entry SET reason = 'x'",
        "DELETE FROM plan_decision",
        "UPDATE plan_decision SET actor = 'user:other'",
        "DELETE FROM plan",
    ],
)
def test_plans_and_decisions_are_not_changed_with_plain_sql(build, statement):
    """The database approves nothing without the people it takes, and forgets nobody."""
    site = build(approvals=2)
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    approve(site, plan)
    with pytest.raises(CatalogueError):
        site.execute(statement)


def test_entries_that_were_slipped_in_are_not_approved(build):
    """An entry that the proposal did not have spoils the hash; after the decision none is taken."""
    site = build()
    oids = add(site, 4)
    expire(site, oids[:3])
    _, plan = stopped(site, items=2)
    slip = """INSERT INTO plan_entry SELECT :plan, uid, oid, size, 'item_expired', 'x'
                FROM replica WHERE oid = :oid"""
    values = {"plan": plan["plan_id"], "oid": oids[3]}
    site.execute(slip, **values)
    with pytest.raises(CatalogueError, match="not those that were proposed"):
        approve(site, plan)


def test_every_decision_is_an_event(build):
    """Proposed, approved, rejected: with who and which plan."""
    site = build()
    expire(site, add(site, 3))
    _, plan = stopped(site, items=2)
    approve(site, plan)
    reject(site, plan, "user:lee")
    found = site.query(
        "SELECT action, new_state, detail FROM event WHERE noun = 'plan' ORDER BY seq"
    )
    told = [(row["action"], row["new_state"]) for row in found]
    assert told == [("proposed", "PROPOSED"), ("approved", None), ("state", "APPROVED"),
                    ("rejected", None), ("state", "REJECTED")]  # fmt: skip
    assert {row["detail"]["plan_id"] for row in found} == {str(plan["plan_id"])}


def test_a_refusal_is_told_once(build):
    """With its reason; being asked again and refused again decides nothing new."""
    site = build()
    (oid,) = add(site, 1)
    site.execute("UPDATE replica SET expires_at = :n WHERE oid = :o", n=site.now, o=oid)
    for _ in range(3):
        assert ExpiryPlanner(MANY, MANY)(site.context) == 0
        site.advance(minutes=11)
    (refused,) = site.query("SELECT * FROM event WHERE action = 'refused'")
    assert refused["detail"]["reason"].startswith("the copies that would be left give 0 of the 2")
    assert refused["actor"] == "user:test"
