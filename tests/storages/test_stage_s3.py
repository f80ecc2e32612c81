"""S3's archive classes: RestoreObject and HEAD, against a real server that knows both."""

import io
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dlm_core.errors import (
    InvalidValueError,
    NotOnlineError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.lifecycle.trash import request_restore
from dlm_core.storages.mark import MARK, OFFLINE, mark_of
from dlm_core.storages.open import open_storage
from dlm_core.storages.stage_s3 import can_be_read
from tests.backends import archive_config, s3_config
from tests.site import make_site


@pytest.fixture
def glacier(archive):
    """A storage whose objects are archived as they are written; a restore takes two looks."""
    root = f"{archive.make_bucket()}/some/prefix"
    return open_storage("glacier", "s3", root, archive_config(archive))


@pytest.mark.parametrize("size", [5, 9 << 20])
def test_an_archived_object_is_read_after_it_was_restored(glacier, size):
    """Written to the archive class in one part and in several; reading is refused, asking twice
    does no harm, and the bytes come once the restore is over."""
    data = b"bytes" * size
    glacier.write("d/x", io.BytesIO(data[:size]), size)
    with pytest.raises(NotOnlineError):
        glacier.open_read("d/x")
    glacier.stage(["d/x"])
    glacier.stage(["d/x"])
    assert glacier.look(["d/x"]) == set()
    assert glacier.look(["d/x", "not/there"]) == {"d/x"}
    with glacier.open_read("d/x") as stream:
        assert stream.read() == data[:size]


def test_what_is_not_there_or_not_archived_is_no_failure(glacier, archive):
    """Asking for what is gone, or is online, is answered like any other request."""
    plain = open_storage(
        "plain", "s3", glacier.stager._s3.bucket,
        {k: v for k, v in archive_config(archive).items() if k not in ("storage_class", "stage")},
    )  # fmt: skip
    plain.write("some/prefix/plain", io.BytesIO(b"x"), 1)
    glacier.stage(["plain", "gone"])
    assert glacier.look(["plain", "gone"]) == {"plain"}
    with pytest.raises(PayloadNotFoundError):
        glacier.open_read("gone")


def test_a_rename_of_what_is_archived_is_refused_until_it_is_restored(glacier):
    """On S3 a rename is a copy."""
    glacier.write("x", io.BytesIO(b"x"), 1)
    with pytest.raises(NotOnlineError):
        glacier.rename("x", "y")
    assert glacier.stat("x") is not None and glacier.stat("y") is None
    glacier.remove("x")
    assert glacier.stat("x") is None


def test_the_mark_of_an_archive_can_be_read(glacier):
    """It has the bucket's own class; what a rule of the bucket archived is not read."""
    key = str(uuid.uuid4()).encode()
    assert mark_of(glacier) is None
    glacier.write(MARK, io.BytesIO(key), len(key))
    assert mark_of(glacier) == key.decode()
    glacier.remove(MARK)
    client = glacier.stager._s3
    client.connected().put_object(
        Bucket=client.bucket, Key=client.prefix + MARK, Body=key, StorageClass="GLACIER"
    )
    assert mark_of(glacier) == OFFLINE


class _Busy(BaseHTTPRequestHandler):
    """The answer of a service that has the request already; moto gives 200 instead."""

    code = "RestoreAlreadyInProgress"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{self.code}</Code><Message>wait</Message></Error>".encode()
        self.send_response(409 if self.code.startswith("Restore") else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "code", ["RestoreAlreadyInProgress", "GlacierExpeditedRetrievalNotAvailable"]
)
def test_a_restore_that_is_on_its_way_is_fine_and_one_that_is_refused_is_told(archive, code):
    """409 RestoreAlreadyInProgress is a yes; no capacity for an expedited one is said so."""
    handler = type("Handler", (_Busy,), {"code": code})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = archive_config(archive) | {"endpoint": f"http://127.0.0.1:{server.server_port}"}
        storage = open_storage("glacier", "s3", "bucket", config)
        if code.startswith("Restore"):
            storage.stage(["x"])
        else:
            with pytest.raises(StorageUnavailableError, match="ExpeditedRetrievalNotAvailable"):
                storage.stage(["x"])
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("storage_class", "restore", "readable"), [
    (None, None, True), ("STANDARD_IA", None, True), ("GLACIER_IR", None, True),
    ("GLACIER", None, False), ("DEEP_ARCHIVE", None, False),
    ("GLACIER", 'ongoing-request="true"', False),
    ("GLACIER", 'ongoing-request="false", expiry-date="Fri, 21 Dec 2029 00:00:00 GMT"', True),
])  # fmt: skip
def test_the_two_headers_tell_what_can_be_read(storage_class, restore, readable):
    """Before, during and after a restore, and of classes that need none."""
    assert can_be_read(storage_class, restore) is readable


def test_a_server_without_restores_says_so_and_loses_nothing(s3):
    """SeaweedFS keeps the class and has no RestoreObject: nothing is read, and it is told why."""
    root = f"{s3.bucket}/{uuid.uuid4().hex}"
    terms = {"storage_class": "GLACIER", "stage": "s3"}
    storage = open_storage("weed", "s3", root, s3_config(s3) | terms)
    storage.write("x", io.BytesIO(b"x"), 1)
    assert storage.look(["x"]) == set()
    with pytest.raises(NotOnlineError):
        storage.open_read("x")
    with pytest.raises(StorageUnavailableError, match="MethodNotAllowed"):
        storage.stage(["x"])


def test_a_service_that_is_down_is_an_outage(archive):
    """Nobody listens: that is no answer about any object."""
    config = archive_config(archive) | {"endpoint": "http://127.0.0.1:9"}
    storage = open_storage("glacier", "s3", "bucket", config)
    with pytest.raises(StorageUnavailableError):
        storage.look(["x"])


@pytest.mark.parametrize("terms", [
    {"stage_tier": "Fast"}, {"stage_days": 0}, {"stage_command": "x"}, {"stage": "tape"},
    {"storage_class": "glacier; x"}, {"stage_poll_seconds": 90000}, {"stage_batch": 0},
])  # fmt: skip
def test_terms_that_do_not_fit_are_refused_when_the_storage_is_opened(archive, terms):
    """One clear line, before anything is asked for."""
    with pytest.raises(InvalidValueError):
        open_storage("glacier", "s3", "bucket", archive_config(archive) | terms)


def test_a_lifecycle_with_an_archive_there_and_back(engine, tmp_path, archive):
    """To the archive: verified by what it answers to the upload, not read. Back: restored first.
    Trash and restore wait for their bytes too, since a rename there is a copy."""
    site = make_site(engine, tmp_path)
    config = archive_config(archive, stage_poll_seconds=60)
    site.add_storage("glacier", "cloud", interface="s3", root=archive.make_bucket(),
                     config=json.dumps(config), **{"class": "object"})  # fmt: skip
    site.add_storage("disk", "here")
    oid = site.add_item("x", b"payload" * 99, "disk")
    site.settle()
    assert site.replicas(oid) == {"disk": "READY", "glacier": "READY"}
    (site.folder / "disk/x").unlink()
    site.execute("UPDATE replica SET state = 'MISSING' WHERE uid = :uid",
                 uid=site.replica(oid, "disk")["uid"])  # fmt: skip
    site.settle()
    waiting = site.query("SELECT error_code, attempts FROM operation WHERE state = 'QUEUED'")
    assert waiting == [{"error_code": "DLM-308", "attempts": 0}]
    poll_until(site, lambda: site.replicas(oid)["disk"] == "READY")
    assert site.visible("disk") == {"x": b"payload" * 99}


def test_an_upload_whose_etag_proves_nothing_is_restored_and_read(
    engine, tmp_path, archive, monkeypatch
):
    """As where a key service encrypts: what was uploaded stays, is restored, read and adopted."""
    monkeypatch.setattr("dlm_core.transfers.proving.Prover.compare_etags", lambda *_: None)
    site = make_site(engine, tmp_path)
    site.add_storage("glacier", "cloud", interface="s3", root=archive.make_bucket(),
                     config=json.dumps(archive_config(archive)), **{"class": "object"})  # fmt: skip
    site.add_storage("disk", "here")
    oid = site.add_item("x", b"payload" * 99, "disk")
    site.settle()
    assert site.replicas(oid)["glacier"] == "PENDING"
    poll_until(site, lambda: site.replicas(oid)["glacier"] == "READY")


def poll_until(site, is_so, most=8):
    for _ in range(most):
        if is_so():
            return
        site.advance(seconds=60)
        site.settle()
    assert is_so()


def test_the_trash_of_an_archive_waits_for_its_bytes(engine, tmp_path, archive):
    """Trashing copies there: it is restored before, and comes back when asked for."""
    site = make_site(engine, tmp_path)
    site.add_storage("glacier", "cloud", interface="s3", root=archive.make_bucket(),
                     config=json.dumps(archive_config(archive)), **{"class": "object"})  # fmt: skip
    site.add_storage("disk", "here")
    oid = site.add_item("x", b"payload" * 99, "disk")
    site.settle()
    site.execute("UPDATE replica SET expires_at = :now WHERE uid = :uid", now=site.now,
                 uid=site.replica(oid, "glacier")["uid"])  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.settle()
    trash = "SELECT trashed_at FROM replica WHERE state = 'TRASHED'"
    assert site.query(trash) == [{"trashed_at": None}]
    poll_until(site, lambda: site.query(trash)[0]["trashed_at"] is not None)
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["glacier"], actor="user:test", now=site.now
        )
    )
    poll_until(site, lambda: site.replicas(oid)["glacier"] == "READY")
