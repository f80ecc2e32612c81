"""Real storages for tests, by name: a folder, a bucket of a real S3 server, one behind sshd."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from dlm_cli.s3_server import S3Server, s3_server
from dlm_core.storages.bundles import BundleConfig, Bundled
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from tests.fakes import Packing, QuotaStorage
from tests.faulty import Faulty
from tests.servers import USER, DavServer, rclone_webdav_server, wsgidav_server
from tests.sshd import SshServer, ssh_server

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


def open_dav(server: DavServer, name: str = "dav") -> Storage:
    """An empty storage of its own on a WebDAV server."""
    return open_storage(name, "webdav", server.make_collection(), server.config)


def open_dav_by_rclone(server: DavServer, **options: str) -> Storage:
    """As :func:`open_dav`, by rclone's own WebDAV backend."""
    config = {
        "type": "webdav", "url": server.make_collection(), "vendor": "other", "user": USER,
        "pacer_min_sleep": "0s", "secret_pass": server.config["password"],
    }  # fmt: skip
    return open_storage("remote", "rclone", ".", config | options)


_KINDS = (
    "posix", "s3", "sftp", "sftp_shell", "wsgidav", "rclonedav", "rclone", "rclone_wsgidav",
    "quota", "faulty", "faulty_s3", "faulty_sftp",
    "bundled", "bundled_s3", "bundled_faulty",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bundled_sftp", "bundled_wsgidav")),
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
    if kind.startswith("rclone_"):
        return open_dav_by_rclone(request.getfixturevalue("wsgidav"))
    if kind.endswith("dav"):
        return open_dav(request.getfixturevalue(kind))
    if kind.endswith("s3"):
        server = request.getfixturevalue("s3")
        root = f"{server.bucket}/{uuid.uuid4().hex}"
        bucket = open_storage("bucket", "s3", root, s3_config(server))
        return bucket if kind == "s3" else cast(Storage, Faulty(bucket))
    root = tmp_path / "root"
    root.mkdir()
    if "sftp" in kind:
        shell = kind != "sftp"
        server = request.getfixturevalue("sshd")
        far = open_storage("far", "sftp", server.root(root), server.config(shell=shell))
        return cast(Storage, Faulty(far)) if kind == "faulty_sftp" else far
    inner = open_storage("disk", "posix", str(root), {})
    if kind == "rclone":
        return open_storage("remote", "rclone", str(root), {"type": "local"})
    if kind == "quota":
        return cast(Storage, QuotaStorage(inner, 1 << 40))
    return cast(Storage, Faulty(inner)) if kind == "faulty" else inner
