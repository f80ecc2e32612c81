"""Withdrawal: take back what was announced by mistake, or whose payload never came."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection

from dlm_core.catalogue import announcements as catalogue
from dlm_core.catalogue.browse import get_item
from dlm_core.catalogue.holds import holds_of
from dlm_core.catalogue.places import get_storage
from dlm_core.catalogue.recovery import unconfirmed_floor
from dlm_core.errors import DeletionRefusedError, IllegalTransitionError, InvalidValueError
from dlm_core.lifecycle.work import Context

_BATCH = 2000


def withdraw_item(
    context: Context,
    uri: str,
    *,
    reason: str,
    storage: str | None = None,
    version: int | None = None,
) -> catalogue.Withdrawn:
    """Take back the announcements of an item that were not let in yet, or the one on ``storage``.

    An item that has nothing else is DELETED: it was never let in. The bytes, if there are any, are
    not touched, and their place is free for another item.

    Raises
    ------
    NotFoundError
    InvalidValueError
        without a reason.
    IllegalTransitionError
        if nothing of it waits to be let in.
    DeletionRefusedError
        if it is under a hold, or the catalogue was recovered and nobody has confirmed it.
    """
    _must_say(reason)

    def withdraw(connection: Connection) -> catalogue.Withdrawn:
        _must_be_confirmed(connection, uri)
        item = get_item(connection, uri, version)
        where = _storage_id(connection, storage)
        if held := holds_of(connection, uri, item["version"]):
            raise DeletionRefusedError(key=uri, reason=f"it is under a hold: {held[0]['reason']}")
        uids = catalogue.announcements_of(connection, item["oid"], where)
        alone = [item["oid"]] if where is None else []
        found = catalogue.withdraw(
            connection, uids, reason=reason, actor=context.actor, now=context.clock(), oids=alone
        )
        if not (found.announcements or found.items):
            state = item["state"]
            old = state if storage is None else f"{state} with nothing announced on {storage}"
            raise IllegalTransitionError(noun="item", key=uri, old=old, new="withdrawn")
        return found

    withdrawn: catalogue.Withdrawn = context.transact(withdraw)
    return withdrawn


def withdraw_failed(
    context: Context, *, reason: str, storage: str | None = None
) -> catalogue.Withdrawn:
    """Take back all announcements whose admission FAILED, or those on ``storage``; what is under a
    hold stays.

    Raises
    ------
    NotFoundError
    InvalidValueError
        without a reason.
    DeletionRefusedError
        if the catalogue was recovered and nobody has confirmed it.
    """
    _must_say(reason)

    def withdraw(connection: Connection) -> catalogue.Withdrawn:
        _must_be_confirmed(connection, "what was announced")
        uids = catalogue.failed_announcements(connection, _storage_id(connection, storage), _BATCH)
        return catalogue.withdraw(
            connection, uids, reason=reason, actor=context.actor, now=context.clock()
        )

    announcements = items = 0
    while not context.stop.is_set():
        some: catalogue.Withdrawn = context.transact(withdraw)
        announcements += some.announcements
        items += some.items
        if not some.announcements:
            break
    return catalogue.Withdrawn(announcements, items)


def _must_say(reason: str) -> None:
    if not reason.strip():
        raise InvalidValueError(what="reason", value=reason, expected="why it is taken back")


def _must_be_confirmed(connection: Connection, what: str) -> None:
    # it may have been let in after the backup was made, and have copies that are not known yet
    if unconfirmed_floor(connection) is not None:
        reason = "the catalogue was recovered, and nothing ends before 'dlm db confirm'"
        raise DeletionRefusedError(key=what, reason=reason)


def _storage_id(connection: Connection, name: str | None) -> uuid.UUID | None:
    found: uuid.UUID | None = None if name is None else get_storage(connection, name)["storage_id"]
    return found
