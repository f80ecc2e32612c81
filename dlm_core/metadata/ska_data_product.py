"""``ska-data-product.yaml`` (SKA ADR-55): the metadata file of a data product."""

from __future__ import annotations

import json
from typing import Any

from dlm_core.storages.port import Storage
from dlm_core.types import Observation, PayloadKind

_NAME = "ska-data-product.yaml"
_LIMIT = 1 << 20


def extract(storage: Storage, path: str, seen: Observation) -> dict[str, Any] | None:
    """The file's content, of a directory payload that has one or of the file itself.

    Raises
    ------
    ValueError
        if it is no YAML mapping, or above 1 MiB.
    """
    if seen.kind is PayloadKind.DIRECTORY:
        if not any(entry.path == _NAME for entry in seen.manifest):
            return None
        path = f"{path}/{_NAME}"
    elif path.rpartition("/")[2] != _NAME:
        return None
    with storage.open_read(path) as stream:
        if stream.size > _LIMIT:
            raise ValueError(f"{_NAME} is larger than {_LIMIT} bytes")
        data = stream.read()
    import yaml  # few payloads have such a file, and all that admits would wait for it

    try:
        content = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("not a mapping")
    found: dict[str, Any] = json.loads(_text(content), parse_constant=str)
    return found


def _text(content: dict[str, Any]) -> str:
    """As JSON that jsonb can hold: dates and the like as text, no NUL and no half of a pair. What
    names itself again and again by aliases may be much more than its file."""
    parts, size = list[str](), 0
    for part in json.JSONEncoder(default=str, ensure_ascii=False).iterencode(content):
        parts.append(part)
        size += len(part)
        if size > _LIMIT:
            raise ValueError(f"{_NAME} says more than {_LIMIT} characters")
    text = "".join(parts).encode("utf-8", "replace").decode()
    return text.replace("\\u0000", "")
