"""What is interrupted: each scenario prepares a site and names the commands a user then gives.

A command that got no answer is given again; so each may be repeated, and what the sensors do by
themselves is no part of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dlm_core.catalogue.items import Terms
from dlm_core.errors import AlreadyExistsError, IllegalTransitionError, NotFoundError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.export import export_storage
from dlm_core.lifecycle.lost import lose_storage, plan_audits, take_back
from dlm_core.lifecycle.pack import pack_storage
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from tests.fakes import FAR
from tests.site import Site, misread

Step = Callable[[Site], object]


def nothing(site: Site) -> None:
    """No command: the work is due already."""


@dataclass(frozen=True)
class Scenario:
    """``prepare`` runs once; ``command`` and what follows from it is interrupted at every point."""

    name: str
    prepare: Step
    command: Step = nothing
    #: how often the sensors look, an hour apart
    rounds: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    #: what storage b is: '' a folder, 's3', whose renames are no single step, 'sftp', 'bundled',
    #: 'bundled dav', where what is to be exclusive is a folder
    far: str = ""

    def act(self, site: Site) -> None:
        """The command and what the sensors make of it."""
        self.command(site)
        for _ in range(self.rounds):
            drain(site.context, {OperationKind.ADMIT: execute_admit})
            site.settle()
            site.advance(hours=1)


def three_storages(site: Site) -> None:
    """Three locations, a storage each; or what is there already."""
    for name in ("a", "b", "c") if not site.storages else ():
        site.add_storage(name, name.upper())


def _write(site: Site, storage: str, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        file = site.folder / storage / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def _one(site: Site, **columns: Any) -> uuid.UUID:
    three_storages(site)
    return site.add_item("x/1.dat", b"payload", "a", **columns)


def _tree(site: Site, target: str = "SOLID") -> None:
    three_storages(site)
    _write(site, "a", {"t.ms/one": b"1" * 10, "t.ms/sub/two": b"2" * 20})
    source = Source("a", "test", as_directory=["*.ms"], terms=Terms(target_phase=target))
    register_tree(site.context, source)
    drain(site.context, {OperationKind.ADMIT: execute_admit})


def _several(site: Site) -> None:
    three_storages(site)
    for n in range(4):
        site.add_item(f"s/{n}", bytes([n]) * (n + 1), "a")


def _settled(make: Step) -> Step:
    def prepare(site: Site) -> None:
        make(site)
        site.settle()
        site.advance(minutes=1)

    return prepare


def _expire(site: Site) -> None:
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = 'done' WHERE expires_at IS NULL",
        now=site.now,
    )


def _expired(make: Step) -> Step:
    def prepare(site: Site) -> None:
        _settled(make)(site)
        _expire(site)

    return prepare


def _trashed(make: Step) -> Step:
    def prepare(site: Site) -> None:
        _expired(make)(site)
        site.settle()

    return prepare


def _purgeable(make: Step) -> Step:
    def prepare(site: Site) -> None:
        _trashed(make)(site)
        site.advance(hours=2)

    return prepare


def _leaving(site: Site) -> None:
    """A surplus copy whose survivors have to be looked at before it is purged."""
    _settled(_one)(site)
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.execute(
        "UPDATE replica SET expires_at = :now WHERE storage_id = :s",
        now=site.now, s=site.storages["a"],
    )  # fmt: skip


def _restore(site: Site) -> None:
    for row in site.query("SELECT oid FROM data_item"):
        _restore_one(site, row["oid"])


def _restore_one(site: Site, oid: uuid.UUID) -> None:
    try:
        site.context.transact(
            lambda c: request_restore(c, oid=oid, storage_id=None, actor="user:test", now=site.now)
        )
    except (NotFoundError, AlreadyExistsError):
        pass  # told so when it is asked for twice


def _inbox(site: Site) -> None:
    for name in ("a", "b"):
        site.add_storage(name, name.upper())
    _write(site, "a", {"in/1": b"one", "in/2": b"two", "t.ms/x": b"3", "t.ms/y/z": b"4"})


def _register(site: Site) -> None:
    register_tree(site.context, Source("a", "test", as_directory=["*.ms"]))


def _drain_storage(site: Site) -> None:
    site.set_storage("a", mode="draining")


def _full(site: Site) -> None:
    _settled(_several)(site)
    for name in ("b", "c"):
        site.set_storage(name, capacity_bytes=100_000)


def _lower_watermark(site: Site) -> None:
    site.set_storage("a", capacity_bytes=11, high_watermark=0.8, low_watermark=0.4)


def _target(phase: str) -> Step:
    def command(site: Site) -> None:
        site.execute("UPDATE data_item SET target_phase = :phase", phase=phase)
        _surplus_leaves(site, phase)

    return command


def _surplus_leaves(site: Site, phase: str) -> None:
    """A lower target frees nothing by itself: the operator says which copy is not wanted."""
    if phase == "LIQUID":
        site.execute(
            "UPDATE replica SET expires_at = :now, expiry_reason = 'policy' "
            "WHERE storage_id = :s AND expires_at IS NULL AND state = 'READY'",
            now=site.now, s=site.storages["a"],
        )  # fmt: skip


def _hold(site: Site) -> None:
    site.execute(
        "INSERT INTO hold (hold_id, uri_prefix, reason, actor, created_at) "
        "SELECT gen_random_uuid(), 'test:', 'audit', 'user:a', :now "
        "WHERE NOT EXISTS (SELECT FROM hold)",
        now=site.now,
    )


def _held(site: Site) -> None:
    _expired(_one)(site)
    _hold(site)
    site.settle()


def _release(site: Site) -> None:
    site.execute("UPDATE hold SET ends_at = :now WHERE ends_at IS NULL", now=site.now)


def _damage(site: Site) -> None:
    _settled(_one)(site)
    (site.folder / "a" / "x" / "1.dat").write_bytes(b"DAMAGED")


def _verify(site: Site) -> None:
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))


def _lose(site: Site) -> None:
    lose_storage(site.context, "b", "burnt")


def _lost(site: Site) -> None:
    """A storage that was lost, one of its files damaged, one gone."""
    three_storages(site)
    site.set_storage("c", mode="read_only")
    _settled(_several)(site)
    site.set_storage("c", mode="read_write")
    _lose(site)
    site.settle()
    (site.folder / "b" / "test" / "s" / "1").write_bytes(b"??")
    (site.folder / "b" / "test" / "s" / "2").unlink()


def _take_back(site: Site) -> None:
    try:
        take_back(site.context, "b")
    except IllegalTransitionError:
        pass  # told so when it is asked for twice
    site.work(plan=lambda context: plan_audits(context) + plan_replication(context))


def _set_aside(site: Site) -> None:
    """The only copy, read wrongly until it was put into quarantine."""
    three_storages(site)
    oid = site.add_item("x", b"good bytes", "a", target_phase="LIQUID")
    left = misread(site, 3)
    _verify(site)
    site.work(OperationKind.VERIFY)
    assert not left and site.replicas(oid) == {"a": "CORRUPTED"}


def _described(make: Step) -> Step:
    """Storages that carry descriptions which do not tell all any more."""

    def prepare(site: Site) -> None:
        _settled(make)(site)
        _export(site)
        site.execute("UPDATE data_item SET tags = '{\"new\": 1}'")

    return prepare


def _export(site: Site) -> None:
    for row in site.query("SELECT name FROM storage ORDER BY name"):
        export_storage(site.context, row["name"])


def _pack(site: Site) -> None:
    """At a time when everything has waited long enough."""
    pack_storage(replace(site.context, clock=lambda: FAR), "b")


def _packed(then: Step = nothing) -> Step:
    def prepare(site: Site) -> None:
        _settled(_several)(site)
        _pack(site)
        then(site)

    return prepare


def _mostly_gone(site: Site) -> None:
    """Of a bundle, all but the first member."""
    site.execute(
        "UPDATE data_item SET expires_at = :now, expiry_reason = 'done' WHERE size > 1",
        now=site.now,
    )
    site.settle()
    site.advance(hours=2)
    site.settle()


def _trash(site: Site) -> None:
    _expire(site)
    site.settle()


def _past_grace(site: Site) -> None:
    _trash(site)
    site.advance(hours=2)


_KEEP = {"trash_grace_seconds": 90 * 86400}

SCENARIOS = [
    Scenario("copy a file", _one),
    Scenario("copy a directory", _tree),
    Scenario("copy several", _several),
    Scenario("trash", _expired(_one), settings=_KEEP),
    Scenario("trash a directory", _expired(_tree), settings=_KEEP),
    Scenario("trash a surplus copy", _leaving, settings=_KEEP),
    Scenario("purge", _purgeable(_one)),
    Scenario("purge a directory", _purgeable(_tree)),
    Scenario("purge a surplus copy", _leaving, rounds=2),
    Scenario("restore", _trashed(_one), _restore, settings=_KEEP),
    Scenario("restore a directory", _trashed(_tree), _restore, settings=_KEEP),
    Scenario("register", _inbox, _register),
    Scenario("drain", _settled(_several), _drain_storage, rounds=3),
    Scenario("rebalance", _full, _lower_watermark, rounds=3),
    Scenario("raise the target", lambda s: _one(s, target_phase="LIQUID"), _target("SOLID")),
    Scenario("lower the target", _settled(_one), _target("LIQUID"), rounds=2),
    Scenario("place a hold", _expired(_one), _hold, rounds=2),
    Scenario("release a hold", _held, _release, rounds=3),
    Scenario("verify damage", _damage, _verify),
    Scenario("copy to objects", _several, far="s3"),
    Scenario("copy a tree to objects", _tree, far="s3"),
    Scenario("trash an object", _expired(_one), settings=_KEEP, far="s3"),
    Scenario("trash a tree of objects", _expired(_tree), settings=_KEEP, far="s3"),
    Scenario("restore an object", _trashed(_one), _restore, settings=_KEEP, far="s3"),
    Scenario("restore objects", _trashed(_tree), _restore, settings=_KEEP, far="s3"),
    Scenario("purge objects", _purgeable(_tree), far="s3"),
    Scenario("copy over sftp", _several, far="sftp"),
    Scenario("copy a tree over sftp", _tree, far="sftp"),
    Scenario("trash over sftp", _expired(_one), settings=_KEEP, far="sftp"),
    Scenario("trash a tree over sftp", _expired(_tree), settings=_KEEP, far="sftp"),
    Scenario("restore over sftp", _trashed(_one), _restore, settings=_KEEP, far="sftp"),
    Scenario("restore a tree over sftp", _trashed(_tree), _restore, settings=_KEEP, far="sftp"),
    Scenario("purge a tree over sftp", _purgeable(_tree), far="sftp"),
    Scenario("pack", _settled(_several), _pack, far="bundled"),
    Scenario("pack anew", _packed(_mostly_gone), _pack, far="bundled"),
    Scenario("trash members", _packed(_expire), settings=_KEEP, far="bundled"),
    Scenario("restore members", _packed(_trash), _restore, settings=_KEEP, far="bundled"),
    Scenario("purge members", _packed(_past_grace), far="bundled"),
    Scenario("declare a storage lost", _settled(_several), _lose, rounds=2),
    Scenario("take a storage back", _lost, _take_back, rounds=2),
    Scenario("bring back from quarantine", _set_aside),
    Scenario("describe", _described(_one), _export),
    Scenario("describe objects", _described(_tree), _export, far="s3"),
    Scenario("pack over webdav", _settled(_several), _pack, far="bundled dav"),
    Scenario("pack anew over webdav", _packed(_mostly_gone), _pack, far="bundled dav"),
    Scenario("trash members over webdav", _packed(_expire), settings=_KEEP, far="bundled dav"),
    Scenario("purge members over webdav", _packed(_past_grace), far="bundled dav"),
]
