"""Looking at items: pages, one item, its history, and why."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_core.catalogue import browse
from dlm_core.errors import IllegalTransitionError, NotFoundError
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.types import make_uri, new_id
from tests.schema.rules import add_item
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Any, tmp_path: Any) -> Site:
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    return site


def page(site: Site, **filters: Any) -> list[str]:
    found = site.context.transact(lambda c: browse.list_items(c, **filters))
    return [f"{row['uri']}#{row['version']}" for row in found]


def get(site: Site, uri: str, version: int | None = None) -> dict[str, Any]:
    return site.context.transact(lambda c: browse.get_item(c, uri, version))


def why(site: Site, uri: str) -> dict[str, Any]:
    return site.context.transact(lambda c: browse.explain_item(c, uri))


# --- lists ----------------------------------------------------------------------------------------

_NAMES = st.text("abAB%_-~.!*0", min_size=1, max_size=4).filter(lambda n: n not in (".", ".."))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.sets(_NAMES, max_size=15), size=st.integers(1, 4), prefix=st.text("aA%_", max_size=2)
)
def test_pages_put_together_are_everything_in_order(
    engine: Any, names: set[str], size: int, prefix: str
) -> None:
    """Whatever the names, versions, prefix and size of the pages: no item is left out or told
    twice, in bytewise order, and every item with the prefix is among them."""
    with engine.connect() as connection:
        for name in names:
            for version in range(1, 1 + len(name)):
                add_item(connection, uri=make_uri("test", name), version=version)
        seen: list[tuple[str, int]] = []
        after = None
        while found := browse.list_items(
            connection, prefix=f"test:{prefix}", limit=size, after=after
        ):
            seen += [(row["uri"], row["version"]) for row in found]
            after = "#".join(map(str, seen[-1]))
        connection.rollback()
    wanted = [
        (make_uri("test", name), version)
        for name in names
        if make_uri("test", name).startswith(f"test:{prefix}")
        for version in range(1, 1 + len(name))
    ]
    assert seen == sorted(wanted, key=lambda pair: (pair[0].encode(), pair[1]))


def test_lists_are_narrowed_by_state_pattern_collection_and_storage(site: Site) -> None:
    """Each filter keeps what it says, and they combine."""
    group = new_id()
    site.execute("INSERT INTO collection (collection_id, name) VALUES (:id, 'g')", id=group)
    site.add_item("run-1/x.fits", b"1", "a", collection_id=group)
    site.add_item("run-1/y.txt", b"2", "b")
    site.add_item("run-2/x.fits", b"3", "b")
    assert page(site, state="CORRUPTED") == []
    assert len(page(site, state="READY")) == 3
    assert page(site, prefix="test:run-1/") == ["test:run-1/x.fits#1", "test:run-1/y.txt#1"]
    assert page(site, prefix="*.fits") == ["test:run-1/x.fits#1", "test:run-2/x.fits#1"]
    assert page(site, prefix="test:run-?/x*", storage="b") == ["test:run-2/x.fits#1"]
    assert page(site, collection="g") == ["test:run-1/x.fits#1"]
    assert page(site, below_target=True) == []
    for wrong in ({"collection": "nope"}, {"storage": "nope"}):
        with pytest.raises(NotFoundError):
            page(site, **wrong)


# --- one item -------------------------------------------------------------------------------------


def test_an_item_comes_with_its_replicas(site: Site) -> None:
    """The newest version with where its copies are; another one when asked for."""
    site.add_item("x", b"12345", "a")
    site.settle()
    found = get(site, "test:x")
    assert (found["state"], found["size"], found["version"]) == ("READY", 5, 1)
    assert {(r["storage"], r["state"]) for r in found["replicas"]} == {
        ("a", "READY"),
        ("b", "READY"),
    }
    with site.context.engine.begin() as connection:
        add_item(connection, uri="test:x", version=2)
    assert get(site, "test:x")["version"] == 2
    assert get(site, "test:x")["replicas"] == []
    assert get(site, "test:x", 1)["version"] == 1


def test_a_uri_that_is_not_there_is_told_with_one_that_is_near(site: Site) -> None:
    """The hint names an item of the same folder, of a folder above, or the list."""
    site.add_item("run-1/scan-3.ms", b"1", "a")
    for wrong in ("test:run-1/scan", "test:run-1/other", "test:run-2/scan-3.ms"):
        with pytest.raises(NotFoundError, match=r"test:run-1/scan-3\.ms"):
            get(site, wrong)
    with pytest.raises(NotFoundError, match="dlm item list"):
        get(site, "nothing:like/it")
    with pytest.raises(NotFoundError):
        get(site, "test:run-1/scan-3.ms", 7)


def test_the_history_is_told_in_order(site: Site) -> None:
    """From creation on, items and replicas, with the storage and who it was; limited to the
    newest."""
    oid = site.add_item("x", b"12345", "a")
    site.settle()
    found = site.context.transact(lambda c: browse.item_events(c, oid))
    assert [row["new_state"] for row in found] == [
        "INITIALISED", "PENDING", "READY", "READY", "PENDING", "READY",
    ]  # fmt: skip
    assert {row["actor"] for row in found} == {"user:test"}
    newest = site.context.transact(lambda c: browse.item_events(c, oid, 2))
    assert newest == found[-2:]


# --- why ------------------------------------------------------------------------------------------


def test_why_tells_what_is_missing_and_planned(site: Site) -> None:
    """Before the copy: wanted, reached, shortfall, and the queued copy with its reason."""
    site.add_item("x", b"12345", "a")
    plan_replication(site.context)
    found = why(site, "test:x")
    assert (found["target_phase"], found["reached_weight"]) == ("SOLID", 2)
    assert found["shortfall"]
    (copy,) = found["operations"]
    assert (copy["kind"], copy["state"], copy["storage"]) == ("copy", "QUEUED", "b")
    assert "SOLID" in copy["reason"]
    site.settle()
    after = why(site, "test:x")
    assert (after["reached_weight"], after["shortfall"]) == (4, None)
    assert [replica["location"] for replica in after["replicas"]] == ["A", "B"]


def test_why_tells_errors_holds_and_certificates(site: Site) -> None:
    """A failed operation with its error, a hold in force, and after the end the certificates."""
    oid = site.add_item("x", b"12345", "a")
    site.settle()
    hold = new_id()
    site.execute(
        "INSERT INTO hold (hold_id, oid, reason, actor, created_at) "
        "VALUES (:id, :oid, 'under audit', 'user:auditor', :now)",
        id=hold, oid=oid, now=site.now,
    )  # fmt: skip
    (told,) = why(site, "test:x")["holds"]
    assert (told["reason"], told["actor"]) == ("under audit", "user:auditor")
    site.execute("UPDATE hold SET ends_at = :now WHERE hold_id = :id", id=hold, now=site.now)
    site.advance(seconds=1)
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", site.now, "embargo over"))
    site.settle()
    site.advance(hours=2)
    site.settle()
    found = why(site, "test:x")
    assert (found["state"], found["holds"]) == ("DELETED", [])
    steps = sorted((c["step"], c["storage"]) for c in found["certificates"])
    assert steps == [("purge", "a"), ("purge", "b"), ("trash", "a"), ("trash", "b")]
    assert {c["reason"] for c in found["certificates"]} == {"its item has expired: embargo over"}


# --- expiry as users say it -----------------------------------------------------------------------


def test_an_item_expires_when_it_is_told_to(site: Site) -> None:
    """The time and the reason are kept; a time before its making is its making."""
    oid = site.add_item("x", b"1", "a")
    later = site.now + timedelta(days=30)
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", later, "why not"))
    assert (site.item(oid)["expires_at"], site.item(oid)["expiry_reason"]) == (later, "why not")
    early = site.now - timedelta(days=30)
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", early, "why not"))
    assert site.item(oid)["expires_at"] == site.now


def test_an_item_told_never_to_expire_never_does(site: Site) -> None:
    """Taking an expiry back leaves no time at all: the item is there a year later."""
    oid = site.add_item("x", b"1", "a")
    site.settle()
    later = site.now + timedelta(days=1)
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", later, "why not"))
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", None, ""))
    assert (site.item(oid)["expires_at"], site.item(oid)["expiry_reason"]) == (None, None)
    site.advance(days=365)
    site.settle()
    assert site.item(oid)["state"] == "READY"


def test_what_has_expired_takes_no_other_time(site: Site) -> None:
    """An EXPIRED item is refused: restoring is the way back."""
    site.add_item("x", b"1", "a")
    site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", site.now, "r"))
    site.settle()
    with pytest.raises(IllegalTransitionError):
        site.context.transact(lambda c: browse.set_item_expiry(c, "test:x", None, ""))


def test_one_copy_leaves_and_its_item_stays(site: Site) -> None:
    """A copy told to leave goes once another takes its part; 'never' takes it back."""
    site.add_storage("c", "C")
    oid = site.add_item("x", b"1", "a")
    site.settle()
    later = site.now + timedelta(days=1)

    def tell(at: Any) -> None:
        site.context.transact(
            lambda c: browse.set_replica_expiry(c, "test:x", "a", at, "lent only")
        )

    tell(later)
    assert site.replica(oid, "a")["expires_at"] == later
    tell(None)
    assert site.replica(oid, "a")["expires_at"] is None
    tell(site.now)
    site.settle()
    site.advance(minutes=2)
    site.settle()
    assert site.replicas(oid)["a"] == "TRASHED"
    assert site.item(oid)["shortfall"] is None
    with pytest.raises(NotFoundError):
        tell(later)


def test_items_of_which_nothing_good_is_known_are_listed(site: Site) -> None:
    """Nothing READY on a storage that counts: the only copy doubted, or on a lost storage; never an
    item that a good copy is left of, nor one that has expired."""
    doubted, _, expired, _ = (site.add_item(name, b"x", on="a") for name in ("a", "b", "c", "d"))
    site.add_item("e", b"x", on="b")
    assert page(site, lost=True) == []
    site.execute("UPDATE replica SET state = 'SUSPECT' WHERE oid = :oid", oid=doubted)
    assert page(site, lost=True) == ["test:a#1"]
    site.execute(
        "UPDATE data_item SET state = 'EXPIRED', expires_at = :now, expiry_reason = 'test' "
        "WHERE oid = :oid",
        oid=expired,
        now=site.now,
    )
    site.set_storage("a", mode="lost")
    assert page(site, lost=True) == ["test:a#1", "test:b#1", "test:d#1"]
    assert page(site, lost=True, limit=1, after="test:a#1") == ["test:b#1"]
