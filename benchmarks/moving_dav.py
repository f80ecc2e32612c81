"""Copies to a WebDAV server through a drainer, against bare rclone; each server is a fresh one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import Result, main, make_files
from benchmarks.moving_far import Far, one_move, sets
from tests.backends import dav_by_rclone
from tests.servers import USER, DavServer, rclone_webdav_server, tool

_TRANSFERS = "16"


def _bare(server: DavServer, source: Path, mark: str, check: bool, n: int) -> None:
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
            [tool("rclone"), *command, *options, str(source), f"DAV:{mark}-{n}"],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip


def _far(server: DavServer, interface: str) -> Far:
    """An empty collection on the server, by our own adapter or by rclone's backend."""
    if interface == "rclone":
        return Far("rclone", ".", dav_by_rclone(server))
    return Far("webdav", server.make_collection(), server.config)


def each(home: Path, folder: Path, quick: bool) -> Iterator[Result]:
    """A many small files, B few large ones; by our own adapter and by rclone's."""
    for label, (count, size) in sets(quick).items():
        source = folder / f"dav-source-{label}"
        source.mkdir()
        make_files(source, count, size)
        for interface, check in (
            ("webdav", False),
            ("webdav", True),
            ("rclone", False),
            ("rclone", True),
        ):
            mark = f"{interface}-{label}-{check}"
            with rclone_webdav_server(folder / f"dav-{mark}") as server:
                yield one_move(
                    home, source, [_far(server, interface)], label,
                    partial(_bare, server, source, f"bare-{mark}", check),
                    ", beside copy and check" if check else "",
                )  # fmt: skip


if __name__ == "__main__":
    main(each)
