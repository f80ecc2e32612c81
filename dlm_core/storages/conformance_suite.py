"""The checks of :mod:`dlm_core.storages.conformance` as tests (see the plug-in beside this)."""

from __future__ import annotations

import pytest

from dlm_core.storages.conformance import CHECKS, Check, name_of, run_check
from dlm_core.storages.port import Storage

_FOLDER = "dlm-conformance"


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_contract_is_kept(dlm_storage: Storage, check: Check) -> None:
    """Each check passes, and what it wrote can be removed."""
    run_check(check, dlm_storage, _FOLDER)
    left = [entry.path for entry in dlm_storage.walk()]
    assert left == [], f"the check has left {left}"
