"""Files of path rules: TOML (``[[rule]]``) or YAML (a list, or ``rule:`` with one)."""

from __future__ import annotations

import tomllib
from pathlib import Path

from dlm_core.errors import InvalidValueError


def read_rules(file: str) -> object:
    """The list of rules in a file whose name ends in .toml, .yaml or .yml.

    Raises
    ------
    InvalidValueError
        if it cannot be read, is none, or has something else beside its rules.
    """
    import yaml

    suffix = Path(file).suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise InvalidValueError(what="--path-rules", value=file, expected="a .toml or .yaml file")
    try:
        text = Path(file).read_text(encoding="utf-8")
        found = tomllib.loads(text) if suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InvalidValueError(what="--path-rules", value=file, expected=why) from None
    if isinstance(found, dict) and set(found) == {"rule"}:
        found = found["rule"]
    if not isinstance(found, list):
        raise InvalidValueError(what="--path-rules", value=file, expected="a list of [[rule]]")
    return found
