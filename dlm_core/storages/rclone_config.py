"""What the config of an rclone storage may hold, and where its secrets may stand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dlm_core.errors import InvalidValueError
from dlm_core.storages.config import read_config
from dlm_core.storages.rclone_daemon import RcloneError, daemon
from dlm_core.storages.secrets import SecretReference, read_secret
from dlm_core.storages.wire import WireError

#: Asked at each call for what the backend needs, secrets as they are then.
Options = Callable[[], Mapping[str, str]]

_SECRET = "secret_"
# of options that are secrets, or may hold one
_SECRET_NAMES = re.compile(
    r"pass|secret|token|credential|bearer|private|cookie|authorization|mnemonic|customer_key"
    r"|connection_string|(^|_)(keys?|pem|sas(_url)?|headers|access_grant|session_id)$"
)
# in a URL: a user, a query (a signature, a token)
_CREDENTIALS = re.compile(r"://([^/]*@|.*\?)", re.DOTALL)
_URL = re.compile("[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# a part of a secret that tells something of it
_WORD = re.compile(r"[^\W_]{6,}")
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n",
            "\r": "\\r", "\t": "\\t", "\v": "\\v"}  # fmt: skip
#: what these backends read and rclone does not tell of (by its sources, 1.76)
_UNTOLD = {
    "jottacloud": {"configVersion", "tokenURL", "device", "mountpoint", "username"},
    "pikpak": {"captcha_token"},
}


class RcloneConfig(BaseModel):
    """What ``config`` of an rclone storage may hold: the backend's ``type``, its options by
    rclone's names, and ``secret_<option>`` with a reference for each that is a secret."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = Field(pattern="^[a-z0-9]+$", description="A backend of rclone's.")


def read_rclone_config(name: str, config: Mapping[str, Any]) -> tuple[str, Options]:
    """Type of the backend, and what it needs.

    Raises
    ------
    InvalidValueError
        if a secret is given instead of a reference, or a reference leads to nothing.
    """
    parsed = read_config(RcloneConfig, name, config)
    given = {key: str(value) for key, value in (parsed.model_extra or {}).items()}
    secrets = {k.removeprefix(_SECRET): v for k, v in given.items() if k.startswith(_SECRET)}
    plain = {k: v for k, v in given.items() if not k.startswith(_SECRET)}
    _check_options(name, plain, secrets)

    def options() -> dict[str, str]:
        return plain | {key: read_secret(name, place) for key, place in secrets.items()}

    options()
    return parsed.type, options


def referenced(config: Mapping[str, Any]) -> set[str]:
    """Names of the options that are references to secrets."""
    return {key.removeprefix(_SECRET) for key in config if key.startswith(_SECRET)}


def must_have_options(name: str, config: Mapping[str, Any]) -> None:
    """Ask rclone whether its backend has these options: those that it has not it would ignore.

    Raises
    ------
    InvalidValueError
        of the first that it has not, with what is near. Not if rclone tells nothing of it.
    """
    kind = str(config.get("type"))
    try:
        known = daemon().options_of(kind)
    except (RcloneError, WireError):
        return  # whoever looks at the storage is told why
    for key in config if known else ():
        option = key.removeprefix(_SECRET)
        if key == "type" or option in known or option in _UNTOLD.get(kind, ()):
            continue
        prefix = key.removesuffix(option)
        near = [prefix + one for one in difflib.get_close_matches(option, known)]
        some = f"perhaps {' or '.join(near)}" if near else f"see 'rclone help backend {kind}'"
        raise InvalidValueError(
            what=f"option of storage {name}", value=key,
            expected=f"rclone's {kind} has none of that name; {some}",
        )  # fmt: skip


def _check_options(name: str, plain: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    for key, value in plain.items():
        if is_secret(key, value):
            raise InvalidValueError(
                what=f"config of storage {name}: {key}", value="(not shown)",
                expected=f"{_SECRET}{key}=env:NAME, file:/path or credential:NAME",
            )  # fmt: skip
    for key, place in secrets.items():
        try:
            TypeAdapter(SecretReference).validate_python(place)
        except ValidationError:
            raise InvalidValueError(
                what=f"config of storage {name}: {_SECRET}{key}", value="(not shown)",
                expected="env:NAME, file:/path or credential:NAME",
            ) from None  # fmt: skip


def without_secret(message: str, value: str) -> str:
    """``message`` without a secret, or what of it rclone tells in a spelling of its own.

    Of a URL only the user, the password and the query are secrets by themselves.
    """
    inner = [value]
    if begin := _URL.match(value):
        rest = value[begin.end() :]  # a password may have any sign in it
        inner = [part for part in (rest.rpartition("@")[0], rest.partition("?")[2]) if part]
    forms = {
        form
        for part in (value, *inner)
        for form in (part, _as_go(part), quote(part), quote(part, safe=""))
    }
    words = {word for part in inner for word in _WORD.findall(part)}
    # the longest first: what is left of it when a part is gone could not be found
    for some in (forms, words):
        for one in sorted(some, key=len, reverse=True):
            message = message.replace(one, "(secret)") if one else message
    return message


def _as_go(text: str) -> str:
    """What Go's ``%q`` makes of a text, without the quotes (strconv.Quote)."""
    return "".join(_ESCAPED.get(char) or (char if char.isprintable() else _by_number(char))
                   for char in text)  # fmt: skip


def _by_number(char: str) -> str:
    number = ord(char)
    if number < 0x80:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def is_secret(key: str, value: str) -> bool:
    """Whether an option is one, by its name or by what is in it."""
    return bool(_SECRET_NAMES.search(key) or _CREDENTIALS.search(value))
