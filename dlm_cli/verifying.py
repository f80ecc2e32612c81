"""``dlm verification``: how much was read again, how old the oldest look is, what was found."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer

from dlm_cli.session import catalogue, plain_errors, show_json, show_table


@plain_errors
def verification(
    days: Annotated[int, typer.Option(min=1, max=36500, help="Look back so far.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the share of copies read again, by storage and collection, and what was found."""
    from dlm_core.catalogue.checks import verification_report

    with catalogue() as context:
        found = context.transact(lambda c: verification_report(c, context.clock(), days))
    show_json(found) if as_json else _show(found)


def _show(found: dict[str, Any]) -> None:
    print(f"copies read again within {found['days']} days (told: the storage said so, not read)")
    shares = {"replicas": "COPIES", "read_fraction": "READ", "read": "READ N",
              "read_or_told": "OR TOLD", "oldest_read": "OLDEST READ"}  # fmt: skip
    budget = {"verify_every_days": "EVERY DAYS", "planned_today_bytes": "TODAY",
              "verify_bytes_per_day": "OF"}  # fmt: skip
    show_table(found["storages"], {"storage": "STORAGE", **shares, **budget})
    show_table(found["collections"], {"collection": "COLLECTION", **shares})
    if not found["findings"]:
        print("nothing was found damaged or missing")
        return
    rows = [{**row, **_times(row)} for row in found["findings"]]
    show_table(rows, {"storage": "STORAGE", "doubted": "DOUBTED", "damaged": "DAMAGED",
                      "false_alarms": "FALSE ALARMS", "open": "OPEN",
                      "detect_max_seconds": "UNNOTICED AT MOST",
                      "repair_mean_seconds": "REPAIR MEAN",
                      "repair_max_seconds": "REPAIR MAX"})  # fmt: skip


def _times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(timedelta(seconds=round(value)))
        for key, value in row.items()
        if key.endswith("_seconds") and value is not None
    }
