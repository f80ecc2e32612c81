"""Run the machine for about so many steps, and find the shortest story of a violation."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import Engine, create_engine, event

from dlm_core.catalogue.dsn import sqlalchemy_url
from tests.schema.rules import must_be_told
from tests.simulation.machine import Lifecycle
from tests.simulation.model import Violation

Calls = Sequence[tuple[str, dict[str, Any]]]
_STORY, _STORIES = 60, 10
_TELL_EVERY = 1000


def quick_engine(url: str) -> Engine:
    """An engine for many small transactions of one thread on a nearly empty catalogue, where most
    of the time would go into planning the same statements again and into asking the server whether
    it is there; what they do is the same."""
    engine = create_engine(
        sqlalchemy_url(url, "psycopg"),
        pool_use_lifo=True,
        pool_reset_on_return=None,
        connect_args={
            "application_name": "dlm",
            "prepare_threshold": 0,
            "options": "-c plan_cache_mode=force_generic_plan -c random_page_cost=1.1",
        },
    )

    @event.listens_for(engine, "connect")
    def keep_statements(connection: Any, _: Any) -> None:
        connection.prepared_max = 1000

    return engine


@dataclass
class Result:
    """``steps`` counts what was really executed, but for the replays that shorten a story."""

    steps: int
    violation: str | None = None
    story: list[str] = field(default_factory=list)
    #: transitions and certificates, by what they were
    seen: Counter[str] = field(default_factory=Counter)


def simulate(
    engine: Engine,
    steps: int,
    seed_: int,
    tell: Callable[[int], None] = lambda _: None,
    *,
    machine: type[Lifecycle] = Lifecycle,
    shortened: bool = True,
    stop: threading.Event | None = None,
) -> Result:
    """About ``steps`` steps in stories of at most 60; ends with the first violation.

    The same ``seed_`` brings the same stories. ``tell`` is called every thousand steps.
    When ``stop`` is set it ends after the stories in hand, at most ten.
    """
    must_be_told(engine)
    Lifecycle.engine, Lifecycle.steps, Lifecycle.broken = engine, 0, None
    Lifecycle.seen = Counter()
    Lifecycle.told = staticmethod(
        lambda: tell(Lifecycle.steps) if Lifecycle.steps % _TELL_EVERY == 0 else None
    )
    chunk = 0
    while Lifecycle.steps < steps and not (stop is not None and stop.is_set()):
        left = steps - Lifecycle.steps
        seeded = seed(seed_ * 1_000_003 + chunk)(machine)
        try:
            run_state_machine_as_test(seeded, settings=_chosen(left))
        except (Violation, Flaky):
            if Lifecycle.broken is None:
                raise
            return _found(Lifecycle.broken, shortened)
        chunk += 1
    return Result(Lifecycle.steps, seen=Lifecycle.seen)


def _found(broken: Lifecycle, shortened: bool) -> Result:
    steps, seen = Lifecycle.steps, Counter(Lifecycle.seen)
    Lifecycle.told = staticmethod(lambda: None)
    shortest = shorten(broken) if shortened else broken
    return Result(steps, str(shortest.violation), shortest.story, seen)


def _chosen(left: int) -> settings:
    return settings(
        max_examples=max(1, min(_STORIES, -(-left // _STORY))),
        stateful_step_count=_STORY,
        database=None,
        deadline=None,
        # Hypothesis would shrink for many minutes what shorten() does in seconds
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


def replay(calls: Calls, kind: type[Lifecycle] = Lifecycle) -> Lifecycle:
    """A machine after these calls, or after the first that ends in a violation."""
    machine = kind()
    try:
        needs = {rule.function.__name__: rule.preconditions for rule in machine.rules}
        for name, arguments in calls:
            if all(holds(machine) for holds in needs.get(name, ())):
                getattr(machine, name)(**arguments)
    except Violation:
        pass
    finally:
        machine.teardown()
    return machine


def shorten(broken: Lifecycle) -> Lifecycle:
    """The shortest machine found that breaks the same promise: calls are left out, half of them at
    a time, then fewer, as long as it still does (Zeller's delta debugging)."""
    assert broken.violation is not None
    name, size = broken.violation.name, len(broken.calls) // 2
    while size >= 1:
        start = 1  # the first call makes the site
        while start < len(broken.calls):
            tried = _without(broken, start, start + size, name)
            if tried is None:
                start += size
            else:
                broken = tried
        size //= 2
    return broken


def _without(broken: Lifecycle, start: int, end: int, name: str) -> Lifecycle | None:
    tried = replay([*broken.calls[:start], *broken.calls[end:]], type(broken))
    same = tried.violation is not None and tried.violation.name == name
    return tried if same else None
