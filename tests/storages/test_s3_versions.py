"""Where a bucket keeps versions, what is removed is gone with all of them, and nothing else is."""

from __future__ import annotations

import uuid
from collections import Counter
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from dlm_core.errors import AccessDeniedError, StorageUnavailableError
from dlm_core.storages import s3_versions
from dlm_core.storages.conformance import CHECKS, name_of, run_check
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, trash_path
from tests.backends import s3_config
from tests.payloads import put

TRASH = trash_path("uid")


@pytest.fixture(scope="module")
def client(s3):
    """Somebody else's."""
    return boto3.client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1",
        aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(client):
    """One bucket for all: each takes room on the server."""
    name = f"v{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def name(client, made):
    """An empty bucket that keeps versions."""
    keep(client, made, "Enabled")
    page = client.list_object_versions(Bucket=made)
    for one in (*page.get("Versions", []), *page.get("DeleteMarkers", [])):
        client.delete_object(Bucket=made, Key=one["Key"], VersionId=one["VersionId"])
    return made


@pytest.fixture
def bucket(s3, name):
    """A storage below a prefix of a bucket that keeps versions."""
    return open_storage("bucket", "s3", f"{name}/p", s3_config(s3))


def keep(client: Any, name: str, status: str) -> None:
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": status})


def kept(client: Any, name: str) -> dict[str, int]:
    """How many versions and markers each key has."""
    page = client.list_object_versions(Bucket=name)
    found = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
    return dict(Counter(one["Key"] for one in found))


def theirs(client: Any, name: str, *keys: str) -> None:
    """Objects that were overwritten once."""
    for key in keys:
        for body in (b"old", b"new"):
            client.put_object(Bucket=name, Key=key, Body=body)


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_contract_is_kept_there_too(bucket, client, name, check):
    """And each check leaves no version behind."""
    if "name" in name_of(check) and "rename" not in name_of(check):
        pytest.skip("SeaweedFS has no names of 255 octets where it keeps versions")
    run_check(check, bucket, "folder")
    for entry in list(bucket.walk()):
        bucket.remove(entry.path)
    bucket.remove(f"{PRIVATE}/tmp")
    assert kept(client, name) == {}


@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
def test_what_is_trashed_and_purged_is_gone_with_its_versions(bucket, client, name, status):
    """Neighbours keep theirs, be their names as like."""
    path = f"of-{status.lower()}"
    neighbours = [f"p/{path}/y", f"p/{path}y", f"p/{path}-", path, "p/trash"]
    theirs(client, name, *neighbours)
    keep(client, name, status)
    # not by the storage: SeaweedFS takes what lies below the name for an object of it
    client.put_object(Bucket=name, Key=f"p/{path}", Body=b"payload")
    put(bucket, "z", b"payload")
    bucket.rename(path, TRASH)
    bucket.remove_file("z")
    assert kept(client, name) == {**dict.fromkeys(neighbours, 2), f"p/{TRASH}": 1}
    bucket.remove(TRASH)


def test_what_somebody_wrote_over_keeps_its_history(bucket, client, name):
    """It may be all that is left of good bytes: what is moved away goes, the older stays hidden."""
    theirs(client, name, "p/over")
    bucket.rename("over", TRASH)
    assert bucket.stat("over") is None
    (old,) = client.list_object_versions(Bucket=name, Prefix="p/over")["Versions"]
    found = client.get_object(Bucket=name, Key="p/over", VersionId=old["VersionId"])
    assert found["Body"].read() == b"old"
    with bucket.open_read(TRASH) as stream:
        assert stream.read() == b"new"
    bucket.remove(TRASH)
    bucket.remove("over")
    assert kept(client, name) == {}


def test_a_tree_is_gone_with_the_versions_of_its_files(bucket, client, name):
    """In the trash all of it goes, what was overwritten and what was deleted there; before, only
    what is moved: a file that somebody deleted earlier keeps its history."""
    theirs(client, name, "p/tree/deleted", "p/tree2/a", "p/tree")
    for path in ("tree/a", "tree/sub/b"):
        put(bucket, path, b"payload")
    for key in ("p/tree/deleted", "p/tree"):
        client.delete_object(Bucket=name, Key=key)
    others = {"p/tree/deleted": 3, "p/tree2/a": 2, "p/tree": 3}
    bucket.rename("tree", TRASH)
    assert kept(client, name) == {f"p/{TRASH}/a": 1, f"p/{TRASH}/sub/b": 1, **others}
    theirs(client, name, f"p/{TRASH}/a", f"p/{TRASH}/c", f"p/{TRASH}2/a")
    client.delete_object(Bucket=name, Key=f"p/{TRASH}/c")
    bucket.remove(TRASH)
    assert kept(client, name) == {**others, f"p/{TRASH}2/a": 2}


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("tree", [False, True])
def test_a_removal_that_was_cut_off_is_completed(bucket, client, name, monkeypatch, tree, after):
    """After any request: until the end the newest is there to be seen, and nothing older is."""
    key = f"p/{TRASH}/x" if tree else f"p/{TRASH}"
    theirs(client, name, key, key, "p/other")
    real, done = s3_versions.Versions._delete_one, []

    def cut(self: Any, one: Any) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(one)
        real(self, one)

    with monkeypatch.context() as patch:
        patch.setattr(s3_versions.Versions, "_delete_one", cut)
        patch.setattr(s3_versions, "AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            bucket.remove(TRASH)
    with bucket.open_read(key[2:]) as stream:
        assert stream.read() == b"new"
    bucket.remove(TRASH)
    assert kept(client, name) == {"p/other": 2}


def test_what_an_earlier_deletion_left_is_removed(bucket, client, name):
    """Nothing is to be seen there but markers: it is done again, and then nothing is left."""
    theirs(client, name, f"p/{TRASH}/x", "p/y")
    client.delete_object(Bucket=name, Key=f"p/{TRASH}/x")
    client.delete_object(Bucket=name, Key="p/y")
    assert bucket.stat(TRASH) is None and bucket.stat("y") is None
    bucket.remove(TRASH)
    bucket.remove("y")
    assert kept(client, name) == {}


def test_a_name_that_many_others_begin_with_is_looked_for_no_further(
    bucket, client, name, monkeypatch
):
    """Its versions are the first; and a tree of more than a page goes whole."""
    for n in range(30):
        put(bucket, f"many/{n}")
    theirs(client, name, "p/many", "p/many", "p/many")
    monkeypatch.setattr(
        s3_versions.Versions, "_listed", _in_small_pages(s3_versions.Versions._listed)
    )
    bucket.remove("many")
    assert kept(client, name) == {f"p/many/{n}": 1 for n in range(30)}
    bucket.remove("many")
    assert kept(client, name) == {}


def _in_small_pages(listed: Any) -> Any:
    def small(self: Any, *arguments: Any, **options: Any) -> Any:
        connected = self._s3.connected()
        pages = connected.get_paginator("list_object_versions")

        class Pages:
            def paginate(self, **asked: Any) -> Any:
                return pages.paginate(**asked, PaginationConfig={"PageSize": 4})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connected, "get_paginator", lambda _: Pages())
            return list(listed(self, *arguments, **options))

    return small


@pytest.mark.parametrize("tree", [False, True])
def test_what_was_put_there_at_the_last_moment_of_a_rename_stays(
    bucket, client, name, monkeypatch, tree
):
    """Versions have names of their own: what came after the last look is not deleted with them."""
    path = "tree/a" if tree else "file"
    put(bucket, path, b"old")
    real = bucket._versions.remove

    def late(*arguments: Any, **options: Any) -> None:
        client.put_object(Bucket=name, Key=f"p/{path}", Body=b"new")
        real(*arguments, **options)

    monkeypatch.setattr(bucket._versions, "remove", late)
    with pytest.raises(StorageUnavailableError, match="changed while it was moved"):
        bucket.rename(path.partition("/")[0], TRASH)
    with bucket.open_read(path) as stream:
        assert stream.read() == b"new"


def test_where_a_folder_was_there_is_room(bucket, client, name):
    """What a server keeps of a folder whose files are gone is nothing to whoever moves a file."""
    put(bucket, "there/x")
    bucket.remove("there")
    put(bucket, "file", b"bytes")
    bucket.rename("file", "there")
    assert kept(client, name) == {"p/there": 1}


def test_a_version_that_is_held_is_no_success(s3, client):
    """Object Lock: the removal says so, and what right may be missing; nothing is hidden."""
    name = f"l{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    held = client.put_object(Bucket=name, Key=TRASH, Body=b"held")["VersionId"]
    client.put_object_legal_hold(Bucket=name, Key=TRASH, LegalHold={"Status": "ON"})
    client.put_object(Bucket=name, Key=TRASH, Body=b"newest")
    bucket = open_storage("bucket", "s3", name, s3_config(s3))
    with pytest.raises(AccessDeniedError, match=r"s3:DeleteObjectVersion .* Object Lock"):
        bucket.remove(TRASH)
    assert bucket.stat(TRASH).size == len(b"newest")
    client.put_object_legal_hold(
        Bucket=name, Key=TRASH, VersionId=held, LegalHold={"Status": "OFF"}
    )
    bucket.remove(TRASH)
    assert kept(client, name) == {}


def answering(storage: Any, monkeypatch: Any, call: str, code: str) -> list[str]:
    """Let the server answer ``code`` to calls of a kind; how often it was asked."""
    client = storage._versions._s3.connected()
    asked: list[str] = []

    def answer(**_: Any) -> Any:
        asked.append(call)
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, call)

    monkeypatch.setattr(client, call, answer)
    monkeypatch.setattr(storage._versions._s3, "connected", lambda: client)
    return asked


def test_versions_that_may_not_be_listed_are_an_error(bucket, client, name, monkeypatch):
    """The object stays until they may."""
    put(bucket, "x")
    answering(bucket, monkeypatch, "list_object_versions", "AccessDenied")
    with pytest.raises(AccessDeniedError, match="s3:ListBucketVersions"):
        bucket.remove("x")
    assert kept(client, name) == {"p/x": 1}


def test_a_listing_that_is_partial_is_not_believed(bucket, client, name, monkeypatch):
    """What it leaves out is found by another; of what is moved something has to be there."""
    theirs(client, name, "p/x", "p/x")
    real = s3_versions.Versions._found
    monkeypatch.setattr(s3_versions.Versions, "_found", lambda *given: real(*given)[:1])
    bucket.remove("x")
    assert kept(client, name) == {}
    theirs(client, name, "p/x")
    monkeypatch.setattr(s3_versions.Versions, "_found", lambda *_: [])
    with pytest.raises(StorageUnavailableError, match="no version of x is listed"):
        bucket.rename("x", "y")
    assert kept(client, name) == {"p/x": 2, "p/y": 1}


def test_a_version_that_stays_is_no_success(bucket, client, name, monkeypatch):
    """The server says that it is deleted, and lists it still."""
    put(bucket, "x")
    monkeypatch.setattr(s3_versions.Versions, "_delete_one", lambda *_: None)
    with pytest.raises(StorageUnavailableError, match="versions of x are still there"):
        bucket.remove("x")


@pytest.mark.parametrize("code", ["AccessDenied", "NotImplemented", "MethodNotAllowed"])
def test_a_bucket_that_does_not_tell_is_taken_for_one_without(
    bucket, client, name, monkeypatch, code
):
    """Asked once; an object is deleted as ever."""
    asked = answering(bucket, monkeypatch, "get_bucket_versioning", code)
    for path in ("x", "y"):
        put(bucket, path)
        bucket.remove(path)
    assert len(asked) == 1 and kept(client, name) == {"p/x": 2, "p/y": 2}


def test_a_wrong_key_is_not_an_answer(bucket, client, name, monkeypatch):
    """Once it is right the bucket is asked, and nothing was deleted meanwhile."""
    put(bucket, "x")
    with monkeypatch.context() as patch:
        answering(bucket, patch, "get_bucket_versioning", "SignatureDoesNotMatch")
        with pytest.raises(AccessDeniedError):
            bucket.remove("x")
    assert kept(client, name) == {"p/x": 1}
    bucket.remove("x")
    assert kept(client, name) == {}


def test_versioning_that_is_switched_on_later_is_found(s3, client, monkeypatch):
    """A worker lives long: a bucket without is asked again, but not for every object; and no
    versions are looked for in it."""
    name = f"u{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    bucket = open_storage("bucket", "s3", name, s3_config(s3))
    with monkeypatch.context() as patch:
        patch.setattr(s3_versions.Versions, "remove", None)
        put(bucket, "x")
        bucket.remove("x")
    keep(client, name, "Enabled")
    put(bucket, "x")
    monkeypatch.setattr(s3_versions, "_HOLDS", 0.0)
    bucket.remove("x")
    assert kept(client, name) == {}
