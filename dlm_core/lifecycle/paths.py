"""Where copies lie on a storage: from the item's name by the site's rules, or as the name says.

A rule is a chain of steps, each a regular expression that has to match the whole text and a
template for the next text; the first rule all of whose steps match gives the path. The first text
is the uri with its percent-encoding undone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from string import Formatter
from typing import Any

from dlm_core.errors import InvalidValueError
from dlm_core.storages.port import PRIVATE
from dlm_core.types import decode_path, encode_path

_LONGEST_HASH = 40
_BUILT_IN = ("scheme", "path", "name", "version", "hash")
# control characters, backslashes and octets that are no UTF-8 (see S3Storage)
_NO_OBJECT_KEY = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_NO_URL_NAME = re.compile(r"[\x00-\x1f\x7f\\?;\ud800-\udfff]")
#: what an interface's servers do not all keep in a name
_ODD_NAMES = {
    "s3": _NO_OBJECT_KEY,
    "webdav": _NO_URL_NAME,
    "rclone": _NO_URL_NAME,
    "xrootd": _NO_URL_NAME,
}
#: octets of a file's name on common file systems, and of an object's key
_LONGEST_NAME, _LONGEST_KEY = 255, 1024
Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """A pattern and what becomes of what it matches."""

    match: re.Pattern[str]
    template: tuple[tuple[str, str | None, int], ...]

    def apply(self, text: str, values: Values) -> str | None:
        """``text`` put into the template's form, or None if it is not matched whole."""
        found = self.match.fullmatch(text)
        if found is None:
            return None
        named = {key: value or "" for key, value in found.groupdict().items()}
        numbered = {str(n): value or "" for n, value in enumerate(found.groups(), 1)}
        known = {**values, **numbered, **named}
        return "".join(
            literal + (known[field][:length] if field is not None else "")
            for literal, field, length in self.template
        )


Rule = tuple[Step, ...]


def parse_rules(rules: object) -> tuple[Rule, ...]:
    """The rules that a file or the catalogue tells: a list of {match, template} or {steps = [of
    these]}.

    Raises
    ------
    InvalidValueError
        if one is none: its number, and what would be right.
    """
    if not isinstance(rules, list) or not rules:
        raise InvalidValueError(
            what="path rules", value=rules, expected="a list of {match, template}"
        )
    return tuple(_parse_rule(number, rule) for number, rule in enumerate(rules, 1))


def plain_rules(rules: object) -> list[dict[str, Any]]:
    """Checked rules in the one form in which the catalogue keeps them: {steps = [...]}.

    Raises
    ------
    InvalidValueError
        as :func:`parse_rules`.
    """
    parse_rules(rules)
    assert isinstance(rules, list)
    return [{"steps": rule.get("steps", [rule])} for rule in rules]


def _parse_rule(number: int, rule: object) -> Rule:
    steps = rule.get("steps") if isinstance(rule, Mapping) and set(rule) == {"steps"} else [rule]
    if not isinstance(steps, list) or not steps:
        raise _invalid(number, rule, "{match, template} or {steps = [{match, template}, …]}")
    return tuple(_parse_step(number, step) for step in steps)


def _parse_step(number: int, step: object) -> Step:
    if not isinstance(step, Mapping) or set(step) != {"match", "template"}:
        raise _invalid(number, step, "match and template, both text")
    match, template = step["match"], step["template"]
    if not isinstance(match, str) or not isinstance(template, str) or not template:
        raise _invalid(number, step, "match and template, both text")
    try:
        pattern = re.compile(match, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise _invalid(number, match, f"a regular expression ({error})") from None
    clash = set(pattern.groupindex) & set(_BUILT_IN)
    if clash:
        raise _invalid(number, match, f"other names of groups than {', '.join(sorted(clash))}")
    return Step(pattern, _parse_template(number, template, pattern))


def _parse_template(
    number: int, template: str, pattern: re.Pattern[str]
) -> tuple[tuple[str, str | None, int], ...]:
    """(literal, field or None, how many characters of it) of a template."""
    known = {*_BUILT_IN, *pattern.groupindex, *map(str, range(1, pattern.groups + 1))}
    try:
        parsed = [*Formatter().parse(template)]
    except ValueError as error:
        raise _invalid(number, template, f"a template ({error})") from None
    parts = []
    for literal, field, length, conversion in parsed:
        if field is not None and (field not in known or conversion):
            expected = f"one of {', '.join('{' + k + '}' for k in sorted(known))}"
            raise _invalid(number, f"{{{field}}}", expected)
        if field is not None and (length or field == "hash") and not _is_length(length):
            raise _invalid(number, template, "{hash:N} or {group:N} with N of 1 to 40 characters")
        parts.append((literal, field, int(length) if length else _LONGEST_KEY))
    return tuple(parts)


def _is_length(text: str | None) -> bool:
    return bool(text and re.fullmatch("[0-9]{1,2}", text) and 1 <= int(text) <= _LONGEST_HASH)


def _invalid(number: int, value: object, expected: str) -> InvalidValueError:
    return InvalidValueError(what=f"path rule {number}:", value=value, expected=expected)


@lru_cache(maxsize=64)
def _compiled(rules: str) -> tuple[Rule, ...]:
    return parse_rules(json.loads(rules))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a copy lies below its storage's root, as the catalogue has it (see encode_path)."""

    path: str
    #: number of the rule that gave it, None if none matched
    rule: int | None = None


def place_of(
    uri: str,
    version: int,
    interface: str = "posix",
    rules: Sequence[Mapping[str, Any]] | None = None,
) -> Place:
    """Where a copy of an item goes on a storage with these ``rules`` (as :func:`plain_rules`).

    What a rule gives without ``{version}`` lies for versions after the first in a top folder that
    tells it. What no rule matches lies where :func:`copy_path` says.

    Raises
    ------
    InvalidValueError
        if the rule that matches gives no path below the storage's root, one of the DLM's own, or a
        name that the storage cannot have.
    """
    for number, rule in enumerate(_compiled(json.dumps(rules)) if rules else (), 1):
        found = _follow(rule, uri, version)
        if found is not None:
            told = any(field == "version" for step in rule for _, field, _ in step.template)
            if version > 1 and not told:
                top, slash, rest = found.partition("/")
                found = f"{top}@{version}{slash}{rest}"
            return Place(_checked(found, uri, number, interface), number)
    return Place(copy_path(uri, version, interface))


def _follow(rule: Rule, uri: str, version: int) -> str | None:
    scheme, _, encoded = uri.partition(":")
    path = decode_path(encoded)
    values = {
        "scheme": scheme,
        "path": path,
        "name": path.rpartition("/")[2],
        "version": str(version),
        "hash": sha1(uri.encode(), usedforsecurity=False).hexdigest(),
    }
    text: str | None = f"{scheme}:{path}"
    for step in rule:
        text = step.apply(text, values) if text is not None else None
    return text


def _checked(path: str, uri: str, number: int, interface: str) -> str:
    """``path`` as the catalogue has it, if a copy may lie there."""
    problem = None
    try:
        encoded = encode_path(path)
    except InvalidValueError:
        problem, encoded = "without '.', '..', or empty segments, below the root", ""
    top, _, rest = path.partition("/")
    if _is_odd(path, interface):
        encoded = _set_apart(encode_path(top), encode_path(rest or top))
    octets = [
        len(part) for part in decode_path(encoded).encode("utf-8", "surrogateescape").split(b"/")
    ]
    if top == PRIVATE:
        problem = f"not below {PRIVATE}, which is the DLM's own"
    elif max(octets) > _LONGEST_NAME and interface != "s3":
        problem = f"names of at most {_LONGEST_NAME} octets"
    elif sum(octets) + len(octets) - 1 > _LONGEST_KEY and interface == "s3":
        problem = f"at most {_LONGEST_KEY} octets"
    if problem:
        raise InvalidValueError(
            what=f"what path rule {number} makes of {uri},", value=path, expected=problem
        )
    return encoded


def copy_path(uri: str, version: int, interface: str = "posix") -> str:
    """Where a copy lies without rules: ``scheme/path``, encoded as the catalogue has it.

    Versions after the first have a top folder of their own: a longer file name could pass the 255
    octets that file systems allow. Names that S3 or WebDAV may not keep lie there in their
    percent-encoded form, in a top folder of their own (no scheme has a ``!``) so that they meet no
    file which is really called so.
    """
    scheme, _, path = uri.partition(":")
    top = scheme if version == 1 else f"{scheme}@{version}"
    return _set_apart(top, path) if _is_odd(decode_path(path), interface) else f"{top}/{path}"


def _is_odd(path: str, interface: str) -> bool:
    pattern = _ODD_NAMES.get(interface)
    return pattern is not None and pattern.search(path) is not None


def _set_apart(top: str, encoded: str) -> str:
    # a semicolon may stand in a URI as it is, but not in every server's names
    return encode_path(f"{top}!/{encoded.replace(';', '%3B')}")
