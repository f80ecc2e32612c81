"""``dlm storage test``: whether a storage keeps the port's contract where it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dlm_cli.places import Json, Name
from dlm_cli.session import catalogue, plain_errors, show_json
from dlm_core.errors import InvalidValueError

if TYPE_CHECKING:
    from dlm_core.storages.port import Storage

_WRITABLE, _READABLE = ("read_write", "draining"), ("read_only", "auditing")


@plain_errors
def storage_test(name: Name, as_json: Json = False) -> None:
    """Check that a storage keeps the contract, in a scratch folder that is removed again; of one
    that is only read, what reading promises, on some of the files that lie there."""
    storage, why = _opened(name)
    found = list(_each(_read_only(storage) if why else _whole(storage), told=not as_json))
    if as_json:
        show_json(found)
    failed = sum(not one["ok"] for one in found)
    if not as_json:
        only = f"; nothing was written, it is {why}" if why else ""
        print(f"{len(found) - failed} of {len(found)} checks passed on storage {name}{only}")
    raise SystemExit(4 if failed else 0)


def _opened(name: str) -> tuple[Storage, str]:
    """The adapter of a storage, and why it is only read, if it is."""
    from dlm_core.catalogue.places import get_storage
    from dlm_core.storages.open import open_storage

    with catalogue() as context:
        row = context.transact(lambda c: get_storage(c, name))
    mode, managed = row["mode"], row["managed"]
    if mode not in (*_WRITABLE, *_READABLE):
        raise InvalidValueError(
            what="storage", value=name, expected=f"one that is in use; it is {mode}"
        )
    storage = open_storage(name, row["interface"], row["root"], row["config"])
    storage.check()
    return storage, "" if managed and mode in _WRITABLE else mode if managed else "not managed"


def _whole(storage: Storage) -> Iterator[tuple[Callable[..., None], Callable[[], None]]]:
    from dlm_core.storages.conformance import CHECKS, run_check
    from dlm_core.types import new_id

    folder = f".dlm/test-{new_id()}"
    try:
        for check in CHECKS:
            yield check, partial(run_check, check, storage, folder)
    finally:
        storage.remove(folder)


def _read_only(storage: Storage) -> Iterator[tuple[Callable[..., None], Callable[[], None]]]:
    from dlm_core.storages.conformance_reading import READING, some_files

    files = some_files(storage)
    for check in READING:
        yield check, partial(check, storage, files)


def _each(
    checks: Iterator[tuple[Callable[..., None], Callable[[], None]]], *, told: bool
) -> Iterator[dict[str, Any]]:
    """Each check with its result; a line each is printed as it comes if ``told``."""
    from dlm_core.storages.conformance import name_of

    for check, work in checks:
        begun, reason = time.monotonic(), None
        try:
            work()
        except Exception as error:  # an adapter of others may raise anything: it is what we tell
            reason = " ".join(str(error).split()) or type(error).__name__
        if told:
            why = f": {reason}" if reason else ""
            print(f"{'FAILED' if reason else 'ok':6}  {name_of(check)}{why}", flush=True)
        yield {
            "check": name_of(check), "ok": reason is None, "reason": reason,
            "seconds": round(time.monotonic() - begun, 3), "meaning": check.__doc__,
        }  # fmt: skip
