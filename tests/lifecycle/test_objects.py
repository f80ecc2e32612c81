"""The lifecycle with an object store among the storages."""

import io
import json
import os
import uuid
from datetime import timedelta

import pytest

from dlm_core.catalogue.items import Terms
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.lost import lose_storage, plan_audits, take_back
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.rules import set_rules
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind, decode_path, uri_bucket
from tests.backends import s3_config
from tests.site import make_site

ODD = ["a b", "quo'te\"", "ünï/星", "per%20cent", "per%0Acent", "back\\slash", "new\nline",
       "n" * 255, b"\xff\xfe.dat"]  # fmt: skip


@pytest.fixture
def site(engine, tmp_path):
    return make_site(engine, tmp_path)


@pytest.fixture
def bucket(site, s3):
    """A site with a folder of files and a bucket, both LIQUID, at two locations."""
    site.add_storage("in", "here")
    root = f"{s3.bucket}/{uuid.uuid4().hex}"
    site.add_storage(
        "bucket", "cloud", interface="s3", root=root, config=json.dumps(s3_config(s3)),
        **{"class": "object"},
    )  # fmt: skip
    return site.context.storages.open(
        next(
            row
            for row in site.context.transact(site.context.storages.load).values()
            if row["name"] == "bucket"
        )
    )


def contents(storage):
    found = {}
    for entry in storage.walk():
        if not entry.path.startswith(".dlm/"):
            with storage.open_read(entry.path) as stream:
                found[entry.path] = stream.read()
    return found


def test_any_file_name_gets_a_copy(site, bucket):
    """Names that S3 does not keep lie there encoded, and meet no file that is really so called."""
    for name in ODD:
        file = os.path.join(os.fsencode(site.folder / "in"), os.fsencode(name))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(os.fsencode(name))
    register_tree(site.context, Source("in", "test", terms=Terms("SOLID")))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    report = site.settle()
    assert not report.failed and len(contents(bucket)) == len(ODD)
    copies = site.query(
        "SELECT i.uri, r.path, r.state FROM data_item i JOIN replica r USING (oid) "
        "JOIN storage s USING (storage_id) WHERE s.name = 'bucket'"
    )
    assert {row["state"] for row in copies} == {"READY"} and len(copies) == len(ODD)
    for row in copies:
        with bucket.open_read(decode_path(row["path"])) as stream:
            assert stream.read() == os.fsencode(decode_path(row["uri"].partition(":")[2]))


def test_an_object_goes_to_the_trash_and_comes_back(site, bucket):
    """Trash, restore, trash again, purge: the object is where the catalogue says it is."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    assert contents(bucket) == {"test/x": b"payload"}
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE storage_id = :s",
        now=site.now, s=site.storages["bucket"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :oid", oid=oid)
    site.settle()
    assert contents(bucket) == {} and site.replicas(oid)["bucket"] == "TRASHED"
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["bucket"], actor="user:test", now=site.now
        )
    )
    site.settle()
    assert contents(bucket) == {"test/x": b"payload"}


def test_a_server_that_does_not_answer_changes_nothing(site, bucket, s3):
    """Copies wait and are tried again; what lies elsewhere stays; nothing is said to be missing."""
    oid = site.add_item("x", b"payload", "in")
    dead = s3_config(s3) | {"endpoint": "http://127.0.0.1:9"}
    site.set_storage("bucket", config=json.dumps(dead))
    report = site.settle()
    assert not report.done.get("copy")
    (operation,) = site.query("SELECT state, error_code FROM operation WHERE kind = 'copy'")
    assert operation["state"] == "QUEUED" and operation["error_code"] == "DLM-301"
    assert site.replicas(oid) == {"in": "READY", "bucket": "PENDING"}
    site.set_storage("bucket", config=json.dumps(s3_config(s3)))
    site.now += timedelta(hours=1)
    site.settle()
    assert contents(bucket) == {"test/x": b"payload"}


def test_a_bucket_with_path_rules_is_lost_and_comes_back(site, bucket):
    """Objects lie by the rules, odd names too; after the audit what was gone or damaged is made
    again at its place."""
    rules = [{"match": "test:(.*)", "template": "{hash:2}/{1}"}]
    set_rules(site.context, "bucket", rules)
    oids = [site.add_item(name, name.encode(), on="in") for name in ("one", "two", "back\\slash")]
    site.settle()
    kept = contents(bucket)
    heads = [uri_bucket(f"test:{name}")[:2] for name in ("one", "two")]
    assert kept[f"{heads[0]}/one"] == b"one" and kept[f"{heads[1]}/two"] == b"two"
    assert [path for path in kept if path.endswith("!/back%5Cslash")]
    lose_storage(site.context, "bucket", "the service is gone")
    assert {site.replicas(oid)["bucket"] for oid in oids} == {"MISSING"}
    bucket.remove(f"{heads[0]}/one")
    bucket.remove(f"{heads[1]}/two")
    bucket.write(f"{heads[1]}/two", io.BytesIO(b"TWO"), 3)
    take_back(site.context, "bucket")
    site.work(plan=plan_audits)
    assert site.replicas(oids[0])["bucket"] == "MISSING"
    assert site.replicas(oids[1])["bucket"] == "CORRUPTED"
    assert site.replicas(oids[2])["bucket"] == "READY"
    site.advance(days=1)
    site.settle()
    assert {site.replicas(oid)["bucket"] for oid in oids} == {"READY"}
    assert contents(bucket) == kept
