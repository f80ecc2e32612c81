"""Settings from the environment (prefix ``DLM_``), all told in docs/settings.md."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dlm_core.errors import InvalidValueError

#: a hundred years, in seconds
_LONGEST = 100 * 31_557_600.0


class Settings(BaseSettings):
    """What a site sets once. Nothing below level 3 reads the environment by itself."""

    model_config = SettingsConfigDict(
        env_prefix="DLM_",
        # compose and env files write "unset" as empty
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
    )

    home: Path = Field(
        default_factory=lambda: Path.home() / ".local/share/dlm",
        description="Folder of everything the DLM keeps on this machine.",
    )
    database_url: SecretStr | None = Field(
        None, description="libpq URL of the catalogue; unset: an embedded PostgreSQL in DLM_HOME."
    )
    dagster_database_url: SecretStr | None = Field(
        None, description="libpq URL of Dagster's database; unset: 'dagster' beside the catalogue."
    )
    pg_bindir: Path | None = Field(
        None, description="Folder with initdb, postgres and pg_ctl for the embedded PostgreSQL."
    )
    webserver_host: str = Field("127.0.0.1", description="Address the Dagster UI binds to.")
    webserver_port: int = Field(
        3000, ge=0, le=65535, description="Its port; a free one if it is 0 or taken."
    )
    compute_logs_bucket: str | None = Field(
        None, description="S3 bucket for Dagster's compute logs; unset: files in DLM_HOME."
    )
    compute_logs_endpoint: str | None = Field(None, description="S3 endpoint of that bucket.")

    batch_size: int = Field(
        5000, ge=1, le=10_000, description="Operations claimed at a time; deletions at most 1000."
    )
    lease_seconds: float = Field(
        300, ge=1, le=7 * 86400, description="Lease of a claimed operation, seconds."
    )
    links_at_once: int = Field(
        4, ge=1, le=64, description="Links that a drainer copies over at a time; 1: no threads."
    )
    resume_bytes: int = Field(
        64 << 20, ge=0, description="Larger files, when interrupted, go on where they were."
    )
    deadline_lead_seconds: float = Field(
        3600, ge=0, description="Copies that are needed within this time go first, and are told."
    )
    linger_seconds: float = Field(20, ge=0, description="A dry drainer waits this long for work.")
    max_drainers: int = Field(2, ge=1, le=64, description="Runs of one job at a time.")
    sensor_interval_seconds: int = Field(5, ge=1, description="Shortest time between ticks.")
    max_attempts: int = Field(8, ge=1, description="Tries of an operation before it is FAILED.")
    retry_base_seconds: float = Field(5, gt=0, description="First back-off; doubles, with jitter.")
    retry_max_seconds: float = Field(3600, gt=0, description="Longest back-off, seconds.")
    trash_grace_seconds: float = Field(
        7 * 86400, ge=0, description="How long trash can be restored, unless the storage says."
    )
    proof_max_age_seconds: float = Field(
        30 * 86400, gt=0, description="A survivor checked longer ago is read again before a purge."
    )
    certificate_seconds: float = Field(
        3600,
        gt=0,
        le=7 * 86400,
        description="How long a proof is good between certificate and effect; 7 days at most.",
    )
    max_delete_items: int = Field(
        100_000, ge=0, description="One run may trash at most this many replicas."
    )
    max_delete_bytes: int = Field(
        100 * 2**40, ge=0, description="One run may trash at most this many bytes."
    )
    max_delete_items_per_day: int = Field(
        500_000, ge=0, description="Within 24 hours at most this many replicas may be trashed."
    )
    max_delete_bytes_per_day: int = Field(
        500 * 2**40, ge=0, description="Within 24 hours at most this many bytes may be trashed."
    )
    max_delete_fraction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="At most this share of a collection may expire; 1: all.",
    )
    delete_fraction_min_items: int = Field(
        100, ge=1, description="Collections with fewer items may expire whole."
    )
    max_delete_error_fraction: float = Field(
        0.1, gt=0, le=1, description="A run stops when more of its deletions fail, of 50 or more."
    )
    approvals: int = Field(
        1, ge=1, le=10, description="People who have to approve a plan that a limit stopped."
    )
    plan_seconds: float = Field(
        7 * 86400, gt=0, description="How long a plan can be approved, and an approval is good."
    )
    dagster_retention_days: float = Field(
        30,
        gt=0,
        le=36_500,
        description="Ended Dagster runs and their events are pruned after this, days.",
    )
    export_hours: float = Field(
        0,
        ge=0,
        le=876_000,
        description="The daily maintenance exports storages described longer ago, hours; 0: none.",
    )
    watch_settle_seconds: float = Field(
        10, ge=0, description="A watched file is registered when unchanged for this long."
    )

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: object) -> object:
        # every number with a fraction is a time or a share; a longer time than this is none
        if isinstance(value, float) and not value <= _LONGEST:
            raise ValueError(f"Input should be at most {_LONGEST:.0f}")
        return value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:  # ~name of nobody
            raise ValueError(str(error)) from None

    @cached_property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_seconds)

    @cached_property
    def deadline_lead(self) -> timedelta:
        return timedelta(seconds=self.deadline_lead_seconds)

    @cached_property
    def trash_grace(self) -> timedelta:
        return timedelta(seconds=self.trash_grace_seconds)


def load_settings(**overrides: object) -> Settings:
    """The settings of this process.

    Raises
    ------
    InvalidValueError
        naming the variable, its value and what would be right.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = "DLM_" + ".".join(map(str, first["loc"])).upper()
        raise InvalidValueError(
            what=name, value=first.get("input"), expected=first["msg"]
        ) from None
