"""A purge rests on what holds when it removes, not on what held when it began."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from dlm_core.catalogue import deletions
from dlm_core.errors import DlmError
from dlm_core.lifecycle import expire, trash
from dlm_core.lifecycle.lost import lose_storage, plan_audits, take_back
from dlm_core.lifecycle.work import _open_row
from dlm_core.types import OperationKind, new_id
from tests.fakes import Hooked
from tests.site import Site, make_site, reopen


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    for name in "abc":
        site.add_storage(name, name.upper(), concurrency=1)
    return site


def in_the_trash(site: Site, path: str, of: str, beside: str) -> Any:
    """An item with a good copy beside the one that is in the trash, whose grace is over."""
    for name in site.storages:
        site.set_storage(name, mode="read_write" if name in (of, beside) else "read_only")
    oid = site.add_item(path, b"good bytes", of)
    site.settle()
    assert site.replicas(oid) == {of: "READY", beside: "READY"}
    for name in site.storages:
        site.set_storage(name, mode="read_write")
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)

    def go(connection: Any) -> None:
        proofs = deletions.prove(connection, [site.replica(oid, of)["uid"]])
        valid_for = site.context.settings.lease
        expire.trash(connection, proofs, actor="user:test", now=site.now, valid_for=valid_for)

    site.context.transact(go)
    site.work(OperationKind.TRASH)
    return oid


def trashed(site: Site) -> int:
    return sum(len(site.private(name, "trash")) for name in site.storages)


def at_first_removal(site: Site, action: Callable[[], Any]) -> None:
    """Do ``action`` once, just before anything is removed from a trash."""
    left = [action]

    def hook(call: str, path: str) -> None:
        if call == "remove" and path.startswith(".dlm/trash/") and left:
            left.pop()()

    reopen(site, lambda row: Hooked(_open_row(row), hook))


def hold_everything(site: Site) -> None:
    site.execute(
        """INSERT INTO hold (hold_id, uri_prefix, reason, actor)
           VALUES (:id, 'test:', 'an enquiry', 'user:test')""",
        id=new_id(),
    )


@pytest.mark.parametrize("event", ["hold", "loss"])
def test_what_happens_during_a_purge_stops_it_on_the_next_storage(site, event):
    """One storage takes its time; a hold that is placed meanwhile, or the loss of a survivor, is
    known before anything is removed on another."""
    oids = [in_the_trash(site, "x", "a", "c"), in_the_trash(site, "y", "b", "c")]
    site.advance(hours=2)
    at_first_removal(
        site,
        lambda: hold_everything(site) if event == "hold" else lose_storage(site.context, "c", "!"),
    )
    site.work(OperationKind.PURGE)
    assert trashed(site) == 1
    assert sorted(next(iter(site.replicas(oid).values())) for oid in oids) == ["DELETED", "TRASHED"]


def test_nothing_is_removed_once_its_proof_is_too_old(site):
    """A storage hangs in the middle: what is left is proven again first."""
    for path in "xy":
        in_the_trash(site, path, "a", "c")
    site.advance(hours=2)

    def hang() -> None:
        site.advance(seconds=site.context.settings.certificate_seconds)
        lose_storage(site.context, "c", "burnt")

    at_first_removal(site, hang)
    with suppress(DlmError):  # of what went the catalogue wants a proof that is good
        site.work(OperationKind.PURGE)
    assert trashed(site) == 1


def test_a_survivor_that_nobody_looked_at_is_none(site, monkeypatch):
    """It came to be one while the others were looked at: the purge waits, and looks at it then."""
    oid = in_the_trash(site, "x", "a", "b")
    site.set_storage("a", mode="read_only")
    site.execute("UPDATE data_item SET target_phase = 'SOLID' WHERE oid = :o", o=oid)
    site.settle()
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :o", o=oid)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "READY", "c": "READY"}
    site.set_storage("a", mode="read_write")
    site.set_storage("c", mode="offline")
    for name in "bc":
        (site.folder / name / "test" / "x").unlink()
    look = trash.look_at_survivors

    def look_while_c_comes_back(*arguments: Any) -> Any:
        found = look(*arguments)
        site.set_storage("c", mode="read_write")
        return found

    monkeypatch.setattr(trash, "look_at_survivors", look_while_c_comes_back)
    site.advance(hours=2)
    site.work(OperationKind.PURGE)
    assert site.replicas(oid) == {"a": "TRASHED", "b": "SUSPECT", "c": "READY"}
    assert trashed(site) == 1
    for _ in range(2):
        site.advance(hours=2)
        site.settle()
    assert site.replicas(oid)["a"] == "READY"


@pytest.mark.parametrize("away", ["lost", "not managed"])
def test_what_was_not_moved_when_it_was_trashed_is_moved_before_it_is_purged(site, away):
    """Nobody was to touch its storage then. Once it may be written to, the bytes have their grace
    in the trash, and what is said to be gone is."""
    oid = site.add_item("x", b"good bytes", "a")
    site.settle()
    if away == "lost":
        lose_storage(site.context, "a", "its controller broke")
    else:
        site.set_storage("a", managed=False)
    site.execute("UPDATE data_item SET expires_at = :n WHERE oid = :o", n=site.now, o=oid)
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED" and list(site.visible("a")) == ["x"]
    if away == "lost":
        take_back(site.context, "a")
        site.work(plan=plan_audits)
    else:
        site.set_storage("a", managed=True)
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED" and site.visible("a") == {}
    assert site.private("a", "trash") == [str(site.replica(oid, "a")["uid"])]
    site.advance(hours=2)
    site.settle()
    assert set(site.replicas(oid).values()) == {"DELETED"} and trashed(site) == 0
