"""The heads of HTTP requests and answers, as servers of all kinds send them."""

import http.client
import io
import socket
import threading
from contextlib import suppress

import pytest

from dlm_core.storages.answers import Answer, request_head
from dlm_core.storages.wire import Wire, WireError

PUT = "PUT", "/x", {"If-None-Match": "*"}


def answered(data, method="GET"):
    """The answer that a server gives by sending ``data`` and hanging up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.close()
        return Answer(ours, method)


class Scripted:
    """A server that reads a whole request, answers with ``data``, and keeps what it heard."""

    def __init__(self, *data):
        self.heard, self.connections = [], 0
        self._data = list(data)

    def connect(self):
        self.connections += 1
        connection = http.client.HTTPConnection("host")
        connection.sock, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=[theirs], daemon=True).start()
        return connection

    def _serve(self, theirs):
        with theirs, suppress(OSError):
            while self._data and (request := theirs.recv(1 << 20)):
                self.heard.append(request)
                theirs.sendall(self._data.pop(0))


def test_a_body_of_told_length():
    """It ends there, and headers are found by any case of their names."""
    answer = answered(b'HTTP/1.1 200 OK\r\ncontent-LENGTH: 3\r\nETag: "a:b"\r\n\r\nabcdef')
    assert (answer.status, answer.length, answer.will_close) == (200, 3, False)
    assert answer.headers.get("etag") == '"a:b"' and answer.headers.get("nothing") is None
    assert answer.read() == b"abc" and answer.isclosed()


def test_a_body_in_chunks():
    """Which is what servers send whose answers grow while they are made."""
    head = b"HTTP/1.1 207 Multi-Status\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = answered(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert answer.length is None and not answer.will_close
    assert answer.read() == b"abcde" and answer.isclosed()


@pytest.mark.parametrize("first", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
def test_what_comes_before_an_answer_is_passed_over(first):
    """A WebDAV server that takes long says so with 102."""
    head = b"HTTP/1.1 " + first + b"\r\nX: y\r\n\r\n"
    answer = answered(head * 2 + b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
    assert (answer.status, answer.read()) == (201, b"")


def test_no_body_where_there_can_be_none():
    """To HEAD, and with 204: the connection may be used again at once."""
    head = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD")
    assert head.read() == b"" and not head.will_close
    gone = answered(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert gone.read() == b"" and not gone.will_close


@pytest.mark.parametrize(
    ("head", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close", True),
        (b"HTTP/1.1 200 OK", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: Keep-Alive", False),
    ],
)
def test_a_connection_that_the_server_ends(head, closes):
    """Is not used again; what it sends before its end is the body."""
    answer = answered(head + b"\r\n\r\nx")
    assert answer.will_close is closes and answer.read() == b"x"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"HTTP/1.1", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 -20 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 300,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (80 << 10),
    ],
)  # fmt: skip
def test_what_is_no_answer(data):
    """Or one that has no end: an error, not a wait."""
    with pytest.raises((http.client.HTTPException, OSError)):
        answered(data)


def test_an_answer_whose_head_breaks_off():
    """Is none, though what came of it looks like one."""
    with pytest.raises(http.client.HTTPException):
        answered(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n")


def test_a_header_is_one_line():
    """A line break in it would make another of what follows."""
    connection = http.client.HTTPConnection("host", 81)
    head = request_head(connection, *PUT, 5)
    assert head.split(b"\r\n") == [
        b"PUT /x HTTP/1.1", b"Host: host:81", b"Accept-Encoding: identity", b"If-None-Match: *",
        b"Content-Length: 5", b"", b"",
    ]  # fmt: skip
    for name, value in (("X", "a\r\nY: b"), ("X", "a\nY: b"), ("X\rY", "a")):
        with pytest.raises(http.client.InvalidURL):
            request_head(connection, "GET", "/", {name: value}, 0)
        with pytest.raises(WireError):
            Wire(Scripted().connect).ask("GET", "/", {name: value})


@pytest.mark.parametrize("size", [0, 5, 70 << 10])
def test_a_body_is_sent_with_its_head(size):
    """In one piece if it is small; the connection is used again."""
    done = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
    server, data = Scripted(done, done), b"x" * size
    wire = Wire(server.connect)
    for _ in range(2 if size <= 5 else 1):
        with wire.send(*PUT, io.BytesIO(data), size) as reply:
            assert (reply.status, reply.read()) == (201, b"")
    assert server.connections == 1
    if size <= 5:
        assert [heard.partition(b"\r\n\r\n")[2] for heard in server.heard] == [data, data]


@pytest.mark.parametrize("size", [4, 6])
def test_a_source_of_another_size_sends_nothing_whole(size):
    """The server must not take what came for the file."""
    server = Scripted(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(WireError, match="the source has"):
        Wire(server.connect).send(*PUT, io.BytesIO(b"12345"), size)
    assert all(len(heard.partition(b"\r\n\r\n")[2]) < size for heard in server.heard)


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 1000000000000000",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff",
    ],
)
def test_no_memory_is_taken_for_bytes_that_are_only_told(head):
    """There may not be so much; that they do not come is what goes wrong."""
    server = Scripted(f"HTTP/1.1 207 OK\r\n{head}\r\n\r\nshort".encode())
    with Wire(server.connect).ask("PROPFIND", "/x", {}) as reply, pytest.raises(WireError):
        reply.read()
