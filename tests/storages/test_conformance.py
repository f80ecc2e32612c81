"""The contract of the storage port, for every adapter and every fake."""

import pytest

from dlm_core.errors import NonconformingError
from dlm_core.storages.conformance import (
    CHECKS,
    name_of,
    names_that_differ_are_names_of_two_files,
    run_check,
)
from dlm_core.storages.posix import PosixStorage
from tests.backends import open_dav
from tests.fakes import Tampering


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_contract_is_kept(storage, check):
    """Each check passes, and leaves nothing behind."""
    run_check(check, storage, "folder")
    assert list(storage.walk()) == []
    assert storage.stat("folder") is None or list(storage.walk("folder")) == []


def test_every_check_says_what_has_to_hold():
    """By a name and a docstring of its own."""
    assert len({name_of(check) for check in CHECKS}) == len(CHECKS)
    assert all(check.__doc__ for check in CHECKS)


def test_a_storage_that_changes_bytes_does_not_conform(tmp_path):
    """The checks notice what they are there for."""
    bad = Tampering(PosixStorage("bad", str(tmp_path)))
    failed = []
    for check in CHECKS:
        try:
            run_check(check, bad, "folder")
        except NonconformingError:
            failed.append(name_of(check))
    assert "bytes of every size come back" in failed and len(failed) < len(CHECKS)


def test_a_storage_that_takes_two_names_for_one_does_not_conform(folding):
    """What differs in case only is one file there; told in those words."""
    storage = open_dav(folding)
    with pytest.raises(NonconformingError, match="are one name to it"):
        run_check(names_that_differ_are_names_of_two_files, storage, "folder")
    assert list(storage.walk()) == []
