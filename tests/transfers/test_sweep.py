"""What a crash left behind is cleared away; what a copy is writing is not."""

import os
from datetime import UTC, datetime, timedelta

from dlm_core.storages.posix import PosixStorage
from dlm_core.transfers.sweep import sweep_temp

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OLD, YOUNG = NOW - timedelta(days=2, seconds=1), NOW - timedelta(days=2) + timedelta(seconds=1)


def put(root, path, when):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"half")
    os.utime(file, (when.timestamp(), when.timestamp()))


def test_only_what_nobody_writes_any_more_is_swept(tmp_path):
    """Temporary files untouched for the time given go. Younger ones stay, and with them all of
    their directory payload; nothing outside the temporary folder is ever touched."""
    put(tmp_path, ".dlm/tmp/0/lost", OLD)
    put(tmp_path, ".dlm/tmp/1/lost.ms/table", OLD)
    kept = {
        ".dlm/tmp/0/begun": YOUNG,
        ".dlm/tmp/1/begun.ms/first": OLD,
        ".dlm/tmp/1/begun.ms/second": YOUNG,
        ".dlm/trash/thing": OLD,
        "x/payload": OLD,
    }
    for path, when in kept.items():
        put(tmp_path, path, when)
    assert sweep_temp(PosixStorage("s", str(tmp_path)), timedelta(days=2), NOW) == 2
    left = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert left == set(kept)
