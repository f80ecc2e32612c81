"""Housekeeping, once a day: partitions, the tally, the log's seals, temporary files, old runs."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from dlm_core.catalogue.housekeeping import ensure_partitions, fold_tally
from dlm_core.catalogue.operations import cancel_overtaken, owned_on, partials_on
from dlm_core.catalogue.seals import newest_seals
from dlm_core.catalogue.staging import forget_waits
from dlm_core.catalogue.urgency import forget_met
from dlm_core.errors import DlmError
from dlm_core.lifecycle.export import export_due
from dlm_core.lifecycle.pack import pack_due
from dlm_core.lifecycle.seal import seal_log
from dlm_core.lifecycle.work import Context
from dlm_core.transfers.sweep import sweep_parts, sweep_temp
from dlm_pipelines.resources import Catalogue

#: longer than any copy may take
_TEMP_AGE = timedelta(days=2)
#: a deadline that was met is forgotten after this
_DEADLINE_AGE = timedelta(days=7)
_PRUNED_AT_ONCE = 500
_REPORTED_DAYS = 90
_T = TypeVar("_T")


@dg.op(
    description="Make partitions ahead, fold the tally, seal the log, sweep temporary files, "
    "prune old runs, let storages describe themselves if DLM_EXPORT_HOURS says so, pack small "
    "files where a storage wants bundles."
)
def housekeeping(context: dg.OpExecutionContext, catalogue: Catalogue) -> None:
    """Each part by itself: a storage that is down does not keep the others from being done. What
    nobody expects, or the catalogue refuses of its own parts, fails the run when all that can be
    done is done."""
    failed: list[Exception] = []
    core = catalogue.context(f"run:{context.run_id}")
    _keep_catalogue(context, core, failed)
    swept = sum(_each(context, _sweeps(core), failed))
    before = core.clock() - timedelta(days=core.settings.dagster_retention_days)
    pruned = sum(_each(context, [partial(_prune, context.instance, before)], failed))
    context.log.info(
        f"{swept} temporary files and unfinished uploads swept, {pruned} old runs pruned"
    )
    _export(context, core, failed)
    _pack(context, core, failed)  # last: it may take long
    if failed:
        error = failed[0]
        if isinstance(error, DlmError):
            raise dg.Failure(f"{error.code}: {error}", allow_retries=error.retryable)
        raise error


def _keep_catalogue(context: dg.OpExecutionContext, core: Context, failed: list[Exception]) -> None:
    """The catalogue's own parts, each of which has to be done."""
    parts: tuple[Callable[[], object], ...] = (
        lambda: core.transact(lambda c: ensure_partitions(c, core.clock())),
        lambda: core.transact(fold_tally),
        lambda: core.transact(lambda c: cancel_overtaken(c, core.clock())),
        lambda: core.transact(lambda c: forget_waits(c, core.clock())),
        lambda: core.transact(lambda c: forget_met(c, core.clock() - _DEADLINE_AGE)),
        lambda: _tell(context, core),
    )
    for _ in _each(context, parts, failed, must=True):
        pass


def _tell(context: dg.OpExecutionContext, core: Context) -> None:
    """Seal the days that are over, and tell the newest seals, which so stand outside the catalogue,
    and how the verification goes."""
    sealed = seal_log(core)
    if sealed is None:
        context.log.warning("the log is not sealed: a long transaction is still running")
    heads = core.transact(newest_seals)
    context.add_output_metadata(
        {"days_sealed": sealed or 0} | {f"seal_{f}": h for f, h in heads.items()}
    )


def _sweeps(core: Context) -> Iterator[Callable[[], int]]:
    for row in core.transact(core.storages.load).values():
        if row["managed"] and row["mode"] in ("read_write", "draining"):
            yield partial(_sweep, core, row)


def _sweep(core: Context, row: Mapping[str, Any]) -> int:
    """Clear one storage of what crashes left behind; how many files and uploads that were."""
    storage, on = core.storages.open(row), row["storage_id"]
    kept = core.transact(partial(partials_on, storage_id=on))
    swept = sweep_temp(storage, _TEMP_AGE, core.clock(), kept)

    def owned(paths: Sequence[str]) -> dict[str, bool]:
        found: dict[str, bool] = core.transact(lambda c: owned_on(c, on, paths))
        return found

    return swept + sweep_parts(storage, _TEMP_AGE, core.clock(), owned)


def _prune(instance: dg.DagsterInstance, before: datetime) -> int:
    """Forget runs that began before and have ended, with what they printed and returned; how many.

    The record goes last: what cannot be deleted now is found again tomorrow.
    """
    ended = [
        dg.DagsterRunStatus.SUCCESS,
        dg.DagsterRunStatus.FAILURE,
        dg.DagsterRunStatus.CANCELED,
    ]
    old, count = dg.RunsFilter(created_before=before, statuses=ended), 0
    # a busy site has some thousand runs a day
    while some := instance.get_run_records(old, limit=_PRUNED_AT_ONCE, ascending=True):
        for record in some:
            run_id = record.dagster_run.run_id
            instance.compute_log_manager.delete_logs(prefix=[run_id])
            shutil.rmtree(Path(instance.storage_directory()) / run_id, ignore_errors=True)
            instance.delete_run(run_id)
        count += len(some)
    return count


def _export(context: dg.OpExecutionContext, core: Context, failed: list[Exception]) -> None:
    hours = core.settings.export_hours
    due = export_due(core, timedelta(hours=hours)) if hours else ()
    for report in _each(context, due, failed):
        context.log.info(
            f"storage {report.storage}: description {report.generation} of {report.replicas} "
            f"replicas, {report.written} of {report.files} files written"
        )


def _pack(context: dg.OpExecutionContext, core: Context, failed: list[Exception]) -> None:
    for report in _each(context, pack_due(core), failed):
        context.log.info(
            f"storage {report.storage}: {report.members} files packed into {report.bundles} "
            f"bundles, {report.removed} bundles removed, {report.waiting} files wait, "
            f"{report.offline} are offline"
        )
        if report.refused:
            context.log.warning(
                f"storage {report.storage}: {len(report.refused)} files are not what the "
                f"catalogue says and were not packed, e.g. {report.refused[0]!r}"
            )


def _each(
    context: dg.OpExecutionContext,
    runs: Iterable[Callable[[], _T]],
    failed: list[Exception],
    *,
    must: bool = False,
) -> Iterator[_T]:
    """The reports of what is done part by part, or for one storage after another; a failure stops
    no other. What is no error of ours is put into ``failed``; all of them if it ``must`` be done.
    """
    for run in runs:
        try:
            yield run()
        except DlmError as error:
            context.log.warning(f"{error.code}: {error}")
            if must:
                failed.append(error)
        except Exception as error:
            context.log.exception("unexpected; the rest is gone on with")
            failed.append(error)


@dg.job(
    name="maintenance_job",
    description="Housekeeping of the catalogue, the storages and Dagster's own records.",
    executor_def=dg.in_process_executor,
    tags={"dlm/job": "maintenance"},
)
def maintenance_job() -> None:
    housekeeping()


maintenance_schedule = dg.ScheduleDefinition(
    name="maintenance_schedule",
    job=maintenance_job,
    cron_schedule="17 3 * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)
