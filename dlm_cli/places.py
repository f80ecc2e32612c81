"""``dlm location …`` and ``dlm storage …``."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm_cli.rules import read_rules
from dlm_cli.session import (
    catalogue,
    human_size,
    parse_choice,
    parse_duration,
    parse_pairs,
    parse_size,
    plain_errors,
    show_json,
    show_table,
)
from dlm_core.errors import InvalidValueError

if TYPE_CHECKING:
    from dlm_core.lifecycle.rules import Trial

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the storage.")]
_NO_LIMIT = ("0", "unlimited", "none")
_PHASES = ("PLASMA", "GAS", "LIQUID", "SOLID")

Every = Annotated[
    str | None, typer.Option("--verify-every", help="Read copies again after 90d; or never.")
]
PerSecond = Annotated[
    str | None, typer.Option("--verify-per-second", help="Read at most 50MB; or unlimited.")
]
PerDay = Annotated[
    str | None, typer.Option("--verify-per-day", help="Read at most 2TB a day; or unlimited.")
]
MaxRate = Annotated[
    str | None,
    typer.Option(
        "--max-bytes-per-second", help="All drainers together read and write at most 100M; or 0."
    ),
]
MaxFiles = Annotated[
    str | None,
    typer.Option("--max-concurrency", help="All drainers together: files at once; or 0."),
]

location_app = typer.Typer(no_args_is_help=True, help="Places with a failure domain of their own.")
storage_app = typer.Typer(no_args_is_help=True, help="Volumes that hold replicas.")


@location_app.command("add")
@plain_errors
def location_add(
    name: Annotated[str, typer.Argument(help="e.g. observatory")],
    facility: Annotated[str | None, typer.Option(help="Whose place it is.")] = None,
    city: Annotated[str | None, typer.Option(help="Where it is.")] = None,
    country: Annotated[str | None, typer.Option(help="Two letters, e.g. ZA.")] = None,
) -> None:
    """Add a location."""
    from dlm_core.catalogue.places import add_location

    with catalogue() as context:
        context.transact(
            lambda c: add_location(
                c, name, facility=facility, city=city, country=country, now=context.clock()
            )
        )
    print(f"location {name} added")


@location_app.command("list")
@plain_errors
def location_list(as_json: Json = False) -> None:
    """List locations."""
    from dlm_core.catalogue.places import list_locations

    with catalogue() as context:
        found = context.transact(list_locations)
    columns = {"name": "NAME", "facility": "FACILITY", "city": "CITY", "country": "COUNTRY",
               "storages": "STORAGES"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


_ROOT_HELP = (
    "/folder (posix), bucket/prefix (s3), user@host:port/folder (sftp), URL (webdav, http, "
    "xrootd), path on the remote (rclone)."
)
_INTERFACE_HELP = "posix, s3, sftp, webdav, http, rclone, xrootd. Others by entry point."


@storage_app.command("add")
@plain_errors
def storage_add(
    name: Name,
    location: Annotated[str, typer.Option(help="Name of its location.")],
    root: Annotated[str, typer.Option(help=_ROOT_HELP)],
    phase: Annotated[str, typer.Option(help="PLASMA, GAS, LIQUID or SOLID.")] = "LIQUID",
    interface: Annotated[str, typer.Option(help=_INTERFACE_HELP)] = "posix",
    storage_class: Annotated[
        str | None, typer.Option("--class", help="disk, object, tape.")
    ] = None,
    config: Annotated[
        list[str], typer.Option(help="key=value; secrets only by reference, env:NAME.")
    ] = [],  # noqa: B006
    capacity: Annotated[str | None, typer.Option(help="e.g. 2TB; unset: ask the storage.")] = None,
    high_watermark: Annotated[float | None, typer.Option(help="Fraction, 0.9.")] = None,
    low_watermark: Annotated[float | None, typer.Option(help="Fraction, 0.8.")] = None,
    trash_grace: Annotated[str | None, typer.Option(help="e.g. 7d")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Transfers at once.")] = None,
    verify_every: Every = None,
    verify_per_second: PerSecond = None,
    verify_per_day: PerDay = None,
    max_bytes_per_second: MaxRate = None,
    max_concurrency: MaxFiles = None,
    unmanaged: Annotated[
        bool, typer.Option("--unmanaged", help="Others' files: only read, never changed.")
    ] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="No copies for now.")] = False,
    path_rules: Annotated[
        str | None,
        typer.Option("--path-rules", help="TOML or YAML file of rules for paths, from the first."),
    ] = None,
) -> None:
    """Add a storage; it is looked at first."""
    from dlm_core.lifecycle.identity import join_storage
    from dlm_core.storages.posix import mount_point

    terms = _verify_options(verify_every, verify_per_second, verify_per_day)
    terms |= limit_options(max_bytes_per_second, max_concurrency)
    own = _options(capacity, high_watermark, low_watermark, trash_grace, concurrency)
    chosen = parse_pairs(config, "--config")
    default_class = "object" if interface == "s3" else "disk"
    # what can only be read from is others' by nature
    managed = not unmanaged and interface != "http"
    if interface == "posix" and (mounted := mount_point(root)) != "/":
        # the empty folder that is left when a disk goes is no empty storage
        chosen.setdefault("mount", mounted)
    with catalogue() as context:
        trial = join_storage(
            context,
            name,
            location=location,
            interface=interface,
            root=root,
            phase=parse_choice("phase", phase, _PHASES) or "",
            storage_class=parse_choice(
                "class", storage_class or default_class, ("disk", "object", "tape")
            ),
            config=chosen,
            managed=managed,
            mode="read_only" if read_only or not managed else "read_write",
            options=own | terms,
            rules=read_rules(path_rules) if path_rules is not None else None,
            # never is no default
            unset=[key for key, value in terms.items() if value is None],
        )
    if trial is not None:
        _show_trial(trial)
    print(f"storage {name} added at {location}")
    if chosen.get("mount", "/") != "/":
        print(f"it counts as unreachable unless something is mounted at {chosen['mount']}")


def _options(
    capacity: str | None,
    high: float | None,
    low: float | None,
    grace: str | None,
    concurrency: int | None,
) -> dict[str, Any]:
    return {
        "capacity_bytes": parse_size(capacity),
        "high_watermark": high,
        "low_watermark": low,
        "trash_grace": parse_duration(grace),
        "concurrency": concurrency,
    }


def _verify_options(
    every: str | None, per_second: str | None, per_day: str | None
) -> dict[str, int | None]:
    """What was given of the verification's terms; never and unlimited are None."""
    found: dict[str, int | None] = {}
    if every is not None:
        found["verify_every_days"] = None if every == "never" else _parse_days(every)
    for key, text in (("verify_bytes_per_second", per_second), ("verify_bytes_per_day", per_day)):
        if text is not None:
            found[key] = None if text == "unlimited" else parse_size(text)
    return found


def _parse_days(text: str) -> int:
    """A whole number of days, at least 1.

    Raises
    ------
    InvalidValueError
    """
    days, rest = divmod(parse_duration(text) or timedelta(), timedelta(days=1))
    # a year is no whole number of them itself
    if days < 1 or (rest and not text.strip().endswith("y")):
        raise InvalidValueError(
            what="--verify-every", value=text, expected="whole days, such as 1d or 12w; or never"
        )
    return days


def limit_options(rate: str | None, files: str | None) -> dict[str, int | None]:
    """What was given of limits; 0 and unlimited are None."""
    found: dict[str, int | None] = {}
    if rate is not None:
        found["max_bytes_per_second"] = None if rate in _NO_LIMIT else parse_rate(rate)
    if files is not None:
        found["max_concurrency"] = None if files in _NO_LIMIT else parse_count(files)
    return found


def parse_rate(text: str) -> int | None:
    """Bytes a second from ``100M``, ``100MB`` or ``100MB/s``; None for 0.

    Raises
    ------
    InvalidValueError
    """
    rate = parse_size(text.removesuffix("/s"))
    if rate == 0 and not re.fullmatch(r"0+(\.0+)?\s*[kMGTPE]?i?B?", text.removesuffix("/s")):
        raise InvalidValueError(
            what="max_bytes_per_second", value=text, expected="a whole number of bytes, or 0"
        )
    return rate or None


def parse_count(text: str) -> int | None:
    """A whole number; None for 0.

    Raises
    ------
    InvalidValueError
    """
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InvalidValueError(
            what="max_concurrency", value=text, expected="a whole number, or 0 for no limit"
        )
    return int(text) or None


@storage_app.command("list")
@plain_errors
def storage_list(as_json: Json = False) -> None:
    """List storages with their fill."""
    from dlm_core.catalogue.places import list_storages

    with catalogue() as context:
        found = context.transact(list_storages)
    columns = {
        "name": "NAME", "location": "LOCATION", "interface": "INTERFACE", "phase": "PHASE",
        "mode": "MODE", "replicas": "REPLICAS", "used_bytes": "USED", "capacity_bytes": "CAPACITY",
        "fill_fraction": "FILL",
    }  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


@storage_app.command("show")
@plain_errors
def storage_show(name: Name, as_json: Json = False) -> None:
    """Show all of one storage."""
    from dlm_core.catalogue.places import (
        count_announced,
        count_stuck,
        drain_progress,
        get_storage,
    )
    from dlm_core.catalogue.staging import waiting_overview

    with catalogue() as context:
        found = context.transact(lambda c: get_storage(c, name))
        drain = drain_progress(found, context.clock())
        if drain is not None:
            storage_id = found["storage_id"]
            found["drain"] = drain | {
                "stuck_items": context.transact(lambda c: count_stuck(c, storage_id)),
                "announced": context.transact(lambda c: count_announced(c, storage_id)),
            }
        waiting = context.transact(
            lambda c: waiting_overview(c, context.clock(), found["storage_id"])
        )
        if "stage" in found["config"]:
            found["staging"] = waiting[0] if waiting else {"files": 0}
    if as_json:
        show_json(found)
    else:
        from dlm_cli.session import human

        progress = found.pop("drain", {})
        waits = found.pop("staging", {})
        told = found | {f"drain_{key}": value for key, value in progress.items()}
        told |= {f"staging_{key}": value for key, value in waits.items() if key != "storage"}
        rows = [{"key": key, "value": human(value, key)} for key, value in told.items()]
        show_table(rows, {"key": "", "value": ""})


@storage_app.command("usage")
@plain_errors
def storage_usage(
    name: Name,
    inventory: Annotated[
        bool, typer.Option("--inventory", help="List the storage and tell what really lies there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what the catalogue counts on a storage, what the storage says, and what lies there."""
    from dlm_core.catalogue.places import get_storage
    from dlm_core.lifecycle.inventory import take_inventory

    with catalogue() as context:
        row = context.transact(lambda c: get_storage(c, name))
        keys = ("replicas", "replica_bytes", "trashed_bytes", "used_bytes", "capacity_bytes",
                "observed_total_bytes", "observed_used_bytes", "observed_at")  # fmt: skip
        told = {key: row[key] for key in keys}
        if inventory:
            found = take_inventory(context, name)
            for share in ("copies", "trash", "own", "foreign", "old_versions"):
                for unit in ("files", "bytes"):
                    told[f"{share}_{unit}"] = getattr(getattr(found, share), unit, None)
            told["foreign_first"] = found.examples
    if as_json:
        show_json(told)
        return
    from dlm_cli.session import human

    first = told.pop("foreign_first", [])
    show_table([{"k": k, "v": human(v, k)} for k, v in told.items()], {"k": "", "v": ""})
    for path in first:
        print(f"not the DLM's: {path!r}")


@storage_app.command("pack")
@plain_errors
def storage_pack(
    name: Name,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be.")] = False,
    reindex: Annotated[
        bool, typer.Option("--reindex", help="Make a lost index anew from the bundles.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put small files of a storage into bundles, and make half-empty bundles anew."""
    from dataclasses import asdict

    from dlm_core.lifecycle.pack import pack_storage, rebuild_storage_index

    if dry_run and reindex:
        raise InvalidValueError(what="--dry-run", value="", expected="not with --reindex")
    found: Any
    with catalogue() as context:
        if reindex:
            found = rebuild_storage_index(context, name)
            told = f"index made anew: {found.members} members in {found.bundles} bundles; "
            told += f"{len(found.damaged)} damaged, {len(found.unreadable)} bundles unreadable"
        else:
            found = pack_storage(context, name, dry_run=dry_run)
            told = f"{'would pack' if dry_run else 'packed'} {found.members} files "
            told += f"({human_size(found.bytes)}) into {found.bundles} bundles, {found.moved} of "
            told += f"them out of older ones; removed {found.removed} bundles "
            told += f"({human_size(found.freed)}), refused {len(found.refused)}, "
            told += f"{found.waiting} wait"
    show_json(asdict(found)) if as_json else print(f"storage {name}: {told}")


@storage_app.command("set")
@plain_errors
def storage_set(
    name: Name,
    mode: Annotated[str | None, typer.Option(help="read_write, read_only or offline.")] = None,
    phase: Annotated[str | None, typer.Option(help="PLASMA, GAS, LIQUID or SOLID.")] = None,
    capacity: Annotated[
        str | None, typer.Option(help="e.g. 2TB; none: the storage is asked.")
    ] = None,
    high_watermark: Annotated[float | None, typer.Option(help="Fraction, 0.9.")] = None,
    low_watermark: Annotated[float | None, typer.Option(help="Fraction, 0.8.")] = None,
    trash_grace: Annotated[str | None, typer.Option(help="e.g. 7d")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Transfers at once.")] = None,
    verify_every: Every = None,
    verify_per_second: PerSecond = None,
    verify_per_day: PerDay = None,
    max_bytes_per_second: MaxRate = None,
    max_concurrency: MaxFiles = None,
    path_rules: Annotated[
        str | None,
        typer.Option("--path-rules", help="TOML or YAML file of rules for paths; or none."),
    ] = None,
    config: Annotated[
        list[str], typer.Option(help="key=value; key= takes it away. The place has to be the same.")
    ] = [],  # noqa: B006
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --path-rules alone: try them, change nothing.")
    ] = False,
) -> None:
    """Change a storage; what is not named stays."""
    asked = capacity == "none"
    size = None if asked else capacity
    options = _options(size, high_watermark, low_watermark, trash_grace, concurrency)
    options["mode"] = parse_choice("mode", mode, ("read_write", "read_only", "offline"))
    options["phase"] = parse_choice("phase", phase, _PHASES)
    changes = {key: value for key, value in options.items() if value is not None}
    changes |= {"capacity_bytes": None} if asked else {}
    changes |= _verify_options(verify_every, verify_per_second, verify_per_day)
    changes |= limit_options(max_bytes_per_second, max_concurrency)
    if dry_run and (changes or config or path_rules is None):
        raise InvalidValueError(what="--dry-run", value="", expected="--path-rules, and only that")
    given = [name for name, one in (("--path-rules", path_rules), ("--config", config)) if one]
    if not (changes or given):
        raise InvalidValueError(what="changes", value="", expected="an option, see --help")
    if len(given) + bool(changes) > 1:
        # each is tried at the storage first: of two the second may be refused
        raise InvalidValueError(what=given[0], value="", expected="a command of its own")
    if path_rules is not None:
        _set_paths(name, path_rules, dry_run=dry_run)
    if config:
        _set_config(name, config)
    _change(name, changes)
    print(f"storage {name}: nothing was changed" if dry_run else f"storage {name} changed")


def _set_config(name: str, pairs: list[str]) -> None:
    from dlm_core.lifecycle.identity import change_config

    with catalogue() as context:
        change_config(context, name, parse_pairs(pairs, "--config"))


def _set_paths(name: str, file: str, *, dry_run: bool) -> None:
    from dlm_core.lifecycle.rules import set_rules

    rules = None if file == "none" else read_rules(file)
    with catalogue() as context:
        _show_trial(set_rules(context, name, rules, dry_run=dry_run))


def _show_trial(trial: Trial) -> None:
    columns = {"rule": "RULE", "uri": "URI", "version": "VERSION", "path": "PATH"}
    if trial.examples:
        show_table(sorted(trial.examples, key=lambda one: one["rule"]), columns)
    counts = ", ".join(
        f"{n} by rule {rule}" if rule else f"{n} by none"
        for rule, n in sorted(trial.by_rule.items())
    )
    print(
        f"tried on {trial.items} items: {counts or 'none is new'}; "
        f"{trial.kept} have a copy there and keep its place"
    )


@storage_app.command("path")
@plain_errors
def storage_path(
    name: Name,
    uri: Annotated[str, typer.Argument(help="e.g. ska:eb-1/scan-3.ms")],
    version: Annotated[
        int | None, typer.Option(help="Unset: the newest.", min=1, max=2**31 - 1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where the copy of an item lies on a storage, or would lie."""
    from dlm_core.lifecycle.rules import find_place

    with catalogue() as context:
        found = context.transact(lambda c: find_place(c, name, uri, version))
    show_json(found) if as_json else print(found["path"])


@storage_app.command("drain")
@plain_errors
def storage_drain(name: Name) -> None:
    """Move everything off a storage; nothing goes before its replacement is verified."""
    _change(name, {"mode": "draining"})
    print(f"storage {name} is being drained; watch it with: dlm storage show {name}")


def _change(name: str, changes: dict[str, Any]) -> None:
    from dlm_core.catalogue.places import set_storage

    with catalogue() as context:
        context.transact(lambda c: set_storage(c, name, changes))


@storage_app.command("retire")
@plain_errors
def storage_retire(
    name: Name,
    give_up: Annotated[
        bool,
        typer.Option("--give-up", help="A lost one: it never comes back, what it held is gone."),
    ] = False,
) -> None:
    """Take an empty storage out of use for good."""
    from dlm_core.catalogue.places import retire_storage

    with catalogue() as context:
        context.transact(lambda c: retire_storage(c, name, context.clock(), give_up=give_up))
    print(f"storage {name} is retired")


@storage_app.command("lost")
@plain_errors
def storage_lost(
    name: Name,
    reason: Annotated[str, typer.Option(help="What happened.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what it holds alone.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Items to list.", min=0)] = 1000,
    as_json: Json = False,
) -> None:
    """Declare a broken storage lost: nothing on it counts, what is missing is made again."""
    from dlm_core.lifecycle.lost import lose_storage, propose_loss

    with catalogue() as context:
        if dry_run:
            found = propose_loss(context, name, limit)
        else:
            found = lose_storage(context, name, reason, limit)
    if as_json:
        show_json(found)
        return
    alone = found["alone"]
    if alone["listed"]:
        columns = {
            "uri": "URI",
            "version": "VERSION",
            "state": "STATE",
            "size": "SIZE",
            "path": "PATH",
        }
        show_table(alone["listed"], columns)
    print(
        f"storage {name} {'would lose' if dry_run else 'has lost'} {found['replicas']} replicas; "
        f"of {alone['items']} items ({human_size(alone['bytes'])}) no other storage has a good copy"
    )
    if alone["offline"]:
        print(f"of {alone['offline']} items the only others are on storages that are offline")


@storage_app.command("back")
@plain_errors
def storage_back(name: Name) -> None:
    """Take back a lost or offline storage: all on it is read again before it counts."""
    from dlm_core.lifecycle.lost import take_back

    with catalogue() as context:
        take_back(context, name)
    print(
        f"storage {name} is audited by the verification job; watch it with: dlm storage show {name}"
    )
