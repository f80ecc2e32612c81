"""Secrets by reference: the catalogue says where a secret is found, never what it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dlm_core.errors import InvalidValueError

#: ``env:NAME`` (a variable), ``file:/absolute/path`` or ``credential:NAME`` (what systemd's
#: LoadCredential= put into $CREDENTIALS_DIRECTORY, https://systemd.io/CREDENTIALS)
REFERENCE = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+|credential:[A-Za-z0-9_.-]+)$"
SecretReference = Annotated[str, Field(pattern=REFERENCE)]


def read_secret(storage: str, reference: str) -> str:
    """The secret that ``reference`` names, as it is at this moment: a rotated one is found at once.

    Parameters
    ----------
    storage : name of the storage that needs it, for the message
    reference : see :data:`SecretReference`

    Raises
    ------
    InvalidValueError
        if nothing is there. The message names the reference, never a value.
    """
    kind, _, place = reference.partition(":")
    value = _from_variable(place) if kind == "env" else _from_file(kind, place)
    if not value:
        raise InvalidValueError(
            what=f"storage {storage}: secret", value=reference, expected=_expected(kind, place)
        )
    return value


def _expected(kind: str, place: str) -> str:
    """What would be right where a reference leads to nothing."""
    if kind == "env":
        return f"the variable {place} with the secret in it"
    if kind == "file":
        return "a file that can be read, with the secret in it"
    if os.environ.get("CREDENTIALS_DIRECTORY"):
        return f"a file {place} in $CREDENTIALS_DIRECTORY, put there by LoadCredential={place}:…"
    return (
        "only systemd units have credentials, a shell has none; run this with 'systemd-run --pty "
        f"--property=LoadCredential={place}:/its/file dlm …', or set CREDENTIALS_DIRECTORY to the "
        f"folder of a file {place}"
    )


def _from_variable(name: str) -> str:
    # whoever filled the variable from a file may have left its final newline
    value = os.environ.get(name, "").rstrip("\r\n")
    # octets that are no UTF-8 are no text of a protocol
    return value if value.encode("utf-8", "replace").decode() == value else ""


def _from_file(kind: str, place: str) -> str:
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "") if kind == "credential" else "/"
    if not folder:
        return ""
    try:
        # the final newline is the editor's
        return Path(folder, place).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError):  # no UTF-8, or no name of a file
        return ""
