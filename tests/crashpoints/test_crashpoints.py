"""A crash at any commit or storage call ends, after recovery, where no crash would have ended."""

import signal
from pathlib import Path

import pytest

from dlm_cli.s3_server import S3Server
from dlm_core.storages.open import open_storage
from tests.backends import s3_config
from tests.crashpoints.points import Crash, CrashingStorage, Points
from tests.crashpoints.run import Arena, Servers, crash_at, difference, kill_at, reference
from tests.crashpoints.scenarios import SCENARIOS
from tests.servers import DavServer
from tests.sshd import SshServer

NAMES = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture
def arena(
    postgres_home: Path, template_database: str, tmp_path: Path, s3: S3Server, sshd: SshServer,
    wsgidav: DavServer,
):  # fmt: skip
    """Where scenarios are prepared, interrupted and compared."""
    folder = tmp_path / "arena"
    collection = wsgidav.make_collection()
    servers = Servers(
        s3.bucket, s3_config(s3), sshd.root(""), sshd.config(), collection, wsgidav.config
    )
    arena = Arena(postgres_home, template_database, folder, servers)
    yield arena
    arena.drop(arena.prepared)


def check(arena, scenario, points, expected, names):
    for at in points:
        wrong = difference(expected, crash_at(arena, scenario, at))
        assert not wrong, f"point {at} ({names[at - 1]}): {wrong}"


def every_third(names):
    """The suite has a crash in every third scenario, what is slow in all."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if place % 3 else name
        for place, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", every_third(NAMES))
def test_a_crash_amid_effects_is_recovered_from(arena, name):
    """One point of a scenario, each another, where something has just been done, or half."""
    scenario = NAMES[name]
    arena.prepare(scenario)
    expected, names = reference(arena, scenario)
    done = [at for at, point in enumerate(names, start=1) if "before" not in point]
    chosen = done[7 * list(NAMES).index(name) % len(done)]
    check(arena, scenario, [chosen], expected, names)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_a_crash_anywhere_is_recovered_from(arena, name):
    """Every point of every scenario; 'make crashpoints' shows them as a table."""
    scenario = NAMES[name]
    arena.prepare(scenario)
    expected, names = reference(arena, scenario)
    check(arena, scenario, range(1, len(names) + 1), expected, names)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("copy several", "in write"),
        ("trash", "after rename"),
        ("purge", "after remove"),
        ("register", "after commit"),
    ],
)
def test_a_killed_process_is_recovered_from(arena, name, point):
    """The same with a process of its own that dies by SIGKILL."""
    scenario = NAMES[name]
    arena.prepare(scenario)
    expected, names = reference(arena, scenario)
    at = next(n for n, one in enumerate(names, start=1) if one.endswith(point))
    code, state = kill_at(arena, scenario, at)
    assert code == -signal.SIGKILL
    assert not difference(expected, state)


def test_after_the_crash_nothing_has_an_effect(tmp_path):
    """Threads and 'finally' clauses that go on find every door closed."""
    points = Points(at=1)
    storage = CrashingStorage(open_storage("x", "posix", str(tmp_path), {}), points)
    (tmp_path / "f").write_bytes(b"1")
    for _ in range(2):
        with pytest.raises(Crash):
            storage.remove("f")
    assert (tmp_path / "f").exists()


def test_a_difference_is_told():
    """What is missing, what is too much, and what is there twice."""
    expected = {"rows": [{"a": 1}, {"a": 2}], "files": {"x": b"1"}}
    found = {"rows": [{"a": 1}, {"a": 1}], "files": {"x": b"2"}}
    told = "\n".join(difference(expected, found))
    assert "rows lacks {'a': 2}" in told and "files lacks x: b'1'" in told
    assert difference(expected, expected) == []
