"""Storages behind a protocol, for tests of the lifecycle: one of each kind on its real server."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from tests.backends import dav_by_rclone, s3_config

KINDS = ("s3", "sftp", "sftp_shell", "webdav", "rclone", "xrootd")


@dataclass(frozen=True)
class Far:
    """An empty place on a server: how to reach it, and the secret that nothing may tell."""

    kind: str
    interface: str
    root: str
    config: dict[str, Any]
    port: int
    secret: str
    #: what its secret is found by, as a variable; '' where it is a file
    variable: str = ""

    def open(self) -> Storage:
        return open_storage("far", self.interface, self.root, self.config)

    def row(self) -> dict[str, Any]:
        """The columns of its storage in the catalogue."""
        row = {"interface": self.interface, "root": self.root, "config": json.dumps(self.config)}
        return row | ({"class": "object"} if self.kind == "s3" else {})

    def unreachable(self) -> dict[str, Any]:
        """The same at a port where nobody listens."""
        return {key: text.replace(f":{self.port}", ":9") for key, text in self.row().items()}


def make_far(kind: str, request: pytest.FixtureRequest, folder: Path) -> Far:
    """A new place of a kind; ``folder`` is where it lies if the server leads
    into any, and is the caller's to make."""
    if kind == "s3":
        server = request.getfixturevalue("s3")
        root = f"{server.bucket}/{uuid.uuid4().hex}"
        port = int(server.endpoint.rpartition(":")[2])
        config: dict[str, Any] = s3_config(server)
        return Far(kind, "s3", root, config, port, server.secret_key, "DLM_TEST_S3_SECRET")
    if kind.startswith("sftp"):
        server = request.getfixturevalue("sshd")
        config = server.config(shell=kind == "sftp_shell")
        secret = os.environ[server.key_name].splitlines()[3]
        return Far(kind, "sftp", server.root(folder), config, server.port, secret, server.key_name)
    if kind == "xrootd":
        server = request.getfixturevalue("xrootd")
        secret = (server.folder.parent / "keytab").read_text().split("k:")[1].split()[0]
        return Far(kind, "xrootd", server.make_root(), server.config, server.port, secret)
    server = request.getfixturevalue("wsgidav")
    if kind == "rclone":
        return Far(kind, "rclone", ".", dav_by_rclone(server), server.port, server.password)
    root = server.make_collection()
    return Far(kind, "webdav", root, server.config, server.port, server.password)
