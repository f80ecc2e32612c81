"""``dlm watch``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dlm_cli.items import PHASES, Json, below_root
from dlm_cli.session import (
    catalogue,
    parse_choice,
    parse_duration,
    parse_pairs,
    plain_errors,
    say,
    show_json,
    show_table,
)

watch_app = typer.Typer(no_args_is_help=True, help="Folders whose new files are registered.")


@watch_app.command("add")
@plain_errors
def watch_add(
    storage: Annotated[str, typer.Argument(help="Name of the storage.")],
    path: Annotated[str, typer.Argument(help="Folder below its root.")] = "",
    scheme: Annotated[str, typer.Option(help="Scheme of the uris.")] = "file",
    prefix: Annotated[str, typer.Option(help="Put before each path in the uri.")] = "",
    every: Annotated[str, typer.Option(help="Look so often, 1s at least.")] = "30s",
    as_directory: Annotated[
        list[str], typer.Option(help="Pattern of folders that are one payload each, '*.ms'.")
    ] = [],  # noqa: B006
    collection: Annotated[str | None, typer.Option(help="Made if there is none.")] = None,
    target_phase: Annotated[str, typer.Option(help="PLASMA, GAS, LIQUID or SOLID.")] = "SOLID",
    owner: Annotated[str | None, typer.Option(help="Whose the items are.")] = None,
    tag: Annotated[list[str], typer.Option(help="key=value")] = [],  # noqa: B006
    new_version: Annotated[
        bool, typer.Option("--new-version", help="Changed payloads become new versions.")
    ] = False,
) -> None:
    """Register what appears in a folder and has stopped growing."""
    from datetime import timedelta

    from dlm_core.catalogue.items import Terms
    from dlm_core.lifecycle.register import Source, collection_id
    from dlm_core.lifecycle.watch import add_watch, check_watch, is_there

    phase = parse_choice("target phase", target_phase, PHASES) or ""
    terms = Terms(phase, None, owner, parse_pairs(tag, "--tag"))
    interval = parse_duration(every) or timedelta()
    folder = below_root(path)
    source = Source(storage, scheme, prefix, tuple(as_directory), {}, new_version, terms)
    with catalogue() as context:
        check_watch(source, interval)
        there = is_there(context, storage, folder)
        if collection is not None:
            # last: what is refused makes none
            terms = replace(terms, collection_id=collection_id(context, collection))
            source = replace(source, terms=terms)
        add_watch(context, source, folder, interval=interval)
    print(f"watching {storage}:{path or '/'}{'' if there else ', which is not there yet'}")


@watch_app.command("list")
@plain_errors
def watch_list(as_json: Json = False) -> None:
    """List watched folders."""
    from dlm_core.catalogue.watches import list_watches

    with catalogue() as context:
        found = context.transact(list_watches)
    columns = {"storage": "STORAGE", "path": "PATH", "scheme": "SCHEME", "interval": "EVERY",
               "collection": "COLLECTION", "options": "OPTIONS", "scan_at": "NEXT LOOK",
               "waiting": "NOT SETTLED", "refused": "REFUSED"}  # fmt: skip
    if as_json:
        show_json(found)
        return
    show_table(found, columns)
    for watch in found:
        for path, why in (watch["refusals"] or {}).items():
            say(f"refused {watch['storage']}:{path}: {why}")


@watch_app.command("remove")
@plain_errors
def watch_remove(
    storage: Annotated[str, typer.Argument(help="Name of the storage.")],
    path: Annotated[str, typer.Argument(help="Folder below its root.")] = "",
) -> None:
    """Watch a folder no longer; what was registered stays."""
    from dlm_core.catalogue.watches import remove_watch
    from dlm_core.types import encode_path

    folder = path.strip("/")
    encoded = encode_path(folder) if folder else ""
    with catalogue() as context:
        context.transact(lambda c: remove_watch(c, storage, encoded))
    print(f"{storage}:{path or '/'} is watched no longer")
