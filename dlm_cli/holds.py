"""``dlm hold``: what may not be deleted."""

from __future__ import annotations

import uuid
from typing import Annotated

import typer

from dlm_cli.items import Version
from dlm_cli.session import catalogue, human, parse_time, plain_errors, show_json, show_table
from dlm_core.errors import InvalidValueError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Person = Annotated[str | None, typer.Option("--as", help="In whose name; unset: yours.")]
Key = Annotated[str, typer.Argument(help="As 'dlm hold list' shows it.")]

hold_app = typer.Typer(no_args_is_help=True, help="Holds and retention locks.")


def parse_key(what: str, text: str) -> uuid.UUID:
    """A key as listings show it.

    Raises
    ------
    InvalidValueError
    """
    try:
        return uuid.UUID(text)
    except ValueError:
        raise InvalidValueError(
            what=what, value=text, expected=f"a key that 'dlm {what} list' shows"
        ) from None


@hold_app.command("add")
@plain_errors
def hold_add(
    uri: Annotated[str | None, typer.Argument(help="An item.")] = None,
    reason: Annotated[str, typer.Option(help="Why; required.")] = "",
    version: Version = None,
    collection: Annotated[str | None, typer.Option(help="It and all collections below.")] = None,
    matching: Annotated[
        str | None, typer.Option(help="Uris that begin so; with * or ? a whole pattern.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every item there is or will be.")
    ] = False,
    until: Annotated[
        str | None, typer.Option(help="30d, or a time with its zone; unset: until released.")
    ] = None,
    lock: Annotated[
        bool, typer.Option("--lock", help="A retention lock: nobody can shorten it. Needs --until.")
    ] = False,
    person: Person = None,
) -> None:
    """Forbid the deletion of an item, a collection, or what matches, also if registered later."""
    from dlm_core.catalogue.holds import Target, insert_hold

    with catalogue(person) as context:
        now = context.clock()
        ends_at = parse_time(until, now)
        target = Target(uri, version, collection, matching, everything)
        key = context.transact(
            lambda c: insert_hold(
                c, target, reason=reason, actor=context.actor, now=now, ends_at=ends_at, locked=lock
            )
        )
    print(f"{'lock' if lock else 'hold'} {key} until {human(ends_at) if ends_at else 'released'}")


@hold_app.command("list")
@plain_errors
def hold_list(
    uri: Annotated[str | None, typer.Argument(help="Only those on this item.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended too.")] = False,
    as_json: Json = False,
) -> None:
    """List holds in force."""
    from dlm_core.catalogue.holds import holds_of, list_holds

    with catalogue() as context:
        found = context.transact(lambda c: holds_of(c, uri) if uri else list_holds(c, ended=ended))
    columns = {"hold_id": "HOLD", "by": "BY", "target": "MATCHES", "locked": "LOCK",
               "in_force": "IN FORCE", "ends_at": "UNTIL", "actor": "WHO",
               "reason": "REASON"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


@hold_app.command("release")
@plain_errors
def hold_release(hold: Key, person: Person = None) -> None:
    """End a hold now; a retention lock refuses."""
    from dlm_core.catalogue.holds import end_hold

    key = parse_key("hold", hold)
    with catalogue(person) as context:
        context.transact(lambda c: end_hold(c, key, context.clock()))
    print(f"hold {key} is released")


@hold_app.command("extend")
@plain_errors
def hold_extend(
    hold: Key,
    until: Annotated[str, typer.Option(help="30d from now, or a time with its zone.")],
    person: Person = None,
) -> None:
    """Let a hold end at another time; a retention lock only at a later one."""
    from dlm_core.catalogue.holds import end_hold

    key = parse_key("hold", hold)
    with catalogue(person) as context:
        ends_at = parse_time(until, context.clock())
        assert ends_at is not None
        context.transact(lambda c: end_hold(c, key, ends_at))
    print(f"hold {key} until {human(ends_at)}")
