"""The lifecycle with a storage that keeps small files in bundles."""

import json
import os
import shutil
import time
from datetime import timedelta

import pytest

from dlm_core.catalogue.packing import packing
from dlm_core.errors import InvalidValueError, PackingError, StorageUnavailableError
from dlm_core.lifecycle.lost import lose_storage
from dlm_core.lifecycle.pack import pack_due, pack_storage, rebuild_storage_index
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.transfers.throttle import Pace
from dlm_core.types import OperationKind
from tests.site import make_site
from tests.tape import Tape

TERMS = {"bundle_bytes": 40_000, "bundle_below": 10_000, "bundle_after_hours": 0}


@pytest.fixture
def site(engine, tmp_path):
    """A folder here, one with bundles at another place, and a third that is offline at first."""
    site = make_site(engine, tmp_path)
    site.add_storage("in", "here")
    site.add_storage("vault", "there", config=json.dumps(TERMS))
    site.add_storage("back", "elsewhere", mode="offline")
    return site


def data_of(n):
    return b"bytes of %d " % n * (n + 1)


def add_items(site, count):
    return [site.add_item(f"block-{n % 3}/{n:03}", data_of(n), "in") for n in range(count)]


def pack(site, **options):
    # the files are of today, whatever the site's clock says
    site.set_storage("vault", config=json.dumps(TERMS | options))
    begun, site.now = site.now, site.now + timedelta(days=3650)
    try:
        return pack_storage(site.context, "vault")
    finally:
        site.now = begun


def tars(site):
    return sorted((site.folder / "vault/.dlm/bundles/tar").glob("*.tar"))


def usage(site):
    vault = site.storages["vault"]
    (row,) = site.query("SELECT * FROM storage_usage WHERE storage_id = :id", id=vault)
    return row["used_bytes"], row["replicas"]


def test_small_items_live_in_bundles(site):
    """Copied, packed, verified, trashed and restored, purged, made anew, copied out again."""
    oids = add_items(site, 200)
    size = sum(len(data_of(n)) for n in range(200))
    assert not site.settle().failed
    assert {site.replicas(oid)["vault"] for oid in oids} == {"READY"}
    report = pack(site)
    assert (report.members, report.bytes, report.refused) == (200, size, [])
    assert report.bundles == len(tars(site)) > 3
    assert site.visible("vault") == {}
    assert usage(site) == (size, 200)

    vault = site.storages["vault"]
    site.context.transact(
        lambda c: request_verification(c, actor="test", now=site.now, storage_id=vault)
    )
    site.work(OperationKind.VERIFY)
    assert {site.replicas(oid)["vault"] for oid in oids} == {"READY"}

    # most of them expire; one comes back from the trash, one copy is trashed alone
    site.execute(
        "UPDATE data_item SET expires_at = :now WHERE oid = ANY(:oids)",
        now=site.now, oids=oids[20:],
    )  # fmt: skip
    site.context.settings = site.context.settings.model_copy(
        update={"max_delete_items": 10_000, "max_delete_fraction": 1.0}
    )
    site.advance(minutes=1)
    assert not site.settle().failed
    assert len(site.query("SELECT 1 FROM replica WHERE state = 'TRASHED'")) == 360
    site.advance(hours=2)
    assert not site.settle().failed
    assert usage(site) == (sum(len(data_of(n)) for n in range(20)), 20)
    report = pack(site)
    assert report.removed >= 1
    assert sum(tar.stat().st_size for tar in tars(site)) < 40_000

    site.set_storage("in", mode="offline")
    site.set_storage("back", mode="read_write")
    site.set_storage("vault", mode="draining")
    assert not site.settle().failed
    assert sorted(site.visible("back").values()) == sorted(data_of(n) for n in range(20))
    site.set_storage("in", mode="read_write")
    for _ in range(3):
        site.advance(hours=2)
        assert not site.settle().failed
    assert tars(site) == []
    assert usage(site) == (0, 0)


def test_a_member_goes_to_the_trash_and_comes_back(site):
    """As if it were a single file."""
    oids = add_items(site, 5)
    site.settle()
    pack(site)
    site.execute("UPDATE data_item SET expires_at = :now WHERE oid = :oid", now=site.now,
                 oid=oids[2])  # fmt: skip
    site.advance(minutes=1)
    site.settle()
    assert site.replicas(oids[2]) == {"in": "TRASHED", "vault": "TRASHED"}
    vault = site.storages["vault"]
    site.context.transact(
        lambda c: request_restore(c, oid=oids[2], storage_id=vault, actor="test", now=site.now)
    )
    assert not site.work(OperationKind.RESTORE).failed
    assert site.replicas(oids[2])["vault"] == "READY"
    assert site.visible("vault") == {}


def test_damage_in_a_bundle_is_found_and_mended_for_its_members_alone(site):
    """The damaged copy is set aside and made again as a single file; the others stay."""
    oids = add_items(site, 10)
    site.settle()
    pack(site)
    (tar,) = tars(site)
    data = bytearray(tar.read_bytes())
    data[data.index(data_of(4)) + 1] ^= 4
    tar.write_bytes(data)
    vault = site.storages["vault"]
    site.context.transact(
        lambda c: request_verification(c, actor="test", now=site.now, storage_id=vault)
    )
    for _ in range(3):
        site.settle()
        site.advance(hours=1)
    assert {site.replicas(oid)["vault"] for oid in oids} == {"READY"}
    events = site.query(
        "SELECT DISTINCT oid FROM event WHERE noun = 'replica' AND new_state = 'CORRUPTED'"
    )
    assert [row["oid"] for row in events] == [oids[4]]
    assert list(site.visible("vault").values()) == [data_of(4)]
    assert pack(site, repack_share=0.01).members >= 1
    assert site.visible("vault") == {}


def test_only_what_the_catalogue_knows_is_packed(site):
    """Files of others stay where they are, and a damaged one for verification to find."""
    add_items(site, 3)
    site.settle()
    (site.folder / "vault" / "stranger").write_bytes(b"?")
    (damaged,) = (path for path, data in site.visible("vault").items() if data == data_of(1))
    (site.folder / "vault" / damaged).write_bytes(b"x" * len(data_of(1)))
    report = pack(site)
    assert (report.members, report.refused) == (2, [damaged])
    assert sorted(site.visible("vault")) == sorted([damaged, "stranger"])


def test_files_of_a_directory_payload_are_packed(site):
    """By their manifest; the payload is read, moved and removed as one."""
    from dlm_core.catalogue.items import Terms
    from dlm_core.lifecycle.admit import execute_admit
    from dlm_core.lifecycle.register import Source, register_tree
    from dlm_core.lifecycle.work import drain

    tree = site.folder / "in" / "scan ü.ms"
    for n in range(5):
        (tree / f"sub {n}").mkdir(parents=True)
        (tree / f"sub {n}" / "table").write_bytes(b"%d" % n * 100)
    (tree / "large").write_bytes(bytes(20_000))
    register_tree(site.context, Source("in", "test", terms=Terms("SOLID"), as_directory=("*.ms",)))
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    assert not site.settle().failed
    assert pack(site).members == 5
    assert [path.rpartition("/")[2] for path in site.visible("vault")] == ["large"]
    (oid,) = [row["oid"] for row in site.query("SELECT oid FROM data_item")]
    site.context.transact(lambda c: request_verification(c, actor="test", now=site.now, oid=oid))
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid)["vault"] == "READY"
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    site.advance(minutes=1)
    site.settle()
    site.advance(hours=2)
    assert not site.settle().failed
    assert site.replicas(oid) == {"in": "DELETED", "vault": "DELETED"}
    assert tars(site) == [] and site.visible("vault") == {}


def test_one_packs_a_storage_at_a_time(site):
    """The second is told so; and what keeps no bundles is not packed."""
    vault = site.storages["vault"]
    with packing(site.context.engine, "test", vault, "vault"), pytest.raises(PackingError):
        pack_storage(site.context, "vault")
    with pytest.raises(InvalidValueError, match="bundle_bytes"):
        pack_storage(site.context, "in")
    with pytest.raises(InvalidValueError, match="offline"):
        pack_storage(site.context, "back")
    with pytest.raises(InvalidValueError, match="whole"):
        rebuild_storage_index(site.context, "vault")
    assert [run().storage for run in pack_due(site.context)] == ["vault"]


@pytest.mark.parametrize("cold", [False, True])
def test_packing_keeps_the_limit_of_its_storage(site, tmp_path, cold):
    """What is read for a bundle, its writing and its reading back: 3 times 1 MB at 2 MB/s."""
    tape = Tape(site.folder / "vault", tmp_path / "hsm").config() if cold else {}
    if cold:
        site.set_storage("vault", config=json.dumps(TERMS | tape))
    files = [site.add_item(f"f{n:03}", os.urandom(9000), "in") for n in range(117)]
    assert not site.settle().failed
    site.set_storage("vault", max_bytes_per_second=2 << 20)
    begun = time.monotonic()
    report = pack(site, bundle_bytes=1 << 30, **tape)
    # a block of 1 MiB goes ahead of the pace
    assert time.monotonic() - begun >= (3 * 117 * 9000 - (1 << 20)) / (2 << 20)
    assert (report.members, report.bundles) == (len(files), 1)
    assert site.query("SELECT * FROM drainer") == []


def test_reading_bundles_anew_keeps_the_limit_too(site):
    """What a lost index is made anew from is asked of the pace of its storage."""
    for n in range(117):
        site.add_item(f"f{n:03}", os.urandom(9000), "in")
    assert not site.settle().failed
    pack(site, bundle_bytes=1 << 30)
    shutil.rmtree(site.folder / "vault/.dlm/bundles/log")
    site.set_storage("vault", max_bytes_per_second=100_000)
    waited = []

    def take(pace, size):
        waited.append((pace.limited, size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "take", take)
        assert rebuild_storage_index(site.context, "vault").members == 117
    assert all(limited for limited, _ in waited)
    assert sum(size for _, size in waited) >= 117 * 9000


def expire(site, oids):
    """The items go for good, and nothing else happens to the storage meanwhile."""
    site.context.settings = site.context.settings.model_copy(update={"max_delete_fraction": 1.0})
    site.execute("UPDATE data_item SET expires_at = :n WHERE oid = ANY(:o)", n=site.now, o=oids)
    for _ in range(2):
        site.settle()
        site.advance(hours=2)
    assert {site.replicas(oid)["vault"] for oid in oids} == {"DELETED"}


def housekeeping(site):
    return [run() for run in pack_due(site.context)]


def test_an_emptied_bundle_that_a_crash_left_goes_from_a_draining_storage(site, monkeypatch):
    """A worker died between the record that it is empty and its removal, and then the storage was
    drained: housekeeping removes it, packs nothing new, and leaves what others still hold."""
    oids = add_items(site, 120)
    staying = oids[2::3]  # one folder, as they are packed
    going = [oid for oid in oids if oid not in staying]
    site.settle()
    pack(site)
    before = tars(site)
    with monkeypatch.context() as patch:
        patch.setattr("dlm_core.storages.bundles.sweep", lambda *_: None)
        expire(site, going)
    assert tars(site) == before
    site.set_storage("vault", mode="draining")
    (report,) = housekeeping(site)
    assert (report.bundles, report.members) == (0, 0)
    assert 0 < report.removed == len(before) - len(tars(site)) < len(before)
    site.context.transact(lambda c: request_verification(c, actor="test", now=site.now))
    site.work(OperationKind.VERIFY)
    assert {site.replicas(oid)["vault"] for oid in staying} == {"READY"}
    expire(site, staying)
    assert tars(site) == []


def test_a_packing_that_a_crash_cut_off_is_finished_on_a_draining_storage(site, monkeypatch):
    """The single files that a bundle was made of lie beside it, and a bundle is waited for until
    they went: both are gone before the storage retires."""
    oids = add_items(site, 20)
    site.settle()
    singles = site.visible("vault")

    def die(*_):
        raise StorageUnavailableError(storage="vault", message="no answer")

    with monkeypatch.context() as patch:
        patch.setattr("dlm_core.storages.packing.clean", die)
        with pytest.raises(StorageUnavailableError):
            pack(site)
    assert site.visible("vault") == singles and len(tars(site)) == 1
    site.set_storage("vault", mode="draining")
    housekeeping(site)
    assert site.visible("vault") == {} and len(tars(site)) == 1
    expire(site, oids)
    assert tars(site) == []


def test_housekeeping_leaves_a_storage_alone_that_is_not_to_be_written(site):
    """Offline or read-only: nothing is removed there either."""
    add_items(site, 20)
    site.settle()
    for mode in ("read_only", "offline"):
        site.set_storage("vault", mode=mode)
        assert housekeeping(site) == []


def test_bundles_on_tape_are_staged_whole(site, tmp_path):
    """All members that a batch wants come with one request for their bundles; trash and purge
    recall nothing; a bundle to be made anew is asked for, and done the next time."""
    tape = Tape(site.folder / "vault", tmp_path / "hsm")
    site.set_storage("vault", config=json.dumps(TERMS | tape.config()))
    oids = add_items(site, 60)
    site.settle()
    assert pack(site, **tape.config()).members == 60
    everything = [str(tar.relative_to(site.folder / "vault")) for tar in tars(site)]
    assert tape.migrate("*.tar") == len(everything)

    site.set_storage("back", mode="read_write")
    lose_storage(site.context, "in", "burnt")
    assert site.settle().retried == {"DLM-308": 60}
    assert tape.calls() == [everything]
    assert tape.deliver() == len(everything)
    site.advance(seconds=60)
    site.settle()
    assert {site.replicas(oid)["back"] for oid in oids} == {"READY"}
    assert sorted(site.visible("back").values()) == sorted(data_of(n) for n in range(60))

    tape.migrate("*.tar")
    site.execute(
        "UPDATE data_item SET expires_at = :now WHERE oid = ANY(:oids)",
        now=site.now, oids=oids[:50],
    )  # fmt: skip
    site.settle()
    site.advance(hours=2)
    site.settle()
    assert {site.replicas(oid)["vault"] for oid in oids[:50]} == {"DELETED"}
    assert len(tape.calls()) == 1
    report = pack(site, **tape.config())
    assert report.moved == 0 and report.offline == len(tape.calls()[1]) > 0
    tape.deliver()
    assert pack(site, **tape.config()).moved > 0
    for oid in oids[50:]:
        assert site.replicas(oid)["vault"] == "READY"
    site.context.transact(lambda c: request_verification(c, actor="test", now=site.now))
    for _ in range(3):
        site.work(OperationKind.VERIFY)
        tape.deliver()
        site.advance(seconds=60)
    assert {site.replicas(oid)["vault"] for oid in oids[50:]} == {"READY"}
