"""Copies to an XRootD server through a drainer, against its own client; each has a fresh server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

from XRootD import client

from benchmarks.measure import Result, main, make_files
from benchmarks.moving_far import Far, one_move, sets
from tests.xrootd import XrootdServer, xrootd_server

_BLOCK = 4 << 20
_THREADS = 16


def _bare(server: XrootdServer, source: Path, check: bool, n: int) -> None:
    """The client's own parallel copy, as \'xrdcp --parallel\' does it: no sync, no rename; with
    ``check`` it is read back whole and compared."""
    login = f"?xrd.sss={server.folder.parent}/keytab"
    files = [path for path in source.rglob("*") if path.is_file()]
    large = any(path.stat().st_size > _BLOCK for path in files)
    urls = {path: f"{server.root(f'bare-{n}')}/{path.relative_to(source)}{login}" for path in files}
    copy = client.CopyProcess()
    copy.parallel(4 if large else _THREADS)
    for path, url in urls.items():
        copy.add_job(str(path), url, mkdir=True)
    copy.prepare()
    status, _ = copy.run()
    if not status.ok:
        raise OSError(status.message)
    if check:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(_compare, urls, urls.values()))


def _compare(path: Path, url: str) -> None:
    digests = []
    for place in (str(path), url):
        file, hasher, offset = client.File(), sha256(), 0
        status, _ = file.open(place)
        while status.ok:
            status, data = file.read(offset, _BLOCK)
            if not data:
                break
            hasher.update(data)
            offset += len(data)
        file.close()
        digests.append(hasher.digest() if status.ok else None)
    if digests[0] != digests[1]:
        raise OSError(f"{path} differs")


def each(home: Path, folder: Path, quick: bool) -> Iterator[Result]:
    """Beside the copy alone, and beside a copy that is read back as ours is."""
    for label, (count, size) in sets(quick).items():
        source = folder / f"xrootd-source-{label}"
        source.mkdir()
        make_files(source, count, size)
        for check in (False, True):
            with xrootd_server(folder / f"xrootd-{label}-{check}") as server:
                yield one_move(
                    home, source, [Far("xrootd", server.make_root(), server.config)], label,
                    partial(_bare, server, source, check),
                    f", beside its client{' and read-back' if check else ''}",
                )  # fmt: skip


if __name__ == "__main__":
    main(each)
