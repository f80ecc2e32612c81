"""What is registered a second time: changed, gone, in two ways, or by two at once."""

import os
import random
import tempfile
import uuid
from pathlib import Path
from string import ascii_letters

import pytest

from dlm_core.catalogue.browse import set_item_expiry
from dlm_core.catalogue.items import Announcement, Terms
from dlm_core.catalogue.versions import add_version
from dlm_core.catalogue.watches import list_watches
from dlm_core.errors import CatalogueError, NotFoundError
from dlm_core.lifecycle import ingest, watch
from dlm_core.lifecycle.register import Source, register_list, register_tree
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.watch import add_watch, scan_watches
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Entry
from dlm_core.transfers.checksums import parse_checksums
from tests.lifecycle.test_register import admit, items, write
from tests.memory import fast_folder
from tests.site import make_site, reopen


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    site.add_storage("in", "A")
    return site


def again(site, **options):
    return register_tree(site.context, Source("in", "test", **options))


def registered(site, files):
    write(site, files)
    again(site)
    admit(site)


def versions(site):
    found = site.query("SELECT uri, version, state FROM data_item ORDER BY uri, version")
    return [tuple(row.values()) for row in found]


@pytest.mark.parametrize("until", ["DELETED", "EXPIRED"])
def test_what_has_gone_comes_back_as_a_new_version_only(site, until):
    """Its copies would be no one's: nothing is made for an item that has expired. Said to be a new
    version it is one, and lives."""
    registered(site, {"x": b"1"})
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "gone", None))
    site.settle()
    if until == "DELETED":
        site.advance(hours=2)
        site.settle()
    assert versions(site) == [("test:x", 1, until)]
    write(site, {"x": b"1", "y": b"2"})
    report = again(site)
    assert (report.created, report.replicated, report.refused) == (1, 0, 1)
    assert report.reasons[0][0] == "test:x" and f"version 1 is {until}" in report.reasons[0][1]
    assert admit(site).done == {"admit": 1}
    assert again(site, new_version=True).new_versions == 1
    assert admit(site).done == {"admit": 1}
    assert versions(site)[:2] == [("test:x", 1, until), ("test:x", 2, "READY")]
    report = again(site)
    assert (report.unchanged, report.refused) == (2, 0)


@pytest.mark.parametrize("new_version", [False, True])
def test_what_is_going_is_not_unchanged(site, new_version):
    """On an unmanaged storage the payload of an expired item stays where it lies, and is let go of
    after its grace. Whoever registers it meanwhile is told so, and how to keep it."""
    site.set_storage("in", managed=False, mode="read_only")
    registered(site, {"x": b"1"})
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "gone", None))
    site.settle()
    report = again(site, new_version=new_version)
    assert (report.unchanged, report.new_versions, report.refused) == (0, 0, 1)
    assert "version 1 is EXPIRED" in report.reasons[0][1]
    assert "dlm restore" in report.reasons[0][1]
    site.advance(hours=2)
    site.settle()
    assert versions(site) == [("test:x", 1, "DELETED")]
    assert again(site, new_version=True).new_versions == 1


@pytest.mark.parametrize("state", ["SUSPECT", "CORRUPTED", "MISSING"])
def test_a_new_version_takes_the_place_of_a_copy_that_was_given_up(site, state):
    """A look may have found the change before it was registered."""
    registered(site, {"x": b"1", "y": b"2"})
    for one in dict.fromkeys(["SUSPECT", state]):
        site.execute("UPDATE replica SET state = :one WHERE path = 'x'", one=one)
    write(site, {"x": b"22"})
    assert again(site, new_version=True).new_versions == 1
    assert admit(site).done == {"admit": 1}
    assert again(site).unchanged == 2
    found = site.query("SELECT path, state FROM replica ORDER BY path")
    assert [tuple(row.values()) for row in found] == [
        ("test@1/x", "MISSING"), ("x", "READY"), ("y", "READY"),
    ]  # fmt: skip


def test_of_two_who_find_a_new_version_one_makes_it(site):
    """The other is told that the place is taken, and its registration goes on."""
    registered(site, {"x": b"1"})
    (old,) = site.query("SELECT uid FROM replica")
    new = Announcement("test:x", "x", 2)

    def make(connection):
        where, who = site.storages["in"], "user:test"
        return add_version(connection, where, old["uid"], new, Terms(), who, site.now)

    made = [site.context.transact(make) for _ in range(2)]
    assert made == [2, None]
    paths = site.query("SELECT path FROM replica ORDER BY path")
    assert [row["path"] for row in paths] == ["test@1/x", "x"]


def test_checksums_brought_later_are_compared_too(site):
    """With what is known already, and with a new version's bytes."""
    registered(site, {"x": b"1"})
    wrong = {"x": "sha256:" + "0" * 64}
    report = again(site, checksums=wrong)
    assert (report.unchanged, report.refused) == (0, 1)
    assert "0" * 64 in report.reasons[0][1]
    write(site, {"x": b"22"})
    assert again(site, checksums=wrong, new_version=True).new_versions == 1
    assert admit(site).failed == {"DLM-400": 1}
    assert versions(site) == [("test:x", 1, "READY"), ("test:x", 2, "INITIALISED")]


def test_a_directory_in_a_files_place_is_not_unchanged(site):
    """It is refused, with what was registered."""
    registered(site, {"x": b"1"})
    (site.folder / "in" / "x").unlink()
    write(site, {"x/1": b"1"})
    report = again(site, as_directory=["x"])
    assert (report.unchanged, report.refused) == (0, 1)
    assert report.reasons == [("test:x", "is registered as a file, but there is a directory")]


def test_what_is_said_to_be_written_twice_is_read_once(site):
    """set_state again queues nothing more; each place that was told is read."""
    site.add_storage("out", "B")
    oid = ingest.init_data_item(site.context, "test:x")
    for storage in ("in", "out"):
        write(site, {"x": b"1"}, storage)
        ingest.set_uri(site.context, oid, storage, "x")
    for _ in range(2):
        ingest.set_state(site.context, oid, "READY")
    assert admit(site).done == {"admit": 2}
    assert site.replicas(oid) == {"in": "READY", "out": "READY"}
    assert items(site)["test:x"]["state"] == "READY"


@pytest.mark.parametrize("odd", ["\x0c", "\x85", "\u2028", "\x1c"])
def test_names_in_checksum_files_end_at_newlines(odd):
    """sha256sum escapes no other octets that end a line for Python."""
    digest = "a" * 64
    found = parse_checksums(f"{digest}  x{odd}y\r\n{digest}  z\n")
    assert list(found) == [f"x{odd}y", "z"]


def _deep(folder):
    """A file below ``folder`` whose path fits into no index, however it is packed; its path."""
    letters, here = random.Random(1), os.getcwd()
    parts = ["".join(letters.choices(ascii_letters, k=240)) for _ in range(14)]
    os.chdir(folder)
    try:
        for part in parts[:-1]:
            os.mkdir(part)
            os.chdir(part)
        Path(parts[-1]).touch()
    finally:
        os.chdir(here)
    return "/".join(parts)


def test_a_name_that_the_catalogue_cannot_keep_stops_no_other(site):
    """A path of 3,400 octets is refused with its reason, and the rest is registered; a directory
    that has it is not let in, and says why."""
    write(site, {**{f"{n}": b"1" for n in range(5)}, "z": b"1"})
    deep = _deep(site.folder / "in")
    report = again(site)
    assert (report.created, report.refused) == (6, 1)
    ((uri, why),) = report.reasons
    assert uri == f"test:{deep}" and "longer than the catalogue can keep" in why
    assert admit(site).done == {"admit": 6}
    (site.folder / "in" / "d.ms").mkdir()
    _deep(site.folder / "in" / "d.ms")
    write(site, {"y": b"1"})
    assert again(site, as_directory=["*.ms"]).created == 2
    done = admit(site)
    assert (done.done, done.failed) == ({"admit": 1}, {"DLM-108": 1})


@pytest.mark.parametrize(
    ("table", "rule"),
    [("data_item", "uri NOT LIKE 'test:3%'"), ("data_item", "digest NOT LIKE 'sha256:4e07%'"),
     ("replica", "path <> '3' OR state <> 'READY'")],
)  # fmt: skip
def test_what_the_catalogue_refuses_of_one_stops_no_other(site, table, rule):
    """Whatever rule it is that one payload breaks when it is announced or let in: that one is
    refused with the catalogue's reason, and the rest goes on."""
    with site.context.engine.begin() as connection:
        connection.exec_driver_sql(
            f"ALTER TABLE {table} ADD CONSTRAINT odd CHECK ({rule})".replace("%", "%%")
        )
    write(site, {f"{n}": b"%d" % n for n in range(9)})
    report = again(site)
    done = admit(site)
    if report.refused:
        ((uri, why),) = report.reasons
        assert uri == "test:3" and "odd" in why and report.created == 8
    else:
        assert done.failed == {"DLM-210": 1} and items(site)["test:3"]["state"] == "INITIALISED"
    assert done.done == {"admit": 8}


@pytest.mark.parametrize("register", [register_tree, register_list])
def test_a_collection_that_is_not_there_is_told(site, register):
    """Nothing is announced or watched."""
    write(site, {"x": b"1"})
    source = Source("in", "test", terms=Terms(collection_id=uuid.uuid4()))
    with pytest.raises(NotFoundError, match="no collection"):
        register(site.context, source, "x" if register is register_tree else ["x"])
    with pytest.raises(NotFoundError, match="no collection"):
        add_watch(site.context, source)
    assert items(site) == {}


def test_a_changed_file_in_a_watched_folder_is_not_read_at_each_look(site):
    """It is refused once an hour, and at once when it changes again."""
    add_watch(site.context, Source("in", "test"))
    write(site, {"x": b"1"})
    again(site)
    admit(site)

    def refused(looks):
        found = 0
        for _ in range(looks):
            site.advance(seconds=31)
            found += scan_watches(site.context).refused
        return found

    write(site, {"x": b"22"})
    assert refused(20) == 1
    site.advance(hours=1)
    assert refused(20) == 1
    write(site, {"x": b"333"})
    assert refused(20) == 1
    write(site, {"x": b"1"})
    assert refused(20) == 0
    assert site.query("SELECT * FROM watch_entry") == []


@pytest.mark.parametrize("how", ["changed", "added", "removed", "same size"])
def test_a_changed_directory_payload_is_noticed(site, how):
    """By its files' names, sizes and times: both digests are named, or it is a new version."""
    site.add_storage("b", "B")
    write(site, {"s.ms/t1": b"one", "s.ms/t2": b"two"})
    assert again(site, as_directory=["*.ms"]).created == 1
    admit(site)
    assert again(site, as_directory=["*.ms"]).unchanged == 1
    (before,) = site.query("SELECT oid, digest FROM data_item")
    tree = site.folder / "in" / "s.ms"
    if how == "removed":
        (tree / "t2").unlink()
    else:
        data = {"changed": b"longer", "added": b"new", "same size": b"eno"}[how]
        target = tree / ("t3" if how == "added" else "t1")
        target.write_bytes(data)
        later = site.now.timestamp() + 60
        os.utime(target, (later, later))
    report = again(site, as_directory=["*.ms"])
    assert (report.refused, report.unchanged) == (1, 0)
    assert before["digest"] in report.reasons[0][1] and report.reasons[0][1].count("sha256:") == 2
    assert again(site, as_directory=["*.ms"], new_version=True).new_versions == 1
    admit(site)
    found = site.query("SELECT version, kind, state, digest FROM data_item ORDER BY version")
    assert [(one["version"], one["kind"]) for one in found] == [(1, "directory"), (2, "directory")]
    assert found[1]["state"] == "READY" and found[1]["digest"] != found[0]["digest"]


def test_a_directory_payload_that_was_touched_is_read_and_unchanged(site):
    """A later time alone is no change."""
    write(site, {"s.ms/t1": b"one"})
    again(site, as_directory=["*.ms"])
    admit(site)
    later = site.now.timestamp() + 60
    os.utime(site.folder / "in" / "s.ms" / "t1", (later, later))
    report = again(site, as_directory=["*.ms"])
    assert (report.refused, report.unchanged) == (0, 1)


def test_what_has_other_bytes_is_no_copy_of_its_item_any_more(site):
    """The registration that read them says so: it is SUSPECT, no survivor, and looked at again once
    its owner had an hour to put it right, or to say that it is a new version."""
    site.add_storage("b", "B")
    site.execute("UPDATE storage SET phase = 'LIQUID'")
    registered(site, {"x": b"first"})
    site.settle()
    write(site, {"x": b"other"})
    os.utime(site.folder / "in" / "x", (1, 1))
    assert again(site).refused == 1
    (oid,) = [row["oid"] for row in site.query("SELECT oid FROM data_item")]
    assert site.replicas(oid) == {"in": "SUSPECT", "b": "READY"}
    site.settle()
    assert (site.folder / "in" / "x").read_bytes() == b"other"
    assert again(site).refused == 1  # said again, and no second look queued
    looks = site.query("SELECT due_at FROM operation WHERE kind = 'verify' AND state = 'QUEUED'")
    assert len(looks) == 1
    site.advance(hours=1, seconds=1)
    site.settle()
    assert site.replicas(oid) == {"in": "READY", "b": "READY"}
    assert (site.folder / "in" / "x").read_bytes() == b"first"
    kept = [f.read_bytes() for f in (site.folder / "in").rglob("*") if f.is_file()]
    assert sorted(kept) == [b"first", b"other"]  # in quarantine


def test_an_owner_who_puts_the_bytes_right_has_a_copy_again(site):
    """Within the hour, without anything moved."""
    registered(site, {"x": b"first"})
    write(site, {"x": b"other"})
    os.utime(site.folder / "in" / "x", (1, 1))
    assert again(site).refused == 1
    write(site, {"x": b"first"})
    site.advance(hours=1, seconds=1)
    site.settle()
    assert site.query("SELECT state FROM replica") == [{"state": "READY"}]


def test_a_watch_says_what_it_refused_and_why(site, caplog):
    """In the log of its run, and in its listing, until the file is known or changes."""
    add_watch(site.context, Source("in", "test"))
    write(site, {"x": b"first"})
    for _ in range(2):
        scan_watches(site.context)
        site.advance(seconds=31)
    admit(site)
    write(site, {"x": b"other one"})
    for _ in range(2):
        scan_watches(site.context)
        site.advance(seconds=31)
    assert "in:: test:x: test:x is registered with digest" in caplog.text
    (watch,) = site.context.transact(list_watches)
    assert (watch["waiting"], watch["refused"]) == (0, 1)
    assert "--new-version" in watch["refusals"]["x"]
    write(site, {"x": b"yet another"})
    scan_watches(site.context)
    (watch,) = site.context.transact(list_watches)
    assert (watch["waiting"], watch["refused"], watch["refusals"]) == (1, 0, None)


def test_a_look_that_is_queued_already_comes_no_sooner(site):
    """The owner has the hour that was promised, also if a scheduled check was just due."""
    registered(site, {"x": b"first"})
    site.context.transact(lambda c: request_verification(c, actor="t", now=site.now))
    write(site, {"x": b"other"})
    os.utime(site.folder / "in" / "x", (1, 1))
    assert again(site).refused == 1
    site.work()
    assert (site.folder / "in" / "x").read_bytes() == b"other"
    assert again(site, new_version=True).new_versions == 1
    assert admit(site).done == {"admit": 1}
    assert versions(site) == [("test:x", 1, "READY"), ("test:x", 2, "READY")]


@pytest.mark.parametrize("how", ["registered", "asked"])
def test_what_was_put_right_need_not_wait_for_its_hour(site, how):
    """Registered again, or asked for by hand, it is looked at now."""
    registered(site, {"x": b"first"})
    write(site, {"x": b"other"})
    os.utime(site.folder / "in" / "x", (1, 1))
    assert again(site).refused == 1
    write(site, {"x": b"first"})
    if how == "registered":
        assert (again(site).unchanged, again(site).refused) == (1, 0)
    else:
        asked = site.context.transact(lambda c: request_verification(c, actor="t", now=site.now))
        assert asked == 1
    site.work()
    assert site.query("SELECT state FROM replica") == [{"state": "READY"}]


def test_an_odd_time_or_size_stops_nothing_else(engine, tmp_path):
    """Milliseconds for seconds are a time like any; a file that no disk has is told by its path."""
    site = make_site(engine, tmp_path)
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        site.add_storage("in", "A", root=folder, managed=False)
        for name in "abc":
            Path(folder, name).write_bytes(b"x")
        os.utime(Path(folder, "b"), (1.7e12, 1.7e12))
        add_watch(site.context, Source("in", "test"))
        scan_watches(site.context)
        site.advance(seconds=31)
        assert scan_watches(site.context).created == 3
        storage = open_storage("in", "posix", folder, {})
        found = {"d": 1, "e": 1 << 60}
        entries = [Entry(name, size, 1.0, "file") for name, size in found.items()]
        storage.walk = lambda path="": iter(entries)
        reopen(site, lambda row: storage)
        report = again(site)
        assert report.created == 1
        assert [(path, "more than a file has" in why) for path, why in report.reasons] == [
            ("e", True)
        ]


def test_a_watch_that_the_catalogue_refuses_holds_no_other_up(site, monkeypatch):
    """Its folder is told of in the log; the next one is looked at."""
    site.add_storage("other", "B")
    for storage in ("in", "other"):
        add_watch(site.context, Source(storage, "test"))
        (site.folder / storage / "x").write_bytes(b"x")
    settled = watch.catalogue.settled_entries

    def refused(connection, watch_id, storage_id, *rest):
        if storage_id == site.storages["in"]:
            raise CatalogueError(message="no")
        return settled(connection, watch_id, storage_id, *rest)

    monkeypatch.setattr(watch.catalogue, "settled_entries", refused)
    created = []
    for _ in range(2):
        created.append(scan_watches(site.context).created)
        site.advance(seconds=31)
    assert created == [0, 1]
