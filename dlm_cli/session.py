"""What commands share: settings, the catalogue, values as users write them, errors in one line."""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from dlm_core.errors import CatalogueUnavailableError, DlmError, InvalidValueError

if TYPE_CHECKING:
    from dlm_core.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGTPE]?)(i?)B?", re.ASCII)
_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w|y)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31_557_600}


_LONGEST_SECONDS = 100 * _SECONDS["y"]


def fail(error: DlmError) -> None:
    """Print an error in one line and end with its exit code."""
    print(f"dlm: error {error.code}: {printable(str(error))}", file=sys.stderr)
    raise SystemExit(error.exit_code)


def printable(text: str) -> str:
    """Text on one line: what users and files say may have a newline in it, or what a terminal
    obeys."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str, end: str = "\n") -> None:
    """Print a line with what users or files say in it."""
    print(printable(text), end=end)


def plain_errors(command: F) -> F:
    """Let a command end in one clear line for every error of ours."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()
        except DlmError as error:
            return fail(error)
        except BrokenPipeError:
            # the reader went away (dlm … | head); what is left goes nowhere
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        return result

    return wrapped  # type: ignore[return-value]


def existing_catalogue(settings: Settings) -> str:
    """The catalogue's libpq URL; in a home without one none is made, it may be a mistyped home.

    Raises
    ------
    CatalogueUnavailableError
    """
    from dlm_core.catalogue import embedded
    from dlm_core.catalogue.dsn import catalogue_url

    if settings.database_url is None and not embedded.is_made(settings.home):
        raise CatalogueUnavailableError(
            reason=f"there is none in {settings.home}",
            hint="is DLM_HOME the right folder? 'dlm up' makes one there",
        )
    return catalogue_url(settings)


def person_named(name: str | None = None) -> str:
    """The actor of what ``name`` (unset: the user of this process) does."""
    import getpass

    try:
        return f"user:{name or getpass.getuser()}"
    except (KeyError, OSError):  # in a container the number of a user may have no name
        return f"user:{os.getuid()}"


@contextmanager
def catalogue(person: str | None = None) -> Iterator[Any]:
    """A core context on the catalogue in the name of ``person`` (unset: the user of this process);
    the embedded server is started if it sleeps, an empty or older schema is told, never changed."""
    from dlm_core.catalogue import schema
    from dlm_core.catalogue.engine import make_engine
    from dlm_core.lifecycle.work import Context
    from dlm_core.settings import load_settings

    settings = load_settings()
    engine = make_engine(existing_catalogue(settings), pool_size=4)
    context = Context(engine, settings, person_named(person))
    try:
        context.transact(schema.check)
        yield context
    finally:
        engine.dispose()


def parse_size(text: str | None) -> int | None:
    """Bytes from ``500GB`` (decimal), ``2TiB`` (binary) or a plain number.

    Raises
    ------
    InvalidValueError
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidValueError(what="size", value=text, expected="such as 500GB, 2TiB or 1048576")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2]])


def parse_duration(text: str | None) -> timedelta | None:
    """A duration from ``30s``, ``15m``, ``12h``, ``7d``, ``2w`` or ``10y``.

    Raises
    ------
    InvalidValueError
    """
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise InvalidValueError(what="duration", value=text, expected="such as 30s, 15m, 12h, 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST_SECONDS:
        raise InvalidValueError(what="duration", value=text, expected="at most 100 years")
    return timedelta(seconds=seconds)


def parse_time(text: str | None, now: datetime) -> datetime | None:
    """A moment from ISO 8601 with its zone, ``now``, or a duration from now (``30d``).

    Raises
    ------
    InvalidValueError
        also for a time without zone: whose local time it is cannot be known.
    """
    if text is None:
        return None
    if text == "now":
        return now
    if _DURATION.fullmatch(text.strip()):
        return now + (parse_duration(text) or timedelta())
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise InvalidValueError(
            what="time", value=text, expected="ISO 8601 with a zone (2030-01-31T12:00Z), or 30d"
        )
    if not 2000 <= found.year < 2200:
        raise InvalidValueError(what="time", value=text, expected="a year from 2000 to 2199")
    return found.astimezone(UTC)


def parse_choice(what: str, text: str | None, choices: Sequence[str]) -> str | None:
    """One of ``choices``, in whatever case the user wrote it."""
    if text is None:
        return None
    for choice in choices:
        if choice.lower() == text.lower():
            return choice
    raise InvalidValueError(what=what, value=text, expected=f"one of {', '.join(choices)}")


def parse_pairs(pairs: Sequence[str], what: str) -> dict[str, str]:
    """``key=value`` arguments as a dictionary."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            # not shown: of a storage's config it may be a secret
            raise InvalidValueError(what=what, value="(not shown)", expected="key=value")
        found[key] = value
    return found


def show_json(value: Any) -> None:
    """Print a value as JSON; times as ISO 8601 UTC, durations in seconds."""
    text = json.dumps(value, default=plain_value, indent=2, ensure_ascii=False)
    if not _is_utf8(text):  # a file's name need not be
        text = json.dumps(value, default=plain_value, indent=2)
    print(text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_value(value: Any) -> Any:
    """The JSON form of a time, duration or key."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def show_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows as a table; ``columns`` maps keys to headings."""
    from rich.console import Console
    from rich.table import Table

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # no error for us, see plain_errors

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(human(row.get(key), key) for key in columns))
    # into a pipe or file: no terminal whose width would fold names
    width = None if sys.stdout.isatty() else 200
    # what users and files say is text: brackets in it are no markup
    Plain(width=width, markup=False, emoji=False, highlight=False).print(table)


def human(value: Any, key: str = "") -> str:
    """A value for people: bytes with units, fractions as percent, times to the second."""
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, Mapping):
        if key == "config":  # its words are the user's
            return printable(", ".join(f"{name} {one}" for name, one in value.items()))
        return ", ".join(f"{printable(name)} {human(one, name)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(human(one, key) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    # of the same names in an item's metadata the values may be text
    if isinstance(value, str):
        return printable(value)
    if key.endswith(("fraction", "watermark")):
        return f"{value:.1%}"
    if key == "size" or key.endswith(("bytes", "bytes_per_second", "bytes_per_day")):
        return human_size(int(value))
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    return str(value)


def human_size(size: int) -> str:
    """``1.5 GB``: decimal units, as disks are sold."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(amount) < 1000 or unit == "PB":
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")
