"""Copies to a WebDAV server through a drainer, against bare rclone; each server is a fresh one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, beside, context, result
from benchmarks.moving import make_files
from dlm_core.catalogue.engine import rows, run
from dlm_core.catalogue.places import add_location, add_storage
from dlm_core.catalogue.status import status
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import Context, drain
from dlm_core.types import OperationKind
from tests.servers import USER, DavServer, rclone_webdav_server, tool

_TRANSFERS = "16"


def _bare(server: DavServer, source: Path, target: str, check: bool) -> None:
    """``rclone copy --files-from``; with ``check`` it also reads back, as we do."""
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    listed = server.folder.parent / "list"
    listed.write_text("\n".join(names))
    obscured = subprocess.run(
        [tool("rclone"), "obscure", "-"],
        input=server.password,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    environment = {
        **os.environ, "RCLONE_CONFIG": os.devnull, "RCLONE_CONFIG_DAV_TYPE": "webdav",
        "RCLONE_CONFIG_DAV_URL": server.url, "RCLONE_CONFIG_DAV_VENDOR": "other",
        "RCLONE_CONFIG_DAV_USER": USER, "RCLONE_CONFIG_DAV_PASS": obscured,
        "RCLONE_CONFIG_DAV_PACER_MIN_SLEEP": "0s",
    }  # fmt: skip
    options = [
        "--files-from-raw",
        str(listed),
        "--transfers",
        _TRANSFERS,
        "--checkers",
        _TRANSFERS,
        "--no-traverse",
    ]
    for command in (["copy"], ["check", "--download", "--one-way"])[: 2 if check else 1]:
        subprocess.run(
            [tool("rclone"), *command, *options, str(source), f"DAV:{target}"],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip


def _sites(core: Context, folder: Path, interface: str, server: DavServer) -> None:
    config: dict[str, Any] = server.config
    root = server.make_collection()
    if interface == "rclone":
        config = {
            "type": "webdav", "url": root, "vendor": "other", "user": USER, "pacer_min_sleep": "0s",
            "secret_pass": config["password"],
        }  # fmt: skip
        root = "."

    def make(connection: Any) -> None:
        for name in ("here", "there"):
            add_location(connection, name, now=core.clock())
        add_storage(
            connection,
            "a",
            location="here",
            interface="posix",
            root=str(folder),
            phase="LIQUID",
            now=core.clock(),
        )
        add_storage(
            connection, "far", location="there", interface=interface, root=root, phase="LIQUID",
            config=config, now=core.clock(),
        )  # fmt: skip
        run(connection, "UPDATE storage SET mode = 'offline' WHERE name = 'far'")

    core.transact(make)


def one_move(
    home: Path, source: Path, server: DavServer, interface: str, label: str, check: bool
) -> Result:
    """One case: all files of ``source`` to ``server`` by ``interface``."""
    files = [path for path in source.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    value, unit = (len(files), "files/s") if label == "A" else (total / 1e6, "MB/s")
    with context(home) as core:
        _sites(core, source, interface, server)
        register_tree(core, Source("a", "bench"))
        drain(core, {OperationKind.ADMIT: execute_admit})
        core.transact(lambda c: run(c, "UPDATE storage SET mode = 'read_write' WHERE name = 'far'"))
        core.transact(
            lambda c: run(
                c,
                "INSERT INTO evaluation SELECT oid, now() FROM data_item "
                "ON CONFLICT (oid) DO UPDATE SET due_at = now()",
            )
        )
        plan_replication(core)
        mark = f"bare-{interface}-{label}-{check}"
        ours, bare = beside(
            lambda n: _bare(server, source, f"{mark}-{n}", check),
            lambda: drain(core, {OperationKind.COPY: execute_copy}),
        )
        found = core.transact(lambda c: status(c, core.clock()))["replicas"]
        if found.get("READY") != 2 * len(files):
            why = core.transact(
                lambda c: rows(
                    c,
                    "SELECT error_code, error FROM operation WHERE error_code IS NOT NULL LIMIT 3",
                )
            )
            raise SystemExit(f"not all copies were made: {found} {why}")
    name = "webdav" if interface == "webdav" else "rclone"
    beside_what = ", beside copy and check" if check else ""
    return result(f"move posix-{name} {label}{beside_what}", value / ours, unit, value / bare)


def run_all(home: Path, folder: Path, quick: bool) -> list[Result]:
    """As :func:`each`, all together."""
    return list(each(home, folder, quick))


def each(home: Path, folder: Path, quick: bool) -> Iterator[Result]:
    """A many small files, B few large ones; by our own adapter and by rclone's."""
    sets = (
        {"A": (500, 10_000), "B": (4, 20_000_000)}
        if quick
        else {"A": (5000, 10_000), "B": (20, 10**8)}
    )
    for label, (count, size) in sets.items():
        source = folder / f"dav-source-{label}"
        source.mkdir()
        make_files(source, count, size)
        for interface, check in (
            ("webdav", False),
            ("webdav", True),
            ("rclone", False),
            ("rclone", True),
        ):
            with rclone_webdav_server(folder / f"dav-{label}-{interface}-{check}") as server:
                yield one_move(home, source, server, interface, label, check)


if __name__ == "__main__":
    import sys

    from benchmarks.measure import scratch
    from benchmarks.measure import server as catalogue

    with catalogue() as home, scratch() as folder:
        for row in each(home, folder, "--quick" in sys.argv):
            line = "{case:55} {value:>12} {unit:10} limit {limit:>12}  ratio {ratio}"
            print(line.format(**row), flush=True)
