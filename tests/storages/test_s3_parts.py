"""An upload to S3 that was interrupted goes on where it was, and makes no object of other bytes."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from dlm_core.errors import PayloadExistsError, SourceDamagedError, StorageUnavailableError
from dlm_core.storages import s3 as adapter
from dlm_core.storages import s3_parts
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.open import open_storage
from dlm_core.storages.s3_parts import Room
from dlm_core.storages.staging import StageTerms
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.reading import HashingReader
from dlm_core.transfers.sweep import sweep_parts
from dlm_core.transfers.throttle import Watched, paced
from dlm_core.types import PayloadKind
from tests.backends import archive_config, s3_config
from tests.wire import Line, line_to

#: the smallest that S3 takes
PART = 5 << 20
DATA = os.urandom(4 * PART + 1000)
SOON = datetime.now(UTC) + timedelta(days=3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Less to send."""
    monkeypatch.setattr(adapter, "PART_SIZE", PART)


@pytest.fixture
def line(s3):
    with line_to(int(s3.endpoint.rpartition(":")[2])) as line:
        yield line


@pytest.fixture
def root(s3):
    return f"{s3.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def bucket(s3, line, root):
    """A storage whose line to its server can be cut."""
    return open_storage("bucket", "s3", root, s3_config(s3) | {"endpoint": at(line)})


def at(line: Line) -> str:
    return f"http://127.0.0.1:{line.port}"


@pytest.fixture
def client(s3):
    """Somebody else's, past the line."""
    return boto3.client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1",
        aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
    )  # fmt: skip


@pytest.fixture
def by_key(client, root):
    """What names the object 'x' of the storage."""
    name, _, prefix = root.partition("/")
    return {"Bucket": name, "Key": f"{prefix}/x"}


def free(_: int) -> None:
    pass


def write(storage: Any, data: bytes = DATA, path: str = "x", sending: Any = free) -> str:
    etag: str = storage.write_in_parts(path, io.BytesIO(data), len(data), sending)
    return etag


class Breaking(io.BytesIO):
    """Data whose reading ends in an error after so many bytes."""

    def __init__(self, data: bytes, after: int) -> None:
        super().__init__(data)
        self.after = after

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self.after:
            raise StorageUnavailableError(storage="source", message="the line is cut")
        return super().read(size)


def begin(storage: Any, after: int = 2 * PART, data: bytes = DATA, path: str = "x") -> None:
    """An upload that its source ends after so many bytes."""
    with pytest.raises(StorageUnavailableError):
        storage.write_in_parts(path, Breaking(data, after), len(data), free)
    assert storage.stat(path) is None


def uploads(client: Any, bucket: str, prefix: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get(
        "Uploads", []
    )
    return found


def read(storage: Any, path: str = "x") -> bytes:
    with storage.open_read(path) as stream:
        found: bytes = stream.read()
    return found


def etag_of(data: bytes) -> str:
    parts = [hashlib.md5(data[n : n + PART]).digest() for n in range(0, len(data), PART)]
    return f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def is_near(sent: int, size: int) -> bool:
    """Whether that many bytes and some headers were sent."""
    return size <= sent < size + 100_000


def test_only_what_is_missing_is_sent(bucket, line, client, by_key):
    """Counted on the wire: two of five parts are there, three go over."""
    begin(bucket, 2 * PART)
    line.mend()
    told: list[int] = []
    assert write(bucket, sending=told.append) == etag_of(DATA) == bucket.stat("x").etag
    assert is_near(line.sent, 2 * PART + 1000) and sum(told) == 2 * PART + 1000
    assert read(bucket) == DATA
    assert uploads(client, *by_key.values()) == []


def test_an_upload_goes_on_after_an_outage(bucket, line, monkeypatch):
    """The line is cut in the middle of a part: those that came through are not sent again."""
    monkeypatch.setattr(s3_parts, "_SENT_AT_ONCE", PART)
    line.cut_after(2 * PART + PART // 2)
    with pytest.raises(StorageUnavailableError):
        write(bucket)
    line.mend()
    write(bucket)
    assert is_near(line.sent, 2 * PART + 1000) and read(bucket) == DATA


def test_a_part_that_is_damaged_on_the_wire_is_refused(bucket, line):
    """By its MD5, which goes with it: the try fails, and the next one sends that part again."""
    line.flip_after(PART // 2)
    with pytest.raises(StorageUnavailableError, match=r"BadDigest|Content-M[dD]5"):
        write(bucket)
    assert bucket.stat("x") is None
    line.mend()
    write(bucket)
    assert line.sent >= PART and read(bucket) == DATA


def test_parts_of_a_source_that_changed_are_sent_anew(bucket, line):
    """What is there counts only as far as it is what the source gives now."""
    begin(bucket, 2 * PART)
    other = DATA[:PART] + os.urandom(PART) + DATA[2 * PART :]
    line.mend()
    assert write(bucket, other) == etag_of(other)
    assert is_near(line.sent, 3 * PART + 1000) and read(bucket) == other


def test_a_source_that_is_damaged_makes_no_object(bucket, client, by_key):
    """Its parts stay for the next source, which may have the same but for one."""
    bad = DATA[: 3 * PART] + b"!" + DATA[3 * PART + 1 :]
    digest = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    reader = HashingReader(io.BytesIO(bad), len(bad), digest, "a:x", None, threading.Event(), None)
    with pytest.raises(SourceDamagedError):
        bucket.write_in_parts("x", reader, len(bad), free)
    assert bucket.stat("x") is None
    told: list[int] = []
    write(bucket, sending=told.append)
    # the damaged one, and the last: of that the end was never handed out
    assert sum(told) == PART + 1000 and read(bucket) == DATA


def test_a_late_worker_makes_no_other_object(bucket, client, by_key, monkeypatch):
    """It puts other bytes in the place of a part after we sent ours: either the completion takes
    ours by their ETag, or it fails; the next try makes it right."""
    begin(bucket, 2 * PART)
    (upload,) = uploads(client, *by_key.values())
    late = {**by_key, "UploadId": upload["UploadId"], "PartNumber": 2}
    first = iter([True])

    def sending(size: int) -> None:
        if next(first, False):
            client.upload_part(**late, Body=os.urandom(PART))

    write(bucket, sending=sending)
    assert read(bucket) == DATA
    with pytest.raises(ClientError, match="NoSuchUpload"):
        client.upload_part(**late, Body=os.urandom(PART))
    assert read(bucket) == DATA


def test_a_part_that_was_replaced_fails_the_completion(archive):
    """On a server that keeps the newest of a part only, as S3 does: no object; the next try sends
    that part again."""
    name = archive.make_bucket()
    terms = archive_config(archive)
    config = {key: terms[key] for key in ("endpoint", "access_key", "secret_key")}
    storage = open_storage("bucket", "s3", f"{name}/p", config)
    stranger = boto3.client(
        "s3", endpoint_url=archive.endpoint, region_name="us-east-1",
        aws_access_key_id="any", aws_secret_access_key="any",
    )  # fmt: skip
    begin(storage, 2 * PART)
    (upload,) = uploads(stranger, name)
    late = {"Bucket": name, "Key": "p/x", "UploadId": upload["UploadId"], "PartNumber": 1}
    told: list[int] = []

    def sending(size: int) -> None:
        told.append(size)
        stranger.upload_part(**late, Body=os.urandom(PART))

    with pytest.raises(StorageUnavailableError, match="InvalidPart"):
        write(storage, sending=sending)
    assert storage.stat("x") is None
    told.clear()
    write(storage, sending=told.append)
    assert told == [PART] and read(storage) == DATA


def test_a_completion_that_cannot_be_begins_anew(bucket, client, by_key, monkeypatch):
    """The server refuses parts in which nothing wrong is to be seen: it would refuse them again."""
    begin(bucket, 2 * PART)
    refuse(bucket, monkeypatch, "complete_multipart_upload", "InvalidPart", times=1)
    with pytest.raises(StorageUnavailableError, match="InvalidPart"):
        write(bucket)
    assert uploads(client, *by_key.values()) == []
    write(bucket)
    assert read(bucket) == DATA


def refuse(storage: Any, monkeypatch: Any, call: str, code: str, times: int = 10**6) -> list[Any]:
    """Let the server answer ``code`` to the next calls of a kind; what they were asked with."""
    client = storage._parts._s3.connected()
    real, asked = getattr(client, call), []

    def answer(**asked_with: Any) -> Any:
        asked.append(asked_with)
        if len(asked) > times:
            return real(**asked_with)
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, call)

    monkeypatch.setattr(client, call, answer)
    monkeypatch.setattr(storage._parts._s3, "connected", lambda: client)
    return asked


def test_a_server_that_knows_no_condition_is_asked_without(bucket, monkeypatch):
    """The key is looked at just before in any case."""
    asked = refuse(bucket, monkeypatch, "complete_multipart_upload", "NotImplemented", times=1)
    write(bucket)
    assert ["IfNoneMatch" in one for one in asked] == [True, False]
    assert read(bucket) == DATA
    write(bucket, path="y")
    assert "IfNoneMatch" not in asked[-1]


@pytest.mark.parametrize("looks", [True, False])
def test_what_came_to_the_place_meanwhile_stays(bucket, client, by_key, monkeypatch, looks):
    """Found by a look, or by the server itself as it completes: ours is dropped, with its parts."""
    name = by_key["Bucket"]

    def sending(_: int) -> None:
        client.put_object(**by_key, Body=b"theirs")

    if looks:
        monkeypatch.setattr(bucket._parts, "_conditional", {})
    else:
        monkeypatch.setattr(type(bucket), "_must_be_free", lambda *_: None)
    with pytest.raises(PayloadExistsError):
        write(bucket, sending=sending)
    assert read(bucket) == b"theirs" and uploads(client, name, by_key["Key"]) == []
    if looks:
        with pytest.raises(PayloadExistsError):
            write(bucket)


def test_the_fullest_of_several_uploads_is_gone_on_from(bucket, client, by_key):
    """Of one key only: another that begins with the same letters is another."""
    begin(bucket, 3 * PART, path="xyz")
    begin(bucket, 2 * PART)
    (first,) = [one for one in uploads(client, *by_key.values()) if one["Key"] == by_key["Key"]]
    client.create_multipart_upload(**by_key)
    told: list[int] = []
    write(bucket, sending=told.append)
    assert sum(told) == 2 * PART + 1000 and read(bucket) == DATA
    left = uploads(client, *by_key.values())
    assert first["UploadId"] not in [one["UploadId"] for one in left] and len(left) == 2


def test_an_upload_that_could_not_be_found_again_is_dropped(bucket, client, by_key, monkeypatch):
    """Who may not list uploads, or has a server without that, begins anew and leaves nothing."""
    page = bucket._parts

    def refused(*_: Any) -> Any:
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "ListMultipartUploads")
        yield

    monkeypatch.setattr(page, "_unfinished", refused)
    begin(bucket)
    assert uploads(client, *by_key.values()) == []
    write(bucket)
    assert read(bucket) == DATA


def test_parts_that_are_there_take_none_of_the_pace(bucket):
    """A limit on what is written counts what is sent."""
    begin(bucket, 2 * PART)
    counted: list[int] = []
    slow = paced(bucket, [], [Watched(counted.append)])
    write(slow)
    assert sum(counted) == 2 * PART + 1000


def test_a_large_copy_is_proven_by_its_etag(bucket, tmp_path):
    """Nothing is read back, and progress is told for all that is read."""
    (tmp_path / "x").write_bytes(DATA)
    source = open_storage("a", "posix", str(tmp_path), {})
    digest = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    task = CopyTask(uuid.uuid4(), "x", "x", PayloadKind.FILE, len(DATA), digest, (), "t")
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bucket), "open_read_at", None)
        (result,) = copy_batch(source, bucket, [task], progress=told.append, resume_bytes=PART)
    assert result.error is None and sum(told) == len(DATA)
    assert read(bucket) == DATA


def test_what_was_just_uploaded_to_a_cold_storage_is_online(bucket):
    """Like all that was written a moment ago."""

    class Offline:
        def online(self, _: Any) -> set[str]:
            return set()

    cold = ColdStorage(bucket, Offline(), StageTerms(stage="x"))  # type: ignore[arg-type]
    write(cold)
    assert read(cold) == DATA


# --- the sweep --------------------------------------------------------------------------------


def sweep(storage: Any, owned: dict[str, bool] | None = None, now: datetime = SOON) -> int:
    known = owned or {}
    return sweep_parts(
        storage, timedelta(days=2), now, lambda paths: {p: known[p] for p in paths if p in known}
    )


def test_uploads_that_nobody_goes_on_with_are_ended(bucket, client, by_key):
    """Old ones below the storage's prefix; neither young ones nor those of other prefixes, be they
    as old and their names as like."""
    name, key = by_key.values()
    begin(bucket, 2 * PART)
    others = [f"{key.partition('/')[0]}-other/x", "other/x"]
    for other in others:
        client.create_multipart_upload(Bucket=name, Key=other)
    assert sweep(bucket, now=datetime.now(UTC)) == 0
    assert sweep(bucket) == 1
    prefix = key.partition("/")[0]
    assert [one["Key"] for one in uploads(client, name, prefix)] == others[:1]
    assert [one["Key"] for one in uploads(client, name, "other/")] == others[1:]


def test_the_fullest_upload_of_a_copy_that_will_be_made_stays(bucket, client, by_key):
    """However old; others of its key go."""
    name, key = by_key.values()
    begin(bucket, 2 * PART)
    for _ in range(2):
        client.create_multipart_upload(**by_key)
    assert sweep(bucket, {"x": True}) == 2
    assert len(uploads(client, name, key)) == 1
    told: list[int] = []
    write(bucket, sending=told.append)
    assert sum(told) == 2 * PART + 1000
    begin(bucket, 4 * PART, path="y")
    assert sweep(bucket, {"y": False}) == 1


def test_in_a_whole_bucket_only_what_is_ours_is_ended(s3, client):
    """Others may have a part in it: what the catalogue does not know of is left alone."""
    name = f"b{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    storage = open_storage("whole", "s3", name, s3_config(s3))
    for key in ("theirs/x", "ours/x", ".dlm/bundles/tar/1.tar"):
        client.create_multipart_upload(Bucket=name, Key=key)
    assert sweep(storage, {"ours/x": False}) == 2
    assert [one["Key"] for one in uploads(client, name)] == ["theirs/x"]


def test_what_was_touched_lately_is_not_old(bucket, client, by_key, monkeypatch):
    """An upload that began long ago and had a part today is somebody's."""
    begin(bucket, 2 * PART)
    real = bucket._parts._unfinished

    def older(*arguments: Any) -> Any:
        for one in real(*arguments):
            one.initiated -= 10 * 86400
            yield one

    monkeypatch.setattr(bucket._parts, "_unfinished", older)
    assert sweep(bucket, now=datetime.now(UTC)) == 0
    assert sweep(bucket) == 1


def test_a_sweep_that_is_refused_says_so(bucket, monkeypatch):
    """Somebody has to give the right, or pay for the parts."""
    from dlm_core.errors import AccessDeniedError

    begin(bucket, 2 * PART)
    refuse(bucket, monkeypatch, "abort_multipart_upload", "AccessDenied")
    with pytest.raises(AccessDeniedError):
        sweep(bucket)


def test_room_is_bounded():
    """One who wants more than there is waits for all of it, and is not overtaken for ever."""
    room = Room(4)
    assert room.take(1) == 1 and room.take(2 << 20) == 2
    got: list[int] = []
    large = threading.Thread(target=lambda: got.append(room.take(100 << 20)))
    large.start()
    large.join(0.1)
    assert got == []
    room.give(3)
    large.join(60)
    assert got == [4]
