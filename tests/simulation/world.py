"""The real thing beside the model: the DLM's functions on a real PostgreSQL and real folders.

A :class:`Worker` is a context whose every transaction and storage call is a *point*: there another
worker can be let in, or the process can die. Everything runs in one thread at a time, so that a
story of rules always goes the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, Engine, text

from dlm_core import types
from dlm_core.catalogue import places
from dlm_core.catalogue.capacity import storages_to_relieve
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.expiring import count_expiry_due
from dlm_core.catalogue.lost import storages_in_audit
from dlm_core.catalogue.operations import count_due
from dlm_core.catalogue.replicas import count_evaluations_due
from dlm_core.errors import (
    CatalogueUnavailableError,
    DlmError,
    PackingError,
    PayloadNotFoundError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.lost import lose_storage, plan_audits, take_back
from dlm_core.lifecycle.pack import pack_due
from dlm_core.lifecycle.rebalance import plan_rebalance
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.staging import execute_stage
from dlm_core.lifecycle.trash import execute_purge, execute_restore, execute_trash
from dlm_core.lifecycle.verify import execute_verify
from dlm_core.lifecycle.work import Context, StoragePool, drain
from dlm_core.settings import Settings
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, Entry, Usage
from dlm_core.types import OperationKind
from tests.fakes import FAR, Wrapped
from tests.simulation.model import Commit, Hold, Item, Model, Store, Violation
from tests.simulation.process import Crash, Process
from tests.simulation.shelves import Shelf

GRACE = timedelta(hours=1)
_BEGIN = datetime(2026, 6, 1, tzinfo=UTC)
_JOBS: dict[str, tuple[Any, Mapping[OperationKind, Any]]] = {
    "registration": (None, {OperationKind.ADMIT: execute_admit}),
    "replication": (plan_replication, {OperationKind.COPY: execute_copy}),
    "verification": (plan_audits, {OperationKind.VERIFY: execute_verify}),
    "expiry": (
        None,
        {
            OperationKind.RESTORE: execute_restore,
            OperationKind.TRASH: execute_trash,
            OperationKind.PURGE: execute_purge,
        },
    ),
    "rebalance": (plan_rebalance, {}),
}
JOBS = tuple(_JOBS)
#: what a storage may do to us
FAULTS = ("honest", "down", "full", "ghost", "hides", "keeps")


class Worker(Context):
    """A context whose commits are told to the model."""

    def bind(self, world: World) -> None:
        self.world, self.process = world, Process()
        self.storages = StoragePool(
            lambda row: world.shelves[row["name"]].around(Volume(world, self.process, row))
        )

    def transact(self, work: Callable[[Connection], Any]) -> Any:
        self.process.point()
        seen: list[Commit] = []

        def watched(connection: Connection) -> Any:
            self.process.locking = True
            result = work(connection)
            seen[:] = [self.world.look(connection)]
            return result

        try:
            result = super().transact(watched)
        finally:
            self.process.locking = False
        self.world.tell(seen[-1])
        self.process.point()
        return result


class Volume(Wrapped):
    """A POSIX storage with the faults of its world, whose changes are told to the model."""

    concurrency = 1

    def __init__(self, world: World, process: Process, row: Mapping[str, Any]) -> None:
        super().__init__(open_storage(row["name"], row["interface"], row["root"], {}))
        self.world, self.process, self.root = world, process, row["root"]
        self.name: str = row["name"]

    def _enter(self) -> str:
        """Every call begins here; the fault that the storage has now."""
        self.process.point()
        fault = self.world.faults.get(self.name, "honest")
        if fault == "down":
            raise StorageUnavailableError(storage=self.name, message="simulated outage")
        return fault

    def _change(self, call: str, *arguments: Any) -> Any:
        try:
            return getattr(self.inner, call)(*arguments)
        finally:
            self.world.model.disk_changed(self.name, self.world.shelves[self.name].tree())
            self.process.point(after=True)

    def stat(self, path: str) -> Entry | None:
        return self.stat_many([path])[path]

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        fault = self._enter()
        found: dict[str, Entry | None] = self.inner.stat_many(paths)
        for path in found:
            size = self.world.sizes.get((self.name, path))
            if fault == "ghost" and found[path] is None and size is not None:
                found[path] = Entry(path, size, 0.0, "file")
            elif fault == "hides" and not _private(path):
                found[path] = None
        return found

    def open_read(self, path: str) -> Any:
        if self._enter() == "hides" and not _private(path):
            raise PayloadNotFoundError(storage=self.name, path=path)
        return self.inner.open_read(path)

    def read_back(self, path: str) -> Any:
        return self.open_read(path)

    def write(self, path: str, source: Any, size: int) -> str | None:
        alive = not self.process.dead
        try:
            if self._enter() == "full":
                raise StorageFullError(storage=self.name, message="simulated")
        except Crash:
            if alive:
                self._leave_half(path, size)
            raise
        result: str | None = self._change("write", path, source, size)
        return result

    def _leave_half(self, path: str, size: int) -> None:
        """A process that dies while it writes leaves a part of the file."""
        file = Path(self.root, path)
        if not file.exists() and path.startswith(f"{PRIVATE}/tmp/"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"?" * (size // 2))
            self.world.model.stores[self.name].disk[path] = file.read_bytes()

    def rename(self, source: str, destination: str) -> None:
        self._enter()
        self._change("rename", source, destination)

    def remove(self, path: str) -> None:
        if self._enter() != "keeps":  # else it says "done", and that is all it does
            self._change("remove", path)

    def flush(self) -> None:
        """Nothing here has to outlive a power cut."""
        self.process.point()

    def usage(self) -> Usage:
        return Usage(1 << 40, 0)

    def check(self) -> None:
        if self.world.faults.get(self.name) == "down":
            raise StorageUnavailableError(storage=self.name, message="simulated outage")


def _private(path: str) -> bool:
    return path.startswith(f"{PRIVATE}/")


class Eyes:
    """One connection that only looks, a round trip a question.

    An answer is kept as long as nothing was written since: the same snapshot says the same.
    """

    def __init__(self, engine: Engine) -> None:
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._snapshot = ""
        self._answers: dict[Any, Any] = {}

    def close(self) -> None:
        self._connection.close()

    def ask(self, key: Any, question: Callable[[Connection], Any], now: datetime) -> Any:
        """The answer to ``question(connection)``; ``key`` tells it from other questions, and the
        time too where it matters."""
        snapshot = self._connection.execute(_SNAPSHOT, {"now": now.isoformat()}).scalar_one()
        if snapshot != self._snapshot:
            self._snapshot, self._answers = snapshot, {}
        if key not in self._answers:
            self._answers[key] = question(self._connection)
        return self._answers[key]


class World:
    """A site: its catalogue, its folders, and the model of both."""

    def __init__(
        self, engine: Engine, folder: Path, salt: int = 0, kinds: Sequence[str] = ("posix",)
    ) -> None:
        self.engine, self.folder = engine, folder
        self.kinds, self.salt = kinds, salt
        self.shelves: dict[str, Shelf] = {}
        self.jobs = dict(_JOBS)
        if len(kinds) > 1:
            self.jobs["replication"] = (
                plan_replication, {OperationKind.STAGE: execute_stage, **_JOBS["replication"][1]}
            )  # fmt: skip
        self.settings = Settings(
            home=folder,
            trash_grace_seconds=GRACE.total_seconds(),
            retry_base_seconds=1,
            # every survivor is read again before a purge
            proof_max_age_seconds=0.001,
            lease_seconds=300,
            # a story is told again by its seed: one thing after the other
            links_at_once=1,
        )
        self.eyes = Eyes(engine)
        self.faults: dict[str, str] = {}
        #: files that were at a place once: what a lying storage still tells
        self.sizes: dict[tuple[str, str], int] = {}
        self.numbers = itertools.count()
        self._reset(salt)
        self.user = self.worker("user:test")

    # --- set up and look -------------------------------------------------------------------------

    def _reset(self, salt: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # ids that are drawn by chance would let a story go another way every time
        chance = random.Random(salt)
        count = itertools.count(int(_BEGIN.timestamp() * 1000) << 80)
        types.uuid_utils = SimpleNamespace(
            uuid7=lambda: SimpleNamespace(int=_uuid7(next(count), chance))
        )
        with self.engine.begin() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            names = [row[0] for row in connection.execute(text(_OWN_TABLES))]
            connection.execute(text(f"TRUNCATE {', '.join(names)} RESTART IDENTITY"))
            moves = connection.execute(text("SELECT * FROM state_transition"))
            transitions = frozenset(tuple(row) for row in moves)
        self.model = Model(transitions, GRACE, _BEGIN)
        self.last_event = 0

    def worker(self, name: str) -> Worker:
        """A process of its own: nothing of it outlives a crash."""
        worker = Worker(self.engine, self.settings, name, lambda: self.model.now)
        worker.worker = name
        worker.bind(self)
        return worker

    def look(self, connection: Connection) -> Commit:
        """What this transaction has changed so far."""
        events = rows(connection, _EVENTS, last=self.last_event)
        if not events:
            return Commit()
        made = [event for event in events if event["action"] == "created"]
        return Commit(
            events,
            rows(connection, _CERTIFICATES),
            rows(connection, _ITEMS, oids=_keys(made, "item", "oid")) if made else [],
            rows(connection, _REPLICAS, uids=_keys(made, "replica", "uid")) if made else [],
        )

    def tell(self, commit: Commit) -> None:
        if commit.events:
            self.last_event = commit.events[-1]["seq"]
            self.model.committed(commit)

    # --- what the DLM does -----------------------------------------------------------------------

    def run(self, worker: Worker, job: str) -> None:
        """What one run of a job does at this moment."""
        if job == "packing":
            return self.pack(worker)
        planner, executors = self.jobs[job]
        if job == "expiry":
            planner = ExpiryPlanner(1000, 1 << 40)
        try:
            drain(worker, executors, planner)
        except DlmError as error:
            if worker.process.cut and isinstance(error, CatalogueUnavailableError):
                return None
            # every trouble of one item is that item's: the others' work goes on
            raise Violation("work-goes-on", f"{job} ended with {error.code}: {error}") from error

    def pack(self, worker: Worker) -> None:
        """Pack what is there on all storages with bundles, as if all of it had waited long."""
        worker.clock = lambda: FAR
        for pack in pack_due(worker):
            try:
                pack()
            except (StorageError, PackingError):
                pass  # it is down, or somebody else is at it

    def settle(self) -> None:
        """What the sensors would ask for at this moment, all jobs twice."""
        worker = self.worker("settle")
        for job in JOBS * 2:
            if self.is_due(job):
                self.run(worker, job)
        self.keep_house()

    def keep_house(self) -> None:
        """Now and then bundles are made, what tapes were asked for comes, what lies there goes."""
        if len(self.kinds) > 1 and self.model.step % 2:
            self.pack(self.worker("packer"))
            for shelf in self.shelves.values():
                shelf.deliver()
                if self.model.step % 4 == 1:
                    self.migrate(shelf)

    def migrate(self, shelf: Shelf) -> None:
        """A tape's manager moves to the silo what is not damaged: damage is never seen there."""
        if shelf.cold:
            shelf.migrate([path for name, path in self.model.taken if name == shelf.name])

    def is_due(self, job: str) -> bool:
        """What the sensor of a job asks."""
        now, kinds = self.model.now, list(self.jobs[job][1])

        def look(connection: Connection) -> bool:
            return (
                bool(kinds and count_due(connection, kinds, now))
                or (job == "replication" and count_evaluations_due(connection, now) > 0)
                or (job == "expiry" and count_expiry_due(connection, now).replicas > 0)
                or (job == "rebalance" and bool(storages_to_relieve(connection, now)))
                or (job == "verification" and bool(storages_in_audit(connection)))
            )

        return bool(self.eyes.ask((job, now), look, now))

    # --- places ----------------------------------------------------------------------------------

    def add_storage(self, location: str, phase: str) -> str:
        number = len(self.model.stores)
        name = f"s{number}"
        root = self.folder / name
        root.mkdir()
        kind = self.kinds[(number + self.salt) % len(self.kinds)]
        shelf = self.shelves[name] = Shelf(
            name, kind, root, self.model.seen, prompt=self.salt % 3 > 0
        )
        known = {store.location for store in self.model.stores.values()}
        weight = types.Phase(phase).weight
        self.model.stores[name] = Store(name, location, weight)

        def add(connection: Connection) -> None:
            now = self.model.now
            if location not in known:
                places.add_location(connection, location, now=now)
            places.add_storage(
                connection, name, location=location, interface="posix", root=str(root),
                phase=phase, now=now, config=shelf.config,
            )  # fmt: skip

        self.user.transact(add)
        return name

    def set_storage(self, name: str, **changes: Any) -> None:
        self.user.transact(lambda c: places.set_storage(c, name, changes))

    def retire(self, name: str) -> None:
        self.user.transact(lambda c: places.retire_storage(c, name, self.model.now))

    def lose(self, name: str) -> None:
        lose_storage(self.user, name, "declared in a story")

    def take_back(self, name: str) -> None:
        take_back(self.user, name)

    def used(self, name: str) -> int:
        """Bytes that the catalogue counts on a storage."""
        usage = "SELECT used_bytes FROM storage_usage WHERE name = :name"
        return int(self.user.transact(lambda c: rows(c, usage, name=name))[0]["used_bytes"])

    def retarget(self, item: Item) -> None:
        """A user wants an item at its target."""
        sql = "UPDATE data_item SET target_phase = :t WHERE oid = :o"
        self.user.transact(lambda c: run(c, sql, t=item.target, o=item.oid))

    def cut(self) -> int:
        """End the connections that are in the middle of a transaction; how many."""
        with self.engine.connect() as connection:
            return len(rows(connection, _CUT))

    def id_of(self, name: str) -> uuid.UUID:
        with self.engine.connect() as connection:
            found = rows(connection, "SELECT storage_id FROM storage WHERE name = :n", n=name)
        return found[0]["storage_id"]

    def is_busy(self, oid: uuid.UUID) -> bool:
        """True if something is under way with a copy of an item."""
        with self.engine.connect() as connection:
            return bool(rows(connection, _BUSY, oid=oid))

    # --- files, as users and the environment handle them -----------------------------------------

    def put(self, storage: str, path: str, data: bytes) -> None:
        file = self.folder / storage / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.model.stores[storage].disk[path] = data

    def harm(self, storage: str, path: str, data: bytes | None) -> None:
        """Change the bytes at a place, or take them away (None)."""
        self.model.harm(storage, path, self.shelves[storage].harm(path, data))

    # --- after every step ------------------------------------------------------------------------

    def check_disk(self) -> str | None:
        """Where the model and the folders differ; they never may."""
        for store in self.model.stores.values():
            found = self.shelves[store.name].tree()
            for path, data in found.items():
                self.sizes[store.name, path] = len(data)
            if found != store.disk:
                return f"{store.name}: {sorted(found)} instead of {sorted(store.disk)}"
        return None

    def check_catalogue(self) -> Iterator[tuple[str, str]]:
        """What is wrong in the catalogue: the promise, and how it is broken."""
        found = self.eyes.ask("check", lambda c: rows(c, _CHECK)[0], self.model.now)
        if found["differing"]:
            yield "bytes-add-up", str(found["differing"])
        if found["forgotten"]:
            yield "nothing-forgotten", str(found["forgotten"])
        told = {str(item.oid): item.state for item in self.model.items.values()}
        told |= {str(replica.uid): replica.state for replica in self.model.replicas.values()}
        if told != found["states"]:
            differing = told.items() ^ found["states"].items()
            yield "states-as-told", str(sorted(differing))

    def hold(self, prefix: str, until: datetime | None) -> None:
        hold_id = uuid.UUID(int=next(self.numbers))
        self.user.transact(
            lambda c: run(
                c,
                "INSERT INTO hold (hold_id, uri_prefix, reason, actor, created_at, ends_at) "
                "VALUES (:id, :prefix, 'audit', 'user:test', :now, CAST(:until AS timestamptz))",
                id=hold_id,
                prefix=prefix,
                now=self.model.now,
                until=until,
            )
        )
        self.model.holds.append(Hold(prefix, self.model.commits, until))

    def end_holds(self) -> None:
        self.user.transact(
            lambda c: run(
                c,
                "UPDATE hold SET ends_at = :now WHERE ends_at IS NULL OR ends_at > :now",
                now=self.model.now,
            )
        )
        for hold in self.model.holds:
            if hold.ends_at is None or hold.ends_at > self.model.now:
                hold.ends_at = self.model.now


def _keys(events: Iterable[Mapping[str, Any]], noun: str, key: str) -> list[uuid.UUID]:
    return [event[key] for event in events if event["noun"] == noun]


def content(number: int) -> bytes:
    """A payload of some bytes that no other item has."""
    return hashlib.sha256(str(number).encode()).hexdigest()[: 4 + number % 20].encode()


def _uuid7(count: int, chance: random.Random) -> int:
    """A UUIDv7, ordered by the number of the call."""
    time, number = count >> 80 << 80, (count & 0xFFFFFFFF) << 30
    return time | 7 << 76 | 2 << 62 | number | chance.getrandbits(30)


_OWN_TABLES = """
  SELECT quote_ident(relname) FROM pg_class
   WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
     AND relname NOT IN ('state_transition', 'alembic_version')"""
_EVENTS = """
  SELECT seq, noun, action, oid, uid, old_state, new_state, s.name AS storage
    FROM event LEFT JOIN storage s USING (storage_id)
   WHERE seq > :last AND xid = pg_current_xact_id_if_assigned()
     AND (noun IN ('item', 'replica') OR (noun = 'storage' AND action = 'mode'))
   ORDER BY seq"""
_CERTIFICATES = """
  SELECT uid, oid, step, basis, survivors, proved_at, valid_until FROM deletion
   WHERE xid = pg_current_xact_id_if_assigned()"""
_ITEMS = "SELECT oid, uri FROM data_item WHERE oid = ANY(:oids)"
_REPLICAS = """
  SELECT r.uid, r.oid, s.name AS storage, r.path FROM replica r JOIN storage s USING (storage_id)
   WHERE r.uid = ANY(:uids)"""
_SNAPSHOT = text("SELECT pg_current_snapshot()::text FROM set_config('dlm.now', :now, false)")
_CUT = """
  SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
   WHERE datname = current_database() AND state = 'idle in transaction'
     AND pid <> pg_backend_pid()"""
_BUSY = """
  SELECT FROM operation WHERE oid = :oid AND kind IN ('trash', 'purge', 'restore')
     AND (state = 'RUNNING' OR (kind = 'restore' AND state = 'QUEUED'))"""
# one look, one round trip: where the running tally and a recount of the rows differ, replicas that
# wait for work which nobody has queued, and all states
_CHECK = """
  WITH told AS (
    SELECT noun, storage_id, state, sum(n) AS n, sum(bytes) AS bytes FROM tally
     GROUP BY 1, 2, 3 HAVING sum(n) <> 0 OR sum(bytes) <> 0),
  counted AS (
    SELECT 'replica' AS noun, storage_id, state, count(*) AS n, sum(size) AS bytes FROM replica
     GROUP BY storage_id, state
    UNION ALL
    SELECT 'item', NULL, state, count(*), coalesce(sum(size), 0) FROM data_item GROUP BY state),
  differing AS (
    SELECT 'tally' AS by, * FROM (SELECT * FROM told EXCEPT SELECT * FROM counted) a
    UNION ALL
    SELECT 'recount', * FROM (SELECT * FROM counted EXCEPT SELECT * FROM told) b),
  forgotten AS (
    SELECT r.uid, r.path, r.state FROM replica r
     WHERE r.state IN ('PENDING', 'SUSPECT', 'TRASHED') AND NOT EXISTS (
       SELECT FROM operation o WHERE o.uid = r.uid AND o.state IN ('QUEUED', 'RUNNING', 'FAILED')
          AND o.kind = ANY(CASE r.state WHEN 'PENDING' THEN ARRAY['admit', 'copy']
                                        WHEN 'SUSPECT' THEN ARRAY['verify']
                                        ELSE ARRAY['trash', 'purge', 'restore'] END))),
  states AS (SELECT oid AS key, state FROM data_item UNION ALL SELECT uid, state FROM replica)
  SELECT (SELECT json_agg(d) FROM differing d) AS differing,
         (SELECT json_agg(f) FROM forgotten f) AS forgotten,
         (SELECT coalesce(json_object_agg(key, state), '{}') FROM states) AS states"""
