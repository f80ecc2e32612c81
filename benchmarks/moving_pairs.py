"""Copies between storages of every two kinds through a drainer, against bare rclone.

rclone has no XRootD: it goes in by that server's HTTP door, as sites have it.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import Result, main, make_files
from benchmarks.moving_far import Far, one_move, sets
from dlm_cli.s3_server import s3_server
from tests.servers import USER, free_port, rclone_webdav_server, tool
from tests.sshd import ssh_server
from tests.xrootd import xrootd_server

_KINDS = ("posix", "s3", "sftp", "webdav", "xrootd")
#: pairs of which the other benchmarks tell
_TOLD = {("posix", kind) for kind in ("posix", "s3", "sftp", "webdav")}
_S3_KEY, _S3_SECRET = "BENCH_PAIRS_S3_KEY", "BENCH_PAIRS_S3_SECRET"


@dataclass(frozen=True)
class _Servers:
    """``new`` makes an empty place on a server of each kind: as the catalogue has it, and as rclone
    calls it with the variables ``environment``."""

    new: Mapping[str, Callable[[], tuple[Far, str]]]
    environment: Mapping[str, str]


@contextmanager
def _servers(folder: Path) -> Iterator[_Servers]:
    door = free_port()
    with ExitStack() as stack:
        s3 = stack.enter_context(s3_server(folder / "s3"))
        sshd = stack.enter_context(ssh_server(folder / "sshd"))
        dav = stack.enter_context(rclone_webdav_server(folder / "dav"))
        http = f"xrd.protocol http:{door} libXrdHttp.so\n"
        xrootd = stack.enter_context(xrootd_server(folder / "xrootd", http))
        os.environ |= {_S3_KEY: s3.access_key, _S3_SECRET: s3.secret_key}
        (folder / "known_hosts").write_text(f"{sshd.host_keys}\n")

        def on_disk() -> tuple[Far, str]:
            path = _new(folder)
            return Far("posix", str(path), {}), str(path)

        def in_bucket() -> tuple[Far, str]:
            root = f"{s3.bucket}/{uuid.uuid4().hex}"
            keys = {"access_key": f"env:{_S3_KEY}", "secret_key": f"env:{_S3_SECRET}"}
            return Far("s3", root, {"endpoint": s3.endpoint, **keys}), f"S3:{root}"

        def by_ssh() -> tuple[Far, str]:
            path = _new(folder)
            return Far("sftp", sshd.root(path), sshd.config(shell=True)), f"SSH:{path}"

        def on_web() -> tuple[Far, str]:
            root = dav.make_collection()
            return Far("webdav", root, dav.config), f"DAV:{root.removeprefix(dav.url)}"

        def by_xrootd() -> tuple[Far, str]:
            root = xrootd.make_root()
            return Far("xrootd", root, xrootd.config), f"XRD:{root.rpartition('/')[2]}"

        new = dict(zip(_KINDS, (on_disk, in_bucket, by_ssh, on_web, by_xrootd), strict=True))
        remotes = {
            "S3": {
                "type": "s3", "provider": "SeaweedFS", "endpoint": s3.endpoint,
                "region": "us-east-1", "no_check_bucket": "true",
                "access_key_id": s3.access_key, "secret_access_key": s3.secret_key,
            },
            "SSH": {
                "type": "sftp", "host": "127.0.0.1", "port": str(sshd.port), "user": sshd.user,
                "key_file": f"{sshd.folder}/user", "known_hosts_file": f"{folder}/known_hosts",
                # else a command runs on the far side for each file, which takes minutes
                "shell_type": "none", "disable_hashcheck": "true",
            },
            "DAV": {
                "type": "webdav", "url": dav.url, "vendor": "other", "user": USER,
                "pass": _obscured(dav.password), "pacer_min_sleep": "0s",
            },
            "XRD": {
                "type": "webdav", "url": f"http://127.0.0.1:{door}", "vendor": "other",
                "pacer_min_sleep": "0s",
            },
        }  # fmt: skip
        remotes["XRD2"] = remotes["XRD"]
        yield _Servers(
            new,
            {
                f"RCLONE_CONFIG_{remote}_{option.upper()}": value
                for remote, options in remotes.items()
                for option, value in options.items()
            },
        )


def _new(folder: Path) -> Path:
    path = folder / uuid.uuid4().hex
    path.mkdir()
    return path


def _obscured(password: str) -> str:
    command = [tool("rclone"), "obscure", "-"]
    told = subprocess.run(command, input=password, text=True, capture_output=True, check=True)
    return told.stdout.strip()


def _rclone(servers: _Servers, names: Sequence[str], large: bool, source: str, far: str) -> None:
    """``rclone copy --files-from``, with as many transfers as other benchmarks have."""
    at_once = "4" if large else "16"
    done = subprocess.run(
        [tool("rclone"), "copy", "--files-from-raw", "-", "--transfers", at_once,
         "--checkers", at_once, "--no-traverse", source, far],
        input="\n".join(names), text=True, capture_output=True, check=False,
        env={**os.environ, **servers.environment, "RCLONE_CONFIG": os.devnull},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"rclone copy {source} {far}: {done.stderr[-500:]}")


def each(home: Path, folder: Path, quick: bool) -> Iterator[Result]:
    """All pairs but those told elsewhere, on A many small files and B few large ones."""
    for label, (count, size) in sets(quick).items():
        files = folder / f"pairs-{label}"
        make_files(files, count, size)
        names = [str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()]
        for kind in _KINDS:
            place = folder / f"pairs-{label}-{kind}"
            place.mkdir()
            with _servers(place) as servers:
                copy = partial(_rclone, servers, names, label == "B")
                held, source = servers.new[kind]()
                copy(str(files), source)
                for other in _KINDS:
                    if (kind, other) in _TOLD:
                        continue
                    far, _ = servers.new[other]()

                    def bare(_: int, other: str = other) -> None:
                        place = servers.new[other]()[1]
                        # a copy by the server itself is none of XRootD's door
                        copy(source, place.replace("XRD:", "XRD2:") if kind == other else place)  # noqa: B023

                    yield one_move(home, files, [far], label, bare, held=held)


if __name__ == "__main__":
    main(each)
