"""What an S3 storage is told, and where it finds its keys and certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dlm_core.errors import InvalidValueError
from dlm_core.storages.config import has_host
from dlm_core.storages.s3_client import authorities
from dlm_core.storages.s3_keys import KeyProvider, from_aws_chain, from_references
from dlm_core.storages.secrets import SecretReference


class S3Config(BaseModel):
    """What ``config`` of an S3 storage may hold. Keys are named by reference, never given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(
        None,
        # nothing else may stand there: neither user:password@ nor a query has a place in it
        pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]+)?/?$|^https?://\[[0-9A-Fa-f:]+\](:[0-9]+)?/?$",
        description="URL of the service; unset: AWS.",
    )
    region: str = Field(
        "us-east-1", pattern="^[a-z0-9-]{1,40}$", description="Region that requests are signed for."
    )
    access_key: SecretReference | None = None
    secret_key: SecretReference | None = None
    session_token: SecretReference | None = None
    path_style: bool = Field(True, description="Bucket in the path rather than the host name.")
    storage_class: str | None = Field(
        None, pattern="^[A-Z_]{1,40}$", description="What objects are written as, e.g. GLACIER."
    )

    @field_validator("endpoint")
    @classmethod
    def _of_a_host(cls, value: str | None) -> str | None:
        if value is not None and not has_host(value):
            raise ValueError("there can be no such host or port")
        return value

    @model_validator(mode="after")
    def _both_keys(self) -> Self:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key go together")
        if self.session_token is not None and self.access_key is None:
            raise ValueError("session_token goes with access_key and secret_key")
        return self


def trusting(name: str) -> dict[str, str]:
    """The certificates that boto3 trusts, for obstore, which adds them to the system's."""
    file = authorities()
    if file is None or Path(file).is_dir():
        return {}
    try:
        return {"root_certificate": Path(file).read_text("ascii", "replace")}
    except OSError as error:
        raise InvalidValueError(
            what=f"AWS_CA_BUNDLE or SSL_CERT_FILE, for storage {name}",
            value=file,
            expected=f"a file of certificates ({error.strerror})",
        ) from None


def keys_of(name: str, config: S3Config) -> KeyProvider:
    """Where the keys of a storage come from: its references, or AWS's own chain."""
    if config.access_key and config.secret_key:
        return from_references(name, config.access_key, config.secret_key, config.session_token)
    return from_aws_chain(name)
