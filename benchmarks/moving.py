"""Bytes: registration from disk, and copies through a drainer, against the bare tools."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncssh
import obstore
from obstore.store import S3Store

from benchmarks.catalogue import places
from benchmarks.measure import Result, beside, context, result
from dlm_cli.s3_server import S3Server, s3_server
from dlm_core.catalogue.engine import run
from dlm_core.catalogue.places import add_location, add_storage
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import Context, drain
from dlm_core.types import OperationKind
from tests.sshd import SshServer, ssh_server

_BLOCK = 1 << 20
_THREADS = 4
# a drainer with nothing to do looks for work this often
_LOOK_SECONDS = 0.02


def make_files(folder: Path, count: int, size: int) -> None:
    """``count`` files of ``size`` random bytes, a hundred a folder."""
    for n in range(count):
        path = folder / f"{n // 100:03}" / f"{n:05}.dat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


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


def registration(core: Context, folder: Path, count: int) -> Result:
    """Announce, and admit beside it as the daemon's drainer does, against walking and hashing
    alone."""

    def ours() -> None:
        with ThreadPoolExecutor(1) as pool:
            announcing = pool.submit(register_tree, core, Source("a", "bench"))
            while not announcing.done():
                drain(core, {OperationKind.ADMIT: execute_admit})
                wait([announcing], _LOOK_SECONDS)
            announcing.result()
        drain(core, {OperationKind.ADMIT: execute_admit})

    took, bare = beside(lambda _: _bare_hash(folder), ours)
    return result("registration from disk", count / took, "files/s", count / bare)


def registration_alone(home: Path, folder: Path, quick: bool) -> Result:
    """Registration of files as large as many data products are: 1 MB each."""
    count = 50 if quick else 2000
    folder.mkdir()
    with context(home) as core:
        places(core, folder)
        make_files(folder / "a", count, 10**6)
        return registration(core, folder / "a", count)


def _plan_moves(core: Context, keep: str) -> None:
    """Queue the copies of all items to the one storage that is open."""
    for name in ("b", "c", "bucket", "far"):
        mode = "read_write" if name == keep else "offline"
        core.transact(
            lambda c, m=mode, n=name: run(
                c, "UPDATE storage SET mode = :m WHERE name = :n", m=m, n=n
            )
        )
    core.transact(
        lambda c: run(
            c,
            "INSERT INTO evaluation SELECT oid, now() FROM data_item "
            "ON CONFLICT (oid) DO UPDATE SET due_at = now()",
        )
    )
    plan_replication(core)


def _move(core: Context) -> None:
    drain(core, {OperationKind.COPY: execute_copy})


def one_set(
    home: Path, folder: Path, servers: tuple[S3Server, SshServer], label: str, count: int, size: int
) -> list[Result]:
    """The cases of one set of files."""
    server, sshd = servers
    folder.mkdir()
    total = count * size
    value, unit = (count, "files/s") if label == "A" else (total / 1e6, "MB/s")
    found = []
    with context(home) as core:
        places(core, folder)
        make_files(folder / "a", count, size)
        _add_bucket(core, server)
        _add_far(core, sshd, folder / "far")
        first = registration(core, folder / "a", count)
        found.append({**first, "case": f"{first['case']} {label}"})
        _plan_moves(core, "b")
        ours, bare = beside(
            lambda n: _bare_copy(folder / "a", folder / f"bare-{n}"), lambda: _move(core)
        )
        found.append(result(f"move posix-posix {label}", value / ours, unit, value / bare))
        core.transact(lambda c: run(c, "UPDATE storage SET phase = 'GAS' WHERE name IN ('a', 'b')"))
        _plan_moves(core, "bucket")
        ours, bare = beside(
            lambda n: _bare_put(folder / "a", server, f"bare-{label}-{n}"), lambda: _move(core)
        )
        found.append(result(f"move posix-s3 {label}", value / ours, unit, value / bare))
        core.transact(lambda c: run(c, "UPDATE storage SET phase = 'GAS' WHERE name = 'bucket'"))
        _plan_moves(core, "far")
        ours, bare = beside(
            lambda n: _bare_sftp(folder / "a", sshd, folder / f"bare-far-{n}"), lambda: _move(core)
        )
        found.append(result(f"move posix-sftp {label}", value / ours, unit, value / bare))
        _check(core, count)
    return found


def _add_far(core: Context, server: SshServer, folder: Path) -> None:
    folder.mkdir()

    def make(connection: Any) -> None:
        add_location(connection, "hpc", now=core.clock())
        add_storage(
            connection, "far", location="hpc", interface="sftp", phase="LIQUID",
            config=server.config(shell=True), root=server.root(folder), storage_class="disk",
            now=core.clock(),
        )  # fmt: skip

    core.transact(make)


def _add_bucket(core: Context, server: S3Server) -> None:
    config = {
        "endpoint": server.endpoint,
        "access_key": "env:BENCH_S3_KEY",
        "secret_key": "env:BENCH_S3_SECRET",
    }

    def make(connection: Any) -> None:
        add_location(connection, "cloud", now=core.clock())
        add_storage(
            connection, "bucket", location="cloud", interface="s3", phase="LIQUID", config=config,
            root=f"{server.bucket}/{uuid.uuid4().hex}", storage_class="object", now=core.clock(),
        )  # fmt: skip

    core.transact(make)


def _check(core: Context, count: int) -> None:
    """A benchmark of copies that were not made is worth nothing."""
    from dlm_core.catalogue.status import status

    found = core.transact(lambda c: status(c, core.clock()))["replicas"]
    if found.get("READY") != 4 * count:
        raise SystemExit(f"not all copies were made: {found}")


def run_all(home: Path, folder: Path, quick: bool) -> list[Result]:
    """All cases of this module: A many small files, B few large ones."""
    with s3_server(folder / "s3") as server, ssh_server(folder / "sshd") as sshd:
        os.environ["BENCH_S3_KEY"] = server.access_key
        os.environ["BENCH_S3_SECRET"] = server.secret_key
        small, large = ((500, 10_000), (4, 20_000_000)) if quick else ((5000, 10_000), (20, 10**8))
        found = [registration_alone(home, folder / "R", quick)]
        found += one_set(home, folder / "A", (server, sshd), "A", *small)
        return found + one_set(home, folder / "B", (server, sshd), "B", *large)
