"""The lifecycle with a WebDAV server, and one behind rclone, among the storages."""

import json
import os
from datetime import timedelta

import pytest

from dlm_core.catalogue.items import Terms
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.work import drain
from dlm_core.storages.rclone_daemon import daemon
from dlm_core.types import OperationKind, decode_path
from tests.servers import USER, web_server
from tests.site import make_site

ODD = ["a b", "quo'te\"", "ünï/星", "per%20cent", "back\\slash", "new\nline", "what?;#",
       "n" * 255, b"\xff\xfe.dat"]  # fmt: skip


@pytest.fixture
def site(engine, tmp_path):
    return make_site(engine, tmp_path)


@pytest.fixture(params=["webdav", "rclone"])
def far(request, site, wsgidav):
    """A site with a folder of files, and a storage 'far' on a WebDAV server at another location."""
    site.add_storage("in", "here")
    root, config = wsgidav.make_collection(), wsgidav.config
    if request.param == "rclone":
        config = {"type": "webdav", "url": root, "vendor": "other", "user": USER,
                  "pacer_min_sleep": "0s", "secret_pass": config["password"]}  # fmt: skip
        root = "."
    site.add_storage("far", "there", interface=request.param, root=root, config=json.dumps(config))
    return storage(site, "far")


def storage(site, name):
    found = site.context.transact(site.context.storages.load).values()
    return site.context.storages.open(next(row for row in found if row["name"] == name))


def contents(storage):
    found = {}
    for entry in storage.walk():
        with storage.open_read(entry.path) as stream:
            found[entry.path] = stream.read()
    return found


def test_any_file_name_gets_a_copy_there_and_back(site, far):
    """Odd names lie there encoded; a third storage gets them from there."""
    for name in ODD:
        file = os.path.join(os.fsencode(site.folder / "in"), os.fsencode(name))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(os.fsencode(name))
    register_tree(site.context, Source("in", "test", terms=Terms("SOLID")))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert not site.settle().failed and len(contents(far)) == len(ODD)
    site.set_storage("in", mode="offline", phase="GAS")
    site.add_storage("third", "elsewhere")
    site.execute(
        "INSERT INTO evaluation SELECT oid, :now FROM data_item "
        "ON CONFLICT (oid) DO UPDATE SET due_at = :now",
        now=site.now,
    )
    assert not site.settle().failed
    copies = site.query(
        "SELECT i.uri, r.path FROM data_item i JOIN replica r USING (oid) "
        "JOIN storage s USING (storage_id) WHERE s.name = 'third' AND r.state = 'READY'"
    )
    third = contents(storage(site, "third"))
    for row in copies:
        name = decode_path(row["uri"].partition(":")[2])
        assert third[decode_path(row["path"])] == os.fsencode(name)
    assert len(copies) == len(ODD) == len(third)


def test_a_payload_goes_to_the_trash_and_comes_back(site, far):
    """Trash, restore: it is where the catalogue says it is."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    assert contents(far) == {"test/x": b"payload"}
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE storage_id = :s",
        now=site.now, s=site.storages["far"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :oid", oid=oid)
    site.settle()
    assert contents(far) == {} and site.replicas(oid)["far"] == "TRASHED"
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["far"], actor="user:test", now=site.now
        )
    )
    site.settle()
    assert contents(far) == {"test/x": b"payload"}


def test_a_trashed_payload_is_purged_after_its_grace(site, far):
    """The bytes are gone, and the catalogue says so only then."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE storage_id = :s",
        now=site.now, s=site.storages["far"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :oid", oid=oid)
    site.settle()
    assert len(list(far.walk(".dlm/trash"))) == 1
    site.advance(days=2)
    site.settle()
    assert site.replicas(oid)["far"] == "DELETED" and list(far.walk(".dlm")) == []


def test_a_server_that_does_not_answer_changes_nothing(site, far):
    """Copies wait and are tried again; nothing is said to be missing; no secret is recorded."""
    oid = site.add_item("x", b"payload", "in")
    (row,) = site.query("SELECT root, config FROM storage WHERE name = 'far'")
    dead = "http://127.0.0.1:9/x"
    if row["root"] == ".":
        site.set_storage("far", config=json.dumps(row["config"] | {"url": dead}))
    else:
        site.set_storage("far", root=dead)
    assert not site.settle().done.get("copy")
    (operation,) = site.query("SELECT state, error_code FROM operation WHERE kind = 'copy'")
    assert (operation["state"], operation["error_code"]) == ("QUEUED", "DLM-301")
    assert site.replicas(oid) == {"in": "READY", "far": "PENDING"}
    site.set_storage("far", root=row["root"], config=json.dumps(row["config"]))
    site.now += timedelta(hours=1)
    site.settle()
    assert contents(far) == {"test/x": b"payload"}


def test_no_secret_is_in_the_catalogue(site, far, wsgidav, monkeypatch):
    """A wrong one neither: its error is recorded without it."""
    monkeypatch.setenv("DLM_TEST_WRONG", "not-the-secret")
    site.add_item("x", b"payload", "in")
    (row,) = site.query("SELECT config FROM storage WHERE name = 'far'")
    key = "secret_pass" if "secret_pass" in row["config"] else "password"
    site.set_storage("far", config=json.dumps(row["config"] | {key: "env:DLM_TEST_WRONG"}))
    site.settle()
    (operation,) = site.query("SELECT error_code FROM operation WHERE kind = 'copy'")
    assert operation["error_code"] == "DLM-306"
    for table in ("storage", "operation", "event", "replica", "data_item"):
        told = str(site.query(f"SELECT to_jsonb(t) AS told FROM {table} t"))
        assert "not-the-secret" not in told and wsgidav.password not in told


def kill_daemon():
    process = daemon().process
    process.kill()
    process.wait()


def test_a_killed_daemon_is_no_loss(site, far):
    """Between any two steps of a life."""
    oid = site.add_item("x", b"payload", "in")
    kill_daemon()
    site.settle()
    kill_daemon()
    assert site.replicas(oid) == {"in": "READY", "far": "READY"}
    assert contents(far) == {"test/x": b"payload"}


def test_what_a_web_server_has_is_registered_in_place_and_copied(site, tmp_path):
    """It is a source like any other; nothing is changed there."""
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
