"""Files larger than 32 bits can count and than memory may hold."""

import hashlib
import os
import resource
import uuid

import pytest

from dlm_core.storages.open import open_storage
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind

_SIZE = 5 << 30


@pytest.mark.slow
def test_a_sparse_file_of_5_gib(tmp_path):
    """Is copied whole, its digest right to the last byte, within little memory."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with open(tmp_path / "a/big", "wb") as file:
        file.truncate(_SIZE - 1)
        file.seek(_SIZE - 1)
        file.write(b"!")
    hasher = hashlib.sha256()
    zeros = bytes(1 << 24)
    for _ in range(_SIZE // len(zeros) - 1):
        hasher.update(zeros)
    hasher.update(zeros[:-1] + b"!")
    digest = f"sha256:{hasher.hexdigest()}"
    source, destination = (
        open_storage(name, "posix", str(tmp_path / name), {}) for name in ("a", "b")
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task = CopyTask(
        uuid.uuid4(), "big", "copy", PayloadKind.FILE, _SIZE, digest, (), uuid.uuid4().hex
    )
    (result,) = copy_batch(source, destination, [task])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    try:
        assert result.error is None
        assert os.path.getsize(tmp_path / "b/copy") == _SIZE
        assert grown < 64 << 10  # kB
    finally:
        os.unlink(tmp_path / "b/copy")
