"""Real storages for tests, by name: a folder, a bucket of a real S3 server, one behind sshd."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dlm_cli.s3_server import S3Server, s3_server
from dlm_core.storages.bundles import BundleConfig, Bundled
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, Storage, temp_path
from tests.fakes import Packing, QuotaStorage
from tests.faulty import Faulty
from tests.servers import (
    USER,
    ArchiveServer,
    DavServer,
    archive_server,
    rclone_webdav_server,
    wsgidav_server,
)
from tests.sshd import SshServer, ssh_server
from tests.tape import Tape
from tests.xrootd import XrootdServer, xrootd_server

KEYS = {"access_key": "env:DLM_TEST_S3_KEY", "secret_key": "env:DLM_TEST_S3_SECRET"}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS a test session."""
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        offer_keys(server)
        yield server


def offer_keys(server: S3Server) -> None:
    """Put the server's keys where :func:`s3_config` says that they are."""
    os.environ["DLM_TEST_S3_KEY"] = server.access_key
    os.environ["DLM_TEST_S3_SECRET"] = server.secret_key


def s3_config(server: S3Server) -> dict[str, str]:
    """The config of a storage on ``server``: its keys by reference."""
    return {"endpoint": server.endpoint, **KEYS}


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """One OpenSSH server a test session."""
    with ssh_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def wsgidav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DavServer]:
    """One WsgiDAV a test session."""
    with wsgidav_server(tmp_path_factory.mktemp("wsgidav")) as server:
        yield server


@pytest.fixture(scope="session")
def rclonedav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DavServer]:
    """One 'rclone serve webdav' a test session."""
    with rclone_webdav_server(tmp_path_factory.mktemp("rclonedav")) as server:
        yield server


@pytest.fixture(scope="session")
def folding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DavServer]:
    """One WebDAV server that takes two names for one a test session."""
    with rclone_webdav_server(tmp_path_factory.mktemp("folding"), folding=True) as server:
        yield server


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArchiveServer]:
    """One S3 server with archive classes a test session."""
    with archive_server(tmp_path_factory.mktemp("archive")) as server:
        os.environ["DLM_TEST_ARCHIVE_KEY"] = os.environ["DLM_TEST_ARCHIVE_SECRET"] = "any"
        yield server


def archive_config(server: ArchiveServer, **terms: Any) -> dict[str, Any]:
    """The config of a storage on ``server`` whose objects are archived at once."""
    keys = {"access_key": "env:DLM_TEST_ARCHIVE_KEY", "secret_key": "env:DLM_TEST_ARCHIVE_SECRET"}
    return {"endpoint": server.endpoint, "storage_class": "GLACIER", "stage": "s3"} | keys | terms


@pytest.fixture(scope="session")
def xrootd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XrootdServer]:
    """One XRootD server a test session."""
    with xrootd_server(tmp_path_factory.mktemp("xrootd")) as server:
        yield server


def open_dav(server: DavServer, name: str = "dav") -> Storage:
    """An empty storage of its own on a WebDAV server."""
    return open_storage(name, "webdav", server.make_collection(), server.config)


def dav_by_rclone(server: DavServer) -> dict[str, str]:
    """The config of a storage in a new collection by rclone's own WebDAV backend; its root is a
    dot."""
    return {
        "type": "webdav", "url": server.make_collection(), "vendor": "other", "user": USER,
        "pacer_min_sleep": "0s", "secret_pass": server.config["password"],
    }  # fmt: skip


def open_dav_by_rclone(server: DavServer, **options: str) -> Storage:
    """As :func:`open_dav`, by rclone's own WebDAV backend."""
    return open_storage("remote", "rclone", ".", dav_by_rclone(server) | options)


def open_s3_by_rclone(server: S3Server) -> Storage:
    """An empty storage in a bucket by rclone's own S3 backend, which copies and cannot move."""
    config = {
        "type": "s3", "provider": "SeaweedFS", "endpoint": server.endpoint,
        "secret_access_key_id": KEYS["access_key"],
        "secret_secret_access_key": KEYS["secret_key"],
    }  # fmt: skip
    return open_storage("remote", "rclone", f"{server.bucket}/{uuid.uuid4().hex}", config)


def open_memory_by_rclone() -> Storage:
    """An object store in the daemon's memory: like many of those, it copies and cannot move."""
    store = open_storage("remote", "rclone", f"bucket/{uuid.uuid4().hex}", {"type": "memory"})
    # a folder is there if something is in it, which only a temporary file may be the first of
    for path in (temp_path("first"), f"{PRIVATE}/here"):
        store.write(path, io.BytesIO(b"1"), 1)
    store.remove(temp_path("first"))
    return store


_KINDS = (
    "posix", "s3", "sftp", "sftp_shell", "wsgidav", "rclonedav", "rclone", "rclone_wsgidav",
    "rclone_memory", "xrootd", "quota", "faulty", "faulty_s3", "faulty_sftp", "tape",
    "bundled", "bundled_s3", "bundled_faulty", "bundled_tape",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("bundled_sftp", "bundled_wsgidav", "bundled_xrootd")
    ),
)  # fmt: skip


@pytest.fixture(params=_KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind; all keep the one contract, wrappers with faults off too."""
    wrapper, _, kind = request.param.rpartition("_")
    if wrapper == "bundled":
        return bundled(_open(request, kind, tmp_path), packs=True)
    if request.param == "bundled":
        return bundled(_open(request, "posix", tmp_path), packs=True)
    return _open(request, request.param, tmp_path)


def bundled(inner: Storage, *, packs: bool = False, **config: object) -> Bundled:
    """``inner`` with its small files in bundles, packed after every change if ``packs``."""
    terms = {"bundle_bytes": 2000, "bundle_below": 1 << 20, **config}
    return (Packing if packs else Bundled)(inner, BundleConfig.model_validate(terms))


def _open(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Storage:
    if kind == "rclone_memory":
        return open_memory_by_rclone()
    if kind == "rclone_wsgidav":
        return open_dav_by_rclone(request.getfixturevalue("wsgidav"))
    if kind.endswith("dav"):
        return open_dav(request.getfixturevalue(kind))
    if kind.endswith("s3"):
        server = request.getfixturevalue("s3")
        root = f"{server.bucket}/{uuid.uuid4().hex}"
        bucket = open_storage("bucket", "s3", root, s3_config(server))
        return bucket if kind == "s3" else cast(Storage, Faulty(bucket))
    if kind == "xrootd":
        there = request.getfixturevalue("xrootd")
        return open_storage("far", "xrootd", there.make_root(), there.config)
    root = tmp_path / "root"
    root.mkdir()
    if "sftp" in kind:
        shell = kind != "sftp"
        server = request.getfixturevalue("sshd")
        far = open_storage("far", "sftp", server.root(root), server.config(shell=shell))
        return cast(Storage, Faulty(far)) if kind == "faulty_sftp" else far
    if kind == "tape":
        return open_storage("tape", "posix", str(root), Tape(root, tmp_path / "hsm").config())
    inner = open_storage("disk", "posix", str(root), {})
    if kind == "rclone":
        return open_storage("remote", "rclone", str(root), {"type": "local"})
    if kind == "quota":
        return cast(Storage, QuotaStorage(inner, 1 << 40))
    return cast(Storage, Faulty(inner)) if kind == "faulty" else inner
