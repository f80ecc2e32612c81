"""The stages of the demo: ask for something, then watch what the sensors make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dlm_cli.demo_files import Files
from dlm_cli.session import human_size
from dlm_core.catalogue import audit as audits
from dlm_core.catalogue.browse import list_items, set_item_expiry
from dlm_core.catalogue.items import Terms
from dlm_core.catalogue.places import (
    add_location,
    add_storage,
    get_storage,
    retire_storage,
    set_storage,
)
from dlm_core.catalogue.status import status
from dlm_core.errors import ServiceUnavailableError
from dlm_core.lifecycle.register import Source, register_list
from dlm_core.lifecycle.verify import request_verification
from dlm_core.types import decode_path
from dlm_pipelines.launch import count_runs

if TYPE_CHECKING:
    from dlm_cli.demo import Demo

Tell = Callable[[str], None]
_STAGE_SECONDS = 150
_POLL_SECONDS = 0.5
_EXPIRING = 100


class Interrupted(Exception):
    """Somebody has pressed Ctrl-C."""


def _wait(demo: Demo, tell: Tell, done: Callable[[dict[str, Any]], str | None]) -> dict[str, Any]:
    """Poll the catalogue until ``done(status)`` returns None; what it returns is shown."""
    deadline = time.monotonic() + _STAGE_SECONDS
    while True:
        found: dict[str, Any] = demo.context.transact(lambda c: status(c, demo.context.clock()))
        text = done(found)
        if text is None:
            return found
        tell(text)
        failure = demo.failed()
        if failure is not None:
            raise failure
        if demo.context.stop.is_set():
            raise Interrupted
        if time.monotonic() > deadline:
            raise ServiceUnavailableError(service="the demo", reason=f"this took too long: {text}")
        time.sleep(_POLL_SECONDS)


def make_places(demo: Demo, files: Files) -> None:
    """Three locations; the input read where it lies; two disks and a bucket that are managed."""
    s3 = {"endpoint": demo.s3.endpoint}
    for name in ("access_key", "secret_key"):
        # in a file, so that commands in another terminal find it too
        (demo.home / name).touch(mode=0o600)
        (demo.home / name).write_text(getattr(demo.s3, name))
        s3[name] = f"file:{demo.home / name}"
    disks = {name: demo.home / name for name in ("disk-a", "disk-b")}
    for folder in disks.values():
        folder.mkdir()

    def make(connection: Any) -> None:
        now = demo.context.clock()
        for name in ("observatory", "hpc-centre", "cloud"):
            add_location(connection, name, now=now)
        for name, location, interface, root, phase, more in (
            ("incoming", "observatory", "posix", str(files.root), "PLASMA",
             {"managed": False, "mode": "read_only"}),
            ("disk-a", "observatory", "posix", str(disks["disk-a"]), "LIQUID", {}),
            ("disk-b", "hpc-centre", "posix", str(disks["disk-b"]), "LIQUID", {}),
            ("bucket", "cloud", "s3", "dlm-bucket/demo", "LIQUID",
             {"config": s3, "storage_class": "object"}),
        ):  # fmt: skip
            add_storage(
                connection, name, location=location, interface=interface, root=root, phase=phase,
                now=now, **more,
            )  # fmt: skip

    demo.context.transact(make)


def register(files: Files) -> Callable[[Demo, Tell], None]:
    """Announce the files; the registration sensor has them read and admitted."""

    def work(demo: Demo, tell: Tell) -> None:
        source = Source("incoming", "demo", terms=Terms("SOLID"))
        report = register_list(demo.context, source, files.paths)
        tell(f"{report.created} announced")
        _wait(demo, tell, lambda s: _admitted(s, report.created))
        stored = demo.context.transact(audits.digests_by_path)
        agree = sum(stored.get(path) == digest for path, digest in files.digests.items())
        demo.report["record_digests"] = {"checked": len(files.digests), "agree": agree}

    return work


def _admitted(found: dict[str, Any], wanted: int) -> str | None:
    ready = found["items"].get("READY", 0)
    failed = found["operations"].get("admit", {}).get("FAILED", 0)
    return None if ready + failed >= wanted else f"{ready} of {wanted} admitted"


def replicate(demo: Demo, tell: Tell) -> None:
    """Nothing to ask for: READY items below their target phase are due."""
    _wait(demo, tell, _settled)


def _settled(found: dict[str, Any]) -> str | None:
    """None once every item has what it needs and nothing is being looked at."""
    below, waiting = found["items_below_target_phase"], found["items_to_evaluate"]
    copies = found["operations"].get("copy", {})
    if not (below or waiting or copies.get("QUEUED") or copies.get("RUNNING")):
        return None
    size = human_size(found["bytes"]["replicas"])
    return f"{copies.get('DONE', 0)} copies made, {below} items below target, {size} verified"


def damage(demo: Demo, tell: Tell) -> None:
    """Flip a byte on disk-a behind the DLM's back, and have that disk's copies read again."""
    found = demo.context.transact(lambda c: audits.replicas_on(c, "disk-a", 1))
    victim = next(row for row in found if row["size"] > 0)
    file = demo.home / "disk-a" / decode_path(victim["path"])
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    storage = demo.context.transact(lambda c: get_storage(c, "disk-a"))
    demo.context.transact(
        lambda c: request_verification(
            c, actor="user:demo", now=demo.context.clock(), storage_id=storage["storage_id"]
        )
    )

    def repaired(found: dict[str, Any]) -> str | None:
        states = demo.context.transact(lambda c: audits.replica_history(c, victim["uid"]))
        noticed = "CORRUPTED" in states
        if noticed and states[-1] == "READY" and _settled(found) is None:
            return None
        return f"{victim['uri']}: " + " → ".join(states)

    _wait(demo, tell, repaired)
    if file.read_bytes() != good:
        raise ServiceUnavailableError(service="the demo", reason=f"{file} was not repaired")


def expire(demo: Demo, tell: Tell) -> None:
    """A hundred items (a tenth, if there are few, and never the only one) are no longer wanted."""
    total = demo.report["record_digests"]["checked"] or _items(demo)
    count = min(max(1, min(_EXPIRING, total // 10)), total - 1)
    if not count:
        return
    uris = [
        row["uri"]
        for row in demo.context.transact(lambda c: list_items(c, state="READY", limit=count))
    ]

    def ask(connection: Any) -> None:
        for uri in uris:
            set_item_expiry(connection, uri, demo.context.clock(), "no longer wanted (demo)")

    demo.context.transact(ask)

    def gone(found: dict[str, Any]) -> str | None:
        deleted = found["items"].get("DELETED", 0)
        return None if deleted >= len(uris) else f"{deleted} of {len(uris)} items deleted"

    _wait(demo, tell, gone)


def _items(demo: Demo) -> int:
    return sum(demo.context.transact(lambda c: status(c, demo.context.clock()))["items"].values())


def watermark(demo: Demo, tell: Tell) -> None:
    """disk-a turns out to be small: 95 % full, above its high watermark of 90 %."""
    used = _used(demo, "disk-a")
    demo.context.transact(
        lambda c: set_storage(
            c, "disk-a", {"capacity_bytes": max(int(used / 0.95), 1),
                          "high_watermark": 0.9, "low_watermark": 0.8},
        )
    )  # fmt: skip

    def below(found: dict[str, Any]) -> str | None:
        lowest = demo.context.transact(audits.items_truly_below_target)
        if lowest:
            raise ServiceUnavailableError(
                service="the demo", reason=f"{lowest} items fell below their target phase"
            )
        fill = next(s["fill_fraction"] for s in found["storages"] if s["name"] == "disk-a")
        if fill <= 0.8 and _settled(found) is None:
            return None
        return f"disk-a is {fill:.1%} full"

    _wait(demo, tell, below)


def _used(demo: Demo, name: str) -> int:
    used: int = demo.context.transact(lambda c: get_storage(c, name))["replica_bytes"]
    return used


def drain(demo: Demo, tell: Tell) -> None:
    """Everything leaves disk-b for the others, which have room again; then it retires."""
    room = _used(demo, "disk-a") + _used(demo, "disk-b") + (1 << 30)
    demo.context.transact(lambda c: set_storage(c, "disk-a", {"capacity_bytes": room * 2}))
    demo.context.transact(lambda c: set_storage(c, "disk-b", {"mode": "draining"}))

    def empty(found: dict[str, Any]) -> str | None:
        left = next(s["replicas"] for s in found["storages"] if s["name"] == "disk-b")
        if not left and _settled(found) is None:
            return None
        return f"{left} copies left on disk-b; {_settled(found) or ''}"

    _wait(demo, tell, empty)
    demo.context.transact(lambda c: retire_storage(c, "disk-b", demo.context.clock()))


def audit(files: Files) -> Callable[[Demo, Tell], None]:
    """Believe nothing: ask each storage for every READY copy, and count from the tables."""

    def work(demo: Demo, tell: Tell) -> None:
        context = demo.context
        storages = context.transact(context.storages.load)
        missing: set[Any] = set()
        for storage_id, row in storages.items():
            found = context.transact(partial(audits.ready_on, storage_id=storage_id))
            paths = {decode_path(one["path"]): one for one in found}
            entries = context.storages.open(row).stat_many(list(paths)) if paths else {}
            for path, one in paths.items():
                entry = entries[path]
                if entry is None or entry.size != one["size"]:
                    missing.add(one["uid"])
            tell(f"{row['name']}: {len(paths)} copies looked at")
        now = context.clock()
        found = context.transact(lambda c: status(c, now))
        demo.report |= {
            "items": sum(found["items"].values()),
            "replicas": found["replicas"].get("READY", 0),
            "bytes": found["bytes"]["replicas"],
            "runs": count_runs(demo.ui_url),
            "items_below_target_phase": context.transact(audits.items_truly_below_target),
            "items_lost": context.transact(lambda c: audits.items_lost(c, list(missing))),
            "certificates": context.transact(audits.count_certificates),
        }
        changed = [path for path in files.paths if not (files.root / path).is_file()]
        if changed:
            raise ServiceUnavailableError(
                service="the demo", reason=f"{len(changed)} files of the input are gone"
            )

    return work
