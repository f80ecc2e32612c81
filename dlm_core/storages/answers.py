"""The heads of HTTP requests and answers, without what makes Python's own slow.

``http.client`` reads an answer's headers with the parser for electronic mail: of a small file that
takes longer than all else that is done here. Bodies are read as ``http.client`` reads them.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from typing import Any, BinaryIO

_LONGEST_LINE = 64 << 10
_MOST_LINES = 200
# an answer's head and a small body come in one call of the system
_BUFFER = 64 << 10
_WITH_LENGTH = {"PUT", "POST"}


def request_head(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    size: int,
) -> bytes:
    """What stands before a body of ``size`` bytes; ``target`` is quoted.

    Raises
    ------
    http.client.InvalidURL
        if there is a line break in a header, which would make two of it.
    """
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    plain = connection.port == connection.default_port
    fields = {"Host": host if plain else f"{host}:{connection.port}"}
    fields |= {"Accept-Encoding": "identity", **headers}
    if size or method in _WITH_LENGTH:
        fields["Content-Length"] = str(size)
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {fields[name]}" for name in fields)]
    if any("\n" in line or "\r" in line for line in lines):
        raise http.client.InvalidURL("a line break in a header")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


class Fields:
    """Headers by name, whatever its case; of two with one name the first."""

    def __init__(self, lines: list[bytes]) -> None:
        self._told: dict[str, str] = {}
        for line in lines:
            name, _, value = line.decode("latin-1").partition(":")
            self._told.setdefault(name.lower(), value.strip())

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of a header, or ``default``."""
        return self._told.get(name.lower(), default)


class Answer(http.client.HTTPResponse):
    """An answer whose head was read; its body is still to come.

    Raises
    ------
    http.client.HTTPException, OSError
        if there is none, or no such thing.
    """

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(_Buffered(sock), method=method)  # type: ignore[arg-type]
        try:
            self._read_head(method)
        except BaseException:
            self.close()
            raise

    def _read_head(self, method: str) -> None:
        version, status, fields = _head(self.fp)
        while 100 <= status < 200:  # more is to come
            version, status, fields = _head(self.fp)
        self.code = self.status = status
        self.version = 10 if version == b"HTTP/1.0" else 11
        self.headers = self.msg = fields  # type: ignore[assignment]
        self.chunked = (fields.get("Transfer-Encoding") or "").lower() == "chunked"
        self.chunk_left = None
        told = fields.get("Content-Length") or ""
        self.length = int(told) if told.isdecimal() and not self.chunked else None
        if method == "HEAD" or status in (204, 304):
            self.length = 0
        self.will_close = self._closes() or (self.length is None and not self.chunked)

    def _closes(self) -> bool:
        told = (self.headers.get("Connection") or "").lower()
        return "close" in told or (self.version == 10 and "keep-alive" not in told)


class _Buffered:
    """Stands for a socket where its bytes are to be read with a larger buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, _: str) -> Any:
        return self._sock.makefile("rb", _BUFFER)


def _head(file: BinaryIO) -> tuple[bytes, int, Fields]:
    version, status, *_ = [*_line(file).split(None, 2), b"", b""]
    if not (version.startswith(b"HTTP/1.") and status.isdigit() and len(status) == 3):
        raise http.client.BadStatusLine("no HTTP/1.1")
    lines: list[bytes] = []
    while line := _line(file):
        lines.append(line)
        if len(lines) > _MOST_LINES:
            raise http.client.HTTPException("too many headers")
    return version, int(status), Fields(lines)


def _line(file: BinaryIO) -> bytes:
    line = file.readline(_LONGEST_LINE)
    if len(line) == _LONGEST_LINE:
        raise http.client.LineTooLong("header")
    if not line.endswith(b"\n"):
        raise http.client.RemoteDisconnected("no answer, or no whole one")
    return line.rstrip(b"\r\n")
