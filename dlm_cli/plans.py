"""``dlm plan``: what a limit stopped, and whether it may go on."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from dlm_cli.holds import parse_key
from dlm_cli.session import catalogue, human, human_size, plain_errors, say, show_json, show_table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Person = Annotated[str | None, typer.Option("--as", help="In whose name; unset: yours.")]
Key = Annotated[str, typer.Argument(help="As 'dlm plan list' shows it.")]

plan_app = typer.Typer(no_args_is_help=True, help="What a limit stopped, and may go on.")


@plan_app.command("list")
@plain_errors
def plan_list(as_json: Json = False) -> None:
    """List plans, the newest first."""
    from dlm_core.catalogue.plans import list_plans

    with catalogue() as context:
        found = context.transact(list_plans)
    columns = {"plan_id": "PLAN", "state": "STATE", "operations": "REPLICAS", "bytes": "BYTES",
               "approvals": "APPROVED BY", "approvals_needed": "OF", "valid_until": "UNTIL",
               "reason": "STOPPED BY"}  # fmt: skip
    show_json(found) if as_json else show_table(found, columns)


@plan_app.command("show")
@plain_errors
def plan_show(
    plan: Key,
    limit: Annotated[int, typer.Option(min=0, max=1_000_000, help="Entries to show.")] = 100,
    as_json: Json = False,
) -> None:
    """Show what a plan would do and why, and who decided what."""
    from dlm_core.catalogue.plans import get_plan

    key = parse_key("plan", plan)
    with catalogue() as context:
        found = context.transact(lambda c: get_plan(c, key, limit))
    show_json(found) if as_json else _show(found)


def _show(found: dict[str, Any]) -> None:
    say(f"plan {found['plan_id']} is {found['state']} until {human(found['valid_until'])}")
    say(f"stopped by {found['reason']}")
    say(f"would trash {found['operations']} replicas, {human_size(found['bytes'])}", end="")
    say(f"; {found['trashed']} are trashed by now; content {found['content_hash']}")
    say(f"proposed by {found['actor']} at {human(found['created_at'])}; approved by "
          f"{found['approvals']} of {found['approvals_needed']}")  # fmt: skip
    for one in found["decisions"]:
        why = f": {one['reason']}" if one["reason"] else ""
        say(f"  {one['decision']} by {one['actor']} at {human(one['created_at'])}{why}")
    show_table(found["reasons"], {"replicas": "REPLICAS", "bytes": "BYTES", "basis": "BASIS",
                                  "collection": "COLLECTION", "reason": "REASON"})  # fmt: skip
    if found["entries"]:
        show_table(found["entries"], {"uri": "URI", "version": "V", "storage": "STORAGE",
                                      "bytes": "BYTES", "state": "STATE",
                                      "reason": "REASON"})  # fmt: skip
    if found["operations"] > len(found["entries"]):
        say(f"{found['operations'] - len(found['entries'])} more: --limit")


@plan_app.command("approve")
@plain_errors
def plan_approve(
    plan: Key,
    reason: Annotated[str | None, typer.Option(help="Why.")] = None,
    person: Person = None,
) -> None:
    """Let exactly what a plan names pass the limits, for a while; each copy is still proven."""
    from dlm_core.catalogue.plans import approve_plan

    key = parse_key("plan", plan)
    with catalogue(person) as context:
        found = context.transact(
            lambda c: approve_plan(
                c, key, actor=context.actor, now=context.clock(), reason=reason,
                valid_for=timedelta(seconds=context.settings.plan_seconds),
            )
        )  # fmt: skip
    if found["state"] == "APPROVED":
        print(f"plan {key} is approved until {human(found['valid_until'])}; expiry goes on with it")
    else:
        missing = found["approvals_needed"] - found["approvals"]
        print(f"plan {key}: to be approved by {missing} more")


@plan_app.command("reject")
@plain_errors
def plan_reject(
    plan: Key,
    reason: Annotated[str, typer.Option(help="Why.")],
    person: Person = None,
) -> None:
    """Let expiry leave alone what a plan names; also takes an approval back."""
    from dlm_core.catalogue.plans import reject_plan

    key = parse_key("plan", plan)
    with catalogue(person) as context:
        context.transact(
            lambda c: reject_plan(c, key, actor=context.actor, now=context.clock(), reason=reason)
        )
    print(f"plan {key} is rejected; what it names stays")
