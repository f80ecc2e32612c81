"""S3 and its kin through obstore (Rust object_store)."""

from __future__ import annotations

import posixpath
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import S3Store

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages.config import read_config
from dlm_core.storages.mark import MARK
from dlm_core.storages.port import PRIVATE, Entry, Readable, ReadStream, Usage
from dlm_core.storages.prefetch import Prefetched
from dlm_core.storages.ranges import Slice
from dlm_core.storages.s3_client import S3Client
from dlm_core.storages.s3_config import S3Config, keys_of, trusting
from dlm_core.storages.s3_parts import Owned, Parts
from dlm_core.storages.s3_versions import Versions

#: objects up to this size are one PUT with If-None-Match; larger ones are uploaded in such parts
PART_SIZE = 8 << 20
# of an upload; S3's limit is 10,000
_MAX_PARTS = 9_000
_MULTIPARTS_AT_ONCE = 4
_BLOCK = 1 << 20
_HEADS_INSTEAD_OF_LIST = 16
_LISTED_FOR_ONE = 20
# general purpose bucket naming rules (S3 user guide); servers of others are laxer
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
# how obstore begins to tell what a key provider raised
_NO_KEYS = "External AWS credential provider: "
# octets (S3 user guide)
_LONGEST_KEY = 1024
# CopyObject's limit (S3 API reference)
_COPY_LIMIT = 5 << 30
# how obstore tells what servers answer that do not know a condition
_UNKNOWN = ("501 Not Implemented", "405 Method Not Allowed")


def open_s3(name: str, root: str, config: Mapping[str, Any]) -> S3Storage:
    """An S3 storage; ``root`` is ``bucket`` or ``bucket/prefix``.

    Without ``access_key`` and ``secret_key`` the credentials come from where AWS's own tools look.
    All are read again while the storage is used, so that they may be rotated.

    Raises
    ------
    InvalidValueError
        if the config has unknown keys (a secret among them), the root is no bucket, or a reference
        leads to nothing.
    """
    parsed = read_config(S3Config, name, config)
    bucket, _, prefix = root.strip("/").partition("/")
    if not _BUCKET.fullmatch(bucket):
        # not shown: it may be a URL with a key in it
        raise InvalidValueError(
            what=f"root of storage {name}", value="(not shown)", expected="bucket or bucket/prefix"
        )
    options: dict[str, Any] = {"region": parsed.region}
    if parsed.endpoint:
        options["endpoint"] = parsed.endpoint
    plain = bool(parsed.endpoint and parsed.endpoint.startswith("http://"))
    options["client_options"] = {
        "allow_http": plain,
        "connect_timeout": "5s",
        # a whole request may take long, its silence may not
        "read_timeout": "120s",
        "timeout": "86400s",
        **({} if plain else trusting(name)),
    }
    keys = keys_of(name, parsed)
    build = partial(
        S3Store,
        bucket,
        virtual_hosted_style_request=not parsed.path_style,
        checksum_algorithm="crc64nvme",
        copy_if_not_exists="header: If-None-Match: *",
        retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)},
        credential_provider=keys,
        **options,
    )
    client = S3Client(name, root, parsed, keys)
    storage = S3Storage(
        name,
        build(prefix=prefix or None),
        Parts(client, parsed.storage_class),
        Versions(client),
        storage_class=parsed.storage_class,
    )
    if parsed.storage_class is None:  # a copy by the server has the bucket's own class
        # who says the same of these reaches the same server with the same rights
        whole = cache(lambda: build(prefix=None))
        place = bucket, f"{prefix}/" if prefix else ""
        storage.within = Within(parsed.model_dump_json(), *place, whole)
    return storage


@dataclass(frozen=True, slots=True)
class Within:
    """Where in which bucket a storage lies, and how to reach all of it."""

    server: str
    bucket: str
    prefix: str
    whole: Callable[[], S3Store]


class S3Storage:
    """A bucket, or a prefix of one; see :class:`dlm_core.storages.port.Storage`.

    An object becomes visible whole or not at all: up to ``PART_SIZE`` bytes by one PUT with a
    CRC-64/NVME, above in parts with their MD5s, which the server checks. Both are created with
    If-None-Match, and so is what the server copies, in a rename too; one that says that it does not
    know this of parts or of copies is asked without, and the key is looked at just before. Names
    that not every server keeps as they are (no UTF-8, control characters, backslashes) are refused.

    Where the bucket keeps versions, what is removed or renamed goes with all of its versions.
    """

    atomic_write = True
    exclusive = "file"
    tells_content = True
    within: Within | None = None

    def __init__(
        self,
        name: str,
        store: S3Store,
        parts: Parts,
        versions: Versions,
        concurrency: int = 32,
        storage_class: str | None = None,
    ) -> None:
        self.name, self.concurrency = name, concurrency
        self._parts, self._versions = parts, versions
        self._attributes: Any = {"Storage-Class": storage_class} if storage_class else None
        self._store = store
        self._longest = _LONGEST_KEY - len(parts.prefix.encode())
        self._large = threading.BoundedSemaphore(_MULTIPARTS_AT_ONCE)
        self._conditional = True

    def _key(self, path: str) -> str:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise self._refused(path, "want relative, without '.', '..' or ''")
        if not path.isprintable() and any(ord(char) < 32 or ord(char) == 127 for char in path):
            raise self._refused(path, "control characters cannot stand in an object's key")
        if "\\" in path:
            # SeaweedFS makes a slash of it
            raise self._refused(path, "a backslash in a key is not kept by every server")
        try:
            octets = len(path.encode("utf-8"))
        except UnicodeEncodeError:
            raise self._refused(path, "an object's key is UTF-8") from None
        if octets > self._longest:
            raise self._refused(path, "an object's key has at most 1024 octets, with the prefix")
        return path

    def _refused(self, path: str, message: str) -> PathRefusedError:
        return PathRefusedError(storage=self.name, path=path, message=message)

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._unavailable(_first_line(error)) from None
            raise PayloadNotFoundError(storage=self.name, path=path) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise PayloadExistsError(storage=self.name, path=path) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            _, lacking, why = _first_line(error).partition(_NO_KEYS)
            if lacking:  # the server was not asked: keys may be on their way
                raise self._unavailable(why.partition(": ")[2] or why) from None
            raise self._denied(path, error) from None
        except exceptions.BaseError as error:
            # object_store tells apart what a listing fails of only in its text
            if "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):
                raise self._denied(path, error) from None
            raise self._unavailable(_first_line(error)) from None

    def _denied(self, path: str, error: BaseException) -> AccessDeniedError:
        return AccessDeniedError(storage=self.name, path=path, message=_first_line(error))

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)

    # --- looking ---------------------------------------------------------------------------------

    def stat(self, path: str) -> Entry | None:
        key = self._key(path)
        try:
            with self._translated(path):
                return _entry(obstore.head(self._store, key))
        except PayloadNotFoundError:
            return self._directory(path)

    def _directory(self, path: str) -> Entry | None:
        found = next(self._below(path), None)
        return None if found is None else Entry(path, 0, 0.0, "directory")

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        wanted = sorted({self._key(path) for path in paths})
        found: dict[str, Entry | None] = {}
        if len(wanted) > _HEADS_INSTEAD_OF_LIST:
            found.update(self._listed(wanted))
        rest = [path for path in wanted if path not in found]
        with ThreadPoolExecutor(self.concurrency, "dlm-head") as pool:
            # what a listing leaves out is asked for by name: it may be partial
            found.update(zip(rest, pool.map(self.stat, rest), strict=True))
        return found

    def _listed(self, wanted: list[str]) -> dict[str, Entry]:
        """Entries of ``wanted`` (sorted) that one bounded listing of their range shows."""
        prefix = posixpath.commonprefix([wanted[0], wanted[-1]])
        folder = prefix.rpartition("/")[0]
        names, found, seen = set(wanted), {}, 0
        # obstore takes no '.' and no '..' for a name: of '.a' that would be left
        offset = wanted[0][:-1].rstrip(".")
        with self._translated(folder):
            listing = obstore.list(
                self._store, prefix=folder or None, offset=offset, chunk_size=1000
            )
            for batch in listing:
                seen += len(batch)
                # an empty one may stand for a folder
                told = (m for m in batch if m["path"] in names and m["size"])
                found.update({m["path"]: _entry(m) for m in told})
                past = bool(batch) and batch[-1]["path"] > wanted[-1]
                if past or len(found) == len(names) or seen > 1000 + len(names) * _LISTED_FOR_ONE:
                    break
        return found

    def walk(self, path: str = "") -> Iterator[Entry]:
        found = False
        for entry in self._below(path):
            found = True
            if path.startswith(PRIVATE) or entry.path.split("/", 1)[0] != PRIVATE:
                yield entry
        if path and not found:
            raise PayloadNotFoundError(storage=self.name, path=path)

    def old_versions(self) -> Iterator[Entry]:
        return self._versions.older()

    def _below(self, path: str) -> Iterator[Entry]:
        prefix = f"{self._key(path)}/" if path else None
        with self._translated(path):
            for batch in obstore.list(self._store, prefix=prefix, chunk_size=1000):
                folders = self._folders([m["path"] for m in batch if not m["size"]])
                yield from (_entry(m) for m in batch if m["size"] or m["path"] not in folders)

    def _folders(self, empty: Sequence[str]) -> set[str]:
        """Of the paths of empty objects those that stand for folders, as consoles make them: their
        names end in a slash, which obstore does not tell."""
        if not empty:
            return set()
        with ThreadPoolExecutor(self.concurrency, "dlm-head") as pool:
            files = pool.map(lambda path: bool(path) and self._is_object(path), empty)
            return {path for path, is_file in zip(empty, files, strict=True) if not is_file}

    def open_read(self, path: str) -> S3Stream:
        return self.open_read_at(path, 0)

    def open_read_at(self, path: str, offset: int) -> S3Stream:
        key = self._key(path)
        options: Any = {"range": {"offset": offset}} if offset else None
        try:
            with self._translated(path):
                return S3Stream(self, path, obstore.get(self._store, key, options=options))
        except PayloadNotFoundError:
            if self._directory(path) is not None:
                raise self._refused(path, "it is a directory, not a file") from None
            raise

    def open_range(self, path: str, offset: int, size: int) -> ReadStream:
        """Up to ``size`` bytes from ``offset`` on, in one ranged GET."""
        if not size:
            return Slice(self.open_read(path), 0)  # S3 has no empty range
        with self._translated(path):
            options: Any = {"range": (offset, offset + size)}
            found = S3Stream(self, path, obstore.get(self._store, self._key(path), options=options))
        return Slice(found, max(0, min(size, found.size - offset)))

    # --- changing --------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        key = self._key(path)
        if size <= PART_SIZE:
            body = b"".join(iter(lambda: source.read(PART_SIZE), b""))
            # whose place it is has to be told at any time
            attributes = None if path == MARK else self._attributes
            with self._translated_making(path):
                return obstore.put(self._store, key, body, mode="create", attributes=attributes)[
                    "e_tag"
                ]
        return self._upload(path, source, size)

    def _must_be_free(self, path: str) -> None:
        if self.stat(path) is not None:
            raise PayloadExistsError(storage=self.name, path=path)

    def write_in_parts(
        self, path: str, source: Readable, size: int, sending: Callable[[int], None]
    ) -> str | None:
        part = self.part_size(size)
        if size <= part:
            sending(size)
            return self.write(path, source, size)
        self._must_be_free(self._key(path))
        with self._large, self._translated_making(path):
            return self._parts.write(path, source, part, sending, lambda: self._must_be_free(path))

    def forget_parts(self, before: float, owned: Owned) -> int:
        return self._parts.forget(before, owned)

    def _upload(self, path: str, source: Readable, size: int) -> str | None:
        """A new object of several parts; the server makes it only if nothing has its name by then,
        which obstore cannot ask for."""
        self._must_be_free(self._key(path))
        with self._large, self._translated_making(path):
            return self._parts.create(
                path, source, self.part_size(size), lambda: self._must_be_free(path)
            )

    def copy_from(
        self, source: Any, source_path: str, path: str, size: int, moved: Callable[[int], None]
    ) -> bool:
        """By a server that has both, and takes the same keys for both. Within a bucket it is one
        CopyObject; from another one, and above 5 GiB, it is in parts."""
        here, there = self.within, getattr(source, "within", None)
        if here is None or not isinstance(there, Within) or here.server != there.server:
            return False
        self._must_be_free(path)
        keys = there.prefix + source._key(source_path), here.prefix + self._key(path)
        free = partial(self._must_be_free, path)
        try:
            if here.bucket == there.bucket and size <= _COPY_LIMIT:
                with self._translated(path):
                    self._create(here.whole(), *keys, path)
                moved(size)
            else:
                self._parts.copy(there.bucket, keys[0], path, size, moved, free)
        except (PayloadNotFoundError, AccessDeniedError):
            return False  # of the source: reading it tells so
        return True

    @contextmanager
    def _translated_making(self, path: str) -> Iterator[None]:
        """As _translated where something is made, which cannot be "not found"."""
        try:
            with self._translated(path):
                yield
        except PayloadNotFoundError as error:
            if error.details.get("storage") != self.name or error.details.get("path") != path:
                raise  # said of the source, whose stream is read here
            raise self._unavailable("the bucket is not there") from None

    @staticmethod
    def part_size(size: int) -> int:
        """Bytes in each part but the last of an object of ``size`` bytes; at most PART_SIZE bytes
        are one part."""
        least = -(-size // _MAX_PARTS)
        return max(PART_SIZE, -(-least // _BLOCK) * _BLOCK)

    def flush(self) -> None:
        """Nothing to do: S3 answers a PUT once the object is durable."""

    def rename(self, source: str, destination: str) -> None:
        """Copy, check, delete."""
        entry = self.stat(source)
        if entry is None:
            raise PayloadNotFoundError(storage=self.name, path=source)
        if entry.kind == "file":
            if self.stat(destination) is not None:
                raise PayloadExistsError(storage=self.name, path=destination)
            self._move([entry], source, destination, {})
            return
        if self._is_object(destination):
            # where a file went before, what only begins with its name is not to follow
            raise PayloadExistsError(storage=self.name, path=destination)
        entries = list(self._below(source))
        there = {one.path: one for one in self._below(destination)}
        if there and not _is_half_way(entries, source, there, destination):
            raise PayloadExistsError(storage=self.name, path=destination)
        self._move(entries, source, destination, there)

    def _move(
        self, entries: Sequence[Entry], source: str, destination: str, there: Mapping[str, Entry]
    ) -> None:
        """Copy what is not there yet, look at all of it, and only then delete anything."""
        pairs = {destination + one.path[len(source) :]: one for one in entries}
        missing = [name for name in pairs if name not in there]
        with ThreadPoolExecutor(self.concurrency, "dlm-move") as pool:
            list(pool.map(lambda name: self._copy(pairs[name], name), missing))
        for name, copied in self.stat_many(pairs).items():
            if copied is None or copied.size != pairs[name].size:
                raise self._unavailable(f"{name} is not there whole after a copy")
        # a copy takes its time: what was put there since is not what was copied
        there_now = self.stat_many([one.path for one in entries])
        for one in entries:
            now = there_now[one.path]
            if now is not None and _version(now) != _version(one):
                raise self._unavailable(f"{one.path} changed while it was moved")
        by_path = {one.path: one for one in entries}
        self._delete(source, by_path, moved=by_path)

    def _copy(self, entry: Entry, destination: str) -> None:
        if entry.size > _COPY_LIMIT:
            free = partial(self._must_be_free, destination)
            self._parts.copy_within(entry.path, self._key(destination), entry.size, free)
            return
        with self._translated(entry.path):
            self._create(self._store, entry.path, self._key(destination), destination)

    def _create(self, store: S3Store, source: str, key: str, path: str) -> None:
        """CopyObject to ``key``, which is ``path`` of this storage, if there is nothing.

        Of servers that do not know this condition some say so; the others replace what came there
        after it was looked at. To SeaweedFS what is left of a folder is something too.
        """
        if self._conditional:
            try:
                obstore.copy(store, source, key, overwrite=False)
                return
            except exceptions.AlreadyExistsError as error:
                self._must_be_free(path)
                if "409 Conflict" in str(error):
                    raise self._unavailable(f"something else is being written to {path}") from None
            except exceptions.BaseError as error:
                if not any(answer in str(error) for answer in _UNKNOWN):
                    raise
                self._conditional = False
        obstore.copy(store, source, key)

    def remove(self, path: str) -> None:
        key = self._key(path)
        below = [entry.path for entry in self._below(path)]
        if below and self._is_object(path):
            below = []  # to a file belongs nothing whose name goes on where its own ends
        # in our own folder what a listing does not show is ours too: an earlier try came so far
        self._delete(key, {key, *below}, tree=path.startswith(f"{PRIVATE}/"))

    def remove_file(self, path: str) -> None:
        self._delete(self._key(path), {path})

    def _delete(
        self,
        root: str,
        paths: Collection[str],
        *,
        tree: bool = False,
        moved: Mapping[str, Entry] | None = None,
    ) -> None:
        """Delete objects, of a bucket that keeps versions with all of these: see
        :meth:`Versions.remove`."""
        if self._versions.are_kept():
            self._versions.remove(root, paths, tree=tree, moved=moved)
            return
        with self._translated(root):
            obstore.delete(self._store, list(paths))

    def _is_object(self, path: str) -> bool:
        try:
            with self._translated(path):
                obstore.head(self._store, path)
        except PayloadNotFoundError:
            return False
        return True

    def usage(self) -> Usage | None:
        return None

    def check(self) -> None:
        with self._translated(""):
            for _ in obstore.list(self._store, chunk_size=1):
                break


class S3Stream:
    """A response's body as a file that is read once, front to back."""

    def __init__(self, storage: S3Storage, path: str, result: Any) -> None:
        self._storage, self._path = storage, path
        self.opened: Hashable = result.meta["e_tag"]
        self.size: int = result.meta["size"]
        chunks = result.stream(min_chunk_size=_BLOCK)
        # the next block of a large one comes while this one is used
        self._chunks = Prefetched(chunks) if self.size > PART_SIZE else iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes; all of them if negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_BLOCK), b""))
        if not self._rest:
            with self._storage._translated(self._path):
                self._rest = memoryview(bytes(next(self._chunks, b"")))
        taken = self._rest[:size]
        self._rest = self._rest[size:]
        return bytes(taken)

    def stamp(self) -> Hashable:
        """The ETag: one response is of one state of the object, whatever happens to it then."""
        return self.opened

    def close(self) -> None:
        if isinstance(self._chunks, Prefetched):
            self._chunks.close()
        self._chunks = iter(())

    def __enter__(self) -> S3Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_half_way(
    entries: Sequence[Entry], source: str, there: Mapping[str, Entry], destination: str
) -> bool:
    """Whether ``there`` is what a rename left that was cut off: the one tree is part of the other,
    and what both have is the same."""
    here = {destination + one.path[len(source) :]: one for one in entries}
    both = here.keys() & there.keys()
    return (both == here.keys() or both == there.keys()) and all(
        _is_twin(here[name], there[name]) for name in both
    )


def _is_twin(one: Entry, other: Entry) -> bool:
    # a copy of an object made of parts is of one part, with another ETag
    comparable = "-" not in f"{one.etag}{other.etag}"
    return one.size == other.size and (one.etag == other.etag or not comparable)


def _entry(meta: Mapping[str, Any]) -> Entry:
    etag = meta["e_tag"]
    return Entry(
        meta["path"],
        meta["size"],
        meta["last_modified"].timestamp(),
        "file",
        etag.strip('"') if etag else None,
    )


def _version(entry: Entry) -> tuple[int, str | None, int]:
    """What tells an object from another of the same name; a HEAD knows whole seconds only."""
    return entry.size, entry.etag, int(entry.mtime)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:500]
