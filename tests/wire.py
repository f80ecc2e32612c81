"""A line between a storage and its server that counts, is cut and damages: a proxy of TCP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BLOCK = 1 << 16


class Line:
    """Passes bytes on to ``port`` on loopback; ``sent`` counts those that go there.

    ``cut_after`` and ``flip_after`` are numbers of bytes of all connections together, counted from
    when they are set: then every connection ends, or one bit on its way is another.
    """

    def __init__(self, port: int) -> None:
        self.server, self.sent = port, 0
        self._cut: int | None = None
        self._flip: int | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def cut_after(self, size: int) -> None:
        """Cut the line after so many more bytes, and let nothing pass until :meth:`mend`."""
        self._cut = self.sent + size

    def flip_after(self, size: int) -> None:
        """Change one bit after so many more bytes, once."""
        self._flip = self.sent + size

    def mend(self) -> None:
        """Let everything pass; ``sent`` begins anew."""
        with self._lock:
            self._cut, self._flip, self.sent = None, None, 0

    def close(self) -> None:
        self._listener.close()
        self._drop()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = None if self._is_cut() else self._reached()
                if far is None:
                    near.close()
                    continue
                self._open |= {near, far}
                for way in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass, args=way, daemon=True).start()

    def _reached(self) -> socket.socket | None:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", self.server))
        return None

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_BLOCK):
                target.sendall(self._changed(data) if counted else data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _changed(self, data: bytes) -> bytes:
        with self._lock:
            self.sent += len(data)
            if self._flip is not None and self.sent > self._flip and len(data) > 1000:
                self._flip = None
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self._is_cut():
                self._drop()
                raise ConnectionResetError
        return data

    def _is_cut(self) -> bool:
        return self._cut is not None and self.sent > self._cut

    def _drop(self) -> None:
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()


@contextmanager
def line_to(port: int) -> Iterator[Line]:
    """A line to a server on ``port``."""
    line = Line(port)
    try:
        yield line
    finally:
        line.close()
