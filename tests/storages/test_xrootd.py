"""What XRootD storages promise beyond the contract of all, against Debian's real server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PathRefusedError,
    PayloadExistsError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.storages.open import open_storage
from tests.payloads import contents, get, put
from tests.xrootd import make_keytab, xrootd_server


@pytest.fixture
def root(xrootd):
    return xrootd.make_root()


@pytest.fixture
def far(xrootd, root):
    return open_storage("far", "xrootd", root, xrootd.config)


@pytest.fixture
def folder(xrootd, root):
    """Where the storage's files lie."""
    return xrootd.folder / root.rpartition("/")[2]


# --- what the operator gives ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "root",
    ["/data", "http://host//data", "root://host/data", "root://host//data/../x", "root://host",
     "root://host//data?x=y", "root://host//a b", "root://host:1234567//data"],
)  # fmt: skip
def test_a_root_of_another_form_is_refused(root):
    """It is told what one looks like."""
    with pytest.raises(InvalidValueError, match="root://host:port//absolute/folder"):
        open_storage("x", "xrootd", root, {})


def test_a_keytab_may_be_a_credential_of_the_service(tmp_path, monkeypatch):
    """As systemd hands it over; the client is told its file."""
    (tmp_path / "sss").write_text("0 u:dlm g:dlm n:dlm N:1 c:1 e:0 k:00\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    storage = open_storage("x", "xrootd", "root://host//data", {"keytab": "credential:sss"})
    assert storage._cgi == f"?xrd.sss={tmp_path}/sss"


@pytest.mark.parametrize(
    "keytab", ["hunter2", "env:HUNTER2", "file:/nowhere/hunter2", "file:/x?hunter2", "file:/x&y=z"]
)
def test_a_keytab_is_a_file_that_is_there(keytab):
    """The client reads it by itself; what is no reference to a file is not shown."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", "xrootd", "root://host//data", {"keytab": keytab})
    assert "\n" not in str(caught.value) and (
        "hunter2" not in str(caught.value) or "/nowhere" in keytab
    )


def in_a_process(root, config, then=""):
    """What a look at the storage ends in, in a process that has shown no keytab yet."""
    code = (
        "import json, sys\n"
        "from dlm_core.errors import DlmError\n"
        "from dlm_core.storages.open import open_storage\n"
        "def look():\n"
        "    try:\n"
        "        open_storage('x', 'xrootd', sys.argv[1], json.loads(sys.argv[2])).check()\n"
        "        print('well')\n"
        "    except DlmError as error:\n"
        "        print(error.code, error)\n"
        "look()\n" + then
    )
    command = [sys.executable, "-c", code, root, json.dumps(config)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def test_who_does_not_prove_himself_is_denied(xrootd, root, tmp_path):
    """Without a keytab, and with a wrong one, of which the error tells nothing."""
    make_keytab(tmp_path / "wrong")
    wrong = {"keytab": f"file:{tmp_path}/wrong"}
    secret = (tmp_path / "wrong").read_text().split("k:")[1].split()[0]
    assert in_a_process(root, xrootd.config) == ["well"]
    for config in ({}, wrong):
        (told,) = in_a_process(root, config)
        assert told.startswith("DLM-306") and secret not in told


# --- outages --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A server that the test may kill."""
    with xrootd_server(tmp_path / "own") as server:
        yield server


def test_a_server_that_is_gone_is_an_outage_until_it_is_back(own):
    """Told at once; nothing is said to be missing, and the same storage goes on when it is back."""
    far = open_storage("far", "xrootd", own.make_root(), own.config)
    put(far, "a/x")
    stream = far.open_read("a/x")
    own.stop(signal.SIGKILL)
    calls = (far.check, lambda: far.stat("a/x"), lambda: list(far.walk()), lambda: put(far, "y"),
             lambda: far.rename("a/x", "z"), lambda: far.remove("a/x"), stream.read)  # fmt: skip
    begun = time.monotonic()
    for call in calls:
        with pytest.raises(StorageUnavailableError):
            call()
    stream.close()
    assert time.monotonic() - begun < 30
    own.start()
    assert contents(far) == {"a/x": b"payload"}


def test_a_root_that_is_gone_is_an_outage(far, folder):
    """Never an empty storage."""
    put(far, "x")
    shutil.rmtree(folder)
    calls = (far.check, lambda: far.stat("x"), lambda: far.stat_many(["x"]), lambda: get(far, "x"),
             lambda: list(far.walk()), lambda: far.rename("x", "y"), lambda: far.remove("x"),
             lambda: put(far, "a/b"), lambda: put(far, "x"))  # fmt: skip
    for call in calls:
        with pytest.raises(StorageUnavailableError, match="root"):
            call()
    assert not folder.exists()


def test_a_server_that_manages_others_is_not_believed(tmp_path):
    """Of one of its servers that is down it says that nothing is there."""
    role = "all.role manager\nall.manager 127.0.0.1:9\n"
    with xrootd_server(tmp_path / "manager", role) as manager:
        far = open_storage("far", "xrootd", manager.make_root(), manager.config)
        for call in (far.check, lambda: list(far.walk())):
            with pytest.raises(StorageUnavailableError, match="namespace=true"):
                call()


def test_a_full_disk_is_told_as_such(own):
    """And no part of a file stays."""
    small = own.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        far = open_storage("far", "xrootd", own.root("small"), own.config)
        with pytest.raises(StorageFullError):
            put(far, "x", bytes(5 << 20))
        assert contents(far) == {}
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_folder_that_is_not_ours_is_denied(far, folder):
    """Neither missing nor an outage."""
    put(far, "a/x")
    (folder / "a").chmod(0)
    calls = (lambda: far.stat("a/x"), lambda: put(far, "a/y"), lambda: list(far.walk("a")))
    for call in calls:
        with pytest.raises(AccessDeniedError):
            call()
    (folder / "a").chmod(0o700)


# --- names and links ------------------------------------------------------------------------------


def test_the_protocol_would_overwrite_and_we_do_not(far, root):
    """XRootD's rename replaces a file; ours looks first."""
    put(far, "x", b"1")
    put(far, "y", b"2")
    with pytest.raises(PayloadExistsError):
        far.rename("y", "x")
    assert contents(far) == {"x": b"1", "y": b"2"}
    status, _ = far._server.mv(far._full("y"), far._full("x"))
    assert status.ok and contents(far) == {"x": b"2"}


def test_what_is_listed_under_another_name_is_no_listing(far, folder):
    """Names that are no UTF-8, and those that the server cuts: raised, never left out."""
    put(far, "a/x")
    odd = os.fsencode(folder) + b"/a/\xff"
    with open(odd, "w"):
        pass
    with pytest.raises(StorageUnavailableError, match="UTF-8"):
        list(far.walk())
    os.unlink(odd)
    (folder / "a" / ("n" * 255)).touch()
    with pytest.raises(StorageUnavailableError, match="cuts the name"):
        list(far.walk())


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 128, "a?b", "a\\b", "a\nb", "\udcff"])
def test_a_name_that_would_not_be_kept_is_refused(far, name):
    """Before anything is written."""
    with pytest.raises(PathRefusedError):
        put(far, f"d/{name}")
    assert far.stat("d") is None


def test_names_that_the_client_takes_for_more_than_names_are_names(far):
    """Lists of places, and archives, are files like others, and folders that are called so."""
    for name in ("x.meta4", "x.metalink", "x.zip", "d.zip/y", "d.meta4/y"):
        put(far, name, b"<metalink/>")
    far.rename("x.meta4", "d.zip/z.meta4")
    names = ["d.meta4/y", "d.zip/y", "d.zip/z.meta4", "x.metalink", "x.zip"]
    assert contents(far) == dict.fromkeys(names, b"<metalink/>")
    far.remove("d.zip")
    assert far.stat("d.zip/y") is None


def test_what_is_denied_is_not_missing_whatever_it_is_called(far, folder):
    """A name may read like the reason why something is not there."""
    put(far, "a/x; not a directory")
    (folder / "a").chmod(0)
    with pytest.raises(AccessDeniedError):
        far.stat("a/x; not a directory")
    (folder / "a").chmod(0o700)


def test_a_link_that_leads_nowhere_keeps_its_folder(far, folder):
    """The server does not list it: that the folder is not gone is told."""
    put(far, "a/x")
    (folder / "a" / "link").symlink_to("/nowhere/at/all")
    assert list(contents(far)) == ["a/x"]
    with pytest.raises(PathRefusedError, match="is left in it"):
        far.remove("a")


def test_nothing_is_removed_through_a_link_to_a_folder(far, folder, tmp_path):
    """A tree with one in it stays, and so does what lies behind it."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_bytes(b"1")
    put(far, "tree/sub/y")
    (folder / "tree" / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(PathRefusedError, match="link"):
        far.remove("tree")
    assert (tmp_path / "precious" / "x").read_bytes() == b"1"


def test_special_files_are_not_read(far, folder):
    """A pipe is listed as something other than a file."""
    os.mkfifo(folder / "pipe")
    assert [entry.kind for entry in far.walk()] == ["other"]
    with pytest.raises(PathRefusedError):
        get(far, "pipe")


def test_a_file_that_another_takes_the_place_of_is_noticed(far, folder):
    """While it is read."""
    put(far, "x")
    with far.open_read("x") as stream:
        assert stream.stamp() == stream.opened
        (folder / "x").unlink()
        assert stream.stamp() != stream.opened
        (folder / "x").write_bytes(b"payload")
        assert stream.stamp() != stream.opened


def test_a_file_where_a_folder_is_wanted_is_told(far):
    """As a refusal, and there is nothing below it."""
    put(far, "x")
    with pytest.raises(PathRefusedError):
        put(far, "x/y")
    assert far.stat("x/y") is None
