"""Which place a storage is: one that is known under two names would count one copy twice.

Names do not tell: a folder may be reached by SFTP too, by a link, or by another name of its server.
So every storage that may be written to holds its key in ``.dlm/storage-id``.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import rows
from dlm_core.catalogue.places import add_storage, get_storage, set_config, set_storage
from dlm_core.errors import (
    AlreadyExistsError,
    DlmError,
    InvalidValueError,
    NotOnlineError,
)
from dlm_core.lifecycle.rules import Trial, give_rules
from dlm_core.lifecycle.work import Context
from dlm_core.storages.bundles import split_bundling
from dlm_core.storages.mark import MARK, OFFLINE, mark_of
from dlm_core.storages.open import must_have_options, open_storage
from dlm_core.storages.port import Storage, remove_file
from dlm_core.storages.staging import split_config
from dlm_core.types import PayloadKind, StorageMode, decode_path, new_id

_AT_ONCE = 8
#: copies that are looked for where a storage is said to be now
_SAMPLE = 100
_WRITTEN = (StorageMode.READ_WRITE, StorageMode.DRAINING)


def join_storage(
    context: Context,
    name: str,
    *,
    interface: str,
    root: str,
    config: Mapping[str, Any],
    managed: bool = True,
    mode: str = StorageMode.READ_WRITE,
    rules: object = None,
    unset: Collection[str] = (),
    **columns: Any,
) -> Trial | None:
    """Add a storage that can be reached, whose place is no other's; how its path rules were tried.

    Parameters
    ----------
    rules : for paths, from the first; see :func:`dlm_core.lifecycle.rules.set_rules`.
    unset : of :data:`dlm_core.catalogue.places.CHANGEABLE`, what is to be empty in place of the
        default.
    columns : the others of :func:`dlm_core.catalogue.places.add_storage`.

    Raises
    ------
    AlreadyExistsError, NotFoundError, InvalidValueError, CatalogueError
        as :func:`~dlm_core.catalogue.places.add_storage`.
    StorageError
        if it cannot be reached, or its mark not be written.
    """
    storage, storage_id = open_storage(name, interface, root, config), new_id()
    must_have_options(name, interface, config)
    storage.check()

    def add(connection: Connection) -> Trial | None:
        add_storage(
            connection, name, interface=interface, root=root, config=config, managed=managed,
            mode=mode, now=context.clock(), storage_id=storage_id, **columns,
        )  # fmt: skip
        set_storage(connection, name, dict.fromkeys(unset))
        # at once: a drainer would not wait for them
        return give_rules(connection, name, rules) if rules is not None else None

    context.rehearse(add)
    with taking_place(context, storage, storage_id, written=managed and mode in _WRITTEN):
        tried: Trial | None = context.transact(add)
    return tried


@contextmanager
def taking_place(
    context: Context, storage: Storage, storage_id: uuid.UUID, *, written: bool
) -> Iterator[None]:
    """Put the mark of a storage where it is to be; taken away again if the block fails.

    Storages that have none get theirs by this too. What cannot be reached is not looked at, nor is
    a mark read that is offline.

    Parameters
    ----------
    written : whether it may be written to.

    Raises
    ------
    AlreadyExistsError
        if the place is that of another storage in use.
    NotOnlineError
        if a mark is there that is offline, of a storage that is new: it may be another's place.
    StorageError
        if the mark cannot be written.
    """
    known = context.transact(context.storages.load)
    others = [
        row
        for row in known.values()
        # a lost one may come back
        if row["mode"] != StorageMode.RETIRED and row["storage_id"] != storage_id
    ]
    with ThreadPoolExecutor(_AT_ONCE, "dlm-mark") as pool:
        before = list(pool.map(lambda row: _mark_known(context, row), others))
        there, mine = mark_of(storage), str(storage_id)
        _must_be_nobodys(there, others)
        if there == OFFLINE and storage_id not in known:
            raise NotOnlineError(storage.name, MARK, "it tells whether the place is another's")
        written = written and there not in (mine, OFFLINE)
        if written:
            if there is not None:
                remove_file(storage, MARK)  # of a catalogue that was, or a storage that is retired
            _write_mark(storage, storage_id)
        try:
            # those that cannot have a mark of their own show ours if they are the same place
            seen = pool.map(lambda row: _mark_known(context, row), others if written else ())
            for row, earlier, mark in zip(others, before, seen, strict=False):
                if mark == mine or (earlier is None and mark == OFFLINE):
                    raise AlreadyExistsError(noun="this place as storage", key=row["name"])
            yield
        except BaseException:
            if written:
                with suppress(DlmError):
                    remove_file(storage, MARK)
            raise


def _mark_known(context: Context, row: Mapping[str, Any]) -> str | None:
    """The mark at a known storage's place, written now if it has none and may have one; an empty
    one if that cannot be told."""
    with suppress(DlmError):
        storage = context.storages.open(row)
        mark = mark_of(storage)
        if mark is None and row["managed"] and row["mode"] in _WRITTEN:
            _write_mark(storage, row["storage_id"])
            return str(row["storage_id"])
        return mark
    return ""


def _write_mark(storage: Storage, storage_id: uuid.UUID) -> None:
    text = str(storage_id).encode()
    storage.write(MARK, io.BytesIO(text), len(text))


def _must_be_nobodys(mark: str | None, others: Sequence[Mapping[str, Any]]) -> None:
    for row in others:
        if mark == str(row["storage_id"]):
            raise AlreadyExistsError(noun="this place as storage", key=row["name"])


def change_config(context: Context, name: str, changes: Mapping[str, str]) -> None:
    """Change keys of a storage's config; an empty value takes a key away.

    What is not about staging, nor takes the mount away, is tried first: the storage has to be the
    same place as before, by its mark, or by copies that are looked for.

    Raises
    ------
    NotFoundError
    InvalidValueError
        if the storage cannot be opened with what comes out, or is another place then.
    AlreadyExistsError
        if it is the place of another storage then.
    StorageError
        if it cannot be reached.
    """
    row = context.transact(lambda c: get_storage(c, name))
    config = {key: value for key, value in (row["config"] | changes).items() if value != ""}
    storage = open_storage(name, row["interface"], row["root"], config)
    if split_bundling(name, row["config"])[0] and not split_bundling(name, config)[0]:
        raise InvalidValueError(
            what=f"config of storage {name}",
            value="without bundle_bytes",
            expected="it kept: nothing would find what was packed",
        )
    storage_id = row["storage_id"]
    of_the_place = split_config(changes)[0]
    # without a mount less is asked for than before
    if not of_the_place or of_the_place == {"mount": ""}:
        context.transact(lambda c: set_config(c, storage_id, config))
        return
    must_have_options(name, row["interface"], config)
    storage.check()
    written = row["managed"] and row["mode"] in _WRITTEN
    _must_be_the_same(context, row, storage)
    # another storage's place may well have copies of the same names and sizes
    with taking_place(context, storage, storage_id, written=written):
        context.transact(lambda c: set_config(c, storage_id, config))


def _must_be_the_same(context: Context, row: Mapping[str, Any], storage: Storage) -> None:
    if mark_of(storage) == str(row["storage_id"]):
        return
    known = context.transact(
        lambda c: rows(
            c,
            """SELECT r.path, r.size, i.kind FROM replica r JOIN data_item i USING (oid)
                WHERE r.storage_id = :storage AND r.live AND r.state = 'READY'
                ORDER BY r.check_from DESC LIMIT :limit""",
            storage=row["storage_id"],
            limit=_SAMPLE,
        )
    )
    found = storage.stat_many([decode_path(one["path"]) for one in known])
    for one in known:
        entry = found[decode_path(one["path"])]
        if entry is None or (one["kind"] == PayloadKind.FILE and entry.size != one["size"]):
            raise InvalidValueError(
                what=f"config of storage {row['name']}",
                value="another place",
                expected=f"the one with its copies: {one['path']} is not there as it was",
            )
