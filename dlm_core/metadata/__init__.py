"""Metadata extractors: plug-ins of the entry point group 'dlm.metadata_extractors'.

An extractor is ``extract(storage, path, seen) -> dict | None``: what it found, JSON-able, or None
if the payload is none of its kind. It may raise ValueError or OSError for one that is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dlm_core.errors import DlmError
from dlm_core.storages.port import Storage
from dlm_core.types import Observation, check_json

Extractor = Callable[[Storage, str, Observation], dict[str, Any] | None]


@lru_cache(maxsize=1)
def extractors() -> dict[str, Extractor]:
    """The installed extractors by name."""
    return {point.name: _load(point) for point in entry_points(group="dlm.metadata_extractors")}


def _load(point: EntryPoint) -> Extractor:
    try:
        loaded: Extractor = point.load()
        return loaded
    except Exception as error:  # noqa: BLE001 - whatever others' code raises
        reason = f"{point.value} cannot be loaded: {error}"

    def broken(storage: Storage, path: str, seen: Observation) -> dict[str, Any] | None:
        raise ValueError(reason)

    return broken


def extract_all(storage: Storage, path: str, seen: Observation) -> dict[str, Any]:
    """What the extractors find, by extractor's name; a failure is told as ``{"error": …}``.

    A payload is admitted whatever its metadata are like: its bytes are what counts.
    """
    found: dict[str, Any] = {}
    for name, extract in extractors().items():
        try:
            result = extract(storage, path, seen)
            if result:
                # the catalogue would refuse it, and all that is let in with it
                check_json("metadata", result)
        except (ValueError, OSError, DlmError) as error:
            result = _failure(str(error))
        except Exception as error:  # noqa: BLE001 - whatever others' code raises
            result = _failure(f"{type(error).__name__}: {error}")
        if result:
            found[name] = result
    return found


def _failure(told: str) -> dict[str, Any]:
    line = told.split("\n")[0][:300]
    return {"error": line.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")}
