"""A part of a file, from every storage: those that can begin in the middle, and the others."""

import os

import pytest

from dlm_core.errors import PayloadNotFoundError
from dlm_core.storages.conformance import put
from dlm_core.storages.ranges import open_range

_DATA = os.urandom((3 << 20) + 17)


def test_a_part_is_the_same_from_every_storage(storage):
    """Its bytes, its size, its stamp; less where the file ends before, and nothing behind it."""
    put(storage, "file", _DATA)
    storage.flush()
    for offset, size in [(0, 10), (5, 0), (1000, 300_000), (1 << 20, 2 << 20), (3 << 20, 17)]:
        with open_range(storage, "file", offset, size) as stream:
            first = stream.read(7)
            assert first + stream.read(-1) == _DATA[offset : offset + size]
            assert stream.size == size
            assert stream.read(1) == b""
            assert stream.stamp() == stream.opened
    with open_range(storage, "file", 3 << 20, 100) as stream:
        assert stream.read(-1) == _DATA[3 << 20 :]
        assert stream.size == 17
    with pytest.raises(PayloadNotFoundError):
        open_range(storage, "nothing", 1, 1)
