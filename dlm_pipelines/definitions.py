"""The code location: everything that Dagster loads."""

from __future__ import annotations

import dagster as dg

from dlm_pipelines.jobs import JOBS
from dlm_pipelines.maintenance import maintenance_job, maintenance_schedule
from dlm_pipelines.resources import Catalogue
from dlm_pipelines.sensors import SENSORS

defs = dg.Definitions(
    jobs=[*JOBS.values(), maintenance_job],
    sensors=SENSORS,
    schedules=[maintenance_schedule],
    # nothing reads what a job returns: no file is kept of it
    resources={"catalogue": Catalogue(), "io_manager": dg.mem_io_manager},
)
