"""Bundles beside a dictionary: whatever is moved, packed and cut off, both say the same."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dlm_core.errors import DlmError, PayloadExistsError, PayloadNotFoundError
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.conformance import get, put
from dlm_core.storages.packing import pack
from dlm_core.storages.posix import PosixStorage
from tests.backends import bundled
from tests.fakes import FAR, Hooked, StoppedError, Stopping, any_digest, die_after
from tests.payloads import contents

PATHS = ("a", "b", "top/a", "top/b", "top/sub/c", "other/a", ".dlm/trash/1", ".dlm/trash/2")
TREES = ("top", "other", ".dlm/trash/tree")
_BELOW = 100
_paths = st.sampled_from(PATHS)
_workers = st.integers(0, 1)
_calls = st.integers(1, 60)


class Unsynced(PosixStorage):
    """Does not wait for the medium."""

    def flush(self) -> None:
        pass


class Bundling(RuleBasedStateMachine):
    """Two workers on one storage, and a model of what they should find there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="dlm-bundles-"))
        (self.folder / "disk").mkdir()
        self.model: dict[str, bytes] = {}
        self.count = 0

    @initialize(size=st.sampled_from([500, 3000, 100_000]), share=st.sampled_from([0.01, 0.5, 1]))
    def open(self, size: int, share: float) -> None:
        self.terms = {"bundle_bytes": size, "bundle_below": _BELOW, "repack_share": share}
        self.workers = [self.worker(), self.worker()]

    def worker(self, stop: int = 0, meanwhile: object = None) -> Bundled:
        disk = Unsynced("disk", str(self.folder / "disk"))
        return bundled(Stopping(disk, stop, meanwhile) if stop else disk, **self.terms)

    def has_below(self, tree: str) -> bool:
        return any(path.startswith(f"{tree}/") for path in self.model)

    # --- what the lifecycle does -----------------------------------------------------------------

    @rule(n=_workers, path=_paths, size=st.integers(0, 2 * _BELOW))
    def write(self, n: int, path: str, size: int) -> None:
        self.count += 1
        data = (b"%d " % self.count * (size + 1))[:size]
        temporary = f".dlm/tmp/0/{self.count}"
        put(self.workers[n], temporary, data)
        try:
            self.workers[n].rename(temporary, path)
        except PayloadExistsError:
            assert path in self.model
            self.workers[n].remove(temporary)
        else:
            assert path not in self.model
            self.model[path] = data

    @rule(n=_workers, source=_paths, destination=_paths)
    def rename(self, n: int, source: str, destination: str) -> None:
        try:
            self.workers[n].rename(source, destination)
        except PayloadNotFoundError:
            assert source not in self.model
        except PayloadExistsError:
            assert destination in self.model
        else:
            self.model[destination] = self.model.pop(source)

    @rule(n=_workers, path=_paths)
    def remove(self, n: int, path: str) -> None:
        self.workers[n].remove(path)
        self.model.pop(path, None)

    @rule(n=_workers, source=st.sampled_from(TREES), destination=st.sampled_from(TREES))
    def rename_tree(self, n: int, source: str, destination: str) -> None:
        if not self.has_below(source) or self.has_below(destination) or source == destination:
            return
        with suppress(PayloadExistsError):  # an empty folder may be there still
            self.workers[n].remove(destination)
            self.workers[n].rename(source, destination)
            self.moved(source, destination)

    def moved(self, source: str, destination: str) -> None:
        for path in [p for p in self.model if p.startswith(f"{source}/")]:
            self.model[destination + path[len(source) :]] = self.model.pop(path)

    @rule(n=_workers, tree=st.sampled_from(TREES))
    def remove_tree(self, n: int, tree: str) -> None:
        self.workers[n].remove(tree)
        self.model = {p: d for p, d in self.model.items() if not p.startswith(f"{tree}/")}

    # --- packing, and what comes in between ------------------------------------------------------

    @rule(n=_workers)
    def pack(self, n: int) -> None:
        pack(self.workers[n], any_digest, FAR)

    @rule(n=_workers, stop=_calls)
    def pack_and_crash(self, n: int, stop: int) -> None:
        with suppress(StoppedError):
            pack(self.worker(stop), any_digest, FAR)
        self.workers[n] = self.worker()

    @rule(n=_workers, stop=_calls, source=_paths, path=_paths)
    def change_while_it_is_packed(self, n: int, stop: int, source: str, path: str) -> None:
        def meanwhile() -> None:
            with suppress(DlmError):
                self.workers[n].rename(source, f"meanwhile/{self.count}")
                self.model[f"meanwhile/{self.count}"] = self.model.pop(source)
            self.count += 1
            with suppress(DlmError):
                put(self.workers[n], source, b"%d" % self.count)
                self.model[source] = b"%d" % self.count
            self.workers[1 - n].remove(path)
            self.model.pop(path, None)

        pack(self.worker(stop, meanwhile), any_digest, FAR)

    @rule(n=_workers, stop=_calls)
    def two_pack_at_once(self, n: int, stop: int) -> None:
        with suppress(DlmError):
            pack(self.worker(stop, lambda: pack(self.workers[n], any_digest, FAR)), any_digest, FAR)

    @rule(stop=st.integers(1, 20), source=_paths, destination=_paths)
    def crash_while_renaming(self, stop: int, source: str, destination: str) -> None:
        if source not in self.model or destination in self.model:
            return
        with suppress(StoppedError):
            self.worker(stop).rename(source, destination)
        with suppress(PayloadNotFoundError):  # then it was done
            self.worker().rename(source, destination)
        self.model[destination] = self.model.pop(source)

    @rule(stop=st.integers(1, 20), path=_paths)
    def crash_while_removing(self, stop: int, path: str) -> None:
        with suppress(StoppedError):
            self.worker(stop).remove(path)
        self.worker().remove(path)
        self.model.pop(path, None)

    @precondition(lambda self: self.model)
    @rule(n=_workers)
    def fold(self, n: int) -> None:
        worker = self.workers[n]
        worker.index.refresh()
        if worker.index.generation:
            worker.index.fold()

    @rule(n=_workers)
    def reopen(self, n: int) -> None:
        self.workers[n] = self.worker()

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def both_say_the_same(self) -> None:
        for worker in (*getattr(self, "workers", ()),):
            listed = [entry.path for top in ("", ".dlm/trash") for entry in _walk(worker, top)]
            assert sorted(listed) == sorted(self.model)
            told = worker.stat_many(self.model)
            assert {p: e and e.size for p, e in told.items()} == {
                path: len(data) for path, data in self.model.items()
            }
            assert {path: get(worker, path) for path in self.model} == self.model
            assert all(worker.stat(path) is None for path in PATHS if path not in self.model)

    def teardown(self) -> None:
        try:
            if hasattr(self, "workers"):
                self.finish()
        finally:
            shutil.rmtree(self.folder)

    def finish(self) -> None:
        """Packed once more, nothing is left over, and plain tar gives the bytes."""
        worker, root = self.worker(), self.folder / "disk"
        pack(worker, any_digest, FAR)
        self.both_say_the_same()
        worker.index.refresh()
        tars = {tar.stem for tar in (root / ".dlm/bundles/tar").glob("*.tar")}
        assert tars == set(worker.index.bundles)
        assert worker.index.open is None
        assert not worker.index.cleaning and not worker.index.garbage
        single = {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()}
        single = {path for path in single if not path.startswith(".dlm/")}
        assert all(len(self.model[path]) >= _BELOW for path in single)
        found = {tar: self.unpacked(root, tar) for tar in tars}
        for path, data in self.model.items():
            member = worker.index.get(path)
            assert member is None or data in found[member.bundle]

    def unpacked(self, root: Path, tar: str) -> list[bytes]:
        """What plain tar makes of a bundle."""
        folder = self.folder / tar
        folder.mkdir()
        file = root / f".dlm/bundles/tar/{tar}.tar"
        subprocess.run(["tar", "-xf", file, "-C", folder], check=True)
        return [one.read_bytes() for one in folder.rglob("*") if one.is_file()]


def _walk(worker: Bundled, top: str) -> list:
    with suppress(PayloadNotFoundError):
        return list(worker.walk(top))
    return []


_SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


def test_bundles_and_a_dictionary_say_the_same():
    """After every step, for both workers, whatever was cut off or came in between."""
    run = Bundling.TestCase
    run.settings = settings(_SETTINGS, max_examples=15, stateful_step_count=25)
    run().runTest()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_they_do_so_for_long():
    """The same with many more steps."""
    run = Bundling.TestCase
    run.settings = settings(_SETTINGS, max_examples=400, stateful_step_count=40)
    run().runTest()


@pytest.mark.parametrize("how", ["rename", "remove"])
def test_a_file_goes_without_what_only_begins_with_its_name(tmp_path: Path, how: str) -> None:
    """Where the packed file was, a folder may be made for another: two payloads, of which one is
    moved or removed alone, also when that is done again after a crash."""
    storage = bundled(PosixStorage("disk", str(tmp_path)))
    for name in ("x", "x/y"):
        put(storage, name, b"good bytes")
        pack(storage, any_digest, FAR)
    for _ in range(2):
        if how == "remove":
            storage.remove("x")
            break
        with suppress(PayloadExistsError):
            storage.rename("x", ".dlm/trash/uid")
    assert [entry.path for entry in storage.walk()] == ["x/y"]
    assert get(storage, "x/y") == b"good bytes"


@pytest.mark.parametrize("how", ["rename", "remove"])
def test_a_member_goes_without_the_folder_that_was_made_in_its_place(
    tmp_path: Path, how: str
) -> None:
    """Others lie there, one of them too large to be packed; also while a packer that was lost has
    left single files of some to be cleared."""
    disk = bundled(PosixStorage("disk", str(tmp_path)))
    put(disk, "x", b"packed")
    pack(disk, any_digest, FAR)
    put(disk, "x/large", bytes(2 << 20))
    put(disk, "x/y", b"packed too")
    with pytest.raises(StoppedError):
        pack(bundled(Hooked(disk.inner, die_after("remove", "x/y"))), any_digest, FAR)
    assert [entry.path for entry in disk.inner.walk()] == ["x/large"]
    if how == "remove":
        disk.remove("x")
    else:
        disk.rename("x", ".dlm/trash/uid")
        assert get(disk, ".dlm/trash/uid") == b"packed"
    assert contents(disk) == {"x/y": b"packed too", "x/large": bytes(2 << 20)}
