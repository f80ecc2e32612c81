"""A storage's path rules: looked at against everything in the catalogue before they are used."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue import paths as catalogue
from dlm_core.catalogue.places import get_storage, set_path_rules
from dlm_core.errors import PathMeetingError
from dlm_core.lifecycle.paths import Place, place_of, plain_rules
from dlm_core.lifecycle.work import Context
from dlm_core.types import decode_path, uri_path

_EXAMPLES_A_RULE = 3


@dataclass(slots=True)
class Trial:
    """What rules would do: how many items each rule takes (0: none does), how many keep the place
    they have, and some examples."""

    storage: str
    items: int = 0
    kept: int = 0
    by_rule: dict[int, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def note(self, item: Mapping[str, Any], place: Place) -> None:
        rule = place.rule or 0
        self.by_rule[rule] = count = self.by_rule.get(rule, 0) + 1
        if count <= _EXAMPLES_A_RULE:
            self.examples.append(
                {
                    "rule": rule,
                    "uri": item["uri"],
                    "version": item["version"],
                    "path": _shown(place.path),
                }
            )


def set_rules(context: Context, name: str, rules: object, *, dry_run: bool = False) -> Trial:
    """Give a storage path rules, or None for none; with ``dry_run`` nothing is changed.

    They are tried on every item of the catalogue first. Copies that are there keep their places.

    Raises
    ------
    NotFoundError
    InvalidValueError
        a rule is none, or gives a path that cannot be for an item that is there.
    PathMeetingError
        copies of two items would meet.
    """
    found: Trial = context.transact(lambda c: give_rules(c, name, rules, dry_run=dry_run))
    return found


def give_rules(connection: Connection, name: str, rules: object, *, dry_run: bool = False) -> Trial:
    """As :func:`set_rules`, within a transaction: that of a new storage, to which no copy can go
    before."""
    plain = plain_rules(rules) if rules is not None else None
    storage = get_storage(connection, name)
    trial = Trial(name)
    places = _tried(connection, storage, plain, trial)
    meetings = catalogue.find_meetings(connection, places)
    if meetings:
        first = meetings[0]
        raise PathMeetingError(
            storage=name,
            uri=first.uri,
            path=first.path,
            other_uri=first.other_uri,
            other_path=first.other_path,
        )
    if not dry_run:
        set_path_rules(connection, storage["storage_id"], plain)
    return trial


def _tried(
    connection: Connection,
    storage: Mapping[str, Any],
    rules: list[dict[str, Any]] | None,
    trial: Trial,
) -> Iterator[tuple[uuid.UUID, str]]:
    for item in catalogue.items_with_places(connection, storage["storage_id"]):
        trial.items += 1
        if item["path"] is not None:
            trial.kept += 1
            yield item["oid"], item["path"]
            continue
        place = place_of(item["uri"], item["version"], storage["interface"], rules)
        trial.note(item, place)
        yield item["oid"], place.path


def find_place(
    connection: Connection, name: str, uri: str, version: int | None = None
) -> dict[str, Any]:
    """Where the copy of an item lies on a storage, or would lie; it need not be in the catalogue.

    Raises
    ------
    NotFoundError
        there is no such storage.
    InvalidValueError
        the uri is none, or the rules have no place for it.
    """
    uri_path(uri)  # or it is refused
    storage = get_storage(connection, name)
    item = catalogue.place_on(connection, storage["storage_id"], uri, version)
    number = version or (item["version"] if item else 1)
    told = {"storage": name, "uri": uri, "version": number}
    if item and item["path"]:
        return told | {"path": _shown(item["path"]), "state": item["state"], "rule": None}
    place = place_of(uri, number, storage["interface"], storage["path_rules"])
    return told | {"path": _shown(place.path), "state": None, "rule": place.rule}


def _shown(path: str) -> str:
    return decode_path(path).encode("utf-8", "replace").decode()
