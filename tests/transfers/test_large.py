"""Files larger than 32 bits can count and than memory may hold."""

import hashlib
import os
import resource
import threading
import uuid

import psutil
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


@pytest.mark.slow
@pytest.mark.parametrize("shell", [False, True])
def test_a_sparse_file_goes_over_sftp_and_back(tmp_path, sshd, shell):
    """512 MiB, within a small part of that in memory, digested on the way and at both ends."""
    size = 512 << 20
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    with open(tmp_path / "a/big", "wb") as file:
        file.truncate(size - 1)
        file.seek(size - 1)
        file.write(b"!")
    with open(tmp_path / "a/big", "rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    here, back = (open_storage(name, "posix", str(tmp_path / name), {}) for name in ("a", "c"))
    far = open_storage("b", "sftp", sshd.root(tmp_path / "b"), sshd.config(shell=shell))
    most, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.05):
            most[0] = max(most[0], psutil.Process().memory_info().rss)

    before = psutil.Process().memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for source, destination, path in ((here, far, "big"), (far, back, "copy")):
            task = CopyTask(
                uuid.uuid4(), path, "copy", PayloadKind.FILE, size, digest, (), uuid.uuid4().hex
            )
            (result,) = copy_batch(source, destination, [task])
            assert result.error is None
        assert os.path.getsize(tmp_path / "c/copy") == size
    finally:
        stop.set()
        watcher.join()
        for name in ("a/big", "b/copy", "c/copy"):
            (tmp_path / name).unlink(missing_ok=True)
    assert most[0] - before < 100 << 20
