"""A part of a file, from every storage: those that can begin in the middle, and the others."""

import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dlm_core.errors import PayloadNotFoundError
from dlm_core.storages.conformance import put
from dlm_core.storages.open import open_storage
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
    if not behind or not hasattr(storage, "open_range"):
        return  # rclone says of every backend that it sends parts: it is read up to there
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


@pytest.mark.parametrize("sends", ["all of it", "less of it", "another part", "what was asked for"])
def test_whatever_a_web_server_makes_of_a_range_the_bytes_are_right(sends):
    """RFC 9110 lets a server send the whole, or less than it was asked for; one that sends another
    part is not believed."""
    with ranging_server(sends) as url:
        storage = open_storage("web", "webdav", url, {})
        for offset, size in [(0, 10), (1000, 100), (19_990, 100), (0, 20_000), (20_000, 5)]:
            with open_range(storage, "file", offset, size) as stream:
                assert stream.read(-1) == _FILE[offset : offset + size]
                assert stream.stamp() == stream.opened
        with storage.open_read_at("file", 1000) as stream:
            assert stream.read(-1) == _FILE[1000:]


_FILE = os.urandom(20_000)
_PROPERTIES = (
    '<?xml version="1.0"?><d:multistatus xmlns:d="DAV:"><d:response><d:href>/file</d:href>'
    "<d:propstat><d:prop><d:resourcetype/><d:getcontentlength>20000</d:getcontentlength></d:prop>"
    "<d:status>HTTP/1.1 200 OK</d:status></d:propstat></d:response></d:multistatus>"
)


@contextmanager
def ranging_server(sends):
    """A WebDAV server of one file that treats ranges as ``sends`` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, body, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_PROPFIND(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(207, _PROPERTIES.encode(), Content_Type="application/xml")

        def do_GET(self):
            wanted = self.headers.get("Range")
            if wanted is None or sends == "all of it":
                return self.answer(200, _FILE)
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            last = min(last, first + 49) if sends == "less of it" else last
            first -= sends == "another part"
            told = f"bytes {first}-{last}/{len(_FILE)}"
            return self.answer(206, _FILE[first : last + 1], Content_Range=told)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
