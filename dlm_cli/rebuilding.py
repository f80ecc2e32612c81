"""``dlm storage export``, ``dlm rebuild``: storages that say what they hold, and the way back."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm_cli.session import catalogue, human_size, parse_pairs, plain_errors, show_json
from dlm_core.errors import InvalidValueError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@plain_errors
def storage_export(
    name: Annotated[str, typer.Argument(help="Name of the storage.")],
    full: Annotated[bool, typer.Option("--full", help="All files, not only changed ones.")] = False,
    as_json: Json = False,
) -> None:
    """Write onto a storage what the catalogue knows of it, for 'dlm rebuild'."""
    from dlm_core.lifecycle.export import export_storage

    with catalogue() as context:
        report = export_storage(context, name, full=full)
    if as_json:
        show_json(asdict(report))
        return
    print(
        f"storage {name} carries description {report.generation}: {report.replicas} replicas in "
        f"{report.files} files, {report.written} of them new ({human_size(report.bytes)})"
    )


@plain_errors
def rebuild(
    storage: Annotated[
        list[str],
        typer.Option(help="interface:root[,key=value…], e.g. posix:/data; repeat it for each."),
    ] = [],  # noqa: B006
    file: Annotated[
        Path | None, typer.Option("--from", help="A TOML file that names them: [[storage]] …")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a lost catalogue again, in an empty one, from what storages carry of themselves."""
    from dlm_core.lifecycle.rebuild import Place, rebuild

    places = [Place(*_place(text)) for text in storage]
    places += [Place(*one) for one in (_read(file) if file else [])]
    if not places:
        raise InvalidValueError(
            what="rebuild", value="", expected="--storage interface:root or --from FILE"
        )
    with catalogue() as context:
        report = rebuild(context, places)
    if as_json:
        show_json(asdict(report))
        return
    for problem in report.problems:
        print(f"problem: {problem}")
    for why, count in sorted(report.left_out.items()):
        print(f"left out: {count} copies {why}")
    print(
        f"{report.items} items, {report.replicas} replicas, {report.collections} collections, "
        f"{report.holds} holds on {', '.join(report.storages)}"
    )
    if report.differing:
        print(f"{report.differing} items were told differently; the newest description was taken")
    print(
        "no copy counts before it was read: a look at each is queued, 'dlm up' takes them; no item "
        "expires before 'dlm db confirm'"
    )


def _place(text: str) -> tuple[str, str, dict[str, Any]]:
    interface, colon, rest = text.partition(":")
    root, *pairs = rest.split(",")
    if not colon or not interface or not root:
        raise InvalidValueError(
            what="--storage", value=text, expected="interface:root[,key=value…], or use --from FILE"
        )
    return interface, root, parse_pairs(pairs, "--storage")


def _read(file: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """What a TOML file names: ``[[storage]]`` with interface, root and config."""
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
        return [
            (str(one["interface"]), str(one["root"]), dict(one.get("config", {})))
            for one in told["storage"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValueError(
            what="--from", value=str(file),
            expected=f"TOML with [[storage]] interface, root and config ({error})",
        ) from None  # fmt: skip
