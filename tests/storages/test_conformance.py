"""The contract of the storage port, for every adapter and every fake."""

import io
import os

import pytest

from dlm_core.errors import (
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
)

NAMES = [
    "plain.dat",
    "with space.dat",
    "quote'\".dat",
    "percent%20.dat",
    "ünïcödé-星.dat",
    "hash#?&=+.dat",
    "-dash",
    ".dot",
    "a" * 255,
]


def put(storage, path, data=b"payload"):
    return storage.write(path, io.BytesIO(data), len(data))


def get(storage, path):
    with storage.open_read(path) as stream:
        return b"".join(iter(lambda: stream.read(1 << 16), b""))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_read_listed_and_removed(storage, name):
    """What is written under a name is there under exactly that name, and gone when removed."""
    path = f"folder/{name}"
    put(storage, path)
    assert get(storage, path) == b"payload"
    entry = storage.stat(path)
    assert (entry.kind, entry.size, entry.path) == ("file", 7, path)
    assert [found.path for found in storage.walk()] == [path]
    assert storage.stat_many([path])[path].size == 7
    storage.remove(path)
    assert storage.stat(path) is None
    assert list(storage.walk()) == []


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 20 << 20])
def test_bytes_of_every_size_come_back(storage, size):
    """Zero, small, exactly one part, and several parts."""
    data = os.urandom(size)
    put(storage, "big", data)
    assert get(storage, "big") == data
    assert storage.stat("big").size == size


def test_nothing_is_overwritten(storage):
    """A second write to a path fails and leaves what is there; so does a rename."""
    put(storage, "x", b"first")
    with pytest.raises(PayloadExistsError):
        put(storage, "x", b"second")
    put(storage, "y", b"other")
    with pytest.raises(PayloadExistsError):
        storage.rename("y", "x")
    assert get(storage, "x") == b"first" and get(storage, "y") == b"other"


def test_a_large_write_does_not_overwrite(storage):
    """The same for objects that are uploaded in parts."""
    put(storage, "x", b"first")
    with pytest.raises(PayloadExistsError):
        put(storage, "x", bytes(9 << 20))
    assert get(storage, "x") == b"first"


def test_rename_moves_files_and_trees(storage):
    """A file and a tree arrive whole below new parents; the old place is empty."""
    put(storage, "a/file", b"1")
    put(storage, "tree/one", b"2")
    put(storage, "tree/sub/two", b"3")
    storage.rename("a/file", "b/c/file")
    storage.rename("tree", ".dlm/trash/some-uid")
    assert get(storage, "b/c/file") == b"1"
    assert get(storage, ".dlm/trash/some-uid/sub/two") == b"3"
    assert storage.stat("tree") is None
    assert [entry.path for entry in storage.walk()] == ["b/c/file"]
    storage.remove(".dlm/trash/some-uid")
    assert storage.stat(".dlm/trash/some-uid") is None


def test_what_is_not_there_is_said_so(storage):
    """Reading or renaming nothing is an error of its own; removing nothing is fine."""
    with pytest.raises(PayloadNotFoundError):
        get(storage, "nothing")
    with pytest.raises(PayloadNotFoundError):
        storage.rename("nothing", "anywhere")
    storage.remove("nothing")
    assert storage.stat("nothing") is None
    assert storage.stat("nothing/below") is None


def test_a_failing_source_leaves_nothing_visible(storage):
    """An error while reading ends the write with that error and without a file."""

    class Broken(io.RawIOBase):
        def read(self, size=-1):
            raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        storage.write("x", Broken(), 10)
    assert storage.stat("x") is None


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a"])
def test_paths_that_leave_the_root_are_refused(storage, path):
    """Before anything is looked at."""
    with pytest.raises(PathRefusedError):
        storage.stat(path)
    with pytest.raises(PathRefusedError):
        put(storage, path)


def test_many_are_looked_at_together(storage):
    """stat_many tells present and absent paths apart, also among many others."""
    for n in range(40):
        put(storage, f"d/{n:03}", b"x" * n)
    wanted = [f"d/{n:03}" for n in range(0, 60, 2)]
    found = storage.stat_many(wanted)
    assert {path: entry and entry.size for path, entry in found.items()} == {
        f"d/{n:03}": (n if n < 40 else None) for n in range(0, 60, 2)
    }


def test_check_passes_and_own_files_are_hidden(storage):
    """check() is content; what lies below .dlm is never listed as a payload."""
    put(storage, ".dlm/tmp/token")
    storage.check()
    assert list(storage.walk()) == []
    assert [entry.path for entry in storage.walk(".dlm/tmp")] == [".dlm/tmp/token"]


def test_a_directory_is_told_as_one(storage):
    """stat of a folder, or of a prefix with objects below, is a directory."""
    put(storage, "folder/file")
    assert storage.stat("folder").kind == "directory"
    with pytest.raises(StorageError):
        get(storage, "folder")
