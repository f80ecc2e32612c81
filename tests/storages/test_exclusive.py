"""One path that several processes want at once: each has adapters and locks of its own."""

from __future__ import annotations

import io
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from dlm_core.errors import InvalidValueError, PayloadExistsError, StorageUnavailableError
from dlm_core.storages.bundle_index import BundleIndex
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import Storage
from tests.backends import s3_config
from tests.faulty import Fault, Faulty

_RACES = 40
_CHANGES = 15

Opener = Callable[[], Storage]


@pytest.fixture(params=("posix", "s3", "sftp", "sftp_shell", "wsgidav", "rclonedav", "xrootd"))
def opener(request, tmp_path) -> Opener:
    """Opens the same place anew with each call, as another process would."""
    kind, _, shell = request.param.partition("_")
    root = tmp_path / "root"
    root.mkdir()
    if kind == "posix":
        return lambda: open_storage("p", "posix", str(root), {})
    server = request.getfixturevalue("sshd" if kind == "sftp" else kind)
    if kind == "s3":
        place = f"{server.bucket}/{uuid.uuid4().hex}"
        return lambda: open_storage("s", "s3", place, s3_config(server))
    if kind == "sftp":
        far = server.root(root)
        return lambda: open_storage("f", "sftp", far, server.config(shell=bool(shell)))
    if kind == "xrootd":
        top = server.make_root()
        return lambda: open_storage("x", "xrootd", top, server.config)
    collection = server.make_collection()
    return lambda: open_storage("d", "webdav", collection, server.config)


def test_one_of_two_processes_gets_a_path(opener):
    """What an adapter tells to be exclusive is had by one of two that want its path at once, and
    what that one put there stays: files by who is told so, full folders by who then reads it there
    (a server may put the other's folder into it, and say that all went well)."""
    ends, barrier = (opener(), opener()), threading.Barrier(2)
    name = "" if ends[0].exclusive == "file" else "/record"
    ends[0].write("taken/first", io.BytesIO(b"1"), 1)

    def read(n: int) -> bytes:
        with ends[0].open_read(f"taken/{n}{name}") as stream:
            return bytes(stream.read(-1))

    def want(me: int) -> list[int]:
        storage, mine = ends[me], b"%d" % me
        atomic = getattr(storage, "atomic_write", False)
        for n in range(0 if atomic else _RACES):
            storage.write(f".dlm/tmp/{me}/{n}{name}", io.BytesIO(mine), 1)
        won = []
        for n in range(_RACES):
            barrier.wait(60)
            try:
                if atomic:
                    storage.write(f"taken/{n}", io.BytesIO(mine), 1)
                else:
                    storage.rename(f".dlm/tmp/{me}/{n}", f"taken/{n}")
            except PayloadExistsError:
                continue
            if not name or read(n) == mine:
                won.append(n)
        return won

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(want, (0, 1))
    assert sorted(first + second) == [*range(_RACES)]
    for n in range(_RACES):
        assert read(n) == (b"0" if n in first else b"1")


def test_several_processes_change_one_index(opener):
    """Every change that was answered for is in the log of bundles once, for all."""
    indexes, begin = [BundleIndex(opener()) for _ in range(3)], threading.Barrier(3)

    def change(me: int) -> list[str]:
        begin.wait(60)
        names = [f"{me}-{n}" for n in range(_CHANGES)]
        for name in names:
            indexes[me].change(lambda name=name: [["moving", name, "there"]])
        return names

    with ThreadPoolExecutor(3) as pool:
        names = sorted(name for some in pool.map(change, range(3)) for name in some)
    for index in (*indexes, BundleIndex(opener())):
        assert sorted(index.look(lambda index=index: dict(index.moving))) == names


def test_bundles_want_an_exclusive_storage(tmp_path):
    """Where another process may replace a record of the log no bundles are kept."""
    with pytest.raises(InvalidValueError, match="bundle_bytes of storage r"):
        open_storage("r", "rclone", str(tmp_path), {"type": "local", "bundle_bytes": 1 << 30})


@pytest.mark.parametrize("opener", ["posix", "wsgidav"], indirect=True)
def test_a_record_that_was_cut_short_does_not_count(opener):
    """Though the storage said that it was written: it is read back before it gets its name."""
    faulty = Faulty(opener())
    faulty.arm(Fault.WRITE_CUT_SHORT)
    index = BundleIndex(cast(Storage, faulty))
    with pytest.raises(StorageUnavailableError, match="reads back differently"):
        index.change(lambda: [["moving", "one", "there"]])
    for again in (index, BundleIndex(opener())):
        assert list(again.look(lambda again=again: dict(again.moving))) == []
    index.change(lambda: [["moving", "one", "there"]])
    assert list(index.look(lambda: dict(index.moving))) == ["one"]


@pytest.mark.parametrize("opener", ["wsgidav", "rclonedav", "xrootd"], indirect=True)
@pytest.mark.parametrize("answer", ["nested", "replaced"])
def test_a_record_that_is_not_at_its_place_was_another_s(opener, answer, monkeypatch):
    """A server that says that it renamed a folder, but put it into the one that is there already,
    or whose folder is another's by now: the change is decided anew and made behind the other."""
    storage = opener()
    first, second = BundleIndex(opener()), BundleIndex(storage)
    second.refresh()
    rename, lies = storage.rename, iter([True])

    def renaming(source: str, destination: str) -> None:
        if "/log/" in destination and next(lies, False):
            first.change(lambda: [["moving", "first", "there"]])
            place = f"{destination}/{uuid.uuid4().hex}" if answer == "nested" else ".dlm/tmp/gone"
            rename(source, place)
            return
        rename(source, destination)

    monkeypatch.setattr(storage, "rename", renaming)
    second.change(lambda: [["moving", "second", "there"]])
    for index in (first, second, BundleIndex(opener())):
        assert list(index.look(lambda index=index: dict(index.moving))) == ["first", "second"]
