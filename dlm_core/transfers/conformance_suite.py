"""The checks of :mod:`dlm_core.transfers.conformance` as tests, by the DLM's plug-in of pytest."""

from __future__ import annotations

import pytest

from dlm_core.storages.conformance import name_of
from dlm_core.storages.port import Storage
from dlm_core.transfers.conformance import CHECKS, Check, Ends, run_check
from dlm_core.transfers.plugged import Mover

_FOLDER = "dlm-conformance"


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_contract_of_movers_is_kept(
    dlm_mover: tuple[Mover, Storage, Storage], check: Check
) -> None:
    """Each check passes between the two storages of the fixture."""
    run_check(check, Ends(*dlm_mover), _FOLDER)
