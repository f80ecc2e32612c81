"""What a run tells in the UI: a few numbers that plot across runs, and tables to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from dlm_core.catalogue.browse import uris_of
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
    if report.slowest:
        found["slowest"] = _slowest(context, report)
    return found


def _slowest(context: Context, report: Report) -> dg.MarkdownMetadataValue:
    uris = context.transact(lambda c: uris_of(c, [oid for _, _, oid in report.slowest]))
    rows = [
        {
            "seconds": f"{seconds:.3f}",
            "operation": kind,
            "explain": f"`dlm item why '{uris.get(oid, oid)}'`",
        }
        for seconds, kind, oid in report.slowest
    ]
    return _table(rows, ["seconds", "operation", "explain"])


def proposals_metadata(proposals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a dry run would do: totals and the first rows."""
    return {
        "dry_run": True,
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
