"""The S3 server of the demo and the tests."""

from __future__ import annotations

import socket

import pytest

from dlm_cli import s3_server
from dlm_core.errors import ServiceUnavailableError


@pytest.fixture
def taken(monkeypatch):
    """The first port of each choice is somebody else's in the end, as often as ``taken`` says."""
    free, left = s3_server.free_ports, [1]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def choose(count: int) -> list[int]:
            chosen = free(count)
            if left[0]:
                left[0] -= 1
                chosen[-1] = other.getsockname()[1]
            return chosen

        monkeypatch.setattr(s3_server, "free_ports", choose)
        yield left


def test_a_port_that_was_taken_meanwhile_is_chosen_again(taken, tmp_path):
    """The server comes up on others, with a bucket that takes objects."""
    with s3_server.s3_server(tmp_path / "weed") as server:
        assert server.endpoint.startswith("http://127.0.0.1:")
    assert taken == [0]


def test_a_server_that_never_comes_up_is_told(taken, tmp_path):
    """After some tries, and nothing is left running."""
    taken[0] = 9
    refused = pytest.raises(ServiceUnavailableError, match="S3 server")
    with refused, s3_server.s3_server(tmp_path / "weed"):
        raise AssertionError("it came up")
    assert taken == [9 - s3_server._TRIES]
