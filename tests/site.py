"""A small research site for tests: real files on real storages, a real catalogue, a set clock."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from dlm_core.catalogue.engine import rows, run
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.rebalance import plan_rebalance
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.staging import execute_stage
from dlm_core.lifecycle.trash import execute_purge, execute_restore, execute_trash
from dlm_core.lifecycle.verify import execute_verify
from dlm_core.lifecycle.work import Context, Report, StoragePool, _open_row, drain
from dlm_core.settings import Settings
from dlm_core.types import OperationKind, encode_path, make_uri, new_id, uri_bucket
from tests.fakes import Misreading

ALL = {
    OperationKind.STAGE: execute_stage,
    OperationKind.COPY: execute_copy,
    OperationKind.VERIFY: execute_verify,
    OperationKind.TRASH: execute_trash,
    OperationKind.PURGE: execute_purge,
    OperationKind.RESTORE: execute_restore,
}


@dataclass
class Site:
    """What a test does to a site, in its words."""

    context: Context
    folder: Path
    now: datetime = field(default_factory=lambda: datetime(2026, 6, 1, tzinfo=UTC))
    storages: dict[str, uuid.UUID] = field(default_factory=dict)

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        return self.context.transact(lambda c: rows(c, sql, **parameters))

    def execute(self, sql: str, **parameters: Any) -> int:
        return self.context.transact(lambda c: run(c, sql, **parameters))

    def add_storage(self, name: str, location: str, **columns: Any) -> Path:
        """A POSIX storage of its own folder; LIQUID unless told otherwise."""
        root = self.folder / name
        root.mkdir()
        self.execute(
            "INSERT INTO location (location_id, name) VALUES (:id, :name) ON CONFLICT DO NOTHING",
            id=new_id(),
            name=location,
        )
        self.storages[name] = new_id()
        values = {"phase": "LIQUID", "interface": "posix", "class": "disk", "root": str(root)}
        values |= columns
        names = ", ".join(values)
        self.execute(
            f"""INSERT INTO storage (storage_id, name, location_id, {names})
                SELECT :storage_id, :name, location_id, {", ".join(f":{n}" for n in values)}
                  FROM location WHERE name = :location""",
            storage_id=self.storages[name],
            name=name,
            location=location,
            **values,
        )
        return root

    def set_storage(self, name: str, **columns: Any) -> None:
        changes = ", ".join(f"{column} = :{column}" for column in columns)
        self.execute(f"UPDATE storage SET {changes} WHERE name = :name_", name_=name, **columns)

    def add_item(self, path: str, data: bytes, on: str, **columns: Any) -> uuid.UUID:
        """A READY item whose first replica is a real file on storage ``on``."""
        file = self.folder / on / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        oid, uid, uri = new_id(), new_id(), make_uri("test", path)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.execute(
            "INSERT INTO data_item (oid, uri, uri_bucket, size, digest, created_at) "
            "VALUES (:oid, :uri, :bucket, :size, :digest, :now)",
            oid=oid, uri=uri, bucket=uri_bucket(uri), size=len(data), digest=digest, now=self.now,
        )  # fmt: skip
        self.execute(
            "INSERT INTO replica (uid, oid, storage_id, path, size, created_at, accessed_at, "
            "check_from) VALUES (:uid, :oid, :storage, :path, :size, :now, :now, :now)",
            uid=uid, oid=oid, storage=self.storages[on], path=encode_path(path), size=len(data),
            now=self.now,
        )  # fmt: skip
        values: Mapping[str, Any] = {"state": "READY", **columns}
        changes = ", ".join(f"{column} = :{column}" for column in values)

        def let_in(connection: Connection) -> None:
            sql = f"UPDATE data_item SET {changes} WHERE oid = :oid_"
            run(connection, sql, oid_=oid, **values)
            sql = """UPDATE replica SET state = 'READY', digest = :digest, checked_at = :now
                      WHERE uid = :uid"""
            run(connection, sql, uid=uid, digest=digest, now=self.now)

        self.context.transact(let_in)
        return oid

    def work(self, *kinds: OperationKind, plan: Any = None) -> Report:
        """Drain the kinds named, or everything until nothing is due at the present moment."""
        chosen = {kind: ALL[kind] for kind in (kinds or ALL)}
        return drain(self.context, chosen, plan)

    def settle(self) -> Report:
        """What the sensors would bring about at this moment, until nothing more happens."""

        def plan(context: Context) -> int:
            limit = self.context.settings.max_delete_items
            expiry = ExpiryPlanner(limit, self.context.settings.max_delete_bytes)
            return plan_replication(context) + expiry(context) + plan_rebalance(context)

        return self.work(plan=plan)

    def replicas(self, oid: uuid.UUID) -> dict[str, str]:
        """State by storage name; the newest replica where there were several."""
        found = self.query(
            "SELECT s.name, r.state FROM replica r JOIN storage s USING (storage_id) "
            "WHERE oid = :oid ORDER BY r.uid",
            oid=oid,
        )
        return {row["name"]: row["state"] for row in found}

    def item(self, oid: uuid.UUID) -> dict[str, Any]:
        return self.query("SELECT * FROM data_item WHERE oid = :oid", oid=oid)[0]

    def replica(self, oid: uuid.UUID, storage: str) -> dict[str, Any]:
        """The newest replica of an item on a storage."""
        return self.query(
            "SELECT * FROM replica WHERE oid = :oid AND storage_id = :s ORDER BY uid DESC LIMIT 1",
            oid=oid,
            s=self.storages[storage],
        )[0]

    def visible(self, storage: str) -> dict[str, bytes]:
        """Files outside the DLM's own folder by relative path."""
        root = self.folder / storage
        return {
            str(file.relative_to(root)): file.read_bytes()
            for file in sorted(root.rglob("*"))
            if file.is_file() and ".dlm" not in file.relative_to(root).parts
        }

    def private(self, storage: str, area: str) -> list[str]:
        """File names below ``.dlm/<area>``."""
        root = self.folder / storage / ".dlm" / area
        return sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())


def make_site(engine: Engine, folder: Path, **settings: Any) -> Site:
    """A site on a fresh catalogue; its clock stands still unless advanced."""
    chosen = {"home": folder / "home", "trash_grace_seconds": 3600, "retry_base_seconds": 1}
    site = Site(Context(engine, Settings(**(chosen | settings)), "user:test"), folder)
    site.context.clock = lambda: site.now
    return site


def reopen(site: Site, opener: Any) -> None:
    """Open the storages through ``opener(row)`` from now on: how faults are put in."""
    site.context.storages = StoragePool(opener)


def misread(site: Site, times: int) -> list[None]:
    """The next so many streams opened to read give wrong bytes; how many are left to come."""
    left: list[None] = [None] * times

    def opened(row: Any) -> Any:
        storage = Misreading(_open_row(row))
        storage.left = left
        return storage

    reopen(site, opened)
    return left
