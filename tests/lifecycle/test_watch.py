"""What a watched folder makes of what appears in it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue.items import Terms
from dlm_core.catalogue.urgency import Urgency
from dlm_core.catalogue.watches import list_watches
from dlm_core.errors import IllegalTransitionError, InvalidValueError, PathRefusedError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, collection_id
from dlm_core.lifecycle.watch import add_watch, scan_watches
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Engine, tmp_path: Path) -> Site:
    site = make_site(engine, tmp_path, max_attempts=2)
    site.add_storage("in", "A")
    return site


def write(site: Site, path: str, data: bytes, mtime: float = 1_700_000_000) -> None:
    file = site.folder / "in" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    os.utime(file, (mtime, mtime))


def look(site: Site) -> Any:
    report = scan_watches(site.context)
    site.advance(seconds=31)
    return report


def test_a_folder_that_is_being_written_is_left_alone(site: Site) -> None:
    """A *.part folder is renamed when it is whole: until then none of its files is a payload."""
    add_watch(site.context, Source("in", "ska", as_directory=("*.ms",)), "drop")
    write(site, "drop/scan.ms.part/table", b"1")
    write(site, "drop/deep.tmp/more/x", b"2")
    for _ in range(3):
        assert look(site).created == 0
    (site.folder / "in/drop/scan.ms.part").rename(site.folder / "in/drop/scan.ms")
    look(site)
    assert look(site).created == 1
    assert [row["uri"] for row in site.query("SELECT uri FROM data_item")] == ["ska:drop/scan.ms"]


def test_a_directory_payload_waits_until_none_of_its_files_changes(site: Site) -> None:
    """It is one item, hidden files and *.part within it included; a file beside it is one of its
    own, and neither is announced again."""
    add_watch(site.context, Source("in", "ska", as_directory=("*.zarr",)), "drop")
    write(site, "drop/a.zarr/.zarray", b"{}")
    write(site, "drop/a.zarr/0.part", b"1")
    write(site, "drop/b", b"beside")
    assert look(site).created == 0
    write(site, "drop/a.zarr/1", b"grows")
    assert look(site).created == 1
    write(site, "drop/a.zarr/1", b"grown", 1_700_000_100)  # as long as before
    assert look(site).created == 0
    assert look(site).created == 1
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    found = site.query("SELECT uri, kind, size FROM data_item ORDER BY uri")
    assert found == [
        {"uri": "ska:drop/a.zarr", "kind": "directory", "size": 8},
        {"uri": "ska:drop/b", "kind": "file", "size": 6},
    ]
    assert (look(site).created, look(site).refused) == (0, 0)


def test_items_get_the_terms_of_their_watch(site: Site) -> None:
    """Collection, target phase, owner, tags, priority; and changed bytes a version, if so told."""
    collection = collection_id(site.context, "eb-1")
    terms = Terms("GAS", collection, "me", {"k": "v"}, urgency=Urgency(-3))
    add_watch(site.context, Source("in", "ska", "p/", new_version=True, terms=terms))
    write(site, "x", b"one")
    look(site)
    assert look(site).created == 1
    found = site.query(
        """SELECT uri, target_phase, collection_id, owner, tags, priority
             FROM data_item JOIN urgency USING (oid)"""
    )
    assert found == [
        {"uri": "ska:p/x", "target_phase": "GAS", "collection_id": collection, "owner": "me",
         "tags": {"k": "v"}, "priority": -3}
    ]  # fmt: skip
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    write(site, "x", b"two two", 1_700_000_500)
    look(site)
    look(site)
    found = site.query("SELECT version, owner FROM data_item ORDER BY version")
    assert found == [{"version": 1, "owner": "me"}, {"version": 2, "owner": "me"}]


@pytest.mark.parametrize(
    ("source", "seconds"),
    [
        (Source("in"), 0.5),
        (Source("in", "No Scheme"), 30),
        (Source("in", checksums={"x": "sha256:" + "0" * 64}), 30),
    ],
)
def test_what_a_watch_cannot_do_is_refused(site: Site, source: Source, seconds: float) -> None:
    """Nothing is watched then."""
    with pytest.raises(InvalidValueError):
        add_watch(site.context, source, interval=timedelta(seconds=seconds))
    assert site.query("SELECT * FROM watch") == []


def test_what_can_never_be_a_folder_is_not_watched(site: Site) -> None:
    """A file, a link, what lies behind one, the DLM's own; a folder that is yet to come may be."""
    write(site, "one.dat", b"1")
    write(site, "real/x", b"1")
    (site.folder / "in/link").symlink_to("real")
    for path in ("one.dat", "link", ".dlm/tmp"):
        with pytest.raises(InvalidValueError, match="folder"):
            add_watch(site.context, Source("in"), path)
    with pytest.raises(PathRefusedError, match="link"):
        add_watch(site.context, Source("in"), "link/deeper")
    assert site.query("SELECT * FROM watch") == []
    add_watch(site.context, Source("in"), "to/come")


@pytest.mark.parametrize("mode", ["retired", "lost"])
def test_nothing_is_watched_on_a_storage_that_is_gone(site: Site, mode: str) -> None:
    """It would never be looked at."""
    site.set_storage("in", mode=mode, retired_at=site.now if mode == "retired" else None)
    with pytest.raises(IllegalTransitionError, match=f"storage in .*{mode}"):
        add_watch(site.context, Source("in"))
    assert site.query("SELECT * FROM watch") == []


def test_a_look_that_fails_is_told_until_one_succeeds(site: Site) -> None:
    """By the list of watches, with the reason: the last one."""

    def told() -> Any:
        (found,) = site.context.transact(list_watches)
        return found["refused"], found["refusals"]

    add_watch(site.context, Source("in", "ska"), "drop")
    write(site, "drop/x", b"1")
    look(site)
    (site.folder / "in").rename(site.folder / "away")
    for _ in range(2):
        look(site)
        refused, reasons = told()
        assert refused == 1 and "DLM" not in reasons["drop"] and "in" in reasons["drop"]
    (site.folder / "away").rename(site.folder / "in")
    look(site)
    assert told() == (0, None)


def test_a_watch_has_no_moments(site: Site) -> None:
    """It goes on, so what expires at a moment would soon expire at once."""
    moment = site.now + timedelta(days=1)
    for terms in (Terms(item_expires_at=moment), Terms(urgency=Urgency(0, moment))):
        with pytest.raises(InvalidValueError, match="no moments"):
            add_watch(site.context, Source("in", terms=terms))


def test_an_end_that_comes_while_announcing_is_now(site: Site) -> None:
    """An expiry in the past is refused; one that passes during a long walk is no error."""
    write(site, "x", b"x")
    assert Terms(item_expires_at=site.now).item_end(
        site.now + timedelta(1)
    ) == site.now + timedelta(1)
    with pytest.raises(InvalidValueError, match="a time to come"):
        Terms(replica_expires_at=site.now).check(site.now + timedelta(1))
