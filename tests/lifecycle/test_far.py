"""The lifecycle with a machine behind SFTP among the storages."""

import hashlib
import io
import json
import os
import threading
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from dlm_core.catalogue.items import Terms
from dlm_core.errors import StorageUnavailableError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.storages.open import open_storage
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.transfers.sweep import sweep_temp
from dlm_core.types import OperationKind, PayloadKind
from tests.faulty import Faulty
from tests.site import make_site, reopen
from tests.sshd import ssh_server

ODD = ["a b", "quo'te\"", "ünï/星", "per%20cent", "back\\slash", "new\nline", "n" * 255,
       b"\xff\xfe.dat"]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["read back", "shell"])
def site(request, engine, tmp_path, sshd):
    """A folder here, a machine far away and a second folder at a third place, all LIQUID."""
    site = make_site(engine, tmp_path)
    site.add_storage("in", "here")
    add_far(site, sshd, shell=request.param)
    site.add_storage("back", "elsewhere", mode="offline")
    return site


def add_far(site, server, **config):
    root = server.root(site.folder / "far")
    config = json.dumps(server.config(**config))
    site.add_storage("far", "hpc", interface="sftp", root=root, config=config)


def test_data_go_there_and_back(site):
    """Any name: a verified copy behind SFTP; then home again from there when the first is lost."""
    for name in ODD:
        file = os.path.join(os.fsencode(site.folder / "in"), os.fsencode(name))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(os.fsencode(name))
    register_tree(site.context, Source("in", "test", terms=Terms("SOLID")))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert not site.settle().failed
    assert sorted(site.visible("far").values()) == sorted(map(os.fsencode, ODD))
    assert site.private("far", "tmp") == []
    site.set_storage("in", mode="offline")
    site.set_storage("back", mode="read_write")
    site.set_storage("far", mode="draining")
    assert not site.settle().failed
    assert sorted(site.visible("back").values()) == sorted(map(os.fsencode, ODD))


def test_a_directory_payload_goes_there_and_back(site, tmp_path):
    """As one operation with its manifest."""
    tree = site.folder / "in" / "scan.ms"
    for n in range(5):
        (tree / f"sub{n}").mkdir(parents=True)
        (tree / f"sub{n}" / "table").write_bytes(os.urandom(100_000 * n))
    source = Source("in", "test", terms=Terms("SOLID"), as_directory=("*.ms",))
    register_tree(site.context, source)
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert not site.settle().failed
    wanted = {str(f.relative_to(tree)): f.read_bytes() for f in tree.rglob("*") if f.is_file()}
    (copy,) = (site.folder / "far").rglob("scan.ms")
    assert {str(f.relative_to(copy)): f.read_bytes() for f in copy.rglob("table")} == wanted


def test_a_copy_goes_to_the_trash_comes_back_and_is_purged(site):
    """Trash, restore, trash again, purge, as on a disk of our own."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    assert site.visible("far") == {"test/x": b"payload"}
    expire(site, oid)
    assert site.visible("far") == {} and site.replicas(oid)["far"] == "TRASHED"
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["far"], actor="user:test", now=site.now
        )
    )
    site.settle()
    assert site.visible("far") == {"test/x": b"payload"}
    expire(site, oid)
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["far"] == "DELETED" and site.private("far", "trash") == []


def expire(site, oid):
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE storage_id = :s",
        now=site.now, s=site.storages["far"],
    )  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'GAS' WHERE oid = :oid", oid=oid)
    site.settle()


def test_damage_there_is_noticed_and_mended(site):
    """A bit that flips on the far side's disk: read twice, set aside, made again."""
    oid = site.add_item("x", b"payload", "in")
    site.settle()
    (site.folder / "far/test/x").write_bytes(b"paYload")
    site.context.transact(
        lambda c: request_verification(c, oid=oid, actor="user:test", now=site.now)
    )
    for _ in range(4):
        site.advance(hours=1)
        site.settle()
    assert site.visible("far") == {"test/x": b"payload"}
    assert len(site.private("far", "quarantine")) == 1


def test_a_bit_that_flips_on_its_way_is_never_shown(site):
    """The far side's own digest says so, or the reading back; the copy is made again."""
    oid = site.add_item("x", b"payload" * 1000, "in")
    wrapped = []

    def opener(row):
        real = open_storage(row["name"], row["interface"], row["root"], row["config"])
        if row["name"] != "far":
            return real
        wrapped.append(Flipping(real))
        return wrapped[-1]

    reopen(site, opener)
    site.settle()
    assert site.visible("far") == {} and site.replicas(oid)["far"] == "PENDING"
    wrapped[-1].well = True
    site.advance(hours=1)
    site.settle()
    assert site.visible("far") == {"test/x": b"payload" * 1000}


class Flipping(Faulty):
    """Writes other bytes than it was given, until it is well."""

    well = False

    def write(self, path, source, size):
        data = source.read(-1)
        if not self.well:
            data = b"?" + data[1:]
        return self.inner.write(path, io.BytesIO(data), size)


def test_of_no_secret_there_is_a_trace_in_the_catalogue(site, sshd):
    """Not in any table that a failed and a good copy leave something in."""
    site.add_item("x", b"payload", "in")
    key = os.environ.pop(sshd.key_name)
    try:
        site.settle()
    finally:
        os.environ[sshd.key_name] = key
    site.advance(hours=1)
    site.settle()
    assert site.visible("far") == {"test/x": b"payload"}
    told = "".join(
        str(site.query(f"SELECT * FROM {table}"))
        for table in ("storage", "operation", "event", "replica")
    )
    assert sshd.key_name in told and key.splitlines()[3] not in told


# --- a server that goes in the middle --------------------------------------------------------


class Killing(io.RawIOBase):
    """A source during whose reading the server dies."""

    def __init__(self, inner, server, after):
        self.inner, self.server, self.after = inner, server, after
        self.size, self.opened = inner.size, inner.opened

    def read(self, size=-1):
        self.after -= max(size, 0)
        if self.after < 0 and self.server._process:
            self.server.stop()
        return self.inner.read(size)

    def stamp(self):
        return self.inner.stamp()


@pytest.mark.parametrize("shell", [False, True])
def test_a_server_that_dies_in_the_middle_of_a_copy(tmp_path, shell):
    """The copy fails as an outage, nothing is visible; the next one succeeds, the rest is swept."""
    (tmp_path / "in").mkdir()
    (tmp_path / "far").mkdir()
    data = os.urandom(30 << 20)
    (tmp_path / "in/x").write_bytes(data)
    here = open_storage("in", "posix", str(tmp_path / "in"), {})
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with ssh_server(tmp_path / "own") as server:
        config = server.config(shell=shell)
        far = open_storage("far", "sftp", server.root(tmp_path / "far"), config)

        def copy(token):
            task = CopyTask(
                uuid.uuid4(), "x", "d/x", PayloadKind.FILE, len(data), digest, (), token
            )
            (result,) = copy_batch(here, far, [task], stop=threading.Event())
            return result.error

        real = here.open_read
        here.open_read = lambda path: Killing(real(path), server, 15 << 20)
        assert isinstance(copy("first"), StorageUnavailableError)
        assert not (tmp_path / "far/d").exists()
        here.open_read = real
        server.start()
        assert copy("second") is None
        assert (tmp_path / "far/d/x").read_bytes() == data
        assert sweep_temp(far, timedelta(0), datetime.now(UTC) + timedelta(minutes=1)) == 1
        assert [entry.path for entry in far.walk()] == ["d/x"]
