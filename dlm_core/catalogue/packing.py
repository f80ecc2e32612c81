"""What packing asks the catalogue: whose turn it is, and what bytes a file should have."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager

from sqlalchemy import Connection, Engine

from dlm_core.catalogue.engine import alone, rows
from dlm_core.errors import PackingError
from dlm_core.types import decode_path, encode_path

#: advisory locks of packing; the second key is the storage's
_LOCK = 0x646C6D70


def packing(
    engine: Engine, actor: str, storage_id: uuid.UUID, name: str
) -> AbstractContextManager[None]:
    """Nobody else packs this storage meanwhile.

    Raises
    ------
    PackingError
        if somebody does.
    """
    return alone(engine, actor, _LOCK, storage_id, PackingError(storage=name))


def digests_at(
    connection: Connection, storage_id: uuid.UUID, paths: Sequence[str]
) -> dict[str, str]:
    """Of files on a storage those that belong to a READY replica, with the digest that the
    catalogue has of them; by path, as adapters take it."""
    tops: list[str] = []
    rests: list[str] = []
    for path in paths:
        names = encode_path(path).split("/")
        tops.extend("/".join(names[:n]) for n in range(1, len(names) + 1))
        rests.extend("/".join(names[n:]) for n in range(1, len(names) + 1))
    found = rows(
        connection,
        """SELECT w.top, w.rest, coalesce(m.digest, i.digest) AS digest
             FROM unnest(CAST(:tops AS text[]), CAST(:rests AS text[])) AS w(top, rest)
             JOIN replica r ON r.storage_id = :storage AND r.path = w.top
                           AND r.owns_path
             JOIN data_item i USING (oid)
             LEFT JOIN manifest_file m ON m.oid = r.oid AND m.path = w.rest
            WHERE r.state = 'READY'
              AND CASE WHEN w.rest = '' THEN i.kind = 'file' ELSE m.digest IS NOT NULL END""",
        tops=tops,
        rests=rests,
        storage=storage_id,
    )
    return {
        decode_path(f"{row['top']}/{row['rest']}" if row["rest"] else row["top"]): row["digest"]
        for row in found
    }
