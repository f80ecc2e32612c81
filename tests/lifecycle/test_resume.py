"""A large copy that was interrupted goes on where it was, and never from what somebody writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from dlm_core.catalogue.operations import partials_on
from dlm_core.errors import StorageUnavailableError
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import drain
from dlm_core.storages.open import open_storage
from dlm_core.transfers.sweep import sweep_temp
from dlm_core.types import OperationKind
from tests.fakes import Wrapped
from tests.site import Site, make_site, reopen
from tests.sshd import SshServer

_MB = 1 << 20
_DATA = os.urandom(16 * _MB)
_COPY = {OperationKind.COPY: execute_copy}


class Cut(Wrapped):
    """A source that does ``cut`` after so many bytes, and counts what is read from it."""

    #: the kernel would copy past it
    copy_from = None

    def __init__(self, inner: Any, after: int, cut: Callable[[], None]) -> None:
        super().__init__(inner)
        self.after, self.cut, self.read = after, cut, 0

    def open_read(self, path: str) -> Any:
        return _CutStream(self, self.inner.open_read(path))

    def open_read_at(self, path: str, offset: int) -> Any:
        return _CutStream(self, self.inner.open_read_at(path, offset))


class _CutStream(Wrapped):
    def __init__(self, owner: Cut, inner: Any) -> None:
        super().__init__(inner)
        self.owner, self.size, self.opened = owner, inner.size, inner.opened

    def read(self, size: int = -1) -> bytes:
        if self.owner.read >= self.owner.after:
            self.owner.after = 1 << 60
            self.owner.cut()
        block: bytes = self.inner.read(size)
        self.owner.read += len(block)
        return block

    def __enter__(self) -> _CutStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.inner.close()


ON_DISK = pytest.mark.parametrize("site", ["posix"], indirect=True)


@pytest.fixture(params=["posix", "sftp", "sftp_shell"])
def site(engine, tmp_path, request) -> Site:
    """Storage b is a folder, or one behind sshd; files above a megabyte are resumed."""
    site = make_site(engine, tmp_path, resume_bytes=_MB)
    site.add_storage("a", "A")
    site.far = None
    root = site.add_storage("b", "B")
    if request.param != "posix":
        server: SshServer = request.getfixturevalue("sshd")
        config = server.config(shell=request.param == "sftp_shell")
        site.far = ("sftp", server.root(root), config)
    return site


def cut(site: Site, after: int, how: Callable[[], None]) -> Cut:
    """Let the reading from a be cut after so many bytes; b as it is."""
    source = Cut(open_storage("a", "posix", str(site.folder / "a"), {}), after, how)

    def opened(row: Any) -> Any:
        if row["name"] == "a":
            return source
        if site.far is not None:
            return open_storage("b", *site.far)
        return open_storage("b", "posix", row["root"], {})

    reopen(site, opened)
    return source


def unavailable() -> None:
    raise StorageUnavailableError(storage="a", message="the line is cut")


def partial(site: Site) -> str | None:
    (row,) = site.query("SELECT partial, state FROM operation")
    assert row["state"] == "QUEUED"
    return row["partial"]


def test_a_copy_goes_on_after_an_outage(site: Site) -> None:
    """What came through is not read from the source again; the copy is whole; nothing stays."""
    oid = site.add_item("x", _DATA, "a")
    source = cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = partial(site)
    assert left is not None
    assert site.private("b", "tmp") == [left.removeprefix(".dlm/tmp/")]
    assert site.visible("b") == {}
    before = source.read
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.replicas(oid)["b"] == "READY"
    assert site.visible("b") == {"test/x": _DATA}
    assert site.private("b", "tmp") == []
    # over SFTP the last megabytes before a cut are written again
    assert source.read - before < len(_DATA)
    assert source.read >= len(_DATA)


def test_a_copy_goes_on_after_a_drainer_was_stopped(site: Site) -> None:
    """Its try does not count, and the next drainer goes on."""
    site.add_item("x", _DATA, "a")
    source = cut(site, 12 * _MB, site.context.stop.set)
    plan_replication(site.context)
    drain(site.context, _COPY)
    assert partial(site) is not None
    assert site.query("SELECT attempts FROM operation") == [{"attempts": 0}]
    site.context.stop.clear()
    before = source.read
    drain(site.context, _COPY)
    assert site.visible("b") == {"test/x": _DATA}
    # over SFTP the last megabytes before a cut are written again
    assert source.read - before < len(_DATA)


@ON_DISK
def test_damage_to_what_was_left_is_not_the_sources(site: Site) -> None:
    """A flipped byte in the partial file: the copy is made anew, the source stays READY."""
    oid = site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = site.folder / "b" / (partial(site) or "")
    with left.open("r+b") as file:
        file.seek(1000)
        file.write(b"flipped")
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.replicas(oid) == {"a": "READY", "b": "PENDING"}
    assert site.query("SELECT error_code FROM operation") == [{"error_code": "DLM-402"}]
    assert site.visible("b") == {} and site.private("b", "tmp") == []
    site.advance(minutes=5)
    drain(site.context, _COPY)
    assert site.visible("b") == {"test/x": _DATA}


@pytest.mark.parametrize("site", ["posix", "sftp_shell"], indirect=True)
def test_what_a_worker_may_still_write_is_not_taken_over(site: Site) -> None:
    """A worker whose lease ran out did not say that it has ended: nobody writes to its file. Where
    the storage copies by itself, a copy of it is gone on from, and what the late one writes then
    goes nowhere; else the copy begins anew."""
    oid = site.add_item("x", _DATA, "a")
    asleep, awake = threading.Event(), threading.Event()

    def sleep() -> None:
        asleep.set()
        assert awake.wait(30)

    source = cut(site, 12 * _MB, sleep)
    plan_replication(site.context)
    late = threading.Thread(target=drain, args=(site.context, _COPY))
    late.start()
    assert asleep.wait(30)
    site.advance(hours=1)
    before = source.read
    drain(replace(site.context, worker="another"), _COPY)
    assert site.visible("b") == {"test/x": _DATA}
    anew = source.read - before >= len(_DATA)
    assert anew == (site.far is not None)
    awake.set()
    late.join(30)
    assert site.visible("b") == {"test/x": _DATA}
    assert site.replicas(oid)["b"] == "READY"
    assert site.private("b", "tmp") == []


@ON_DISK
def test_what_a_queued_copy_goes_on_from_is_not_swept(site: Site) -> None:
    """However old it is; anything else of that age is."""
    site.add_item("x", _DATA, "a")
    cut(site, 12 * _MB, unavailable)
    plan_replication(site.context)
    drain(site.context, _COPY)
    left = partial(site)
    other = site.folder / "b/.dlm/tmp/0/other"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"x")
    storage = open_storage("b", "posix", str(site.folder / "b"), {})
    kept = site.context.transact(lambda c: partials_on(c, site.storages["b"]))
    assert kept == {left}
    later = site.now + timedelta(days=3650)
    assert sweep_temp(storage, timedelta(days=2), later, kept) == 1
    assert site.private("b", "tmp") == [(left or "").removeprefix(".dlm/tmp/")]
