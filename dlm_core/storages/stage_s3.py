"""The stager for S3's archive classes: RestoreObject asks, HEAD tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dlm_core.errors import InvalidValueError, PayloadNotFoundError
from dlm_core.storages.config import read_config
from dlm_core.storages.s3_client import AT_ONCE, S3Client, code_of
from dlm_core.storages.s3_config import S3Config, keys_of
from dlm_core.storages.staging import Place

#: objects of these classes cannot be read until they are restored (S3 user guide)
_ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")
#: answers to RestoreObject that are as good as yes: on its way, or not archived (any more)
_FINE = ("RestoreAlreadyInProgress", "InvalidObjectState")


class RestoreConfig(BaseModel):
    """What a config with ``stage = s3`` may hold beside the common terms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage_tier: Literal["Standard", "Bulk", "Expedited"] = "Standard"
    stage_days: int = Field(7, ge=1, le=36500, description="A restored object can be read so long.")


def open_s3_stager(place: Place, options: Mapping[str, Any]) -> S3Stager:
    """A stager for a bucket, with the endpoint and the keys of its storage.

    Raises
    ------
    InvalidValueError
        if the storage is no S3 storage, or the config does not fit.
    """
    if place.interface != "s3":
        raise InvalidValueError(
            what=f"stage of storage {place.name}", value="s3", expected="a storage on s3"
        )
    config = read_config(S3Config, place.name, place.config)
    return S3Stager(place, config, read_config(RestoreConfig, place.name, options))


class S3Stager:
    """Restores archived objects for some days; S3 has no request for many, so they go in parallel.

    A rename on S3 is a copy, which an archived object refuses.
    """

    renames_read = True

    def __init__(self, place: Place, config: S3Config, terms: RestoreConfig) -> None:
        self._terms = terms
        self._s3 = S3Client(place.name, place.root, config, keys_of(place.name, config))

    def stage(self, paths: Sequence[str]) -> None:
        client = self._s3.connected()
        request = {
            "Days": self._terms.stage_days,
            "GlacierJobParameters": {"Tier": self._terms.stage_tier},
        }

        def restore(path: str) -> None:
            with suppress(PayloadNotFoundError):  # reading will tell
                self._call(client.restore_object, path, _FINE, RestoreRequest=request)

        with ThreadPoolExecutor(AT_ONCE, "dlm-restore") as pool:
            list(pool.map(restore, paths))

    def online(self, paths: Sequence[str]) -> set[str]:
        client = self._s3.connected()

        def is_online(path: str) -> bool:
            try:
                head = self._call(client.head_object, path)
            except PayloadNotFoundError:
                return False
            return can_be_read(head.get("StorageClass"), head.get("Restore"))

        with ThreadPoolExecutor(AT_ONCE, "dlm-head") as pool:
            return {
                path for path, yes in zip(paths, pool.map(is_online, paths), strict=True) if yes
            }

    def _call(
        self, call: Callable[..., Any], path: str, fine: Sequence[str] = (), **options: Any
    ) -> Any:
        from botocore.exceptions import ClientError

        with self._s3.translated(path):
            try:
                return call(Bucket=self._s3.bucket, Key=self._s3.prefix + path, **options)
            except ClientError as error:
                if code_of(error) in fine:
                    return None
                raise


def can_be_read(storage_class: str | None, restore: str | None) -> bool:
    """What HEAD tells of an object: ``x-amz-storage-class`` and ``x-amz-restore``."""
    if restore:
        return 'ongoing-request="false"' in restore
    return storage_class not in _ARCHIVED
