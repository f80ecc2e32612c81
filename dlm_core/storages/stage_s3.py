"""The stager for S3's archive classes: RestoreObject asks, HEAD tells."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.config import read_config
from dlm_core.storages.s3 import S3Config, keys_of
from dlm_core.storages.s3_keys import Keys
from dlm_core.storages.staging import Place

_AT_ONCE = 32
#: objects of these classes cannot be read until they are restored (S3 user guide)
_ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")
#: answers to RestoreObject that are as good as yes: on its way, or not archived (any more)
_FINE = ("RestoreAlreadyInProgress", "InvalidObjectState")
_ABSENT = ("NoSuchKey", "404", "NotFound")
_DENIED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


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
        self._name, self._config, self._terms = place.name, config, terms
        self._bucket, _, prefix = place.root.strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._read_keys = keys_of(place.name, config)
        self._lock = threading.Lock()
        self._client: tuple[Keys, Any] | None = None

    def stage(self, paths: Sequence[str]) -> None:
        client = self._connected()
        request = {
            "Days": self._terms.stage_days,
            "GlacierJobParameters": {"Tier": self._terms.stage_tier},
        }

        def restore(path: str) -> None:
            with suppress(PayloadNotFoundError):  # reading will tell
                self._call(client.restore_object, path, _FINE, RestoreRequest=request)

        with ThreadPoolExecutor(_AT_ONCE, "dlm-restore") as pool:
            list(pool.map(restore, paths))

    def online(self, paths: Sequence[str]) -> set[str]:
        client = self._connected()

        def is_online(path: str) -> bool:
            try:
                head = self._call(client.head_object, path)
            except PayloadNotFoundError:
                return False
            return can_be_read(head.get("StorageClass"), head.get("Restore"))

        with ThreadPoolExecutor(_AT_ONCE, "dlm-head") as pool:
            return {
                path for path, yes in zip(paths, pool.map(is_online, paths), strict=True) if yes
            }

    def _call(
        self, call: Callable[..., Any], path: str, fine: Sequence[str] = (), **options: Any
    ) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call(Bucket=self._bucket, Key=self._prefix + path, **options)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in fine:
                return None
            raise self._translated(code, path, error) from None
        except BotoCoreError as error:
            raise self._unavailable(" ".join(str(error).split())[:200]) from None

    def _translated(self, code: str, path: str, error: Exception) -> StorageError:
        if code in _ABSENT:
            return PayloadNotFoundError(storage=self._name, path=path)
        if code in _DENIED:
            return AccessDeniedError(storage=self._name, path=path, message=code)
        return self._unavailable(" ".join(str(error).split())[:200])

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self._name, message=message)

    def _connected(self) -> Any:
        """A client with the keys as they are now."""
        try:
            found = self._read_keys()
        except InvalidValueError as error:
            raise self._unavailable(str(error)) from None
        keys = {name: value for name, value in found.items() if name != "expires_at"}
        with self._lock:
            if self._client is None or self._client[0] != keys:
                self._client = keys, self._connect(keys)
            return self._client[1]

    def _connect(self, keys: Keys) -> Any:
        import boto3
        from botocore.config import Config

        style = "path" if self._config.path_style else "virtual"
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self._config.endpoint,
            region_name=self._config.region,
            aws_access_key_id=keys["access_key_id"],
            aws_secret_access_key=keys["secret_access_key"],
            aws_session_token=keys["token"],
            config=Config(
                connect_timeout=5, read_timeout=60, max_pool_connections=_AT_ONCE,
                retries={"mode": "standard", "max_attempts": 4}, s3={"addressing_style": style},
            ),
        )  # fmt: skip


def can_be_read(storage_class: str | None, restore: str | None) -> bool:
    """What HEAD tells of an object: ``x-amz-storage-class`` and ``x-amz-restore``."""
    if restore:
        return 'ongoing-request="false"' in restore
    return storage_class not in _ARCHIVED
