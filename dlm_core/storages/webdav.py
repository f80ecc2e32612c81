"""WebDAV (RFC 4918) by plain HTTP: every call is one request, and MOVE says ``Overwrite: F``."""

from __future__ import annotations

import http.client
import posixpath
import socket
import threading
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Hashable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
)
from dlm_core.storages.listing import Listed
from dlm_core.storages.port import Entry, Readable, ReadStream, Usage, temp_path
from dlm_core.storages.ranges import Slice
from dlm_core.storages.web import WebConfig, read_authorization, read_web_config
from dlm_core.storages.wire import BLOCK, Reply, ReplyStream, Wire, WireError, part

_SMALL = 1 << 20
_CONNECT_SECONDS = 10
# a whole request may take long, its silence may not
_SILENCE_SECONDS = 300
_SECRET_SECONDS = 1.0
# the server says nothing until a COPY is done: what takes longer than its silence may is not asked
_COPY_LIMIT = 8 << 30
_MOST_FOLDERS = 10_000
_LOCKED_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
_TEMP = temp_path("")
_SAFE = "/-._~!$&'()*+,;=:@"
_REDIRECTS = {301, 302, 307, 308}
_ABSENT = {404, 410}
_LOCKS = 64
_DENIED = {401, 403, 407}
_REFUSED = {400, 405, 411, 413, 414, 415, 422}
_DAV = "{DAV:}"
_PROPERTIES = (
    b'<?xml version="1.0"?><propfind xmlns="DAV:"><prop><resourcetype/><getcontentlength/>'
    b"<getlastmodified/><getetag/></prop></propfind>"
)
_QUOTA = (
    b'<?xml version="1.0"?><propfind xmlns="DAV:"><prop><quota-available-bytes/>'
    b"<quota-used-bytes/></prop></propfind>"
)


def open_webdav(name: str, root: str, config: Mapping[str, Any]) -> WebdavStorage:
    """A WebDAV storage; ``root`` is the URL of a collection that is there.

    Raises
    ------
    InvalidValueError
        as :func:`~dlm_core.storages.web.read_web_config`.
    """
    return WebdavStorage(name, root, read_web_config(name, root, config))


class WebdavStorage(Listed):
    """A collection of a WebDAV server; see :class:`dlm_core.storages.port.Storage`.

    What is written elsewhere than under a temporary name goes through one, so that only a MOVE,
    which does not overwrite, makes names. A server that tells no quota has no capacity. Durability
    is what the server makes of its answer: WebDAV has no flush.
    """

    atomic_write = False
    exclusive = "folder"
    remote = True

    def __init__(self, name: str, root: str, config: WebConfig, concurrency: int = 16) -> None:
        self.name, self.concurrency = name, concurrency
        parts = urlsplit(root)
        self._parts, self._config = parts, config
        self._base = "/" + parts.path.strip("/") if parts.path.strip("/") else ""
        self._wire = Wire(self._connection)
        # those that are there, and all that have one of them below or are one
        self._folders: set[str] = set()
        self._with_folders: set[str] = set()
        self._secret: tuple[float, str] = (float("-inf"), "")
        self._lock = threading.Lock()
        self._moving = [threading.Lock() for _ in range(_LOCKS)]

    # --- requests --------------------------------------------------------------------------------

    def _connection(self) -> http.client.HTTPConnection:
        https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        host = self._parts.hostname or ""
        connection = kind(host, self._parts.port, timeout=_CONNECT_SECONDS, blocksize=BLOCK)
        try:
            connection.connect()
        except OSError as error:
            raise WireError(error.strerror or str(error) or type(error).__name__) from None
        connection.sock.settimeout(_SILENCE_SECONDS)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _headers(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """With the secret as it is now: a rotated one is found without a restart."""
        headers = {"Accept-Encoding": "identity", **(more or {})}
        authorization = self._authorization()
        return {**headers, "Authorization": authorization} if authorization else headers

    def _authorization(self) -> str:
        read, value = self._secret
        if time.monotonic() - read > _SECRET_SECONDS:
            try:
                value = read_authorization(self.name, self._config)
            except InvalidValueError as error:
                raise self._unavailable(str(error)) from None
            self._secret = (time.monotonic(), value)
        return value

    def _target(self, path: str) -> str:
        return quote(f"{self._base}/{path}" if path else self._base, safe=_SAFE)

    def _ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        folder: bool = False,
    ) -> Reply:
        """One request; a server that wants a folder's name with its slash gets it."""
        target = self._target(path) + ("/" if folder else "")
        try:
            reply = self._wire.ask(method, target, self._headers(headers), body)
        except WireError as error:
            raise self._unavailable(str(error)) from None
        if reply.status not in _REDIRECTS or folder or not path:
            return reply
        try:
            location = urlsplit(reply.header("Location") or "").path
        except ValueError:
            location = ""  # no URL
        reply.close()
        if unquote(location) != unquote(target) + "/":
            raise self._unavailable(f"it sends {method} elsewhere, which is not followed")
        return self._ask(method, path, headers, body, folder=True)

    def _done(self, method: str, path: str, **more: Any) -> int:
        """The status of a request whose answer's body does not matter.

        Some servers lock what they work on: they are asked again.
        """
        for pause in (*_LOCKED_PAUSES, 0.0):
            with self._ask(method, path, **more) as reply:
                self._all_of(reply)
            if reply.status != 423:
                break
            time.sleep(pause)
        return reply.status

    def _all_of(self, reply: Reply) -> bytes:
        try:
            return reply.read()
        except WireError as error:
            raise self._unavailable(str(error)) from None

    # --- errors ----------------------------------------------------------------------------------

    def _error(self, status: int, path: str) -> StorageError:
        """What a status means where it is not expected; its text is not repeated."""
        told = f"HTTP {status} {http.client.responses.get(status, '')}".rstrip()
        if status in _DENIED:
            return AccessDeniedError(storage=self.name, path=path, message=told)
        if status == 412:
            return PayloadExistsError(storage=self.name, path=path)
        if status == 507:
            return StorageFullError(storage=self.name, message=told)
        if status in _REFUSED:
            return self._refused(path, told)
        return self._unavailable(told)

    def _check_root(self) -> None:
        with self._ask("PROPFIND", "", {"Depth": "0"}, _PROPERTIES, folder=True) as reply:
            body = self._all_of(reply)
        if reply.status in _ABSENT:
            raise self._unavailable("its root is not there")
        if reply.status != 207:
            raise self._error(reply.status, "")
        if not any(entry.kind == "directory" for entry in self._entries(body)):
            raise self._unavailable("its root is no collection")

    # --- looking ---------------------------------------------------------------------------------

    def _look(self, path: str) -> Entry | None:
        with self._ask("PROPFIND", path, {"Depth": "0"}, _PROPERTIES) as reply:
            body = self._all_of(reply)
        if reply.status in _ABSENT:
            return None
        if reply.status != 207:
            raise self._error(reply.status, path)
        for entry in self._entries(body):
            if entry.path == path:
                return entry
        raise self._unavailable(f"its answer about {path} is about something else")

    def _list(self, folder: str) -> list[Entry] | None:
        with self._ask("PROPFIND", folder, {"Depth": "1"}, _PROPERTIES, folder=True) as reply:
            body = self._all_of(reply)
        if reply.status in _ABSENT:
            return None
        if reply.status != 207:
            raise self._error(reply.status, folder)
        entries = self._entries(body)
        inside = [one for one in entries if one.path != folder]
        if len(inside) == len(entries):
            raise self._unavailable(f"its listing of {folder or 'its root'} is of something else")
        self._check_inside(inside, folder)
        return inside

    def _entries(self, body: bytes) -> list[Entry]:
        try:
            responses = self._parsed(body).findall(f"{_DAV}response")
            return [self._entry(response) for response in responses]
        except (ValueError, TypeError):
            raise self._unavailable("its answer cannot be understood") from None

    def _parsed(self, body: bytes) -> ElementTree.Element:
        if b"<!ENTITY" in body or b"<!DOCTYPE" in body:
            raise self._unavailable("its answer is not plain XML")
        try:
            return ElementTree.fromstring(body)
        except ElementTree.ParseError:
            raise self._unavailable("its answer cannot be understood") from None

    def _entry(self, response: ElementTree.Element) -> Entry:
        href = urlsplit((response.findtext(f"{_DAV}href") or "").strip())
        full = unquote(href.path, errors="surrogateescape").rstrip("/")
        base = unquote(self._base)
        if full != base and not full.startswith(f"{base}/"):
            raise self._unavailable("its answer leaves the root")
        path = full[len(base) + 1 :]
        alone = response.findtext(f"{_DAV}status")  # of what is not told of, or cut short
        if alone is not None and " 200" not in alone:
            raise self._unavailable(f"its answer leaves out {path or 'a part'}")
        found = {
            prop.tag: prop
            for status in response.findall(f"{_DAV}propstat")
            if " 200" in (status.findtext(f"{_DAV}status") or " 200")
            for prop in status.iterfind(f"{_DAV}prop/*")
        }
        kind = found.get(f"{_DAV}resourcetype")
        if kind is not None and kind.find(f"{_DAV}collection") is not None:
            return Entry(path, 0, _time(found), "directory")
        told = _text(found, "getcontentlength")
        if kind is None and not told:
            raise self._unavailable(f"it does not tell what {path} is")
        size = int(told or "0")
        etag = _text(found, "getetag")
        return Entry(path, size, _time(found), "file", etag.strip('"') if etag else None)

    def open_read(self, path: str) -> WebdavStream:
        return self.open_read_at(path, 0)

    def open_read_at(self, path: str, offset: int) -> WebdavStream:
        return self._reading(path, offset, None)

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes of a file from ``offset`` on."""
        stream = self._reading(path, offset, size or None)
        return Slice(stream, max(0, min(size, stream.size - offset)))

    def _reading(self, path: str, offset: int, size: int | None) -> WebdavStream:
        entry = self.stat(path)
        if entry is None:
            raise PayloadNotFoundError(storage=self.name, path=path)
        if entry.kind != "file":
            raise self._refused(path, "it is a directory, not a file")
        end = entry.size if size is None else min(offset + size, entry.size)
        partly = offset < end and end - offset < entry.size
        stream = self._get(path, part(offset, end) if partly else {})
        wanted = partly and stream.is_part(offset, end, entry.size)
        if not (wanted or stream.whole):
            stream.close()  # a server may send less than it was asked for
            stream = self._get(path, {})
        stream.size = entry.size  # an answer in chunks does not tell
        if not wanted:
            stream.pass_over(offset)
        return stream

    def read_back(self, path: str) -> WebdavStream:
        """As :meth:`open_read` for what is known to be a file: one request less."""
        return self._get(path, {})

    def _get(self, path: str, headers: Mapping[str, str]) -> WebdavStream:
        reply = self._ask("GET", self._path(path), headers)
        plain = reply.header("Content-Encoding") in (None, "", "identity")
        if plain and (reply.status == 200 or (headers and reply.status == 206)):
            return WebdavStream(self, path, reply)
        reply.close()
        if reply.status in _ABSENT:
            self._check_root()
            raise PayloadNotFoundError(storage=self.name, path=path)
        raise self._error(reply.status, path)

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        if self._new_path(path).startswith(_TEMP):
            self._put(path, source, size)
            return None
        if self.stat(path) is not None:  # before bytes are sent for nothing; MOVE decides
            raise PayloadExistsError(storage=self.name, path=path)
        written = temp_path(f"w/{uuid.uuid4().hex}")
        self._put(written, source, size)
        try:
            self.rename(written, path)
        except StorageError as error:
            self._quietly_remove(written)
            if isinstance(error, PayloadNotFoundError):
                raise self._unavailable(f"{written} went while it was written") from None
            raise
        return None

    def _put(self, path: str, source: Readable, size: int) -> None:
        self._make_folder(posixpath.dirname(path))
        headers = {"If-None-Match": "*", "Content-Type": "application/octet-stream"}
        try:
            status = self._sent(path, source, size, headers)
        except BaseException:
            self._quietly_remove(path)
            raise
        if status in (200, 201, 204):
            return
        if status != 412:
            self._quietly_remove(path)
        if status in (404, 409):
            self._forget_folders("")
            self._check_root()
            raise self._unavailable(f"the folder of {path} went while it was used")
        raise self._put_error(status, path, size)

    def _sent(self, path: str, source: Readable, size: int, headers: Mapping[str, str]) -> int:
        try:
            with self._wire.send(
                "PUT", self._target(path), self._headers(headers), source, size
            ) as reply:
                reply.read()
                return reply.status
        except WireError as error:
            raise self._unavailable(str(error)) from None

    def copy_from(
        self, source: Any, source_path: str, path: str, size: int, moved: Callable[[int], None]
    ) -> bool:
        """COPY within one server, in the name of one user."""
        if not isinstance(source, WebdavStorage) or size > _COPY_LIMIT:
            return False
        if (source._origin(), source._config) != (self._origin(), self._config):
            return False
        self._make_folder(posixpath.dirname(self._new_path(path)))
        headers = {"Destination": self._origin() + self._target(path), "Overwrite": "F"}
        status = source._done("COPY", source._path(source_path), headers=headers)
        if status == 412:
            raise PayloadExistsError(storage=self.name, path=path)
        if status not in (201, 204):
            self._quietly_remove(path)
            return False  # copying by ourselves tells why
        moved(size)
        return True

    def _origin(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}"

    def _put_error(self, status: int, path: str, size: int) -> StorageError:
        """Many servers tell a full disk as some error of theirs: their quota tells more."""
        if status < 500 or status == 507:
            return self._error(status, path)
        usage = self.usage()
        if usage is not None and usage.total - usage.used < size:
            return StorageFullError(storage=self.name, message=f"HTTP {status}, its quota is used")
        return self._error(status, path)

    def _quietly_remove(self, path: str) -> None:
        """Clearing up after an error that is being told; the sweep finds what stays."""
        try:
            self._done("DELETE", path)
        except StorageError:
            pass

    def _make_folder(self, folder: str) -> None:
        """Make a folder and what is missing above it; what was made before is not asked for."""
        if not folder or folder in self._folders:
            return
        status = self._done("MKCOL", folder, folder=True)
        if status in (404, 409):
            self._make_parents(folder)
            status = self._done("MKCOL", folder, folder=True)
        # 405: it is there; several threads make one folder at once, which some answer so
        if status not in (201, 405):
            found = self._look(folder) if status not in _DENIED else None
            if found is None:
                raise self._error(status, folder)
        elif status == 405 and not self._is_folder(folder):
            raise self._refused(folder, "a file stands where a folder is wanted")
        with self._lock:
            if len(self._folders) >= _MOST_FOLDERS:
                self._folders, self._with_folders = set(), set()
            self._folders.add(folder)
            while folder:
                self._with_folders.add(folder)
                folder = posixpath.dirname(folder)

    def _make_parents(self, folder: str) -> None:
        parent = posixpath.dirname(folder)
        if not parent:
            self._check_root()
        self._forget_folders(parent)
        self._make_folder(parent)

    def _is_folder(self, path: str) -> bool:
        found = self._look(path)
        return found is not None and found.kind == "directory"

    def _forget_folders(self, below: str) -> None:
        if below and below not in self._with_folders:
            return  # as after every rename of a file
        with self._lock:
            self._folders = {
                one for one in self._folders if below and f"{one}/".find(f"{below}/") != 0
            }

    def flush(self) -> None:
        """Nothing to do: what WebDAV answers is as durable as the server makes it."""

    def rename(self, source: str, destination: str) -> None:
        self._path(source), self._new_path(destination)
        status = self._move(source, destination)
        if status in (403, 404, 409, 500):
            # no parent, no source, or really so: look which
            if self._look(source) is None:
                self._check_root()
                raise PayloadNotFoundError(storage=self.name, path=source)
            self._forget_folders("")
            self._make_folder(posixpath.dirname(destination))
            status = self._move(source, destination)
        # not a server's word for it (RFC 4918, 9.9.4), but what a gateway puts before its own page
        if status == 200 and (self._look(source) or not self._look(destination)):
            raise self._unavailable(f"{source} is not moved, though it says so")
        if status not in (200, 201, 204):
            raise self._error(status, destination)
        self._forget_folders(source)

    def _move(self, source: str, destination: str) -> int:
        parent = posixpath.dirname(destination)
        if parent and parent not in self._folders and self._look(source) is not None:
            self._make_folder(parent)  # nothing is made for no source
        headers = {"Destination": self._origin() + self._target(destination), "Overwrite": "F"}
        # some servers (WsgiDAV) look whether the name is free, and move then: of ours one waits
        with self._moving[hash(destination) % _LOCKS]:
            return self._done("MOVE", source, headers=headers)

    def remove(self, path: str) -> None:
        status = self._done("DELETE", self._path(path))
        self._forget_folders(path)
        if status in _ABSENT or status == 409:
            self._check_root()
        elif status not in (200, 202, 204):
            if self._look(path) is not None:
                raise self._error(status, path)
        elif status == 202 and self._look(path) is not None:
            raise self._unavailable(f"{path} is still there after its removal was accepted")

    def usage(self) -> Usage | None:
        with self._ask("PROPFIND", "", {"Depth": "0"}, _QUOTA, folder=True) as reply:
            body = self._all_of(reply)
        if reply.status != 207:
            raise self._error(reply.status, "")
        found = self._parsed(body)
        try:
            free = int(found.findtext(f".//{_DAV}quota-available-bytes") or "-1")
            used = int(found.findtext(f".//{_DAV}quota-used-bytes") or "-1")
        except ValueError:
            return None
        return Usage(used + free, used) if free >= 0 and used >= 0 else None

    def check(self) -> None:
        self._check_root()


class WebdavStream(ReplyStream):
    """The body of an answer as a file."""

    def __init__(self, storage: WebdavStorage, path: str, reply: Reply) -> None:
        super().__init__(reply, lambda error: storage._unavailable(str(error)))
        self._storage, self._path = storage, path
        self.size: int = reply.length or 0
        self.opened: Hashable = _stamp(reply)

    def stamp(self) -> Hashable:
        """ETag, time of change and size, asked anew."""
        with self._storage._ask("HEAD", self._path) as reply:
            self._storage._all_of(reply)
            return _stamp(reply)


def _stamp(reply: Reply) -> Hashable:
    # of a part, the length of the whole is behind the slash
    told = (reply.header("Content-Range") or reply.header("Content-Length") or "").rpartition("/")[
        2
    ]
    return reply.header("ETag"), reply.header("Last-Modified"), told


def _text(found: Mapping[str, ElementTree.Element], name: str) -> str:
    element = found.get(_DAV + name)
    return (element.text or "").strip() if element is not None else ""


def _time(found: Mapping[str, ElementTree.Element]) -> float:
    text = _text(found, "getlastmodified")
    return parsedate_to_datetime(text).timestamp() if text else 0.0
