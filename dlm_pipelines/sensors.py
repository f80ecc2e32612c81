"""The sensors: each asks the catalogue one cheap question and requests at most a few drainers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import dagster as dg
from sqlalchemy import Connection

from dlm_core.catalogue import schema
from dlm_core.catalogue.capacity import storages_to_observe, storages_to_relieve
from dlm_core.catalogue.checks import count_failed_looks, storages_with_checks_due
from dlm_core.catalogue.expiring import count_expiry_due
from dlm_core.catalogue.housekeeping import fold_long_tally
from dlm_core.catalogue.lost import storages_in_audit
from dlm_core.catalogue.operations import count_due
from dlm_core.catalogue.plans import approved_plans, waiting_plans
from dlm_core.catalogue.replicas import count_evaluations_due
from dlm_core.catalogue.urgency import deadlines
from dlm_core.clock import utc_now
from dlm_core.errors import DlmError
from dlm_core.lifecycle.rebalance import ASK_AGAIN
from dlm_core.lifecycle.watch import count_registration_due
from dlm_core.settings import Settings, load_settings
from dlm_core.types import OperationKind
from dlm_pipelines.jobs import JOBS
from dlm_pipelines.resources import Catalogue


@dataclass(frozen=True)
class Due:
    """How much is due, in words, and the config of the runs to ask for."""

    amount: int
    words: str
    config: Mapping[str, Any] | None = None


Question = Callable[[Connection, Settings, datetime], Due]

#: operations for which another drainer is worth its start
_WORTH_A_RUN = 1000
_ACTIVE = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_ENDED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
#: after so many failed runs within this time the next one waits so long
_FAILING_RUNS, _FAILING_WITHIN, _FAILING_PAUSE = 3, timedelta(minutes=10), timedelta(minutes=1)


class Blocked(Exception):
    """Work is due, but an operator has to look first."""


def registration_due(connection: Connection, _: Settings, now: datetime) -> Due:
    """Announced payloads to admit, and watched folders to look at."""
    due = count_registration_due(connection, now)
    return Due(due, f"{due} admissions and watched folders")


def replication_due(connection: Connection, settings: Settings, now: datetime) -> Due:
    """Items to plan, and copies to make or to stage."""
    items = count_evaluations_due(connection, now)
    copies = count_due(connection, [OperationKind.COPY, OperationKind.STAGE], now)
    words = f"{items} items to plan, {copies} copies to make or stage"
    needed = deadlines(connection, now, now + settings.deadline_lead)
    if needed["late"] or needed["near"]:
        words += f"; {needed['late']} items miss their deadline, {needed['near']} are near it"
    return Due(items + copies, words)


def verification_due(connection: Connection, _: Settings, now: datetime) -> Due:
    """Replicas to read again, asked for, in doubt, or by their age."""
    due = count_due(connection, [OperationKind.VERIFY], now) + count_failed_looks(connection, now)
    storages = storages_with_checks_due(connection, now) + storages_in_audit(connection)
    names = ", ".join(storages) or "none"
    return Due(due + len(storages), f"{due} replicas to verify; storages with checks due: {names}")


def expiry_due(connection: Connection, settings: Settings, now: datetime) -> Due:
    """Replicas past their time, and trash to move, purge or restore.

    Raises
    ------
    Blocked
        if nothing is due but what waits for somebody to approve it.
    """
    files = count_due(
        connection, [OperationKind.TRASH, OperationKind.PURGE, OperationKind.RESTORE], now
    )
    due = count_expiry_due(connection, now, settings.max_delete_items + 1)
    approved = approved_plans(connection, now)
    if not (files or due.replicas or approved):
        waiting = waiting_plans(connection)
        if waiting:
            raise Blocked("; ".join(map(_waiting, waiting)))
    words = f"{due.replicas} replicas past their time, {files} file operations"
    if approved:
        words += f", {len(approved)} approved plans"
    return Due(due.replicas + files + len(approved), words)


def _waiting(plan: Mapping[str, Any]) -> str:
    key = plan["plan_id"]
    return (
        f"{plan['operations']} replicas ({plan['bytes']} bytes) wait for approval, since "
        f"{plan['reason']}: "
        f"'dlm plan show {key}', then 'dlm plan approve {key}' or 'dlm plan reject {key}'"
    )


def rebalance_due(connection: Connection, _: Settings, now: datetime) -> Due:
    """Storages too full or being drained, and storages to be asked how full they are."""
    # this question reads the whole tally, so it keeps it short
    fold_long_tally(connection)
    relieve = storages_to_relieve(connection, now)
    ask = storages_to_observe(connection, now - ASK_AGAIN)
    names = ", ".join(row["name"] for row in relieve) or "none"
    return Due(len(relieve) + len(ask), f"storages to relieve: {names}; to be asked: {len(ask)}")


def _ask(question: Question, settings: Settings, now: datetime, connection: Connection) -> Due:
    # of an older schema runs could make nothing
    schema.check(connection)
    return question(connection, settings, now)


def _all_fail(instance: dg.DagsterInstance, job: str) -> bool:
    """Whether the last runs of a job failed one after the other, the last a moment ago: what ends
    all of them, whatever it is, must not become some thousand failed runs a day."""
    now = utc_now()  # Dagster's records have the machine's time, too
    last = instance.get_run_records(
        dg.RunsFilter(job_name=job, statuses=_ENDED, updated_after=now - _FAILING_WITHIN),
        limit=_FAILING_RUNS,
    )
    return (
        len(last) == _FAILING_RUNS
        and all(record.dagster_run.status == dg.DagsterRunStatus.FAILURE for record in last)
        and (now.timestamp() - (last[0].end_time or 0.0)) < _FAILING_PAUSE.total_seconds()
    )


def _sensor(name: str, question: Question, most: int | None = None) -> dg.SensorDefinition:
    settings = load_settings()

    def evaluate(context: dg.SensorEvaluationContext, catalogue: Catalogue) -> dg.SensorResult:
        try:
            current = catalogue.settings()
            core = catalogue.context(f"sensor:{name}", current)
            due = core.transact(partial(_ask, question, current, core.clock()))
        except (DlmError, Blocked) as error:
            return dg.SensorResult(skip_reason=str(error))
        if not due.amount:
            return dg.SensorResult(skip_reason="nothing is due")
        active = context.instance.get_runs_count(
            dg.RunsFilter(job_name=f"{name}_job", statuses=_ACTIVE)
        )
        a_run = min(current.batch_size, _WORTH_A_RUN)
        drainers = min(most or current.max_drainers, -(-due.amount // a_run))
        wanted = drainers - active
        if wanted <= 0:
            return dg.SensorResult(skip_reason=f"{due.words}; {active} runs are at it")
        if _all_fail(context.instance, f"{name}_job"):
            return dg.SensorResult(skip_reason=f"{due.words}; the last runs failed, see why there")
        request = dg.RunRequest(run_config=due.config, tags={"dlm/due": due.words})
        return dg.SensorResult(run_requests=[request] * wanted)

    return dg.SensorDefinition(
        name=f"{name}_sensor",
        job=JOBS[name],
        evaluation_fn=evaluate,
        minimum_interval_seconds=settings.sensor_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=question.__doc__.split("\n")[0] if question.__doc__ else None,
    )


SENSORS = [
    _sensor("registration", registration_due),
    _sensor("replication", replication_due),
    _sensor("verification", verification_due),
    _sensor("expiry", expiry_due),
    # it only marks; two at once would choose the same replicas
    _sensor("rebalance", rebalance_due, most=1),
]
