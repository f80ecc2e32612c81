"""What storages behind a URL have in common: the URL itself, and who asks."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dlm_core.errors import InvalidValueError
from dlm_core.storages.config import has_host, read_config
from dlm_core.storages.secrets import SecretReference, read_secret


class WebConfig(BaseModel):
    """What ``config`` of such a storage may hold. Secrets are named by reference, never given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str | None = Field(None, pattern="^[^:]+$", description="For HTTP's basic scheme.")
    password: SecretReference | None = None
    token: SecretReference | None = Field(None, description="A bearer token.")

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        return self


def read_web_config(name: str, root: str, config: Mapping[str, Any]) -> WebConfig:
    """``config`` of a storage whose ``root`` is a URL, if both are as they should be.

    Raises
    ------
    InvalidValueError
        if the config has unknown keys, ``root`` is no plain URL, or a reference leads to nothing.
    """
    parsed = read_config(WebConfig, name, config)
    check_url(name, root)
    read_authorization(name, parsed)
    return parsed


def read_authorization(name: str, config: WebConfig) -> str:
    """The Authorization header as it is at this moment, or an empty string.

    Raises
    ------
    InvalidValueError
        if a reference leads to nothing, or to what cannot stand in a header.
    """
    if config.token:
        token = read_secret(name, config.token)
        if not (token.isascii() and token.isprintable()):
            raise InvalidValueError(
                what=f"storage {name}: {config.token}", value="(not shown)", expected="one line"
            )
        return f"Bearer {token}"
    if not config.user or not config.password:
        return ""
    password = read_secret(name, config.password)
    return "Basic " + base64.b64encode(f"{config.user}:{password}".encode()).decode()


def check_url(name: str, root: str) -> None:
    """Refuse what is no plain URL; it is not shown, for it may have a password in it.

    Raises
    ------
    InvalidValueError
    """
    try:
        parts = urlsplit(root)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in root
        plain = plain and has_host(root) and not (parts.query or parts.fragment)
        plain = plain and root.isascii() and root.isprintable() and " " not in root
    except ValueError:
        plain = False
    if not plain:
        raise InvalidValueError(
            what=f"root of storage {name}",
            value="(not shown)",
            expected="a URL, http(s)://host/folder, without user, password or query",
        )
