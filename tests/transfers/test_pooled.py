"""How many threads are at tiny files at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from dlm_core.transfers import pooled
from dlm_core.transfers.pooled import Turns

_THREADS = 4


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What the turns are timed with; a machine that stands still for a moment does not move it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pooled, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def most_at_once(turns: Turns, work: Callable[[int], None], count: int) -> list[int]:
    """How many were at it when each of ``count`` turns began. A turn ends when as many as may are
    at it; ``work`` is called with how many these are, and no other turn ends in between."""
    at_it, seen, lock, ending = 0, [], threading.Lock(), threading.Lock()

    def one(_: int) -> None:
        nonlocal at_it
        with turns.one():
            with lock:
                at_it += 1
                seen.append(at_it)
            ending.acquire()
            while at_it < turns._width and len(seen) < count:
                time.sleep(0.001)
            with lock:
                work(at_it)
                at_it -= 1
        ending.release()

    together = threading.Barrier(_THREADS)
    with ThreadPoolExecutor(_THREADS, initializer=together.wait) as pool:
        list(pool.map(one, range(count)))
    return seen


def test_who_waits_gets_company(clock):
    """Work that waits, as for a network file system, is done by all threads before long."""

    def work(at_it: int) -> None:
        clock.now += 0.01 / at_it

    seen = most_at_once(Turns(_THREADS), work, 80)
    assert seen[0] == 1
    assert max(seen[-20:]) == _THREADS


def test_what_cannot_be_shared_stays_with_one(clock):
    """Work that takes as long however many are at it, as what the interpreter does, is not given to
    several: a second one is tried, is not faster, and is sent away."""

    def work(_: int) -> None:
        clock.now += 0.01

    seen = most_at_once(Turns(_THREADS), work, 60)
    assert max(seen) <= 2
    assert max(seen[-20:]) == 1


def test_a_single_thread_needs_no_trial():
    """With room for one there is never a second."""
    assert max(most_at_once(Turns(1), lambda _: None, 30)) == 1


def test_a_turn_that_fails_is_given_back():
    """An error ends the turn, and the next one can have it."""
    turns = Turns(_THREADS)
    for _ in range(30):
        with pytest.raises(OSError, match="medium"), turns.one():
            raise OSError("medium")
    assert max(most_at_once(turns, lambda _: None, 10)) >= 1
