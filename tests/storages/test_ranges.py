"""A part of a file, from every storage: those that can begin in the middle, and the others."""

import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dlm_core.errors import PayloadNotFoundError
from dlm_core.storages.conformance import put
from dlm_core.storages.open import open_storage
from dlm_core.storages.ranges import open_range
from dlm_core.storages.wire import Reply, ReplyStream, Wire
from tests.servers import rclone_web_server, web_server

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
    if hasattr(storage, "open_read_at"):
        with storage.open_read_at("file", 1 << 20) as stream:
            assert stream.read(-1) == _DATA[1 << 20 :]
            assert stream.size == len(_DATA) and stream.stamp() == stream.opened


def test_a_part_behind_http_costs_no_more_than_itself(storage, monkeypatch):
    """Servers that can send a part are asked for it: what lies before it does not travel."""
    put(storage, "file", _DATA)
    storage.flush()
    with storage.open_read("file") as stream:
        behind = isinstance(stream, ReplyStream)
    # beside bundles a file is read from its beginning
    if not behind or not hasattr(storage, "open_read_at"):
        return
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


def test_http_by_rclone_is_read_in_parts_where_the_server_sends_them(tmp_path, monkeypatch):
    """What lies before a part does not travel, and how a file begins is asked for once only."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file").write_bytes(_DATA)
    asked, ask = [], Wire.ask

    def noted(wire, method, target, headers, *rest):
        asked.append(headers.get("Range"))
        return ask(wire, method, target, headers, *rest)

    with rclone_web_server(tmp_path / "web") as url:
        storage = open_storage("web", "http", url, {})
        monkeypatch.setattr(Wire, "ask", noted)
        for offset, size in _PARTS:
            with open_range(storage, "file", offset, size) as stream:
                assert stream.read(-1) == _DATA[offset : offset + size]
        with storage.open_read_at("file", 1 << 20) as stream:
            assert stream.read(-1) == _DATA[1 << 20 :]
            assert stream.size == len(_DATA) and stream.stamp() == stream.opened
    parts = [one for one in asked if one]
    assert parts.count("bytes=0-63") == 1
    assert len(parts) == 1 + len(_PARTS) + 1


@pytest.mark.parametrize("data", [_DATA, b"\0" * len(_DATA)], ids=["random", "zeros"])
def test_rclones_word_for_a_part_is_not_taken(tmp_path, data):
    """It answers 206 with the range that was asked for though the web server sent the file from its
    first byte on: the bytes are right all the same, of parts that fill whole blocks too."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file").write_bytes(data)
    with web_server(tmp_path / "web") as url:
        storage = open_storage("web", "http", url, {})
        for offset, size in _PARTS:
            with open_range(storage, "file", offset, size) as stream:
                assert stream.read(-1) == data[offset : offset + size]
                assert stream.stamp() == stream.opened
        for offset in (17, 1000, 3 << 20):
            with storage.open_read_at("file", offset) as stream:
                assert stream.read(-1) == data[offset:]


@pytest.mark.parametrize("sends", ["all of it", "slowly all of it", "less of it"])
def test_whatever_a_web_server_makes_of_rclones_range_the_bytes_are_right(sends):
    """Also where it sends the file in pieces, of which rclone passes on as many as fit."""
    with ranging_server(sends) as url:
        storage = open_storage("web", "http", url, {})
        for offset, size in [(0, 10), (1000, 100), (1000, 10_000), (19_990, 100), (20_000, 5)]:
            with open_range(storage, "file", offset, size) as stream:
                assert stream.read(-1) == _FILE[offset : offset + size]
        with storage.open_read_at("file", 1000) as stream:
            assert stream.read(-1) == _FILE[1000:]


def test_a_part_whose_bytes_are_those_of_the_beginning_is_read_through(storage):
    """It cannot be told from what a server sends that ignores ranges, and is as right."""
    put(storage, "file", b"same" * 50_000 + b"other")
    storage.flush()
    with open_range(storage, "file", 4, 200_000) as stream:
        assert stream.read(-1) == b"same" * 49_999 + b"othe"


_PARTS = [(1, 1), (1000, 64), (1 << 20, 10), (17, 32 << 10), (17, 1 << 20), (1 << 20, 2 << 20)]
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
            if self.command == "HEAD":
                return
            if sends == "slowly all of it":
                self.wfile.write(body[:64])
                time.sleep(0.2)
                body = body[64:]
            self.wfile.write(body)

        def do_PROPFIND(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(207, _PROPERTIES.encode(), Content_Type="application/xml")

        def do_GET(self):
            wanted = self.headers.get("Range")
            if wanted is None or sends.endswith("all of it"):
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
