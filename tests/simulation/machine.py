"""The rules: what users, operators, the environment and the DLM's own jobs may do, in any order."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sqlalchemy import Engine

from dlm_core import types
from dlm_core.catalogue.browse import set_item_expiry, set_replica_expiry
from dlm_core.errors import DlmError, NotFoundError
from dlm_core.lifecycle.register import Source, Terms, register_list
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from tests.memory import fast_folder
from tests.simulation.model import TEMPORARY, Item, Replica, Violation
from tests.simulation.process import Crash
from tests.simulation.world import FAULTS, JOBS, World, content

_ITEMS, _STORAGES = 4, 6
_LAYOUTS = (("A", "B", "C"), ("A", "A", "B"), ("A", "B", "B", "C"))
_PHASES = ("GAS", "LIQUID", "SOLID")
_TARGETS = ("PLASMA", "GAS", "LIQUID", "LIQUID", "SOLID", "SOLID")
#: seconds; a lease is 300, a refusal waits 600 or 3600, the grace is 3600
_JUMPS = (30, 301, 601, 3601, 7200, 86400)
#: at a point of a job; the first ones more often
_EVENTS = (
    *("crash",) * 3,
    *("overtake", "outsleep"),
    *("stop", "hold", "lose", "drain", "retire", "restore", "expire"),
    *JOBS,
)

an_index = st.integers(0, 7)
a_point = st.integers(0, 60)
an_event = st.sampled_from(_EVENTS)
mostly = st.sampled_from((True, True, False))
a_job = st.sampled_from(JOBS)


def recorded(function: Callable[..., None]) -> Callable[..., None]:
    """Keep what is called with what, so that it can be called again."""

    @wraps(function)
    def call(self: Lifecycle, **arguments: Any) -> None:
        self.calls.append((function.__name__, arguments))
        function(self, **arguments)
        self.all_is_well()

    return call


class Lifecycle(RuleBasedStateMachine):
    """Everything that can happen to a site."""

    #: given by who runs it
    engine: ClassVar[Engine]
    #: steps executed by all machines of this process
    steps: ClassVar[int] = 0
    #: the first machine that broke a promise
    broken: ClassVar[Lifecycle | None] = None
    #: what all machines have seen, see Model.seen
    seen: ClassVar[Counter[str]] = Counter()
    told: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    #: of its storages
    kinds: ClassVar[Sequence[str]] = ("posix",)

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.violation: Violation | None = None
        self._uuids = types.uuid_utils
        self._home = tempfile.TemporaryDirectory(prefix="dlm-sim-", dir=fast_folder())

    @initialize(layout=st.sampled_from(_LAYOUTS), salt=st.integers(0, 999))
    @recorded
    def begin(self, layout: tuple[str, ...], salt: int) -> None:
        self.world = World(Lifecycle.engine, Path(self._home.name) / "site", salt, self.kinds)
        self.model = self.world.model
        self._tell("begin", layout, salt)
        for location in layout:
            self.world.add_storage(location, "LIQUID")

    def teardown(self) -> None:
        types.uuid_utils = self._uuids
        if hasattr(self, "model"):
            Lifecycle.seen += self.model.seen
            self.world.eyes.close()
        self._home.cleanup()

    # --- telling ---------------------------------------------------------------------------------

    def _tell(self, *words: Any) -> None:
        self.story.append(" ".join(str(word) for word in words))
        Lifecycle.steps += 1
        self.model.step += 1
        self.model.now += timedelta(seconds=1)
        Lifecycle.told()

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Do something; a violation is kept."""
        try:
            return action()
        except Violation as violation:
            self.violation = self.violation or violation
            Lifecycle.broken = Lifecycle.broken or self
            raise

    # --- choosing --------------------------------------------------------------------------------

    def _storage(self, index: int) -> str:
        names = sorted(self.model.stores)
        return names[index % len(names)]

    def _item(self, index: int) -> Item:
        items = list(self.model.items.values())
        live = [item for item in items if item.state != "DELETED"] or items
        return live[index % len(live)]

    def _replica(self, index: int) -> Replica | None:
        found = [r for r in self.model.replicas.values() if r.state not in ("DELETED", "PENDING")]
        return found[index % len(found)] if found else None

    def _live(self) -> int:
        return sum(item.state != "DELETED" for item in self.model.items.values())

    def _has_items(self) -> bool:
        return bool(self.model.items)

    # --- users -----------------------------------------------------------------------------------

    @precondition(lambda self: self._live() < _ITEMS)
    @rule(where=an_index, phase=st.sampled_from(_TARGETS), at_once=mostly)
    @recorded
    def register(self, where: int, phase: str, at_once: bool) -> None:
        name = self._storage(where)
        if self.model.stores[name].mode != "read_write":
            return
        number = len(self.model.items)
        path = f"i{number}"
        self._tell("register", path, "on", name, phase, "and settle" if at_once else "")
        self.model.announced[f"test:{path}"] = (content(number), phase)
        self.world.put(name, path, content(number))
        self._guard(lambda: self._announce(name, path, phase))
        if at_once:
            self._guard(self.world.settle)

    def _announce(self, name: str, path: str, target: str) -> None:
        try:
            terms = Terms(target_phase=target)
            register_list(self.world.user, Source(name, "test", terms=terms), [path])
        except DlmError:
            pass  # the storage is down, say

    @precondition(_has_items)
    @rule(which=an_index, where=an_index)
    @recorded
    def register_a_copy(self, which: int, where: int) -> None:
        """A user brought a copy by hand and registers it."""
        item, name = self._item(which), self._storage(where)
        path = item.uri.removeprefix("test:")
        free = self.world.shelves[name].is_free(path)
        if not free or self.model.stores[name].mode != "read_write" or not self.model.keeps(item):
            return
        self._tell("register a copy of", item.uri, "on", name)
        self.world.put(name, path, item.content)
        self._guard(lambda: self._announce(name, path, item.target))
        self._guard(lambda: self.world.run(self.world.worker("registrar"), "registration"))
        if not any((r.storage, r.path) == (name, path) and r.state != "DELETED"
                   for r in self.model.replicas.values()):  # fmt: skip
            self.model.strangers[name, path] = item.content

    @precondition(_has_items)
    @rule(which=an_index, later=st.sampled_from((0, 0, 600, None)))
    @recorded
    def expire_item(self, which: int, later: int | None) -> None:
        item = self._item(which)
        self._tell("expire", item.uri, "never" if later is None else f"in {later} s")
        self._guard(lambda: self._expire(item, later))

    def _expire(self, item: Item, later: int | None) -> None:
        moment = None if later is None else self.model.now + timedelta(seconds=later)
        try:
            self.world.user.transact(lambda c: set_item_expiry(c, item.uri, moment, "not wanted"))
            item.expires_at = moment
        except DlmError:
            pass  # gone already

    @precondition(_has_items)
    @rule(which=an_index)
    @recorded
    def expire_copy(self, which: int) -> None:
        replica = self._replica(which)
        if replica is None:
            return
        item = self.model.items[replica.oid]
        self._tell("expire the copy of", item.uri, "on", replica.storage)
        self._ask(
            lambda c: set_replica_expiry(c, item.uri, replica.storage, self.model.now, "full")
        )

    def _ask(self, work: Callable[[Any], Any]) -> None:
        """A user's wish; a refusal is an answer too."""
        try:
            self._guard(lambda: self.world.user.transact(work))
        except DlmError:
            pass

    @precondition(_has_items)
    @rule(which=an_index, phase=st.sampled_from(_TARGETS))
    @recorded
    def retarget(self, which: int, phase: str) -> None:
        item = self._item(which)
        self._tell("target of", item.uri, "is", phase)
        item.target = phase
        try:
            self._guard(lambda: self.world.retarget(item))
        except DlmError:
            pass

    @precondition(_has_items)
    @rule(which=an_index, all_items=st.booleans(), later=st.sampled_from((None, 1800)))
    @recorded
    def hold(self, which: int, all_items: bool, later: int | None) -> None:
        prefix = "test:" if all_items else self._item(which).uri
        self._tell("hold", prefix, f"for {later} s" if later else "")
        self._guard(lambda: self._hold(prefix, later))

    def _hold(self, prefix: str, later: int | None = None) -> None:
        self.world.hold(prefix, self.model.now + timedelta(seconds=later) if later else None)

    @precondition(lambda self: any(h.ends_at is None for h in self.model.holds))
    @rule()
    @recorded
    def release_holds(self) -> None:
        self._tell("release all holds")
        self._guard(self.world.end_holds)

    @precondition(lambda self: any(r.state == "TRASHED" for r in self.model.replicas.values()))
    @rule(which=an_index, at_once=st.booleans())
    @recorded
    def restore(self, which: int, at_once: bool) -> None:
        trashed = [r for r in self.model.replicas.values() if r.state == "TRASHED"]
        replica = trashed[which % len(trashed)]
        self._tell("restore", self.model.items[replica.oid].uri, "and run" if at_once else "")
        self._guard(lambda: self._restore(replica))
        if at_once:
            self._guard(lambda: self.world.run(self.world.worker("restorer"), "expiry"))

    def _restore(self, replica: Replica) -> None:
        undisturbed = self._can_come_back(replica)
        try:
            self.world.user.transact(
                lambda c: request_restore(
                    c, oid=replica.oid, storage_id=None, actor="user:test", now=self.model.now
                )
            )
        except NotFoundError as error:
            if undisturbed:
                raise Violation("trash-restorable", f"restore refused: {error}") from error
        except DlmError:
            pass  # a newer copy has taken the place

    def _can_come_back(self, replica: Replica) -> bool:
        """Within its grace, and nothing is under way."""
        within = replica.trashed_at and self.model.now < replica.trashed_at + self.model.grace
        return bool(within) and not self.world.is_busy(replica.oid)

    @rule(which=an_index)
    @recorded
    def verify_all_on(self, which: int) -> None:
        name = self._storage(which)
        self._tell("ask for verification of", name)
        self._ask(
            lambda c: request_verification(
                c, actor="user:test", now=self.model.now, storage_id=self.world.id_of(name)
            )
        )

    # --- operators -------------------------------------------------------------------------------

    @rule(which=an_index, mode=st.sampled_from(("draining", "draining", "read_write", "read_only",
                                                "offline")))  # fmt: skip
    @recorded
    def set_mode(self, which: int, mode: str) -> None:
        name = self._storage(which)
        self._tell("set", name, mode)
        self._guard(lambda: self._mode(name, mode))

    def _mode(self, name: str, mode: str) -> None:
        try:
            self.world.set_storage(name, mode=mode)
        except DlmError:
            pass  # retired

    @rule(which=an_index)
    @recorded
    def lose(self, which: int) -> None:
        """A storage is declared lost, or comes back; its files are there all the time."""
        name = self._storage(which)
        back = self.model.stores[name].mode in ("lost", "offline")
        self._tell("take back" if back else "lose", name)
        self._guard(lambda: self._lose(name, back=back))

    def _lose(self, name: str, *, back: bool) -> None:
        try:
            self.world.take_back(name) if back else self.world.lose(name)
        except DlmError:
            pass  # retired, or down

    @precondition(lambda self: any(s.mode == "draining" for s in self.model.stores.values()))
    @rule(which=an_index)
    @recorded
    def retire(self, which: int) -> None:
        draining = [s.name for s in self.model.stores.values() if s.mode == "draining"]
        name = draining[which % len(draining)]
        self._tell("retire", name)
        self._guard(lambda: self._retire(name))

    def _retire(self, name: str) -> None:
        try:
            self.world.retire(name)
        except DlmError:
            pass  # not empty yet

    @precondition(lambda self: len(self.model.stores) < _STORAGES)
    @rule(location=st.sampled_from("ABC"), phase=st.sampled_from(_PHASES))
    @recorded
    def add_storage(self, location: str, phase: str) -> None:
        self._tell("add a storage at", location, phase)
        self._guard(lambda: self.world.add_storage(location, phase))

    @rule(which=an_index, factor=st.sampled_from((1.0, 1.5, None)))
    @recorded
    def fill_up(self, which: int, factor: float | None) -> None:
        """What lies there is more than the high watermark of a capacity, or there is room again."""
        name = self._storage(which)
        self._tell("capacity of", name, factor)
        capacity = None if factor is None else max(1, int(self.world.used(name) * factor))
        self._guard(lambda: self._capacity(name, capacity))

    def _capacity(self, name: str, capacity: int | None) -> None:
        try:
            self.world.set_storage(name, capacity_bytes=capacity)
        except DlmError:
            pass

    # --- the environment -------------------------------------------------------------------------

    @rule(which=an_index, how=st.sampled_from(("lose", "damage", "trash")))
    @recorded
    def harm(self, which: int, how: str) -> None:
        """Bytes rot or go, but never the last good ones."""
        place = self._victim(which, how == "trash", within_work=False)
        if place is None:
            return
        self._tell(how, *place)
        data = self.model.bytes_at(*place) or b""
        self.world.harm(*place, None if how == "lose" else bytes(255 - byte for byte in data))

    def _victim(self, which: int, trash: bool, *, within_work: bool) -> tuple[str, str] | None:
        found = [
            (store.name, path)
            for store in self.model.stores.values()
            for path in sorted(store.disk)
            if path.startswith(".dlm/trash/") == trash
            and not path.startswith((TEMPORARY, ".dlm/quarantine/"))
            and (store.name, path) not in self.model.strangers
            and self.model.may_harm(store.name, path, within_work=within_work)
        ]
        return found[which % len(found)] if found else None

    @rule(which=an_index, fault=st.sampled_from(FAULTS))
    @recorded
    def fault(self, which: int, fault: str) -> None:
        name = self._storage(which)
        self._tell(name, "is", fault)
        self.world.faults[name] = fault

    @precondition(lambda self: any(f != "honest" for f in self.world.faults.values()))
    @rule()
    @recorded
    def mend(self) -> None:
        self._tell("all storages are honest and up again")
        self.world.faults.clear()
        for name, store in self.model.stores.items():
            if store.mode in ("read_only", "offline"):
                self._guard(partial(self._mode, name, "read_write"))

    @precondition(lambda self: any(r.state == "TRASHED" for r in self.model.replicas.values()))
    @rule(which=an_index)
    @recorded
    def put_a_stranger(self, which: int) -> None:
        """Somebody puts a file where a copy was that lies in the trash now."""
        trashed = [r for r in self.model.replicas.values() if r.state == "TRASHED" and r.trashed_at]
        if not trashed:
            return
        replica = trashed[which % len(trashed)]
        if self.world.shelves[replica.storage].is_free(replica.path):
            self._tell("put a stranger at", replica.storage, replica.path)
            self.world.put(replica.storage, replica.path, b"stranger")
            self.model.strangers[replica.storage, replica.path] = b"stranger"

    @rule(seconds=st.sampled_from(_JUMPS))
    @recorded
    def advance(self, seconds: int) -> None:
        self._tell("advance", seconds)
        self.model.now += timedelta(seconds=seconds)

    # --- the DLM ---------------------------------------------------------------------------------

    @rule(job=a_job)
    @recorded
    def work(self, job: str) -> None:
        self._tell("run", job)
        self._guard(lambda: self.world.run(self.world.worker("A"), job))

    @rule(seconds=st.sampled_from(_JUMPS))
    @recorded
    def settle(self, seconds: int) -> None:
        self._tell("settle, then", seconds, "s, and settle")
        self._guard(self.world.settle)
        self.model.now += timedelta(seconds=seconds)
        self._guard(self.world.settle)

    @precondition(_has_items)
    @rule(
        which=an_index,
        what=st.sampled_from(("item", "copy", "surplus", "drain")),
        first=st.tuples(a_point, an_event),
        job=st.sampled_from(("expiry", "expiry", *JOBS)),
        second=st.tuples(a_point, an_event),
        back=st.booleans(),
        wait=st.sampled_from((3500, 3601)),
    )
    def let_go(
        self, which: int, what: str, first: Any, job: str, second: Any, back: bool, wait: int
    ) -> None:
        """The whole way out, and half of the times back: something is to go while its replacement
        is made, the grace passes, and a job is disturbed; each of these is a step."""
        if what == "item":
            self.expire_item(which=which, later=0)
        elif what == "drain":
            self.set_mode(which=which, mode="draining")
            self.work(job="rebalance")
        else:
            if what == "surplus":
                self.retarget(which=which, phase="LIQUID")
            self.expire_copy(which=which)
        self.work_disturbed(job="replication", point=first[0], event=first[1], which=which)
        self.work(job="expiry")
        if back and any(r.state == "TRASHED" for r in self.model.replicas.values()):
            self.restore(which=which, at_once=True)
        self.settle(seconds=wait)
        self.work_disturbed(job=job, point=second[0], event=second[1], which=which)

    @rule(job=a_job, point=a_point, event=an_event, which=an_index)
    @recorded
    def work_disturbed(self, job: str, point: int, event: str, which: int) -> None:
        """At one commit or storage call of a job, before or after it, something else happens."""
        self._tell("run", job, "and at point", point, event, which)
        worker = self.world.worker("A")
        if event == "crash":
            worker.process.arm(point, worker.process.crash)
        else:
            disturb = partial(self._disturb, worker, job, event, which)
            others = event in (*JOBS, "overtake", "outsleep")
            worker.process.arm(point, disturb, patient=others)
        try:
            self._guard(lambda: self.world.run(worker, job))
        except Crash:
            pass

    def _disturb(self, worker: Any, job: str, event: str, which: int) -> None:
        if event == "stop":
            worker.stop.set()
        elif event == "overtake":
            # the lease runs out, another worker does the work, and this one wakes up again
            self.model.now += timedelta(seconds=301)
            self.world.run(self.world.worker("B"), job)
        elif event == "outsleep":
            # as before, and the world goes on until it wakes up
            for seconds in (301, 3601):
                self.model.now += timedelta(seconds=seconds)
                self.world.settle()
        elif event in JOBS:
            self.world.run(self.world.worker("B"), event)
        elif event == "lose":
            place = self._victim(which, False, within_work=True)
            if place is not None:
                self.world.harm(*place, None)
        elif event == "drain":
            self._mode(self._storage(which), "draining")
        elif event == "retire":
            for name in [s.name for s in self.model.stores.values() if s.mode == "draining"]:
                self._retire(name)
        elif self.model.items:
            self._interfere(event, which)

    def _interfere(self, event: str, which: int) -> None:
        """A user does something to an item."""
        replica = self._replica(which)
        if event == "hold":
            self._hold(self._item(which).uri)
        elif event == "expire":
            self._expire(self._item(which), 0)
        elif event == "restore" and replica is not None and replica.state == "TRASHED":
            self._restore(replica)

    # --- after every step ------------------------------------------------------------------------

    def all_is_well(self) -> None:
        """The invariants that are not judged at the very moment when something happens."""
        self._guard(self._check)

    def _check(self) -> None:
        differing = self.world.check_disk()
        if differing is not None:
            raise Violation("disk-as-told", differing)
        for name, found in self.world.check_catalogue():
            raise Violation(name, found)
        for place, data in self.model.strangers.items():
            if self.model.bytes_at(*place) != data:
                raise Violation("strangers-untouched", f"{place} changed")
        self.model.check_retired_is_empty()
        self.model.check_nothing_lost()
        self.model.check_ready_is_there()
        self.model.check_trash_is_there()
