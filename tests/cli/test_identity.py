"""A place is one storage, whatever it is called; and a storage stays its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue.engine import begin, run
from dlm_core.errors import StorageUnavailableError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import storage_by_name
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.work import Context, drain
from dlm_core.settings import load_settings
from dlm_core.types import OperationKind
from tests.cli.site import Dlm, Result, refused
from tests.site import ALL
from tests.sshd import SshServer, make_key

MARK = ".dlm/storage-id"


def add(dlm: Dlm, name: str, root: object, *more: str) -> Result:
    return dlm("storage", "add", name, "--location", "there", "--root", str(root), *more)


def by_sftp(server: SshServer) -> list[str]:
    pairs = {"host_keys": server.host_keys, "key": f"env:{server.key_name}"}
    options = [part for key, value in pairs.items() for part in ("--config", f"{key}={value}")]
    return ["--interface", "sftp", *options]


def names(dlm: Dlm) -> list[str]:
    return [one["name"] for one in dlm("storage", "list", "--json").json]


@pytest.mark.parametrize("how", ["link", "sftp"])
@pytest.mark.parametrize("unmanaged", [False, True])
def test_one_place_by_two_names_is_refused(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, sshd: SshServer, how: str, unmanaged: bool
) -> None:
    """Its one copy would count as two, at two locations: neither by a link nor by SFTP, neither to
    write nor only to read."""
    (tmp_path / "link").symlink_to(storages["a"])
    before = (storages["a"] / MARK).read_text()
    more = ["--unmanaged"] if unmanaged else []
    if how == "link":
        result = add(dlm, "again", tmp_path / "link", *more)
    else:
        result = add(dlm, "again", sshd.root(storages["a"]), *by_sftp(sshd), *more)
    assert "'a'" in refused(result, "DLM-103", 2)
    assert names(dlm) == ["a", "b"] and (storages["a"] / MARK).read_text() == before


def test_a_place_that_is_only_read_is_found_too(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """It has no mark of its own; it shows that of the new storage, which is taken away again."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    assert add(dlm, "read", tmp_path / "theirs", "--unmanaged").code == 0
    assert "'read'" in refused(add(dlm, "again", tmp_path / "link"), "DLM-103", 2)
    assert names(dlm) == ["a", "b", "read"] and not (tmp_path / "theirs" / MARK).exists()


def on_tape(command: str, *more: str) -> list[str]:
    """Options of a cold storage; ``command`` tells what is online, if it is named."""
    pairs = ["stage=command", "stage_command=true", *more]
    pairs += [f"online_command={command}"] if command else []
    return [part for pair in pairs for part in ("--config", pair)]


@pytest.mark.parametrize("bundles", [(), ("bundle_bytes=1MiB",)])
@pytest.mark.parametrize("first", ["disk", "tape", "read"])
def test_a_place_on_tape_is_one_storage_too(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, first: str, bundles: tuple[str, ...]
) -> None:
    """Its one copy would count as two: beside the same folder as a disk, or on another tape; in
    whatever order they are added, with or without bundles."""
    (tmp_path / "hsm").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hsm")
    cold = on_tape("", *bundles)
    more = {"disk": [], "tape": cold, "read": [*cold, "--read-only"]}[first]
    assert add(dlm, "one", tmp_path / "hsm", *more).code == 0
    assert (tmp_path / "hsm" / MARK).exists() == (first != "read")
    assert "'one'" in refused(add(dlm, "again", tmp_path / "link", *cold), "DLM-103", 2)
    if first != "disk":
        assert "'one'" in refused(add(dlm, "again", tmp_path / "link"), "DLM-103", 2)
    assert names(dlm) == ["a", "b", "one"]


def test_a_tape_from_before_gets_its_mark(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """As others do; it is its own storage still, and a changed config is taken."""
    for name in ("hsm", "new"):
        (tmp_path / name).mkdir()
    assert add(dlm, "tape", tmp_path / "hsm", *on_tape("")).code == 0
    mark = tmp_path / "hsm" / MARK
    key = mark.read_text()
    mark.unlink()
    assert add(dlm, "new", tmp_path / "new").code == 0
    assert mark.read_text() == key
    assert dlm("storage", "set", "tape", "--config", "mount=/").code == 0


@pytest.mark.parametrize("first", ["disk", "read"])
def test_a_mark_that_is_offline_is_not_recalled(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, first: str
) -> None:
    """Whose place it is cannot be told then: nothing is added there, and what is known goes on.
    Nor is a place added whose mark shows up, unread, where there was none before."""
    (tmp_path / "hsm").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hsm")
    nothing = on_tape("true")
    if first == "disk":
        assert add(dlm, "disk", tmp_path / "hsm").code == 0
        again = add(dlm, "again", tmp_path / "link", *nothing)
        assert MARK in refused(again, "DLM-308", 4)
        (tmp_path / "hsm" / MARK).unlink()
        assert dlm("storage", "drain", "disk").code == dlm("storage", "retire", "disk").code == 0
        assert add(dlm, "tape", tmp_path / "hsm", *nothing).code == 0
        assert dlm("storage", "set", "tape", "--config", "mount=/").code == 0
        (tmp_path / "new").mkdir()
        assert add(dlm, "new", tmp_path / "new").code == 0
    else:
        assert add(dlm, "tape", tmp_path / "hsm", *nothing, "--read-only").code == 0
        assert "'tape'" in refused(add(dlm, "again", tmp_path / "link"), "DLM-103", 2)
        assert not (tmp_path / "hsm" / MARK).exists()


def test_storages_from_before_get_their_marks(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """As soon as another is added; then they are known by them."""
    mark = storages["a"] / MARK
    key = mark.read_text()
    mark.unlink()
    (tmp_path / "link").symlink_to(storages["a"])
    refused(add(dlm, "again", tmp_path / "link"), "DLM-103", 2)
    assert mark.read_text() == key


def test_what_is_not_added_leaves_no_mark(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """A name that is taken, a phase that is none."""
    (tmp_path / "new").mkdir()
    refused(add(dlm, "a", tmp_path / "new"), "DLM-103", 2)
    refused(add(dlm, "new", tmp_path / "new", "--phase", "ICE"), "DLM-101", 2)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_place_of_a_retired_storage_is_free(dlm: Dlm, storages: dict[str, Path]) -> None:
    """So is one whose mark is of a catalogue that was: a new disk, a new beginning."""
    assert dlm("storage", "drain", "b").code == 0
    assert dlm("storage", "retire", "b").code == 0
    assert add(dlm, "b2", storages["b"]).code == 0
    assert (storages["b"] / MARK).read_text() == dlm("storage", "show", "b2", "--json").json[
        "storage_id"
    ]


def test_a_config_changes_if_the_place_stays(
    dlm: Dlm,
    storages: dict[str, Path],
    settle: Callable[[], None],
    tmp_path: Path,
    sshd: SshServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another key, other limits of the adapter; a key that does not fit changes nothing, nor does
    a server that holds something else."""
    (tmp_path / "far").mkdir()
    assert add(dlm, "far", sshd.root(tmp_path / "far"), *by_sftp(sshd)).code == 0
    assert dlm("storage", "set", "b", "--mode", "read_only").code == 0
    (storages["a"] / "x.dat").write_bytes(b"good bytes")
    assert dlm("register", "a", "--scheme", "t").code == 0
    settle()
    monkeypatch.setenv("OTHER_KEY", os.environ[sshd.key_name])

    def change(pair: str) -> Result:
        return dlm("storage", "set", "far", "--config", pair)

    assert change("key=env:OTHER_KEY").code == 0 and change("connections=2").code == 0
    config = dlm("storage", "show", "far", "--json").json["config"]
    assert (config["key"], config["connections"]) == ("env:OTHER_KEY", "2")
    make_key(tmp_path / "stranger")
    kind, key = (tmp_path / "stranger.pub").read_text().split()[:2]
    refused(change(f"host_keys=[127.0.0.1]:{sshd.port} {kind} {key}"), "DLM-301", 4)
    refused(change("colour=red"), "DLM-101", 2)
    (tmp_path / "far").rename(tmp_path / "old")
    (tmp_path / "far").mkdir()
    assert (tmp_path / "old" / "t" / "x.dat").exists()
    assert "t/x.dat is not there" in refused(change("connections=3"), "DLM-101", 2)
    assert dlm("storage", "show", "far", "--json").json["config"] == config


def test_a_storage_with_bundles_keeps_them(dlm: Dlm, tmp_path: Path) -> None:
    """Their size may change; without any, nobody would find what was packed."""
    assert dlm("location", "add", "there").code == 0
    (tmp_path / "p").mkdir()
    assert add(dlm, "p", tmp_path / "p", "--config", "bundle_bytes=1MiB").code == 0
    assert dlm("storage", "set", "p", "--config", "bundle_bytes=2MiB").code == 0
    refused(dlm("storage", "set", "p", "--config", "bundle_bytes="), "DLM-101", 2)


def test_a_config_does_not_lead_to_another_storages_place(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], tmp_path: Path
) -> None:
    """Even if copies of the same names and sizes lie there, and it has no mark yet: one copy would
    count as two."""
    (tmp_path / "one").mkdir()
    alias = ["--interface", "rclone", "--config", "type=alias"]
    added = add(dlm, "r", ".", *alias, "--config", f"remote={tmp_path / 'one'}")
    assert added.code == 0, added.error
    (storages["a"] / "x.dat").write_bytes(b"good bytes")
    for root in (storages["b"], tmp_path / "one"):
        (root / "t").mkdir()
        (root / "t" / "x.dat").write_bytes(b"good bytes")
    (storages["b"] / MARK).unlink()
    change = dlm("storage", "set", "r", "--config", f"remote={storages['b']}")
    assert "'b'" in refused(change, "DLM-103", 2)
    config = dlm("storage", "show", "r", "--json").json["config"]
    assert config["remote"] == str(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = dlm("storage", "set", "r", "--config", f"remote={tmp_path / 'moved'}")
    assert moved.code == 0, moved.error


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("copy_linksss=true", "copy_links"),
        ("secret_descripton=env:HOME", "secret_description"),
        ("override.chekers=3", "override.checkers"),
        ("pacer_min_sleep=0s", "rclone help backend local"),
        ("checkers=3", "override.checkers"),
    ],
)
def test_an_option_that_rclone_would_ignore_is_refused(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, option: str, near: str
) -> None:
    """When a storage is added and when it is changed; what is near is named. What the backend has,
    and rclone's own for a backend, is taken."""
    (tmp_path / "new").mkdir()
    more = ("--interface", "rclone", "--config", "type=local")
    name = option.partition("=")[0]
    line = refused(add(dlm, "new", tmp_path / "new", *more, "--config", option), "DLM-101", 2)
    assert f"'{name}'" in line and near in line
    good = ("copy_links=true", "override.checkers=3")
    options = [word for one in good for word in ("--config", one)]
    added = add(dlm, "new", tmp_path / "new", *more, *options)
    assert added.code == 0, added.error
    line = refused(dlm("storage", "set", "new", "--config", option), "DLM-101", 2)
    assert f"'{name}'" in line and near in line
    assert dlm("storage", "set", "new", "--config", "copy_links=").code == 0


def test_the_place_of_a_lost_storage_is_taken(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """It may come back."""
    assert dlm("storage", "lost", "b", "--reason", "flood").code == 0
    (tmp_path / "link").symlink_to(storages["b"])
    assert "'b'" in refused(add(dlm, "again", tmp_path / "link"), "DLM-103", 2)


def test_a_mount_is_looked_at_before_it_is_kept(dlm: Dlm, storages: dict[str, Path]) -> None:
    """A mistyped one would make the storage one that cannot be reached."""
    refused(dlm("storage", "set", "a", "--config", "mount=/nope"), "DLM-301", 4)
    assert "mount" not in dlm("storage", "show", "a", "--json").json["config"]
    assert dlm("storage", "set", "a", "--config", "mount=/").code == 0
    assert dlm("storage", "set", "a", "--config", "mount=").code == 0
    assert "mount" not in dlm("storage", "show", "a", "--json").json["config"]


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside), other.rename(one), aside.rename(other)


@pytest.mark.parametrize("medium", ["disk", "tape"])
def test_a_disk_that_is_mounted_where_another_belongs_is_an_outage(
    dlm: Dlm, storages: dict[str, Path], engine: Engine, medium: str
) -> None:
    """Two that were swapped would have all copies missing, and made again: nothing is looked for
    there, and the work goes on when they are back in their places. So it is in front of a tape, if
    the key is online."""
    work = partial(work_anew, engine)
    if medium == "tape":
        for name in storages:
            assert dlm("storage", "set", name, *on_tape("")).code == 0
    (storages["a"] / "x").write_bytes(b"payload")
    assert dlm("register", "a", "--target-phase", "SOLID").code == 0
    work()
    before = dlm("status", "--json").json["replicas"]
    swap(storages["a"], storages["b"])
    assert dlm("verify", "--storage", "a").code == 0
    work()
    assert dlm("status", "--json").json["replicas"] == before
    assert "DLM-301" in dlm("item", "why", "file:x").out
    told = [line for line in dlm("doctor").out.splitlines() if "storage " in line]
    assert len(told) == 2 and all("key of another storage" in line for line in told)
    swap(storages["a"], storages["b"])
    with begin(engine, "test") as connection:
        run(connection, "UPDATE operation SET due_at = now() WHERE state = 'QUEUED'")
    work()
    verified = dlm("status", "--json").json["operations"]["verify"]
    assert verified == {"DONE": 1}
    assert dlm("status", "--json").json["replicas"] == before


def test_a_storage_is_not_used_before_its_key_was_looked_at(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, engine: Engine
) -> None:
    """Of a worker that begins while a disk is away, and another comes in its place: nothing is
    looked for there either."""
    (storages["a"] / "x").write_bytes(b"payload")
    context = Context(engine, load_settings(), "user:test")
    row = storage_by_name(context, "a")
    storages["a"].rename(tmp_path / "away")
    with pytest.raises(StorageUnavailableError):
        context.storages.open(row).check()
    storages["b"].rename(storages["a"])
    with pytest.raises(StorageUnavailableError):
        context.storages.open(row).stat("x")


def work_anew(engine: Engine) -> None:
    """What the sensors would do, by a worker that has opened nothing yet."""
    context = Context(engine, load_settings(), "user:test")
    drain(context, {OperationKind.ADMIT: execute_admit, **ALL}, plan_replication)
