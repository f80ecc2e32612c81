"""Locations and storages: add, look at, change."""

from __future__ import annotations

import posixpath
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from dlm_core.catalogue.announcements import failed_announcements
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.operations import NewOperation, insert_operations
from dlm_core.catalogue.replicas import keep_drained
from dlm_core.errors import (
    AlreadyExistsError,
    DeletionRefusedError,
    IllegalTransitionError,
    InvalidValueError,
    NotFoundError,
)
from dlm_core.types import OperationKind, StorageMode, new_id

#: what takes longer, in seconds, has no end that a calendar could tell
_NEVER = 3e9
#: by interface, what of a config tells one place from another of the same root; of others all does
_TELLING: Mapping[str, Sequence[str]] = {
    "posix": (), "sftp": (), "webdav": (), "xrootd": (), "s3": ("endpoint",),
}  # fmt: skip
#: of a storage, as the database bounds it: an exbibyte
MOST_BYTES = 2**60 - 1
#: what 'dlm storage set' may change
CHANGEABLE = (
    "mode",
    "phase",
    "capacity_bytes",
    "high_watermark",
    "low_watermark",
    "concurrency",
    "trash_grace",
    "verify_every_days",
    "verify_bytes_per_second",
    "verify_bytes_per_day",
    "max_bytes_per_second",
    "max_concurrency",
)


def add_location(
    connection: Connection,
    name: str,
    *,
    now: datetime,
    facility: str | None = None,
    city: str | None = None,
    country: str | None = None,
) -> uuid.UUID:
    """A new location; ``country`` is its ISO 3166-1 alpha-2 code.

    Raises
    ------
    InvalidValueError, AlreadyExistsError
    """
    _must_be_new(connection, "location", name)
    if country is not None and not re.fullmatch("[A-Z]{2}", country):
        raise InvalidValueError(what="country", value=country, expected="two capitals, e.g. ZA")
    location_id = new_id()
    run(
        connection,
        """INSERT INTO location (location_id, name, facility, city, country, created_at)
           VALUES (:id, :name, :facility, :city, :country, :now)""",
        id=location_id,
        name=name,
        facility=facility,
        city=city,
        country=country,
        now=now,
    )
    return location_id


def _must_be_new(connection: Connection, noun: str, name: str) -> None:
    _check_name(noun, name)
    if rows(connection, f"SELECT FROM {noun} WHERE name = :name", name=name):
        raise AlreadyExistsError(noun=noun, key=name)


def list_locations(connection: Connection) -> list[dict[str, Any]]:
    """All locations with their number of storages, by name."""
    return rows(
        connection,
        """SELECT l.name, l.facility, l.city, l.country, l.created_at, count(s.storage_id) AS storages
             FROM location l LEFT JOIN storage s USING (location_id) GROUP BY l.location_id
            ORDER BY l.name""",
    )


def add_storage(
    connection: Connection,
    name: str,
    *,
    location: str,
    interface: str,
    root: str,
    phase: str,
    now: datetime,
    storage_class: str = "disk",
    config: Mapping[str, Any] | None = None,
    managed: bool = True,
    mode: str = StorageMode.READ_WRITE,
    options: Mapping[str, Any] | None = None,
    storage_id: uuid.UUID | None = None,
) -> uuid.UUID:
    """A new storage; ``options`` are of :data:`CHANGEABLE` (capacity in bytes, watermarks as
    fractions, trash_grace as a timedelta). Its key is ``storage_id``, or a new one.

    Only what is written here tells whether it is another's place: use
    :func:`dlm_core.lifecycle.identity.join_storage`, which looks there.

    Raises
    ------
    AlreadyExistsError, NotFoundError
        the name or the place is taken; there is no such location.
    InvalidValueError, CatalogueError
        a value makes no sense.
    """
    _must_be_new(connection, "storage", name)
    root = root_of(interface, root)
    found = rows(connection, "SELECT location_id FROM location WHERE name = :name", name=location)
    if not found:
        raise NotFoundError("location", location, "add it with 'dlm location add'")
    _must_be_elsewhere(connection, interface, root, config, managed)
    chosen = {key: value for key, value in (options or {}).items() if value is not None}
    _check(chosen)
    columns = "".join(f", {key}" for key in chosen if key in CHANGEABLE)
    values = "".join(f", :{key}" for key in chosen if key in CHANGEABLE)
    storage_id = storage_id or new_id()
    run(
        connection,
        f"""INSERT INTO storage (storage_id, name, location_id, interface, class, root, config, phase,
                                 mode, managed, created_at{columns})
            VALUES (:id, :name, :location, :interface, :class, :root, CAST(:config AS jsonb),
                    :phase_, :mode_, :managed, :now{values})""",
        id=storage_id,
        name=name,
        location=found[0]["location_id"],
        interface=interface,
        **{"class": storage_class},
        root=root,
        config=Jsonb(dict(config or {})),
        phase_=phase,
        mode_=mode,
        managed=managed,
        now=now,
        **chosen,
    )
    _ask_planner_again(connection)
    return storage_id


def _must_be_elsewhere(
    connection: Connection,
    interface: str,
    root: str,
    config: Mapping[str, Any] | None,
    managed: bool,
) -> None:
    """Refuse a place that a storage has already, however it is written; and one inside another's or
    around it, unless the outer is only read: what is deleted there would be the inner's, unasked."""
    mine, kind = _place(root), _kind(interface, config or {})
    known = rows(
        connection,
        """SELECT name, root, config, managed FROM storage
            WHERE interface = :interface AND mode <> 'retired'""",
        interface=interface,
    )
    for row in known:
        other = _place(row["root"])
        if _kind(interface, row["config"]) != kind:
            continue
        if mine == other:
            raise AlreadyExistsError(noun="this place as storage", key=row["name"])
        inside = row["managed"] and mine.startswith(f"{other}/")
        if inside or (managed and other.startswith(f"{mine}/")):
            noun = "a place inside this one, or around it, as storage"
            raise AlreadyExistsError(noun=noun, key=row["name"])


def _place(root: str) -> str:
    """A root without what may be written in several ways."""
    # a URL has slashes of its own; and POSIX keeps two at the beginning
    path = f"/{posixpath.normpath(root).lstrip('/')}" if root.startswith("/") else root
    return path.rstrip("/")


def root_of(interface: str, root: str) -> str:
    """A root as the catalogue keeps it: of POSIX one spelling for one folder.

    Raises
    ------
    InvalidValueError
    """
    if interface != "posix":
        return root
    if not root.startswith("/") or "/../" in f"{root}/":
        # what a link is followed by '..' leads elsewhere than it says
        raise InvalidValueError(what="root", value=root, expected="an absolute path without '..'")
    return _place(root) or "/"


def _kind(interface: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a storage's config says on which machine its root is."""
    keys = _TELLING.get(interface, config.keys())
    return {key: str(config[key]).rstrip("/") for key in keys if config.get(key) is not None}


def _check(row: Mapping[str, Any]) -> None:
    """Say in words what the database would refuse by the name of a constraint."""
    high, low = row.get("high_watermark"), row.get("low_watermark")
    high, low = (0.9 if high is None else high), (0.8 if low is None else low)
    if not 0 < low < high <= 1:
        raise InvalidValueError(
            what="watermarks (low, high)", value=(low, high), expected="0 < low < high <= 1"
        )
    for key, lowest, highest in (
        ("capacity_bytes", 1, MOST_BYTES),
        ("concurrency", 1, 1024),
        ("verify_every_days", 1, 36500),
        ("verify_bytes_per_second", 1, 2**63 - 1),
        ("verify_bytes_per_day", 1, 2**63 - 1),
        ("max_bytes_per_second", 1, 2**63 - 1),
        ("max_concurrency", 1, 100_000),
    ):
        value = row.get(key)
        if value is not None and not lowest <= value <= highest:
            raise InvalidValueError(what=key, value=value, expected=f"{lowest} to {highest}")


def _check_name(noun: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise InvalidValueError(
            what=noun, value=name, expected="up to 63 letters, digits, dots, dashes, underscores"
        )


def list_storages(connection: Connection) -> list[dict[str, Any]]:
    """All storages with location, bytes used, capacity and fill, by name.

    With a capacity given, use is the catalogue's own count (trash included); else it is what the
    storage last told.
    """
    return rows(
        connection,
        """SELECT s.storage_id, s.name, l.name AS location, s.interface, s.class, s.root, s.config,
                  s.phase, s.mode, s.managed, s.high_watermark, s.low_watermark, s.concurrency,
                  s.trash_grace, s.verify_every_days, s.verify_bytes_per_second,
                  s.verify_bytes_per_day, s.max_bytes_per_second, s.max_concurrency, s.created_at, s.retired_at, s.path_rules, s.mode_reason,
                  s.drain_since, s.drain_bytes, s.observed_total_bytes, s.observed_used_bytes,
                  s.observed_at, u.replicas, u.trashed_bytes,
                  u.used_bytes AS replica_bytes,
                  CASE WHEN s.capacity_bytes IS NULL AND s.observed_total_bytes IS NOT NULL
                       THEN s.observed_used_bytes ELSE u.used_bytes END AS used_bytes,
                  coalesce(s.capacity_bytes, s.observed_total_bytes) AS capacity_bytes,
                  CASE WHEN s.capacity_bytes IS NOT NULL
                       THEN u.used_bytes::double precision / s.capacity_bytes
                       WHEN s.observed_total_bytes > 0
                       THEN s.observed_used_bytes::double precision / s.observed_total_bytes
                  END AS fill_fraction
             FROM storage s JOIN location l USING (location_id) JOIN storage_usage u USING (storage_id)
            ORDER BY s.name""",
    )


def get_storage(connection: Connection, name: str) -> dict[str, Any]:
    """One storage as :func:`list_storages` tells it, with its replicas by state.

    Raises
    ------
    NotFoundError
    """
    for row in list_storages(connection):
        if row["name"] == name:
            states = rows(
                connection,
                """SELECT state, sum(n)::bigint AS n, sum(bytes)::bigint AS bytes FROM tally
                    WHERE noun = 'replica' AND storage_id = :id GROUP BY state
                   HAVING sum(n) <> 0 ORDER BY state""",
                id=row["storage_id"],
            )
            row["replicas_by_state"] = {one["state"]: one["n"] for one in states}
            return row
    raise NotFoundError("storage", name, "see 'dlm storage list'")


def set_storage(connection: Connection, name: str, changes: Mapping[str, Any]) -> None:
    """Change what may be changed of a storage (:data:`CHANGEABLE`).

    A storage that is no longer drained keeps what was to leave it for that reason, with the expiry
    of its own that a replica may have had.

    Raises
    ------
    NotFoundError, InvalidValueError, CatalogueError
    IllegalTransitionError
        if it is retired.
    """
    storage = get_storage(connection, name)
    wanted = {key: value for key, value in changes.items() if key in CHANGEABLE}
    if not wanted:
        return
    if storage["mode"] == StorageMode.RETIRED:
        raise IllegalTransitionError(noun="storage", key=name, old="retired", new="anything else")
    if storage["mode"] == StorageMode.LOST and "mode" in wanted:
        # on its way back it is audited: see lifecycle.lost
        raise IllegalTransitionError(noun="storage", key=name, old="lost", new=wanted["mode"])
    _check({**storage, **wanted})
    assignments = ", ".join(f"{key} = :{key}" for key in wanted)
    if "capacity_bytes" in wanted:  # what it told before may be what is wrong: it is asked anew
        assignments += (
            ", observed_total_bytes = NULL, observed_used_bytes = NULL, observed_at = NULL"
        )
    run(
        connection,
        f"UPDATE storage SET {assignments}, rebalance_after = NULL WHERE storage_id = :id",
        id=storage["storage_id"],
        **wanted,
    )
    left_drain = storage["mode"] == StorageMode.DRAINING and "mode" in wanted
    if left_drain and wanted["mode"] != StorageMode.DRAINING:
        keep_drained(connection, storage["storage_id"])
    if wanted.get("phase", storage["phase"]) != storage["phase"]:
        _weigh_again(connection, storage["storage_id"])
    _ask_planner_again(connection)


def set_config(connection: Connection, storage_id: uuid.UUID, config: Mapping[str, Any]) -> None:
    """Keep what the adapter and the stager of a storage need; who calls has tried it."""
    run(
        connection,
        "UPDATE storage SET config = CAST(:config AS jsonb) WHERE storage_id = :id",
        config=Jsonb(dict(config)),
        id=storage_id,
    )


def set_path_rules(
    connection: Connection, storage_id: uuid.UUID, rules: Sequence[dict[str, Any]] | None
) -> None:
    """Keep a storage's rules (None: it has none); copies that are there stay where they are."""
    run(
        connection,
        "UPDATE storage SET path_rules = CAST(:rules AS jsonb) WHERE storage_id = :id",
        rules=Jsonb(list(rules)) if rules is not None else None,
        id=storage_id,
    )
    _ask_planner_again(connection)


def _weigh_again(connection: Connection, storage_id: uuid.UUID) -> None:
    """The phase of the items on a storage has changed with its own."""
    run(
        connection,
        """INSERT INTO evaluation (oid, due_at)
           SELECT DISTINCT oid, dlm_now() FROM replica WHERE storage_id = :id
              AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING') ORDER BY oid
           ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at),
                  attempts = 0""",
        id=storage_id,
    )


def _ask_planner_again(connection: Connection) -> None:
    """Items that could not get their copies may now: look at them at once."""
    run(
        connection,
        """INSERT INTO evaluation (oid, due_at)
           SELECT oid, dlm_now() FROM data_item
            WHERE shortfall IS NOT NULL AND state IN ('READY', 'CORRUPTED') ORDER BY oid
           ON CONFLICT (oid) DO UPDATE SET due_at = EXCLUDED.due_at, attempts = 0""",
    )


def drain_progress(storage: Mapping[str, Any], now: datetime) -> dict[str, Any] | None:
    """How far the drain of a storage (a row of :func:`list_storages`) is, None if there is none.

    Bytes without the trash; the rate is the mean since it began; ``ends_at`` is None while nothing
    has left. What was purged or is in the trash has left.
    """
    if storage["drain_since"] is None:
        return None
    left = max(storage["replica_bytes"] - storage["trashed_bytes"], 0)
    begun = storage["drain_bytes"] or 0
    gone, seconds = max(begun - left, 0), (now - storage["drain_since"]).total_seconds()
    rate = gone / seconds if seconds > 0 else 0.0
    wait = 0.0 if not left else left / rate if rate else None
    return {
        "since": storage["drain_since"],
        "begun_bytes": begun,
        "left_bytes": left,
        "done_fraction": gone / begun if begun else 1.0,
        "bytes_per_second": rate,
        "ends_at": None if wait is None or wait > _NEVER else now + timedelta(seconds=wait),
    }


def count_stuck(connection: Connection, storage_id: uuid.UUID) -> int:
    """Items with a copy on a storage of which no other storage can take one now."""
    found = rows(
        connection,
        """SELECT count(*) AS n FROM data_item i
            WHERE i.shortfall IS NOT NULL AND i.shortfall LIKE '%impossible now%'
              AND EXISTS (SELECT FROM (SELECT * FROM replica WHERE oid = i.oid OFFSET 0) r
                           WHERE r.storage_id = :storage AND r.live)""",
        storage=storage_id,
    )
    return int(found[0]["n"])


def count_announced(connection: Connection, storage_id: uuid.UUID) -> int:
    """Replicas on a storage that were never let in: they do not leave it by themselves."""
    found = rows(
        connection,
        """SELECT coalesce(sum(n), 0) AS n FROM tally
            WHERE noun = 'replica' AND storage_id = :storage AND state = 'PENDING'""",
        storage=storage_id,
    )
    return int(found[0]["n"])


def drains(connection: Connection, now: datetime) -> list[dict[str, Any]]:
    """The progress of every drain, with the storage's name, how many items are stuck, and how many
    announcements will not leave."""
    return [
        {
            "storage": row["name"],
            **(drain_progress(row, now) or {}),
            "stuck_items": count_stuck(connection, row["storage_id"]),
            "announced": count_announced(connection, row["storage_id"]),
        }
        for row in list_storages(connection)
        if row["drain_since"] is not None
    ]


def retire_storage(
    connection: Connection, name: str, now: datetime, *, give_up: bool = False
) -> None:
    """Take an empty storage out of use for good; a lost one, with the word ``give_up``, as it is.

    Raises
    ------
    NotFoundError
    DeletionRefusedError
        while replicas remain on it, with their number, or for a lost one without the word.
    """
    # against replicas that are planned here at this moment: their foreign key waits for us
    run(connection, "SELECT FROM storage WHERE name = :name FOR UPDATE", name=name)
    storage = get_storage(connection, name)
    if storage["mode"] == StorageMode.RETIRED:
        return
    left = {s: n for s, n in storage["replicas_by_state"].items() if s != "DELETED"}
    lost = storage["mode"] == StorageMode.LOST
    if left and not (lost and give_up):
        told = ", ".join(f"{n} {state}" for state, n in left.items())
        way = _way_out(connection, storage, set(left))
        raise DeletionRefusedError(
            key=f"storage {name}", reason=f"it still has replicas ({told}); {way}"
        )
    if left:
        # what was only announced there will never be seen
        run(
            connection,
            "UPDATE replica SET state = 'MISSING' WHERE storage_id = :id AND state = 'PENDING'",
            id=storage["storage_id"],
        )
    run(
        connection,
        "UPDATE storage SET mode = 'retired', retired_at = :now WHERE storage_id = :id",
        now=now,
        id=storage["storage_id"],
    )
    if left:
        _end_all(connection, storage["storage_id"], f"storage {name} is retired", now)


def _way_out(connection: Connection, storage: Mapping[str, Any], left: set[str]) -> str:
    """What has to be done, or waited for, until a storage with replicas in these states is empty."""
    name = storage["name"]
    if storage["mode"] == StorageMode.LOST:
        return f"it never comes back then: dlm storage retire {name} --give-up"
    if left - {"PENDING", "TRASHED"}:
        if storage["mode"] == StorageMode.DRAINING:
            return f"its drain goes on: dlm storage show {name}"
        return f"drain it first: dlm storage drain {name}"
    if "PENDING" not in left:
        return "what is in its trash goes by itself when its grace is over"
    way = f"dlm withdraw --failed --storage {name}"
    if not failed_announcements(connection, storage["storage_id"], 1):
        way = f"dlm item list --state INITIALISED --storage {name}, then dlm withdraw URI"
    return f"what was announced and never let in does not leave by itself: {way}"


def _end_all(connection: Connection, storage_id: uuid.UUID, why: str, now: datetime) -> None:
    """What waited for a storage that was given up does not come any more; the records of what lay
    in its trash end."""
    run(
        connection,
        """UPDATE operation o SET state = 'CANCELLED', finished_at = :now, lease_token = NULL,
                  lease_until = NULL, error_code = 'DLM-503', error = :why
             FROM replica r
            WHERE r.uid = o.uid AND r.storage_id = :storage AND o.state IN ('QUEUED', 'RUNNING')
              AND o.kind NOT IN ('trash', 'purge')""",
        storage=storage_id,
        why=why,
        now=now,
    )
    left = rows(
        connection,
        """SELECT r.uid, r.oid, dlm_actor() AS actor FROM replica r
            WHERE r.storage_id = :storage AND r.state = 'TRASHED' AND NOT EXISTS (
                  SELECT FROM operation o WHERE o.uid = r.uid AND o.kind IN ('trash', 'purge')
                     AND o.state IN ('QUEUED', 'RUNNING'))""",
        storage=storage_id,
    )
    purges = [NewOperation(OperationKind.PURGE, row["oid"], row["uid"], why, now) for row in left]
    if left:
        insert_operations(connection, purges, left[0]["actor"], now)
