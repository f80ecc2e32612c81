"""What obstore has no call for, by boto3, with the keys of the storage as they are now."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dlm_core.errors import (
    AccessDeniedError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.s3_keys import KeyProvider, Keys

if TYPE_CHECKING:
    from dlm_core.storages.s3_config import S3Config

#: requests at once, at most
AT_ONCE = 32
DENIED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
#: what servers answer that have no such request
UNKNOWN = ("NotImplemented", "MethodNotAllowed", "501", "405")
_ABSENT = ("NoSuchKey", "404", "NotFound")
_TAKEN = ("PreconditionFailed", "412")


class S3Client:
    """A bucket, or a prefix of it, by boto3; thread-safe.

    Parameters
    ----------
    name : of the storage, for errors.
    root : ``bucket`` or ``bucket/prefix``.
    keys : asked for each client that is wanted; another one is made when they changed.
    """

    def __init__(self, name: str, root: str, config: S3Config, keys: KeyProvider) -> None:
        self.name, self._config, self._keys = name, config, keys
        self.bucket, _, prefix = root.strip("/").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._client: tuple[Keys, Any] | None = None

    def connected(self) -> Any:
        """A client with the keys as they are now.

        Raises
        ------
        StorageUnavailableError
            if a reference to a key leads to nothing: it may be on its way.
        """
        try:
            found = self._keys()
        except InvalidValueError as error:
            raise self.unavailable(str(error)) from None
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
            verify=authorities(),
            config=Config(
                connect_timeout=5, read_timeout=60, max_pool_connections=AT_ONCE,
                retries={"mode": "standard", "max_attempts": 4},
                # bodies go with their MD5, which the server checks: no second digest of them
                s3={"addressing_style": style, "payload_signing_enabled": False},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )  # fmt: skip

    @contextmanager
    def translated(self, path: str) -> Iterator[None]:
        """What boto3 raises, in the port's words; they show no key."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except ClientError as error:
            raise self._told(path, error) from None
        except BotoCoreError as error:
            raise self.unavailable(one_line(error)) from None
        except ResponseParserError:  # no error of boto3's own, and with the whole answer in it
            raise self.unavailable("its answer cannot be understood") from None
        except KeyError as error:
            raise self.unavailable(f"its answer tells no {error}") from None

    def _told(self, path: str, error: Any) -> StorageError:
        code = code_of(error)
        if code in _ABSENT:
            return PayloadNotFoundError(storage=self.name, path=path)
        if code in _TAKEN:
            return PayloadExistsError(storage=self.name, path=path)
        if code in DENIED:
            return AccessDeniedError(storage=self.name, path=path, message=code)
        return self.unavailable(one_line(error))

    def unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)


def authorities() -> str | None:
    """A file of certificates to trust, if one is named; obstore knows the second variable only."""
    return os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or None


def code_of(error: Any) -> str:
    """S3's own word for what went wrong."""
    return str(error.response.get("Error", {}).get("Code", ""))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
