"""``dlm backup``, ``dlm db restore``: the catalogue out of harm's way, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlm_cli.session import (
    catalogue,
    existing_catalogue,
    human_size,
    person_named,
    plain_errors,
    show_json,
)
from dlm_core.errors import InvalidValueError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@plain_errors
def backup(
    target: Annotated[Path, typer.Argument(help="A new file, or a folder for one.")],
    with_dagster: Annotated[
        bool, typer.Option("--with-dagster", help="Dagster's database too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a backup of the catalogue, with a manifest beside it. The services may run."""
    from dlm_core.catalogue.backup import back_up
    from dlm_core.catalogue.dsn import dagster_dsn
    from dlm_core.clock import utc_now
    from dlm_core.settings import load_settings

    settings = load_settings()
    made = back_up(
        existing_catalogue(settings),
        target,
        now=utc_now(),
        dagster_url=dagster_dsn(settings) if with_dagster else None,
        bindir=settings.pg_bindir,
    )
    if as_json:
        show_json({"path": str(made.path), **made.manifest})
        return
    found = made.manifest
    size = human_size(sum(file["size"] for file in found["files"].values()))
    print(f"{made.path}: {found['items']} items, {found['replicas']} replicas, {size}")


@plain_errors
def restore(
    file: Annotated[Path, typer.Argument(help="The backup; its manifest lies beside it.")],
    into_existing: Annotated[
        str | None,
        typer.Option(help="The database's name, if it has items; they are set aside."),
    ] = None,
    with_dagster: Annotated[
        bool, typer.Option("--with-dagster", help="Dagster's database too.")
    ] = False,
) -> None:
    """Bring a catalogue back from a backup. Nothing is deleted on its word afterwards."""
    from dlm_core.catalogue.backup import read_backup, restore, restore_dagster
    from dlm_core.catalogue.dsn import catalogue_url, dagster_dsn
    from dlm_core.catalogue.recovery import note_recovery
    from dlm_core.clock import utc_now
    from dlm_core.settings import load_settings

    settings, now = load_settings(), utc_now()
    made = read_backup(file)
    _must_be_stopped()
    url, actor = catalogue_url(settings), person_named()
    bindir = settings.pg_bindir
    aside = restore(url, made, actor=actor, now=now, into_existing=into_existing, bindir=bindir)
    with catalogue() as context:
        context.transact(note_recovery)
    print(f"the catalogue is as it was at {made.manifest['made_at']}")
    _tell_aside(aside)
    if with_dagster:
        replace = into_existing is not None
        dagster = dagster_dsn(settings)
        _tell_aside(restore_dagster(dagster, made, now=now, replace=replace, bindir=bindir))
        print("and so is Dagster's database")
    print(
        "what it says is no proof: copies are deleted only beside others that were looked at since "
        "('dlm verify --all'), and no item expires before 'dlm db confirm'"
    )


def _tell_aside(aside: str | None) -> None:
    if aside is not None:
        print(f"what was there is set aside in the schema {aside}")


def _must_be_stopped() -> None:
    from dlm_cli.services import read_services
    from dlm_core.errors import AlreadyRunningError
    from dlm_core.settings import load_settings

    home = load_settings().home
    found = read_services(home)
    if found is not None:
        pid = found["pids"].get("supervisor", "?")
        raise AlreadyRunningError(home=home, pid=pid, ui_url=found["ui_url"])


@plain_errors
def confirm() -> None:
    """Say that holds and times of expiry are right after a restore: items may expire again."""
    from dlm_core.catalogue.recovery import confirm

    with catalogue() as context:
        context.transact(lambda c: confirm(c, context.actor, context.clock()))
    print("items may expire again")


@plain_errors
def distrust(
    source: Annotated[str, typer.Argument(help="What it was brought back from, for the log.")],
) -> None:
    """Say that this catalogue was brought back by other means than 'dlm db restore'."""
    from dlm_core.catalogue.recovery import distrust

    if not source.strip():
        raise InvalidValueError(what="source", value=source, expected="what it was brought from")
    with catalogue() as context:
        context.transact(lambda c: distrust(c, source, context.actor, context.clock()))
    print("nothing is deleted on this catalogue's word: see 'dlm verify --all', 'dlm db confirm'")
