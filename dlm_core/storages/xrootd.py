"""XRootD (``root://``), the protocol of many data archives, by its own client."""

from __future__ import annotations

import importlib
import io
import os
import posixpath
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
)
from dlm_core.storages import xrootd_third as third_party
from dlm_core.storages.config import has_host, read_config
from dlm_core.storages.listing import Listed
from dlm_core.storages.port import Entry, Readable, ReadStream, Usage
from dlm_core.storages.ranges import Slice
from dlm_core.storages.secrets import read_secret

_BLOCK = 4 << 20
_LOCKS = 64
_LONGEST_MESSAGE = 300
_LONGEST_NAME = 254
# a look is answered soon or there is an outage; a disk may take long to write what it was sent
_LOOK_SECONDS = 60
_BYTES_SECONDS = 300
# The client's own would have one lost server cost half an hour. What the operator has set as XRD_*
# in the environment goes first.
_SETTINGS = {
    "ConnectionWindow": 10,
    "ConnectionRetry": 1,
    "StreamErrorWindow": 0,
    "StreamTimeout": 60,
    "RequestTimeout": _BYTES_SECONDS,
    "TimeoutResolution": 1,
    "NotAuthorizedRetryLimit": 0,
    "TCPKeepAlive": 1,
    "TCPKeepAliveTime": 60,
    # else a file that is called .meta4 is read as a list of places where to find another
    "MetalinkProcessing": 0,
}
# flags of the protocol: its module is there only where the client is installed
_OPEN_READ, _OPEN_NEW, _OPEN_UPDATE, _OPEN_MAKE_PATH = 16, 8, 32, 256
_FILE_MODE = 0x100 | 0x080 | 0x020 | 0x004
_FOLDER_MODE = _FILE_MODE | 0x040 | 0x008 | 0x001
_MAKE_PARENTS = 1
_WITH_STAT = 1
_IS_FOLDER, _IS_OTHER = 2, 4
_SPACE = 5
_IS_MANAGER = 2
_PARTIAL = 3
# codes of the client, and those that the server answered (code 400)
_SERVER_ANSWERED, _CLIENT_ABSENT = 400, 304
_CLIENT_DENIED = {203, 204}
_ABSENT, _EXISTS, _LOCKED = 3011, 3018, 3003
_FULL = {3009, 3021}
_DENIED = {3010, 3025, 3028, 3030}
_REFUSED = {3000, 3001, 3002, 3015, 3016, 3026, 3031}
# of what has no code of its own the text tells, behind the path
_FAILED = 3005
_NOT_EMPTY, _BELOW_A_FILE = "; directory not empty", "; not a directory"
_ROOT = re.compile(r"(roots?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?)/(/[^?#]*)")

#: where a file lies whose content is a secret: the client reads it by itself
FileReference = Annotated[str, Field(pattern=r"^(file:/[^?&\s]+|credential:[A-Za-z0-9_.-]+)$")]


class XrootdConfig(BaseModel):
    """What ``config`` of an XRootD storage may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keytab: FileReference | None = Field(None, description="Keytab of 'sss', its mode 0600.")
    namespace: bool = Field(
        False, description="The server manages others and lists by itself all that they hold."
    )


def open_xrootd(name: str, root: str, config: Mapping[str, Any]) -> XrootdStorage:
    """A folder of an XRootD server; ``root`` is ``root://host:port//absolute/folder``.

    Raises
    ------
    InvalidValueError
        if the config has unknown keys, ``root`` is no such URL, a reference leads to nothing, or
        the client is not installed.
    """
    parsed = read_config(XrootdConfig, name, config)
    url = _ROOT.fullmatch(root)
    plain = root.isprintable() and " " not in root and ".." not in root.split("/")
    if not url or not plain or not has_host(url[1]):
        raise InvalidValueError(
            what=f"root of storage {name}", value=root, expected="root://host:port//absolute/folder"
        )
    login = _login(name, parsed)
    return XrootdStorage(name, _client(), url[1], url[2].rstrip("/"), login, parsed.namespace)


def _login(name: str, config: XrootdConfig) -> str:
    """Where the client finds what it proves itself with."""
    if config.keytab is None:
        return ""
    read_secret(name, config.keytab)
    kind, _, place = config.keytab.partition(":")
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "") if kind == "credential" else "/"
    return f"xrd.sss={Path(folder, place)}"


@lru_cache(maxsize=1)
def _client() -> Any:
    try:
        client: Any = importlib.import_module("XRootD.client")
    except ImportError as error:
        raise InvalidValueError(
            what="interface", value="xrootd", expected=f"its client: install dlm[xrootd] ({error})"
        ) from None
    for key, value in _SETTINGS.items():
        client.EnvPutInt(key, value)
    return client


class _BelowFileError(PathRefusedError):
    """storage {storage} refuses the path {path!r}: {message}"""


class XrootdStorage(Listed):
    """A folder of an XRootD server; see :class:`dlm_core.storages.port.Storage`.

    A file is made exclusively and synced before it is closed. The protocol's rename replaces what
    is there, so a destination is looked at just before, under a lock; the catalogue gives every
    path one owner. The server follows symbolic links and does not tell of them.

    Parameters
    ----------
    host : URL without a path.
    base : absolute folder there, '' for the top.
    login : CGI that names the files of credentials.
    namespace : whether a server that manages others is believed to list what they hold.
    """

    atomic_write = False
    exclusive = "folder"
    remote = True

    def __init__(
        self, name: str, client: Any, host: str, base: str, login: str, namespace: bool,
        concurrency: int = 16,
    ) -> None:  # fmt: skip
        self.name, self.concurrency = name, concurrency
        self._client, self._host, self._base = client, host, base
        self._cgi = f"?{login}" if login else ""
        self._believed = namespace
        self._server: Any = client.FileSystem(host + "/" + self._cgi)
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    # --- calls and errors ------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base or "/"

    def _url(self, path: str) -> str:
        return f"{self._host}/{self._full(path)}{self._cgi}"

    def _path(self, path: str) -> str:
        if "?" in path:
            # what follows is taken for parameters
            raise self._refused(path, "XRootD keeps no '?' in a name")
        return super()._path(path)

    def _new_path(self, path: str) -> str:
        if max(map(len, path.encode("utf-8", "surrogateescape").split(b"/"))) > _LONGEST_NAME:
            raise self._refused(path, f"XRootD lists names of at most {_LONGEST_NAME} octets")
        return self._path(path)

    def _ask(self, path: str, call: Callable[..., Any], *arguments: Any, seconds: int) -> Any:
        """What a call of the client answers."""
        try:
            status, answer = call(*arguments, timeout=seconds)
        except (UnicodeError, SystemError):
            raise self._unavailable("its answer has a name that is no UTF-8") from None
        if not status.ok:
            raise self._error(status, path)
        if status.code == _PARTIAL:
            raise self._unavailable("its answer is of a part of its servers only")
        return answer

    def _look_at(self, path: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._ask(path, call, *arguments, seconds=_LOOK_SECONDS)

    def _error(self, status: Any, path: str) -> StorageError:
        """What a status means; the text may tell the URL, which has no secret in it."""
        whole = " ".join(status.message.split())
        told = whole[:_LONGEST_MESSAGE]
        number = status.errno if status.code == _SERVER_ANSWERED else 0
        if number == _ABSENT or status.code == _CLIENT_ABSENT:
            return PayloadNotFoundError(storage=self.name, path=path)
        if number == _EXISTS or (number == _FAILED and whole.endswith(_NOT_EMPTY)):
            return PayloadExistsError(storage=self.name, path=path)
        if number in _FULL:
            return StorageFullError(storage=self.name, message=told)
        if number in _DENIED or status.code in _CLIENT_DENIED:
            return AccessDeniedError(storage=self.name, path=path, message=told)
        if number == _FAILED and whole.endswith(_BELOW_A_FILE):
            return _BelowFileError(storage=self.name, path=path, message=told)
        if number in _REFUSED:
            return self._refused(path, told)
        return self._unavailable(told)

    # --- looking ---------------------------------------------------------------------------------

    def _check_root(self) -> None:
        self._believe()
        found = self._look("")
        if found is None or found.kind != "directory":
            raise self._unavailable("its root is not there")

    def _believe(self) -> None:
        """Raise if the server answers for others: of one that is down it tells that nothing is
        there, and lists what the rest have."""
        if self._believed:
            return
        if self._look_at("", self._server.protocol).hostinfo & _IS_MANAGER:
            raise self._unavailable(
                "it manages other servers: add each by itself, or set namespace=true if it lists "
                "by itself all that they hold"
            )
        self._believed = True

    def _look(self, path: str) -> Entry | None:
        try:
            return _entry(path, self._look_at(path, self._server.stat, self._full(path)))
        except (PayloadNotFoundError, _BelowFileError):
            return None

    def _list(self, folder: str) -> list[Entry] | None:
        self._believe()
        try:
            found = self._look_at(folder, self._server.dirlist, self._full(folder), _WITH_STAT)
        except PayloadNotFoundError:
            return None
        above = f"{folder}/" if folder else ""
        entries = [self._listed(above, one.name, one.statinfo) for one in found]
        self._check_inside(entries, folder)
        return entries

    def _listed(self, above: str, name: str, info: Any) -> Entry:
        if info is None:
            raise self._unavailable("its listings tell names only")
        # the server cuts what is longer, and says nothing
        if len(name.encode()) == _LONGEST_NAME and self._look(above + name) is None:
            raise self._unavailable(f"it cuts the name of what is listed as {above}{name}")
        return _entry(above + name, info)

    def open_read(self, path: str) -> XrootdStream:
        entry = self.stat(path)
        if entry is None:
            raise PayloadNotFoundError(storage=self.name, path=path)
        if entry.kind != "file":
            raise self._refused(path, "it is a directory, not a file")
        return self.read_back(path)

    def open_read_at(self, path: str, offset: int) -> XrootdStream:
        stream = self.open_read(path)
        stream.begin_at(offset)
        return stream

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes of a file from ``offset`` on."""
        stream = self.open_read_at(path, offset)
        return Slice(stream, max(0, min(size, stream.size - offset)))

    def read_back(self, path: str) -> XrootdStream:
        """As :meth:`open_read` for what is known to be a file: one question less."""
        try:
            return XrootdStream(self, path, self._open(self._path(path), _OPEN_READ))
        except PayloadNotFoundError:
            self._check_root()
            raise

    def _open(self, path: str, flags: int) -> Any:
        file, url = self._client.File(), self._url(path)
        mode = _FILE_MODE if flags & _OPEN_NEW else 0
        status, _ = file.open(url, flags, mode, timeout=_LOOK_SECONDS)
        if flags & _OPEN_NEW and status.errno == _LOCKED:
            raise PayloadExistsError(storage=self.name, path=path)  # another is writing it
        if not status.ok:
            raise self._error(status, path)
        return file

    def usage(self) -> Usage | None:
        told = self._look_at("", self._server.query, _SPACE, self._full(""))
        fields = parse_qs(told.decode("ascii", "replace").rstrip("\0"))
        try:
            total, free, used, quota = (
                int(fields[f"oss.{key}"][0]) for key in ("space", "free", "used", "quota")
            )
        except (KeyError, ValueError):
            return None
        if quota > 0:
            return Usage(quota, min(used, quota))
        return Usage(total, total - free) if 0 <= free <= total else None

    def check(self) -> None:
        self._check_root()

    # --- changing --------------------------------------------------------------------------------

    def copy_from(
        self, source: Any, source_path: str, path: str, size: int, moved: Callable[[int], None]
    ) -> bool:
        """The protocol's third-party copy: this server fetches the file from the other one."""
        if not isinstance(source, XrootdStorage) or size < third_party.FROM_SIZE:
            return False
        if not third_party.may(source._host, self._host):
            return False
        ends = source._url(source._path(source_path)), self._url(self._new_path(path))
        self._check_root()
        self._must_be_free(path)
        try:
            status = third_party.fetch(self._client, *ends, size, moved)
            if status.ok:
                self._written(self._open(path, _OPEN_UPDATE), path, io.BytesIO(), size)
                return True
        except BaseException:
            self._quietly_remove(path)
            raise
        error = self._error(status, path)
        if isinstance(error, PayloadExistsError):
            raise error
        self._quietly_remove(path)
        # whose fault it is is told by copying it ourselves
        if not isinstance(error, PayloadNotFoundError):
            third_party.could_not(source._host, self._host)
        return False

    def _quietly_remove(self, path: str) -> None:
        with suppress(StorageError):
            self.remove(path)

    def write(self, path: str, source: Readable, size: int) -> str | None:
        file = self._create(self._new_path(path))
        try:
            written = self._written(file, path, source, 0)
            if written < size:
                raise self._unavailable(f"its source ended after {written} bytes of {size}")
        except BaseException:
            self._quietly_remove(path)
            raise
        return None

    def write_on(self, path: str, source: Readable, begun: int) -> None:
        path = self._new_path(path)
        file = self._open(path, _OPEN_UPDATE) if begun else self._create(path)
        self._written(file, path, source, begun)

    def left_of(self, path: str) -> int:
        """Each block was answered for before the next one was sent."""
        entry = self.stat(path)
        return entry.size if entry is not None and entry.kind == "file" else 0

    def _create(self, path: str) -> Any:
        """Open a new file. The server makes its folders, and a root that is gone too: looked at
        first, so that nothing is written where a disk is not mounted."""
        self._check_root()
        try:
            return self._open(path, _OPEN_NEW | _OPEN_UPDATE | _OPEN_MAKE_PATH)
        except PayloadNotFoundError:
            raise self._unavailable(f"the folder of {path} went while it was used") from None

    def _written(self, file: Any, path: str, source: Readable, offset: int) -> int:
        """Where an open file ends when it has all of ``source`` from ``offset`` on; closed."""
        try:
            while block := source.read(_BLOCK):
                self._ask(path, file.write, block, offset, len(block), seconds=_BYTES_SECONDS)
                offset += len(block)
            self._ask(path, file.sync, seconds=_BYTES_SECONDS)
            self._ask(path, file.close, seconds=_BYTES_SECONDS)
        except BaseException as error:
            file.close(timeout=_LOOK_SECONDS)
            if isinstance(error, PayloadNotFoundError):
                raise self._unavailable(f"{path} went while it was written") from None
            raise
        return offset

    def flush(self) -> None:
        """Nothing to do: each file is synced before it is closed."""

    def rename(self, source: str, destination: str) -> None:
        source, destination = self._path(source), self._new_path(destination)
        with self._locks[hash(destination) % _LOCKS]:
            # first: to move what is not there some servers make the root anew
            if self._look(source) is None:
                self._check_root()
                raise PayloadNotFoundError(storage=self.name, path=source)
            self._must_be_free(destination)
            with suppress(PayloadNotFoundError):
                self._move(source, destination)
                return
            self._make_folder(posixpath.dirname(destination))
            self._move(source, destination)

    def rename_many(self, pairs: Sequence[tuple[str, str]]) -> list[StorageError | None]:
        """As :meth:`rename` for each, but the root is looked at once in place of each source."""
        self._check_root()
        with ThreadPoolExecutor(self.concurrency, "dlm-rename") as pool:
            return list(pool.map(self._error_of_rename, pairs))

    def _error_of_rename(self, pair: tuple[str, str]) -> StorageError | None:
        try:
            source, destination = self._path(pair[0]), self._new_path(pair[1])
            with self._locks[hash(destination) % _LOCKS]:
                self._must_be_free(destination)
                with suppress(PayloadNotFoundError):
                    self._move(source, destination)
                    return None
            self.rename(source, destination)
        except StorageError as error:
            return error
        return None

    def _must_be_free(self, path: str) -> None:
        if self._look(path) is not None:
            raise PayloadExistsError(storage=self.name, path=path)

    def _move(self, source: str, destination: str) -> None:
        self._look_at(source, self._server.mv, self._full(source), self._full(destination))

    def _make_folder(self, folder: str) -> None:
        with suppress(PayloadExistsError):
            self._look_at(
                folder, self._server.mkdir, self._full(folder), _MAKE_PARENTS, _FOLDER_MODE
            )

    def remove(self, path: str) -> None:
        entry = self._look(self._path(path))
        if entry is None:
            self._check_root()
        elif entry.kind == "directory":
            with ThreadPoolExecutor(self.concurrency, "dlm-remove") as pool:
                self._remove_folder(path, pool)
        else:
            self._remove_file(path)

    def _remove_file(self, path: str) -> None:
        with suppress(PayloadNotFoundError):  # another removed it
            self._look_at(path, self._server.rm, self._full(path))

    def _remove_folder(self, folder: str, pool: ThreadPoolExecutor) -> None:
        """Never through a link: as a file the server removes an empty folder, refuses a full one,
        and tells of a link to one that it is a directory."""
        try:
            self._remove_file(folder)
            return
        except PayloadExistsError:
            pass
        except PathRefusedError:
            raise self._refused(folder, "it may be a link to a folder elsewhere") from None
        entries = self._list(folder) or []
        for entry in entries:
            if entry.kind == "directory":
                self._remove_folder(entry.path, pool)
        files = [entry.path for entry in entries if entry.kind != "directory"]
        list(pool.map(self._remove_file, files))
        try:
            self._look_at(folder, self._server.rmdir, self._full(folder))
        except PayloadNotFoundError:
            pass
        except PayloadExistsError:
            left = "something is left in it that is not listed: a link that leads nowhere?"
            raise self._refused(folder, left) from None


class XrootdStream:
    """An open file that is read once, front to back; a read that is short has met its end."""

    def __init__(self, storage: XrootdStorage, path: str, file: Any) -> None:
        self._storage, self._path, self._file = storage, path, file
        self._offset, self._ended = 0, False
        info = storage._look_at(path, file.stat)
        self.size: int = info.size
        self.opened: Hashable = _stamp(info)

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_BLOCK), b""))
        length = min(size, _BLOCK)
        if self._ended or not length:
            return b""
        data: bytes = self._storage._ask(
            self._path, self._file.read, self._offset, length, seconds=_BYTES_SECONDS
        )
        self._offset += len(data)
        self._ended = len(data) < length
        return data

    def begin_at(self, offset: int) -> None:
        """Read from byte ``offset`` on; nothing was read yet."""
        self._offset = offset

    def stamp(self) -> Hashable:
        """Identity, size and time of change of what has the name now."""
        storage = self._storage
        try:
            found = storage._look_at(self._path, storage._server.stat, storage._full(self._path))
        except PayloadNotFoundError:
            return None
        return _stamp(found)

    def close(self) -> None:
        self._file.close(timeout=_LOOK_SECONDS)

    def __enter__(self) -> XrootdStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stamp(info: Any) -> Hashable:
    return (info.id, info.size, info.modtime)


def _entry(path: str, info: Any) -> Entry:
    if info.flags & _IS_FOLDER:
        return Entry(path, 0, float(info.modtime), "directory")
    # a link that leads nowhere is listed without anything
    other = info.flags & _IS_OTHER or not (info.flags or info.modtime)
    return Entry(path, int(info.size), float(info.modtime), "other" if other else "file")
