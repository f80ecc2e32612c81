"""Housekeeping, once a day: partitions, the tally, temporary files, Dagster's old runs."""

from datetime import timedelta

import dagster as dg

from dlm_core.catalogue.housekeeping import ensure_partitions, fold_tally
from dlm_core.errors import DlmError
from dlm_core.transfers.sweep import sweep_temp
from dlm_pipelines.resources import Catalogue

#: longer than any copy may take
_TEMP_AGE = timedelta(days=2)
_PRUNED_AT_ONCE = 500


@dg.op(description="Make partitions ahead, fold the tally, sweep temporary files, prune old runs.")
def housekeeping(context: dg.OpExecutionContext, catalogue: Catalogue) -> None:
    """Each part by itself: a storage that is down does not keep the others from being done."""
    core = catalogue.context(f"run:{context.run_id}")
    core.transact(lambda c: ensure_partitions(c, core.clock()))
    core.transact(fold_tally)
    swept = 0
    for row in core.transact(core.storages.load).values():
        if not row["managed"] or row["mode"] not in ("read_write", "draining"):
            continue
        try:
            swept += sweep_temp(core.storages.open(row), _TEMP_AGE, core.clock())
        except DlmError as error:
            context.log.warning(f"{error.code}: {error}")
    before = core.clock() - timedelta(days=core.settings.dagster_retention_days)
    old = context.instance.get_run_records(
        dg.RunsFilter(
            created_before=before,
            statuses=[
                dg.DagsterRunStatus.SUCCESS,
                dg.DagsterRunStatus.FAILURE,
                dg.DagsterRunStatus.CANCELED,
            ],
        ),
        limit=_PRUNED_AT_ONCE,
    )
    for record in old:
        context.instance.delete_run(record.dagster_run.run_id)
    context.log.info(f"{swept} temporary files swept, {len(old)} old runs pruned")


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
