"""Run the machine for about so many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import Engine

from tests.simulation.machine import Lifecycle
from tests.simulation.model import Violation

_STORY, _STORIES = 60, 10
_TELL_EVERY = 1000


@dataclass
class Result:
    """``steps`` counts what was really executed, replays while shrinking included."""

    steps: int
    violation: str | None = None
    story: list[str] = field(default_factory=list)


def simulate(
    engine: Engine,
    steps: int,
    seed_: int,
    tell: Callable[[int], None] = lambda _: None,
    *,
    shrink: bool = True,
) -> Result:
    """About ``steps`` steps in stories of at most 60; ends with the first violation.

    The same ``seed_`` brings the same stories. ``tell`` is called every thousand steps.
    """
    Lifecycle.engine, Lifecycle.steps, Lifecycle.shortest = engine, 0, None
    Lifecycle.told = staticmethod(
        lambda: tell(Lifecycle.steps) if Lifecycle.steps % _TELL_EVERY == 0 else None
    )
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    chunk = 0
    while Lifecycle.steps < steps and Lifecycle.shortest is None:
        left = steps - Lifecycle.steps
        chosen = settings(
            max_examples=max(1, min(_STORIES, -(-left // _STORY))),
            stateful_step_count=_STORY,
            database=None,
            deadline=None,
            phases=phases,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        machine = seed(seed_ * 1_000_003 + chunk)(Lifecycle)
        try:
            run_state_machine_as_test(machine, settings=chosen)
        except (Violation, Flaky):
            # the machine has kept the shortest story that it saw end with a violation
            if Lifecycle.shortest is None:
                raise
        chunk += 1
    story, violation = Lifecycle.shortest or ([], None)
    return Result(Lifecycle.steps, violation, story)
