"""Movers of other people bring bytes; what becomes visible is proven by us, whatever they do."""

import hashlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import pytest

from dlm_core.errors import StorageUnavailableError
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.open import open_storage
from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers import plugged
from dlm_core.transfers.checksums import manifest_digest, observe
from dlm_core.transfers.conformance import CHECKS
from dlm_core.transfers.mover import CopyTask, Lane, copy_batch
from dlm_core.transfers.throttle import Pace, Watched, paced
from dlm_core.types import ManifestEntry, PayloadKind
from tests.backends import s3_config
from tests.fakes import Hooked
from tests.payloads import contents, put

HERE = Path(__file__).resolve().parents[2]

# somebody's own package: it has `cp` bring files from folder to folder, and misbehaves if told to
PACKAGE = """
    import os, subprocess, time

    from dlm_core.storages.posix import PosixStorage
    from dlm_core.transfers import conformance


    class Cp:
        name = "cp"

        def __init__(self):
            self.calls, self.ends, self.spoil = [], [], None

        def suits(self, source, destination):
            self.ends.append((source, destination))
            return isinstance(source, PosixStorage) and isinstance(destination, PosixStorage)

        def bring(self, source, destination, files, stop, progress):
            self.calls.append(files)
            for one in files:
                if stop.is_set():
                    return
                target = os.path.join(destination.root, one.written)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                said = os.path.join(source.root, one.source)
                subprocess.run(["cp", "--", said, target], check=True)
                if progress is not None:
                    progress(one.size)
            if self.spoil is not None:
                self.spoil(source, destination, files, stop)


    def broken():
        raise RuntimeError("no license\\nfound")


    class Linking(Cp):
        def bring(self, source, destination, files, stop, progress):
            for one in files:
                target = os.path.join(destination.root, one.written)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.link(os.path.join(source.root, one.source), target)


    class Littering(Cp):
        def bring(self, source, destination, files, stop, progress):
            super().bring(source, destination, files, stop, progress)
            open(os.path.join(destination.root, "cp.log"), "w").close()


    class Deaf(Cp):
        def bring(self, source, destination, files, stop, progress):
            super().bring(source, destination, files, type(stop)(), progress)
            while stop.is_set():
                time.sleep(0.1)


    def ends_for(mover, folder):
        ends = []
        for name in ("source", "destination"):
            (folder / name).mkdir()
            ends.append(PosixStorage(name, str(folder / name)))
        return mover, *ends


    def make_linking(folder):
        return ends_for(Linking(), folder)


    def make_littering(folder):
        return ends_for(Littering(), folder)


    def make_deaf(folder):
        conformance.STOPPED_WITHIN = 1
        return ends_for(Deaf(), folder)
"""
ENTRIES = """\
[dlm.movers]
a-broken = their_movers:broken
b-absent = their_absent_movers:Cp
c-odd = their_movers:dict
d-cp = their_movers:Cp
e-littering = their_movers:Littering
"""


@pytest.fixture
def package(tmp_path):
    """A folder with a module and what an installed package tells of itself."""
    folder = tmp_path / "package"
    about = folder / "their_movers-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "their_movers.py").write_text(textwrap.dedent(PACKAGE))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-movers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES.replace("their_movers:dict", "builtins:dict"))
    return folder


@pytest.fixture
def cp(package, monkeypatch):
    """The mover, as it was found and loaded."""
    monkeypatch.syspath_prepend(package)
    plugged._loaded.cache_clear()
    yield next(one for one in plugged.movers() if one.name == "cp")
    plugged._loaded.cache_clear()
    sys.modules.pop("their_movers", None)


@pytest.fixture
def ends(tmp_path):
    """Two folders."""
    found = []
    for name in ("source", "destination"):
        (tmp_path / name).mkdir()
        found.append(open_storage(name, "posix", str(tmp_path / name), {}))
    return found


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def task(source, path, data):
    put(source, path, data)
    return CopyTask(
        uuid.uuid4(), path, f"copy/{path}", PayloadKind.FILE, len(data), sha256(data), (),
        uuid.uuid4().hex,
    )  # fmt: skip


def tree(source, path, files):
    manifest = []
    for name, data in files.items():
        put(source, f"{path}/{name}", data)
        manifest.append(ManifestEntry(name, len(data), sha256(data)))
    return CopyTask(
        uuid.uuid4(), path, f"copy/{path}", PayloadKind.DIRECTORY,
        sum(one.size for one in manifest), manifest_digest(manifest), tuple(manifest),
        uuid.uuid4().hex,
    )  # fmt: skip


def private(storage):
    """What is left below .dlm."""
    folder = Path(storage.root, ".dlm")
    return [str(path) for path in folder.rglob("*") if not path.is_dir()]


def errors_of(source, destination, tasks, **more):
    results = copy_batch(source, destination, tasks, **more)
    return {result.task.source_path: result.error for result in results}


def test_a_mover_that_suits_brings_the_bytes(cp, ends, monkeypatch):
    """Files of any size and directories, in one call, each to a name of its own; we write none."""
    source, destination = ends
    payloads = {"a": b"1", "b/empty": b"", "c ü": os.urandom(3 << 20)}
    tasks = [task(source, path, data) for path, data in payloads.items()]
    tasks.append(tree(source, "m.ms", {"table": b"2", "sub/ü x": b"3", "sub/empty": b""}))
    monkeypatch.setattr(PosixStorage, "write", None)
    monkeypatch.setattr(PosixStorage, "copy_from", None)
    moved = []
    assert set(errors_of(source, destination, tasks, progress=moved.append).values()) == {None}
    (files,) = cp.calls
    assert len(files) == len({one.written for one in files}) == 6
    assert all(one.written.startswith(".dlm/tmp/") for one in files)
    assert sum(moved) == sum(one.size for one in files)
    for one in tasks:
        assert observe(destination, one.destination_path, one.kind).digest == one.digest
    assert private(destination) == []


def test_it_is_given_the_adapters_themselves(cp, ends):
    """Not what paces them; and is asked once for a batch."""
    source, destination = ends
    pace = Pace(None, threading.Event())
    tasks = [task(source, "x", b"payload")]
    errors_of(paced(source, [pace]), paced(destination, [pace, Watched(print)]), tasks)
    assert cp.ends == [(source, destination)] and len(cp.calls) == 1


def test_what_is_broken_is_told_once_and_in_nobodys_way(package, monkeypatch, caplog):
    """Neither a factory that raises, nor a module that is not there, nor what is no mover; of those
    that suit the first by name is taken."""
    monkeypatch.syspath_prepend(package)
    plugged._loaded.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "dlm"):
            found = [plugged.movers(), plugged.movers()]
    finally:
        plugged._loaded.cache_clear()
        sys.modules.pop("their_movers", None)
    assert [type(one).__name__ for one in found[0]] == ["Cp", "Littering"]
    assert found[0] is found[1]
    told = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in told] == ["a-broken", "b-absent", "c-odd"]
    assert "RuntimeError: no license found" in told[0]


def test_a_mover_that_does_not_suit_or_cannot_tell_is_not_used(cp, ends, caplog, monkeypatch):
    """The files are copied as if it was not installed."""
    source, destination = ends
    bundled = Bundled(destination, None)
    assert plugged.suitable(source, bundled) is None
    monkeypatch.setattr(type(cp), "suits", lambda *_: 1 / 0)
    assert errors_of(source, destination, [task(source, "x", b"payload")]) == {"x": None}
    assert cp.calls == [] and "ZeroDivisionError" in caplog.text


def overwrite(destination, one, data):
    Path(destination.root, one.written).write_bytes(data)


@pytest.mark.parametrize("wrong", [b"PAYLOAD", b"payload and more", b"", None, "link", "folder"])
def test_what_it_spoils_or_leaves_out_is_copied_without_it(cp, ends, wrong):
    """Other bytes, more or less of them, nothing at all, a link, a folder: of that file only; and
    what lay there is cleared."""
    source, destination = ends

    def spoil(source, destination, files, stop):
        target = Path(destination.root, files[1].written)
        target.unlink()
        if wrong == "link":
            target.symlink_to(Path(source.root, files[1].source))
        elif wrong == "folder":
            target.mkdir()
        elif wrong is not None:
            target.write_bytes(wrong)

    cp.spoil = spoil
    tasks = [task(source, name, b"payload") for name in ("a", "b", "c")]
    assert errors_of(source, destination, tasks) == {"a": None, "b": None, "c": None}
    assert contents(destination) == {f"copy/{name}": b"payload" for name in "abc"}
    assert not any(Path(destination.root, "copy", name).is_symlink() for name in "abc")
    assert private(destination) == [] and contents(source) == dict.fromkeys("abc", b"payload")


@pytest.mark.parametrize("error", [StorageUnavailableError(storage="x", message="-"), OSError("-")])
def test_what_it_raises_is_no_files_error(cp, ends, caplog, error):
    """What it had brought is proven and used, the rest is copied; it is told in a line."""
    source, destination = ends

    def spoil(source, destination, files, stop):
        Path(destination.root, files[0].written).unlink()
        raise error

    cp.spoil = spoil
    tasks = [task(source, name, b"payload") for name in "ab"]
    assert errors_of(source, destination, tasks) == {"a": None, "b": None}
    assert contents(destination) == {"copy/a": b"payload", "copy/b": b"payload"}
    assert "mover cp failed from source to destination" in caplog.text
    assert private(destination) == []


def test_a_fault_is_told_as_without_it(cp, ends):
    """A damaged source is damaged, a missing one is missing, though a mover was asked first."""
    source, destination = ends
    tasks = [task(source, name, b"payload") for name in ("bad", "good", "gone")]
    Path(source.root, "bad").write_bytes(b"PAYLOAD")
    Path(source.root, "gone").unlink()
    found = errors_of(source, destination, tasks)
    assert (found["bad"].code, found["good"], found["gone"].code) == ("DLM-401", None, "DLM-303")
    assert contents(destination) == {"copy/good": b"payload"} and private(destination) == []


@pytest.mark.parametrize(("data", "code"), [(b"payload", None), (b"PAYLOAD", "DLM-304")])
def test_what_it_writes_at_the_final_name_is_no_copy_by_its_word(cp, ends, data, code):
    """It counts as what anybody may have left there: compared, and never replaced."""
    source, destination = ends

    def spoil(source, destination, files, stop):
        Path(destination.root, files[0].written).unlink()
        Path(destination.root, "copy").mkdir()
        Path(destination.root, "copy/x").write_bytes(data)

    cp.spoil = spoil
    error = errors_of(source, destination, [task(source, "x", b"payload")])["x"]
    assert (error and error.code) == code
    assert contents(destination) == {"copy/x": data} and private(destination) == []


def test_a_stranger_in_a_directory_does_not_become_visible(cp, ends):
    """A log or a partial file that the mover left beside the files of a directory payload."""
    source, destination = ends

    def spoil(source, destination, files, stop):
        Path(destination.root, files[0].written + ".part").write_bytes(b"half")

    cp.spoil = spoil
    whole = tree(source, "m.ms", {"table": b"2", "sub/x": b"3"})
    assert errors_of(source, destination, [whole]) == {"m.ms": None}
    assert contents(destination) == {"copy/m.ms/table": b"2", "copy/m.ms/sub/x": b"3"}
    assert private(destination) == []


def test_a_directory_with_one_wrong_file_is_copied_anew(cp, ends):
    """Whole or not at all, as ever; the payload beside it is used."""
    source, destination = ends
    cp.spoil = lambda _, there, files, stop: overwrite(there, files[-1], b"?")
    tasks = [task(source, "x", b"1"), tree(source, "m.ms", {"table": b"2", "sub/x": b"3"})]
    assert set(errors_of(source, destination, tasks).values()) == {None}
    wanted = {"copy/x": b"1", "copy/m.ms/table": b"2", "copy/m.ms/sub/x": b"3"}
    assert contents(destination) == wanted and private(destination) == []


def test_a_mover_that_is_still_at_work_spoils_nothing_of_ours(cp, ends):
    """Against its contract it goes on writing after it raised: our copy has another name."""
    source, destination = ends
    names = []

    def late(call, path):
        if call == "rename":
            for one in names:
                Path(destination.root, one).parent.mkdir(parents=True, exist_ok=True)
                Path(destination.root, one).write_bytes(b"LATE!!!")

    def spoil(source, destination, files, stop):
        names.extend(one.written for one in files)
        for one in names:
            Path(destination.root, one).unlink()
        raise OSError("timed out")

    cp.spoil = spoil
    cp.suits = lambda source, destination: True
    hooked = Hooked(destination, late)
    assert errors_of(source, hooked, [task(source, "x", b"payload")]) == {"x": None}
    assert contents(destination) == {"copy/x": b"payload"}


@pytest.mark.parametrize("limit", ["files", "source", "destination"])
def test_it_is_not_used_while_something_is_limited(cp, ends, limit):
    """Files at once, or bytes a second at either end: it could not keep to it."""
    source, destination = ends
    none, some = (Pace(rate, threading.Event()) for rate in (None, 1e9))
    reading = [some if limit == "source" else none]
    writing = [none, some if limit == "destination" else none]
    lane = Lane(limited=lambda: limit == "files")
    tasks = [task(source, "x", b"payload")]
    found = errors_of(paced(source, reading), paced(destination, writing), tasks, lane=lane)
    assert found == {"x": None} and cp.calls == []
    assert contents(destination) == {"copy/x": b"payload"}


def test_it_is_not_used_where_writing_is_showing(cp, ends, s3):
    """An object store has no temporary names: what is written there is visible."""
    cp.suits = lambda source, destination: True
    bucket = open_storage("s3", "s3", f"{s3.bucket}/{uuid.uuid4().hex}", s3_config(s3))
    assert errors_of(ends[0], bucket, [task(ends[0], "x", b"payload")]) == {"x": None}
    assert cp.calls == []


def test_a_stop_ends_it(cp, ends):
    """It is told by the event that everything is told by; what it brought is not shown then."""
    source, destination = ends
    stop = threading.Event()
    hung = []

    def spoil(source, destination, files, its):
        threading.Timer(0.2, stop.set).start()
        hung.append(its.wait(30))

    cp.spoil = spoil
    large = task(source, "x", os.urandom(9 << 20))
    assert errors_of(source, destination, [large], stop=stop) == {}
    assert hung == [True] and contents(destination) == {} and private(destination) == []
    assert errors_of(source, destination, [large], stop=stop) == {} and len(cp.calls) == 1


def test_names_that_no_list_could_hold_are_not_its_business(cp, ends):
    """Line ends, backslashes, octets that are no text: many programs would take them for others."""
    source, destination = ends
    tasks = [task(source, name, b"payload") for name in ("a\nb", "a\\b", "a\udcff", "a b")]
    assert set(errors_of(source, destination, tasks).values()) == {None}
    assert [one.source for files in cp.calls for one in files] == ["a b"]


def test_a_large_file_that_was_begun_is_gone_on_with_without_it(cp, ends):
    """What an earlier try of ours left is not brought a second time."""
    source, destination = ends
    data = os.urandom(5 << 20)
    one = task(source, "x", data)
    put(destination, ".dlm/tmp/l/earlier", data[: 2 << 20])
    begun = CopyTask(
        one.operation_id, one.source_path, one.destination_path, one.kind, one.size, one.digest, (),
        one.token, partial=".dlm/tmp/l/earlier",
    )  # fmt: skip
    assert errors_of(source, destination, [begun], resume_bytes=1 << 20) == {"x": None}
    assert cp.calls == [] and contents(destination) == {"copy/x": data}


# --- the suite ------------------------------------------------------------------------------------


def run_suite(package, *options):
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    suite = ("--pyargs", "dlm_core.transfers.conformance_suite")
    found = subprocess.run(
        [sys.executable, *pytest_alone, *suite, *options],
        cwd=package, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{HERE}", "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


def test_the_mover_of_the_documents_passes_the_suite(package, monkeypatch):
    """By one command of pytest, which names a function that makes it with two storages."""
    page = (HERE / "docs/storages.md").read_text()
    example = page.split("## Movers of other people")[1].split("```python\n")[1].split("```")[0]
    more = "\n\ndef make(folder):\n    import their_movers\n"
    more += "    return their_movers.ends_for(Bbcp(), folder)\n"
    (package / "my_movers.py").write_text(example + more)
    (package / "bbcp").write_text('#!/bin/sh\nexec cp -- "$1" "$2"\n')
    (package / "bbcp").chmod(0o755)
    monkeypatch.setenv("PATH", f"{package}{os.pathsep}{os.environ['PATH']}")
    code, told = run_suite(package, "--dlm-mover-factory=my_movers:make")
    assert code == 0 and f"{len(CHECKS)} passed" in told, told


@pytest.mark.parametrize(
    ("which", "check", "reason"),
    [
        ("linking", "links", "is a link to its source"),
        ("littering", "size", "wrote more than it was asked for"),
        ("deaf", "stop", "has not returned"),
    ],
)
def test_a_mover_that_breaks_the_contract_is_found(package, which, check, reason):
    """Links for copies, files of its own at the destination, no ear for a stop."""
    few = ("-k", check, f"--dlm-mover-factory=their_movers:make_{which}")
    code, told = run_suite(package, *few)
    assert code == 1 and reason in told, told
