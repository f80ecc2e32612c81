"""The command line on a real catalogue and real files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_cli.main import main
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.rebalance import plan_rebalance
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.work import Context, drain
from dlm_core.settings import load_settings
from dlm_core.types import OperationKind
from tests.cli.site import Dlm, Result
from tests.site import ALL


@pytest.fixture
def dlm(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Dlm:
    """Run a command on a fresh catalogue."""
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DLM_DATABASE_URL", database_url)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["dlm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def storages(dlm: Dlm, tmp_path: Path) -> dict[str, Path]:
    """Two storages at two locations, added by command."""
    roots = {}
    for name, location in (("a", "here"), ("b", "there")):
        roots[name] = tmp_path / name
        roots[name].mkdir()
        assert dlm("location", "add", location).code == 0
        added = dlm("storage", "add", name, "--location", location, "--root", str(roots[name]))
        assert added.code == 0, added.error
    return roots


@pytest.fixture
def settle(engine: Engine, storages: dict[str, Path]) -> Callable[[], None]:
    """Do what the sensors would: everything that is due."""
    context = Context(engine, load_settings(), "user:test")

    def plan(context: Context) -> int:
        expiry = ExpiryPlanner(1000, 2**40)
        return plan_replication(context) + expiry(context) + plan_rebalance(context)

    executors = {OperationKind.ADMIT: execute_admit, **ALL}
    return lambda: drain(context, executors, plan) and None
