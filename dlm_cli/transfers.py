"""``dlm link …`` and ``dlm operations``."""

from __future__ import annotations

from typing import Annotated

import typer

from dlm_cli.places import MaxFiles, MaxRate, limit_options
from dlm_cli.session import catalogue, plain_errors, show_json, show_table
from dlm_core.errors import InvalidValueError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

link_app = typer.Typer(no_args_is_help=True, help="Limits of the copies between two storages.")


@link_app.command("set")
@plain_errors
def link_set(
    source: Annotated[str, typer.Argument(help="The storage that is read.")],
    destination: Annotated[str, typer.Argument(help="The storage that is written.")],
    max_bytes_per_second: MaxRate = None,
    max_concurrency: MaxFiles = None,
) -> None:
    """Limit the copies from one storage to another; those at work obey within seconds."""
    from dlm_core.catalogue.traffic import set_link

    changes = limit_options(max_bytes_per_second, max_concurrency)
    if not changes:
        raise InvalidValueError(
            what="limits", value="", expected="--max-bytes-per-second or --max-concurrency"
        )
    with catalogue() as context:
        context.transact(lambda c: set_link(c, source, destination, changes))
    print(f"link {source} to {destination} changed")


@link_app.command("list")
@plain_errors
def link_list(as_json: Json = False) -> None:
    """List the links that have limits."""
    from dlm_core.catalogue.traffic import list_links

    with catalogue() as context:
        found = context.transact(list_links)
    columns = {"source": "FROM", "destination": "TO", "max_bytes_per_second": "BYTES/S",
               "max_concurrency": "FILES AT ONCE"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


@plain_errors
def operations(
    running: Annotated[
        bool, typer.Option("--running", help="The larger ones at work now, with their progress.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show file work by kind and state, or what is at work now."""
    from dlm_core.catalogue.status import count_operations
    from dlm_core.catalogue.traffic import list_running

    with catalogue() as context:
        now = context.clock()
        if not running:
            counts = context.transact(lambda c: count_operations(c, now))
            found = [
                {"kind": kind, "state": state, "operations": number}
                for kind, states in counts.items()
                for state, number in states.items()
            ]
        else:
            found = context.transact(lambda c: list_running(c, now))
    columns = {"kind": "KIND", "state": "STATE", "operations": "OPERATIONS"}
    if running:
        columns = {
            "kind": "KIND", "uri": "URI", "storage": "STORAGE", "step": "STEP",
            "done_bytes": "DONE", "total_bytes": "OF", "rate_bytes": "A SECOND", "since": "SINCE",
            "worker": "WORKER",
        }  # fmt: skip
        found = [row | {"rate_bytes": row["bytes_per_second"]} for row in found]
    show_json(found) if as_json else show_table(found, columns)
