"""Dagster's own storage, from the DLM's settings.

``dagster.yaml`` names these classes and holds neither an address nor a secret; whoever loads it,
``dlm up``, ``dagster dev`` or a run worker, finds the same database and folders by ``DLM_*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg2
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._config.config_schema import UserConfigSchema
from dagster._core.storage.compute_log_manager import ComputeLogManager
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._serdes import ConfigurableClassData
from dagster_postgres import (
    DagsterPostgresStorage,
    PostgresEventLogStorage,
    PostgresRunStorage,
    PostgresScheduleStorage,
)
from sqlalchemy import Engine, event
from sqlalchemy.exc import DisconnectionError

from dlm_core.catalogue.dsn import dagster_dsn, sqlalchemy_url
from dlm_core.errors import StorageUnavailableError
from dlm_core.settings import Settings, load_settings

_IN_PROGRESS = [
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]


def dagster_home(settings: Settings) -> Path:
    """The folder that ``DAGSTER_HOME`` names; Dagster's files lie in it."""
    return settings.home / "dagster"


def _ping(connection: Any, _record: object, _proxy: object) -> None:
    """Tell the pool of a connection whose server is gone; it then takes a new one."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except psycopg2.Error as error:
        raise DisconnectionError from error


class _Pinging:
    """The webserver keeps connections; without this each fails once after a restart."""

    _engine: Engine

    def optimize_for_webserver(self, *args: Any, **options: Any) -> None:
        super().optimize_for_webserver(*args, **options)  # type: ignore[misc]
        event.listen(self._engine, "checkout", _ping)


class _RunStorage(_Pinging, PostgresRunStorage): ...


class _EventLogStorage(_Pinging, PostgresEventLogStorage): ...


class _ScheduleStorage(_Pinging, PostgresScheduleStorage): ...


class CatalogueSideStorage(DagsterPostgresStorage):
    """Runs, events and schedules in Dagster's database, beside the catalogue.

    Starts the embedded PostgreSQL if it is that one and sleeps.
    """

    def __init__(self, url: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(url, inst_data=inst_data)
        self._run_storage = _RunStorage(url)
        self._event_log_storage = _EventLogStorage(url)
        self._schedule_storage = _ScheduleStorage(url)

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> CatalogueSideStorage:
        # psycopg2 by name: its NOTIFY with a bound parameter fails on psycopg 3, which is what
        # SQLAlchemy 2.1 takes for a bare postgresql://
        url = sqlalchemy_url(dagster_dsn(load_settings()), "psycopg2")
        return cls(url.render_as_string(hide_password=False), inst_data=inst_data)


class ComputeLogs(LocalComputeLogManager):
    """What ops print: in the S3 bucket of the settings, else in files below ``DLM_HOME``."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(  # type: ignore[override]
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> ComputeLogManager[DagsterInstance]:
        settings = load_settings()
        folder = str(dagster_home(settings) / "compute_logs")
        if settings.compute_logs_bucket is None:
            return cls(folder, inst_data=inst_data)
        # boto3 takes a second to import: only who uses it pays
        import boto3
        from botocore.config import Config
        from dagster_aws.s3 import S3ComputeLogManager

        manager = S3ComputeLogManager(
            bucket=settings.compute_logs_bucket,
            endpoint_url=settings.compute_logs_endpoint,
            local_dir=folder,
            prefix="dlm-compute-logs",
            upload_interval=30,
            inst_data=inst_data,
        )
        # the end of each run waits for its upload: by boto3's own patience, minutes for a bucket
        # that hangs, and nothing else of its job is done meanwhile. dagster-aws takes no config
        tries = {"mode": "standard", "total_max_attempts": 2}
        patience = Config(connect_timeout=5, read_timeout=10, retries=tries)
        manager._s3_session = boto3.client(
            "s3", endpoint_url=settings.compute_logs_endpoint, config=patience
        )
        return manager


class ArtifactStorage(LocalArtifactStorage):
    """Dagster's small files, below ``DLM_HOME``."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> ArtifactStorage:
        return cls(str(dagster_home(load_settings())), inst_data=inst_data)


def check_compute_logs() -> None:
    """Ask for the bucket of what ops print, if there is one.

    Raises
    ------
    StorageUnavailableError
        if it does not let itself be used.
    """
    manager = ComputeLogs.from_config_value(None, {})
    if isinstance(manager, ComputeLogs):
        return
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = load_settings().compute_logs_bucket or ""
    try:
        manager._s3_session.head_bucket(Bucket=bucket)  # type: ignore[attr-defined]
    except (BotoCoreError, ClientError) as error:
        told = f"{str(error).strip().splitlines()[0]}; what runs print stays in DLM_HOME meanwhile"
        raise StorageUnavailableError(storage=bucket, message=told) from None


def end_lost_runs(instance: DagsterInstance) -> int:
    """Mark every run in progress as failed; only for who knows that no worker lives any more.

    A run whose worker and code server both died would count as running until its maximal time
    and keep its place in the queue's limits.
    """
    lost = instance.get_runs(RunsFilter(statuses=_IN_PROGRESS))
    for run in lost:
        instance.report_run_failed(
            run, "The services ended while it ran. What it had not finished is due again."
        )
    return len(lost)


def prepare(settings: Settings) -> int:
    """Make Dagster's tables; end the runs that a crash left behind. Returns how many those were.

    Runs are ended only when the database is the embedded one: a shared one may have workers on
    other machines.
    """
    own = settings.database_url is None and settings.dagster_database_url is None
    with DagsterInstance.from_config(str(dagster_home(settings))) as instance:
        return end_lost_runs(instance) if own else 0


if __name__ == "__main__":
    prepare(load_settings())
