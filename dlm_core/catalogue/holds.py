"""Holds and retention locks: what may not be deleted, why, by whom, and until when.

A hold is in force the moment it is written and stops forbidding the moment it ends: nothing has to
run for either. The database refuses the deletion of what is held, the shortening of a lock, and any
change of what a hold matches.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.browse import get_item
from dlm_core.catalogue.engine import rows, run
from dlm_core.errors import (
    EmptySelectorError,
    InvalidValueError,
    NotFoundError,
    RetentionLockError,
)
from dlm_core.types import new_id

_SELECTOR = re.compile(r"[a-z][a-z0-9+.-]*:")
_WILD = re.compile(r"[*?]")


@dataclass(frozen=True, slots=True)
class Target:
    """What a hold matches: exactly one of an item, a collection, a selector, or everything.

    A collection stands for all below it, a selector for items registered later, too.
    """

    uri: str | None = None
    version: int | None = None
    collection: str | None = None
    selector: str | None = None
    everything: bool = False


def parse_selector(text: str) -> tuple[str, str | None]:
    """The literal prefix of a selector, and its LIKE pattern if it has wildcards.

    A selector is how a uri begins; with ``*`` (anything) or ``?`` (one character) it is a pattern
    over the whole uri. Its scheme is always written out.

    Raises
    ------
    EmptySelectorError
        for an empty one, and one that matches every scheme: that is said as ``--all``.
    """
    prefix = _WILD.split(text, maxsplit=1)[0]
    if not _SELECTOR.match(prefix):
        raise EmptySelectorError(
            expected=f"{text!r} names no scheme; write one out ('ska:eb-1/*'), or say --all"
        )
    if prefix == text:
        return prefix, None
    escaped = re.sub(r"([\\%_])", r"\\\1", text)
    return prefix, escaped.replace("*", "%").replace("?", "_")


def insert_hold(
    connection: Connection,
    target: Target,
    *,
    reason: str,
    actor: str,
    now: datetime,
    ends_at: datetime | None = None,
    locked: bool = False,
) -> uuid.UUID:
    """A hold in force from now on, until ``ends_at`` (None: until it is released); its key.

    ``locked`` makes it a retention lock, which from then on can only be lengthened.

    Raises
    ------
    EmptySelectorError
        if ``target`` names not exactly one thing, or a selector that matches everything.
    NotFoundError, InvalidValueError
        no such item or collection; no reason; an end that is past, or none for a lock; a version
        that is none.
    """
    _check(target, reason, now, ends_at, locked)
    prefix, pattern = parse_selector(target.selector) if target.selector else (None, None)
    hold_id = new_id()
    run(
        connection,
        """INSERT INTO hold (hold_id, oid, collection_id, uri_prefix, uri_pattern, everything,
                             reason, actor, created_at, ends_at, locked)
           VALUES (:id, :oid, :collection, :prefix, :pattern, :everything, :reason, :actor, :now,
                   :ends, :locked)""",
        id=hold_id,
        oid=get_item(connection, target.uri, target.version)["oid"] if target.uri else None,
        collection=find_collection(connection, target.collection) if target.collection else None,
        prefix=prefix,
        pattern=pattern,
        everything=target.everything,
        reason=reason,
        actor=actor,
        now=now,
        ends=ends_at,
        locked=locked,
    )
    return hold_id


def _check(
    target: Target, reason: str, now: datetime, ends_at: datetime | None, locked: bool
) -> None:
    named = (target.uri, target.collection, target.selector, target.everything or None)
    given = [one for one in named if one is not None]
    if len(given) != 1 or "" in given:
        raise EmptySelectorError(
            expected="name one of: an item, --collection, --matching, or --all for everything"
        )
    if target.version is not None and not 1 <= target.version < 2**31:
        raise InvalidValueError(
            what="version", value=target.version, expected="from 1 to 2**31 - 1"
        )
    if not reason.strip():
        raise InvalidValueError(what="reason", value=reason, expected="why it may not be deleted")
    if locked and ends_at is None:
        raise InvalidValueError(what="end", value=None, expected="a time: a lock needs one")
    if ends_at is not None and ends_at <= now:
        raise InvalidValueError(what="end", value=ends_at.isoformat(), expected="a time to come")


def find_collection(connection: Connection, name: str) -> uuid.UUID:
    """The key of a collection.

    Raises
    ------
    NotFoundError
    """
    found = rows(connection, "SELECT collection_id FROM collection WHERE name = :n", n=name)
    if not found:
        raise NotFoundError("collection", name)
    key: uuid.UUID = found[0]["collection_id"]
    return key


_HOLDS = """
  SELECT h.hold_id, h.reason, h.actor, h.created_at, h.ends_at, h.locked,
         hold_in_force(h) AS in_force,
         CASE WHEN h.oid IS NOT NULL THEN 'item' WHEN h.collection_id IS NOT NULL THEN 'collection'
              WHEN h.everything THEN 'everything' ELSE 'selector' END AS by,
         coalesce(i.uri || '#' || i.version, c.name, h.uri_prefix) AS target, h.uri_pattern
    FROM {source} h LEFT JOIN data_item i USING (oid)
    LEFT JOIN collection c ON c.collection_id = h.collection_id"""


def list_holds(
    connection: Connection, *, ended: bool = False, limit: int = 1000
) -> list[dict[str, Any]]:
    """Holds in force, with ``ended`` the others too, newest first."""
    found = rows(
        connection,
        _HOLDS.format(source="hold")
        + " WHERE :ended OR hold_in_force(h) ORDER BY h.hold_id DESC LIMIT :limit",
        ended=ended,
        limit=limit,
    )
    return [_told(row) for row in found]


def holds_of(connection: Connection, uri: str, version: int | None = None) -> list[dict[str, Any]]:
    """Holds in force on an item, by whatever they match it.

    Raises
    ------
    NotFoundError
    """
    item = get_item(connection, uri, version)
    source = "holds_on(:item, :uri, CAST(:collection AS uuid))"
    found = rows(
        connection,
        _HOLDS.format(source=source) + " ORDER BY h.hold_id",
        item=item["oid"],
        uri=item["uri"],
        collection=item["collection_id"],
    )
    return [_told(row) for row in found]


def _told(row: dict[str, Any]) -> dict[str, Any]:
    pattern = row.pop("uri_pattern")
    if pattern is not None:
        # back from LIKE's words to those of a selector
        row["target"] = re.sub(r"(\\.)|(%)|(_)", _wildcard, pattern)
    return row


def _wildcard(match: re.Match[str]) -> str:
    return match[1][1] if match[1] else "*" if match[2] else "?"


def end_hold(connection: Connection, hold_id: uuid.UUID, ends_at: datetime) -> dict[str, Any]:
    """Let a hold end at another time: earlier (released, if that is now) or later.

    Raises
    ------
    NotFoundError
        no such hold.
    RetentionLockError
        if it is a lock and would end earlier.
    InvalidValueError
        if it has ended already: what was free may be gone, so a new hold is to be made.
    """
    found = rows(
        connection,
        """SELECT hold_id, reason, ends_at, locked, created_at, hold_in_force(h) AS in_force
             FROM hold h WHERE hold_id = :id FOR UPDATE""",
        id=hold_id,
    )
    if not found:
        raise NotFoundError("hold", hold_id, "see 'dlm hold list'")
    hold = found[0]
    if not hold["in_force"]:
        raise InvalidValueError(
            what="hold", value=str(hold_id), expected="one in force; this one has ended"
        )
    if hold["locked"] and ends_at < hold["ends_at"]:
        raise RetentionLockError(hold=hold_id, until=f"{hold['ends_at']:%Y-%m-%dT%H:%M:%SZ}")
    run(
        connection,
        "UPDATE hold SET ends_at = greatest(:at, created_at) WHERE hold_id = :id",
        at=ends_at,
        id=hold_id,
    )
    return hold
