"""The jobs: each one op that drains what is due, in batches, and tells what it did in aggregate."""

import gc
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from pydantic import Field
from sqlalchemy import Connection

from dlm_core.catalogue.browse import names_of
from dlm_core.catalogue.expiring import count_expiry_due
from dlm_core.catalogue.operations import count_due, list_due
from dlm_core.catalogue.replicas import count_evaluations_due
from dlm_core.errors import DlmError
from dlm_core.lifecycle import expire, rebalance, replicate
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.check import plan_verification, propose_verification
from dlm_core.lifecycle.lost import plan_audits
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.staging import execute_stage
from dlm_core.lifecycle.trash import execute_purge, execute_restore, execute_trash
from dlm_core.lifecycle.verify import execute_verify
from dlm_core.lifecycle.watch import plan_registration
from dlm_core.lifecycle.work import Context, Executor, Guard, Planner, Report, drain
from dlm_core.settings import Settings
from dlm_core.types import OperationKind
from dlm_pipelines.metadata import (
    deadline_metadata,
    drain_metadata,
    overview_metadata,
    proposals_metadata,
    report_metadata,
    staging_metadata,
)
from dlm_pipelines.resources import Catalogue

log = logging.getLogger("dlm")

#: a drainer that never runs dry ends by itself, and the sensor starts the next: half of what
#: dagster.yaml lets a run last, so that a large copy has as long again before it is ended as failed
_MOST_SECONDS = 6 * 3600.0
#: a run that lasts longer looks so often whether bytes still come through
_LOOK_SECONDS = 600.0
#: operations of a kind that a dry run shows
_PROPOSED = 1000


class DrainConfig(dg.Config):
    """What can be set for one run; the ranges are those of the settings."""

    dry_run: bool = Field(False, description="Show what would be done, and change nothing.")
    linger_seconds: float | None = Field(
        None, description="Wait this long for new work once dry; unset: DLM_LINGER_SECONDS."
    )
    batch_size: int | None = Field(
        None, description="Operations claimed at a time; unset: DLM_BATCH_SIZE."
    )


class ExpiryConfig(DrainConfig):
    """As for any drainer, and how much this run may delete: not more than the settings allow.

    Beyond them an approved plan leads, never a run's config: else who may launch a run could do
    without the approvals that a site asks for.
    """

    max_delete_items: int | None = Field(
        None, description="Replicas this run may trash, at most DLM_MAX_DELETE_ITEMS."
    )
    max_delete_bytes: int | None = Field(
        None, description="Bytes this run may trash, at most DLM_MAX_DELETE_BYTES."
    )
    plan: bool = Field(
        True, description="Trash what is past its time; else only finish what is queued."
    )


@dataclass(frozen=True)
class Work:
    """What a job does: its executors by kind, its planner, and what its dry run shows."""

    executors: Mapping[OperationKind, Executor]
    planner: Callable[[Settings], Planner] | None
    propose: Callable[[Context], list[Mapping[str, Any]]]
    guard: Guard | None = None
    #: of how much the proposals are, where they are cut: connection, now, where to stop counting
    count: Callable[[Connection, datetime, int], int] | None = None


def _nothing_more(_: Context) -> list[Mapping[str, Any]]:
    """What it plans is found by looking into watched folders, which is work of its own."""
    return []


def _propose(context: Context, work: Work) -> list[Mapping[str, Any]]:
    """What is queued and due already, and what would be planned; the first of each kind."""
    queued: list[Mapping[str, Any]] = []
    for kind in work.executors:
        due = partial(list_due, kind=kind, now=context.clock(), limit=_PROPOSED)
        for one in context.transact(due):
            what = f"{kind} on {one['storage']}: {one['reason']}"
            queued.append({"item": one["uri"], "what": what, "bytes": one["bytes"]})
    return queued + work.propose(context)


def _is_cut(context: Context, work: Work) -> bool:
    """Whether more is due than :func:`_propose` looks at."""

    def look(connection: Connection) -> bool:
        now, most = context.clock(), _PROPOSED + 1
        queued = [count_due(connection, [kind], now, most) for kind in work.executors]
        planned = work.count(connection, now, most) if work.count else 0
        return max([*queued, planned]) > _PROPOSED

    cut: bool = context.transact(look)
    return cut


def _named(context: Context, oids: Iterable[uuid.UUID]) -> Callable[[uuid.UUID], str]:
    """How items are called: by uri, with the version where there are several."""
    names = context.transact(lambda c: names_of(c, oids))

    def name(oid: uuid.UUID) -> str:
        uri, version = names.get(str(oid), (str(oid), None))
        return uri if version is None else f"{uri}#{version}"

    return name


def _propose_copies(context: Context) -> list[Mapping[str, Any]]:
    return [
        {"item": p.uri, "what": p.copy.reason, "bytes": p.copy.size}
        for p in replicate.propose_replication(context)
    ]


def _propose_deletions(context: Context) -> list[Mapping[str, Any]]:
    found = expire.propose_expiry(context)
    name = _named(context, [p.oid for p in found])
    storages = context.transact(context.storages.load)
    return [
        {
            "item": name(p.oid),
            "what": f"refused on {on}: {p.refusal}"
            if p.refusal
            else f"trash the copy on {on}: {p.reason}",
            "bytes": p.size,
        }
        for p in found
        for on in [storages[p.storage_id]["name"]]
    ]


def _propose_leaving(context: Context) -> list[Mapping[str, Any]]:
    found = rebalance.propose_rebalance(context)
    name = _named(context, [one.oid for one in found])
    return [{"item": name(one.oid), "what": one.reason, "bytes": one.size} for one in found]


def _propose_checks(context: Context) -> list[Mapping[str, Any]]:
    found = propose_verification(context)
    name = _named(context, [check.oid for check in found])
    return [
        {
            "item": name(check.oid),
            "what": f"read again, {check.copies} good copies, last on {check.check_from:%Y-%m-%d}",
            "bytes": check.size,
        }
        for check in found
    ]


def _plan_looks(context: Context) -> int:
    """What storages that came back hold, and what is due."""
    return plan_audits(context) + plan_verification(context)


WORK: dict[str, Work] = {
    "registration": Work(
        {OperationKind.ADMIT: execute_admit}, lambda _: plan_registration, _nothing_more
    ),
    "replication": Work(
        # what is staged by hand is asked for first: a copy may want the same files
        {OperationKind.STAGE: execute_stage, OperationKind.COPY: execute_copy},
        lambda _: plan_replication,
        _propose_copies,
        count=count_evaluations_due,
    ),
    "verification": Work(
        {OperationKind.VERIFY: execute_verify}, lambda _: _plan_looks, _propose_checks
    ),
    "expiry": Work(
        {
            OperationKind.RESTORE: execute_restore,
            OperationKind.TRASH: execute_trash,
            OperationKind.PURGE: execute_purge,
        },
        lambda s: expire.ExpiryPlanner(s.max_delete_items, s.max_delete_bytes),
        _propose_deletions,
        expire.stop_on_errors,
        lambda c, now, most: count_expiry_due(c, now, most).replicas,
    ),
    "rebalance": Work({}, lambda _: rebalance.plan_rebalance, _propose_leaving),
}


def _run(name: str, context: dg.OpExecutionContext, config: DrainConfig, site: Catalogue) -> Any:
    """Run one drainer in this process and tell what it did."""
    given = config.model_dump(exclude={"dry_run", "plan"}).items()
    overrides = {key: value for key, value in given if value is not None}
    work = WORK[name]
    if isinstance(config, ExpiryConfig) and not config.plan:
        work = replace(work, planner=None, propose=_nothing_more, count=None)
    try:
        settings = _stricter(site, site.settings(**overrides))
        core = site.context(f"run:{context.run_id}", settings)
        if config.dry_run:
            proposals = _propose(core, work)
            context.log.info(f"dry run: {len(proposals)} shown, nothing changed")
            stopped = None
            if isinstance(config, ExpiryConfig) and config.plan:
                most = settings.max_delete_items, settings.max_delete_bytes
                stopped = expire.find_stop(core, *most)
            told = proposals_metadata(proposals, cut=_is_cut(core, work), stopped=stopped)
            return dg.Output(len(proposals), metadata=told)
        with _progress(context):
            report = _drain(context, core, work, settings)
        _tell_failures(context, report)
        told = report_metadata(core, report) | staging_metadata(core)
        if name == "verification":
            told |= overview_metadata(core)
        if name == "replication":
            told |= deadline_metadata(core)
        if name in ("rebalance", "expiry"):
            told |= drain_metadata(core)
        return dg.Output(report.total, metadata=told)
    except DlmError as error:
        raise dg.Failure(f"{error.code}: {error}", allow_retries=error.retryable) from None


def _stricter(site: Catalogue, chosen: Settings) -> Settings:
    """A run's limits on deletion: its own, but never above those of the site."""
    mine = site.settings()
    limits = ("max_delete_items", "max_delete_bytes")
    lowest = {name: min(getattr(chosen, name), getattr(mine, name)) for name in limits}
    return chosen.model_copy(update=lowest)


class _Lasting:
    """Lets a run last longer than dagster.yaml does, for as long as bytes come through: a copy that
    takes longer, to a storage where none can be gone on with, would begin anew for ever."""

    def __init__(self, context: dg.OpExecutionContext, core: Context) -> None:
        self._context, self._traffic, self._moved = context, core.traffic, 0
        self._begun = self._looked = time.monotonic()

    def look(self) -> None:
        """To be called while the work goes on; from time to time it does something."""
        now = time.monotonic()
        if now - self._begun < _MOST_SECONDS or now - self._looked < _LOOK_SECONDS:
            return
        self._looked, before, self._moved = now, self._moved, self._traffic.moved_bytes
        if self._moved == before:
            return
        until = str(int(now - self._begun + 2 * _MOST_SECONDS))
        try:
            tags = {dg.MAX_RUNTIME_SECONDS_TAG: until}
            self._context.instance.add_run_tags(self._context.run_id, tags)
        except Exception as error:
            # Dagster's database is away, the run's log too: the next look is soon enough
            log.warning("the run's time was not prolonged: %s", error)


def _drain(context: dg.OpExecutionContext, core: Context, work: Work, settings: Settings) -> Report:
    """Drain in a thread of its own, so that an interrupt (a cancelled run, SIGTERM) reaches this
    one, which then lets the work in hand end or be given back."""
    result: list[Report] = []
    failure: list[BaseException] = []
    # what was imported lives as long as this run's process: the collector need not look through
    # it again for every few thousand files
    gc.freeze()

    def body() -> None:
        try:
            planner = work.planner(settings) if work.planner else None
            linger = settings.linger_seconds if work.executors else 0.0
            result.append(
                drain(
                    core, work.executors, planner, guard=work.guard, linger_seconds=linger,
                    most_seconds=_MOST_SECONDS,
                )
            )  # fmt: skip
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="dlm-drain")
    thread.start()
    lasting = _Lasting(context, core)
    try:
        while thread.is_alive():
            thread.join(0.2)
            lasting.look()
    except (KeyboardInterrupt, DagsterExecutionInterruptedError):
        core.stop.set()
        thread.join()
        raise
    if failure:
        raise failure[0]
    return result[0]


def _tell_failures(context: dg.OpExecutionContext, report: Report) -> None:
    failed = sum(report.failed.values())
    if failed:
        context.log.warning(
            f"{failed} operations FAILED for good: see 'failures' in the metadata, "
            "'dlm item why URI' for one of them, and 'dlm retry' to try them again"
        )


class _Forward(logging.Handler):
    def __init__(self, context: dg.OpExecutionContext) -> None:
        super().__init__(logging.INFO)
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._context.log.log(record.levelno, record.getMessage())
        except Exception:
            # Dagster's database is away; the work must not end with a line of its log
            self.handleError(record)


@contextmanager
def _progress(context: dg.OpExecutionContext) -> Iterator[None]:
    """The core's progress lines, in the run's log."""
    handler, level = _Forward(context), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _job(name: str, config: type[DrainConfig], description: str) -> dg.JobDefinition:
    def body(context: dg.OpExecutionContext, config: Any, catalogue: Catalogue) -> Any:
        return _run(name, context, config, catalogue)

    # dagster reads the config's type from the annotation
    body.__annotations__ = {
        "context": dg.OpExecutionContext, "config": config, "catalogue": Catalogue,
    }  # fmt: skip
    operation = dg.op(
        name=f"drain_{name}",
        description=description,
        out=dg.Out(int, description="operations worked on, or proposals of a dry run"),
    )(body)

    @dg.job(
        name=f"{name}_job",
        description=description,
        executor_def=dg.in_process_executor,
        tags={"dlm/job": name},
    )
    def job() -> None:
        operation()

    return job


JOBS = {
    "registration": _job(
        "registration",
        DrainConfig,
        "Read announced payloads, let them in, and look at watched folders.",
    ),
    "replication": _job(
        "replication",
        DrainConfig,
        "Make and verify the copies that items need to reach their target phase.",
    ),
    "verification": _job(
        "verification",
        DrainConfig,
        "Read replicas again, when due or asked for; damage is noticed, set aside, and mended.",
    ),
    "expiry": _job(
        "expiry",
        ExpiryConfig,
        "Trash what is past its time, with a certificate; purge it after its grace; restore.",
    ),
    "rebalance": _job(
        "rebalance",
        DrainConfig,
        "Choose what leaves storages that are too full or being drained.",
    ),
}
