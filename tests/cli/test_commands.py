"""The command line on a real catalogue and real files: what it prints, and its exit codes."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_cli.session import parse_duration, parse_size, parse_time
from dlm_core.catalogue import embedded
from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import InvalidValueError
from dlm_core.storages.conformance import CHECKS
from dlm_core.storages.open import open_storage
from tests.cli.site import Dlm, refused
from tests.fakes import Misreading, Tampering
from tests.servers import USER, web_server, wsgidav_server

# --- the process itself ---------------------------------------------------------------------------


_TELL_TIME = "print(time.process_time(), file=sys.stderr)\n"


def _processor_seconds(code: str) -> float:
    """What a program took by its own clock: not the wall's, others run beside it."""
    done = subprocess.run(
        [sys.executable, "-c", code + _TELL_TIME], check=True, capture_output=True, text=True
    )
    return float(done.stderr)


def test_help_comes_fast_and_without_heavy_imports() -> None:
    """--help takes not much more than that of an empty program of typer's, and neither Dagster nor
    SQLAlchemy."""
    begun = "import sys, time; sys.argv = ['dlm', '--help']\n"
    ended = "except SystemExit as end: assert not end.code\n"
    ours = (
        f"{begun}from dlm_cli.main import main\ntry: main()\n{ended}"
        "heavy = {'dagster', 'sqlalchemy', 'psycopg', 'obstore', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    bare = (
        f"{begun}import typer\napp = typer.Typer()\n@app.command()\ndef one() -> None: 'One.'\n"
        f"try: app()\n{ended}"
    )
    # in turns: a machine that is slow for a while is so for both
    pairs = [(_processor_seconds(ours), _processor_seconds(bare)) for _ in range(3)]
    assert min(one for one, _ in pairs) < 3 * min(other for _, other in pairs)


@pytest.mark.parametrize("command", ["status", "item list", "storage list", "audit --since 1d"])
def test_a_look_loads_nothing_that_it_does_not_need(dlm: Dlm, command: str) -> None:
    """A command that only asks the catalogue loads no Dagster, no Alembic and no storage's library;
    each would take longer than the rest of it."""
    code = (
        f"import sys; sys.argv = ['dlm', *{command.split()!r}]\n"
        "from dlm_cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'dagster', 'alembic', 'boto3', 'botocore', 'obstore', 'asyncssh', 'moto'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- locations and storages -----------------------------------------------------------------------


def test_storages_are_listed_and_shown(dlm: Dlm, storages: dict[str, Path]) -> None:
    """Lists as a table and as JSON with the same names; show tells all of one."""
    found = dlm("storage", "list", "--json").json
    assert [row["name"] for row in found] == ["a", "b"]
    assert {"location", "phase", "mode", "used_bytes", "capacity_bytes", "fill_fraction"} <= set(
        found[0]
    )
    assert str(storages["a"]) in dlm("storage", "show", "a").out
    shown = dlm("storage", "show", "a", "--json").json
    assert (shown["root"], shown["replicas_by_state"]) == (str(storages["a"]), {})
    table = dlm("storage", "list").out
    assert "here" in table and "there" in table
    locations = dlm("location", "list", "--json").json
    assert [(row["name"], row["storages"]) for row in locations] == [("here", 1), ("there", 1)]


def test_sizes_and_durations_are_taken_as_people_write_them(dlm: Dlm, storages: Any) -> None:
    """2TB, 1.5TiB, plain bytes; 7d, 12h."""
    for text, size in (("2TB", 2 * 10**12), ("1.5TiB", 3 * 2**39), ("4096", 4096)):
        assert dlm("storage", "set", "a", "--capacity", text).code == 0
        assert dlm("storage", "show", "a", "--json").json["capacity_bytes"] == size
    assert dlm("storage", "set", "a", "--trash-grace", "7d").code == 0
    assert dlm("storage", "show", "a", "--json").json["trash_grace"] == 7 * 86400


def test_storages_on_servers_are_added_and_tested(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """WebDAV, also by rclone, with the password by reference only; a web server is only read."""
    with wsgidav_server(tmp_path / "dav") as dav, web_server(tmp_path / "pages") as url:
        root, secret = dav.make_collection(), dav.config["password"]
        to = ["--location", "there"]
        mine = ["--config", f"user={USER}", "--config", f"password={secret}"]
        added = dlm("storage", "add", "d", *to, "--interface", "webdav", "--root", root, *mine)
        assert added.code == 0, added.error
        theirs = [
            f"url={dav.make_collection()}",
            "type=webdav",
            f"user={USER}",
            "pacer_min_sleep=0s",
        ]
        options = [part for one in theirs for part in ("--config", one)]
        by_rclone = ["--interface", "rclone", "--root", ".", *options]
        added = dlm("storage", "add", "r", *to, *by_rclone, "--config", f"secret_pass={secret}")
        assert added.code == 0, added.error
        assert dlm("storage", "add", "w", *to, "--interface", "http", "--root", url).code == 0
        for name in ("d", "r"):
            tested = dlm("storage", "test", name)
            assert tested.code == 0 and f"of {len(CHECKS)} checks passed" in tested.out
        tested = dlm("storage", "test", "w")
        assert tested.code == 0 and "it is not managed" in tested.out
        here = ["--config", f"url={root}", "--config", f"secret_pass={secret}"]
        again = dlm("storage", "add", "x", *to, *by_rclone, *here)
        assert "'d'" in refused(again, "DLM-103", 2)
        plain = dlm("storage", "add", "x", *to, *by_rclone, "--config", "pass=hunter2")
        assert "hunter2" not in refused(plain, "DLM-101", 2)
        shown = dlm("storage", "show", "d").out + dlm("storage", "list", "--json").out
        assert dav.password not in shown


def test_a_storage_is_tested_in_a_scratch_folder(dlm: Dlm, storages: dict[str, Path]) -> None:
    """Every check is told with its result, and nothing is left on the storage."""
    (storages["a"] / "theirs").write_bytes(b"1")
    result = dlm("storage", "test", "a")
    assert result.code == 0 and f"of {len(CHECKS)} checks passed" in result.out
    assert result.out.count("ok ") == len(CHECKS) and "FAILED" not in result.out
    left = {str(f.relative_to(storages["a"])) for f in storages["a"].rglob("*") if f.is_file()}
    assert left == {"theirs", ".dlm/storage-id"}
    assert list((storages["a"] / ".dlm").glob("test-*")) == []


def test_a_storage_that_fails_a_check_is_told(
    dlm: Dlm, storages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, exit code 4, and the scratch folder removed all the same."""
    real = open_storage
    monkeypatch.setattr("dlm_core.storages.open.open_storage", lambda *row: Tampering(real(*row)))
    result = dlm("storage", "test", "a", "--json")
    assert result.code == 4
    failed = {one["check"]: one["reason"] for one in result.json if not one["ok"]}
    assert "read back differently" in failed["bytes of every size come back"]
    assert len(failed) < len(result.json)
    assert list((storages["a"] / ".dlm").glob("test-*")) == []


def test_of_a_storage_that_is_only_read_the_reading_is_tested(
    dlm: Dlm, storages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written; one that gives other bytes the second time fails, and one that is not in
    use is refused."""
    dlm("storage", "set", "a", "--mode", "read_only")
    for n in range(50):
        (storages["a"] / f"{n} x").write_bytes(b"x" * (n + 1))
    before = sorted(storages["a"].rglob("*"))
    result = dlm("storage", "test", "a")
    assert result.code == 0 and "5 of 5 checks passed on storage a" in result.out
    assert "nothing was written, it is read_only" in result.out
    real = open_storage

    def misreading(*row: Any) -> Misreading:
        wrapped = Misreading(real(*row))
        wrapped.left = [None]
        return wrapped

    monkeypatch.setattr("dlm_core.storages.open.open_storage", misreading)
    result = dlm("storage", "test", "a", "--json")
    assert result.code == 4
    assert [one["check"] for one in result.json if not one["ok"]] == [
        "what is read has the size that was told"
    ]
    assert sorted(storages["a"].rglob("*")) == before
    dlm("storage", "set", "a", "--mode", "offline")
    assert "it is offline" in refused(dlm("storage", "test", "a"), "DLM-101", 2)
    refused(dlm("storage", "test", "nope"), "DLM-102", 2)


def test_a_storage_is_drained_called_off_and_retired(dlm: Dlm, storages: Any) -> None:
    """Modes as commands; an empty storage is retired for good."""
    assert dlm("storage", "drain", "a").code == 0
    assert dlm("storage", "show", "a", "--json").json["mode"] == "draining"
    assert dlm("storage", "set", "a", "--mode", "read_write").code == 0
    assert dlm("storage", "retire", "a").code == 0
    refused(dlm("storage", "set", "a", "--mode", "read_write"), "DLM-105", 2)


# --- items ----------------------------------------------------------------------------------------


def test_files_are_registered_listed_and_explained(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """From register to why: numbers, lists, one item, its history, its reasons."""
    (storages["a"] / "run").mkdir()
    (storages["a"] / "run" / "x y.dat").write_bytes(b"12345")
    (storages["a"] / "z.dat").write_bytes(b"1")
    told = dlm("register", "a", "run", "--scheme", "ska", "--tag", "k=v", "--json")
    assert (told.code, told.json["created"], told.json["refused"]) == (0, 1, 0)
    again = dlm("register", "a", "run", "--scheme", "ska", "--json").json
    assert (again["created"], again["unchanged"]) == (0, 1)
    (item,) = dlm("item", "list", "--json").json
    assert (item["uri"], item["state"]) == ("ska:run/x%20y.dat", "INITIALISED")
    settle()
    uri = item["uri"]
    shown = dlm("item", "show", uri, "--json").json
    assert (shown["state"], shown["size"], shown["tags"]) == ("READY", 5, {"k": "v"})
    assert {row["storage"] for row in shown["replicas"]} == {"a", "b"}
    assert uri in dlm("item", "show", uri).out
    why = dlm("item", "why", uri, "--json").json
    assert (why["target_phase"], why["reached_weight"], why["shortfall"]) == ("SOLID", 4, None)
    text = dlm("item", "why", uri).out
    assert "reached: SOLID" in text and "there" in text
    events = dlm("item", "events", uri, "--json").json
    assert events[0]["new_state"] == "INITIALISED" and events[-1]["new_state"] == "READY"
    told = dlm("item", "events", uri).out
    assert told.count("\n") > len(events)
    assert "{" not in told, "for people"
    assert len(dlm("item", "list", "--storage", "b", "--json").json) == 1


def test_what_was_not_planned_yet_is_not_said_to_lack_nothing(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], engine: Engine
) -> None:
    """As after a rebuild of the catalogue, or when another phase is wanted."""
    (storages["a"] / "x").write_bytes(b"1")
    assert dlm("register", "a", "--scheme", "ska", "--target-phase", "LIQUID").code == 0
    settle()
    assert "reached: LIQUID; nothing is missing" in dlm("item", "why", "ska:x").out
    with engine.begin() as connection:
        run(connection, "UPDATE data_item SET target_phase = 'SOLID'")
    assert "reached: LIQUID; it waits to be planned" in dlm("item", "why", "ska:x").out


def test_pages_of_a_list_follow_each_other(dlm: Dlm, storages: dict[str, Path]) -> None:
    """A full page says on stderr how to go on, as a shell takes it; JSON on stdout stays JSON."""
    for name in ("f0", "it's 1", "n2"):
        (storages["a"] / name).write_bytes(b"x")
    dlm("register", "a")
    first = dlm("item", "list", "--limit", "2", "--json")
    assert [row["uri"] for row in first.json] == ["file:f0", "file:it's%201"]
    rest = dlm("item", "list", "--limit", "2", *shlex.split(first.error)[-2:], "--json")
    assert [row["uri"] for row in rest.json] == ["file:n2"]
    assert rest.error == ""


def test_a_changed_payload_is_refused_with_both_digests(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """Registering other bytes under a uri: exit code 2, both digests told; --new-version takes
    them as a new version."""
    (storages["a"] / "x").write_bytes(b"old")
    dlm("register", "a")
    settle()
    (storages["a"] / "x").write_bytes(b"newer")
    result = dlm("register", "a", "x", "--json")
    assert result.code == 2
    assert result.json["reasons"][0]["reason"].count("sha256:") == 2
    taken = dlm("register", "a", "x", "--new-version", "--json")
    assert (taken.code, taken.json["new_versions"]) == (0, 1)
    settle()
    assert dlm("item", "show", "file:x", "--json").json["version"] == 2
    assert dlm("item", "show", "file:x", "--version", "1", "--json").json["size"] == 3


def test_a_list_of_paths_and_checksums_are_taken_from_files(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path, settle: Callable[[], None]
) -> None:
    """--list names what to register, each name to its newline; a sum that does not agree keeps the
    item from READY, and why tells the error; an empty list, or file of sums, is
    refused."""
    for name in ("good", "bad", "other", "form\x0cfeed"):
        (storages["a"] / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    sums, names = tmp_path / "SHA256SUMS", tmp_path / "names"
    sums.write_text(f"{empty}  good\n{'0' * 64}  bad\n")
    names.write_text("good\nbad\nform\x0cfeed\n")
    dlm("register", "a", "--list", str(names), "--checksums", str(sums))
    settle()
    states = {row["uri"]: row["state"] for row in dlm("item", "list", "--json").json}
    assert states == {
        "file:good": "READY", "file:bad": "INITIALISED", "file:form%0Cfeed": "READY",
    }  # fmt: skip
    assert "DLM-4" in dlm("item", "why", "file:bad").out
    names.write_text("\n")
    refused(dlm("register", "a", "--list", str(names)), "DLM-106", 2)
    refused(dlm("register", "a", "--checksums", str(names)), "DLM-106", 2)


def test_failed_operations_can_be_tried_again(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """A payload that has vanished fails its admission; put back and retried, it is READY."""
    (storages["a"] / "x").write_bytes(b"1")
    dlm("register", "a")
    (storages["a"] / "x").rename(storages["a"] / "hidden")
    settle()
    assert dlm("status", "--json").json["operations"]["admit"]["FAILED"] == 1
    (storages["a"] / "hidden").rename(storages["a"] / "x")
    for other in (("--kind", "copy"), ("--storage", "b"), ("--error", "DLM-999")):
        assert dlm("retry", *other).out.startswith("0 "), other
    refused(dlm("retry", "--kind", "fry"), "DLM-101", 2)
    refused(dlm("retry", "--error", "disk"), "DLM-101", 2)
    refused(dlm("retry", "--storage", "nowhere"), "DLM-102", 2)
    refused(dlm("retry", "--item", "file:none"), "DLM-102", 2)
    matching = ("--kind", "admit", "--storage", "a", "--item", "file:x", "--error", "DLM-303")
    assert dlm("retry", *matching).out.startswith("1 ")
    settle()
    assert dlm("item", "show", "file:x", "--json").json["state"] == "READY"


def test_a_time_that_has_passed_is_no_time_to_expire_at(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """A year that was mistyped lets nothing go."""
    (storages["a"] / "x").write_bytes(b"x")
    dlm("register", "a")
    settle()
    late = ["--reason", "r", "--at", "2003-01-01T00:00Z"]
    refused(dlm("expire", "file:x", *late), "DLM-101", 2)
    refused(dlm("expire", "file:x", "--storage", "a", *late), "DLM-101", 2)
    assert dlm("item", "show", "file:x", "--json").json["expires_at"] is None


def test_an_item_expires_and_comes_back_from_the_trash(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """expire, a look at the dry run, the trash, restore: the bytes are where they were."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("register", "a")
    settle()
    future = dlm("expire", "file:x", "--reason", "embargo", "--at", "2100-01-01T00:00Z")
    assert "2100-01-01" in future.out
    assert "never" in dlm("expire", "file:x", "--never").out
    assert dlm("item", "show", "file:x", "--json").json["expires_at"] is None
    assert dlm("expire", "file:x", "--reason", "no longer wanted").code == 0
    proposed = dlm("expire", "--dry-run", "--json").json
    assert len(proposed) == 2
    assert (storages["a"] / "x").exists(), "a dry run changes nothing"
    settle()
    assert not (storages["a"] / "x").exists()
    told = dlm("item", "why", "file:x")
    assert "trash certificate" in told.out
    assert "reached: PLASMA; no copies are made any more" in told.out
    purge = dlm("item", "why", "file:x", "--json").json["operations"][0]
    assert f"QUEUED    purge on b, due {purge['due_at'][:10]} " in told.out, "when it is purged"
    assert dlm("restore", "file:x").out.startswith("2 copies")
    settle()
    assert (storages["a"] / "x").read_bytes() == b"12345"
    assert dlm("item", "show", "file:x", "--json").json["state"] == "READY"
    assert "'file:x'" in refused(dlm("restore", "file:x"), "DLM-102", 2)


def test_one_copy_is_told_to_leave(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """expire --storage marks that copy only; the item has no expiry."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("register", "a")
    settle()
    told = dlm("expire", "file:x", "--storage", "b", "--reason", "lent", "--at", "30d")
    assert "the copy of file:x on b" in told.out
    shown = dlm("item", "show", "file:x", "--json").json
    assert shown["expires_at"] is None
    leaving = {row["storage"]: row["expires_at"] for row in shown["replicas"]}
    assert leaving["a"] is None and leaving["b"] is not None


def test_copies_are_read_again_when_asked(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None], engine: Engine
) -> None:
    """By item, by storage or all, each counted; nothing is queued twice; damage is found."""
    for name in ("x", "y"):
        (storages["a"] / name).write_bytes(b"12345")
    dlm("register", "a")
    settle()
    assert dlm("verify", "file:x").out.startswith("2 ")
    assert dlm("verify", "--storage", "a").out.startswith("1 ")
    assert dlm("verify", "--all").out.startswith("1 ")
    (storages["a"] / "x").write_bytes(b"54321")
    settle()
    assert (storages["a"] / "x").read_bytes() == b"12345", "made again from the good copy"
    with engine.connect() as connection:
        found = rows(connection, "SELECT new_state FROM event WHERE new_state = 'SUSPECT'")
    assert len(found) == 1


def test_folders_are_watched_and_no_longer(dlm: Dlm, storages: Any) -> None:
    """add, list, remove; a folder is watched once."""
    assert dlm("watch", "add", "a", "in/coming", "--scheme", "ska", "--every", "1m").code == 0
    (watch,) = dlm("watch", "list", "--json").json
    assert (watch["storage"], watch["path"], watch["interval"]) == ("a", "in/coming", 60)
    assert dlm("watch", "add", "a", "in/coming").code != 0
    assert dlm("watch", "remove", "a", "in/coming").code == 0
    given = ["--as-directory", "*.ms", "--collection", "eb-1", "--owner", "me", "--tag", "k=v"]
    more = ["--target-phase", "liquid", "--prefix", "p/"]
    refused(dlm("watch", "add", "a", "in/coming", *given, *more, "--new-version"), "DLM-101", 2)
    added = dlm("watch", "add", "a", "in/coming", *given, *more)
    assert "not there yet" in added.out
    (watch,) = dlm("watch", "list", "--json").json
    assert watch["collection"] == "eb-1"
    assert watch["options"] == {
        "uri_prefix": "p/", "as_directory": ["*.ms"], "target_phase": "LIQUID", "owner": "me",
        "tags": {"k": "v"},
    }  # fmt: skip
    assert dlm("watch", "remove", "a", "in/coming").code == 0
    assert dlm("watch", "list", "--json").json == []


# --- status, env, doctor --------------------------------------------------------------------------


def test_the_status_has_the_documented_shape(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """items and replicas by state, bytes, operations by kind and state, storages with fill."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("storage", "set", "a", "--capacity", "1kB")
    dlm("register", "a")
    settle()
    found = dlm("status", "--json").json
    assert (found["items"], found["replicas"]) == ({"READY": 1}, {"READY": 2})
    assert found["bytes"]["replicas"] == 10
    assert found["operations"] == {"admit": {"DONE": 1}, "copy": {"DONE": 1}}
    storage = found["storages"][0]
    assert (storage["name"], storage["used_bytes"], storage["capacity_bytes"]) == ("a", 5, 1000)
    assert storage["fill_fraction"] == pytest.approx(0.005)
    text = dlm("status").out
    assert "1 READY" in text and "copy: 1 DONE" in text


def test_env_prints_what_a_shell_takes(dlm: Dlm, tmp_path: Path) -> None:
    """The lines can be evaluated, spaces in the home included."""
    printed = dlm("env").out
    script = f'{printed}\nprintf \'%s|%s\' "$DLM_HOME" "$DAGSTER_HOME"'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    home = tmp_path / "home"
    assert ended.stdout == f"{home}|{home / 'dagster'}"
    assert {"dagster.yaml", "workspace.yaml"} <= {f.name for f in (home / "dagster").iterdir()}


def test_the_doctor_names_each_problem_and_fails(
    dlm: Dlm, storages: dict[str, Path], tmp_path: Path
) -> None:
    """A storage whose root is gone and services that do not run are problems, with exit code 1;
    what works is ok."""
    storages["b"].rename(tmp_path / "unmounted")
    result = dlm("doctor")
    assert result.code == 1
    lines = {line[9:].split(":")[0]: line[:8].strip() for line in result.out.splitlines()}
    assert lines["storage a"] == "ok"
    assert lines["storage b"] == "PROBLEM"
    assert lines["the catalogue and its schema"] == "ok"
    assert lines["services"] == "PROBLEM"
    told = dlm("doctor", "--json")
    found = {one["what"]: one["problem"] for one in told.json}
    assert told.code == 1 and found["storage a"] is None and "DLM-301" in found["storage b"]


def test_the_doctor_names_a_mistyped_setting(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does nothing, and one that limits deletions would be missed; other names are whoever's."""
    monkeypatch.setenv("DLM_VAULT_SECRET", "x")
    assert "no setting" not in dlm("doctor").out
    monkeypatch.setenv("DLM_MAX_DELTE_ITEMS", "10")
    told = dlm("doctor")
    assert told.code == 1
    assert "DLM_MAX_DELTE_ITEMS is no setting and does nothing; DLM_MAX_DELETE_ITEMS is" in told.out


def test_the_version_is_told(dlm: Dlm) -> None:
    """As other programs do, and nothing else is looked at."""
    told = dlm("--version")
    assert (told.code, told.out.split()) == (0, ["dlm", version("dlm")])


def test_the_doctor_goes_on_where_a_file_cannot_be_used(
    dlm: Dlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when DLM_HOME has become read-only: each look is told by itself."""
    (tmp_path / "home" / "run").mkdir(mode=0o700, parents=True)
    (tmp_path / "home" / "run" / "services.lock").touch()
    opened = os.open

    def read_only(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path / "home")) and flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *more, **options)

    monkeypatch.delenv("DLM_DATABASE_URL")
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(embedded, "is_made", lambda _: True)
    told = dlm("doctor")
    assert told.code == 1 and told.error == ""
    (line,) = [line for line in told.out.splitlines() if "the catalogue and its schema" in line]
    assert line.startswith("PROBLEM") and "Read-only file system" in line


# --- values ---------------------------------------------------------------------------------------


def test_times_need_a_zone_and_durations_a_unit() -> None:
    """ISO 8601 with its zone, now, or a duration from now; all else is refused."""
    now = datetime(2026, 6, 1, tzinfo=UTC)
    assert parse_time("now", now) == now
    assert parse_time("2026-06-01T02:00+02:00", now) == now
    assert parse_time("2d", now) == datetime(2026, 6, 3, tzinfo=UTC)
    for wrong in ("2026-06-01", "2026-06-01T00:00", "tomorrow", "", "-3d", "999999999999d"):
        with pytest.raises(InvalidValueError):
            parse_time(wrong, now)
    for wrong in ("5", "5 parsecs", "", "d", "1e3d", "99999999999999w"):
        with pytest.raises(InvalidValueError):
            parse_duration(wrong)
    for wrong in ("", "GB", "-1", "1.2.3", "5 XB", "1e3"):
        with pytest.raises(InvalidValueError):
            parse_size(wrong)
