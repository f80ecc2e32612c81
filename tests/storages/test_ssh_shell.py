"""Commands on the far side of SSH, on a real OpenSSH server."""

import hashlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core.storages import ssh
from dlm_core.storages.open import open_storage
from tests.payloads import put
from tests.sshd import ssh_server

_LOGIN = """
ForceCommand case "$SSH_ORIGINAL_COMMAND" in *sh) echo x >>{count}; echo hi; echo ho >&2;; \
esac; eval "$SSH_ORIGINAL_COMMAND"
"""


@pytest.fixture
def far(sshd, tmp_path):
    """A storage whose far side runs commands."""
    return open_storage("far", "sftp", sshd.root(tmp_path), sshd.config(shell=True))


@pytest.fixture(scope="module")
def shared(sshd, tmp_path_factory):
    """One for all examples of a property."""
    root = sshd.root(tmp_path_factory.mktemp("far"))
    return open_storage("far", "sftp", root, sshd.config(shell=True))


def asked(storage, command, given=b""):
    """What a command there gives: status, output, complaint."""

    async def ask():
        async with storage.connections.session() as session:
            return await session.command(command, given)

    return ssh.run(ask())


def test_a_login_is_paid_once_and_what_it_prints_is_passed_over(tmp_path):
    """However many commands there are; none of them takes a greeting for its answer."""
    count, root = tmp_path / "count", tmp_path / "root"
    root.mkdir()
    login = _LOGIN.format(count=count)
    with ssh_server(tmp_path / "sshd", login, sftp="/usr/lib/openssh/sftp-server") as server:
        storage = open_storage("far", "sftp", server.root(root), server.config(shell=True))
        storage.check()
        for n in range(5):
            put(storage, f"x{n}", b"%d" % n)
            storage.flush()
            digest = hashlib.sha256(b"%d" % n).hexdigest()
            assert storage.digest_many([f"x{n}"]) == {f"x{n}": f"sha256:{digest}"}
        assert asked(storage, "cat", b"given") == (0, b"given", b"")
        assert count.read_text() == "x\n"


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_octets_are_given_and_come_back(shared, data):
    """NULs, quotes, percent signs, newlines, dashes first."""
    assert asked(shared, "cat", data) == (0, data, b"")
    assert asked(shared, "cat >&2; (exit 3)", data) == (3, b"", data)


def test_much_is_given_and_comes_back(far):
    """More than pipes and windows hold, in both directions at once."""
    data = os.urandom(3 << 20)
    assert asked(far, "tee /dev/stderr", data) == (0, data, data)


def test_a_shell_that_was_ended_there_is_replaced(far):
    """In between, and while it runs a command."""
    first = asked(far, "echo $$")
    assert asked(far, "echo $$") == first
    os.kill(int(first[1]), signal.SIGKILL)
    second = asked(far, "echo $$")
    assert second[0] == 0 and second[1] != first[1]
    asked(far, f"kill -9 {int(second[1])}")
    third = asked(far, "echo $$")
    assert third[0] == 0 and third[1] not in (first[1], second[1])


def test_a_shell_whose_answer_nobody_waited_for_is_not_asked_again(far, tmp_path):
    """What it still says would be taken for the answer to the next command."""
    before = asked(far, "echo $$")
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 8 << 30)
    put(far, "small", b"x")
    stop = threading.Event()
    stop.set()
    assert far.digest_many(["big"], stop) == {}
    wanted = f"sha256:{hashlib.sha256(b'x').hexdigest()}"
    assert far.digest_many(["small"]) == {"small": wanted}
    after = asked(far, "echo $$")
    assert after[0] == 0 and after[1] != before[1]


def test_one_that_ends_itself_is_no_answer(far):
    """A command that leaves no shell behind has no status."""
    status, printed, _ = asked(far, "echo half; kill -9 $$")
    assert (status, printed) == (None, b"")
    assert asked(far, "echo whole") == (0, b"whole\n", b"")


def test_commands_at_once_have_shells_of_their_own(far, tmp_path):
    """Neither waits for the other: each of these ends when the other has begun."""
    begin = "touch {0}; until test -e {1}; do sleep 0.05; done"
    places = tmp_path / "one", tmp_path / "two"
    with ThreadPoolExecutor() as pool:
        here = pool.submit(asked, far, begin.format(*places))
        there = pool.submit(asked, far, begin.format(*reversed(places)))
        assert here.result(timeout=60) == there.result(timeout=60) == (0, b"", b"")


def test_many_commands_at_once_stay_within_what_a_server_takes(far):
    """OpenSSH opens ten channels of a connection, and refuses more: others wait for their turn."""
    with ThreadPoolExecutor(30) as pool:
        told = list(pool.map(lambda n: asked(far, f"sleep 0.2; echo {n}"), range(30)))
    assert told == [(0, b"%d\n" % n, b"") for n in range(30)]
