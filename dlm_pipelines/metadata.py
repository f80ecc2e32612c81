"""What a run tells in the UI: a few numbers that plot across runs, and tables to read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from dlm_core.catalogue.browse import names_of
from dlm_core.catalogue.checks import check_overview
from dlm_core.catalogue.places import drains
from dlm_core.catalogue.staging import waiting_overview
from dlm_core.catalogue.urgency import deadlines
from dlm_core.lifecycle.work import Context, Report

_SHOWN = 50


def report_metadata(context: Context, report: Report) -> dict[str, Any]:
    """Counts, bytes, rates, failures by cause and the slowest operations of a drainer."""
    seconds = max(report.seconds, 1e-9)
    found: dict[str, Any] = {
        "operations": report.total,
        "planned": report.planned,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "MB_per_second": round(report.bytes / 1e6 / seconds, 3),
        "operations_per_second": round(report.total / seconds, 3),
        "failed": sum(report.failed.values()),
        "tried_again": sum(report.retried.values()),
    }
    found |= {f"done_{kind}": count for kind, count in sorted(report.done.items())}
    causes = [
        {"cause": code, "outcome": outcome, "operations": count}
        for outcome, counter in (("failed", report.failed), ("tried again", report.retried))
        for code, count in counter.most_common()
    ]
    if causes:
        found["failures"] = _table(causes, ["cause", "outcome", "operations"])
    names = _names(context, report)
    if report.first_failures:
        failures = [
            {"operation": kind, "error": error, "explain": _why(names, oid)}
            for kind, error, oid in report.first_failures
        ]
        found["first_failures"] = _table(failures, ["operation", "error", "explain"])
    if report.slowest:
        slowest = [
            {"seconds": f"{took:.3f}", "operation": kind, "explain": _why(names, oid)}
            for took, kind, oid in report.slowest
        ]
        found["slowest"] = _table(slowest, ["seconds", "operation", "explain"])
    return found


_Names = Mapping[str, tuple[str, int | None]]


def _names(context: Context, report: Report) -> _Names:
    oids = {oid for _, _, oid in [*report.slowest, *report.first_failures]}
    found: _Names = context.transact(lambda c: names_of(c, oids)) if oids else {}
    return found


def _why(names: _Names, oid: str) -> str:
    uri, version = names.get(oid, (oid, None))
    which = f" --version {version}" if version is not None else ""
    return f"`dlm item why {shlex.quote(uri)}{which}`"


def overview_metadata(context: Context) -> dict[str, Any]:
    """The oldest look on each storage and what was planned of the day's budget: cheap to ask."""
    found = context.transact(lambda c: check_overview(c, context.clock()))
    return {"verification": _table(found, list(found[0]))} if found else {}


def staging_metadata(context: Context) -> dict[str, Any]:
    """How many files wait to be staged, by storage; they plot across runs."""
    found = context.transact(lambda c: waiting_overview(c, context.clock()))
    told: dict[str, Any] = {f"waiting_for_staging_{row['storage']}": row["files"] for row in found}
    return told | ({"staging": _table(found, list(found[0]))} if found else {})


def drain_metadata(context: Context) -> dict[str, Any]:
    """How far the drains of storages are: bytes left plot across runs."""
    found = context.transact(lambda c: drains(c, context.clock()))
    told: dict[str, Any] = {f"left_bytes_{row['storage']}": row["left_bytes"] for row in found}
    return told | ({"drains": _table(found, list(found[0]))} if found else {})


def deadline_metadata(context: Context) -> dict[str, Any]:
    """Items that miss their deadline, or are near it: these plot across runs."""
    now = context.clock()
    needed = context.transact(lambda c: deadlines(c, now, now + context.settings.deadline_lead))
    told = {"deadlines_missed": needed["late"], "deadlines_near": needed["near"]}
    if needed["earliest"] is not None:
        told["earliest_deadline"] = needed["earliest"].isoformat()
    return told


def verification_metadata(report: Mapping[str, Any]) -> dict[str, Any]:
    """How much was read again, by storage and collection, and what was found."""
    told: dict[str, Any] = {
        f"read_fraction_{row['storage']}": round(row["read_fraction"], 4)
        for row in report["storages"]
        if row["replicas"]
    }
    for part in ("storages", "collections", "findings"):
        if report[part]:
            columns = dict.fromkeys(key for row in report[part][:_SHOWN] for key in row)
            rows = [{key: row.get(key) for key in columns} for row in report[part][:_SHOWN]]
            told[f"verification_{part}"] = _table(rows, list(columns))
    return told


def proposals_metadata(
    proposals: Sequence[Mapping[str, Any]], *, cut: bool = False, stopped: str | None = None
) -> dict[str, Any]:
    """What a dry run would do: totals and the first rows; ``cut``: of the first of what is due;
    ``stopped``: why nothing of it would be trashed."""
    told = {"more": "more is due: these are the first of each kind, and so are the totals"}
    return {
        "dry_run": True,
        **(told if cut else {}),
        **({"stopped": stopped} if stopped else {}),
        "proposed": len(proposals),
        "bytes": sum(int(one["bytes"]) for one in proposals),
        "proposals": _table(proposals[:_SHOWN], ["item", "what", "bytes"]),
    }


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dg.MarkdownMetadataValue:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
