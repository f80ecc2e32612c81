"""Clear away temporary files that a crash left behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta

from dlm_core.storages.port import PRIVATE, Storage

_TMP = f"{PRIVATE}/tmp"


def sweep_temp(
    storage: Storage, older_than: timedelta, now: datetime, keep: Collection[str] = ()
) -> int:
    """Remove what lies below ``.dlm/tmp`` and was untouched for ``older_than``, but for the paths
    ``keep``; how many files.

    ``older_than`` must be longer than any copy may take: a younger file may belong to one, and so
    may an older one of the same directory payload.

    Raises
    ------
    StorageUnavailableError, AccessDeniedError
    """
    if storage.stat(_TMP) is None:
        return 0
    limit = (now - older_than).timestamp()
    youngest: dict[str, float] = {}
    files: dict[str, int] = {}
    for entry in storage.walk(_TMP):
        # .dlm/tmp/<slot>/<token>, which is a file or a directory payload
        copy = "/".join(entry.path.split("/")[:4])
        youngest[copy] = max(entry.mtime, youngest.get(copy, 0.0))
        files[copy] = files.get(copy, 0) + 1
    old = [copy for copy, mtime in youngest.items() if mtime < limit and copy not in keep]
    for copy in old:
        storage.remove(copy)
    return sum(files[copy] for copy in old)


def sweep_parts(
    storage: Storage,
    older_than: timedelta,
    now: datetime,
    owned: Callable[[Sequence[str]], Mapping[str, bool]],
) -> int:
    """End uploads that nobody has touched for ``older_than``, where the storage has such; how many.

    Their parts are seen in no listing of files and paid for like these. ``owned`` tells which paths
    are the catalogue's, and whether a copy to it is still to be made: its upload stays.

    Raises
    ------
    StorageUnavailableError, AccessDeniedError
    """
    forget_parts = getattr(storage, "forget_parts", None)
    if forget_parts is None:
        return 0
    ended: int = forget_parts((now - older_than).timestamp(), owned)
    return ended
