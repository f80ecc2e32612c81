"""A server whose certificate a private authority signed is believed by both of our libraries."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import uuid
from contextlib import suppress

import pytest

from dlm_core.errors import InvalidValueError
from dlm_core.storages.open import open_storage
from dlm_core.storages.s3 import PART_SIZE
from tests.backends import s3_config
from tests.payloads import put

VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch):
    """Whatever the machine has."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A folder with ca.pem, and what it signed for localhost: server.pem with its key."""
    folder = tmp_path_factory.mktemp("ca")
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj"]
    run(folder, *new, "/CN=private", "-keyout", "ca.key", "-out", "ca.pem")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem"]
    run(folder, *new, "/CN=localhost", *signed, *leaf, "-out", "server.pem")
    return folder


def run(folder, *words):
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


@pytest.fixture
def endpoint(s3, authority):
    """The server, behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    port = int(s3.endpoint.rpartition(":")[2])

    def listen():
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    def serve(raw):
        with suppress(OSError), context.wrap_socket(raw, server_side=True) as near:
            far = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=copy, args=(far, near), daemon=True).start()
            copy(near, far)

    def copy(source, target):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    threading.Thread(target=listen, daemon=True).start()
    yield f"https://localhost:{listener.getsockname()[1]}"
    listener.close()


@pytest.mark.parametrize("variable", VARIABLES)
def test_either_variable_names_the_authority_for_small_and_large(
    s3, endpoint, authority, monkeypatch, variable
):
    """One PUT goes by obstore, parts and versions by boto3: they believe the same."""
    monkeypatch.setenv(variable, str(authority / "ca.pem"))
    root = f"{s3.bucket}/{uuid.uuid4().hex}"
    bucket = open_storage("tls", "s3", root, s3_config(s3) | {"endpoint": endpoint})
    for size in (5, PART_SIZE + 1):
        put(bucket, f"{size}", bytes(size))
        assert bucket.stat(f"{size}").size == size
        bucket.remove(f"{size}")
    assert list(bucket.walk()) == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_bundle_that_is_not_there_is_told(s3, tmp_path, monkeypatch, variable):
    """As the storage is opened, by the name of the file."""
    monkeypatch.setenv(variable, str(tmp_path / "none.pem"))
    config = s3_config(s3)
    open_storage("plain", "s3", s3.bucket, config).check()  # which needs none
    with pytest.raises(InvalidValueError, match=r"none\.pem"):
        open_storage("tls", "s3", s3.bucket, config | {"endpoint": "https://localhost:9"})
