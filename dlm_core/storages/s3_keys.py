"""The keys of an S3 storage, read again and again, so that they are rotated without a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from dlm_core.errors import InvalidValueError
from dlm_core.storages.secrets import read_secret

#: keys that were read are used so long; a rotated one is found within this time, in seconds
KEPT_SECONDS = 2.0
#: what AWS's own chain found, unless it renews itself (a role's keys do), in seconds
CHAIN_SECONDS = 60.0

# obstore asks for new keys so long before they expire (and not again within 0.1 s): told this, it
# keeps them as long as we do, and signing a request takes no call into Python
_ASKED_AHEAD = timedelta(minutes=5)

Keys = dict[str, Any]


class KeyProvider:
    """Gives obstore the keys of a storage whenever it wants them; thread-safe.

    Parameters
    ----------
    read : reads access_key_id, secret_access_key and token (or None) as they are now
    kept_seconds : for so long they are not read again; KEPT_SECONDS if None
    """

    def __init__(self, read: Callable[[], Keys], kept_seconds: float | None = None) -> None:
        self._read = read
        self._kept_seconds = KEPT_SECONDS if kept_seconds is None else kept_seconds
        self._lock = threading.Lock()
        self._keys: Keys = {}
        self._until = 0.0

    def __call__(self) -> Any:
        with self._lock:
            if time.monotonic() >= self._until:
                self._keys = self._read()
                self._until = time.monotonic() + self._kept_seconds
            left = timedelta(seconds=self._until - time.monotonic())
            return self._keys | {"expires_at": datetime.now(UTC) + _ASKED_AHEAD + left}


def from_references(
    storage: str, access_key: str, secret_key: str, session_token: str | None
) -> KeyProvider:
    """Keys that references name; they are read now for the first time.

    Raises
    ------
    InvalidValueError
        if a reference leads to nothing, or to what cannot stand in a header.
    """

    def read() -> Keys:
        return _of_one_line(
            storage,
            {
                "access_key_id": read_secret(storage, access_key),
                "secret_access_key": read_secret(storage, secret_key),
                "token": read_secret(storage, session_token) if session_token else None,
            },
        )

    provider = KeyProvider(read)
    provider()
    return provider


def from_aws_chain(storage: str) -> KeyProvider:
    """Keys from where AWS's own tools look: variables, profile, web identity, container, instance.

    Nothing is looked for before the first request.
    """
    found: list[Any] = [None, 0.0]

    def read() -> Keys:
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import BotoCoreError, ClientError

        credentials, at = found
        renews_itself = isinstance(credentials, RefreshableCredentials)
        try:
            if credentials is None or (time.monotonic() > at + CHAIN_SECONDS and not renews_itself):
                credentials = _look_up(storage)
                found[:] = credentials, time.monotonic()
            frozen = credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError, OSError) as error:
            # a profile, a token's file, a service that gives keys: what is wrong may be mended
            why = " ".join(str(error).split())[:200]
            raise _lacking(storage, f"credentials that AWS's own tools can have ({why})") from None
        return _of_one_line(
            storage,
            {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
            },
        )

    return KeyProvider(read)


def _look_up(storage: str) -> Any:
    import botocore.session

    credentials = botocore.session.Session().get_credentials()
    if credentials is None:
        expected = "a reference, or credentials where AWS's own tools look for them"
        raise _lacking(storage, expected)
    return credentials


def _lacking(storage: str, expected: str) -> InvalidValueError:
    return InvalidValueError(what=f"storage {storage}: access_key", value="", expected=expected)


def _of_one_line(storage: str, keys: Keys) -> Keys:
    """``keys``, if they can stand in a header: obstore ends by a panic over what cannot, which
    nobody catches, and boto3 shows it."""
    for name, value in keys.items():
        if value and not value.isprintable():
            raise InvalidValueError(
                what=f"storage {storage}: {name}", value="(not shown)", expected="one line"
            )
    return keys
