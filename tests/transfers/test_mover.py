"""Only whole, verified copies become visible."""

import errno
import hashlib
import os
import threading
import uuid
from dataclasses import replace

import pytest

from dlm_core.errors import DestinationDamagedError, SourceDamagedError, StorageFullError
from dlm_core.storages.open import open_storage
from dlm_core.transfers.checksums import manifest_digest, observe
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import ManifestEntry, PayloadKind
from tests.backends import open_dav, s3_config
from tests.fakes import Cut, Hooked, Packing, QuotaStorage, Tampering
from tests.payloads import put


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    return open_storage("source", "posix", str(root), {})


def task(source, path, data, *, digest=None, destination=None):
    file = os.path.join(source.root, path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(data)
    found = digest or "sha256:" + hashlib.sha256(data).hexdigest()
    return CopyTask(
        uuid.uuid4(), path, destination or f"copy/{path}", PayloadKind.FILE, len(data), found, (),
        uuid.uuid4().hex,
    )  # fmt: skip


def leftovers(storage):
    return [] if storage.stat(".dlm/tmp") is None else list(storage.walk(".dlm/tmp"))


_SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 8 << 20)]


@pytest.mark.parametrize("size", [0, 10_000, (8 << 20) + 5, 30 << 20, *_SLOW])
def test_a_copy_has_the_bytes_of_its_source(source, storage, size):
    """Any size, to any storage; no temporary file stays."""
    data = os.urandom(size)
    (result,) = copy_batch(source, storage, [task(source, "a/x", data)])
    assert result.error is None
    seen = observe(storage, "copy/a/x")
    assert (seen.size, seen.digest) == (size, "sha256:" + hashlib.sha256(data).hexdigest())
    assert leftovers(storage) == []


def test_many_files_in_one_batch(source, storage):
    """More than one sub-batch; each task has its own result."""
    # who packs after every change has enough of a few
    count = 20 if isinstance(storage, Packing) else 160
    tasks = [task(source, f"{n}", b"%d" % n) for n in range(count)]
    results = list(copy_batch(source, storage, tasks))
    assert [r.error for r in results] == [None] * count
    assert len(list(storage.walk())) == count


@pytest.mark.parametrize("size", [10, pytest.param(20 << 20, marks=pytest.mark.slow)])
def test_a_damaged_source_is_never_visible(source, storage, size):
    """Bytes that are not what the catalogue says do not appear, the others do."""
    bad = task(source, "bad", os.urandom(size), digest="sha256:" + "0" * 64)
    good = task(source, "good", b"good")
    by_path = {r.task.source_path: r for r in copy_batch(source, storage, [bad, good])}
    assert by_path["bad"].error.code == "DLM-401"
    assert by_path["good"].error is None
    assert [entry.path for entry in storage.walk()] == ["copy/good"]
    assert leftovers(storage) == []


@pytest.mark.parametrize("size", [5, 3 << 20])
def test_a_source_of_another_size_is_damaged(source, storage, size):
    """Grown or shrunk since it was catalogued."""
    data = os.urandom(size)
    grown, shrunk = task(source, "grown", data), task(source, "shrunk", data)
    for name, other in (("grown", data + b"6"), ("shrunk", data[:-1])):
        with open(os.path.join(source.root, name), "wb") as stream:
            stream.write(other)
    results = list(copy_batch(source, storage, [grown, shrunk]))
    assert [r.error.code for r in results] == ["DLM-401", "DLM-401"]
    assert list(storage.walk()) == []


def test_bytes_changed_on_the_way_are_noticed_at_the_destination(source, storage):
    """Verification at the destination removes the copy."""
    (result,) = copy_batch(source, Tampering(storage), [task(source, "x", b"payload")])
    assert result.error.code == "DLM-402" and result.error.retryable
    assert list(storage.walk()) == [] and leftovers(storage) == []


def test_what_an_earlier_try_left_whole_is_adopted(source, storage):
    """The same bytes at the destination: success, nothing written."""
    one = task(source, "x", b"payload")
    list(copy_batch(source, storage, [one]))
    (again,) = copy_batch(source, storage, [one])
    assert again.error is None and leftovers(storage) == []


def test_other_bytes_at_the_destination_stay(source, storage):
    """Something else lies there: an error, and it is left alone."""
    list(copy_batch(source, storage, [task(source, "x", b"theirs")]))
    (result,) = copy_batch(source, storage, [task(source, "x", b"ours!!")])
    assert result.error.code == "DLM-304"
    assert observe(storage, "copy/x").digest == "sha256:" + hashlib.sha256(b"theirs").hexdigest()
    assert leftovers(storage) == []


@pytest.mark.parametrize(
    ("name", "other"), [("x.dat", "X.dat"), ("a/1", "A/1"), ("\u00fc", "u\u0308")]
)
def test_a_file_of_another_name_is_not_adopted(source, folding, name, other):
    """Where case or the form of a letter makes no other file: two items of the same bytes would
    have one copy between them, which counts twice and goes with the first that is deleted."""
    storage = open_dav(folding)
    first, second = task(source, name, b"same"), task(source, other, b"same")
    assert [one.error for one in copy_batch(source, storage, [first])] == [None]
    (result,) = copy_batch(source, storage, [second])
    assert result.error.code == "DLM-304" and leftovers(storage) == []
    assert observe(storage, f"copy/{name}").size == 4


def test_a_missing_source_is_that_files_error(source, storage):
    """The others of the batch are copied."""
    gone, good = task(source, "gone", b"1"), task(source, "good", b"2")
    os.unlink(os.path.join(source.root, "gone"))
    results = {r.task.source_path: r.error for r in copy_batch(source, storage, [gone, good])}
    assert results["gone"].code == "DLM-303" and results["good"] is None


def test_a_full_destination_leaves_nothing_half(source, tmp_path):
    """Past the quota writes fail as on a full disk; no temporary files, no half ones."""
    root = tmp_path / "small"
    root.mkdir()
    inner = open_storage("small", "posix", str(root), {})
    results = list(
        copy_batch(
            source, QuotaStorage(inner, 2500), [task(source, f"{n}", bytes(1000)) for n in range(5)]
        )
    )
    failed = [r for r in results if r.error]
    assert len(failed) == 3 and all(isinstance(r.error, StorageFullError) for r in failed)
    assert len(list(inner.walk())) == 2 and leftovers(inner) == []


def test_a_directory_appears_whole_or_not_at_all(source, storage):
    """A directory payload is one task with its manifest."""
    files = {"table.dat": b"1" * 100, "sub/table.f0": b"", "sub/ü x": b"3" * 9_000_000}
    manifest = []
    for name, data in files.items():
        one = task(source, f"m.ms/{name}", data)
        manifest.append(ManifestEntry(name, one.size, one.digest))
    digest = manifest_digest(manifest)
    whole = CopyTask(
        uuid.uuid4(), "m.ms", "copy/m.ms", PayloadKind.DIRECTORY, sum(e.size for e in manifest),
        digest, tuple(manifest), uuid.uuid4().hex,
    )  # fmt: skip
    (result,) = copy_batch(source, storage, [whole])
    assert result.error is None
    assert observe(storage, "copy/m.ms", PayloadKind.DIRECTORY).digest == digest
    (again,) = copy_batch(source, storage, [whole])
    assert again.error is None


def test_stopping_leaves_the_rest_untouched(source, tmp_path):
    """Once stop is set nothing more becomes visible and no temporary file stays."""
    root = tmp_path / "slow"
    root.mkdir()
    inner = open_storage("slow", "posix", str(root), {})
    stop = threading.Event()
    slow = Hooked(inner, lambda call, path: stop.set() if call == "flush" else None)
    tasks = [task(source, f"{n}", b"x") for n in range(1100)]
    results = list(copy_batch(source, slow, tasks, stop=stop))
    assert all(r.error is None for r in results)
    # one sub-batch was being flushed and the next one written
    assert 128 <= len(results) < 1100
    assert len(list(inner.walk())) == len(results)
    assert leftovers(inner) == []


@pytest.mark.parametrize("kind", ["posix", "s3"])
def test_a_stop_ends_the_comparison_with_what_is_there(source, tmp_path, request, kind):
    """An earlier try left it whole, and it may be terabytes: it stays for the next try to adopt."""
    if kind == "posix":
        (tmp_path / "out").mkdir()
        inner = open_storage("out", "posix", str(tmp_path / "out"), {})
    else:
        server = request.getfixturevalue("s3")
        root = f"{server.bucket}/{uuid.uuid4().hex}"
        inner = open_storage("out", "s3", root, s3_config(server))
    data, stop = bytes(40 << 20), threading.Event()
    wanted = task(source, "x", data)
    put(inner, wanted.destination_path, data)
    there = Cut(inner, 2 << 20, stop.set)
    assert list(copy_batch(source, there, [wanted], stop=stop)) == []
    assert there.read < 10 << 20
    (again,) = copy_batch(source, inner, [replace(wanted, token="again")])
    assert again.error is None and leftovers(inner) == []


@pytest.fixture
def beside(tmp_path):
    """Another storage on the source's file system."""
    root = tmp_path / "beside"
    root.mkdir()
    return open_storage("beside", "posix", str(root), {})


def test_the_kernel_copies_within_a_file_system(source, beside, monkeypatch):
    """The bytes don't pass through us, but are read back; the progress tells all of them."""
    data = os.urandom(20 << 20)
    one = task(source, "x", data)
    told = []
    monkeypatch.setattr(type(beside), "write", None)
    (result,) = copy_batch(source, beside, [one], progress=told.append)
    assert result.error is None
    assert sum(told) == len(data)
    assert observe(beside, "copy/x").digest == one.digest


def test_a_file_system_that_cannot_is_read_and_written(source, beside, monkeypatch):
    """What the kernel refuses is copied as any other file."""

    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    one = task(source, "x", os.urandom(3 << 20))
    (result,) = copy_batch(source, beside, [one])
    assert result.error is None
    assert observe(beside, "copy/x").digest == one.digest


def test_a_copy_by_the_kernel_that_differs_is_the_fault_of_who_has_other_bytes(
    source, beside, monkeypatch
):
    """A damaged source is told as such, a damaged destination too; nothing becomes visible."""
    bad = task(source, "bad", os.urandom(2 << 20), digest="sha256:" + "0" * 64)
    (result,) = copy_batch(source, beside, [bad])
    assert isinstance(result.error, SourceDamagedError)
    copy = os.copy_file_range

    def flip(source, destination, size):
        copied = copy(source, destination, size)
        os.pwrite(destination, b"flipped", 100)
        return copied

    monkeypatch.setattr(os, "copy_file_range", flip)
    (result,) = copy_batch(source, beside, [task(source, "good", os.urandom(2 << 20))])
    assert isinstance(result.error, DestinationDamagedError)
    assert list(beside.walk()) == leftovers(beside) == []


def test_a_copy_by_the_kernel_stops_in_the_middle(source, beside):
    """Between two of the kernel's calls; nothing stays."""
    stop = threading.Event()
    tasks = [task(source, "x", os.urandom(40 << 20))]
    told = []

    def moved(size):
        told.append(size)
        stop.set()

    assert list(copy_batch(source, beside, tasks, progress=moved, stop=stop)) == []
    assert sum(told) < 40 << 20
    assert leftovers(beside) == []
