"""Whatever rclone can reach: HTTP to read from, and the backends that have no adapter here.

Single calls go to the daemon's socket one by one; many files that lie together on a disk go in one
``sync/copy`` with a list of them, are read back in one ``hashsum`` (see ``take_many``) and become
visible by one ``sync/move`` (see ``rename_many``).
"""

from __future__ import annotations

import posixpath
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import groupby
from typing import Any

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.listing import Listed
from dlm_core.storages.port import Entry, Readable, ReadStream, Storage, Usage, temp_path
from dlm_core.storages.posix import PosixStorage
from dlm_core.storages.ranges import Slice
from dlm_core.storages.rclone_config import (
    Options,
    is_secret,
    read_rclone_config,
    referenced,
    without_secret,
)
from dlm_core.storages.rclone_daemon import Daemon, RcloneError, daemon
from dlm_core.storages.rclone_many import copy_listed, hashes, move_groups, move_listed
from dlm_core.storages.rclone_reading import Beginnings, RcloneStream, open_part
from dlm_core.storages.web import read_authorization, read_web_config
from dlm_core.storages.wire import Headers, Reply, WireError

_TEMP = temp_path("")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}")
_LOCKS = 64
_MOST_FOLDERS = 10_000
_LOCKED_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
_LONGEST_MESSAGE = 300
# what backends say has no codes, only texts, and names in them: quoted, or with a slash
_NAMES = re.compile(r'"(?:[^"\\]|\\.)*"|\S*/\S*')
_ABSENT = re.compile(
    r"(object|directory|file) not found|no such file|not a directory|(?<![\d\]]:)\b404\b", re.I
)
_DENIED = re.compile(
    r"permission denied|access ?denied|unauthori[sz]ed|forbidden|unable to authenticate"
    r"|login incorrect|\b(401|403|530)\b",
    re.I,
)
_FULL = re.compile(r"no space left|insufficient ?storage|quota|disk full|\b507\b", re.I)


def open_rclone(name: str, root: str, config: Mapping[str, Any]) -> RcloneStorage:
    """A storage on any backend of rclone's; ``root`` is a path on it as rclone writes it, and a
    dot where the remote begins.

    Raises
    ------
    InvalidValueError
        if a secret is given instead of a reference, or a reference leads to nothing.
    """
    kind, options = read_rclone_config(name, config)
    if not root.isprintable() or "]" in root or ".." in root.split("/"):
        raise InvalidValueError(
            what=f"root of storage {name}", value=root, expected="a path without ']' and '..'"
        )
    place = "" if root == "." else root.rstrip("/") or root
    return RcloneStorage(name, kind, options, place, hidden=referenced(config))


def open_http(name: str, root: str, config: Mapping[str, Any]) -> RcloneStorage:
    """A web server's folder, to read from only; ``root`` is its URL, whose pages list files.

    Raises
    ------
    InvalidValueError
        as :func:`~dlm_core.storages.web.read_web_config`.
    """
    parsed = read_web_config(name, root, config)

    def options() -> dict[str, str]:
        header = read_authorization(name, parsed)
        more = {"headers": f'Authorization,"{header}"'} if header else {}
        return {"url": root.rstrip("/") + "/", **more}

    return RcloneStorage(name, "http", options, "", read_only=True)


class RcloneStorage(Listed):
    """A folder of a remote; see :class:`dlm_core.storages.port.Storage`.

    Few backends can create without overwriting, so a destination is looked at just before, by us
    under a lock and by rclone again; the catalogue gives every path one owner. Files are made
    under a temporary name and moved. How symbolic links are told is the backend's choice.

    Parameters
    ----------
    kind : type of the backend.
    options : asked at each call for what the backend needs, secrets as they are then.
    root : path on the remote.
    read_only : whether every change is refused.
    hidden : names of options that no error shows, whatever they look like.
    """

    atomic_write = False
    remote = True

    def __init__(
        self, name: str, kind: str, options: Options, root: str, *,
        read_only: bool = False, concurrency: int = 16, hidden: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.concurrency = name, concurrency
        self._kind, self._options, self._root = kind, options, root
        self._read_only, self._hidden = read_only, hidden
        self._renames: bool | None = None
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._folders: set[str] = set()
        self._beginnings = Beginnings()

    # --- calls and errors ------------------------------------------------------------------------

    def _fs(self, running: Daemon, below: str = "") -> str:
        """What rclone calls this storage; the remote is made again if a secret has changed."""
        fs = f"{running.remote(self._kind, self._options())}:{self._root}"
        if not below:
            return fs
        return f"{fs}{below}" if fs.endswith((":", "/")) else f"{fs}/{below}"

    @contextmanager
    def _asking(self, path: str, gone: str | None = None) -> Iterator[Daemon]:
        """The daemon, whose errors become the port's; ``gone`` is told where "not found" is none
        of what the caller asked for."""
        try:
            yield daemon()
        except (RcloneError, WireError, InvalidValueError) as error:
            found = self._error(error, path)
            if gone is not None and isinstance(found, PayloadNotFoundError):
                raise self._unavailable(gone) from None
            raise found from None

    def _call(self, command: str, path: str, **parameters: Any) -> dict[str, Any]:
        with self._asking(path) as running:
            return running.call(command, {"fs": self._fs(running), "remote": path, **parameters})

    def _error(self, error: Exception, path: str) -> StorageError:
        message = self._without_secrets(str(error))
        if not isinstance(error, RcloneError):
            return self._unavailable(message)
        # a word of a secret may be one of the error's
        told = self._without_names(str(error), path)
        if _FULL.search(told):
            return StorageFullError(storage=self.name, message=message)
        if _DENIED.search(told):
            return AccessDeniedError(storage=self.name, path=path, message=message)
        if "is a directory" in told:
            return self._refused(path, "it is a directory, not a file")
        if _ABSENT.search(told):
            return PayloadNotFoundError(storage=self.name, path=path)
        return self._unavailable(message)

    def _without_names(self, message: str, path: str) -> str:
        """A file may be called 404, and a folder 'no such file'; a name may have spaces."""
        while path:
            message = message.replace(f"/{path}", "/")
            path = posixpath.dirname(path)
        if top := self._root.strip("/"):
            message = message.replace(f"/{top}", "/")
        return _NAMES.sub(" ", message)

    def _without_secrets(self, message: str) -> str:
        """A backend may tell the address that it asked, with what was in it."""
        with suppress(InvalidValueError):
            for key, value in self._options().items():
                if value and (key in self._hidden or is_secret(key, value)):
                    message = without_secret(message, value)
        return message.split("\n")[0][:_LONGEST_MESSAGE]

    def _must_write(self, path: str) -> None:
        if self._read_only:
            raise AccessDeniedError(
                storage=self.name, path=path, message=f"{self._kind} is only read from"
            )

    # --- looking ---------------------------------------------------------------------------------

    def _check_root(self) -> None:
        try:
            self._call("operations/list", "", opt={"noModTime": True, "noMimeType": True})
        except PayloadNotFoundError:
            raise self._unavailable("its root is not there") from None

    def _look(self, path: str) -> Entry | None:
        try:
            item = self._call("operations/stat", path)["item"]
        except PayloadNotFoundError:
            return None
        return None if item is None else _entry(item)

    def _list(self, folder: str) -> list[Entry] | None:
        try:
            found = self._call("operations/list", folder, opt={"noMimeType": True})["list"]
        except PayloadNotFoundError:
            return None
        entries = [_entry(item) for item in found]
        self._check_inside(entries, folder)
        # a bucket answers with nothing for a folder that is not there
        return None if not entries and folder and self._look(folder) is None else entries

    def open_read(self, path: str) -> RcloneStream:
        return self.open_read_at(path, 0)

    def open_read_at(self, path: str, offset: int) -> RcloneStream:
        return self._reading(path, offset, None)

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes of a file from ``offset`` on."""
        stream = self._reading(path, offset, size)
        return Slice(stream, max(0, min(size, stream.size - offset)))

    def _reading(self, path: str, offset: int, size: int | None) -> RcloneStream:
        entry = self.stat(path)
        if entry is None:
            raise PayloadNotFoundError(storage=self.name, path=path)
        if entry.kind != "file":
            raise self._refused(path, "it is a directory, not a file")
        end = entry.size if size is None else min(offset + size, entry.size)
        if 0 < offset < end and (stream := open_part(self, self._beginnings, entry, offset, end)):
            return stream
        stream = RcloneStream(self, path, self.open_reply(path), entry)
        stream.pass_over(0 if size == 0 else offset)
        return stream

    def read_back(self, path: str) -> RcloneStream:
        """As :meth:`open_read` for what is known to be a file: one question less."""
        return RcloneStream(self, path, self.open_reply(self._path(path)), None)

    def open_reply(self, path: str, headers: Headers | None = None) -> Reply:
        """What the daemon answers to a GET of a file; with a range asked for, it may be a part."""
        try:
            with self._asking(path) as running:
                return running.open(self._fs(running), path, headers or {})
        except PayloadNotFoundError:
            self._check_root()
            raise

    def usage(self) -> Usage | None:
        try:
            told = self._call("operations/about", "")
        except StorageUnavailableError:
            self._check_root()  # else it is a backend that cannot tell
            return None
        total, used = told.get("total"), told.get("used")
        return None if total is None or used is None else Usage(total, used)

    def check(self) -> None:
        self._check_root()

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        self._must_write(path)
        folder, _, name = self._new_path(path).rpartition("/")
        if path.startswith(_TEMP) and _PLAIN_NAME.fullmatch(name):
            self._upload(folder, name, source, size)
            return None
        if self.stat(path) is not None:  # before bytes are sent for nothing; the move looks again
            raise PayloadExistsError(storage=self.name, path=path)
        written = temp_path(f"w/{uuid.uuid4().hex}")
        try:
            self._upload(posixpath.dirname(written), posixpath.basename(written), source, size)
            found = self._look(written)
            if found is None or found.size != size:
                raise self._unavailable(f"{path} was not written whole")
            self.rename(written, path)
        except BaseException:
            with suppress(StorageError):
                self.remove(written)
            raise
        return None

    def _upload(self, folder: str, name: str, source: Readable, size: int) -> None:
        gone = f"{folder} went while it was written to"
        with self._asking(f"{folder}/{name}", gone) as running:
            running.upload(self._fs(running), folder, name, source, size)

    def flush(self) -> None:
        """Nothing to do: what rclone answers is as durable as the backend makes it."""

    def rename(self, source: str, destination: str) -> None:
        self._must_write(destination)
        self._path(source), self._new_path(destination)
        with self._locks[hash(destination) % _LOCKS]:
            if self._quick_kind(source) == "file":
                if self._quick_kind(destination) is not None:
                    raise PayloadExistsError(storage=self.name, path=destination)
                self._move_file(source, destination)
                return
            if self._look(source) is None:
                self._check_root()
                raise PayloadNotFoundError(storage=self.name, path=source)
            if self._look(destination) is not None:
                raise PayloadExistsError(storage=self.name, path=destination)
            self._move_tree(source, destination)

    def _quick_kind(self, path: str) -> str | None:
        """Kind of what is there, without the listing of a folder that :meth:`_look` needs.

        A backend without real folders tells None of one: that only a new file may lie beside.
        """
        with self._asking(path) as running:
            status = running.look(self._fs(running), path)
        if status in (200, 404):
            return "file" if status == 200 else None
        entry = self._look(path)  # a folder, or an error to be told
        return entry.kind if entry else None

    def _moves(self) -> bool:
        """Whether the backend can rename; many object stores can copy only."""
        if self._renames is None:
            self._renames = bool(self._call("operations/fsinfo", "")["Features"]["Move"])
        return self._renames

    def _move_file(self, source: str, destination: str) -> None:
        if not self._moves():
            self._copy_file(source, destination)
            return
        # rclone looks too, and then does nothing
        self._pair("movefile", source, destination)
        if self._quick_kind(source) == "file":
            if self._quick_kind(destination) is not None:
                raise PayloadExistsError(storage=self.name, path=destination)
            raise self._unavailable(f"{source} was not moved")

    def _copy_file(self, source: str, destination: str) -> None:
        """Copy, read both back, and only then delete the source."""
        self._pair("copyfile", source, destination)
        with self._asking(source, f"{source} went while it was moved") as running:
            fs = self._fs(running)
            first, second = (_hash_of(running, fs, path) for path in (source, destination))
            if first != second:
                raise self._unavailable(f"{destination} is not what {source} is after a copy")
            running.call("operations/deletefile", {"fs": fs, "remote": source})

    def _pair(self, what: str, source: str, destination: str) -> None:
        with self._asking(source, f"{source} went while it was moved") as running:
            fs = self._fs(running)
            parameters = {
                "srcFs": fs, "srcRemote": source, "dstFs": fs, "dstRemote": destination,
                "_config": {"IgnoreExisting": True},
            }  # fmt: skip
            _unless_locked(lambda: running.call(f"operations/{what}", parameters))

    def _move_tree(self, source: str, destination: str) -> None:
        moves = self._moves()
        with self._asking(source, f"{source} went while it was moved") as running:
            pair = {"srcFs": self._fs(running, source), "dstFs": self._fs(running, destination)}
            config = {"IgnoreExisting": True}
            if moves:
                more = {"deleteEmptySrcDirs": True, "_config": config}
                running.call("sync/move", {**pair, **more})
            else:
                running.call("sync/copy", {**pair, "_config": config})
                self._delete_copied(running, pair["srcFs"], pair["dstFs"])
        if self._look(source) is None:
            return
        # empty folders only: no listing that leaves something out costs it
        self._call("operations/rmdirs", source)
        # some object stores tell of a folder for a while after its last object
        if self._look(source) is not None and (moves or self._has_files(source)):
            raise self._unavailable(f"{source} was not moved whole")

    def _has_files(self, folder: str) -> bool:
        try:
            return next(self.walk(folder), None) is not None
        except PayloadNotFoundError:
            return False

    def _delete_copied(self, running: Daemon, source: str, destination: str) -> None:
        """Delete, by name, what reads the same in both places, if all of it does."""
        copied = hashes(running, source, self.concurrency)
        if not copied or copied != hashes(running, destination, self.concurrency):
            raise self._unavailable("a tree is not what it was after a copy")
        for path in copied:
            running.call("operations/deletefile", {"fs": source, "remote": path})

    def remove(self, path: str) -> None:
        self._must_write(path)
        entry = self._look(self._path(path))
        if entry is None:
            self._check_root()
            return
        what = "deletefile" if entry.kind == "file" else "purge"
        with suppress(PayloadNotFoundError):  # another removed it
            self._call(f"operations/{what}", path)

    # --- many at once ----------------------------------------------------------------------------

    def rename_many(self, pairs: Sequence[tuple[str, str]]) -> list[StorageError | None]:
        """As :meth:`rename` for each; files that keep their names below a folder move together."""
        moved: set[tuple[str, str]] = set()
        with ThreadPoolExecutor(self.concurrency, "dlm-rename") as pool:
            with suppress(StorageError):  # each by itself tells
                for old, new, names in move_groups(filter(self._may_move, pairs)):
                    done = self._move_together(old, new, names, pool)
                    moved |= {(f"{old}/{name}", _below(new, name)) for name in done}
            left = list(dict.fromkeys(pair for pair in pairs if pair not in moved))
            errors = dict(zip(left, pool.map(self._error_of_rename, left), strict=True))
        return [errors.get(pair) for pair in pairs]

    def _may_move(self, pair: tuple[str, str]) -> bool:
        try:
            self._must_write(self._new_path(pair[1]))
            return self._path(pair[0]) != "" and self._moves()
        except StorageError:
            return False

    def _error_of_rename(self, pair: tuple[str, str]) -> StorageError | None:
        try:
            self.rename(*pair)
        except StorageError as error:
            return error
        return None

    def _move_together(
        self, source: str, target: str, names: Sequence[str], pool: ThreadPoolExecutor
    ) -> list[str]:
        """The names of files that were moved from one folder to the other, where there was nothing
        of such a name. Of those left out nothing is known."""
        with ExitStack() as held:
            for n in sorted({hash(_below(target, name)) % _LOCKS for name in names}):
                held.enter_context(self._locks[n])
            free = self._free(target, names, pool)
            if not free:
                return []
            try:
                with self._asking(source) as running:
                    old, new = self._fs(running, source), self._fs(running, target)
                    whole = move_listed(running, old, new, free, self.concurrency)
            except StorageError:
                whole = False  # nobody knows
            if whole:
                there = set(self._still_in(source, free))
                return [name for name in free if name not in there]
            ends = pool.map(lambda name: self._has_moved(source, target, name), free)
            return [name for name, moved in zip(free, ends, strict=True) if moved]

    def _free(self, folder: str, names: Sequence[str], pool: ThreadPoolExecutor) -> list[str]:
        """Of names below ``folder``, those that nothing has: a listing may be partial, so
        each is asked for, but in a folder that is not there."""
        free: list[str] = []
        for below, group in groupby(names, posixpath.dirname):
            some = list(group)
            if not self._is_missing(_below(folder, below)):
                kinds = pool.map(lambda name: self._quick_kind(_below(folder, name)), some)
                some = [name for name, kind in zip(some, kinds, strict=True) if kind is None]
            free += some
        return free

    def _is_missing(self, folder: str) -> bool:
        """Whether a folder is not there. One that is, is not asked for again: that it might be
        there costs time only."""
        if not folder or folder in self._folders:
            return False
        # the first question is the cheaper one where the folder is there, and many lie in it
        with self._asking(folder) as running:
            status = running.look(self._fs(running), folder)
        if status == 404 and self._list(folder) is None:
            return True
        if len(self._folders) >= _MOST_FOLDERS:
            self._folders.clear()
        self._folders.add(folder)
        return False

    def _still_in(self, folder: str, names: Sequence[str]) -> Iterator[str]:
        """Those of the names below ``folder`` that it still has."""
        for below, group in groupby(names, posixpath.dirname):
            listed = {entry.path for entry in self._list(_below(folder, below)) or ()}
            yield from (name for name in group if f"{folder}/{name}" in listed)

    def _has_moved(self, source: str, target: str, name: str) -> bool:
        """After a move of which only the beginning is known, and before which nothing was there."""
        if self._quick_kind(f"{source}/{name}") is not None:
            return False
        return self._quick_kind(_below(target, name)) == "file"

    def take_many(
        self,
        source: Storage,
        paths: Sequence[str],
        folder: str,
        stop: threading.Event,
        progress: Callable[[int], None] | None,
    ) -> dict[str, str]:
        """Copy files of ``source`` to their paths below ``folder``, and read them back.

        Returns the sha256 of what lies there by path of ``source``; what is left out was not
        copied, or could not be read, and is the caller's to try alone.

        Raises
        ------
        StorageUnavailableError, StorageFullError, AccessDeniedError
        """
        self._must_write(folder)
        if not isinstance(source, PosixStorage) or not paths:
            return {}
        with self._asking(folder, "the copies went while they were looked at") as running:
            local = f"{running.remote('local', {})}:{source.root}"
            target = self._fs(running, folder)
            failure = copy_listed(running, local, target, paths, self.concurrency, stop, progress)
            # one file's trouble is that file's: it is missing from the digests
            if failure is not None and (_FULL.search(str(failure)) or stop.is_set()):
                raise failure
            return {} if stop.is_set() else hashes(running, target, self.concurrency)


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _hash_of(running: Daemon, fs: str, path: str) -> str:
    parameters = {"fs": fs, "remote": path, "hashType": "sha256", "download": True}
    return str(running.call("operations/hashsumfile", parameters)["hash"])


def _unless_locked(call: Callable[[], object]) -> None:
    """Some WebDAV servers lock a folder while they make another in it: then it is asked again."""
    for pause in _LOCKED_PAUSES:
        try:
            call()
            return
        except RcloneError as error:
            if "423" not in str(error):
                raise
        time.sleep(pause)
    call()


def _entry(item: Mapping[str, Any]) -> Entry:
    told = item.get("ModTime") or ""
    mtime = datetime.fromisoformat(told).timestamp() if told else 0.0
    if item["IsDir"]:
        return Entry(item["Path"], 0, mtime, "directory")
    return Entry(item["Path"], max(0, item["Size"]), mtime, "file")
