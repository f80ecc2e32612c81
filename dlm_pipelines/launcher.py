"""Launch runs as Dagster does by default, and notice runs whose worker is gone.

The code server reports a worker that dies. When it dies too, or the database is away at that
moment, the run counts as running until its maximal time, and its sensor waits for it.
"""

from __future__ import annotations

import json

import psutil
from dagster import DagsterEventType, DagsterRun, DefaultRunLauncher
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

#: seconds between a process' start as the kernel tells it and Dagster's clock, at most
_CLOCK_SLACK = 2.0
_FIRST_EVENTS = 20


class WatchfulRunLauncher(DefaultRunLauncher):
    """Dagster's run monitoring asks it; a run without its worker is FAILURE within a poll."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether the worker's process lives; what cannot be known from here counts as alive."""
        # a socket is on this machine; behind a port the worker may be anywhere
        if "socket" not in json.loads(run.tags.get(GRPC_INFO_TAG, "{}")):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        worker = self._worker(run.run_id)
        if worker is None or _lives(*worker):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.NOT_FOUND,
            f"its process {worker[0]} is gone; what it had not finished is due again",
        )

    def _worker(self, run_id: str) -> tuple[int, float] | None:
        """The pid that the worker told at its start, and when."""
        logs = self._instance.event_log_storage.get_logs_for_run(
            run_id, of_type=DagsterEventType.ENGINE_EVENT, limit=_FIRST_EVENTS
        )
        for entry in logs:
            event = entry.get_dagster_event()
            pid = event.engine_event_data.metadata.get("pid")
            if pid is not None:
                return int(str(pid.value)), entry.timestamp
        return None


def _lives(pid: int, told_at: float) -> bool:
    """Whether it is still that process: pids are used again."""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.create_time() <= told_at + _CLOCK_SLACK
    except psutil.NoSuchProcess:
        return False
