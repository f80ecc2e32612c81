"""``dlm storage usage`` and ``dlm item list --lost``."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3

from dlm_cli.s3_server import S3Server
from dlm_core.storages.open import open_storage
from tests.backends import s3_config
from tests.cli.site import Dlm, refused


def test_what_lies_on_a_bucket_is_told_beside_what_is_counted(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], s3: S3Server
) -> None:
    """Copies, directory payloads too, the trash and the DLM's own; and what is somebody else's, by
    name. Without a listing only what the catalogue counts."""
    root, config = f"{s3.bucket}/{uuid.uuid4().hex}", s3_config(s3)
    pairs = [part for key, value in config.items() for part in ("--config", f"{key}={value}")]
    at = ["--location", "there", "--interface", "s3", "--root", root]
    assert dlm("storage", "add", "bucket", *at, *pairs).code == 0
    (storages["a"] / "x.ms").mkdir()
    (storages["a"] / "x.ms" / "table").write_bytes(b"12345")
    (storages["a"] / "one").write_bytes(b"123")
    assert dlm("storage", "set", "b", "--mode", "offline").code == 0
    register = ["register", "a", "--scheme", "ska", "--target-phase", "SOLID"]
    assert dlm(*register, "--as-directory", "*.ms").code == 0
    settle()
    bucket = open_storage("bucket", "s3", root, config)
    bucket.write("theirs/file", io.BytesIO(b"1234567"), 7)
    bucket.write(".dlm/trash/of-old", io.BytesIO(b"1"), 1)
    told = dlm("storage", "usage", "bucket", "--inventory", "--json").json
    assert (told["replicas"], told["used_bytes"]) == (2, 8)
    assert (told["copies_files"], told["copies_bytes"]) == (2, 8)
    assert (told["foreign_files"], told["foreign_bytes"]) == (1, 7)
    assert (told["trash_files"], told["trash_bytes"]) == (1, 1)
    assert told["foreign_first"] == ["theirs/file"]
    assert "not the DLM's: 'theirs/file'" in dlm("storage", "usage", "bucket", "--inventory").out
    plain = dlm("storage", "usage", "bucket", "--json").json
    assert plain["used_bytes"] == 8 and "copies_files" not in plain


def test_what_a_disk_says_of_itself_is_told_beside_what_is_counted(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """The catalogue's own count of copies, those in the trash included, and what the file system
    told when it was asked last."""
    (storages["a"] / "x").write_bytes(b"payload")
    assert dlm("register", "a", "--scheme", "ska", "--target-phase", "LIQUID").code == 0
    settle()
    told = dlm("storage", "usage", "a", "--json").json
    assert (told["replicas"], told["replica_bytes"], told["trashed_bytes"]) == (1, 7, 0)
    assert told["observed_at"] is not None
    assert told["observed_used_bytes"] == told["used_bytes"] > 7
    assert told["observed_total_bytes"] == told["capacity_bytes"]
    assert dlm("expire", "ska:x", "--reason", "done").code == 0
    settle()
    told = dlm("storage", "usage", "a", "--json").json
    assert (told["replica_bytes"], told["trashed_bytes"]) == (7, 7)


def test_what_a_bucket_keeps_of_old_versions_is_told(
    dlm: Dlm, storages: dict[str, Path], s3: S3Server
) -> None:
    """It takes room and is paid for, though no listing shows it."""
    config, name = s3_config(s3), f"v-{uuid.uuid4().hex[:20]}"
    client = boto3.client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1",
        aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
    )  # fmt: skip
    client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    pairs = [part for key, value in config.items() for part in ("--config", f"{key}={value}")]
    at = ["--location", "there", "--interface", "s3", "--root", f"{name}/root"]
    assert dlm("storage", "add", "bucket", *at, *pairs).code == 0
    for key, body in (("root/x", b"1"), ("root/x", b"22"), ("root/y", b"333"), ("beside", b"4")):
        client.put_object(Bucket=name, Key=key, Body=body)
    client.delete_object(Bucket=name, Key="root/y")
    told = dlm("storage", "usage", "bucket", "--inventory", "--json").json
    assert (told["foreign_files"], told["foreign_bytes"]) == (1, 2)
    assert (told["old_versions_files"], told["old_versions_bytes"]) == (2, 4)
    here = dlm("storage", "usage", "a", "--inventory", "--json").json
    assert here["old_versions_files"] == 0


def test_a_storage_that_cannot_be_listed_is_told(dlm: Dlm, storages: dict[str, Path]) -> None:
    """As an outage, and what is not there as bad input."""
    storages["a"].rename(storages["a"].parent / "away")
    refused(dlm("storage", "usage", "a", "--inventory"), "DLM-301", 4)
    refused(dlm("storage", "usage", "nowhere"), "DLM-102", 2)


def test_items_without_a_good_copy_are_listed(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """As a table and as JSON."""
    (storages["a"] / "x").write_bytes(b"payload")
    assert dlm("register", "a", "--scheme", "ska", "--target-phase", "LIQUID").code == 0
    settle()
    assert dlm("item", "list", "--lost", "--json").json == []
    assert dlm("storage", "lost", "a", "--reason", "fire").code == 0
    found = json.loads(dlm("item", "list", "--lost", "--json").out)
    assert [item["uri"] for item in found] == ["ska:x"]
    assert "ska:x" in dlm("item", "list", "--lost").out
