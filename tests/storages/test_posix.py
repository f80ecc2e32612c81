"""What a POSIX storage promises beyond the contract of all."""

import errno
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_core.errors import (
    AccessDeniedError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages import kernel, posix
from dlm_core.storages.posix import PosixStorage
from dlm_core.types import make_uri, uri_path
from tests.payloads import get, put


@pytest.fixture(params=["openat2", "realpath"])
def disk(request, tmp_path, monkeypatch):
    """A storage beside a folder that is none of its; with both ways to keep links out."""
    way = kernel.open_by_openat2 if request.param == "openat2" else kernel.open_by_realpath
    if request.param == "openat2" and kernel.open_without_links is not way:
        pytest.skip("this kernel has no openat2")
    monkeypatch.setattr(posix, "open_without_links", way)
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    return PosixStorage("disk", str(tmp_path / "root"))


@pytest.mark.parametrize(
    "name",
    [
        b"new\nline",
        b"tab\tand\rreturn",
        b"not utf-8 \xff\xfe",
        b"back\\slash",
        b"\x01\x7f",
        b"*?[a]",
    ],
)
def test_names_that_only_posix_allows(disk, name):
    """Any octets but NUL and slash make a name that comes back as it was, also through its uri."""
    path = os.fsdecode(b"d/" + name)
    put(disk, path)
    assert os.listdir(os.fsencode(disk.root) + b"/d") == [name]
    assert get(disk, path) == b"payload"
    assert [entry.path for entry in disk.walk()] == [path]
    assert uri_path(make_uri("ska", path)) == path
    disk.rename(path, path + "2")
    disk.remove(path + "2")
    assert list(disk.walk()) == []


_SEGMENT = st.binary(min_size=1, max_size=255).filter(
    lambda b: b not in (b".", b"..") and b"/" not in b and b"\0" not in b
)


@given(st.lists(_SEGMENT, min_size=1, max_size=4))
def test_every_path_has_one_uri(segments):
    """Percent-encoding is ASCII and takes nothing away, whatever octets a name has."""
    path = os.fsdecode(b"/".join(segments))
    uri = make_uri("ska", path)
    assert uri.isascii() and uri_path(uri) == path
    assert make_uri("ska", b"/".join(segments)) == uri


def test_links_out_of_the_root_are_not_followed(disk, tmp_path):
    """Not as a file, not as a folder on the way, by no call; outside nothing changes."""
    os.symlink(tmp_path / "outside/secret", f"{disk.root}/file")
    os.symlink(tmp_path / "outside", f"{disk.root}/folder")
    put(disk, "mine")
    assert disk.stat("file").kind == "symlink" and disk.stat("folder").kind == "symlink"
    assert [(e.path, e.kind) for e in disk.walk()] == [
        ("file", "symlink"), ("folder", "symlink"), ("mine", "file"),
    ]  # fmt: skip
    for call in (
        lambda: disk.open_read("file"),
        lambda: disk.open_read("folder/secret"),
        lambda: disk.stat("folder/secret"),
        lambda: list(disk.walk("folder")),
        lambda: put(disk, "folder/new"),
        lambda: put(disk, "folder/sub/new"),
        lambda: disk.rename("mine", "folder/mine"),
        lambda: disk.rename("folder/secret", "taken"),
        lambda: disk.remove("folder/secret"),
    ):
        with pytest.raises(PathRefusedError):
            call()
    assert os.listdir(tmp_path / "outside") == ["secret"]
    disk.remove("folder")
    assert (tmp_path / "outside/secret").read_bytes() == b"secret"


def test_links_inside_the_root_are_not_followed_either(disk):
    """One payload would have two names."""
    put(disk, "real/file")
    os.symlink("real", f"{disk.root}/alias")
    with pytest.raises(PathRefusedError):
        get(disk, "alias/file")


def test_a_folder_that_becomes_a_link_is_not_followed(disk, tmp_path):
    """Although the path was good a moment ago."""
    put(disk, "folder/secret", b"mine")
    assert get(disk, "folder/secret") == b"mine"
    os.rename(f"{disk.root}/folder", tmp_path / "moved")
    os.symlink(tmp_path / "moved", f"{disk.root}/folder")
    with pytest.raises(PathRefusedError):
        get(disk, "folder/secret")
    with pytest.raises(PathRefusedError):
        disk.stat("folder/secret")


def test_removing_a_tree_keeps_to_the_tree(disk, tmp_path):
    """Links in it go, what they point to stays."""
    put(disk, "tree/sub/file")
    os.symlink(tmp_path / "outside", f"{disk.root}/tree/link")
    disk.remove("tree")
    assert disk.stat("tree") is None
    assert (tmp_path / "outside/secret").exists()


def test_a_root_that_is_gone_is_an_outage(disk, tmp_path):
    """Never "nothing there"."""
    put(disk, "a/file")
    os.rename(disk.root, tmp_path / "away")
    for call in (
        lambda: disk.stat("a/file"),
        lambda: disk.stat("nothing"),
        lambda: disk.stat_many(["a/file", "b"]),
        lambda: list(disk.walk()),
        lambda: list(disk.walk("a")),
        lambda: disk.open_read("a/file"),
        lambda: put(disk, "b/new"),
        lambda: disk.rename("a/file", "b"),
        lambda: disk.remove("a/file"),
        disk.flush,
        disk.usage,
        disk.check,
    ):
        with pytest.raises(StorageUnavailableError):
            call()
    assert not os.path.exists(disk.root)
    os.rename(tmp_path / "away", disk.root)
    assert get(disk, "a/file") == b"payload"


def test_an_empty_mount_point_is_an_outage(tmp_path):
    """Where the config names one, the folder below a disk that went is not believed."""
    bare = PosixStorage("disk", str(tmp_path), mount=str(tmp_path))
    for call in (
        lambda: bare.stat("a"),
        lambda: list(bare.walk()),
        lambda: put(bare, "a/b"),
        lambda: bare.remove("a"),
        bare.check,
        bare.usage,
    ):
        with pytest.raises(StorageUnavailableError, match="nothing is mounted"):
            call()
    assert os.listdir(tmp_path) == []
    PosixStorage("system", "/proc", mount="/proc").check()


def test_what_is_no_file_is_not_read(disk):
    """A fifo does not block, a directory is no payload file."""
    os.mkfifo(f"{disk.root}/fifo")
    os.mkdir(f"{disk.root}/folder")
    assert disk.stat("fifo").kind == "other"
    for path in ("fifo", "folder"):
        with pytest.raises(PathRefusedError):
            disk.open_read(path)


def test_a_file_in_the_way_of_a_folder(disk):
    """Is said of the destination; "not found" is said of nothing but a source."""
    put(disk, "file")
    put(disk, "other")
    with pytest.raises(PathRefusedError):
        put(disk, "file/below")
    with pytest.raises(PathRefusedError):
        put(disk, "file/far/below")
    with pytest.raises(PathRefusedError):
        disk.rename("other", "file/below")
    with pytest.raises(PayloadNotFoundError):
        disk.rename("file/below", "new")
    assert disk.stat("file/below") is None
    disk.remove("file/below")
    assert get(disk, "other") == b"payload"


def test_too_long_names_are_refused(disk):
    """256 octets in a part are one too many for the file system."""
    with pytest.raises(PathRefusedError):
        put(disk, "a" * 256)
    put(disk, "ü" * 127)


def test_renaming_never_replaces_an_empty_folder(disk):
    """Plain rename(2) would."""
    put(disk, "tree/file")
    os.mkdir(f"{disk.root}/there")
    with pytest.raises(PayloadExistsError):
        disk.rename("tree", "there")
    assert get(disk, "tree/file") == b"payload"


@pytest.mark.parametrize("kind", ["file", "tree"])
def test_renaming_where_the_kernel_lacks_noreplace(disk, monkeypatch, kind):
    """Link and unlink, or mkdir and rename, do the same."""
    monkeypatch.setattr(kernel, "_libc", object())
    put(disk, "tree/file")
    source, target = ("tree/file", "new/file") if kind == "file" else ("tree", "new")
    disk.rename(source, target)
    assert get(disk, "new/file") == b"payload" and disk.stat(source) is None
    put(disk, "tree/file", b"again")
    with pytest.raises(PayloadExistsError):
        disk.rename(source, target)
    assert get(disk, "new/file") == b"payload" and get(disk, "tree/file") == b"again"


def test_deep_trees_are_walked(disk):
    """Hundreds of levels."""
    path = "/".join(["d"] * 300) + "/file"
    put(disk, path)
    put(disk, "z")
    assert [entry.path for entry in disk.walk()] == [path, "z"]
    disk.remove("d")
    assert [entry.path for entry in disk.walk()] == ["z"]


def test_files_that_vanish_while_walking_are_left_out(disk):
    """They are not there; the rest is told, and a vanished root still is an outage."""
    for name in ("a", "b/1", "c"):
        put(disk, name)
    walk = disk.walk()
    assert next(walk).path == "a"
    disk.remove("b")
    assert [entry.path for entry in walk] == ["c"]
    with pytest.raises(PayloadNotFoundError):
        list(disk.walk("b"))


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EACCES, AccessDeniedError),
        (errno.EROFS, AccessDeniedError),
        (errno.EIO, StorageUnavailableError),
        (errno.ESTALE, StorageUnavailableError),
        (errno.ENOTCONN, StorageUnavailableError),
        (errno.ENAMETOOLONG, PathRefusedError),
    ],
)
@pytest.mark.parametrize("call", ["write", "close"])
def test_faults_while_writing(disk, monkeypatch, number, error, call):
    """Each errno has its error, also when only close(2) tells; nothing stays."""
    real = getattr(os, call)

    def failing(descriptor, *rest):
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("/new"):
            return real(descriptor, *rest)
        if call == "close":
            real(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(posix.os, call, failing)
    with pytest.raises(error):
        put(disk, "new")
    monkeypatch.undo()
    assert list(disk.walk()) == []


def test_a_full_disk(tmp_path):
    """A real small file system: the write that does not fit fails and frees what it took."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        disk = PosixStorage("small", str(root), mount=str(root))
        put(disk, "fits", bytes(600_000))
        with pytest.raises(StorageFullError):
            put(disk, "more", bytes(600_000))
        assert [entry.path for entry in disk.walk()] == ["fits"]
        usage = disk.usage()
        assert usage.total == 1 << 20 and 600_000 <= usage.used < 700_000
        put(disk, "still fits", bytes(300_000))
    finally:
        subprocess.run(["umount", str(root)], check=True)
    with pytest.raises(StorageUnavailableError):
        disk.stat("fits")


def test_a_stream_notices_change(disk):
    """Grown, rewritten in place, replaced or removed, also if it has another name still: its stamp
    is another."""
    for change in ("grow", "touch", "replace", "remove", "replace one", "remove one"):
        put(disk, change)
        full = f"{disk.root}/{change}"
        if change.endswith(" one"):
            os.link(full, f"{disk.root}/also {change}")
        with disk.open_read(change) as stream:
            assert stream.stamp() == stream.opened and stream.size == 7
            if change == "grow":
                with open(full, "ab") as file:
                    file.write(b"!")
            elif change == "touch":
                os.utime(full, ns=(1, 1))
            elif change.startswith("replace"):
                put(disk, "new")
                os.replace(f"{disk.root}/new", full)
            else:
                os.unlink(full)
            assert stream.stamp() != stream.opened


def test_a_refused_name_among_many_is_no_others_error(disk):
    """Of renames done together each is told as it ended, whatever the others are; one that is told
    twice is done once."""
    for name in "123":
        put(disk, f"t/{name}")
    pairs = [("t/1", "d/1"), ("t/2", "d/.."), ("t/3", "d/3"), ("t/1", "d/1")]
    errors = disk.rename_many(pairs)
    kinds = [error and type(error) for error in errors]
    assert kinds == [None, PathRefusedError, None, PayloadNotFoundError]
    assert {entry.path for entry in disk.walk()} == {"d/1", "t/2", "d/3"}
