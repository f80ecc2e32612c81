"""The contracts for adapters and movers of other people, by pytest: the fixtures of the suites
:mod:`dlm_core.storages.conformance_suite` and :mod:`dlm_core.transfers.conformance_suite`.

``pytest --pyargs dlm_core.storages.conformance_suite --dlm-storage-factory=module:function`` takes
a function that is given an empty folder (``pathlib.Path``) and returns an empty storage;
``pytest --pyargs dlm_core.transfers.conformance_suite --dlm-mover-factory=module:function`` one
that returns a mover, and a source and a destination for it. Who needs more imports the suite's test
into a module of its own tests, beside its own fixture of that name. pytest finds this plug-in by
entry point; unless it is asked for it does nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from dlm_core.storages.port import Storage

_STORAGE, _MOVER = "--dlm-storage-factory", "--dlm-mover-factory"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options in a group of their own."""
    group = parser.getgroup("dlm", "data lifecycle manager")
    group.addoption(
        _STORAGE, metavar="MODULE:FUNCTION", default=None,
        help="makes the storage that is checked: takes an empty folder, returns the adapter",
    )  # fmt: skip
    group.addoption(
        _MOVER, metavar="MODULE:FUNCTION", default=None,
        help="makes the mover that is checked: takes an empty folder, returns it with two storages",
    )  # fmt: skip


@pytest.fixture
def dlm_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, as the function that was named makes it."""
    return cast("Storage", _made(request, _STORAGE, tmp_path))


@pytest.fixture
def dlm_mover(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Storage, Storage]:
    """A mover, and an empty source and destination, as the function that was named makes them."""
    return cast("tuple[Any, Storage, Storage]", _made(request, _MOVER, tmp_path))


def _made(request: pytest.FixtureRequest, option: str, folder: Path) -> Any:
    named = request.config.getoption(option)
    module, _, function = (named or "").partition(":")
    if not module or not function:
        raise pytest.UsageError(f"{option}=MODULE:FUNCTION is needed, not {named!r}")
    return getattr(import_module(module), function)(folder)
