"""The lifecycle with a storage behind a protocol: the same for each kind, on a real server."""

import hashlib
import io
import json
import os
import threading
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest

from dlm_core.catalogue.items import Terms
from dlm_core.catalogue.operations import retry_failed
from dlm_core.errors import PayloadNotFoundError, StorageUnavailableError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.lost import lose_storage, plan_audits, take_back
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.rules import set_rules
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.storages.open import open_storage
from dlm_core.storages.rclone_daemon import daemon
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.sweep import sweep_temp
from dlm_core.types import OperationKind, PayloadKind, decode_path, uri_bucket
from tests.far import KINDS, make_far
from tests.faulty import Faulty
from tests.servers import web_server
from tests.site import make_site, reopen
from tests.sshd import ssh_server
from tests.xrootd import xrootd_server

ODD = ["a b", "quo'te\"", "ünï/星", "per%20cent", "per%0Acent", "back\\slash", "new\nline",
       "what?;#", "n" * 254, b"\xff\xfe.dat"]  # fmt: skip


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    return make_far(request.param, request, tmp_path / "far")


@pytest.fixture
def site(engine, tmp_path, place):
    """A folder here, a server far away and a second folder at a third place, all LIQUID."""
    site = make_site(engine, tmp_path)
    site.add_storage("in", "here")
    site.add_storage("far", "there", **place.row())
    site.add_storage("back", "elsewhere", mode="offline")
    return site


@pytest.fixture
def far(place):
    return place.open()


def contents(storage, folder=""):
    """All files below a folder by their paths; none if it is not there."""
    found = {}
    try:
        for entry in storage.walk(folder):
            with storage.open_read(entry.path) as stream:
                found[entry.path] = stream.read()
    except PayloadNotFoundError:
        assert folder
    return found


def register(site, **options):
    register_tree(site.context, Source("in", "test", terms=Terms("SOLID"), **options))
    drain(site.context, {OperationKind.ADMIT: execute_admit})


def send_home(site):
    """The first copy is not at hand: a third storage gets one from the far one."""
    site.set_storage("in", mode="offline")
    site.set_storage("back", mode="read_write")
    site.set_storage("far", mode="draining")
    assert not site.settle().failed


def expire(site, oid):
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE storage_id = :s",
        now=site.now, s=site.storages["far"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :oid", oid=oid)
    site.settle()


def test_any_file_goes_there_and_back(site, far):
    """Any name: a verified copy, encoded where the far side would not keep it and meeting no file
    that is really so called; then home again from there when the first is lost."""
    for name in ODD:
        file = os.path.join(os.fsencode(site.folder / "in"), os.fsencode(name))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(os.fsencode(name))
    register(site)
    assert not site.settle().failed
    wanted = sorted(map(os.fsencode, ODD))
    assert sorted(contents(far).values()) == wanted and contents(far, ".dlm/tmp") == {}
    copies = site.query(
        "SELECT i.uri, r.path FROM data_item i JOIN replica r USING (oid) "
        "JOIN storage s USING (storage_id) WHERE s.name = 'far' AND r.state = 'READY'"
    )
    there = contents(far)
    assert len(copies) == len(ODD) and all(
        there[decode_path(row["path"])] == os.fsencode(decode_path(row["uri"].partition(":")[2]))
        for row in copies
    )
    send_home(site)
    assert sorted(site.visible("back").values()) == wanted


@pytest.mark.parametrize("place", ["s3", "sftp", "rclone", "xrootd"], indirect=True)
def test_a_directory_payload_goes_there_and_back(site, far):
    """As one operation with its manifest."""
    tree = site.folder / "in" / "scan.ms"
    for n in range(5):
        (tree / f"sub{n}").mkdir(parents=True)
        (tree / f"sub{n}" / "table").write_bytes(os.urandom(100_000 * n))
    register(site, as_directory=("*.ms",))
    assert not site.settle().failed
    wanted = {str(f.relative_to(tree)): f.read_bytes() for f in tree.rglob("*") if f.is_file()}
    there = contents(far)
    assert {path.partition("scan.ms/")[2]: data for path, data in there.items()} == wanted
    send_home(site)
    (copy,) = (site.folder / "back").rglob("scan.ms")
    assert {str(f.relative_to(copy)): f.read_bytes() for f in copy.rglob("table")} == wanted


def test_a_copy_goes_to_the_trash_comes_back_and_is_purged(site, far):
    """Trash, restore, trash again, purge, as on a disk of our own; it is where the catalogue says
    it is."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    assert contents(far) == {"test/x": b"payload"}
    expire(site, oid)
    assert contents(far) == {} and site.replicas(oid)["far"] == "TRASHED"
    assert [*contents(far, ".dlm/trash").values()] == [b"payload"]
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["far"], actor="user:test", now=site.now
        )
    )
    site.settle()
    assert contents(far) == {"test/x": b"payload"}
    expire(site, oid)
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["far"] == "DELETED" and contents(far, ".dlm") == {}


@pytest.mark.parametrize("place", ["sftp", "webdav", "xrootd"], indirect=True)
def test_damage_there_is_noticed_and_mended(site, far):
    """Other bytes on the far side's disk: read twice, set aside, made again."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    far.remove("test/x")
    far.write("test/x", io.BytesIO(b"paYload"), 7)
    site.context.transact(
        lambda c: request_verification(c, oid=oid, actor="user:test", now=site.now)
    )
    for _ in range(4):
        site.advance(hours=1)
        site.settle()
    assert contents(far) == {"test/x": b"payload"}
    assert [*contents(far, ".dlm/quarantine").values()] == [b"paYload"]


class Flipping(Faulty):
    """Writes other bytes than it was given, until it is well."""

    well = False

    def write(self, path, source, size):
        data = source.read(-1)
        if not self.well:
            data = b"?" + data[1:]
        return self.inner.write(path, io.BytesIO(data), size)


@pytest.mark.parametrize("place", ["sftp", "sftp_shell", "xrootd"], indirect=True)
def test_a_bit_that_flips_on_its_way_is_never_shown(site, place, far):
    """The far side's own digest says so, or the reading back; the copy is made again."""
    oid = site.add_item("x", b"payload" * 1000, "in")
    wrapped = []

    def opener(row):
        real = open_storage(row["name"], row["interface"], row["root"], row["config"])
        if row["name"] != "far":
            return real
        wrapped.append(Flipping(real))
        return wrapped[-1]

    reopen(site, opener)
    site.settle()
    assert contents(far) == {} and site.replicas(oid)["far"] == "PENDING"
    wrapped[-1].well = True
    site.advance(hours=1)
    site.settle()
    assert contents(far) == {"test/x": b"payload" * 1000}


def test_a_server_that_does_not_answer_changes_nothing(site, place, far):
    """Copies wait and are tried again; what lies elsewhere stays; nothing is said to be missing."""
    oid = site.add_item("x", b"payload", "in")
    site.set_storage("far", **place.unreachable())
    assert not site.settle().done.get("copy")
    (operation,) = site.query("SELECT state, error_code FROM operation WHERE kind = 'copy'")
    assert operation["state"] == "QUEUED" and operation["error_code"] == "DLM-301"
    assert site.replicas(oid) == {"in": "READY", "far": "PENDING"}
    site.set_storage("far", **place.row())
    site.advance(hours=1)
    site.settle()
    assert contents(far) == {"test/x": b"payload"}


def test_no_secret_is_in_the_catalogue(site, place, far, monkeypatch):
    """Not after a copy that failed for a secret that was gone or wrong, nor after a good one."""
    site.add_item("x", b"payload", "in")
    secret = next(
        key for key in ("secret_key", "key", "secret_pass", "password", "keytab")
        if key in place.config
    )  # fmt: skip
    monkeypatch.setenv("DLM_TEST_WRONG", "not-the-secret")
    wrong = place.config | {secret: "env:DLM_TEST_WRONG"}
    if place.kind == "xrootd":
        wrong = place.config | {secret: "file:/nowhere/not-the-keytab"}
    site.set_storage("far", config=json.dumps(wrong))
    site.settle()
    (operation,) = site.query("SELECT error_code FROM operation WHERE kind = 'copy'")
    assert operation["error_code"] in ("DLM-301", "DLM-306")
    site.set_storage("far", **place.row())
    site.advance(days=1)
    site.context.transact(lambda c: retry_failed(c, site.now))
    site.settle()
    assert contents(far) == {"test/x": b"payload"}
    for table in ("storage", "operation", "event", "replica", "data_item"):
        told = str(site.query(f"SELECT to_jsonb(t) AS told FROM {table} t"))
        assert "not-the-secret" not in told and place.secret not in told


# --- a server that goes in the middle -------------------------------------------------------------


class Killing(io.RawIOBase):
    """A source during whose reading the server dies."""

    def __init__(self, inner, kill, after):
        self.inner, self.kill, self.after = inner, kill, after
        self.size, self.opened = inner.size, inner.opened

    def read(self, size=-1):
        self.after -= max(size, 0)
        if self.after < 0 and self.kill is not None:
            self.kill()
            self.kill = None
        return self.inner.read(size)

    def stamp(self):
        return self.inner.stamp()


def server_of_its_own(kind, folder, stack):
    """A storage on a server that may be killed, and the folder where its files lie."""
    if kind == "xrootd":
        server = stack.enter_context(xrootd_server(folder))
        root = server.make_root()
        return server, open_storage("far", "xrootd", root, server.config), (
            server.folder / root.rpartition("/")[2]
        )  # fmt: skip
    server = stack.enter_context(ssh_server(folder))
    (folder / "far").mkdir()
    config = server.config(shell=kind == "sftp_shell")
    root = server.root(folder / "far")
    return server, open_storage("far", "sftp", root, config), folder / "far"


@pytest.mark.parametrize("kind", ["sftp", "sftp_shell", "xrootd"])
def test_a_server_that_dies_in_the_middle_of_a_copy(tmp_path, kind):
    """The copy fails as an outage, nothing is visible; the next one succeeds, the rest is swept."""
    (tmp_path / "in").mkdir()
    data = os.urandom(30 << 20)
    (tmp_path / "in/x").write_bytes(data)
    here = open_storage("in", "posix", str(tmp_path / "in"), {})
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with ExitStack() as stack:
        server, far, folder = server_of_its_own(kind, tmp_path / "own", stack)

        def copy(token):
            task = CopyTask(
                uuid.uuid4(), "x", "d/x", PayloadKind.FILE, len(data), digest, (), token
            )
            (result,) = copy_batch(here, far, [task], stop=threading.Event())
            return result.error

        real = here.open_read
        here.open_read = lambda path: Killing(real(path), server.stop, 15 << 20)
        assert isinstance(copy("first"), StorageUnavailableError)
        assert not (folder / "d").exists()
        here.open_read = real
        server.start()
        assert copy("second") is None
        assert (folder / "d/x").read_bytes() == data
        assert sweep_temp(far, timedelta(0), datetime.now(UTC) + timedelta(minutes=1)) == 1
        assert [entry.path for entry in far.walk()] == ["d/x"]


def test_a_server_that_dies_while_a_drainer_works_delays_what_it_does(engine, tmp_path):
    """Copies that were under way or waited are made when it is back, and come home from there."""
    site = make_site(engine, tmp_path)
    with xrootd_server(tmp_path / "own") as server:
        site.add_storage("in", "here")
        config = json.dumps(server.config)
        site.add_storage("far", "there", interface="xrootd", root=server.make_root(), config=config)
        site.add_storage("back", "elsewhere", mode="offline")
        data = {f"test/{n}": os.urandom(3 << 20) for n in range(6)}
        for path, content in data.items():
            site.add_item(path.partition("/")[2], content, on="in")
        kills = [server.stop]

        def opener(row):
            real = open_storage(row["name"], row["interface"], row["root"], row["config"])
            if row["name"] == "in":
                read = real.open_read
                real.open_read = lambda path: Killing(
                    read(path), lambda: kills and kills.pop()(), 2 << 20
                )
            return real

        reopen(site, opener)
        site.settle()
        states = site.query("SELECT state, error_code FROM operation WHERE kind = 'copy'")
        assert not kills and {row["state"] for row in states} <= {"QUEUED", "DONE"}
        assert "DLM-301" in {row["error_code"] for row in states}
        server.start()
        for _ in range(3):
            site.advance(hours=1)
            site.settle()
        assert contents(site.context.storages.open(far_row(site))) == data
        send_home(site)
        assert site.visible("back") == data


def far_row(site):
    rows = site.context.transact(site.context.storages.load).values()
    return next(row for row in rows if row["name"] == "far")


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_with_path_rules_is_lost_and_comes_back(site, far):
    """Objects lie by the rules, odd names too; after the audit what was gone or damaged is made
    again at its place."""
    rules = [{"match": "test:(.*)", "template": "{hash:2}/{1}"}]
    set_rules(site.context, "far", rules)
    oids = [site.add_item(name, name.encode(), on="in") for name in ("one", "two", "back\\slash")]
    site.settle()
    kept = contents(far)
    heads = [uri_bucket(f"test:{name}")[:2] for name in ("one", "two")]
    assert kept[f"{heads[0]}/one"] == b"one" and kept[f"{heads[1]}/two"] == b"two"
    assert [path for path in kept if path.endswith("!/back%5Cslash")]
    lose_storage(site.context, "far", "the service is gone")
    assert {site.replicas(oid)["far"] for oid in oids} == {"MISSING"}
    far.remove(f"{heads[0]}/one")
    far.remove(f"{heads[1]}/two")
    far.write(f"{heads[1]}/two", io.BytesIO(b"TWO"), 3)
    take_back(site.context, "far")
    site.work(plan=plan_audits)
    assert site.replicas(oids[0])["far"] == "MISSING"
    assert site.replicas(oids[1])["far"] == "CORRUPTED"
    assert site.replicas(oids[2])["far"] == "READY"
    site.advance(days=1)
    site.settle()
    assert {site.replicas(oid)["far"] for oid in oids} == {"READY"}
    assert contents(far) == kept


@pytest.mark.parametrize("place", ["rclone"], indirect=True)
def test_a_killed_daemon_is_no_loss(site, far):
    """Between any two steps of a life."""

    def kill_daemon():
        process = daemon().process
        process.kill()
        process.wait()

    oid = site.add_item("x", b"payload", "in")
    kill_daemon()
    site.settle()
    kill_daemon()
    assert site.replicas(oid) == {"in": "READY", "far": "READY"}
    assert contents(far) == {"test/x": b"payload"}


def test_what_a_web_server_has_is_registered_in_place_and_copied(engine, tmp_path):
    """It is a source like any other; nothing is changed there."""
    site = make_site(engine, tmp_path)
    web = tmp_path / "pages"
    (web / "run").mkdir(parents=True)
    (web / "run" / "one.fits").write_bytes(b"SIMPLE  =")
    (web / "run" / "two words").write_bytes(b"22")
    with web_server(web) as url:
        site.add_storage("web", "elsewhere", interface="http", root=url, managed=False,
                         mode="read_only")  # fmt: skip
        site.add_storage("disk", "here")
        register_tree(site.context, Source("web", "test", terms=Terms("LIQUID")))
        drain(site.context, {OperationKind.ADMIT: execute_admit})
        site.execute("UPDATE data_item SET target_phase = 'SOLID'")
        assert not site.settle().failed
        assert site.visible("disk") == {
            "test/run/one.fits": b"SIMPLE  =", "test/run/two words": b"22"
        }  # fmt: skip
    assert sorted(p.name for p in web.rglob("*")) == ["one.fits", "run", "two words"]
