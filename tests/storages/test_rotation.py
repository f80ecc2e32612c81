"""Secrets are changed while the storages that need them are open and in use."""

from __future__ import annotations

import io
import os
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.lifecycle.work import StoragePool
from dlm_core.storages import s3_keys
from dlm_core.storages.open import open_storage
from dlm_core.storages.secrets import read_secret
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the keys lie; they are read for every request."""
    monkeypatch.setattr(s3_keys, "KEPT_SECONDS", 0.0)
    return tmp_path


def rotate(file, value) -> None:
    """Write a secret, and wait as long as the one before is kept."""
    file.write_text(value)
    time.sleep(0.15)


def references(folder, *names):
    return {name: f"file:{folder / name}" for name in names or ("access_key", "secret_key")}


def test_a_rotated_key_is_used_without_opening_the_storage_again(s3, folder):
    """A wrong secret is denied; once the file has the right one, the same adapter works."""
    (folder / "access_key").write_text(s3.access_key)
    (folder / "secret_key").write_text("of yesterday")
    config = {"endpoint": s3.endpoint, **references(folder)}
    storage = open_storage("bucket", "s3", f"{s3.bucket}/{uuid.uuid4().hex}", config)
    with pytest.raises(AccessDeniedError):
        storage.stat("x")
    rotate(folder / "secret_key", s3.secret_key)
    storage.write("x", io.BytesIO(b"1"), 1)
    assert storage.stat("x").size == 1


def test_a_secret_that_is_gone_for_a_moment_is_an_outage(s3, folder):
    """Which is tried again, and names the reference: a rotation is not always atomic."""
    for name, value in (("access_key", s3.access_key), ("secret_key", s3.secret_key)):
        (folder / name).write_text(value)
    config = {"endpoint": s3.endpoint, **references(folder)}
    storage = open_storage("bucket", "s3", f"{s3.bucket}/{uuid.uuid4().hex}", config)
    (folder / "secret_key").unlink()
    time.sleep(0.15)
    for call in (lambda: storage.stat("x"), storage.check, lambda: list(storage.walk())):
        with pytest.raises(StorageUnavailableError, match="secret_key'") as caught:
            call()
        assert "\n" not in str(caught.value) and s3.access_key not in str(caught.value)
    rotate(folder / "secret_key", s3.secret_key)
    storage.check()


def test_a_key_that_cannot_stand_in_a_header_is_an_outage_that_shows_nothing(s3, folder):
    """Two lines where one belongs: obstore would end by a panic, and boto3 show the token."""
    names = ("access_key", "secret_key", "session_token")
    for name, value in zip(names, (s3.access_key, s3.secret_key, "token"), strict=True):
        (folder / name).write_text(value)
    config = {"endpoint": s3.endpoint, **references(folder, *names)}
    storage = open_storage("bucket", "s3", f"{s3.bucket}/{uuid.uuid4().hex}", config)
    for name in ("session_token", "access_key"):
        before = (folder / name).read_text()
        rotate(folder / name, "first-part\nsecond-part")
        for call in (storage.check, lambda: storage.forget_parts(0.0, lambda _: {})):
            with pytest.raises(StorageUnavailableError, match="one line") as caught:
                call()
            assert "part" not in str(caught.value)
        rotate(folder / name, before)
    (folder / "access_key").write_text("two\nlines")
    with pytest.raises(InvalidValueError, match="one line"):
        open_storage("bucket", "s3", s3.bucket, config)


def test_the_final_newline_of_a_variable_is_no_part_of_a_secret(monkeypatch):
    """As that of a file, from which it may have come; octets that are no text are no secret."""
    monkeypatch.setenv("SITE_SECRET", "abc\n")
    assert read_secret("x", "env:SITE_SECRET") == "abc"
    monkeypatch.setitem(os.environb, b"SITE_SECRET", b"abc\xff")
    for reference in ("env:SITE_SECRET", "file:/no\0file"):
        with pytest.raises(InvalidValueError):
            read_secret("x", reference)


def test_what_aws_own_tools_fail_of_is_an_outage(folder, monkeypatch):
    """A profile that is not there, a token's file that comes later: whatever the call is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "not-yet"))
    config = {"endpoint": "http://127.0.0.1:9", "stage": "s3"}
    storage = open_storage("x", "s3", "bucket", config)
    calls = (storage.check, lambda: storage.stager.online(["x"]), lambda: storage.remove("x"))
    for profile in ("", "nobody"):
        monkeypatch.setenv("AWS_PROFILE", profile) if profile else None
        for call in calls:
            with pytest.raises(StorageUnavailableError, match="AWS"):
                call()


def test_a_storage_whose_secret_came_later_is_opened_then(s3, folder):
    """A worker that began before the secret was there does not have to be started again."""
    (folder / "access_key").write_text(s3.access_key)
    config = {"endpoint": s3.endpoint, **references(folder)}
    row = {
        "storage_id": uuid.uuid4(), "name": "bucket", "interface": "s3",
        "root": f"{s3.bucket}/{uuid.uuid4().hex}", "config": config, "concurrency": None,
        "managed": False,
    }  # fmt: skip
    pool = StoragePool()
    with pytest.raises(StorageUnavailableError):
        pool.open(row).check()
    # nothing is copied from there nor to it, and the worker goes on
    disk = open_storage("disk", "posix", str(folder), {})
    task = CopyTask(
        uuid.uuid4(), "x", "y", PayloadKind.FILE, 1, "sha256:" + "0" * 64, (), uuid.uuid4().hex
    )
    for ends in ((pool.open(row), disk), (disk, pool.open(row))):
        (result,) = copy_batch(*ends, [task])
        assert isinstance(result.error, StorageUnavailableError | PayloadNotFoundError)
    (folder / "secret_key").write_text(s3.secret_key)
    pool.open(row).check()


def test_keys_are_kept_for_a_moment(folder, monkeypatch):
    """Small objects by the thousand do not read files for each request."""
    read, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(s3_keys, "time", SimpleNamespace(monotonic=lambda: clock.now))
    provider = s3_keys.KeyProvider(lambda: read.append(1) or {"access_key_id": "k"}, 0.2)
    assert [provider()["access_key_id"] for _ in range(100)] == ["k"] * 100
    assert len(read) == 1
    clock.now += 0.25
    provider()
    assert len(read) == 2


@pytest.fixture
def recorder():
    """A server that answers 404 and keeps the headers it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append({key.lower(): value for key, value in self.headers.items()})
            self.send_response(404)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def ask(storage, seen):
    """Which key and token the next request is signed with."""
    seen.clear()
    try:
        storage.stat("x")
    except StorageUnavailableError:
        pass  # the recorder is no S3 server
    sent = seen[0]
    return sent["authorization"].split("Credential=")[1].split("/")[0], sent.get(
        "x-amz-security-token"
    )


def test_a_session_token_goes_with_the_keys(folder, recorder):
    """Short-lived credentials that somebody else renews: each request has the newest."""
    endpoint, seen = recorder
    names = ("access_key", "secret_key", "session_token")
    config = {"endpoint": endpoint, **references(folder, *names)}
    for name in names:
        (folder / name).write_text(f"first-{name}")
    storage = open_storage("x", "s3", "bucket", config)
    assert ask(storage, seen) == ("first-access_key", "first-session_token")
    for name in names:
        rotate(folder / name, f"second-{name}")
    assert ask(storage, seen) == ("second-access_key", "second-session_token")


def test_without_references_aws_finds_the_keys(folder, recorder, monkeypatch):
    """Its own variables, or a profile of its credentials file, which may change too."""
    endpoint, seen = recorder
    monkeypatch.setattr(s3_keys, "CHAIN_SECONDS", 0.0)
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    storage = open_storage("x", "s3", "bucket", {"endpoint": endpoint})
    with pytest.raises(StorageUnavailableError, match="AWS"):
        storage.stat("x")
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    for key in ("of-a-file", "rotated"):
        rotate(folder / "credentials", text.format(key))
        assert ask(storage, seen) == (key, None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-a-variable")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t")
    time.sleep(0.15)
    assert ask(storage, seen) == ("of-a-variable", "t")
