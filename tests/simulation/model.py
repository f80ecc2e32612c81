"""What must hold, written so that it is plain to see: a model of items, replicas, storages with
the bytes that really lie there, holds, expiry and trash.

It is told every commit of the catalogue and every change of a storage at the moment when they
happen, and judges each of them. It never asks the code under test what is right.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

Row = Mapping[str, Any]
Tree = dict[str, bytes]

WEIGHT = {"PLASMA": 0, "GAS": 1, "LIQUID": 2, "SOLID": 4}
TRASH, TEMPORARY, QUARANTINE = ".dlm/trash/", ".dlm/tmp/", ".dlm/quarantine/"


class Violation(AssertionError):
    """A promise that was broken, by its name, and how."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


@dataclass
class Item:
    """``content`` is what was handed over; ``expires_at`` what users asked for."""

    oid: uuid.UUID
    uri: str
    content: bytes
    target: str
    state: str = "INITIALISED"
    expires_at: datetime | None = None


@dataclass
class Replica:
    uid: uuid.UUID
    oid: uuid.UUID
    storage: str
    path: str
    state: str = "PENDING"
    #: its bytes were moved to the trash at this time
    trashed_at: datetime | None = None
    #: number of the commit that certified its purge, and until when that is good
    purge: tuple[int, datetime] | None = None


@dataclass
class Store:
    """A storage; ``disk`` holds all its files, those of the DLM too."""

    name: str
    location: str
    weight: int
    mode: str = "read_write"
    #: step in which the mode changed last: work that was under way may still go by the old one
    mode_step: int = -1
    disk: Tree = field(default_factory=dict)


@dataclass
class Hold:
    prefix: str
    #: number of the last commit before it
    after: int
    ends_at: datetime | None = None


@dataclass(frozen=True)
class Commit:
    """What one transaction did: its events in order, the certificates that it wrote, the items and
    replicas that it made."""

    events: Sequence[Row] = ()
    certificates: Sequence[Row] = ()
    items: Sequence[Row] = ()
    replicas: Sequence[Row] = ()


@dataclass
class Model:
    """All that is known; the fields are changed by the methods and by the rules of the world."""

    transitions: frozenset[tuple[str, str, str]]
    grace: timedelta
    now: datetime
    step: int = 0
    commits: int = 0
    items: dict[uuid.UUID, Item] = field(default_factory=dict)
    replicas: dict[uuid.UUID, Replica] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)
    holds: list[Hold] = field(default_factory=list)
    #: what the environment damaged or took, by place: the step in which it did
    taken: dict[tuple[str, str], int] = field(default_factory=dict)
    #: how often each transition was made, certificates were written
    seen: Counter[str] = field(default_factory=Counter)
    #: content and target phase of what users register, by uri
    announced: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    #: files that others put there and never registered
    strangers: dict[tuple[str, str], bytes] = field(default_factory=dict)

    # --- questions -------------------------------------------------------------------------------

    def held(self, item: Item) -> bool:
        return any(self._holds(hold, item) for hold in self.holds)

    def _holds(self, hold: Hold, item: Item) -> bool:
        in_force = hold.ends_at is None or hold.ends_at > self.now
        return in_force and item.uri.startswith(hold.prefix)

    def bytes_at(self, storage: str, path: str) -> bytes | None:
        return self.stores[storage].disk.get(path)

    def places(self, item: Item) -> Iterator[tuple[Replica, str]]:
        """Where the catalogue says that copies of an item lie, trash included."""
        for replica in self.replicas.values():
            if replica.oid == item.oid and replica.state != "DELETED":
                yield replica, replica.path
                if replica.state == "TRASHED":
                    yield replica, trash_of(replica.uid)

    def good_copies(self, item: Item, *, trash: bool = True) -> list[tuple[str, str]]:
        """Places where the right bytes lie and the catalogue can find them."""
        found = {
            (replica.storage, path)
            for replica, path in self.places(item)
            if (trash or not path.startswith(TRASH))
            and self.bytes_at(replica.storage, path) == item.content
        }
        return sorted(found)

    def is_there(self, replica: Replica) -> bool:
        return self.bytes_at(replica.storage, replica.path) == self.items[replica.oid].content

    def is_excused(self, replica: Replica) -> bool:
        """True if the environment took or damaged the bytes of a replica."""
        return (replica.storage, replica.path) in self.taken

    def keeps(self, item: Item) -> bool:
        """True if the item must not be lost now."""
        return item.state in ("READY", "CORRUPTED")

    # --- the environment and the users -----------------------------------------------------------

    def may_harm(self, storage: str, path: str, *, within_work: bool) -> bool:
        """False for the last good copy: what is lost then would not be the DLM's fault. While work
        is under way a copy in the trash does not count, it may be on its way out rightly."""
        for item in self.items.values():
            good = self.good_copies(item)
            if (storage, path) not in good:
                continue
            others = [place for place in good if place != (storage, path)]
            if within_work:
                others = [place for place in others if not place[1].startswith(TRASH)]
            if not others:
                return False
        return True

    def may_harm_all(self, storage: str, paths: Sequence[str]) -> bool:
        """As :meth:`may_harm`, of what goes together."""
        places = {(storage, path) for path in paths}
        goods = [set(self.good_copies(item)) for item in self.items.values()]
        return all(good - places for good in goods if good & places)

    def harm(self, storage: str, path: str, data: bytes | None) -> None:
        """The environment changed the bytes at a place, or took them (None)."""
        disk = self.stores[storage].disk
        if data is None:
            disk.pop(path, None)
        else:
            disk[path] = data
        self.taken[storage, path] = self.step

    # --- judging what the DLM does to a storage --------------------------------------------------

    def disk_changed(self, storage: str, after: Tree) -> None:
        """One call of the DLM has brought ``storage`` from what is known to ``after``."""
        store = self.stores[storage]
        before, store.disk = store.disk, after
        if before == after:
            return
        gone = {path: data for path, data in before.items() if after.get(path) != data}
        new = {path: data for path, data in after.items() if before.get(path) != data}
        self._check_mode(store, gone | new)
        for path, data in gone.items():
            if (storage, path) in self.strangers:
                raise Violation("strangers-untouched", f"{storage}:{path} was not the DLM's")
            target = next((p for p, d in new.items() if d == data and p not in before), None)
            if target is None:
                self._removed(storage, path, data)
            else:
                self._moved(storage, path, target, data)
                del new[target]
        for path in new:
            self.taken.pop((storage, path), None)
        self.check_nothing_lost()

    def _check_mode(self, store: Store, changed: Tree) -> None:
        # an audit sets damage aside
        usable = ("read_write", "draining", "auditing")
        allowed = store.mode in usable or store.mode_step == self.step
        if not allowed:
            raise Violation(
                "mode-respected", f"{sorted(changed)} changed on {store.name}, it is {store.mode}"
            )

    def _owner(self, storage: str, path: str) -> Item | None:
        """The item whose content lies, or should lie, at a place."""
        for item in self.items.values():
            for replica, place in self.places(item):
                if (replica.storage, place) == (storage, path):
                    return item
        return None

    def _moved(self, storage: str, path: str, target: str, data: bytes) -> None:
        harmed = self.taken.pop((storage, path), None)
        self.taken.pop((storage, target), None)
        if harmed is not None:
            self.taken[storage, target] = harmed
        if path.startswith(TEMPORARY):
            return
        if target.startswith(TRASH):
            replica = self.replicas.get(uuid.UUID(target.removeprefix(TRASH)))
            if replica is None or (replica.state, replica.path) != ("TRASHED", path):
                state = replica.state if replica else "unknown"
                raise Violation(
                    "no-deletion-without-certificate",
                    f"{storage}:{path} was moved to the trash of a replica that is {state}",
                )
            replica.trashed_at = self.now
        elif target.startswith(QUARANTINE):
            owner = self._owner(storage, path)
            if owner is not None and data == owner.content:
                raise Violation("good-copy-kept", f"{storage}:{path} is good but set aside")
        elif path.startswith(TRASH):
            replica = self.replicas.get(uuid.UUID(path.removeprefix(TRASH)))
            if replica is None or replica.path != target:
                raise Violation("trash-restorable", f"{storage}:{path} came back as {target}")
            replica.trashed_at = None
        elif path.startswith(QUARANTINE):
            owner = self._owner(storage, target)
            if owner is None or data != owner.content:
                raise Violation("good-copy-kept", f"{storage}:{path} came back as {target}")
        else:
            raise Violation("no-deletion-without-certificate", f"{storage}:{path} became {target}")

    def _removed(self, storage: str, path: str, data: bytes) -> None:
        if path.startswith(TEMPORARY):
            return
        if not path.startswith(TRASH):
            raise Violation("no-deletion-without-certificate", f"{storage}:{path} was removed")
        replica = self.replicas[uuid.UUID(path.removeprefix(TRASH))]
        item = self.items[replica.oid]
        if self.bytes_at(storage, replica.path) == data:
            return  # it is back in its place whole: what an object store left of a rename
        if replica.purge is None or replica.purge[1] < self.now:
            raise Violation(
                "no-deletion-without-certificate",
                f"{storage}:{path} was purged, its certificate is {replica.purge}",
            )
        if replica.trashed_at is None or self.now < replica.trashed_at + self.grace:
            raise Violation("trash-restorable", f"{storage}:{path} went before its grace was over")
        for hold in self.holds:
            if self._holds(hold, item) and hold.after < replica.purge[0]:
                raise Violation("holds-keep", f"{storage}:{path} of {item.uri} was purged")
        replica.trashed_at = None

    # --- judging what the DLM writes in the catalogue --------------------------------------------

    def committed(self, commit: Commit) -> None:
        """One transaction of the DLM was committed."""
        self.commits += 1
        certificates = commit.certificates
        for row in commit.items:
            self.items[row["oid"]] = Item(row["oid"], row["uri"], *self.announced[row["uri"]])
        for row in commit.replicas:
            uid = row["uid"]
            self.replicas[uid] = Replica(uid, row["oid"], row["storage"], row["path"])
        before = {uid: replica.state for uid, replica in self.replicas.items()}
        for certificate in certificates:
            self._check_certificate(certificate, certificates, before)
        by_uid = {certificate["uid"]: certificate for certificate in certificates}
        for event in commit.events:
            if event["noun"] == "storage":
                self._mode(event)
            elif event["old_state"] is not None and event["old_state"] != event["new_state"]:
                self._transition(event, by_uid)
        for uid, certificate in by_uid.items():
            if certificate["step"] in ("purge", "release"):
                self.replicas[uid].purge = (self.commits, certificate["valid_until"])
        self.check_nothing_lost()

    def _mode(self, event: Row) -> None:
        store = self.stores[event["storage"]]
        store.mode, store.mode_step = event["new_state"], self.step
        self.seen[f"storage {event['old_state']} to {event['new_state']}"] += 1

    def _transition(self, event: Row, certificates: Mapping[uuid.UUID, Row]) -> None:
        noun, old, new = event["noun"], event["old_state"], event["new_state"]
        thing = self.items[event["oid"]] if noun == "item" else self.replicas[event["uid"]]
        if (noun, old, new) not in self.transitions or thing.state != old:
            raise Violation(
                "transitions-legal", f"{noun} {_key(event)} went from {thing.state}/{old} to {new}"
            )
        thing.state = new
        self.seen[f"{noun} {old} to {new}"] += 1
        if isinstance(thing, Item):
            self._item_became(thing, old, new)
        else:
            self._replica_became(thing, old, new, certificates)

    def _item_became(self, item: Item, old: str, new: str) -> None:
        if new == "EXPIRED":
            over = item.expires_at is not None and item.expires_at <= self.now
            if not over or self.held(item):
                raise Violation(
                    "expiry-by-users-only", f"{item.uri} expired: {item.expires_at}, now {self.now}"
                )
        elif new == "DELETED":
            left = [r.state for r in self.replicas.values() if r.oid == item.oid]
            if set(left) - {"DELETED"}:
                raise Violation("deleted-means-gone", f"{item.uri} still has replicas: {left}")
        elif old == "EXPIRED":
            item.expires_at = None  # restored: it stays until somebody says otherwise

    def _replica_became(
        self, replica: Replica, old: str, new: str, certificates: Mapping[uuid.UUID, Row]
    ) -> None:
        item, where = self.items[replica.oid], f"{replica.storage}:{replica.path}"
        if new == "TRASHED":
            certificate = certificates.get(replica.uid)
            if certificate is None or certificate["step"] != "trash":
                raise Violation("no-deletion-without-certificate", f"{where} was trashed")
            if self.held(item):
                raise Violation("holds-keep", f"{where} of {item.uri} was trashed")
        elif new == "DELETED":
            if replica.purge is None or replica.purge[1] < self.now:
                raise Violation("no-deletion-without-certificate", f"{where} was deleted")
            touched = self.stores[replica.storage].mode != "lost"
            if touched and self.bytes_at(replica.storage, trash_of(replica.uid)) is not None:
                raise Violation("deleted-means-gone", f"{where} still lies in the trash")
        elif new == "READY":
            replica.purge = None
            if not self.is_there(replica) and not self.is_excused(replica):
                raise Violation("ready-is-there", f"{where} became READY, its bytes are not there")
        elif old == "TRASHED":
            replica.purge = None

    def _check_certificate(
        self, row: Row, others: Sequence[Row], states: Mapping[uuid.UUID, str]
    ) -> None:
        item = self.items[row["oid"]]
        self.seen[f"certificate of a {row['step']}, {row['basis']}"] += 1
        name = f"the {row['step']} certificate of a copy of {item.uri}"
        if not row["proved_at"] <= self.now < row["valid_until"]:
            raise Violation("no-deletion-without-certificate", f"{name} is not valid now")
        if self.held(item):
            raise Violation("holds-keep", f"{name} was written under a hold")
        survivors = [self.replicas[uuid.UUID(one["uid"])] for one in row["survivors"]]
        self._check_survivors(name, row, survivors, {one["uid"] for one in others}, states)
        if row["basis"] == "item_expired":
            over = item.expires_at is not None and item.expires_at <= self.now
            if not over:
                raise Violation("expiry-by-users-only", f"{name} says that the item expired")
            return
        given = weigh(survivors, self.stores)
        if not survivors or given < WEIGHT[item.target]:
            raise Violation("survivors-suffice", f"{name}: they give {given} of {item.target}")

    def _check_survivors(
        self,
        name: str,
        row: Row,
        survivors: Sequence[Replica],
        going: set[uuid.UUID],
        states: Mapping[uuid.UUID, str],
    ) -> None:
        for survivor in survivors:
            where = f"{survivor.storage}:{survivor.path}"
            mode = self.stores[survivor.storage].mode
            if states[survivor.uid] != "READY" or survivor.uid in going:
                raise Violation("survivors-exist", f"{name}: {where} is {states[survivor.uid]}")
            if mode not in ("read_write", "read_only") or survivor.oid != row["oid"]:
                raise Violation("survivors-exist", f"{name}: {where} does not count, it is {mode}")
            if self.is_there(survivor):
                continue
            taken = self.taken.get((survivor.storage, survivor.path))
            # before a purge the survivors are looked at: only what was taken since is excused
            if taken is None or (row["step"] == "purge" and taken != self.step):
                raise Violation("survivors-exist", f"{name}: the bytes at {where} are not right")

    # --- after every step ------------------------------------------------------------------------

    def check_nothing_lost(self) -> None:
        for item in self.items.values():
            if self.keeps(item) and not self.good_copies(item):
                raise Violation("nothing-lost", f"no good copy of {item.uri} is left")

    def check_retired_is_empty(self) -> None:
        for replica in self.replicas.values():
            if replica.state != "DELETED" and self.stores[replica.storage].mode == "retired":
                where = f"{replica.storage}:{replica.path}"
                raise Violation("retired-is-empty", f"{where} is {replica.state} there")

    def check_ready_is_there(self) -> None:
        for replica in self.replicas.values():
            if replica.state == "READY" and not self.is_there(replica):
                if not self.is_excused(replica):
                    where = f"{replica.storage}:{replica.path}"
                    raise Violation("ready-is-there", f"{where} is READY, its bytes are not there")

    def check_trash_is_there(self) -> None:
        """What was moved to the trash lies there until a purge is certified."""
        for replica in self.replicas.values():
            waits = replica.state == "TRASHED" and replica.trashed_at and not replica.purge
            place = (replica.storage, trash_of(replica.uid))
            if waits and self.bytes_at(*place) is None and place not in self.taken:
                raise Violation("trash-restorable", f"{place} is gone before its time")


def trash_of(uid: uuid.UUID) -> str:
    return f"{TRASH}{uid}"


def weigh(replicas: Sequence[Replica], stores: Mapping[str, Store]) -> int:
    """Best weight by location, summed: two copies at one place are one failure domain."""
    best: dict[str, int] = {}
    for replica in replicas:
        store = stores[replica.storage]
        best[store.location] = max(best.get(store.location, 0), store.weight)
    return sum(best.values())


def _key(event: Row) -> str:
    return str(event["uid"] or event["oid"])
