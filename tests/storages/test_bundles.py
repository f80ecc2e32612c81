"""Small files in bundles: what was written stays readable whatever is packed, moved or cut off."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dlm_core.errors import (
    DlmError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages import bundle_index
from dlm_core.storages.bundle_rebuild import rebuild_index
from dlm_core.storages.bundle_tar import Member
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.conformance import get, put
from dlm_core.storages.packing import pack
from dlm_core.storages.posix import PosixStorage
from tests.backends import bundled
from tests.fakes import FAR, Counting, StoppedError, Stopping, Wrapped, any_digest
from tests.faulty import ALWAYS, Fault, Faulty

FILES = {f"block-{n % 2}/{n:03}.dat": f"bytes of {n} ".encode() * (n + 1) for n in range(12)}
FEW = {path: FILES[path] for path in list(FILES)[:6]}


def fill(storage: Bundled, files: dict[str, bytes] = FILES) -> None:
    for path, data in files.items():
        put(storage, path, data)


def contents(storage: Bundled, path: str = "") -> dict[str, bytes]:
    """All that a storage lists, read; each is also told of by stat."""
    listed = list(storage.walk(path))
    found = {entry.path: get(storage, entry.path) for entry in listed}
    assert len(found) == len(listed), "something is listed twice"
    told = storage.stat_many(found)
    assert {path: told[path].size for path in found} == {p: len(d) for p, d in found.items()}
    return found


def single(root: Path) -> list[str]:
    """Files that lie there by themselves."""
    return sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.is_file() and ".dlm" not in file.relative_to(root).parts
    )


def tars(root: Path) -> list[Path]:
    return sorted((root / ".dlm/bundles/tar").glob("*.tar"))


def unpacked(root: Path, folder: Path) -> dict[str, bytes]:
    """What plain tar makes of the bundles, in their order."""
    folder.mkdir()
    for tar in tars(root):
        subprocess.run(["tar", "-xf", tar, "-C", folder], check=True)
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and ".dlm" not in file.relative_to(folder).parts
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


class Unsynced(PosixStorage):
    """Does not wait for the medium: no test here pulls the plug, and there are many of them."""

    def flush(self) -> None:
        pass


def opened(root: Path, **config: object) -> Bundled:
    return bundled(Unsynced("disk", str(root)), **config)


@pytest.fixture
def disk(root: Path) -> Bundled:
    return opened(root)


def again(disk: Bundled, **config: object) -> Bundled:
    """The same storage as another worker sees it."""
    return opened(disk.inner.root, **config)  # type: ignore[attr-defined]


def test_small_files_are_packed_and_read_as_before(disk, root, tmp_path):
    """Their bytes come out of tars that plain tar unpacks to the same; no single file is left."""
    fill(disk)
    report = pack(disk, any_digest, FAR)
    assert (report.members, report.bytes) == (12, sum(map(len, FILES.values())))
    assert report.bundles == len(tars(root)) > 1
    assert single(root) == []
    assert contents(disk) == FILES
    assert contents(again(disk)) == FILES
    assert unpacked(root, tmp_path / "unpacked") == FILES


def test_large_files_and_strangers_stay_as_they_are(disk, root):
    """What is not below the limit, or not known to who packs, is no member."""
    put(disk, "large", bytes(1 << 20))
    put(disk, "stranger", b"?")
    put(disk, "known", b"!")
    pack(disk, lambda entries: {e.path: None for e in entries if e.path == "known"}, FAR)
    assert single(root) == ["large", "stranger"]
    assert contents(disk) == {"large": bytes(1 << 20), "stranger": b"?", "known": b"!"}


def test_too_few_files_wait_until_they_are_old(disk, root):
    """Less than a bundle is packed only when it has waited long enough."""
    put(disk, "one", b"1")
    now = datetime.now(UTC)
    assert pack(disk, any_digest, now).waiting == 1
    assert single(root) == ["one"]
    assert pack(disk, any_digest, now + timedelta(hours=25)).members == 1
    assert single(root) == []


def test_a_dry_run_changes_nothing(disk, root):
    """It tells what would be packed."""
    fill(disk)
    report = pack(disk, any_digest, FAR, dry_run=True)
    assert (report.members, report.bytes) == (12, sum(map(len, FILES.values())))
    assert single(root) == sorted(FILES)
    assert not (root / ".dlm").exists()


def test_bytes_that_are_not_as_catalogued_are_not_packed(disk, root):
    """A file that is damaged stays where it is, for verification to find."""
    fill(disk)
    bad = "block-0/000.dat"
    report = pack(disk, lambda es: {e.path: "sha256:0" * (e.path == bad) or None for e in es}, FAR)
    assert report.refused == [bad]
    assert single(root) == [bad]
    assert contents(disk) == FILES


def test_members_are_renamed_and_removed(disk, root):
    """For every worker at once, over nothing, and back."""
    fill(disk)
    pack(disk, any_digest, FAR)
    other = again(disk)
    assert other.stat("block-0/000.dat") is not None
    disk.rename("block-0/000.dat", ".dlm/trash/some-uid")
    assert other.stat("block-0/000.dat") is None
    assert get(other, ".dlm/trash/some-uid") == FILES["block-0/000.dat"]
    with pytest.raises(PayloadNotFoundError):
        other.rename("block-0/000.dat", "x")
    with pytest.raises(PayloadExistsError):
        other.rename("block-0/002.dat", "block-1/001.dat")
    put(other, "single", b"s")
    with pytest.raises(PayloadExistsError):
        other.rename("block-0/002.dat", "single")
    with pytest.raises(PayloadExistsError):
        disk.rename("single", "block-0/002.dat")
    with pytest.raises(PayloadExistsError):
        put(disk, "block-0/002.dat")
    other.rename(".dlm/trash/some-uid", "block-0/000.dat")
    disk.remove("block-0/004.dat")
    left = {path: data for path, data in FILES.items() if path != "block-0/004.dat"}
    assert contents(disk) == contents(again(disk)) == left | {"single": b"s"}


def test_a_tree_of_members_and_large_files_moves_as_one(disk, root):
    """Also when it was cut off between the two."""
    fill(disk)
    put(disk, "block-0/large", bytes(1 << 20))
    pack(disk, any_digest, FAR)
    wanted = {path[8:]: data for path, data in FILES.items() if path.startswith("block-0/")}
    wanted |= {"large": bytes(1 << 20)}
    for n in range(1, 100):
        stopping = bundled(Stopping(disk.inner, n))
        try:
            stopping.rename("block-0", f".dlm/trash/{n}")
        except StoppedError:
            later = again(disk)
            with suppress(PayloadNotFoundError):  # then it was done
                later.rename("block-0", f".dlm/trash/{n}")
            done = False
        else:
            later, done = again(disk), True
        found = {p.removeprefix(f".dlm/trash/{n}/"): d for p, d in
                 contents(later, f".dlm/trash/{n}").items()}  # fmt: skip
        assert found == wanted, n
        assert later.stat("block-0") is None
        if done:
            return
        later.rename(f".dlm/trash/{n}", "block-0")
    pytest.fail("it never came through")


def test_a_bundle_of_which_much_went_is_made_anew(disk, root, tmp_path):
    """The rest comes into a new one, the old tar goes; an empty one goes at once."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    pack(disk, any_digest, FAR)
    (first,) = tars(root)
    for path in list(FILES)[3:]:
        disk.remove(path)
    disk.rename("block-1/001.dat", "moved")
    assert tars(root) == [first]
    size = first.stat().st_size
    report = pack(disk, any_digest, FAR)
    assert (report.moved, report.removed, report.freed) == (3, 1, size)
    (second,) = tars(root)
    assert second != first
    left = {"moved": FILES["block-1/001.dat"]}
    left |= {path: FILES[path] for path in ("block-0/000.dat", "block-0/002.dat")}
    assert contents(disk) == unpacked(root, tmp_path / "unpacked") == left
    for path in left:
        disk.remove(path)
    assert tars(root) == []
    assert contents(again(disk)) == {}


def test_damage_in_a_bundle_is_its_members_alone(disk, root):
    """The others read well; what is damaged is not carried into a new bundle as if it were good."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20, repack_share=0.01)
    pack(disk, any_digest, FAR)
    (tar,) = tars(root)
    victim = "block-1/005.dat"
    member = disk.index.get(victim)
    data = bytearray(tar.read_bytes())
    data[member.offset] ^= 1
    tar.write_bytes(data)
    assert {p for p, d in contents(disk).items() if d != FILES[p]} == {victim}
    disk.remove("block-0/000.dat")
    report = pack(disk, any_digest, FAR)
    assert report.refused == [victim]
    assert disk.index.get(victim) == member
    found = contents(again(disk))
    assert {p for p, d in found.items() if d != FILES[p]} == {victim}


def test_what_a_lost_or_short_bundle_held_is_not_said_to_be_there(disk, root):
    """stat looks whether the tar is there and long enough."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    pack(disk, any_digest, FAR)
    (tar,) = tars(root)
    member = disk.index.get("block-1/005.dat")
    with tar.open("r+b") as file:
        file.truncate(member.offset + 3)
    assert disk.stat("block-1/005.dat").size == 3
    tar.unlink()
    assert disk.stat("block-1/005.dat") is None
    with pytest.raises(PayloadNotFoundError):
        get(disk, "block-1/005.dat")


def test_bundles_without_their_log_are_an_outage(disk, root):
    """Nothing is said to be absent on the word of an index that is lost or has holes."""
    fill(disk)
    pack(disk, any_digest, FAR)
    log = root / ".dlm/bundles/log"
    (log / f"{2:016d}").unlink()
    with pytest.raises(StorageUnavailableError, match="record 2 is missing"):
        again(disk).stat("block-0/000.dat")
    shutil.rmtree(log)
    for worker in (disk, again(disk)):
        with pytest.raises(StorageUnavailableError, match="no log"):
            worker.stat("block-0/000.dat")


def test_a_lost_index_is_made_anew_from_the_bundles(disk, root):
    """All members lie again where they were packed; single files that were packed are cleared."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    with pytest.raises(InvalidValueError, match="whole"):
        rebuild_index(disk)
    pack(disk, any_digest, FAR)
    disk.remove("block-0/000.dat")
    disk.rename("block-0/002.dat", ".dlm/trash/some-uid")
    for path in list(FILES)[3:]:
        disk.remove(path)
    pack(disk, any_digest, FAR)  # the bundle is made anew, without what went
    fill(disk, {"late": b"late"})
    pack(disk, any_digest, FAR)
    wanted = contents(disk) | contents(disk, ".dlm/trash")
    again(disk).inner.write("late", io.BytesIO(b"late"), 4)
    file = root / "late"
    os.utime(file, (disk.index.get("late").mtime,) * 2)
    shutil.rmtree(root / ".dlm/bundles/log")
    shutil.rmtree(root / ".dlm/bundles/index", ignore_errors=True)
    report = rebuild_index(again(disk))
    assert (report.bundles, report.members, report.damaged) == (2, 3, [])
    later = again(disk)
    assert contents(later) | contents(later, ".dlm/trash") == wanted
    pack(later, any_digest, FAR)
    assert single(root) == []
    later.remove("late")
    assert again(disk).stat("late") is None
    with pytest.raises(InvalidValueError, match="whole"):
        rebuild_index(disk)


def test_a_tar_cut_short_gives_what_it_still_has(disk, root):
    """When the index is made anew, its members are known by the list beside it."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    pack(disk, any_digest, FAR)
    (tar,) = tars(root)
    with tar.open("r+b") as file:
        file.truncate(disk.index.get("block-1/001.dat").offset)
    shutil.rmtree(root / ".dlm/bundles/log")
    report = rebuild_index(again(disk))
    assert report.members == 12
    good = {e.path for e in again(disk).walk() if e.size == len(FILES[e.path])}
    assert good == FILES.keys() - set(report.damaged)
    assert "block-0/000.dat" in good and "block-1/011.dat" not in good


def test_a_member_is_read_by_its_range(disk, root):
    """No other byte of the tar is asked for."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    pack(disk, any_digest, FAR)
    counting = Counting(disk.inner)
    assert get(bundled(counting), "block-1/011.dat") == FILES["block-1/011.dat"]
    read = [call for call in counting.calls if call[1].endswith(".tar") and call[0] != "stat_many"]
    assert [call[0] for call in read] == ["open_range"]


def test_names_of_every_kind_come_back(disk, root, tmp_path):
    """Also those that are no UTF-8, out of the index, the fold and plain tar."""
    files = {name: name.encode("utf-8", "surrogateescape") for name in
             ("é/ü", "no-utf8-\udcff\udcfe", "-dash", "new\nline", "quote'\"", "x" * 255,
              "d" * 200 + "/" + "e" * 200, "with space/and\ttab")}  # fmt: skip
    fill(disk, files)
    pack(disk, any_digest, FAR)
    assert contents(disk) == files
    assert disk.index.fold()
    assert contents(again(disk)) == files
    assert unpacked(root, tmp_path / "unpacked") == files


def test_the_log_is_folded_and_read_by_the_block(disk, root, monkeypatch):
    """What a worker keeps does not grow with the members; who is far behind begins anew."""
    monkeypatch.setattr(bundle_index, "_FOLD_RECORDS", 5)
    monkeypatch.setattr(bundle_index, "_KEPT_RECORDS", 6)
    files = {f"{n:04}": b"%d" % n for n in range(900)}
    disk = again(disk, bundle_bytes=1 << 20)
    fill(disk, files)
    behind = again(disk)
    pack(disk, any_digest, FAR)
    assert contents(behind) == files
    for n in range(0, 60, 2):
        disk.rename(f"{n:04}", f"moved-{n:04}")
        disk.remove(f"{n + 1:04}")
    wanted = {p: d for p, d in files.items() if int(p) >= 60}
    wanted |= {f"moved-{n:04}": b"%d" % n for n in range(0, 60, 2)}
    assert contents(disk) == contents(behind) == contents(again(disk)) == wanted
    assert len(list((root / ".dlm/bundles/log").iterdir())) < 16
    assert len(list((root / ".dlm/bundles/index").iterdir())) == 2
    assert len(disk.index._changed) < 30
    behind.remove("0899")
    assert disk.stat("0899") is None


def test_a_crash_at_any_call_of_packing_loses_nothing(disk, root, tmp_path):
    """Stopped before each call to the storage in turn; the next worker reads all, and packs on."""
    for n in range(1, 400):
        folder = tmp_path / f"try-{n}"
        folder.mkdir()
        storage = opened(folder, bundle_bytes=1 << 20)
        fill(storage, FEW)
        old = {f"old/{k}": b"old %d" % k for k in range(6)}
        fill(storage, old)
        pack(storage, any_digest, FAR)
        for k in range(4):
            storage.remove(f"old/{k}")
        for path in list(FEW)[:4]:
            storage.remove(path)
        put(storage, "block-0/000.dat", b"new")
        wanted = contents(storage)
        stopping = Stopping(storage.inner, n)
        try:
            pack(bundled(stopping, bundle_bytes=1 << 20), any_digest, FAR)
            done = True
        except StoppedError:
            done = False
        later = again(storage)
        assert contents(later) == wanted, f"after call {n}: {stopping.last}"
        pack(later, any_digest, FAR)
        assert contents(later) == contents(again(later)) == wanted
        if n % 8 == 0:  # it starts a process for each tar
            assert unpacked(folder, tmp_path / f"unpacked-{n}").items() >= wanted.items()
        _nothing_is_left_over(later, folder)
        shutil.rmtree(folder)
        if done:
            assert n > 20
            return
    pytest.fail("it never came through")


def _nothing_is_left_over(storage: Bundled, root: Path) -> None:
    """Only what the index names, and temporary files that the sweep takes after their time."""
    storage.index.refresh()
    known = set(storage.index.bundles)
    assert {tar.stem for tar in tars(root)} == known
    assert storage.index.fold() and storage.index.fold()
    assert {file.stem for file in (root / ".dlm/bundles/tar").iterdir()} == known
    assert single(root) == []
    assert not storage.index.cleaning and not storage.index.garbage and storage.index.open is None
    left = [file for file in (root / ".dlm/tmp").rglob("*") if file.is_file()]
    assert all(file.parent.name == "bundle" for file in left)


def test_what_is_trashed_while_it_is_packed_does_not_come_back(disk, root):
    """At any moment of the packing: a rename, a removal, and a new file in the old one's place."""
    n = 0
    while True:
        n += 1
        folder = root / str(n)
        folder.mkdir()
        storage = opened(folder, bundle_bytes=1 << 20)
        fill(storage, FEW)
        other = again(storage)
        wanted = dict(FEW)

        def meanwhile(other=other, wanted=wanted):
            other.rename("block-0/000.dat", ".dlm/trash/a")
            other.remove("block-0/002.dat")
            other.rename("block-1", "block-2")
            del wanted["block-0/000.dat"], wanted["block-0/002.dat"]
            for path in [p for p in wanted if p.startswith("block-1/")]:
                wanted["block-2" + path[7:]] = wanted.pop(path)
            try:
                put(other, "block-0/000.dat", b"another")
                wanted["block-0/000.dat"] = b"another"
            except StorageUnavailableError:
                pass  # its place is being cleared

        counting = Stopping(storage.inner, n, meanwhile)
        pack(bundled(counting, bundle_bytes=1 << 20), any_digest, FAR)
        if counting.left > 0:
            break
        assert contents(again(storage)) == wanted, f"at call {n}: {counting.last}"
        assert get(other, ".dlm/trash/a") == FILES["block-0/000.dat"]
        pack(storage, any_digest, FAR)
        assert contents(again(storage)) == wanted
        shutil.rmtree(folder)
    assert n > 20


def test_two_packers_at_once_harm_nothing(disk, root):
    """Who comes second undoes what the first began; the first notices and stops."""
    for n in range(1, 400):
        folder = root / str(n)
        folder.mkdir()
        storage = opened(folder, bundle_bytes=1 << 20)
        fill(storage, FEW)
        stopping = Stopping(storage.inner, n, lambda s=storage: pack(again(s), any_digest, FAR))
        with suppress(DlmError):
            pack(bundled(stopping, bundle_bytes=1 << 20), any_digest, FAR)
        assert contents(again(storage)) == FEW, f"at call {n}: {stopping.last}"
        pack(storage, any_digest, FAR)
        assert contents(again(storage)) == FEW
        _nothing_is_left_over(again(storage), folder)
        shutil.rmtree(folder)
        if stopping.left > 0:
            return
    pytest.fail("it never came through")


def test_what_goes_on_elsewhere_voids_no_look(disk, root, monkeypatch):
    """However many others move other members: what is not there is told as such."""
    fill(disk)
    pack(disk, any_digest, FAR)
    other = bundled(Unsynced("other", str(root)))
    inner, names = disk.inner.stat_many, iter(range(100))
    moved = next(iter(FILES))

    def busy(paths):
        nonlocal moved
        if "nothing" in paths:
            before, moved = moved, f"moved/{next(names)}"
            other.rename(before, moved)
        return inner(paths)

    monkeypatch.setattr(disk.inner, "stat_many", busy)
    assert disk.stat("nothing") is None


def test_a_tar_that_reads_back_differently_does_not_count(disk, root):
    """A bit that flips on its way to the medium ends the packing; the single files stay."""

    class Flipping(Wrapped):
        def write(self, path, source, size):
            if "tmp/bundle/" in path and size > 2000:
                data = bytearray(source.read(-1))
                data[520] ^= 1  # in the first member's bytes
                source = io.BytesIO(data)
            return self.inner.write(path, source, size)

    fill(disk)
    bad = bundled(Flipping(disk.inner))
    with pytest.raises(DlmError):
        pack(bad, any_digest, FAR)
    assert single(root) == sorted(FILES)
    assert tars(root) == []
    assert contents(disk) == FILES


def test_a_listing_that_leaves_something_out_hides_no_member(disk, root):
    """Who begins to follow the log asks for the next record by name as well."""
    fill(disk)
    pack(disk, any_digest, FAR)
    for _ in range(10):
        lying = Faulty(disk.inner)
        lying.arm(Fault.LISTING_INCOMPLETE, ALWAYS, "bundles/log")
        for path in FILES:
            with suppress(StorageUnavailableError):
                assert bundled(lying).stat(path) is not None


def test_faults_of_the_storage_lose_nothing(disk, root):
    """Calls that fail, replies that get lost, listings with holes: packed in the end, and whole."""
    for seed in range(6):
        folder = root / str(seed)
        folder.mkdir()
        storage = opened(folder)
        fill(storage)
        rates = dict.fromkeys(
            (Fault.GONE, Fault.TIMEOUT, Fault.DELETE_REPLY_LOST, Fault.LISTING_INCOMPLETE,
             Fault.FULL, Fault.WRITE_CUT_SHORT, Fault.DELETE_NOT_DONE), 0.02,
        )  # fmt: skip
        faulty = Faulty(storage.inner, seed, rates)
        for _ in range(20):
            with suppress(DlmError):
                pack(bundled(faulty), any_digest, FAR)
            assert contents(again(storage)) == FILES
        assert faulty.struck
        pack(storage, any_digest, FAR)
        assert contents(again(storage)) == FILES
        assert single(folder) == []
        shutil.rmtree(folder)


def test_times_are_compared_as_far_as_both_tell_them():
    """S3 tells milliseconds in a listing and whole seconds of one object."""
    member = Member("b", 0, 512, 3, "sha256:", 1000.25)
    assert member.was(3, 1000.25) and member.was(3, 1000.0)
    assert not member.was(3, 1000.5) and not member.was(4, 1000.25) and not member.was(3, 1001.0)


def test_what_plain_tar_lists_is_what_the_index_says(disk, root):
    """Offsets, sizes and names; the last member is the bundle's own index."""
    fill(disk)
    disk = again(disk, bundle_bytes=1 << 20)
    pack(disk, any_digest, FAR)
    (tar,) = tars(root)
    with tarfile.open(tar) as file:
        infos = file.getmembers()
    listed = {info.name: (info.offset_data, info.size) for info in infos[:-1]}
    assert listed == {p: (disk.index.get(p).offset, len(d)) for p, d in FILES.items()}
    assert infos[-1].name == f".dlm/bundles/tar/{tar.stem}.members"
    assert tar.stat().st_size % 10240 == 0


def test_an_unbroken_stream_of_bytes_is_read_and_written(disk):
    """What a source raises goes through, and a member's stream tells size and stamp."""
    fill(disk)
    pack(disk, any_digest, FAR)
    with disk.open_read("block-1/011.dat") as stream:
        assert stream.size == len(FILES["block-1/011.dat"])
        assert stream.read(5) + stream.read() == FILES["block-1/011.dat"]
        assert stream.stamp() == stream.opened
    with pytest.raises(ZeroDivisionError):
        disk.write("x", _Failing(), 3)
    assert disk.stat("x") is None


class _Failing(io.RawIOBase):
    def read(self, size: int = -1, /) -> bytes:
        raise ZeroDivisionError
