"""Clear away temporary files that a crash left behind."""

from __future__ import annotations

from datetime import datetime, timedelta

from dlm_core.storages.port import PRIVATE, Storage

_TMP = f"{PRIVATE}/tmp"


def sweep_temp(storage: Storage, older_than: timedelta, now: datetime) -> int:
    """Remove files below ``.dlm/tmp`` untouched for ``older_than``; how many.

    ``older_than`` must be longer than any copy may take: a younger file may belong to one.

    Raises
    ------
    StorageUnavailableError, AccessDeniedError
    """
    if storage.stat(_TMP) is None:
        return 0
    limit = (now - older_than).timestamp()
    old = [entry.path for entry in storage.walk(_TMP) if entry.mtime < limit]
    for path in old:
        storage.remove(path)
    return len(old)
