"""Reading a storage's ``config`` into the model of its interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dlm_core.errors import InvalidValueError

_Model = TypeVar("_Model", bound=BaseModel)


def read_config(model: type[_Model], name: str, config: Mapping[str, Any]) -> _Model:
    """``config`` of the storage ``name`` as ``model`` says.

    Raises
    ------
    InvalidValueError
        in one line, which names what may stand there and never shows a value: it may be a secret
        that was given instead of its variable's name.
    """
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidValueError(
            what=f"config of storage {name}: " + ".".join(map(str, first["loc"])),
            value="(not shown)",
            expected=f"{', '.join(model.model_fields)} ({first['msg']})",
        ) from None
