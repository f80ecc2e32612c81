"""Two workers at one moment, forced: what must hold whoever comes first.

At PostgreSQL's default isolation. A transaction is kept open until another is seen waiting for its
locks (pg_stat_activity), or has ended without; or a storage call of one worker lets the other in.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from dlm_core.catalogue import deletions, places, replicas
from dlm_core.catalogue.browse import set_item_expiry, set_replica_expiry
from dlm_core.catalogue.items import Announcement, Terms, announce
from dlm_core.errors import (
    DeletionRefusedError,
    IllegalTransitionError,
    NotFoundError,
)
from dlm_core.lifecycle import expire
from dlm_core.lifecycle.rebalance import plan_rebalance
from dlm_core.lifecycle.register import Source, register_list
from dlm_core.lifecycle.replicate import _plan_batch as plan_copies
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import _open_row
from dlm_core.types import OperationKind
from tests.fakes import Hooked
from tests.lifecycle.overlap import overlap
from tests.site import Site, make_site, reopen


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    for name in "abc":
        site.add_storage(name, name.upper())
    return site


def let_in(site: Site, storage: str, call: str, action: Callable[[], Any]) -> None:
    """Do ``action`` once, just before the next ``call`` on a storage."""
    left = [action]

    def hook(made: str, _: str) -> None:
        if made == call and left:
            left.pop()()

    def opened(row: Any) -> Any:
        inner = _open_row(row)
        return Hooked(inner, hook) if row["name"] == storage else inner

    reopen(site, opened)


def two_copies(site: Site, target: str = "LIQUID") -> Any:
    """An item with a good copy on a and on b, of which ``target`` needs one (LIQUID) or both."""
    site.set_storage("c", mode="read_only")
    oid = site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    site.execute("UPDATE data_item SET target_phase = :t WHERE oid = :o", t=target, o=oid)
    site.set_storage("c", mode="read_write")
    site.settle()
    site.advance(seconds=1)
    return oid


def delete(connection: Connection, site: Site, oid: Any, storage: str) -> str | None:
    """Certify and trash the copy on a storage; the reason if that is refused."""
    uid = site.replica(oid, storage)["uid"]
    (proof,) = deletions.prove(connection, [uid])
    if proof.refusal is None:
        expire.trash(
            connection, [proof], actor="user:test", now=site.now,
            valid_for=site.context.settings.lease,
        )  # fmt: skip
    return proof.refusal


def deleting(site: Site, oid: Any, storage: str) -> Callable[[], str | None]:
    return lambda: site.context.transact(lambda c: delete(c, site, oid, storage))


def good_files(site: Site) -> int:
    return sum(list(site.visible(name).values()).count(b"good bytes") for name in site.storages)


# --- two deletions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), ["ab", "ba"])
def test_of_two_deletions_of_two_copies_only_one_goes(site, first, second):
    """The second waits for the first, then sees that its survivor is gone, and is refused."""
    oid = two_copies(site)
    met = overlap(site, lambda c: delete(c, site, oid, first), deleting(site, oid, second))
    assert met.waited and met.error is None
    assert "no verified copy" in met.result or "would be left give 0" in met.result
    assert site.replicas(oid) == {first: "TRASHED", second: "READY"}
    site.work()
    assert good_files(site) == 1


def test_a_deletion_may_go_on_when_the_other_is_undone(site):
    """What the first one only meant to do counts for nothing."""
    oid = two_copies(site)
    met = overlap(site, lambda c: delete(c, site, oid, "a"), deleting(site, oid, "b"), undo=True)
    assert met.waited and (met.error, met.result) == (None, None)
    assert site.replicas(oid) == {"a": "READY", "b": "TRASHED"}


def test_two_expiry_runs_at_once_leave_what_the_item_needs(site):
    """Both copies are past their time, two runs plan their deletion: none goes that is needed."""
    oid = two_copies(site)
    site.execute("UPDATE replica SET expires_at = :now WHERE oid = :o", now=site.now, o=oid)
    met = overlap(
        site,
        lambda c: expire.plan_batch(c, site.context, 10),
        lambda: site.context.transact(lambda c: expire.plan_batch(c, site.context, 10)),
    )
    assert met.waited and met.error is None
    assert site.replicas(oid) == {"a": "READY", "b": "READY"}
    assert site.query("SELECT count(*) AS n FROM deletion")[0]["n"] == 0


# --- deletion beside copy -------------------------------------------------------------------------


def a_copy_to_c(site: Site) -> Any:
    """Good copies on a and b; one on c is planned, whose best source is a."""
    oid = two_copies(site, "LIQUID")
    site.set_storage("b", phase="GAS")
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
    plan_replication(site.context)
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :o", o=oid)
    site.execute(
        "UPDATE replica SET checked_at = :now WHERE oid = :o AND storage_id = :s",
        now=site.now, o=oid, s=site.storages["a"],
    )  # fmt: skip
    assert site.replicas(oid) == {"a": "READY", "b": "READY", "c": "PENDING"}
    return oid


def trashing_a(site: Site, oid: Any) -> Callable[[], None]:
    def act() -> None:
        assert site.context.transact(lambda c: delete(c, site, oid, "a")) is None
        (site.folder / "a" / ".dlm" / "trash").mkdir(parents=True, exist_ok=True)
        uid = site.replica(oid, "a")["uid"]
        (site.folder / "a" / "x").rename(site.folder / "a" / ".dlm" / "trash" / str(uid))

    return act


@pytest.mark.parametrize(("storage", "call"), [("a", "open_read"), ("c", "write"), ("c", "rename")])
def test_a_source_trashed_during_a_copy_costs_nothing(site, storage, call):
    """Before it is opened, while it is read, before the copy is shown: the copy is made, from
    another source if need be, and the trashed one is not taken for damaged."""
    oid = a_copy_to_c(site)
    let_in(site, storage, call, trashing_a(site, oid))
    site.work(OperationKind.COPY)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY", "c": "READY"}
    assert site.visible("c") == {"test/x": b"good bytes"}
    assert site.private("c", "tmp") == []
    site.work()
    assert site.replicas(oid)["a"] == "TRASHED"


def test_a_copy_under_way_is_no_survivor(site):
    """The only copy cannot be deleted while the one that replaces it is being written."""
    oid = site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    plan_replication(site.context)
    refusals = []
    (to,) = set(site.replicas(oid)) - {"a"}
    let_in(site, to, "rename", lambda: refusals.append(deleting(site, oid, "a")()))
    site.work(OperationKind.COPY)
    assert refusals and refusals[0] is not None
    assert set(site.replicas(oid).values()) == {"READY"} and good_files(site) == 2


def test_a_copy_that_ends_waits_for_a_deletion_of_its_item(site):
    """The proof holds all copies of the item: the new one becomes READY after it."""
    oid = a_copy_to_c(site)
    met = overlap(site, lambda c: delete(c, site, oid, "a"), lambda: site.work(OperationKind.COPY))
    assert met.waited and met.error is None
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY", "c": "READY"}


# --- expiry beside hold ---------------------------------------------------------------------------


def place_hold(connection: Connection, site: Site) -> None:
    connection.execute(
        text(
            "INSERT INTO hold (hold_id, uri_prefix, reason, actor, created_at) "
            "VALUES (gen_random_uuid(), 'test:', 'audit', 'user:test', :now)"
        ),
        {"now": site.now},
    )


def expire_item(site: Site, oid: Any) -> None:
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = 'old' WHERE oid = :o",
        now=site.now,
        o=oid,
    )


def test_a_hold_placed_first_keeps_the_item(site):
    """Expiry waits until the hold is there, and lets the item be."""
    oid = two_copies(site)
    expire_item(site, oid)
    met = overlap(
        site,
        lambda c: place_hold(c, site),
        lambda: site.context.transact(lambda c: expire.plan_batch(c, site.context, 10)),
    )
    assert met.waited and met.error is None
    assert site.item(oid)["state"] == "READY"
    assert set(site.replicas(oid).values()) == {"READY"}


def test_a_hold_placed_during_expiry_keeps_the_trash(site):
    """The hold waits for the expiry; then what lies in the trash stays there, grace or not, until
    the hold ends."""
    oid = two_copies(site)
    expire_item(site, oid)
    met = overlap(
        site,
        lambda c: expire.plan_batch(c, site.context, 10),
        lambda: site.context.transact(lambda c: place_hold(c, site)),
    )
    assert met.waited and met.error is None
    assert set(site.replicas(oid).values()) == {"TRASHED"}
    for _ in range(3):
        site.settle()
        site.advance(hours=2)
    assert len(site.private("a", "trash")) == len(site.private("b", "trash")) == 1
    site.execute("UPDATE hold SET ends_at = :now", now=site.now)
    site.advance(hours=2)
    site.settle()
    assert set(site.replicas(oid).values()) == {"DELETED"}


def test_a_hold_that_comes_before_the_purge_is_certified_stops_it(site):
    """Also when it is placed while the purge looks at the survivors."""
    oid = two_copies(site)
    assert deleting(site, oid, "a")() is None
    site.work()
    site.advance(hours=2)
    site.context.settings = site.context.settings.model_copy(update={"proof_max_age_seconds": 1})
    let_in(site, "b", "open_read", lambda: site.context.transact(lambda c: place_hold(c, site)))
    site.work(OperationKind.PURGE)
    assert site.query("SELECT count(*) AS n FROM hold")[0]["n"] == 1
    assert site.replicas(oid)["a"] == "TRASHED" and len(site.private("a", "trash")) == 1


# --- drain and retire -----------------------------------------------------------------------------


def drained(site: Site, name: str) -> None:
    for _ in range(4):
        site.settle()
        site.advance(hours=2)
    assert site.visible(name) == {} and site.private(name, "trash") == []


def test_a_drain_beside_planning_leaves_no_copy_behind(site):
    """The plan may still name the storage that is being drained: the copy goes elsewhere."""
    oid = site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    site.set_storage("c", mode="read_only")
    met = overlap(
        site,
        lambda c: places.set_storage(c, "b", {"mode": "draining"}),
        lambda: plan_replication(site.context),
    )
    assert met.error is None
    site.set_storage("c", mode="read_write")
    drained(site, "b")
    assert site.replicas(oid).get("b", "MISSING") in ("MISSING", "DELETED")
    assert site.replicas(oid)["c"] == "READY" and good_files(site) == 2


@pytest.mark.parametrize("call", ["write", "rename"])
def test_a_drain_during_a_copy_ends_empty_too(site, call):
    """A copy that arrives on a storage which is drained meanwhile leaves it again."""
    oid = site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    site.set_storage("c", mode="read_only")
    plan_replication(site.context)

    def drain() -> None:
        site.context.transact(lambda c: places.set_storage(c, "b", {"mode": "draining"}))
        plan_rebalance(site.context)

    let_in(site, "b", call, drain)
    site.work(OperationKind.COPY)
    site.set_storage("c", mode="read_write")
    drained(site, "b")
    site.context.transact(lambda c: places.retire_storage(c, "b", site.now))
    assert site.replicas(oid)["c"] == "READY" and good_files(site) == 2


def retire_b(connection: Connection, site: Site) -> None:
    places.retire_storage(connection, "b", site.now)


def left_on_b(site: Site) -> int:
    return site.query(
        "SELECT count(*) AS n FROM replica WHERE storage_id = :s AND state <> 'DELETED'",
        s=site.storages["b"],
    )[0]["n"]


def test_a_planned_copy_keeps_its_storage_from_retiring(site):
    """Retiring waits for the plan and is refused, with the copy told."""
    site.set_storage("c", mode="read_only")
    site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    met = overlap(
        site,
        lambda c: plan_copies(c, site.context),
        lambda: site.context.transact(lambda c: retire_b(c, site)),
    )
    assert met.waited
    assert isinstance(met.error, DeletionRefusedError) and "1 PENDING" in str(met.error)


def test_no_copy_is_planned_on_a_storage_that_retires_meanwhile(site):
    """The plan waits for the retiring and then leaves the storage out: it stays empty."""
    site.set_storage("c", mode="read_only")
    oid = site.add_item("x", b"good bytes", "a", target_phase="SOLID")
    met = overlap(site, lambda c: retire_b(c, site), lambda: plan_replication(site.context))
    assert met.waited and met.error is None
    assert left_on_b(site) == 0
    site.set_storage("c", mode="read_write")
    site.advance(hours=7)
    site.settle()
    assert site.replicas(oid) == {"a": "READY", "c": "READY"}


def test_an_announcement_keeps_its_storage_from_retiring(site):
    """Retiring waits for the announcement and is refused."""
    (site.folder / "b" / "x").write_bytes(b"good bytes")

    def announcing(connection: Connection) -> None:
        one = Announcement("test:x", "x", 10)
        announce(connection, site.storages["b"], [one], Terms(), "user:test", site.now)

    met = overlap(site, announcing, lambda: site.context.transact(lambda c: retire_b(c, site)))
    assert met.waited and isinstance(met.error, DeletionRefusedError)


def test_nothing_is_announced_on_a_storage_that_retires_meanwhile(site):
    """The announcement waits, and then nothing of it is on the retired storage."""
    (site.folder / "b" / "x").write_bytes(b"good bytes")
    met = overlap(
        site,
        lambda c: retire_b(c, site),
        lambda: register_list(site.context, Source("b", "test"), ["x"]),
    )
    assert met.waited and isinstance(met.error, IllegalTransitionError)
    assert left_on_b(site) == 0
    assert site.query("SELECT count(*) AS n FROM data_item")[0]["n"] == 0


def test_a_storage_with_something_in_its_trash_does_not_retire(site):
    """Neither before the trashing is committed nor after it; only when all is purged."""
    oid = two_copies(site)
    met = overlap(
        site,
        lambda c: delete(c, site, oid, "b"),
        lambda: site.context.transact(lambda c: retire_b(c, site)),
    )
    assert isinstance(met.error, DeletionRefusedError)
    site.work()
    with pytest.raises(DeletionRefusedError, match="1 TRASHED"):
        site.context.transact(lambda c: retire_b(c, site))
    site.advance(hours=2)
    site.work()
    site.context.transact(lambda c: retire_b(c, site))


# --- restore beside purge -------------------------------------------------------------------------


def in_the_trash(site: Site) -> Any:
    """An item whose copy on a is in the trash, its grace over."""
    oid = two_copies(site)
    assert deleting(site, oid, "a")() is None
    site.work()
    site.advance(hours=2)
    return oid


def restore(connection: Connection, site: Site, oid: Any) -> int:
    return request_restore(connection, oid=oid, storage_id=None, actor="user:test", now=site.now)


def test_a_restore_that_comes_first_is_not_purged(site):
    """The purge is not even claimed; the copy comes back."""
    oid = in_the_trash(site)
    met = overlap(site, lambda c: restore(c, site, oid), lambda: site.work(OperationKind.PURGE))
    assert met.error is None
    site.work()
    assert site.replicas(oid) == {"a": "READY", "b": "READY"} and good_files(site) == 2


@pytest.mark.parametrize(("storage", "call"), [("b", "open_read"), ("a", "remove")])
def test_a_restore_during_a_purge_is_refused(site, storage, call):
    """While the survivors are looked at and just before the removal: the answer is plain, and
    nothing half-way is left."""
    oid = in_the_trash(site)
    site.context.settings = site.context.settings.model_copy(update={"proof_max_age_seconds": 1})
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(site.context.transact(lambda c: restore(c, site, oid)))
        except NotFoundError as error:
            answers.append(error)

    let_in(site, storage, call, ask)
    site.work(OperationKind.PURGE)
    assert len(answers) == 1 and isinstance(answers[0], NotFoundError)
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"}
    assert site.private("a", "trash") == [] and good_files(site) == 1


# --- verify beside trash --------------------------------------------------------------------------


def looking_at(site: Site, oid: Any) -> None:
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, oid=oid, storage_id=site.storages["a"]
        )
    )


@pytest.mark.parametrize("data", [b"good bytes", b"evil bytes"])
def test_a_look_does_not_bring_a_trashed_copy_back(site, data):
    """Good or damaged, what is trashed while it is read stays TRASHED, and goes its way."""
    oid = two_copies(site)
    (site.folder / "a" / "x").write_bytes(data)
    looking_at(site, oid)
    let_in(site, "a", "open_read", deleting(site, oid, "a"))
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}
    site.work()
    site.advance(hours=2)
    site.work()
    assert site.replicas(oid) == {"a": "DELETED", "b": "READY"} and good_files(site) == 1


def test_what_a_look_found_waits_for_a_deletion(site):
    """The verdict is written after the deletion, and changes nothing any more."""
    oid = two_copies(site)
    looking_at(site, oid)
    met = overlap(
        site, lambda c: delete(c, site, oid, "a"), lambda: site.work(OperationKind.VERIFY)
    )
    assert met.error is None
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY"}


def test_a_deletion_waits_for_a_target_that_is_raised(site):
    """Who asks for more copies at the moment of a deletion gets to keep what is there."""
    oid = two_copies(site)
    met = overlap(
        site,
        lambda c: c.execute(
            text("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :oid"), {"oid": oid}
        ),
        lambda: site.context.transact(lambda c: delete(c, site, oid, "a")),
    )
    assert met.waited and met.error is None
    assert met.result is not None and "SOLID needs" in met.result
    assert site.replicas(oid)["a"] == "READY"


def test_a_deletion_waits_for_what_is_found_of_its_survivor(site):
    """A look that doubts the other copy at this moment is believed: nothing goes."""
    oid = two_copies(site)
    met = overlap(
        site,
        lambda c: replicas.mark_state(
            c, [site.replica(oid, "b")["uid"]], "SUSPECT", only_from=["READY"]
        ),
        lambda: site.context.transact(lambda c: delete(c, site, oid, "a")),
    )
    assert met.waited and met.error is None
    assert met.result is not None and "give 0 of the 2" in met.result
    assert site.replicas(oid) == {"a": "READY", "b": "SUSPECT"}


def test_a_deletion_waits_for_a_hold_that_is_being_placed(site):
    """And is then refused in words, with nothing certified."""
    oid = two_copies(site)
    met = overlap(
        site,
        lambda c: c.execute(
            text(
                """INSERT INTO hold (hold_id, oid, reason, actor)
                   VALUES (gen_random_uuid(), :oid, 'an enquiry', 'user:test')"""
            ),
            {"oid": oid},
        ),
        lambda: site.context.transact(lambda c: delete(c, site, oid, "a")),
    )
    assert met.waited and met.error is None
    assert met.result == "under a hold: an enquiry"
    assert site.query("SELECT * FROM deletion") == []


def test_an_expiry_that_is_taken_back_while_its_deletion_waits_is_none(site):
    """What was due when it was chosen and is not when its lock is had stays."""
    oid = two_copies(site)
    late = site.now - timedelta(microseconds=1)
    site.context.transact(lambda c: set_replica_expiry(c, "test:x", "b", late, "room"))
    met = overlap(
        site,
        lambda c: set_replica_expiry(c, "test:x", "b", None, ""),
        lambda: site.context.transact(lambda c: expire.plan_batch(c, site.context, 10)),
    )
    assert met.waited and met.result == ([], [])
    assert site.replicas(oid)["b"] == "READY"


@pytest.mark.parametrize("later", [timedelta(days=30), None], ids=["later", "never"])
def test_an_expiry_that_is_put_off_when_its_item_has_expired_is_refused(site, later):
    """Who waited for the lock is told, and nothing is promised of what goes all the same."""
    oid = two_copies(site)
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "over"))
    until = later and site.now + later
    met = overlap(
        site,
        lambda c: expire.plan_batch(c, site.context, 10),
        lambda: site.context.transact(lambda c: set_item_expiry(c, "test:x", until, "kept")),
    )
    assert met.waited and isinstance(met.error, IllegalTransitionError)
    assert met.error.code == "DLM-105" and "EXPIRED" in str(met.error)
    assert site.query("SELECT expiry_reason FROM data_item")[0]["expiry_reason"] == "over"
    assert site.replicas(oid)["a"] == "TRASHED"


def test_an_expiry_that_is_put_off_first_keeps_the_item(site):
    """Expiry passes over what is locked, and then finds that it is not due."""
    oid = two_copies(site)
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "over"))
    until = site.now + timedelta(days=30)

    def plan() -> object:
        return site.context.transact(lambda c: expire.plan_batch(c, site.context, 10))

    met = overlap(site, lambda c: set_item_expiry(c, "test:x", until, "kept"), plan)
    assert met.error is None and met.result == ([], [])
    assert plan() == ([], []) and site.replicas(oid)["a"] == "READY"
