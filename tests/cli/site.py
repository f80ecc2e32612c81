"""What tests of the command line share: the result of a command, and how a refusal looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Dlm = Callable[..., Result]


def refused(result: Result, code: str, exit_code: int) -> str:
    """Check that a command ended in one line on stderr with its code; the line."""
    assert result.code == exit_code, result
    assert result.error.startswith(f"dlm: error {code}: ")
    assert result.error.count("\n") == 1 and result.error.endswith("\n"), result.error
    assert "Traceback" not in result.error
    return result.error
