"""A part of a file, from every storage: those that can begin in the middle, and the others."""

import os
from types import SimpleNamespace

import pytest

from dlm_core.errors import PayloadNotFoundError, StorageUnavailableError
from dlm_core.storages.conformance import put
from dlm_core.storages.ranges import open_range
from dlm_core.storages.wire import Reply, ReplyStream

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


def test_a_part_behind_http_costs_no_more_than_itself(storage, monkeypatch):
    """Servers that can send a part are asked for it: what lies before it does not travel."""
    put(storage, "file", _DATA)
    storage.flush()
    with storage.open_read("file") as stream:
        behind = isinstance(stream, ReplyStream)
    if not behind:
        return  # the other test is about these
    travelled, read = [], Reply.read

    def counted(reply, size=-1):
        travelled.append(read(reply, size))
        return travelled[-1]

    monkeypatch.setattr(Reply, "read", counted)
    with open_range(storage, "file", 3 << 20, 10) as stream:
        assert stream.read(-1) == _DATA[3 << 20 :][:10]
    with storage.open_read_at("file", (3 << 20) + 7) as stream:
        assert stream.read(-1) == _DATA[(3 << 20) + 7 :]
        assert stream.size == len(_DATA) and stream.stamp() == stream.opened
    assert sum(map(len, travelled)) < 100_000


def test_a_server_that_sends_another_part_is_not_believed():
    """Bytes from elsewhere in the file would be taken for those asked for."""
    reply = SimpleNamespace(
        status=206, header=lambda _: "bytes 0-9/100", close=lambda: closed.append(True)
    )
    closed = []
    stream = ReplyStream(
        reply, lambda error: StorageUnavailableError(storage="x", message=str(error))
    )
    with pytest.raises(StorageUnavailableError, match="another part"):
        stream.begin_at(5)
    assert closed
