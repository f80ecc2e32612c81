"""Good bytes that were set aside, since their storage misread them, come back by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from dlm_core.errors import CatalogueUnavailableError
from dlm_core.lifecycle import verify
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, Terms, register_tree
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from tests.site import Site, make_site, misread

GOOD = b"good bytes"


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A")
    return site


def look(site: Site, oid: Any) -> None:
    site.context.transact(
        lambda c: request_verification(c, actor="user:test", now=site.now, oid=oid)
    )
    site.work(OperationKind.VERIFY)


def condemned(site: Site) -> Any:
    """An item whose only copy was read wrongly three times, and is whole in quarantine."""
    oid = site.add_item("x", GOOD, "a", target_phase="LIQUID")
    left = misread(site, 3)
    look(site, oid)
    assert not left and site.replicas(oid) == {"a": "CORRUPTED"}
    assert site.visible("a") == {} and len(site.private("a", "quarantine")) == 1
    return oid


def is_well(site: Site, oid: Any) -> None:
    assert site.replicas(oid) == {"a": "READY"} and site.item(oid)["state"] == "READY"
    assert site.visible("a") == {"x": GOOD} and site.private("a", "quarantine") == []


def test_what_is_set_aside_is_read_once_more_there(site):
    """Two wrong reads condemn a copy, the look into quarantine right after brings it back."""
    oid = site.add_item("x", GOOD, "a", target_phase="LIQUID")
    left = misread(site, 2)
    look(site, oid)
    assert not left
    is_well(site, oid)
    actions = [e["action"] for e in site.query("SELECT action FROM event WHERE noun = 'replica'")]
    assert "brought_back" in actions


def test_no_item_is_called_lost_before_quarantine_is_looked_at(site):
    """The planner asks for that look before it says CORRUPTED, and nobody else has to."""
    oid = condemned(site)
    plan_replication(site.context)
    assert site.item(oid)["state"] == "READY" and "set aside" in site.item(oid)["shortfall"]
    site.settle()
    is_well(site, oid)
    assert site.item(oid)["shortfall"] is None


def test_a_lost_item_is_looked_for_again_and_again(site):
    """While its storage is away it is called CORRUPTED; when that is back, so is the item."""
    oid = condemned(site)
    site.set_storage("a", mode="offline")
    for _ in range(8):
        site.settle()
        site.advance(minutes=10)
    assert site.item(oid)["state"] == "CORRUPTED"
    site.set_storage("a", mode="read_write")
    for _ in range(4):
        site.advance(hours=7)
        site.settle()
    is_well(site, oid)


@pytest.mark.parametrize("step", ["moved", "set aside"])
def test_a_crash_on_either_way_is_mended(site, step):
    """Bytes that came back unrecorded are found in their place, those set aside unrecorded in
    quarantine."""
    oid = condemned(site)
    (name,) = site.private("a", "quarantine")
    folder = site.folder / "a"
    if step == "moved":
        (folder / ".dlm" / "quarantine" / name).rename(folder / "x")
    else:
        uid = site.replica(oid, "a")["uid"]
        site.execute("UPDATE replica SET state = 'SUSPECT' WHERE uid = :u", u=uid)
    look(site, oid)
    is_well(site, oid)


def test_damage_that_was_set_aside_unrecorded_is_damage_still(site, monkeypatch):
    """The next try finds nothing in its place, and says CORRUPTED: it was moved, it did not go."""
    oid = site.add_item("x", GOOD, "a", target_phase="LIQUID")
    (site.folder / "a" / "x").write_bytes(b"evil bytes")

    def refuse(connection: Any, context: Any, *_: Any) -> Any:
        if site.private("a", "quarantine"):
            raise CatalogueUnavailableError(reason="cut", hint="again")
        return write(connection, context, *_)

    write = verify._write
    monkeypatch.setattr(verify, "_write", refuse)
    with pytest.raises(CatalogueUnavailableError):
        look(site, oid)
    assert site.replicas(oid) == {"a": "SUSPECT"} and site.visible("a") == {}
    monkeypatch.undo()
    site.advance(hours=1)
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid) == {"a": "CORRUPTED"}


def test_a_strangers_file_in_the_place_is_not_moved_for_it(site):
    """The good bytes wait in quarantine until the place is free; the operation says so."""
    oid = condemned(site)
    (site.folder / "a" / "x").write_bytes(b"somebody else's")
    look(site, oid)
    assert site.replicas(oid) == {"a": "CORRUPTED"}
    assert site.visible("a") == {"x": b"somebody else's"}
    (site.folder / "a" / "x").unlink()
    look(site, oid)
    is_well(site, oid)


def test_bytes_that_are_really_damaged_stay_aside(site):
    """However often they are looked at."""
    oid = site.add_item("x", GOOD, "a", target_phase="LIQUID")
    (site.folder / "a" / "x").write_bytes(b"evil bytes")
    for _ in range(4):
        look(site, oid)
        site.settle()
        site.advance(hours=7)
    assert site.replicas(oid) == {"a": "CORRUPTED"} and site.item(oid)["state"] == "CORRUPTED"
    assert site.visible("a") == {} and len(site.private("a", "quarantine")) == 1


def test_a_directory_comes_back_whole(site):
    """With all its files, by its manifest."""
    folder = site.folder / "a" / "d.ms"
    (folder / "sub").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "sub" / "two").write_bytes(b"22")
    source = Source("a", "test", as_directory=("*.ms",), terms=Terms(target_phase="LIQUID"))
    register_tree(site.context, source)
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    (row,) = site.query("SELECT oid, uid FROM replica WHERE state = 'READY'")
    folder.rename(site.folder / "a" / "away")
    aside = site.folder / "a" / ".dlm" / "quarantine"
    aside.mkdir(parents=True, exist_ok=True)
    (site.folder / "a" / "away").rename(aside / f"{row['uid']}.feed")
    look(site, row["oid"])
    assert site.replicas(row["oid"]) == {"a": "READY"}
    assert site.visible("a") == {"d.ms/one": b"1", "d.ms/sub/two": b"22"}
