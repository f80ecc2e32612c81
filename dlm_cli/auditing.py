"""``dlm audit``: who did what and why, and whether the log is as it was written."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from dlm_cli.session import (
    catalogue,
    human,
    parse_duration,
    parse_time,
    plain_errors,
    plain_value,
    say,
    show_json,
)
from dlm_core.errors import InvalidValueError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_FEEDS = ("event", "deletion")

audit_app = typer.Typer(help="Who did what and why; and whether the log is as it was written.")


@audit_app.callback(invoke_without_command=True)
@plain_errors
def trail(
    context: typer.Context,
    since: Annotated[
        str | None, typer.Option(help="24h (ago), or a time with its zone; unset: 24h.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Print every decision and effect since a time: who, what, why, certificate."""
    if context.invoked_subcommand is not None:
        return
    from dlm_core.catalogue.trail import audit_trail

    with catalogue() as core:
        begin = _since(since or "24h", core.clock())

        def tell(connection: Any) -> None:
            for entry in audit_trail(connection, begin):
                line = json.dumps(entry, default=plain_value) if as_json else _line(entry)
                say(line)

        core.transact(tell)


def _since(text: str, now: datetime) -> datetime:
    try:
        ago = parse_duration(text)
    except InvalidValueError:
        found = parse_time(text, now)
        assert found is not None
        return found
    assert ago is not None
    return now - ago


def _line(entry: dict[str, Any]) -> str:
    states = " → ".join(s for s in (entry["old_state"], entry["new_state"]) if s)
    if entry["old_state"] == entry["new_state"]:
        states = entry["new_state"] or ""
    # of a plan or a hold
    key = (entry["detail"] or {}).get(f"{entry['noun']}_id") or ""
    subject = f"{entry['uri']}#{entry['version']}" if entry["uri"] else ""
    where = f"on {entry['storage']}" if entry["storage"] else ""
    words = [f"{human(entry['at'])}", entry["who"], entry["noun"], key, entry["action"], states,
             subject, where]  # fmt: skip
    line = " ".join(word for word in words if word)
    if entry["action"] == "doubted":
        line += f" {entry['detail']['found']}, last read {entry['detail']['checked_at']}"
    if entry["why"]:
        line += f": {entry['why']}"
    if entry["certificate"]:
        proof = entry["certificate"]
        names = ", ".join(s["storage"] for s in proof["survivors"]) or "none needed"
        line += f" [{proof['step']} certificate {proof['deletion_id']}; survivors: {names}]"
    return line


@audit_app.command("verify")
@plain_errors
def verify(
    anchor: Annotated[
        str | None, typer.Option(help="A seal noted elsewhere; it has to be in the chain.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute the seals again: a changed, missing or added row is named. Exit code 1 then."""
    from dlm_core.catalogue.seals import verify_seals

    with catalogue() as core:
        found = core.transact(lambda c: verify_seals(c, anchor))
    findings = [
        {"feed": one.feed, "day": str(one.day or "-"), "problem": one.problem, "row": one.row}
        for one in found.findings
    ]
    if as_json:
        show_json({"days": found.days, "rows": found.rows, "dropped_days": found.dropped_days,
                   "heads": found.heads, "findings": findings})  # fmt: skip
    else:
        for one in findings:
            print(f"{one['feed']} {one['day']}: {one['problem']}"
                  + (f": {one['row']}" if one["row"] else ""))  # fmt: skip
        print(f"{found.rows} rows on {found.days} sealed days ({found.dropped_days} dropped): "
              + (f"{len(findings)} problems" if findings else "as they were sealed"))  # fmt: skip
        for feed, head in found.heads.items():
            print(f"newest seal of {feed}: {head}")
    if findings:
        raise SystemExit(1)


@audit_app.command("seal")
@plain_errors
def seal() -> None:
    """Seal the days that are over, as the daily maintenance does."""
    from dlm_core.lifecycle.seal import seal_log

    with catalogue() as core:
        sealed = seal_log(core)
    if sealed is None:
        print("a transaction that began before is still running: nothing is sealed yet")
        raise SystemExit(1)
    print(f"{sealed} days sealed")


@audit_app.command("drop")
@plain_errors
def drop(
    month: Annotated[str, typer.Argument(help="YYYY-MM; all its days have to be sealed.")],
    feed: Annotated[str, typer.Option(help="event or deletion.")] = "event",
    yes: Annotated[bool, typer.Option("--yes", help="It is meant; required.")] = False,
) -> None:
    """Drop a month's rows of the log for good; its seals stay."""
    from dlm_cli.session import parse_choice
    from dlm_core.catalogue.seals import drop_month

    chosen = parse_choice("feed", feed, _FEEDS) or ""
    try:
        first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).date()
    except ValueError:
        raise InvalidValueError(what="month", value=month, expected="YYYY-MM") from None
    if not yes:
        raise InvalidValueError(what="--yes", value="", expected="given, if it is meant")
    with catalogue() as core:
        count = core.transact(lambda c: drop_month(c, chosen, first))
    print(f"{count} rows of {chosen} {month} are dropped; their seals stay")
