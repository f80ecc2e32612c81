"""Stagers: how files of a cold storage (tape, an archive class) are brought to where they can be
read. A storage is cold if its config names one by ``stage``; the keys that begin with ``stage`` are
its terms, validated when the storage is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dlm_core.errors import InvalidValueError
from dlm_core.storages.config import read_config
from dlm_core.storages.plug_in import open_plug_in


class Stager(Protocol):
    """Brings files of one storage online; plug-ins come by the entry point group ``dlm.stagers``.

    Paths are those of the port, relative to the root. Both calls take many at once, in path order,
    are safe to repeat, and raise the port's errors. A stager may also have

    ``renames_read = True``
        a rename on this storage needs the bytes online (an object store copies them).
    ``order(paths) -> list``
        the same paths as the medium likes to be asked for them, before they are cut into calls.
    """

    def stage(self, paths: Sequence[str]) -> None:
        """Ask for files to be brought online; returns once that is asked, or once it is done.

        Asking again for one that is on its way, or online, changes nothing.
        """
        ...

    def online(self, paths: Sequence[str]) -> set[str]:
        """Those of ``paths`` that can be read at once. When in doubt, one is left out.

        It must not recall anything. What is not there may be left out too.
        """
        ...


class StageTerms(BaseModel):
    """How the DLM deals with a cold storage: part of the storage's config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str = Field(description="The stager: command, s3, or one by entry point.")
    stage_batch: int = Field(1000, ge=1, le=100_000, description="Paths in one call at most.")
    stage_most: int = Field(10_000, ge=1, le=10_000_000, description="Files on their way at most.")
    stage_poll_seconds: float = Field(60, gt=0, le=86400, description="Looked at again after.")
    stage_retry_hours: float = Field(24, gt=0, le=8760, description="Asked for again after.")
    stage_deadline_hours: float = Field(72, gt=0, le=8760, description="FAILED after.")
    stage_proof_days: float = Field(
        365,
        gt=0,
        le=36500,
        description="Offline, a copy read longer ago is no survivor.",
    )

    @model_validator(mode="after")
    def _polled_before_asked_again(self) -> Self:
        if self.stage_poll_seconds > self.stage_retry_hours * 3600:
            raise ValueError("stage_poll_seconds is longer than stage_retry_hours")
        return self


@dataclass(frozen=True, slots=True)
class Place:
    """The storage that a stager serves; ``config`` is that of its adapter."""

    name: str
    interface: str
    root: str
    config: Mapping[str, Any]


#: makes a stager for a place from the keys of the config that are its own; refuses others
StagerOpener = Callable[[Place, Mapping[str, Any]], Stager]


def _command(place: Place, options: Mapping[str, Any]) -> Stager:
    from dlm_core.storages.stage_command import open_command_stager

    return open_command_stager(place, options)


def _s3(place: Place, options: Mapping[str, Any]) -> Stager:
    from dlm_core.storages.stage_s3 import open_s3_stager

    return open_s3_stager(place, options)


@lru_cache(maxsize=1)
def stagers() -> dict[str, StagerOpener]:
    """Openers by name: ours, and others' found by the entry point group 'dlm.stagers'."""
    found: dict[str, StagerOpener] = {"command": _command, "s3": _s3}
    for point in entry_points(group="dlm.stagers"):
        found.setdefault(point.name, _by(point))
    return found


def _by(point: EntryPoint) -> StagerOpener:
    def opener(place: Place, options: Mapping[str, Any]) -> Stager:
        what, calls = f"stage of storage {place.name}", ("stage", "online")
        found: Stager = open_plug_in(point, what, calls, place, options)
        return found

    return opener


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a storage's config is its adapter's, and what is about staging."""
    staging = {
        key: value
        for key, value in config.items()
        if key == "stage" or key.startswith("stage_") or key in ("online_command", "order_command")
    }
    return {key: value for key, value in config.items() if key not in staging}, staging


def open_stager(place: Place, config: Mapping[str, Any]) -> tuple[Stager, StageTerms]:
    """The stager that the staging part of a config names, with the terms of its use.

    Raises
    ------
    InvalidValueError
        if there is no such stager, or the config does not fit it.
    """
    own = {key: value for key, value in config.items() if key not in StageTerms.model_fields}
    terms = read_config(
        StageTerms, place.name, {key: value for key, value in config.items() if key not in own}
    )
    known = stagers()
    if terms.stage not in known:
        raise InvalidValueError(
            what=f"stage of storage {place.name}",
            value=terms.stage,
            expected=f"one of {', '.join(sorted(known))}",
        )
    return known[terms.stage](place, own), terms
