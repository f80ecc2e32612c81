"""Clear away temporary files that a crash left behind."""

from __future__ import annotations

from collections.abc import Collection
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
