"""Adapters of other people: found by entry point, checked by pytest with the one suite."""

import io
import os
import subprocess
import sys
import textwrap

import pytest

from dlm_core.errors import InvalidValueError, StorageUnavailableError
from dlm_core.storages import open as opening
from dlm_core.storages.conformance import CHECKS, run_check
from dlm_core.storages.open import open_storage
from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers.reading import Interrupted
from dlm_core.transfers.throttle import bare

ADAPTER = '''
    """An adapter in somebody's own package: a folder; the bad one loses what it overwrites."""

    from dlm_core.storages.posix import PosixStorage


    def open_it(name, root, config):
        return PosixStorage(name, root)


    def make(folder):
        return PosixStorage("theirs", str(folder))


    class Raising(PosixStorage):
        """Fails in ways of its own."""

        def stat(self, path):
            raise KeyError(path)

        def walk(self, path=""):
            yield from super().walk(path)
            raise RuntimeError("its listing")

        def write(self, path, source, size):
            source.read(1)
            raise ConnectionError("its server")

        def usage(self):
            return 1 / 0

        def open_read(self, path):
            stream = super().open_read(path)
            stream.read = lambda size=-1: [][0]
            return stream


    def open_raising(name, root, config):
        return Raising(name, root)


    class Overwriting(PosixStorage):
        def write(self, path, source, size):
            if self.stat(path) is not None:
                self.remove(path)
            return super().write(path, source, size)


    def make_bad(folder):
        return Overwriting("theirs", str(folder))
'''


@pytest.fixture
def package(tmp_path):
    """A folder with a module and what an installed package tells of itself."""
    (tmp_path / "theirs.py").write_text(textwrap.dedent(ADAPTER))
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[dlm.storages]\ntheirs = theirs:open_it\nbroken = theirs:nothing\n"
        "raising = theirs:open_raising\n"
    )
    return tmp_path


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    opening.interfaces.cache_clear()
    yield package
    opening.interfaces.cache_clear()
    sys.modules.pop("theirs", None)


def test_an_adapter_is_found_by_its_entry_point(installed):
    """It opens storages of its interface like one of ours, and nothing of ours is replaced."""
    storage = open_storage("x", "theirs", str(installed), {})
    assert storage.stat("theirs.py").kind == "file"
    assert {"posix", "s3", "xrootd", "theirs"} <= set(opening.interfaces())


def test_an_adapter_that_cannot_be_loaded_is_told_when_it_is_used(installed):
    """In one line; the others work."""
    with pytest.raises(InvalidValueError, match="broken") as caught:
        open_storage("x", "broken", str(installed), {})
    assert "\n" not in str(caught.value)
    assert open_storage("x", "theirs", str(installed), {}).check() is None


def test_whatever_an_adapter_raises_is_an_outage_of_its_storage(installed):
    """Which ends no work on other storages; what its source raises goes through as it is."""
    storage = open_storage("x", "raising", str(installed), {})
    (installed / "file").write_text("x")
    calls = [
        lambda: storage.stat("file"), lambda: list(storage.walk()), storage.usage,
        lambda: storage.write("new", io.BytesIO(b"x"), 1),
        lambda: storage.open_read("file").read(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StorageUnavailableError, match="its adapter failed"):
            call()

    class Interrupting:
        def read(self, size=-1):
            raise Interrupted

    with pytest.raises(Interrupted):
        storage.write("new", Interrupting(), 1)


def test_an_adapter_keeps_the_contract_where_it_is_used(installed):
    """Nothing of what it has is lost by being looked after: the calls that it may have, too."""
    (installed / "root").mkdir()
    storage = open_storage("x", "theirs", str(installed / "root"), {})
    for check in CHECKS:
        run_check(check, storage, "folder")
    storage.concurrency = 7
    assert bare(storage).concurrency == 7 and isinstance(bare(storage), PosixStorage)
    assert storage.copy_from and not hasattr(storage, "write_many")


def run_suite(package, *options):
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = subprocess.run(
        [sys.executable, *pytest_alone, *options],
        cwd=package, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(package), "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


SUITE = ("--pyargs", "dlm_core.storages.conformance_suite")


def test_a_good_adapter_passes_the_suite(package):
    """By one command of pytest, which names a function that makes it."""
    code, told = run_suite(package, *SUITE, "--dlm-storage-factory=theirs:make")
    assert code == 0 and f"{len(CHECKS)} passed" in told


def test_an_adapter_that_overwrites_is_found(package):
    """By the checks that are about it, and by no others."""
    few = ("-k", "overwr or names or size")
    code, told = run_suite(package, *SUITE, *few, "--dlm-storage-factory=theirs:make_bad")
    assert code == 1 and "nothing is overwritten" in told and "does not keep the contract" in told
    assert " passed" in told


def test_an_adapter_with_a_fixture_of_its_own_imports_the_test(package):
    """For what needs a server that is started and stopped."""
    (package / "test_theirs.py").write_text(
        "import pytest, theirs\n"
        "from dlm_core.storages.conformance_suite import test_the_contract_is_kept\n"
        "@pytest.fixture\n"
        "def dlm_storage(tmp_path):\n"
        "    return theirs.make(tmp_path)\n"
    )
    code, told = run_suite(package, "test_theirs.py", "-k", "together")
    assert code == 0 and f"1 passed, {len(CHECKS) - 1} deselected" in told


def test_the_plug_in_is_in_nobodys_way(package):
    """Whoever merely has the DLM installed sees no test of it, and pays for no import of it."""
    (package / "test_other.py").write_text(
        "import sys\n"
        "def test_other():\n"
        "    assert 'dlm_core.storages.conformance' not in sys.modules\n"
        "    assert 'pydantic' not in sys.modules\n"
    )
    code, told = run_suite(package)
    assert code == 0 and "1 passed" in told


def test_the_dlm_runs_without_pytest(package):
    """It is no dependency of the DLM."""
    code = "import sys, dlm_cli.main; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
