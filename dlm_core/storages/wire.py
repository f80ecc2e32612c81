"""HTTP/1.1 with kept connections: what the WebDAV adapter and the rclone daemon's socket share.

Nothing is sent twice but what changes nothing (GET, HEAD, PROPFIND): an answer that got lost
leaves open whether the server acted, and the caller has to look.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from dlm_core.errors import StorageError
from dlm_core.storages.answers import Answer, request_head
from dlm_core.storages.port import Readable

BLOCK = 1 << 20
_TOGETHER = 64 << 10
_REPEATABLE = {"GET", "HEAD", "PROPFIND", "OPTIONS"}

Headers = Mapping[str, str]


class WireError(Exception):
    """No answer, or no whole one; says why, never what was sent."""


class Reply:
    """An answer whose body is still to be read; its connection goes back when that is done."""

    def __init__(
        self, wire: Wire, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse
    ) -> None:
        self._wire, self._connection, self._answer = wire, connection, answer
        self.status = answer.status
        #: bytes of the body, if the server tells
        self.length: int | None = answer.length

    def header(self, name: str) -> str | None:
        return self._answer.headers.get(name)

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, all that are left if negative.

        Raises
        ------
        WireError
            also if the body ends before the length that was told.
        """
        if size < 0:
            # block by block: memory for what is only told, be it true or not, there may be none
            return b"".join(iter(lambda: self.read(BLOCK), b""))
        try:
            data = self._answer.read(size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise WireError(_reason(error)) from None
        # http.client tells of an early end only where all is read at once
        if not data and size and self._answer.length:
            self._connection.close()
            raise WireError(f"{self._answer.length} bytes of an answer are missing")
        return data

    def close(self) -> None:
        """Give the connection back, or end it if not all of its answer was read."""
        if self._answer.isclosed():
            self._wire.give_back(self._connection)
        else:
            self._connection.close()

    def __enter__(self) -> Reply:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def part(first: int, end: int) -> dict[str, str]:
    """The header that asks for the bytes of a file from ``first`` to before ``end``."""
    return {"Range": f"bytes={first}-{end - 1}"}


class ReplyStream:
    """An answer's body as a file that is read once, front to back.

    Parameters
    ----------
    told : makes the port's error of what goes wrong.
    """

    def __init__(self, reply: Reply, told: Callable[[WireError], StorageError]) -> None:
        self._reply, self._told = reply, told
        #: not a part of it, whatever was asked for
        self.whole = reply.status == 200

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        try:
            return self._reply.read(size)
        except WireError as error:
            raise self._told(error) from None

    def is_part(self, first: int, end: int, size: int) -> bool:
        """Whether this is just the :func:`part` that was asked for of a file of ``size`` bytes."""
        told = self._reply.header("Content-Range")
        return self._reply.status == 206 and told == f"bytes {first}-{end - 1}/{size}"

    def pass_over(self, count: int) -> None:
        """Read ``count`` bytes for nothing; the stream is closed if that fails."""
        try:
            while count and (block := self.read(min(BLOCK, count))):
                count -= len(block)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._reply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wire:
    """Connections to one server, kept for the next request; thread-safe.

    Parameters
    ----------
    connect : makes a connection that is not yet open.
    idle : how many are kept.
    """

    def __init__(self, connect: Callable[[], http.client.HTTPConnection], idle: int = 32) -> None:
        self._connect, self._most = connect, idle
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def ask(self, method: str, target: str, headers: Headers, body: bytes = b"") -> Reply:
        """Send a request whose body is at hand; the reply's status may be any.

        Raises
        ------
        WireError
        """
        connection, kept = self._take()
        try:
            head = request_head(connection, method, target, headers, len(body))
            connection.sock.sendall(head + body)
            return self._reply(connection, method)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if kept and method in _REPEATABLE:
                self.forget()
                return self.ask(method, target, headers, body)
            raise WireError(_reason(error)) from None

    def send(
        self, method: str, target: str, headers: Headers, source: Readable, size: int
    ) -> Reply:
        """Send a request whose body is the ``size`` bytes of ``source``.

        What ``source`` raises goes through, and the server sees a body that breaks off.

        Raises
        ------
        WireError
            also if ``source`` has fewer or more bytes.
        """
        connection, _ = self._take()
        try:
            return self._send(connection, method, target, headers, source, size)
        except BaseException:
            connection.close()
            raise

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Headers,
        source: Readable,
        size: int,
    ) -> Reply:
        broken: OSError | None = None
        left = size
        try:
            unsent = request_head(connection, method, target, headers, size)
        except http.client.HTTPException as error:
            raise WireError(_reason(error)) from None
        while block := source.read(BLOCK):
            left -= len(block)
            if left < 0:
                raise WireError(f"the source has more than {size} bytes")
            try:
                _send_both(connection.sock, unsent, block)
                unsent = b""
            except OSError as error:
                broken = error  # the server may have said why before it hung up
                break
        if left and broken is None:
            raise WireError(f"the source has {size - left} bytes of {size}")
        try:
            if unsent and broken is None:
                connection.sock.sendall(unsent)  # there is no body
            return self._reply(connection, method)
        except (OSError, http.client.HTTPException) as error:
            raise WireError(_reason(broken or error)) from None

    def _reply(self, connection: http.client.HTTPConnection, method: str) -> Reply:
        answer = Answer(connection.sock, method)
        if answer.will_close:
            connection.close()  # its bytes are still to be read
        return Reply(self, connection, answer)

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        with self._lock:
            if self._owner != os.getpid():  # a fork's connections are its parent's
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                connection = self._idle.pop()
                if _is_quiet(connection):
                    return connection, True
                connection.close()
        return self._connect(), False

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose answer was read; it is closed if there are enough."""
        with self._lock:
            if connection.sock is not None and len(self._idle) < self._most:
                self._idle.append(connection)
                return
        connection.close()

    def forget(self) -> None:
        """Close what is kept: the server was restarted."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _send_both(sock: socket.socket, head: bytes, block: bytes) -> None:
    """What is small goes at once: the server reads a request's head and body in one go."""
    if head and len(block) <= _TOGETHER:
        sock.sendall(head + block)
        return
    if head:
        sock.sendall(head)
    sock.sendall(block)


def _is_quiet(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has not hung up: nothing is to be read from an idle connection."""
    if connection.sock is None:
        return False
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"{type(error).__name__} in its answer"
