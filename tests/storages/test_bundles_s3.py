"""Bundles in a bucket, where nothing has a temporary name and a rename is a copy."""

from __future__ import annotations

import uuid
from contextlib import suppress

import pytest

from dlm_core.errors import PayloadExistsError
from dlm_core.storages.conformance import get, put
from dlm_core.storages.open import open_storage
from dlm_core.storages.packing import pack
from tests.backends import bundled, s3_config
from tests.fakes import FAR, Hooked, StoppedError, Stopping, any_digest, die_after
from tests.payloads import contents

FILES = {f"block-{n % 2}/{n}": b"bytes of %d" % n for n in range(5)}


@pytest.fixture
def bucket(s3):
    """Opens a folder of a bucket that is empty at first."""

    def opened(folder=None):
        root = f"{s3.bucket}/{folder or uuid.uuid4().hex}"
        return open_storage("bucket", "s3", root, s3_config(s3))

    return opened


def test_two_workers_share_the_bundles_of_a_bucket(bucket):
    """What one packs, trashes and removes the other sees at once; one ranged GET reads a member."""
    folder = uuid.uuid4().hex
    one, other = (bundled(bucket(folder), bundle_bytes=1 << 20) for _ in range(2))
    for path, data in FILES.items():
        put(one, path, data)
    assert contents(other) == FILES
    assert pack(one, any_digest, FAR).members == 5
    assert contents(other) == contents(one) == FILES
    assert [e.path for e in one.inner.walk()] == []
    other.rename("block-0/0", ".dlm/trash/some-uid")
    assert one.stat("block-0/0") is None and get(one, ".dlm/trash/some-uid") == b"bytes of 0"
    for path in list(FILES)[1:]:
        one.remove(path)
    pack(other, any_digest, FAR)
    assert get(one, ".dlm/trash/some-uid") == b"bytes of 0"
    other.remove(".dlm/trash/some-uid")
    assert list(one.inner.walk(".dlm/bundles/log"))
    assert not [e for e in one.inner.walk(".dlm/bundles") if e.path.endswith(".tar")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crash_at_any_call_of_packing_a_bucket_loses_nothing(bucket):
    """Stopped before each call in turn; the next worker reads all, and packs on."""
    for n in range(1, 300):
        folder = uuid.uuid4().hex
        storage = bundled(bucket(folder), bundle_bytes=1 << 20)
        for path, data in FILES.items():
            put(storage, path, data)
        pack(storage, any_digest, FAR)
        for path in list(FILES)[:3]:
            storage.remove(path)
        put(storage, "late", b"late")
        wanted = contents(storage)
        stopping, done = Stopping(storage.inner, n), True
        try:
            pack(bundled(stopping, bundle_bytes=1 << 20), any_digest, FAR)
        except StoppedError:
            done = False
        later = bundled(bucket(folder), bundle_bytes=1 << 20)
        assert contents(later) == wanted, f"after call {n}: {stopping.last}"
        pack(later, any_digest, FAR)
        assert contents(later) == wanted
        tars = [e for e in later.inner.walk(".dlm/bundles/tar") if e.path.endswith(".tar")]
        assert len(tars) == len(later.index.bundles)
        assert list(later.inner.walk()) == []
        if done:
            assert n > 20
            return
    pytest.fail("it never came through")


@pytest.mark.parametrize("how", ["rename", "remove"])
def test_a_large_object_goes_without_members_whose_names_go_on_where_its_own_ends(bucket, how):
    """It is not packed, what is below its name is: it goes alone, also when that is done again."""
    storage = bundled(bucket(), bundle_below=100)
    put(storage.inner, "x", bytes(1000))
    put(storage.inner, "x/y", b"good bytes")
    pack(storage, any_digest, FAR)
    for _ in range(2):
        if how == "remove":
            storage.remove("x")
            break
        with suppress(PayloadExistsError):
            storage.rename("x", ".dlm/trash/uid")
    assert contents(storage) == {"x/y": b"good bytes"}


@pytest.mark.parametrize("how", ["rename", "remove"])
def test_a_member_whose_file_is_cleared_already_leaves_what_only_begins_with_its_name(bucket, how):
    """A packer was lost after it had removed the single file, and before it could say so: who moves
    or removes the member clears that file again, and an object below its name stays."""
    folder = uuid.uuid4().hex
    storage = bundled(bucket(folder), bundle_below=100)
    put(storage, "x", b"packed")
    put(storage.inner, "x/y", bytes(1000))
    lost = bundled(Hooked(bucket(folder), die_after("remove", "x")), bundle_below=100)
    with pytest.raises(StoppedError):
        pack(lost, any_digest, FAR)
    assert storage.inner.stat("x").kind == "directory"
    if how == "remove":
        storage.remove("x")
    else:
        storage.rename("x", ".dlm/trash/uid")
        assert get(storage, ".dlm/trash/uid") == b"packed"
    assert contents(storage) == {"x/y": bytes(1000)}
