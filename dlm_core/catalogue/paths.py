"""Path rules of storages: keep them, and find what would meet on a storage before it does."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from dlm_core.catalogue.engine import copy_rows, rows, run

_PAGE = 20_000


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two items whose copies would meet: at one path, or the one's file is the other's folder."""

    uri: str
    path: str
    other_uri: str
    other_path: str


def items_with_places(connection: Connection, storage_id: uuid.UUID) -> Iterator[dict[str, Any]]:
    """All items that are not DELETED, in key order, with where their copy on the storage lies if
    they have one."""
    after = uuid.UUID(int=0)
    while True:
        page = rows(
            connection,
            """SELECT i.oid, i.uri, i.version, (
                 SELECT r.path FROM replica r WHERE r.oid = i.oid AND r.storage_id = :storage
                    AND r.owns_path ORDER BY r.uid DESC LIMIT 1) AS path
                 FROM data_item i WHERE i.oid > :after AND i.state <> 'DELETED'
                ORDER BY i.oid LIMIT :page""",
            storage=storage_id,
            after=after,
            page=_PAGE,
        )
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1]["oid"]


def find_meetings(
    connection: Connection, places: Iterable[tuple[uuid.UUID, str]], limit: int = 10
) -> list[Meeting]:
    """Those of (oid, path) that would meet on one storage; ``limit`` pairs at most."""
    copy_rows(connection, "place", {"oid": "uuid", "path": "text"}, ())
    for page in _pages(places):  # no COPY: to find the places is to ask this connection
        run(
            connection,
            "INSERT INTO place SELECT * FROM unnest(CAST(:oids AS uuid[]), CAST(:paths AS text[]))",
            oids=[oid for oid, _ in page],
            paths=[path for _, path in page],
        )
    # with a slash behind each, all that lies below a path follows it in bytewise order
    return [
        Meeting(row["uri"], row["path"], row["other_uri"], row["other_path"])
        for row in rows(
            connection,
            """SELECT a.uri, n.path, b.uri AS other_uri, n.other_path FROM (
                 SELECT oid, path, lead(oid) OVER w AS other_oid, lead(path) OVER w AS other_path
                   FROM place WINDOW w AS (ORDER BY (path || '/') COLLATE "C", oid)) n
                 JOIN data_item a ON a.oid = n.oid JOIN data_item b ON b.oid = n.other_oid
                WHERE starts_with(n.other_path || '/', n.path || '/') LIMIT :limit""",
            limit=limit,
        )
    ]


def _pages(places: Iterable[tuple[uuid.UUID, str]]) -> Iterator[list[tuple[uuid.UUID, str]]]:
    rest = iter(places)
    while page := list(islice(rest, _PAGE)):
        yield page


def place_on(
    connection: Connection, storage_id: uuid.UUID, uri: str, version: int | None
) -> dict[str, Any] | None:
    """The item of ``uri`` (its newest version if None) with the path and state of its copy on a
    storage, or None if there is no such item."""
    found = rows(
        connection,
        """SELECT i.oid, i.uri, i.version, r.path, r.state FROM data_item i
             LEFT JOIN LATERAL (
               SELECT path, state FROM replica WHERE oid = i.oid AND storage_id = :storage
                  AND live LIMIT 1) r ON true
            WHERE i.uri = :uri AND (CAST(:version AS integer) IS NULL OR i.version = :version)
            ORDER BY i.version DESC LIMIT 1""",
        storage=storage_id,
        uri=uri,
        version=version,
    )
    return found[0] if found else None


def folders_above(path: str) -> Iterator[str]:
    """The folders in which a path lies, the innermost first."""
    while (cut := path.rfind("/")) > 0:
        path = path[:cut]
        yield path


def owners_at(
    connection: Connection, storage_id: uuid.UUID, paths: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Those of ``paths`` (encoded) at which a replica lies on a storage, or may lie: whose it is
    (uid, uri), its kind, and whether its item has only been announced."""
    found = rows(
        connection,
        """SELECT r.path, r.uid, i.uri, i.kind, i.state = 'INITIALISED' AS announced
             FROM replica r JOIN data_item i USING (oid)
            WHERE r.storage_id = :storage AND r.path = ANY(:paths) AND r.owns_path""",
        storage=storage_id,
        paths=list(paths),
    )
    return {row["path"]: row for row in found}


def places_inside(
    connection: Connection, records: Sequence[dict[str, Any]], directories: Collection[uuid.UUID]
) -> list[tuple[dict[str, Any], str]]:
    """Those of ``records`` (with oid, storage_id and path) that would lie inside a directory that is
    another's on their storage, or that another of them will be, with whose or which that is.

    ``directories`` are the oids of those that are one. In a file nothing lies: an object store may
    have names that go on where its name ends.
    """
    above = {record["uid"]: [*folders_above(record["path"])] for record in records}
    theirs: dict[tuple[uuid.UUID, str], str] = {
        (record["storage_id"], record["path"]): record["path"]
        for record in records
        if record["oid"] in directories
    }
    for storage_id in {record["storage_id"] for record in records}:
        folders = {f for r in records if r["storage_id"] == storage_id for f in above[r["uid"]]}
        owned = owners_at(connection, storage_id, folders)
        theirs |= {
            (storage_id, path): row["uri"]
            for path, row in owned.items()
            if row["kind"] == "directory"
        }
    found: list[tuple[dict[str, Any], str]] = []
    for record in records:
        owners = (theirs.get((record["storage_id"], folder)) for folder in above[record["uid"]])
        found += [(record, owner) for owner in filter(None, owners)][:1]
    return found


def owner_inside(
    connection: Connection, storage_id: uuid.UUID, path: str, oid: uuid.UUID
) -> dict[str, Any] | None:
    """A file (storage's name, path) of the directory payload of ``oid``, at ``path`` on a storage,
    that is another item's too."""
    found = rows(
        connection,
        """SELECT s.name AS storage, r.path FROM manifest_file m, LATERAL (
             SELECT path, storage_id FROM replica r WHERE r.storage_id = :storage
                AND r.path = CAST(:path AS text) || '/' || m.path AND r.owns_path OFFSET 0) r
             JOIN storage s USING (storage_id) WHERE m.oid = :oid LIMIT 1""",
        storage=storage_id,
        path=path,
        oid=oid,
    )
    return found[0] if found else None
