"""Reading a storage's ``config`` into the model of its interface."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, TypeVar
from unicodedata import is_normalized
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from dlm_core.errors import InvalidValueError
from dlm_core.storages.secrets import REFERENCE

_Model = TypeVar("_Model", bound=BaseModel)
#: the last label of what is read as an address (WHATWG URL)
_NUMBER = re.compile("[0-9]+|0x[0-9a-f]*")


def read_config(model: type[_Model], name: str, config: Mapping[str, Any]) -> _Model:
    """``config`` of the storage ``name`` as ``model`` says.

    Raises
    ------
    InvalidValueError
        in one line, which says what may stand there and never shows a value: it may be a secret
        that was given instead of its variable's name.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        what, key = f"config of storage {name}", ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            lacking = f"without {key}"
            raise InvalidValueError(what=what, value=lacking, expected=f"{key}=…") from None
        expected = first["msg"]
        if first["type"] == "extra_forbidden":
            expected = f"one of {', '.join(model.model_fields)}"
        elif first.get("ctx", {}).get("pattern") == REFERENCE:
            expected = "env:NAME, file:/path or credential:NAME, where the secret is"
        raise InvalidValueError(
            what=f"{what}: {key}" if key else what,
            value="(not shown)",
            expected=expected,
        ) from None


def is_host(host: str) -> bool:
    """Whether a host may have such a name or address. Clients end in many ways on what none can
    have, obstore by a panic."""
    name = host.lower().removesuffix(".")
    try:
        labels = name.split(".")
        if ":" in name or _NUMBER.fullmatch(labels[-1]):
            return bool(ip_address(name))
        encoded = name.encode("idna")
        puny = [one[4:].encode().decode("punycode") for one in labels if one.startswith("xn--")]
    except ValueError:
        return False
    return len(encoded) <= 253 and all(map(_is_label, puny))


def _is_label(text: str) -> bool:
    """Whether a label may stand for this in punycode."""
    plain = text.isprintable() and is_normalized("NFKC", text) and text == text.lower().strip("-")
    return plain and not text.isascii()


def has_host(url: str) -> bool:
    """Whether a URL names a host, and maybe a port, that there may be."""
    try:
        parts = urlsplit(url)
        return parts.port != 0 and is_host(parts.hostname or "")
    except ValueError:
        return False
