"""``dlm register``, ``item``, ``expire``, ``restore``, ``withdraw``, ``verify``, ``retry``."""

from __future__ import annotations

import re
import shlex
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dlm_cli.session import (
    catalogue,
    human,
    parse_choice,
    parse_duration,
    parse_pairs,
    parse_time,
    plain_errors,
    printable,
    say,
    show_json,
    show_table,
)
from dlm_core.errors import EmptySelectorError, InvalidValueError
from dlm_core.types import OperationKind

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Uri = Annotated[str, typer.Argument(help="e.g. ska:eb-1/scan-3.ms")]
Version = Annotated[
    int | None, typer.Option(min=1, max=2**31 - 1, help="Another than the newest version.")
]
Priority = Annotated[int | None, typer.Option(help="-9 (first) to 9 (last); unset: 0.")]
By = Annotated[
    str | None, typer.Option(help="When all copies are needed: 12h, or a time with its zone.")
]
PHASES = ("PLASMA", "GAS", "LIQUID", "SOLID")
_KINDS = ", ".join(OperationKind)
_POLL_SECONDS = 0.5

_Named = TypeVar("_Named", list[str], dict[str, str])

item_app = typer.Typer(no_args_is_help=True, help="Data items: look, and ask why.")


@plain_errors
def register(
    storage: Annotated[str, typer.Argument(help="Name of the storage the payloads lie on.")],
    path: Annotated[str, typer.Argument(help="File or folder below its root.")] = "",
    scheme: Annotated[str, typer.Option(help="Scheme of the uris.")] = "file",
    prefix: Annotated[str, typer.Option(help="Put before each path in the uri.")] = "",
    as_directory: Annotated[
        list[str], typer.Option(help="Pattern of folders that are one payload each, '*.ms'.")
    ] = [],  # noqa: B006
    list_file: Annotated[
        Path | None, typer.Option("--list", help="File with one path a line; - is stdin.")
    ] = None,
    checksums: Annotated[
        Path | None, typer.Option(help="A SHA256SUMS file; compared, not trusted.")
    ] = None,
    collection: Annotated[str | None, typer.Option(help="Made if there is none.")] = None,
    target_phase: Annotated[str, typer.Option(help="PLASMA, GAS, LIQUID or SOLID.")] = "SOLID",
    expires: Annotated[str | None, typer.Option(help="Of the items: 90d, or a time.")] = None,
    replica_expires: Annotated[str | None, typer.Option(help="Of these copies only.")] = None,
    priority: Priority = None,
    by: By = None,
    owner: Annotated[str | None, typer.Option(help="Whose the items are.")] = None,
    tag: Annotated[list[str], typer.Option(help="key=value")] = [],  # noqa: B006
    new_version: Annotated[
        bool, typer.Option("--new-version", help="Changed payloads become new versions.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Announce payloads where they lie; the registration job reads and admits them."""
    from dlm_core.catalogue.items import Terms
    from dlm_core.catalogue.urgency import Urgency
    from dlm_core.lifecycle.register import (
        Source,
        collection_id,
        register_list,
        register_tree,
        storage_by_name,
    )
    from dlm_core.transfers.checksums import parse_checksums
    from dlm_core.types import make_uri

    make_uri(scheme, f"{prefix}x")  # told once, not for every payload
    below = below_root(path)
    if path and list_file:
        raise InvalidValueError(what="--list", value=path, expected="a path, or a list of them")
    sums = _named("--checksums", parse_checksums(_read(checksums))) if checksums else {}
    paths = _named("--list", _lines(_read(list_file))) if list_file else None
    with catalogue() as context:
        now = context.clock()
        terms = Terms(
            parse_choice("target phase", target_phase, PHASES) or "",
            None,
            owner,
            parse_pairs(tag, "--tag"),
            parse_time(expires, now),
            parse_time(replica_expires, now),
            Urgency(priority or 0, parse_time(by, now)),
        )
        terms.check(now)
        source = Source(storage, scheme, prefix, tuple(as_directory), sums, new_version, terms)
        storage_by_name(context, storage)
        if collection is not None:
            # last: what is refused makes none
            terms = replace(terms, collection_id=collection_id(context, collection))
            source = replace(source, terms=terms)
        if paths is not None:
            report = register_list(context, source, paths, _progress)
        else:
            report = register_tree(context, source, below, _progress)
    _tell(report, as_json)


def _named(option: str, found: _Named) -> _Named:
    """What a file names, which must not be nothing."""
    if not found:
        raise EmptySelectorError(expected=f"{option} names no path")
    return found


def _read(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InvalidValueError(
            what="file", value=str(path), expected=f"a readable file ({error.strerror})"
        ) from None
    return data.decode("utf-8", "surrogateescape")


def below_root(path: str) -> str:
    """A path on a storage as the catalogue has it.

    Raises
    ------
    InvalidValueError
        if it is absolute.
    """
    if path.startswith("/") and path != "/":
        raise InvalidValueError(what="path", value=path, expected="one below the storage's root")
    return path.strip("/")


def _lines(text: str) -> list[str]:
    # at newlines only: names may have what else ends a line for Python
    return [line for one in text.split("\n") if (line := one.removesuffix("\r"))]


def _progress(report: Any) -> None:
    if sys.stderr.isatty():
        print(f"\r{report.created + report.unchanged} announced", end="\r", file=sys.stderr)


def _tell(report: Any, as_json: bool) -> None:
    numbers = {
        key: getattr(report, key)
        for key in ("created", "replicated", "unchanged", "new_versions", "refused", "skipped")
    }
    if as_json:
        reasons = [{"path": path, "reason": reason} for path, reason in report.reasons]
        show_json({**numbers, "reasons": reasons})
    else:
        print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in numbers.items()))
        for path, reason in report.reasons[:20]:
            print(printable(f"  {path!r}: {reason}"), file=sys.stderr)
    if report.refused:
        raise SystemExit(2)


@item_app.command("list")
@plain_errors
def item_list(
    state: Annotated[str | None, typer.Option(help="READY, INITIALISED, …")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Uris that begin so; with * or ? a whole pattern.")
    ] = None,
    collection: Annotated[str | None, typer.Option(help="Items of it.")] = None,
    storage: Annotated[str | None, typer.Option(help="Items with a copy there.")] = None,
    below_target: Annotated[
        bool, typer.Option("--below-target", help="Items that lack copies.")
    ] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Items that no storage has a good copy of.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Items a page.")] = 100,
    after: Annotated[
        str | None, typer.Option(help="uri#version of the last item of the page before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List items by uri, a page at a time."""
    from dlm_core.catalogue.browse import list_items
    from dlm_core.types import ItemState

    chosen = parse_choice("state", state, [one.value for one in ItemState])
    with catalogue() as context:
        found = context.transact(
            lambda c: list_items(
                c, state=chosen, prefix=prefix, collection=collection, storage=storage,
                below_target=below_target, lost=lost, limit=limit, after=after,
            )
        )  # fmt: skip
    columns = {"uri": "URI", "version": "V", "state": "STATE", "size": "SIZE",
               "target_phase": "TARGET", "shortfall": "SHORTFALL"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)
    if len(found) == limit:
        last = f"{found[-1]['uri']}#{found[-1]['version']}"
        print(f"there may be more: --after {shlex.quote(last)}", file=sys.stderr)


@item_app.command("set")
@plain_errors
def item_set(
    uri: Annotated[str | None, typer.Argument(help="An item.")] = None,
    collection: Annotated[
        str | None, typer.Option(help="All items of it, and of collections in it.")
    ] = None,
    priority: Priority = None,
    by: Annotated[
        str | None, typer.Option(help="When all copies are needed: 12h, a time; or never.")
    ] = None,
    version: Version = None,
) -> None:
    """Let copies of an item or a collection be made before or after others, or by a time."""
    from dlm_core.catalogue.browse import get_item
    from dlm_core.catalogue.items import Terms
    from dlm_core.catalogue.urgency import Urgency, items_in, set_urgency

    if (uri is None) == (collection is None):
        raise EmptySelectorError(expected="name one item, or --collection")
    changes: dict[str, Any] = {}
    if priority is not None:
        changes["priority"] = Urgency(priority).priority
    with catalogue() as context:
        if by is not None:
            now = context.clock()
            moment = None if by == "never" else parse_time(by, now)
            Terms(urgency=Urgency(needed_by=moment)).check(now)
            changes["needed_by"] = moment
        if not changes:
            raise InvalidValueError(what="changes", value="", expected="--priority or --by")

        def change(connection: Any) -> int:
            oids = (
                items_in(connection, collection)
                if collection is not None
                else [get_item(connection, uri or "", version)["oid"]]
            )
            set_urgency(connection, oids, changes)
            return len(oids)

        print(f"{context.transact(change)} items changed")


@item_app.command("show")
@plain_errors
def item_show(uri: Uri, version: Version = None, as_json: Json = False) -> None:
    """Show an item with its metadata and replicas."""
    from dlm_core.catalogue.browse import get_item

    with catalogue() as context:
        found = context.transact(lambda c: get_item(c, uri, version))
    if as_json:
        show_json(found)
        return
    plain = [{"k": k, "v": human(v, k)} for k, v in found.items() if k != "replicas"]
    show_table(plain, {"k": "", "v": ""})
    columns = {"storage": "STORAGE", "state": "STATE", "phase": "PHASE", "size": "SIZE",
               "path": "PATH", "checked_at": "CHECKED"}  # fmt: skip
    show_table(found["replicas"], columns)


@item_app.command("events")
@plain_errors
def item_events(uri: Uri, version: Version = None, as_json: Json = False) -> None:
    """Show what happened to an item and its replicas."""
    from dlm_core.catalogue import browse

    with catalogue() as context:
        found = context.transact(
            lambda c: browse.item_events(c, browse.get_item(c, uri, version)["oid"])
        )
    columns = {"at": "AT", "noun": "NOUN", "action": "ACTION", "storage": "STORAGE",
               "old_state": "FROM", "new_state": "TO", "actor": "WHO",
               "detail": "DETAIL"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


@item_app.command("why")
@plain_errors
def item_why(uri: Uri, version: Version = None, as_json: Json = False) -> None:
    """Tell why an item has the copies it has, and what is planned."""
    from dlm_core.catalogue.browse import explain_item

    with catalogue() as context:
        found = context.transact(lambda c: explain_item(c, uri, version))
    show_json(found) if as_json else _explain(found)


@item_app.command("wait")
@plain_errors
def item_wait(
    uri: Uri,
    version: Version = None,
    timeout: Annotated[
        str, typer.Option(help="Wait at most so long: 30s, 15m, 12h.", metavar="DURATION")
    ] = "10m",
) -> None:
    """Wait until nothing is being done about an item, nor due."""
    from dlm_core.catalogue.browse import underway
    from dlm_core.errors import StillUnderwayError

    most = (parse_duration(timeout) or timedelta()).total_seconds()
    begun, shown = time.monotonic(), ""
    with catalogue() as context:
        while found := context.transact(lambda c: underway(c, uri, version, context.clock())):
            told = ", ".join(found)
            if told != shown:
                print(printable(told), flush=True)
            shown = told
            if time.monotonic() - begun >= most:
                raise StillUnderwayError(uri=uri, seconds=most, underway=told)
            time.sleep(_POLL_SECONDS)
    print(f"{uri} is at rest")


def _missing(found: dict[str, Any], reached: Any) -> str:
    """What an item lacks, or what keeps that from being told."""
    from dlm_core.types import Phase

    if found["state"] == "INITIALISED":
        return "it was not let in yet, copies are made after that"
    if found["state"] in ("EXPIRED", "DELETED"):
        return "no copies are made any more"
    if found["shortfall"]:
        return str(found["shortfall"])
    if reached.weight < Phase(found["target_phase"]).weight:
        return "it waits to be planned"
    return "nothing is missing"


def _explain(found: dict[str, Any]) -> None:
    from dlm_core.types import Phase

    reached = Phase.from_weight(found["reached_weight"])
    say(f"{found['uri']} (version {found['version']}) is {found['state']}", end="")
    say(f", {human(found['size'], 'size')}, {found['digest'] or 'no digest yet'}")
    say(f"wanted: {found['target_phase']}; reached: {reached}; {_missing(found, reached)}")
    if found["expires_at"]:
        say(f"expires {human(found['expires_at'])}: {found['expiry_reason'] or 'as registered'}")
    for replica in found["replicas"]:
        checked = (
            f", read and matched {human(replica['checked_at'])}" if replica["checked_at"] else ""
        )
        leaving = f"; leaves: {replica['expiry_reason']}" if replica["expiry_reason"] else ""
        say(
            f"  {replica['state']:9} {replica['storage']} at {replica['location']} "
            f"({replica['phase']}, {replica['mode']}){checked}{leaving}"
        )
    for hold in found["holds"]:
        say(f"  hold by {hold['actor']}: {hold['reason']}")
    for plan in found["plans"]:
        say(f"  its deletion is in plan {plan['plan_id']}, {plan['state']}: {plan['reason']}")
    for one in found["operations"]:
        error = f" [{one['error_code']}: {one['error']}]" if one["error"] else ""
        due = f", due {human(one['due_at'])}" if one["state"] == "QUEUED" else ""
        say(f"  {one['state']:9} {one['kind']} on {one['storage']}{due}: {one['reason']}{error}")
    for one in found["certificates"]:
        names = ", ".join(s["storage"] for s in one["survivors"]) or "none needed"
        say(
            f"  {one['step']} certificate {one['deletion_id']} for {one['storage']}: "
            f"{one['reason']}; survivors: {names}; by {one['actor']} at {human(one['proved_at'])}"
        )
    if found["looked_at_again"]:
        say(f"  looked at again at {human(found['looked_at_again'])}")


@plain_errors
def expire(
    uri: Annotated[str | None, typer.Argument(help="The item that is to go.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; stands in the certificate.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Only the copy there, once the others suffice.")
    ] = None,
    version: Version = None,
    at: Annotated[
        str | None, typer.Option(help="now (unless told), 30d, or a time with its zone.")
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="It is not to expire after all.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="What expiry would do now.")] = False,
    as_json: Json = False,
) -> None:
    """Let an item (or one copy of it) expire: it goes through the trash, with certificates."""
    from dlm_core.catalogue.browse import set_item_expiry, set_replica_expiry
    from dlm_core.lifecycle.expire import find_stop, propose_expiry

    with catalogue() as context:
        if dry_run:
            if uri or reason or never or (storage, version, at) != (None, None, None):
                raise InvalidValueError(
                    what="--dry-run", value="", expected="it alone: it shows what is due of all"
                )
            _show_proposals(context, propose_expiry(context), as_json)
            settings = context.settings
            stop = find_stop(context, settings.max_delete_items, settings.max_delete_bytes)
            if stop:
                print(f"nothing of it would be trashed: stopped {stop}", file=sys.stderr)
            return
        if not uri:
            raise EmptySelectorError(expected="name the item that is to expire, or use --dry-run")
        why = reason or ""
        if never and at is not None:
            raise InvalidValueError(what="--at", value=at, expected="it, or --never")
        moment = None if never else _to_come("--at", at or "now", context.clock())
        # an empty name is a wrong one, not none: else the whole item would go
        if storage is not None:
            context.transact(lambda c: set_replica_expiry(c, uri, storage, moment, why, version))
        else:
            context.transact(lambda c: set_item_expiry(c, uri, moment, why, version))
    which = f"the copy of {uri} on {storage}" if storage is not None else uri
    if as_json:
        show_json({"uri": uri, "version": version, "storage": storage, "expires_at": moment})
        return
    print(f"{which} expires {human(moment) if moment else 'never'}")


def _to_come(what: str, told: str, now: datetime) -> datetime | None:
    moment = parse_time(told, now)
    if moment is not None and moment < now:
        raise InvalidValueError(what=what, value=told, expected="now, or a time to come")
    return moment


def _show_proposals(context: Any, proposals: Any, as_json: bool) -> None:
    from dlm_core.catalogue.browse import names_of

    names = context.transact(lambda c: names_of(c, [p.oid for p in proposals]))
    storages = context.transact(context.storages.load)
    rows = [
        {"uri": p.uri, "version": names[str(p.oid)][1] or 1,
         "storage": storages[p.storage_id]["name"], "state": p.state, "bytes": p.size,
         "reason": p.reason, "refusal": p.refusal, "survivors": len(p.survivors)}
        for p in proposals
    ]  # fmt: skip
    columns = {"uri": "URI", "version": "VERSION", "storage": "STORAGE", "state": "STATE",
               "bytes": "BYTES", "reason": "REASON", "refusal": "REFUSED",
               "survivors": "SURVIVORS"}  # fmt: skip
    show_json(rows) if as_json else show_table(rows, columns)


@plain_errors
def restore(
    uri: Uri,
    storage: Annotated[str | None, typer.Option(help="Only the copy there.")] = None,
    version: Version = None,
) -> None:
    """Bring an item back from the trash, as long as its grace lasts."""
    from dlm_core.catalogue.browse import get_item
    from dlm_core.catalogue.places import get_storage
    from dlm_core.lifecycle.trash import request_restore

    def ask(connection: Any) -> int:
        where = None if storage is None else get_storage(connection, storage)["storage_id"]
        oid = get_item(connection, uri, version)["oid"]
        return request_restore(
            connection, oid=oid, storage_id=where, actor=context.actor, now=context.clock()
        )

    with catalogue() as context:
        count = context.transact(ask)
    which = shlex.quote(uri) + (f" --version {version}" if version is not None else "")
    print(f"{count} copies of {uri} are looked for in the trash; see: dlm item why {which}")


@plain_errors
def withdraw(
    uri: Annotated[str | None, typer.Argument(help="An item that was announced.")] = None,
    reason: Annotated[str, typer.Option(help="Why; stands in the certificate.")] = "",
    storage: Annotated[str | None, typer.Option(help="Only what was announced there.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All whose admission FAILED.")] = False,
    version: Version = None,
) -> None:
    """Take back what was announced and not let in yet; no bytes are touched."""
    from dlm_core.lifecycle.withdraw import withdraw_failed, withdraw_item

    if (uri is None) == (not failed):
        raise EmptySelectorError(expected="name one item, or --failed")
    if version is not None and uri is None:
        raise InvalidValueError(what="--version", value=version, expected="an item as well")
    with catalogue() as context:
        if uri is None:
            found = withdraw_failed(context, reason=reason, storage=storage)
        else:
            found = withdraw_item(context, uri, reason=reason, storage=storage, version=version)
    print(f"{found.announcements} announcements withdrawn, and {found.items} items with them")


@plain_errors
def verify(
    uri: Annotated[str | None, typer.Argument(help="An item.")] = None,
    storage: Annotated[str | None, typer.Option(help="All copies on a storage.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All copies everywhere.")] = False,
    version: Version = None,
    priority: Priority = None,
) -> None:
    """Ask for copies to be read again."""
    from dlm_core.catalogue.browse import get_item
    from dlm_core.catalogue.places import get_storage
    from dlm_core.lifecycle.verify import request_verification

    if uri is None and storage is None and not everything:
        raise EmptySelectorError(expected="name an item or --storage, or say --all")
    if everything and (uri is not None or storage is not None):
        raise InvalidValueError(what="--all", value="", expected="it alone")
    if version is not None and uri is None:
        raise InvalidValueError(what="--version", value=version, expected="an item as well")

    def ask(connection: Any) -> int:
        return request_verification(
            connection,
            actor=context.actor,
            now=context.clock(),
            storage_id=None if storage is None else get_storage(connection, storage)["storage_id"],
            oid=None if uri is None else get_item(connection, uri, version)["oid"],
            priority=priority or 0,
        )

    with catalogue() as context:
        print(f"{context.transact(ask)} copies will be read again")


@plain_errors
def retry(
    kind: Annotated[str | None, typer.Option(help=f"Only of this kind: {_KINDS}.")] = None,
    storage: Annotated[str | None, typer.Option(help="Only of copies on this storage.")] = None,
    item: Annotated[str | None, typer.Option(help="Only of the item with this uri.")] = None,
    version: Version = None,
    error: Annotated[str | None, typer.Option(help="Only with this code, e.g. DLM-302.")] = None,
) -> None:
    """Try FAILED operations again, all or those that every option given matches."""
    from dlm_core.catalogue.browse import get_item
    from dlm_core.catalogue.operations import FailedSelector, retry_failed
    from dlm_core.catalogue.places import get_storage

    if error is not None and not re.fullmatch(r"DLM-\d{3}", error):
        raise InvalidValueError(what="error", value=error, expected="a code, e.g. DLM-302")
    if version is not None and item is None:
        raise InvalidValueError(what="--version", value=version, expected="--item as well")
    wanted = parse_choice("kind", kind, tuple(OperationKind))

    def work(connection: Any, now: Any) -> int:
        selector = FailedSelector(
            OperationKind(wanted) if wanted else None,
            None if storage is None else get_storage(connection, storage)["storage_id"],
            None if item is None else get_item(connection, item, version)["oid"],
            error,
        )
        return retry_failed(connection, now, selector)

    with catalogue() as context:
        print(f"{context.transact(lambda c: work(c, context.clock()))} queued again")
