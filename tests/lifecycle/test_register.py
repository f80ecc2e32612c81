"""Registration and admission of real files."""

import hashlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_core.catalogue.engine import rows
from dlm_core.catalogue.items import Admitted, Announcement, Terms, announce
from dlm_core.catalogue.items import admit as admit_rows
from dlm_core.errors import IllegalTransitionError, InputError, InvalidValueError, NotFoundError
from dlm_core.lifecycle import ingest, register
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import (
    Source,
    register_list,
    register_tree,
)
from dlm_core.lifecycle.watch import (
    add_watch,
    count_registration_due,
    plan_registration,
    scan_watches,
)
from dlm_core.lifecycle.work import drain
from dlm_core.transfers.checksums import parse_checksums
from dlm_core.types import Observation, OperationKind, decode_path, make_uri, new_id, uri_path
from tests.backends import s3_config
from tests.payloads import put
from tests.site import make_site


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path, max_attempts=2)
    site.add_storage("in", "A")
    return site


def write(site, files, storage="in"):
    for path, data in files.items():
        file = os.path.join(os.fsencode(site.folder / storage), os.fsencode(path))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(data)


def admit(site):
    return drain(site.context, {OperationKind.ADMIT: execute_admit})


def items(site):
    return {row["uri"]: row for row in site.query("SELECT * FROM data_item ORDER BY uri, version")}


ODD = ["plain", "a b", "quo'te\"", "new\nline", "ünï/星", "per%20cent", "n" * 255, b"\xff\xfe.dat"]


def test_copies_that_the_dlm_made_are_not_announced_as_items(site):
    """Registering a storage that holds copies of what is known refuses these, each with whose they
    are, and makes no items without a payload of them."""
    site.add_storage("out", "B")
    write(site, {"x": b"x"})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    site.settle()
    write(site, {"new": b"new"}, "out")
    assert list(site.visible("out")) == ["new", "test/x"]
    report = register_tree(site.context, Source("out", "test"))
    assert (report.created, report.refused) == (1, 1)
    assert report.reasons == [("test:test/x", "its place test/x on out is that of test:x")]
    assert set(items(site)) == {"test:x", "test:new"}
    again = register_tree(site.context, Source("out", "test"))
    assert (again.created, again.refused, again.unchanged) == (0, 1, 1)


def test_files_become_ready_items_with_size_digest_and_type(site):
    """Announced at once as INITIALISED; read by the job; READY with what was seen."""
    write(site, {"a/x.fits": b"SIMPLE  =" + bytes(100), "b.txt": b"text", "empty": b""})
    report = register_tree(site.context, Source("in", "test"))
    assert (report.created, report.refused) == (3, 0)
    assert {row["state"] for row in items(site).values()} == {"INITIALISED"}
    done = admit(site)
    assert done.done["admit"] == 3 and done.bytes == 113
    found = items(site)
    assert found["test:b.txt"]["digest"] == "sha256:" + hashlib.sha256(b"text").hexdigest()
    assert found["test:b.txt"]["content_type"] == "text/plain"
    assert found["test:a/x.fits"]["content_type"] == "application/fits"
    assert found["test:empty"]["size"] == 0
    assert {row["state"] for row in found.values()} == {"READY"}


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_is_told(site, name):
    """Spaces, quotes, newlines, unicode, 255 octets, octets that are no UTF-8."""
    write(site, {name: b"payload"})
    assert register_tree(site.context, Source("in", "test")).created == 1
    assert admit(site).done["admit"] == 1
    (row,) = site.query("SELECT i.uri, r.path, r.state FROM data_item i JOIN replica r USING (oid)")
    assert os.fsencode(uri_path(row["uri"])) == os.fsencode(name)
    assert os.fsencode(decode_path(row["path"])) == os.fsencode(name)
    assert row["state"] == "READY"


def test_registering_again_changes_nothing(site):
    """The same files a second time: no row, no event, no operation."""
    write(site, {f"{n}": b"%d" % n for n in range(20)})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    before = site.query("SELECT count(*) AS n FROM event")
    report = register_tree(site.context, Source("in", "test"))
    assert (report.created, report.unchanged, report.refused) == (0, 20, 0)
    assert site.query("SELECT count(*) AS n FROM event") == before
    assert admit(site).total == 0


def test_a_changed_payload_is_an_error_that_names_both_digests(site):
    """Under the same uri; with new_version the old bytes are MISSING and a version 2 is there."""
    write(site, {"x": b"first"})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    write(site, {"x": b"second"})
    report = register_tree(site.context, Source("in", "test"))
    (reason,) = [why for _, why in report.reasons]
    for data in (b"first", b"second"):
        assert hashlib.sha256(data).hexdigest() in reason
    assert "--new-version" in reason
    assert site.query("SELECT count(*) AS n FROM data_item")[0]["n"] == 1
    report = register_tree(site.context, Source("in", "test", new_version=True))
    assert report.new_versions == 1
    admit(site)
    found = site.query(
        "SELECT i.version, i.size, r.state FROM data_item i JOIN replica r USING (oid) "
        "ORDER BY version"
    )
    assert [tuple(row.values()) for row in found] == [(1, 5, "MISSING"), (2, 6, "READY")]


def test_a_touched_file_is_not_a_changed_one(site):
    """Another time, the same bytes: unchanged."""
    write(site, {"x": b"first"})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    os.utime(site.folder / "in" / "x", (1, 1))
    assert register_tree(site.context, Source("in", "test")).unchanged == 1
    assert site.query("SELECT mtime FROM replica")[0]["mtime"] == 1


def test_brought_checksums_are_compared_not_trusted(site):
    """A wrong one keeps the item out, and the reason names both."""
    write(site, {"good": b"1", "bad": b"2"})
    sums = {"good": hashlib.sha256(b"1").hexdigest(), "bad": "0" * 64}
    text = "".join(f"{digest}  {path}\n" for path, digest in sums.items())
    register_tree(site.context, Source("in", "test", checksums=parse_checksums(text)))
    report = admit(site)
    assert report.done["admit"] == 1 and report.failed["DLM-400"] == 1
    found = items(site)
    assert found["test:good"]["state"] == "READY"
    assert found["test:bad"]["state"] == "INITIALISED"
    (failed,) = site.query("SELECT error FROM operation WHERE state = 'FAILED'")
    assert "0" * 64 in failed["error"] and hashlib.sha256(b"2").hexdigest() in failed["error"]


def test_checksums_may_be_relative_to_what_is_registered(site):
    """As sha256sum writes them in that folder; they are compared all the same."""
    write(site, {"eb/x": b"x", "eb/y": b"tampered"})
    sums = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in "xy"}
    report = register_tree(site.context, Source("in", "test", checksums=sums), "eb")
    assert (report.created, report.refused) == (2, 0)
    admit(site)
    states = {item["uri"]: item["state"] for item in site.query("SELECT * FROM data_item")}
    assert states == {"test:eb/x": "READY", "test:eb/y": "INITIALISED"}


def test_checksums_that_are_compared_with_nothing_are_told(site):
    """Who brings them believes that they are: none of them fits, or one has no payload. Sums of
    what lies elsewhere on the storage are in order."""
    write(site, {"eb/x": b"x", "other/y": b"y"})
    good = f"sha256:{hashlib.sha256(b'x').hexdigest()}"

    def told(path, **sums):
        source = Source("in", "test", checksums={k.replace("_", "/"): v for k, v in sums.items()})
        return [name for name, _ in register_tree(site.context, source, path).reasons]

    assert told("", wrong_x=good) == ["checksums"]
    admit(site)
    assert told("eb", x=good, gone=good) == ["gone"]
    assert told("eb", eb_x=good, eb_gone=good, other_y=good) == ["eb/gone"]
    assert told("", eb_x=good, gone=good) == ["gone"]
    assert told("eb/x", x=good) == told("eb/x", eb_x=good) == []


_OF_FILES = {"x": b"1", "sub/y": b"2"}


def _sums(before, files):
    return {f"{before}{n}": f"sha256:{hashlib.sha256(d).hexdigest()}" for n, d in files.items()}


@pytest.mark.parametrize(
    ("path", "before"), [("", "d/obs.ms/"), ("d", "obs.ms/"), ("d/obs.ms", "")]
)
@pytest.mark.parametrize(("other", "state"), [({}, "READY"), ({"x": b"0"}, "INITIALISED")])
def test_checksums_of_all_files_of_a_directory_payload_are_compared(
    site, path, before, other, state
):
    """They make its manifest, whose digest is the payload's; one that differs keeps it out."""
    write(site, {f"d/obs.ms/{name}": data for name, data in (_OF_FILES | other).items()})
    write(site, {"d/log": b"3"})
    source = Source("in", "test", as_directory=("*.ms",), checksums=_sums(before, _OF_FILES))
    assert register_tree(site.context, source, path).reasons == []
    admit(site)
    assert items(site)["test:d/obs.ms"]["state"] == state
    assert register_tree(site.context, source, path).refused == 0


@pytest.mark.parametrize(
    ("path", "before"), [("", "d/obs.ms/"), ("d", "obs.ms/"), ("d/obs.ms", "")]
)
@pytest.mark.parametrize("brought", [{"x": b"1"}, {**_OF_FILES, "gone": b"1"}])
def test_checksums_of_other_files_than_a_directory_payload_has_are_told(
    site, path, before, brought
):
    """Of some of them, or of one more: the payload is told with the number of those that are
    compared with nothing, and what would be."""
    write(site, {f"d/obs.ms/{name}": data for name, data in _OF_FILES.items()})
    source = Source("in", "test", as_directory=("*.ms",), checksums=_sums(before, brought))
    report = register_tree(site.context, source, path)
    ((name, why),) = report.reasons
    assert (report.refused, name) == (1, "d/obs.ms")
    assert "files in it (1)" in why and "manifest" in why
    listed = register_list(site.context, source, ["d/obs.ms"]) if path == "" else report
    assert listed.reasons[0] == (name, why)


def test_a_checksum_that_comes_late_is_told(site):
    """Of what was announced without one and is not let in yet: it is compared when it has been."""
    write(site, {"x": b"x"})
    register_tree(site.context, Source("in", "test"))
    wrong = Source("in", "test", checksums={"x": "sha256:" + "0" * 64})
    assert "when it has been let in" in register_tree(site.context, wrong).reasons[0][1]
    admit(site)
    assert "the checksums say" in register_tree(site.context, wrong).reasons[0][1]


def test_checksum_files_are_read_as_sha256sum_writes_them():
    """Binary marks, leading ./ and escaped names; a line that is none is named."""
    digest = "a" * 64
    text = f"{digest}  ./x\n{digest} *y z\n\\{digest}  a\\nb\\\\c\n"
    assert list(parse_checksums(text)) == ["x", "y z", "a\nb\\c"]
    with pytest.raises(InvalidValueError, match="line 2"):
        parse_checksums(f"{digest}  x\nnonsense\n")


def test_two_checksums_of_one_file_are_refused():
    """Which of them is compared would be chance; the same one twice is no matter."""
    one, other = "a" * 64, "b" * 64
    assert len(parse_checksums(f"{one}  x\n{one.upper()}  ./x\n")) == 1
    with pytest.raises(InvalidValueError, match=r"line 3.*'y/x'"):
        parse_checksums(f"{one}  x\n{one}  y/x\n{other} *./y/x\n")


@pytest.mark.parametrize("pattern", ["", " ", "*.ms/", "/d/*.ms"])
def test_a_pattern_of_directories_that_matches_none_is_refused(pattern):
    """A shell's unset variable must not make an item of each file of a measurement set."""
    with pytest.raises(InputError, match="pattern"):
        Source("in", "test", as_directory=("*.zarr", pattern))


def test_a_directory_payload_is_one_item_with_a_manifest(site):
    """--as-directory '*.ms': its files are no items of their own."""
    write(site, {"d/obs.ms/table.dat": b"1", "d/obs.ms/sub/t.f0": b"22", "d/log.txt": b"3"})
    report = register_tree(site.context, Source("in", "test", as_directory=("*.ms",)))
    assert report.created == 2
    admit(site)
    found = items(site)
    assert found["test:d/obs.ms"]["kind"] == "directory"
    assert found["test:d/obs.ms"]["size"] == 3
    manifest = site.query("SELECT path, size FROM manifest_file ORDER BY path")
    assert [tuple(row.values()) for row in manifest] == [("sub/t.f0", 2), ("table.dat", 1)]


def test_a_directory_payload_is_copied_whole(site):
    """Registered, admitted, replicated as one operation."""
    site.add_storage("b", "B")
    write(site, {"obs.ms/table.dat": b"1", "obs.ms/sub/t.f0": b"22"})
    register_tree(site.context, Source("in", "test", as_directory=("*.ms",)))
    admit(site)
    site.settle()
    assert site.visible("b") == {
        "test/obs.ms/sub/t.f0": b"22",
        "test/obs.ms/table.dat": b"1",
    }


@pytest.mark.parametrize("first", ["files", "tree"])
def test_what_is_part_of_another_payload_is_not_admitted(site, first):
    """A file in another item's directory, or a directory with another item's file: whose place it
    was first keeps it, else a deletion of the one would take the other's only bytes with it."""
    write(site, {"s.ms/sub/t": b"table", "s.ms/u": b"more", "beside": b"else"})
    steps = {
        "files": Source("in", "files"),
        "tree": Source("in", "tree", as_directory=("*.ms",)),
    }
    register_tree(site.context, steps.pop(first))
    for source in steps.values():
        register_tree(site.context, source)
    admit(site)
    ready = {uri for uri, item in items(site).items() if item["state"] == "READY"}
    mine = {"files:s.ms/sub/t", "files:s.ms/u"} if first == "files" else {"tree:s.ms"}
    assert {uri for uri in ready if "s.ms" in uri} == mine
    errors = site.query("SELECT error FROM operation WHERE state = 'FAILED'")
    assert errors and all("shares its files with" in row["error"] for row in errors)


def test_names_that_go_on_where_that_of_a_file_ends_are_no_part_of_it(site, s3):
    """An object store may have x and x/y: both are let in."""
    site.add_storage(
        "bucket", "B", interface="s3", root=f"{s3.bucket}/{new_id()}",
        config=json.dumps(s3_config(s3)),
    )  # fmt: skip
    (row,) = site.query("SELECT * FROM storage WHERE name = 'bucket'")
    bucket = site.context.storages.open(row)
    for name in ("x", "x/y"):
        put(bucket, name)
    register_list(site.context, Source("bucket", "test"), ["x", "x/y"])
    admit(site)
    assert {item["state"] for item in items(site).values()} == {"READY"}


def test_links_are_skipped_and_never_followed(site, tmp_path):
    """A link is told as skipped, what it points to outside is not read."""
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    write(site, {"x": b"1"})
    (site.folder / "in" / "link").symlink_to(outside)
    (site.folder / "in" / "folder").symlink_to(tmp_path)
    report = register_tree(site.context, Source("in", "test"))
    assert (report.created, report.skipped) == (1, 2)
    with pytest.raises(InvalidValueError, match=r"'link'.*not a symlink"):  # asked for by its name
        register_tree(site.context, Source("in", "test"), "link")
    (site.folder / "in" / "sub").mkdir()
    report = register_list(site.context, Source("in", "test"), ["x", "link", "folder", "sub"])
    assert (report.unchanged, report.refused, report.skipped) == (1, 3, 0)
    assert [name for name, _ in report.reasons] == ["link", "folder", "sub"]


def test_a_vanished_payload_is_not_admitted(site):
    """The item stays INITIALISED and the reason is visible."""
    write(site, {"x": b"1"})
    register_tree(site.context, Source("in", "test"))
    os.unlink(site.folder / "in" / "x")
    assert admit(site).failed["DLM-303"] == 1
    assert items(site)["test:x"]["state"] == "INITIALISED"


def test_a_copy_elsewhere_is_a_second_replica(site):
    """The same uri on another storage joins the item if its bytes are the item's."""
    site.add_storage("b", "B")
    write(site, {"x": b"1", "y": b"1"})
    write(site, {"x": b"1", "y": b"2"}, "b")
    register_tree(site.context, Source("in", "test"))
    admit(site)
    report = register_tree(site.context, Source("b", "test"))
    assert (report.created, report.replicated) == (0, 2)
    done = admit(site)
    assert done.done["admit"] == 1 and done.failed["DLM-400"] == 1
    states = site.query("SELECT state, count(*) AS n FROM replica GROUP BY state ORDER BY state")
    assert [tuple(row.values()) for row in states] == [("PENDING", 1), ("READY", 3)]


def test_lists_name_what_is_not_there(site):
    """register_list refuses absent paths and registers the others."""
    write(site, {"x": b"1"})
    report = register_list(site.context, Source("in", "test"), ["x", "absent"])
    assert report.created == 1 and report.refused == 1
    assert report.reasons[0][0] == "absent"


def test_terms_are_kept(site):
    """Target phase, owner, tags, collection and both expiries."""
    write(site, {"x": b"1"})
    site.advance(seconds=1)
    terms = Terms(
        "LIQUID", register.collection_id(site.context, "survey"), "me", {"k": "v"}, site.now, None
    )
    register_tree(site.context, Source("in", "test", terms=terms))
    row = items(site)["test:x"]
    assert (row["target_phase"], row["owner"], row["tags"]) == ("LIQUID", "me", {"k": "v"})
    assert row["expires_at"] == site.now and row["collection_id"] is not None


def test_the_two_steps_of_the_ska_ingest(site):
    """init_data_item, write, set_uri, set_state READY; then the job admits it."""
    oid = ingest.init_data_item(site.context, "test:late", metadata={"eb": "1"})
    with pytest.raises(NotFoundError):
        ingest.set_state(site.context, oid, "READY")
    ingest.set_uri(site.context, oid, "in", "late")
    write(site, {"late": b"payload"})
    ingest.set_state(site.context, oid, "READY")
    assert admit(site).done["admit"] == 1
    assert site.item(oid)["state"] == "READY" and site.item(oid)["metadata"]["eb"] == "1"
    with pytest.raises(IllegalTransitionError):
        ingest.set_state(site.context, oid, "INITIALISED")
    write(site, {"other": b"payload"})
    ingest.ingest_data_item(site.context, "test:other", "in", "other")
    assert admit(site).done["admit"] == 1


def test_the_next_check_counts_from_a_late_admission(site):
    """What waited a day to be let in counts from then; what was let in at once, from when it was
    announced."""
    write(site, {"late": b"1"})
    ingest.ingest_data_item(site.context, "test:late", "in", "late")
    site.advance(days=1)
    write(site, {"soon": b"2"})
    ingest.ingest_data_item(site.context, "test:soon", "in", "soon")
    announced = site.now
    site.advance(minutes=59)
    admit(site)
    found = site.query("SELECT path, check_from FROM replica")
    assert {one["path"]: one["check_from"] for one in found} == {
        "late": site.now, "soon": announced,
    }  # fmt: skip


def test_letting_in_touches_no_index(site):
    """The second version of each row, with its digest, has room beside the first (HOT)."""
    seen = Observation(1000, "sha256:" + "0" * 64, "application/octet-stream")
    announced = [Announcement(f"test:{n:060}", f"{n:060}", 1000, 0.0) for n in range(500)]

    def let_in(connection):
        now, terms = site.now, Terms()
        announce(connection, site.storages["in"], announced, terms, "user:test", now)
        replicas = rows(connection, "SELECT uid, oid FROM replica")
        admit_rows(connection, [Admitted(r["uid"], r["oid"], seen, {}) for r in replicas], now)
        return rows(
            connection,
            """SELECT relname AS name, n_tup_upd AS updated, n_tup_hot_upd AS hot
                 FROM pg_stat_xact_user_tables WHERE relname IN ('data_item', 'replica')""",
        )

    found = site.context.transact(let_in)
    assert [(one["updated"], one["hot"]) for one in found] == [(500, 500), (500, 500)]


def test_watched_folders_register_what_has_settled(site):
    """New files wait until they stop growing; *.part and dotfiles are left alone."""
    add_watch(site.context, Source("in", "test"), "drop")
    write(site, {"drop/x": b"1", "drop/y.part": b"1", "drop/.hidden": b"1"})
    assert scan_watches(site.context).created == 0
    site.advance(seconds=31)
    write(site, {"drop/growing": b"12"})
    assert site.context.transact(lambda c: count_registration_due(c, site.now)) == 1
    assert scan_watches(site.context).created == 1
    site.advance(seconds=31)
    write(site, {"drop/growing": b"123"})
    assert scan_watches(site.context).created == 0
    site.advance(seconds=31)
    assert scan_watches(site.context).created == 1
    admit(site)
    assert set(items(site)) == {"test:drop/x", "test:drop/growing"}
    site.advance(seconds=31)
    assert scan_watches(site.context).created == 0


def test_a_watch_on_a_storage_out_of_use_holds_nothing_up(site):
    """The other folders are looked at, and what was announced is let in."""
    site.add_storage("gone", "B")
    for storage in ("gone", "in"):
        add_watch(site.context, Source(storage, "test"))
        write(site, {storage: b"1"}, storage)
    scan_watches(site.context)
    site.set_storage("gone", mode="lost")
    site.advance(seconds=31)
    assert site.context.transact(lambda c: count_registration_due(c, site.now)) == 1
    executors = {OperationKind.ADMIT: execute_admit}
    assert drain(site.context, executors, plan_registration).done == {"admit": 1}
    assert set(items(site)) == {"test:in"}


@pytest.mark.parametrize("mode", ["offline", "auditing"])
def test_a_storage_that_is_not_read_is_not_watched(site, mode):
    """Offline or under audit its watch waits: no copy there is doubted for what it looks like now.
    Back in use the watch is due at once."""
    add_watch(site.context, Source("in", "test"))
    write(site, {"x": b"good"})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    write(site, {"x": b"half of it", "new": b"new"})
    site.set_storage("in", mode=mode)
    for _ in range(3):
        site.advance(seconds=31)
        assert site.context.transact(lambda c: count_registration_due(c, site.now)) == 0
        assert scan_watches(site.context).reasons == []
    assert site.query("SELECT state FROM replica") == [{"state": "READY"}]
    site.set_storage("in", mode="read_write")
    write(site, {"x": b"good"})
    assert site.context.transact(lambda c: count_registration_due(c, site.now)) == 1
    scan_watches(site.context)
    site.advance(seconds=31)
    assert scan_watches(site.context).created == 1


@pytest.mark.parametrize("mode", ["offline", "auditing", "lost"])
def test_nothing_is_registered_on_a_storage_that_is_not_read(site, monkeypatch, mode):
    """Neither a tree nor a list, refused in one line before anything there is looked at."""
    write(site, {"x": b"good"})
    register_tree(site.context, Source("in", "test"))
    admit(site)
    write(site, {"x": b"half of it", "new": b"new"})
    site.set_storage("in", mode=mode)
    monkeypatch.setattr(site.context.storages, "open", lambda _: pytest.fail("it is read"))
    for look in (register_tree, lambda c, s: register_list(c, s, ["new", "x"])):
        with pytest.raises(IllegalTransitionError) as refused:
            look(site.context, Source("in", "test"))
        assert str(refused.value) == f"storage in cannot go from {mode} to use"
    assert site.query("SELECT state FROM replica") == [{"state": "READY"}]
    assert set(items(site)) == {"test:x"}


def test_a_registration_ends_when_its_storage_goes_offline(site):
    """What was announced before stays announced; what is known is not read any more."""
    write(site, {f"{n:04}": b"x" for n in range(200)})
    source = Source("in", "test")
    with pytest.raises(IllegalTransitionError, match="from offline to use"):
        register_tree(
            site.context, source, progress=lambda _: site.set_storage("in", mode="offline")
        )
    assert len(items(site)) == 125


@pytest.mark.parametrize("mode", ["offline", "auditing"])
def test_admissions_wait_for_a_storage_that_is_not_read(site, mode):
    """As often as they come up, it is no try of theirs; the other storages' go on."""
    site.add_storage("other", "B")
    for storage in ("in", "other"):
        write(site, {storage: b"good"}, storage)
        register_tree(site.context, Source(storage, "test"))
    site.set_storage("in", mode=mode)
    waiting = "SELECT state, attempts, error_code, error FROM operation WHERE state <> 'DONE'"
    assert admit(site).done == {"admit": 1}
    for _ in range(10):
        assert site.query(waiting) == [
            {"state": "QUEUED", "attempts": 0, "error_code": "DLM-504",
             "error": f"storage in is {mode}"}
        ]  # fmt: skip
        site.advance(minutes=5)
        assert admit(site).done == {}
    # the place of a payload may be told meanwhile: that reads nothing
    ingest.ingest_data_item(site.context, "test:later", "in", "later")
    write(site, {"later": b"payload"})
    assert admit(site).done == {}
    site.set_storage("in", mode="read_write")
    site.advance(minutes=5)
    assert admit(site).done == {"admit": 2}
    assert {row["state"] for row in items(site).values()} == {"READY"}


def test_two_drainers_admit_each_item_once(site, engine):
    """Operations are claimed by one of them."""
    from concurrent.futures import ThreadPoolExecutor

    write(site, {f"{n}": b"%d" % n for n in range(300)})
    register_tree(site.context, Source("in", "test"))
    site.context.settings = site.context.settings.model_copy(update={"batch_size": 20})
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: admit(site), range(2)))
    assert sum(report.done["admit"] for report in reports) == 300
    assert site.query("SELECT max(attempts) AS n FROM operation")[0]["n"] == 1


_octets = st.binary(min_size=1, max_size=40).filter(
    lambda b: b"\0" not in b and b"/" not in b and b not in (b".", b"..")
)


@given(st.lists(_octets, min_size=1, max_size=4))
def test_uris_tell_paths_and_back(parts):
    """Any octets: make_uri and uri_path are each other's inverse, and a uri has no spaces."""
    path = b"/".join(parts)
    uri = make_uri("test", path)
    assert os.fsencode(uri_path(uri)) == path
    assert uri.isascii() and not any(char.isspace() for char in uri)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sets(_octets, min_size=1, max_size=5))
def test_any_set_of_names_is_registered_once(site, names):
    """Whatever the names: registering twice changes nothing the second time."""
    write(site, dict.fromkeys(names, b"x"))
    register_tree(site.context, Source("in", "test"))
    count = site.query("SELECT count(*) AS n FROM data_item")
    assert register_tree(site.context, Source("in", "test")).created == 0
    assert site.query("SELECT count(*) AS n FROM data_item") == count
