"""Copies that a server makes by itself, between two storages on it."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import uuid

import pytest

from dlm_core.errors import DestinationDamagedError, PayloadExistsError, SourceDamagedError
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from dlm_core.transfers.checksums import observe
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.throttle import Pace, paced
from dlm_core.types import PayloadKind
from tests.backends import open_dav, s3_config

_DATA = os.urandom(12 << 20)


def _two(request: pytest.FixtureRequest) -> tuple[Storage, Storage]:
    server = request.getfixturevalue(request.param)
    if request.param != "s3":
        return open_dav(server, "one"), open_dav(server, "other")
    roots = [f"{server.bucket}/{uuid.uuid4().hex}" for _ in range(2)]
    one, other = (open_storage(r[-4:], "s3", r, s3_config(server)) for r in roots)
    return one, other


@pytest.fixture(params=["s3", "wsgidav", "rclonedav"])
def pair(request: pytest.FixtureRequest) -> tuple[Storage, Storage]:
    """Two empty storages on one server; the first one has a file 'x'."""
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
