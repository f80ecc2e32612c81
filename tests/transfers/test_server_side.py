"""Copies that a server makes by itself, between two storages on it."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import uuid

import boto3
import pytest

from dlm_cli.s3_server import S3Server
from dlm_core.errors import DestinationDamagedError, PayloadExistsError, SourceDamagedError
from dlm_core.storages import s3, s3_parts, xrootd_third
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.throttle import Pace, paced
from dlm_core.types import PayloadKind
from tests.backends import open_dav, s3_config
from tests.xrootd import xrootd_server

_DATA = os.urandom(12 << 20)


def _two(request: pytest.FixtureRequest) -> tuple[Storage, Storage]:
    kind, _, how = request.param.partition(", ")
    server = request.getfixturevalue("sshd" if kind == "sftp" else kind)
    if kind == "sftp":
        folders = [request.getfixturevalue("tmp_path") / name for name in ("one", "other")]
        for folder in folders:
            folder.mkdir()
        config = server.config(shell=how == "with a shell")
        one, other = (open_storage(f.name, "sftp", server.root(f), config) for f in folders)
        return one, other
    if kind == "xrootd":
        one, other = (open_storage(n, "xrootd", server.make_root(), server.config) for n in "ab")
        return one, other
    if kind != "s3":
        return open_dav(server, "one"), open_dav(server, "other")
    buckets = [server.bucket, another_bucket(server) if how == "another bucket" else server.bucket]
    roots = [f"{bucket}/{uuid.uuid4().hex}" for bucket in buckets]
    one, other = (open_storage(r[-4:], "s3", r, s3_config(server)) for r in roots)
    return one, other


def another_bucket(server: S3Server) -> str:
    name = f"b-{uuid.uuid4().hex[:20]}"
    client = boto3.client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1",
        aws_access_key_id=server.access_key, aws_secret_access_key=server.secret_key,
    )  # fmt: skip
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(
    params=["s3", "s3, another bucket", "s3, in parts", "wsgidav", "rclonedav", "sftp",
            "sftp, with a shell", "xrootd"]
)  # fmt: skip
def pair(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Storage, Storage]:
    """Two empty storages on one server; the first one has a file 'x'."""
    if "s3, " in request.param:
        monkeypatch.setattr(s3_parts, "COPIED_PART", 5 << 20)
    monkeypatch.setattr(xrootd_third, "FROM_SIZE", 1 << 20)
    if request.param == "s3, in parts":
        monkeypatch.setattr(s3, "_COPY_LIMIT", 1 << 20)
    one, other = _two(request)
    one.write("x", io.BytesIO(_DATA), len(_DATA))
    return one, other


def task(digest: str | None = None) -> CopyTask:
    found = digest or "sha256:" + hashlib.sha256(_DATA).hexdigest()
    return CopyTask(
        uuid.uuid4(), "x", "copy/x", PayloadKind.FILE, len(_DATA), found, (), uuid.uuid4().hex
    )


def test_the_server_copies_and_the_copy_is_read_back(pair, monkeypatch):
    """Nothing is written by us, through a limited storage neither."""
    one, other = pair
    monkeypatch.setattr(type(other), "write", None)
    pace = Pace(1e9, threading.Event())
    (result,) = copy_batch(paced(one, [pace]), paced(other, [pace]), [task()])
    assert result.error is None
    assert observe(other, "copy/x").digest == task().digest
    assert [entry.path for entry in other.walk()] == ["copy/x"]


def test_a_damaged_source_is_never_visible_in_such_a_copy(pair):
    """It is the source that is told; what was copied is removed."""
    one, other = pair
    (result,) = copy_batch(one, other, [task("sha256:" + "0" * 64)])
    assert isinstance(result.error, SourceDamagedError)
    assert list(other.walk()) == []
    assert not isinstance(result.error, DestinationDamagedError)


def test_other_bytes_in_its_place_stay(pair):
    """Nothing is overwritten by a server's copy."""
    one, other = pair
    other.write("copy/x", io.BytesIO(b"other"), 5)
    (result,) = copy_batch(one, other, [task()])
    assert isinstance(result.error, PayloadExistsError)
    assert observe(other, "copy/x").size == 5


def unfinished(storage):
    parts = storage._parts
    return list(parts._unfinished(parts._s3.prefix))


@pytest.mark.parametrize("pair", ["s3, another bucket", "s3, in parts"], indirect=True)
def test_a_copy_in_parts_that_is_interrupted_leaves_nothing(pair):
    """Neither an object nor an upload; and one whose source these keys may not read, or that is
    gone, is copied by us or told by us."""
    one, other = pair

    def stop(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        other.copy_from(one, "x", "copy/x", len(_DATA), stop)
    assert list(other.walk()) == []
    assert unfinished(other) == []
    assert not other.copy_from(one, "nothing", "copy/x", len(_DATA), lambda _: None)
    assert list(other.walk()) == [] and unfinished(other) == []


@pytest.mark.parametrize("pair", ["s3, in parts"], indirect=True)
def test_a_rename_of_what_is_large_goes_over_no_line(pair, monkeypatch):
    """Above CopyObject's limit the server copies it in parts."""
    one, _ = pair
    monkeypatch.setattr(type(one), "open_read", None)
    one.rename("x", "deep/y")
    monkeypatch.undo()
    assert observe(one, "deep/y").digest == task().digest
    assert [entry.path for entry in one.walk()] == ["deep/y"]


def test_a_server_fetches_from_another_one_or_it_is_copied_by_us(xrootd, tmp_path, monkeypatch):
    """What is interrupted leaves nothing; a server that cannot is not asked again for an hour."""
    monkeypatch.setattr(xrootd_third, "FROM_SIZE", 1 << 20)
    monkeypatch.setattr(xrootd_third, "_not_before", {})
    one = open_storage("one", "xrootd", xrootd.make_root(), xrootd.config)
    one.write("x", io.BytesIO(_DATA), len(_DATA))

    def stop(_: int) -> None:
        raise InterruptedError

    with xrootd_server(tmp_path / "server") as server:
        other = open_storage("other", "xrootd", server.make_root(), server.config)
        told: list[int] = []
        assert other.copy_from(one, "x", "copy/x", len(_DATA), told.append)
        assert sum(told) == len(_DATA)
        assert observe(other, "copy/x").digest == task().digest
        with pytest.raises(InterruptedError):
            other.copy_from(one, "x", "copy/y", len(_DATA), stop)
        assert not other.copy_from(one, "nothing", "copy/y", len(_DATA), told.append)
        assert other.copy_from(one, "x", "copy/y", len(_DATA), told.append)
    with xrootd_server(tmp_path / "alone", fetches=False) as server:
        other = open_storage("other", "xrootd", server.make_root(), server.config)
        (result,) = copy_batch(one, other, [task()])
        assert result.error is None
        assert observe(other, "copy/x").digest == task().digest
        assert [entry.path for entry in other.walk()] == ["copy/x"]
        monkeypatch.setattr(xrootd_third, "fetch", None)
        assert not other.copy_from(one, "x", "copy/y", len(_DATA), told.append)
