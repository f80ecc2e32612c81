"""Adapters and stagers of other people, loaded when a storage wants them: one that is broken is in
no other storage's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

from dlm_core.errors import DlmError, InvalidValueError


def open_plug_in(point: EntryPoint, what: str, calls: Sequence[str], *arguments: Any) -> Any:
    """What the function at an entry point makes of ``arguments``; it has to have ``calls``.

    Raises
    ------
    InvalidValueError
        of ``what`` names it, if it cannot be loaded, raises what is no error of ours, or makes
        something else.
    """
    try:
        found = point.load()(*arguments)
    except DlmError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever others' code raises
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if all(callable(getattr(found, call, None)) for call in calls):
            return found
        told = f"what it made has no {', '.join(calls)}"
    raise InvalidValueError(
        what=what, value=point.name, expected=f"one that can be loaded and opened: {told}"
    )
