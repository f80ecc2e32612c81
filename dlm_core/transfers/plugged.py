"""Movers of other people: programs that bring many files at once (FTS, Globus, a site's bbcp).

A mover is offered by an entry point of the group ``dlm.movers``: a function without arguments that
gives a :class:`Mover`. The comments here are the contract. Nothing of a mover's word is believed:
what it brought is proven and made visible by us (:mod:`.bringing`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

from dlm_core.storages.port import Storage

log = logging.getLogger("dlm")

# several links begin at once, and what is broken is told once
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Brought:
    """A file to bring; ``size`` in bytes is what the catalogue says."""

    #: path at the source
    source: str
    #: path at the destination: a temporary name, of this try alone. No parent of it may be there.
    written: str
    size: int


@runtime_checkable
class Mover(Protocol):
    """Brings files from one storage to another; called from several threads at once."""

    name: str

    def suits(self, source: Storage, destination: Storage) -> bool:
        """Whether it brings files from one to the other. Asked for each link and claim: it is
        cheap, and asks neither disk nor network.

        Both are the adapters themselves. A storage that is cold, or keeps bundles, comes as such,
        with the adapter in its ``inner``.
        """
        ...

    def bring(
        self,
        source: Storage,
        destination: Storage,
        files: Sequence[Brought],
        stop: threading.Event,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Bring the bytes of ``files`` to new files of their own (no links), with their folders.

        When it returns or raises nothing of it is at work any more, and what it brought is durable,
        or will be by the destination's ``flush``. It returns soon once ``stop`` is set. It writes
        nothing at the destination but these files, and leaves the source as it is. What it leaves
        out or spoils is copied by us, whatever it raises.

        Parameters
        ----------
        progress : to be told, where it can be known, how many bytes more have come through.
        """
        ...


def suitable(source: Storage, destination: Storage) -> Mover | None:
    """The first mover by name of its entry point that suits these two, or None."""
    return next((mover for mover in movers() if _suits(mover, source, destination)), None)


def movers() -> tuple[Mover, ...]:
    """All movers that could be loaded, by the names of their entry points."""
    with _loading:
        return _loaded()


def in_one_line(error: Exception) -> str:
    """What somebody else's code raised, as it is logged."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@lru_cache(maxsize=1)
def _loaded() -> tuple[Mover, ...]:
    points = sorted(entry_points(group="dlm.movers"), key=lambda point: point.name)
    return tuple(mover for point in points if (mover := _load(point)) is not None)


def _load(point: EntryPoint) -> Mover | None:
    """One that is broken is told of, and in nobody's way."""
    try:
        mover = point.load()()
    except Exception as error:  # noqa: BLE001 - whatever others' code raises
        log.warning("mover %s cannot be used: %s", point.name, in_one_line(error))
        return None
    if isinstance(mover, Mover):
        return mover
    log.warning("mover %s cannot be used: it has no name, suits or bring", point.name)
    return None


def _suits(mover: Mover, source: Storage, destination: Storage) -> bool:
    try:
        return bool(mover.suits(source, destination))
    except Exception as error:  # noqa: BLE001 - whatever others' code raises
        log.warning("mover %s cannot tell whether it suits: %s", mover.name, in_one_line(error))
        return False
