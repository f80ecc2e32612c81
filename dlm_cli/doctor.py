"""``dlm doctor``: look at everything that has to work."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

from dlm_cli.session import catalogue
from dlm_core.catalogue.engine import must_take_writes
from dlm_core.errors import DlmError
from dlm_core.settings import Settings, load_settings

_LEAST_FREE_BYTES = 1 << 30
_OLDEST = (3, 11)
#: how like a setting's name a mistyped one is (difflib's ratio)
_NEARLY = 0.88


def examine() -> Iterator[tuple[str, str | None]]:
    """(what was looked at, the problem and what to do, or None), one after the other."""
    yield f"Python {platform.python_version()}", _python()
    problem = _problem(load_settings)
    if problem:
        yield "settings", problem
        return
    settings = load_settings()
    yield f"settings, DLM_HOME={settings.home}", _mistyped()
    if settings.database_url is None:
        from dlm_core.catalogue.embedded import find_binaries

        yield "PostgreSQL's programs", _problem(lambda: find_binaries(settings.pg_bindir))
    yield "free space below DLM_HOME", _space()
    from dlm_cli.services import read_services

    running = read_services(settings.home)
    yield "services", None if running else _not_running(settings.home)
    if running:
        problem = _answers(running["ui_url"])
        yield f"the Dagster UI at {running['ui_url']}", problem
        if not problem:
            yield from _dagster(running["ui_url"])
    if settings.compute_logs_bucket is not None:
        from dlm_pipelines.instance import check_compute_logs

        bucket = f"the bucket {settings.compute_logs_bucket} of what runs print"
        yield bucket, _problem(check_compute_logs)
    problem = _problem(_open)
    yield "the catalogue and its schema", problem
    if problem:
        return
    with catalogue() as context:
        for row in context.transact(context.storages.load).values():
            if row["mode"] not in ("retired", "offline", "lost"):
                check = context.storages.open(row).check
                yield f"storage {row['name']}", _problem(check)


def _open() -> None:
    with catalogue() as context:
        context.transact(must_take_writes)


def _python() -> str | None:
    return None if sys.version_info >= _OLDEST else "3.11 or newer is needed"


def _mistyped() -> str | None:
    """A limit under a name that is nearly right would be none."""
    known = [f"DLM_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(set(map(str.upper, os.environ)) - {*known}):
        # others begin so too: those that hold secrets, and are referred to
        if name.startswith("DLM_"):
            if near := get_close_matches(name, known, 1, _NEARLY):
                return f"{name} is no setting and does nothing; {near[0]} is one"
    return None


def _not_running(home: Path) -> str:
    from dlm_cli.services import processes_of

    left = processes_of(home)
    if not left:
        return "not running: start them with 'dlm up'"
    pids = ", ".join(str(process.pid) for process in left)
    return (
        f"their supervisor is gone, {len(left)} of its processes go on ({pids}): 'dlm up' ends them"
    )


def _dagster(ui_url: str) -> Iterator[tuple[str, str | None]]:
    from dlm_cli.services import is_healthy
    from dlm_pipelines.launch import switched_off

    beats = is_healthy(ui_url)
    yield (
        "the Dagster daemon",
        None if beats else "it does not beat; see log/daemon.log in DLM_HOME",
    )
    try:
        off = switched_off(ui_url)
    except DlmError as error:
        yield "sensors and schedules", f"{error.code}: {error}"
        return
    told = f"switched off, nothing of theirs starts by itself: {', '.join(off)} (UI, Automation)"
    yield "sensors and schedules", told if off else None


def _answers(url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5) as answer:
            answer.read()
    except OSError as error:
        return f"it does not answer ({error}); see log/ in DLM_HOME, or start 'dlm up' again"
    return None


def _space() -> str | None:
    home = load_settings().home
    while not home.exists():
        home = home.parent
    free = shutil.disk_usage(home).free
    return None if free > _LEAST_FREE_BYTES else f"only {free} bytes are left"


def _problem(look: Callable[[], object]) -> str | None:
    try:
        look()
    except DlmError as error:
        return f"{error.code}: {error}"
    except OSError as error:  # of DLM_HOME, most often
        return str(error)
    return None
