"""The same rules on storages of all kinds, and those that only bundles and tapes have."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from dlm_core.lifecycle.staging import request_staging
from dlm_core.storages.bundle_tar import tar_path
from tests.simulation.machine import Lifecycle, a_point, an_event, an_index, recorded
from tests.simulation.process import Crash
from tests.simulation.shelves import KINDS, Shelf

a_few = st.integers(0, 20)


class Mixed(Lifecycle):
    """A site with bundles and tapes among its storages."""

    kinds: ClassVar[Any] = KINDS

    def _shelves(self, *, cold: bool) -> list[Shelf]:
        shelves = self.world.shelves.values()
        return [one for one in shelves if (one.cold if cold else one.bundles)]

    # --- bundles ---------------------------------------------------------------------------------

    @precondition(lambda self: self._shelves(cold=False))
    @rule()
    @recorded
    def pack(self) -> None:
        self._tell("pack")
        self._guard(lambda: self.world.run(self.world.worker("A"), "packing"))
        members = sum(len(shelf.members()) for shelf in self._shelves(cold=False))
        self.model.seen["packing with members afterwards"] += members > 0

    @precondition(lambda self: self._shelves(cold=False))
    @rule(point=a_point, event=st.one_of(an_event, st.sampled_from(("crash", "packing"))),
          which=an_index)  # fmt: skip
    @recorded
    def pack_disturbed(self, point: int, event: str, which: int) -> None:
        """While bundles are made, something else happens."""
        self._tell("pack and at point", point, event, which)
        self._disturbed("packing", point, event, which)

    @rule(job=st.sampled_from(("replication", "expiry", "verification")), point=a_point)
    @recorded
    def packed_meanwhile(self, job: str, point: int) -> None:
        """While a job works, bundles are made."""
        self._tell("run", job, "and at point", point, "pack")
        self._disturbed(job, point, "packing", 0)

    def _disturbed(self, job: str, point: int, event: str, which: int) -> None:
        worker = self.world.worker("A")
        if event == "crash":
            worker.process.arm(point, worker.process.crash)
        else:
            worker.process.arm(
                point, partial(self._disturb, worker, job, event, which), patient=True
            )
        try:
            self._guard(lambda: self.world.run(worker, job))
        except Crash:
            self.model.seen[f"crash in {job} with bundles"] += 1

    def _disturb(self, worker: Any, job: str, event: str, which: int) -> None:
        if event == "packing":
            self.world.run(self.world.worker("P"), "packing")
        else:
            super()._disturb(worker, job, event, which)

    @precondition(lambda self: self._live() > 1)
    @rule(which=an_index, what=st.sampled_from(("copy", "purge", "restore")), point=a_few)
    def cut_off_amid(self, which: int, what: str, point: int) -> None:
        """Several things are to go or to come back, the worker that moves them is cut off, and
        while it sleeps they are wanted the other way round."""
        for number in (which, which + 1):
            if what == "copy":
                self.retarget(which=number, phase="LIQUID")
                self.expire_copy(which=number)
            else:
                self.expire_item(which=number, later=0)
        if what in ("purge", "restore"):
            self.work(job="expiry")
        if what == "purge":
            self.advance(seconds=3601)
        for number in (which, which + 1) if what == "restore" else ():
            if any(r.state == "TRASHED" for r in self.model.replicas.values()):
                self.restore(which=number, at_once=False)
        self.cut_off(job="expiry", point=point, then="go" if what == "restore" else "come")

    @rule(job=st.sampled_from(("expiry", "verification", "replication")), point=a_few,
          then=st.sampled_from(("sleep", "come", "go")))  # fmt: skip
    @recorded
    def cut_off(self, job: str, point: int, then: str) -> None:
        """After something was moved the worker's connection is cut, and it sleeps past its lease
        while others do its work, and all items are wanted more, or no more."""
        self._tell("run", job, "and cut it off after point", point, "then", then)
        worker = self.world.worker("A")

        def sleep() -> None:
            worker.process.cut = self.world.cut() > 0
            self.model.seen["cut off while it held locks"] += worker.process.cut
            self._disturb(worker, job, "overtake", 0)
            for item in [i for i in self.model.items.values() if self.model.keeps(i)]:
                if then == "go":
                    self._expire(item, 0)
                elif then == "come":
                    item.target = "SOLID"
                    self.world.retarget(item)
            self.world.settle()

        worker.process.arm(point, sleep, after=True)
        self._guard(lambda: self.world.run(worker, job))

    @precondition(lambda self: any(shelf.members() for shelf in self._shelves(cold=False)))
    @rule(which=an_index)
    @recorded
    def lose_a_bundle(self, which: int) -> None:
        """A tar goes with all its members, unless one of them is the last good copy."""
        found = [
            (shelf, bundle, places)
            for shelf in self._shelves(cold=False)
            for bundle, places in sorted(_by_bundle(shelf).items())
            if self.model.may_harm_all(shelf.name, places)
        ]
        if not found:
            return
        shelf, bundle, places = found[which % len(found)]
        self._tell("lose a bundle of", shelf.name, "with", *places)
        shelf.drop(bundle)
        for path in places:
            self.model.harm(shelf.name, path, None)
        self.model.seen["a bundle lost"] += 1

    # --- tapes -----------------------------------------------------------------------------------

    @precondition(lambda self: self._shelves(cold=True))
    @rule(which=an_index)
    @recorded
    def migrate(self, which: int) -> None:
        tapes = self._shelves(cold=True)
        shelf = tapes[which % len(tapes)]
        self._tell("migrate", shelf.name)
        self.world.migrate(shelf)

    @precondition(lambda self: any(shelf.wanted for shelf in self._shelves(cold=True)))
    @rule()
    @recorded
    def deliver(self) -> None:
        self._tell("deliver what was asked for")
        for shelf in self._shelves(cold=True):
            shelf.deliver()

    @precondition(lambda self: self._shelves(cold=True) and self._has_items())
    @rule(which=an_index)
    @recorded
    def stage(self, which: int) -> None:
        item = self._item(which)
        self._tell("ask for", item.uri)
        self._ask(
            lambda c: request_staging(c, oids=[item.oid], actor="user:test", now=self.model.now)
        )


def _by_bundle(shelf: Shelf) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, member in shelf.members().items():
        if (shelf.root / tar_path(member.bundle)).exists():
            found.setdefault(member.bundle, []).append(path)
    return found
