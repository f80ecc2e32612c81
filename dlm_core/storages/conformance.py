"""The contract of the storage port as checks that run against any storage, also a site's own.

A check takes a storage and a folder of its own on it, and raises ``NonconformingError`` where the
contract of :mod:`dlm_core.storages.port` is not kept. Its docstring says what has to hold.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from dlm_core.errors import (
    DlmError,
    NonconformingError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
)
from dlm_core.storages.port import PRIVATE, Storage

Check = Callable[[Storage, str], None]

_NAMES = (
    "plain.dat",
    "with space.dat",
    "quote'\".dat",
    "percent%20.dat",
    "ünïcödé-星.dat",
    "hash#&=+.dat",
    "-dash",
    ".dot",
    "a" * 254,
)
_DOUBTFUL = ("a" * 255, "question?.dat", "semi;colon.dat", "back\\slash.dat", "new\nline.dat")
#: pairs of which some file systems make one; of the last the second is written with two characters
_ALIKE = (("case.dat", "CASE.dat"), ("Folder/x", "folder/x"), ("\u00fc.dat", "u\u0308.dat"))
# none, little, and around the 8 MiB at which an object store begins to write in parts
_SIZES = (0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 20 << 20)
#: entries of the whole storage that are looked at for what should be hidden
_LOOKED_AT = 1000


def put(storage: Storage, path: str, data: bytes = b"payload") -> str | None:
    """Write ``data`` to a new file; the etag if the storage has one."""
    return storage.write(path, io.BytesIO(data), len(data))


def get(storage: Storage, path: str) -> bytes:
    """All bytes of a file."""
    with storage.open_read(path) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def any_name_is_written_read_listed_and_removed(storage: Storage, folder: str) -> None:
    """What is written under a name is there under exactly that name, and gone when removed."""
    for name in _NAMES:
        path = f"{folder}/names/{name}"
        put(storage, path)
        want(storage, get(storage, path) == b"payload", f"{name!r} reads back differently")
        entry = storage.stat(path)
        told = entry and (entry.kind, entry.size, entry.path)
        want(storage, told == ("file", 7, path), f"stat of {name!r} tells {entry}")
        listed = [found.path for found in storage.walk(f"{folder}/names")]
        want(storage, listed == [path], f"{name!r} is listed as {listed}")
        many = storage.stat_many([path])[path]
        want(storage, many is not None and many.size == 7, f"stat_many of {name!r} tells {many}")
        storage.remove(path)
        want(storage, storage.stat(path) is None, f"{name!r} is there after its removal")


def a_doubtful_name_is_kept_or_refused(storage: Storage, folder: str) -> None:
    """A name that the storage cannot keep as it is ends in PathRefusedError, never elsewhere."""
    for name in _DOUBTFUL:
        path = f"{folder}/doubtful/{name}"
        try:
            put(storage, path)
        except PathRefusedError:
            continue
        found = [entry.path for entry in storage.walk(f"{folder}/doubtful")]
        want(storage, found == [path], f"{name!r} is listed as {found}")
        want(storage, get(storage, path) == b"payload", f"{name!r} reads back differently")
        storage.remove(path)


def names_that_differ_are_names_of_two_files(storage: Storage, folder: str) -> None:
    """Also those that differ only in case, or in the form of a letter: two items would be one
    file, and the deletion of one that of the other."""
    for one, other in _ALIKE:
        first, second = f"{folder}/{one}", f"{folder}/{other}"
        put(storage, first, one.encode())
        try:
            put(storage, second, other.encode())
        except PayloadExistsError:
            want(storage, False, f"{one!r} and {other!r} are one name to it")
        found = get(storage, first), get(storage, second)
        want(storage, found == (one.encode(), other.encode()), f"{one!r} and {other!r} are one")
        storage.remove(second)
        want(storage, storage.stat(first) is not None, f"{one!r} went with {other!r}")


def bytes_of_every_size_come_back(storage: Storage, folder: str) -> None:
    """Zero, small, exactly one part of 8 MiB, and several parts."""
    for size in _SIZES:
        data, path = os.urandom(size), f"{folder}/{size}"
        put(storage, path, data)
        storage.flush()
        want(storage, get(storage, path) == data, f"{size} bytes read back differently")
        entry = storage.stat(path)
        told = entry.size if entry else None
        want(storage, told == size, f"stat tells {told} bytes of {size}")
        storage.remove(path)


def nothing_is_overwritten(storage: Storage, folder: str) -> None:
    """A second write to a path fails and leaves what is there; so does a rename."""
    first, second = f"{folder}/x", f"{folder}/y"
    put(storage, first, b"first")
    refuses(storage, lambda: put(storage, first, b"second"), PayloadExistsError, "a second write")
    put(storage, second, b"other")
    refuses(
        storage, lambda: storage.rename(second, first), PayloadExistsError, "a rename over a file"
    )
    kept = (get(storage, first), get(storage, second))
    want(storage, kept == (b"first", b"other"), f"what was there is now {kept}")


def a_large_write_does_not_overwrite(storage: Storage, folder: str) -> None:
    """The same for what is uploaded in parts."""
    path = f"{folder}/x"
    put(storage, path, b"first")
    refuses(storage, lambda: put(storage, path, bytes(9 << 20)), PayloadExistsError, "the write")
    want(storage, get(storage, path) == b"first", "what was there has changed")


def one_of_several_writers_wins(storage: Storage, folder: str) -> None:
    """Of four that write one path at once, one does, and its bytes are there whole."""
    path = f"{folder}/x"

    def write(n: int) -> bytes | None:
        data = bytes([n]) * 100_000
        try:
            put(storage, path, data)
        except PayloadExistsError:
            return None
        return data

    with ThreadPoolExecutor(4) as pool:
        won = [data for data in pool.map(write, range(4)) if data is not None]
    want(storage, len(won) == 1, f"{len(won)} of 4 writers were told that they had written")
    want(storage, get(storage, path) == won[0], "the bytes are not those of the one that won")


def rename_moves_files_and_trees(storage: Storage, folder: str) -> None:
    """A file and a tree arrive whole below new parents; the old place is empty."""
    put(storage, f"{folder}/a/file", b"1")
    put(storage, f"{folder}/tree/one", b"2")
    put(storage, f"{folder}/tree/sub/two", b"3")
    storage.rename(f"{folder}/a/file", f"{folder}/b/c/file")
    storage.rename(f"{folder}/tree", f"{folder}/trash/some-uid")
    moved = {entry.path[len(folder) + 1 :] for entry in storage.walk(folder)}
    wanted = {"b/c/file", "trash/some-uid/one", "trash/some-uid/sub/two"}
    want(storage, moved == wanted, f"after it there are {sorted(moved)}")
    found = get(storage, f"{folder}/trash/some-uid/sub/two")
    want(storage, found == b"3", "a file of the tree has other bytes")
    want(storage, storage.stat(f"{folder}/tree") is None, "the old place of the tree is told of")
    storage.remove(f"{folder}/trash/some-uid")
    gone = storage.stat(f"{folder}/trash/some-uid") is None
    want(storage, gone, "the tree is there after its removal")


def many_are_renamed_as_one(storage: Storage, folder: str) -> None:
    """Where a storage renames many at once, each ends as if it were the only one."""
    rename_many = getattr(storage, "rename_many", None)
    if rename_many is None:
        return
    for name in ("a/1", "a/2", "b/3", "taken"):
        put(storage, f"{folder}/{name}", name.encode())
    steps = (("a/1", "x/1"), ("a/none", "x/none"), ("a/2", "taken"), ("b/3", "y/z/3"))
    errors = rename_many([(f"{folder}/{old}", f"{folder}/{new}") for old, new in steps])
    kinds = [error and type(error) for error in errors]
    wanted = [None, PayloadNotFoundError, PayloadExistsError, None]
    want(storage, kinds == wanted, f"the renames ended in {kinds}")
    there = {one.path[len(folder) + 1 :]: get(storage, one.path) for one in storage.walk(folder)}
    kept = {"x/1": b"a/1", "a/2": b"a/2", "taken": b"taken", "y/z/3": b"b/3"}
    want(storage, there == kept, f"after them there are {there}")


def many_are_written_as_one(storage: Storage, folder: str) -> None:
    """Where a storage takes many small files at once, each ends as if it were the only one."""
    write_many = getattr(storage, "write_many", None)
    if write_many is None:
        return
    put(storage, f"{folder}/taken")
    names = ("1", "taken", "sub/2", "empty")
    errors = write_many([(f"{folder}/{n}", b"" if n == "empty" else n.encode()) for n in names])
    kinds = [error and type(error) for error in errors]
    want(storage, kinds == [None, PayloadExistsError, None, None], f"the writes ended in {kinds}")
    there = {one.path[len(folder) + 1 :]: get(storage, one.path) for one in storage.walk(folder)}
    kept = {"1": b"1", "taken": b"payload", "sub/2": b"sub/2", "empty": b""}
    want(storage, there == kept, f"after them there are {there}")


def many_are_read_as_one(storage: Storage, folder: str) -> None:
    """Where a storage gives many small files at once, what is as large as was said comes back as it
    was written, and nothing else is an error."""
    read_many = getattr(storage, "read_many", None)
    if read_many is None:
        return
    data = {f"{folder}/{n}": os.urandom(n) for n in (0, 1, 10_000, 1 << 20)}
    for path, one in data.items():
        put(storage, path, one)
    found = read_many([(path, len(one)) for path, one in data.items()], None)
    want(storage, found == data, "files that were read at once have other bytes")
    read_many([(f"{folder}/1", 1), (f"{folder}/nothing", 1), (f"{folder}/10000", 7)], None)


def what_is_not_there_is_said_so(storage: Storage, folder: str) -> None:
    """Reading or renaming nothing is an error of its own; removing nothing is fine."""
    path = f"{folder}/nothing"
    refuses(storage, lambda: get(storage, path), PayloadNotFoundError, "reading nothing")
    refuses(
        storage,
        lambda: storage.rename(path, f"{folder}/anywhere"),
        PayloadNotFoundError,
        "renaming nothing",
    )
    storage.remove(path)
    want(storage, storage.stat(path) is None, "stat tells of what is not there")
    want(storage, storage.stat(f"{path}/below") is None, "stat tells of what is below nothing")


def a_failing_source_leaves_nothing_visible(storage: Storage, folder: str) -> None:
    """An error while reading ends the write with that error and without a file."""

    class Broken:
        def read(self, size: int = -1, /) -> bytes:
            raise ConnectionResetError("gone")

    path = f"{folder}/x"
    refuses(storage, lambda: storage.write(path, Broken(), 10), ConnectionResetError, "the write")
    want(storage, storage.stat(path) is None, "something is visible after it")


def paths_that_leave_the_root_are_refused(storage: Storage, folder: str) -> None:
    """Before anything is looked at or written."""
    odd = ("", "/etc/passwd", "../x", f"{folder}/../../x", f"{folder}//b", f"{folder}/./a")
    for path in odd:
        refuses(storage, lambda p=path: storage.stat(p), PathRefusedError, f"stat of {path!r}")  # type: ignore[misc]
        refuses(storage, lambda p=path: put(storage, p), PathRefusedError, f"write of {path!r}")  # type: ignore[misc]


def many_are_looked_at_together(storage: Storage, folder: str) -> None:
    """stat_many tells present and absent paths apart, also among many others."""
    for n in range(40):
        put(storage, f"{folder}/{n:03}", b"x" * n)
    wanted = {f"{folder}/{n:03}": (n if n < 40 else None) for n in range(0, 60, 2)}
    found = storage.stat_many(wanted)
    told = {path: entry.size if entry else None for path, entry in found.items()}
    want(storage, told == wanted, "sizes or paths are not those that were written")


def own_files_are_hidden(storage: Storage, folder: str) -> None:
    """What lies below .dlm is never listed as a payload, but when it is asked for."""
    path = f"{PRIVATE}/tmp/{folder.replace('/', '-')}"
    put(storage, path)
    try:
        seen = {entry.path.split("/")[0] for entry in islice(storage.walk(), _LOOKED_AT)}
        want(storage, PRIVATE not in seen, "walk lists files of the DLM's own")
        listed = [entry.path for entry in storage.walk(f"{PRIVATE}/tmp")]
        want(storage, path in listed, "walk does not list what lies in the folder asked for")
    finally:
        storage.remove(path)


def a_directory_is_told_as_one(storage: Storage, folder: str) -> None:
    """stat of a folder, or of a prefix with objects below, is a directory, and not read."""
    put(storage, f"{folder}/inner/file")
    entry = storage.stat(f"{folder}/inner")
    want(storage, entry is not None and entry.kind == "directory", f"stat tells {entry}")
    refuses(storage, lambda: get(storage, f"{folder}/inner"), StorageError, "reading a folder")


def a_file_being_read_tells_its_size_and_stays(storage: Storage, folder: str) -> None:
    """A stream knows its size, and its stamp stays the same while nothing changes."""
    put(storage, f"{folder}/x", b"1234567")
    with storage.open_read(f"{folder}/x") as stream:
        want(storage, stream.size == 7, f"the stream tells {stream.size} bytes of 7")
        first, rest = stream.read(3), stream.read()
        want(storage, (first, rest) == (b"123", b"4567"), "parts read are not those written")
        want(storage, stream.stamp() == stream.opened, "it looks changed though nothing did")


def it_is_well_and_tells_its_capacity(storage: Storage, folder: str) -> None:
    """check() is content; usage, if told at all, is between nothing and the whole."""
    storage.check()
    storage.flush()
    usage = storage.usage()
    sane = usage is None or 0 <= usage.used <= usage.total
    want(storage, sane, f"its usage is told as {usage}")


def a_copy_that_the_storage_makes_itself_is_whole_and_new(storage: Storage, folder: str) -> None:
    """Where there is copy_from: the same bytes, the source untouched, all told on the way; or False
    and nothing left. What is there is not overwritten, and no source is no file."""
    copy_from = getattr(storage, "copy_from", None)
    if copy_from is None:
        return
    source, path, data = f"{folder}/source", f".dlm/tmp/{uuid.uuid4().hex}", os.urandom(3 << 20)
    put(storage, source, data)
    moved: list[int] = []
    try:
        done = copy_from(storage, source, path, len(data), moved.append)
        want(storage, get(storage, source) == data, "the source of a copy was changed")
        if not done:
            want(storage, storage.stat(path) is None, "what was not copied left something")
            return
        want(storage, get(storage, path) == data, "a copy has other bytes")
        want(storage, sum(moved) == len(data), f"{sum(moved)} bytes of {len(data)} were told")
        refuses(
            storage, lambda: copy_from(storage, source, path, len(data), moved.append),
            PayloadExistsError, "a copy to a name that is taken",
        )  # fmt: skip
        want(storage, get(storage, path) == data, "a copy was overwritten")
    finally:
        storage.remove(path)


def an_upload_that_broke_off_is_gone_on_with(storage: Storage, folder: str) -> None:
    """Where there is write_in_parts: nothing is visible of one that broke off, the next one has all
    the bytes, and what is there is not overwritten."""
    write_in_parts = getattr(storage, "write_in_parts", None)
    if write_in_parts is None:
        return
    path, data, sent = f"{folder}/x", os.urandom(20 << 20), list[int]()

    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 17 << 20:
                raise ConnectionResetError("gone")
            return super().read(size)

    def upload(source: io.BytesIO) -> object:
        return write_in_parts(path, source, len(data), sent.append)

    refuses(storage, lambda: upload(Breaking(data)), ConnectionResetError, "the upload")
    want(storage, storage.stat(path) is None, "an upload that broke off is visible")
    upload(io.BytesIO(data))
    want(storage, get(storage, path) == data, "an upload has other bytes")
    refuses(storage, lambda: upload(io.BytesIO(data)), PayloadExistsError, "a second upload")
    want(storage, get(storage, path) == data, "an upload was overwritten")


CHECKS: tuple[Check, ...] = (
    it_is_well_and_tells_its_capacity,
    any_name_is_written_read_listed_and_removed,
    a_doubtful_name_is_kept_or_refused,
    names_that_differ_are_names_of_two_files,
    bytes_of_every_size_come_back,
    nothing_is_overwritten,
    a_large_write_does_not_overwrite,
    one_of_several_writers_wins,
    rename_moves_files_and_trees,
    many_are_renamed_as_one,
    many_are_written_as_one,
    many_are_read_as_one,
    what_is_not_there_is_said_so,
    a_failing_source_leaves_nothing_visible,
    paths_that_leave_the_root_are_refused,
    many_are_looked_at_together,
    own_files_are_hidden,
    a_directory_is_told_as_one,
    a_file_being_read_tells_its_size_and_stays,
    a_copy_that_the_storage_makes_itself_is_whole_and_new,
    an_upload_that_broke_off_is_gone_on_with,
)


def name_of(check: Callable[..., None]) -> str:
    """A check's name as people read it."""
    return getattr(check, "__name__", "check").replace("_", " ")


def run_check(check: Check, storage: Storage, folder: str) -> None:
    """Run one check in a folder of its own below ``folder``, and clear it away.

    Raises
    ------
    NonconformingError, StorageError
        what was not as it should be; the folder is removed in any case, if the storage lets it.
    """
    own = f"{folder}/{getattr(check, '__name__', 'check')}"
    try:
        check(storage, own)
    finally:
        storage.remove(own)


def want(storage: Storage, kept: bool, reason: str) -> None:
    """Raise ``NonconformingError`` with ``reason`` unless ``kept``."""
    if not kept:
        raise NonconformingError(storage=storage.name, message=reason)


def refuses(
    storage: Storage, call: Callable[[], object], error: type[Exception], what: str
) -> None:
    """Check that ``call`` raises ``error``."""
    try:
        call()
    except error:
        return
    except DlmError as other:
        told = f"{what} should end in {error.__name__}, not {type(other).__name__}: {other}"
        raise NonconformingError(storage=storage.name, message=told) from other
    want(storage, False, f"{what} was not refused with {error.__name__}")
