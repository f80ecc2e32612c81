"""The contract of the storage port for adapters of other people, by pytest: the fixture
``dlm_storage`` of the suite in :mod:`dlm_core.storages.conformance_suite`.

``pytest --pyargs dlm_core.storages.conformance_suite --dlm-storage-factory=module:function`` takes
a function that is given an empty folder (``pathlib.Path``) and returns an empty storage. An adapter
that needs more imports the suite's test into a module of its own tests, beside its own fixture of
that name. pytest finds this plug-in by entry point; unless it is asked for it does nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from dlm_core.storages.port import Storage

_OPTION = "--dlm-storage-factory"


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option, in a group of its own."""
    parser.getgroup("dlm", "data lifecycle manager").addoption(
        _OPTION, metavar="MODULE:FUNCTION", default=None,
        help="makes the storage that is checked: takes an empty folder, returns the adapter",
    )  # fmt: skip


@pytest.fixture
def dlm_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, as the function that was named makes it."""
    named = request.config.getoption(_OPTION)
    module, _, function = (named or "").partition(":")
    if not module or not function:
        raise pytest.UsageError(f"{_OPTION}=MODULE:FUNCTION is needed, not {named!r}")
    return cast("Storage", getattr(import_module(module), function)(tmp_path))
