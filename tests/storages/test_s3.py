"""What an S3 storage promises beyond the contract of all, on a real server."""

import hashlib
import io
import time
import uuid
from contextlib import contextmanager

import boto3
import obstore
import pytest

from dlm_core.errors import (
    AccessDeniedError,
    PathRefusedError,
    PayloadExistsError,
    StorageUnavailableError,
)
from dlm_core.storages import s3 as adapter
from dlm_core.storages.open import open_storage
from dlm_core.transfers.checksums import observe
from dlm_core.types import PayloadKind
from tests.backends import s3_config
from tests.payloads import put
from tests.servers import answering

PART = adapter.PART_SIZE


@pytest.fixture
def bucket(s3):
    return open_storage("bucket", "s3", f"{s3.bucket}/{uuid.uuid4().hex}", s3_config(s3))


def client(s3):
    """Somebody else's."""
    return boto3.client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1",
        aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
    )  # fmt: skip


def paths(storage, below=""):
    return [entry.path for entry in storage.walk(below)]


def calls(storage):
    """Every call of the port that asks the server."""
    return [
        lambda: storage.stat("x"),
        lambda: storage.stat_many([f"{n}" for n in range(20)]),
        lambda: list(storage.walk()),
        lambda: storage.open_read("x"),
        lambda: storage.rename("x", "y"),
        lambda: storage.remove("x"),
        storage.check,
    ]


def test_an_unreachable_server_is_an_outage_within_seconds(s3):
    """A closed port: no call waits long, none says that nothing is there."""
    config = s3_config(s3) | {"endpoint": "http://127.0.0.1:9"}
    storage = open_storage("dead", "s3", "bucket", config)
    writes = [lambda: put(storage, "x"), lambda: put(storage, "x", bytes(PART + 1))]
    for call in [*calls(storage), *writes]:
        begun = time.monotonic()
        with pytest.raises(StorageUnavailableError):
            call()
        assert time.monotonic() - begun < 20


def test_a_bucket_that_is_not_there_is_an_outage(s3):
    """As a root that vanished is on disk: it says nothing of what was in it."""
    storage = open_storage("gone", "s3", "no-such-bucket-here/prefix", s3_config(s3))
    for call in calls(storage):
        with pytest.raises(StorageUnavailableError):
            call()


def test_a_wrong_key_is_denied(s3, monkeypatch):
    """By every call; the message does not show the key."""
    monkeypatch.setenv("DLM_TEST_WRONG", "not-the-secret")
    config = s3_config(s3) | {"secret_key": "env:DLM_TEST_WRONG"}
    storage = open_storage("wrong", "s3", s3.bucket, config)
    for call in [*calls(storage), lambda: put(storage, "x")]:
        with pytest.raises(AccessDeniedError) as caught:
            call()
        assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["new\nline", "tab\t", "\x7f", "back\\slash", "not utf-8 \udcff", "a" * 1025]
)
def test_names_that_not_every_server_keeps_are_refused(bucket, name):
    """Before anything is sent."""
    with pytest.raises(PathRefusedError):
        put(bucket, name)


@pytest.mark.parametrize("size", [5, PART + 1])
def test_a_key_that_is_too_long_with_its_prefix_is_refused(bucket, size):
    """Not an outage, which would be tried again and again."""
    longest = 1024 - len(bucket.within.prefix)
    path = "/".join(["a" * 100] * 11)
    put(bucket, path[:longest], bytes(size))
    with pytest.raises(PathRefusedError, match="1024"):
        put(bucket, path[: longest + 1], bytes(size))


@pytest.mark.parametrize("first", [".a", "d/.a", "d/..."])
def test_a_name_of_a_dot_and_a_letter_is_found_among_others(bucket, first):
    """It begins the listing of all of them; before it there is what is no name to obstore."""
    put(bucket, first)
    found = bucket.stat_many([first, *(f"e/{n}" for n in range(20))])
    assert [path for path, entry in found.items() if entry] == [first]


@pytest.mark.parametrize("size", [0, 5, PART, PART + 1, 2 * PART, 3 * PART - 7])
def test_etags_are_digests_of_the_parts(bucket, size):
    """MD5 of a single part, or of the parts' MD5s: what a copy is verified by."""
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    part = bucket.part_size(size)
    parts = [hashlib.md5(data[n : n + part]).digest() for n in range(0, size, part)]
    expected = (
        hashlib.md5(data).hexdigest()
        if size <= PART
        else f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"
    )
    put(bucket, "x", data)
    assert bucket.stat("x").etag == expected
    assert bucket.stat_many(["x"])["x"].etag == expected


@pytest.mark.parametrize("size", [1, PART, PART + 1, 80 << 30, 1 << 40, 5 << 40])
def test_no_upload_has_too_many_parts(size):
    """S3 takes 10,000 parts of at least 5 MiB and at most 5 GiB."""
    part = adapter.S3Storage.part_size(size)
    assert -(-size // part) <= 10_000 and 5 << 20 <= part <= 5 << 30


def test_an_upload_that_breaks_off_leaves_nothing(bucket, s3):
    """No object, and no parts that somebody pays for."""

    class Broken(io.RawIOBase):
        left = 3 * PART

        def read(self, size=-1):
            self.left -= size
            if self.left < 0:
                raise ConnectionResetError("gone")
            return bytes(size)

    with pytest.raises(ConnectionResetError):
        bucket.write("x", Broken(), 4 * PART)
    assert bucket.stat("x") is None
    prefix = bucket.within.prefix
    assert (
        client(s3).list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix).get("Uploads", []) == []
    )


class Disturbed(io.BytesIO):
    """Bytes at whose end, before it is told, something happens."""

    def __init__(self, data, happens):
        super().__init__(data)
        self.happens = happens

    def read(self, size=-1, /):
        block = super().read(size)
        if not block:
            self.happens()
        return block


@pytest.mark.parametrize("size", [PART, PART + 1, 3 * PART])
def test_what_came_while_an_object_was_written_stays(bucket, s3, monkeypatch, size):
    """However many parts it has, the server makes it only if nothing has its name by then, though
    a look just before found nothing; ours leaves no parts behind."""
    by_key = {"Bucket": s3.bucket, "Key": f"{bucket.within.prefix}x"}
    monkeypatch.setattr(type(bucket), "_must_be_free", lambda *_: None)
    theirs = Disturbed(bytes(size), lambda: client(s3).put_object(**by_key, Body=b"theirs"))
    with pytest.raises(PayloadExistsError):
        bucket.write("x", theirs, size)
    with bucket.open_read("x") as stream:
        assert stream.read() == b"theirs"
    left = client(s3).list_multipart_uploads(Bucket=s3.bucket, Prefix=by_key["Key"])
    assert left.get("Uploads", []) == []


def test_many_are_found_among_many_others(bucket, monkeypatch):
    """A listing that is cut short is completed by name; nothing is told as absent for it."""
    monkeypatch.setattr(adapter, "_LISTED_FOR_ONE", 0)
    for n in range(60):
        put(bucket, f"d/{n:03}", b"x" * n)
    put(bucket, "z/last", b"z")
    found = bucket.stat_many([*(f"d/{n:03}" for n in range(0, 80, 2)), "z/last", "a"])
    assert {path: entry and entry.size for path, entry in found.items()} == {
        **{f"d/{n:03}": (n if n < 60 else None) for n in range(0, 80, 2)}, "z/last": 1, "a": None,
    }  # fmt: skip


def test_renaming_a_tree_that_was_cut_off_is_completed(bucket, monkeypatch):
    """In the middle of copying, and in the middle of deleting: all files arrive, none is lost."""
    for phase in ("copy", "delete"):
        tree, to = f"{phase}/tree", f".dlm/trash/{phase}"
        for n in range(5):
            put(bucket, f"{tree}/{n}", b"%d" % n)
        with monkeypatch.context() as patch:
            real, done = getattr(obstore, phase), []

            def cut(store, what, *rest, real=real, done=done, **options):
                done.append(what)
                if isinstance(what, list):
                    real(store, what[:2])
                elif len(done) < 3:
                    return real(store, what, *rest, **options)
                raise KeyboardInterrupt

            patch.setattr(obstore, phase, cut)
            with pytest.raises(KeyboardInterrupt):
                bucket.rename(tree, to)
        bucket.rename(tree, to)
        assert paths(bucket, to) == [f"{to}/{n}" for n in range(5)]
        assert bucket.stat(tree) is None


@pytest.mark.parametrize("tree", [False, True])
def test_what_was_put_there_during_a_rename_is_not_deleted(bucket, monkeypatch, tree):
    """A rename is copy and delete, and may be slow: newer bytes in the old place stay."""
    source = f"{uuid.uuid4().hex}" + ("/a" if tree else "")
    put(bucket, source, b"old")
    real = obstore.copy

    def copy(*arguments, **options):
        real(*arguments, **options)
        bucket.remove(source)
        put(bucket, source, b"new")

    monkeypatch.setattr(obstore, "copy", copy)
    with pytest.raises(StorageUnavailableError, match="changed while it was moved"):
        bucket.rename(source.partition("/")[0], ".dlm/trash/it")
    with bucket.open_read(source) as stream:
        assert stream.read() == b"new"


def into(bucket, call, where, monkeypatch):
    """Let somebody put an object to ``where`` between the look there and the copy."""
    real = obstore.copy

    def copy(*arguments, **options):
        monkeypatch.undo()
        put(bucket, where, b"theirs")
        real(*arguments, **options)

    monkeypatch.setattr(obstore, "copy", copy)
    with pytest.raises(PayloadExistsError):
        call()
    with bucket.open_read(where) as stream:
        assert stream.read() == b"theirs"


def test_a_rename_replaces_nothing_that_came_after_its_look(bucket, monkeypatch):
    """What goes stays where it is, what came stays too; of a tree as of a file."""
    put(bucket, "x", b"mine")
    into(bucket, lambda: bucket.rename("x", "y"), "y", monkeypatch)
    put(bucket, "tree/x", b"mine")
    into(bucket, lambda: bucket.rename("tree", "there"), "there/x", monkeypatch)
    assert paths(bucket) == ["there/x", "tree/x", "x", "y"]


def test_a_copy_by_the_server_replaces_nothing_that_came_after_its_look(bucket, monkeypatch):
    """Within a bucket, where it is one request."""
    put(bucket, "x", b"mine")
    into(bucket, lambda: bucket.copy_from(bucket, "x", "y", 4, lambda _: None), "y", monkeypatch)


@pytest.fixture
def dumb(monkeypatch):
    """Another server for the bucket's conditional copies, which answers a status to all."""
    real, asked = obstore.copy, []
    monkeypatch.setenv("DLM_TEST_KEY", "k")
    key = "env:DLM_TEST_KEY"

    @contextmanager
    def answers(status):
        with answering(status) as (url, heard):
            other = open_storage(
                "dumb", "s3", "bucket", {"endpoint": url, "access_key": key, "secret_key": key}
            )

            def copy(store, *rest, **options):
                asked.append(options)
                return real(other._store if options else store, *rest, **options)

            monkeypatch.setattr(obstore, "copy", copy)
            yield asked, heard

    return answers


@pytest.mark.parametrize("status", [501, 405])
def test_a_server_that_knows_no_condition_of_copies_is_asked_without(bucket, dumb, status):
    """Once; the key is looked at just before in any case."""
    put(bucket, "x", b"1")
    put(bucket, "y", b"2")
    with dumb(status) as (asked, heard):
        bucket.rename("x", "a")
        bucket.rename("y", "b")
    assert heard[0][2].get("if-none-match") == "*"
    assert asked == [{"overwrite": False}, {}, {}]
    assert paths(bucket) == ["a", "b"]


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("page", [b"<html>at rest<br></html>", b"<html>at rest</html>", b""])
def test_a_page_of_a_gateway_in_place_of_an_answer_is_an_outage(page, status, monkeypatch):
    """With a status of success, as of a service that is maintained."""
    monkeypatch.setenv("DLM_TEST_KEY", "any")
    keys = {"access_key": "env:DLM_TEST_KEY", "secret_key": "env:DLM_TEST_KEY"}
    with answering(status, {"Content-Type": "text/html"}, page) as (url, _):
        storage = open_storage("x", "s3", "bucket/p", keys | {"endpoint": url})
        data = bytes(PART + 1)
        calls = [
            lambda: storage._parts.create("y", io.BytesIO(data), PART, lambda: None),
            lambda: storage._parts.copy("bucket", "k", "y", 9, print, lambda: None),
        ]
        for call in calls:
            with pytest.raises(StorageUnavailableError):
                call()


def test_what_is_written_there_at_the_moment_is_not_replaced(bucket, dumb):
    """AWS answers 409 while somebody else writes the key: an outage, until it is over."""
    put(bucket, "x", b"1")
    with dumb(409) as (asked, _), pytest.raises(StorageUnavailableError, match="written to y"):
        bucket.rename("x", "y")
    assert asked == [{"overwrite": False}]
    assert paths(bucket) == ["x"]


def test_a_tree_is_not_mixed_with_another(bucket):
    """Other objects below the destination: nothing is moved."""
    put(bucket, "tree/a", b"mine")
    put(bucket, "there/a", b"theirs")
    with pytest.raises(PayloadExistsError):
        bucket.rename("tree", "there")
    put(bucket, "other/b", b"theirs")
    with pytest.raises(PayloadExistsError):
        bucket.rename("tree", "other")
    assert paths(bucket, "tree") == ["tree/a"]


def test_objects_too_large_for_a_server_side_copy_are_renamed(bucket, monkeypatch):
    """S3 copies up to 5 GiB by one request; larger ones in parts."""
    monkeypatch.setattr(adapter, "_COPY_LIMIT", PART)
    data = bytes(range(256)) * (9 << 12)
    put(bucket, "big", data)
    bucket.rename("big", "moved")
    assert bucket.stat("big") is None and bucket.stat("moved").size == len(data)
    with bucket.open_read("moved") as stream:
        assert stream.read() == data


def test_a_file_goes_without_what_only_begins_with_its_name(bucket):
    """An object store may have x and x/y: two payloads, of which one goes alone."""
    for name in ("x", "x/y", "tree/y"):
        put(bucket, name)
    bucket.rename("x", ".dlm/trash/uid")
    with pytest.raises(PayloadExistsError):
        bucket.rename("x", ".dlm/trash/uid")  # a crash came after it: it is done again
    assert paths(bucket) == ["tree/y", "x/y"]
    put(bucket, "z")
    put(bucket, "z/y")
    bucket.remove("z")
    assert paths(bucket) == ["tree/y", "x/y", "z/y"]
    bucket.remove("tree")
    assert paths(bucket) == ["x/y", "z/y"]


def test_one_of_two_that_clear_the_same_file_leaves_what_only_begins_with_its_name(bucket):
    """Whoever comes second finds no object of that name any more, only those below it."""
    put(bucket, "x")
    put(bucket, "x/y")
    for _ in range(2):
        bucket.remove_file("x")
    assert paths(bucket) == ["x/y"]


def test_an_object_that_stands_for_a_folder_is_no_file(bucket, s3):
    """Consoles make one, empty, whose name ends in a slash: of the storage's own folder, of a
    payload, and within. It is not listed, and in nobody's way."""
    for name in ("tree/sub/one", "tree/empty", "two"):
        put(bucket, name, b"" if name == "tree/empty" else b"payload")
    for folder in ("", "tree/", "tree/sub/", "nothing/"):
        client(s3).put_object(Bucket=s3.bucket, Key=f"{bucket.within.prefix}{folder}", Body=b"")
    assert paths(bucket) == ["tree/empty", "tree/sub/one", "two"]
    assert paths(bucket, "tree") == ["tree/empty", "tree/sub/one"]
    assert bucket.stat("nothing") is None and bucket.stat("tree/sub").kind == "directory"
    many = [*(f"tree/{n}" for n in range(20)), "tree/sub", "tree/empty"]
    found = {path: entry.kind for path, entry in bucket.stat_many(many).items() if entry}
    assert found == {"tree/sub": "directory", "tree/empty": "file"}
    seen = observe(bucket, "tree", PayloadKind.DIRECTORY)
    assert [one.path for one in seen.manifest] == ["empty", "sub/one"]
    bucket.rename("tree", ".dlm/trash/uid")
    assert bucket.stat("tree") is None
    assert paths(bucket, ".dlm/trash/uid") == [f".dlm/trash/uid/{n}" for n in ("empty", "sub/one")]
    bucket.remove(".dlm/trash/uid")
    assert paths(bucket) == ["two"] and bucket.stat(".dlm/trash/uid") is None
