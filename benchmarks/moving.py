"""Bytes: registration from disk, and copies through a drainer, against the bare tools."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import obstore
from obstore.store import S3Store

from benchmarks.catalogue import places
from benchmarks.measure import Result, beside, context, main, make_files, result
from benchmarks.moving_far import Far, one_move, sets
from dlm_cli.s3_server import S3Server, s3_server
from dlm_core.catalogue.status import status
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.work import Context, drain
from dlm_core.types import OperationKind
from tests.servers import tool
from tests.sshd import SshServer, ssh_server

_BLOCK = 1 << 20
_THREADS = 4
# a drainer with nothing to do looks for work this often
_LOOK_SECONDS = 0.02


def _hash(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _all_files(folder: Path) -> list[Path]:
    return [Path(top) / name for top, _, names in os.walk(folder) for name in names]


def _bare_hash(folder: Path) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_hash, _all_files(folder)))


def _bare_copy(source: Path, destination: Path) -> None:
    def one(path: Path) -> None:
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as stream, target.open("xb", buffering=0) as out:
            while block := stream.read(_BLOCK):
                hasher.update(block)
                out.write(block)
        if _hash(target) != hasher.hexdigest():
            raise OSError(f"{target} differs")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(one, _all_files(source)))


def _bare_put(source: Path, server: S3Server, prefix: str) -> None:
    store = S3Store(
        server.bucket, prefix=prefix, endpoint=server.endpoint, region="us-east-1",
        access_key_id=server.access_key, secret_access_key=server.secret_key,
        client_options={"allow_http": True, "timeout": "300s"}, retry_config={"retry_timeout": timedelta(seconds=30)},
    )  # fmt: skip
    files = {str(path.relative_to(source)): path for path in _all_files(source)}
    large = any(path.stat().st_size > (8 << 20) for path in files.values())
    # 32 uploads of 100 MB at once time out on a server on the same two cores
    with ThreadPoolExecutor(4 if large else 32) as pool:
        list(pool.map(lambda key: obstore.put(store, key, files[key]), files))
    listed = sum(len(batch) for batch in obstore.list(store))
    if listed != len(files):
        raise OSError("the listing is short")


def _rclone_put(source: Path, server: S3Server, prefix: str) -> None:
    """rclone's CLI, with as many transfers as the bare obstore."""
    environment = {
        **os.environ, "RCLONE_CONFIG": os.devnull, "RCLONE_CONFIG_S_TYPE": "s3",
        "RCLONE_CONFIG_S_PROVIDER": "SeaweedFS", "RCLONE_CONFIG_S_ENDPOINT": server.endpoint,
        "RCLONE_CONFIG_S_REGION": "us-east-1", "RCLONE_CONFIG_S_NO_CHECK_BUCKET": "true",
        "RCLONE_CONFIG_S_ACCESS_KEY_ID": server.access_key,
        "RCLONE_CONFIG_S_SECRET_ACCESS_KEY": server.secret_key,
    }  # fmt: skip
    names = [str(path.relative_to(source)) for path in _all_files(source)]
    large = any((source / name).stat().st_size > _BLOCK for name in names)
    at_once = "4" if large else "32"
    subprocess.run(
        [tool("rclone"), "copy", "--files-from-raw", "-", "--transfers", at_once,
         "--checkers", at_once, "--no-traverse", str(source), f"S:{server.bucket}/{prefix}"],
        input="\n".join(names), text=True, env=environment, check=True, capture_output=True,
    )  # fmt: skip


def _bare_sftp(source: Path, server: SshServer, destination: Path) -> None:
    """asyncssh as it is, and one command on the far side that tells all digests."""
    asyncio.run(_put_all(source, server, destination))


async def _put_all(source: Path, server: SshServer, destination: Path) -> None:
    files = {destination / path.relative_to(source): path for path in _all_files(source)}
    large = any(path.stat().st_size > (1 << 20) for path in files.values())
    free = asyncio.Semaphore(4 if large else 32)

    async def put(sftp: asyncssh.SFTPClient, target: Path, path: Path) -> None:
        async with free:
            await sftp.put(str(path), str(target))

    async with (
        asyncssh.connect(
            "127.0.0.1", server.port, username=server.user, client_keys=[str(server.folder / "user")],
            known_hosts=asyncssh.import_known_hosts(server.host_keys), config=None,
        ) as connection,
        connection.start_sftp_client() as sftp,
    ):  # fmt: skip
        for folder in sorted({target.parent for target in files}):
            await sftp.makedirs(str(folder), exist_ok=True)
        await asyncio.gather(*(put(sftp, *pair) for pair in files.items()))
        names = "".join(f"{target}\0" for target in files)
        told = await connection.run("xargs -0 sha256sum", input=names, check=True)
    there = dict(reversed(line.split("  ", 1)) for line in told.stdout.splitlines())
    if any(there[str(target)] != _hash(path) for target, path in files.items()):
        raise OSError("a copy differs")


def registration(home: Path, folder: Path, label: str, rounds: int) -> Result:
    """Announce, and admit beside it as the daemon's drainer does, against walking and hashing
    alone; each round with a new catalogue."""

    def ours(core: Context) -> None:
        with ThreadPoolExecutor(1) as pool:
            announcing = pool.submit(register_tree, core, Source("a", "bench"))
            while not announcing.done():
                drain(core, {OperationKind.ADMIT: execute_admit})
                wait([announcing], _LOOK_SECONDS)
            announcing.result()
        drain(core, {OperationKind.ADMIT: execute_admit})

    def each() -> Iterator[Callable[[], Any]]:
        for _ in range(rounds):
            with context(home) as core:
                places(core, folder)
                yield partial(ours, core)
                _check(core, count)

    count = len(_all_files(folder / "a"))
    took, bare = beside(lambda _: _bare_hash(folder / "a"), each())
    return result(f"registration from disk{label}", count / took, "files/s", count / bare)


def _check(core: Context, count: int) -> None:
    """A benchmark of registrations that were not made is worth nothing."""
    found = core.transact(lambda c: status(c, core.clock()))["replicas"]
    if found.get("READY") != count:
        raise SystemExit(f"not all files were registered: {found}")


def one_set(
    home: Path, folder: Path, servers: tuple[S3Server, SshServer], label: str, rounds: int
) -> Iterator[Result]:
    """The cases of one set of files, which are in folder ``a``."""
    server, sshd = servers
    source = folder / "a"
    yield registration(home, folder, f" {label}", rounds)
    yield one_move(
        home, source, [Far("posix", str(_new(folder / f"b-{n}")), {}) for n in range(rounds)],
        label, lambda n: _bare_copy(source, folder / f"bare-{n}"),
    )  # fmt: skip
    yield one_move(
        home, source, [_bucket(server) for _ in range(rounds)],
        label, lambda n: _bare_put(source, server, f"bare-{label}-{n}"),
    )  # fmt: skip
    yield one_move(
        home, source, [_bucket(server)],
        label, lambda n: _rclone_put(source, server, f"rclone-{label}-{n}"), ", beside rclone",
    )  # fmt: skip
    yield one_move(
        home, source, [_far(sshd, _new(folder / f"far-{n}")) for n in range(rounds)],
        label, lambda n: _bare_sftp(source, sshd, folder / f"bare-far-{n}"),
    )  # fmt: skip


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _far(server: SshServer, folder: Path) -> Far:
    return Far("sftp", server.root(folder), server.config(shell=True))


def _bucket(server: S3Server) -> Far:
    config = {
        "endpoint": server.endpoint,
        "access_key": "env:BENCH_S3_KEY",
        "secret_key": "env:BENCH_S3_SECRET",
    }
    return Far("s3", f"{server.bucket}/{uuid.uuid4().hex}", config)


def each(home: Path, folder: Path, quick: bool) -> Iterator[Result]:
    """Registration of files as large as many data products are, 1 MB each; then A many small files,
    B few large ones. Three rounds of what takes some seconds only, for one tells little."""
    rounds = 1 if quick else 3
    alone = _new(folder / "R")
    # so many that the first and the last moments, when one processor has nothing to do, are little
    make_files(alone / "a", 50 if quick else 8000, 10**6)
    yield registration(home, alone, "", 2 * rounds)  # sets of three differ by a tenth
    with s3_server(folder / "s3") as server, ssh_server(folder / "sshd") as sshd:
        os.environ["BENCH_S3_KEY"] = server.access_key
        os.environ["BENCH_S3_SECRET"] = server.secret_key
        for label, (count, size) in sets(quick).items():
            place = _new(folder / label)
            make_files(place / "a", count, size)
            # twenty large files take minutes, and are many gigabytes
            yield from one_set(home, place, (server, sshd), label, rounds if label == "A" else 1)


if __name__ == "__main__":
    main(each)
