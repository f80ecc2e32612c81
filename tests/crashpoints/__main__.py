"""``make crashpoints``: every point of every scenario, with a table. Exit code 1 if one failed."""

from __future__ import annotations

import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from dlm_cli.s3_server import s3_server
from dlm_core.catalogue import embedded, schema
from tests.backends import offer_keys, s3_config
from tests.crashpoints.run import Arena, Servers, exhaust
from tests.crashpoints.scenarios import SCENARIOS
from tests.memory import fast_folder
from tests.schema.rules import let_time_be_told
from tests.servers import wsgidav_server
from tests.sshd import ssh_server


def main(wanted: list[str]) -> int:
    """Run the scenarios whose names contain one of ``wanted``, all if there are none."""
    home = Path(tempfile.mkdtemp(prefix="dlm-crash-", dir=fast_folder()))
    chosen = [s.name for s in SCENARIOS if not wanted or any(word in s.name for word in wanted)]
    total = failed = 0
    print(f"{'scenario':24} {'points':>7} {'failed':>7} {'seconds':>8}", flush=True)
    try:
        embedded.ensure_running(home, durable=False)
        template = Arena(home, "template_dlm", home)
        template.create(template.template, "template1")
        schema.upgrade(template.url(template.template))
        let_time_be_told(template.url(template.template))
        with (
            s3_server(home / "weed") as server, ssh_server(home / "sshd") as ssh,
            wsgidav_server(home / "dav") as dav,
        ):  # fmt: skip
            offer_keys(server)
            servers = Servers(
                server.bucket, s3_config(server), ssh.root(""), ssh.config(),
                dav.make_collection(), dav.config,
            )  # fmt: skip
            one = partial(exhaust, home, servers)
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
                for points, lines, text in pool.map(one, chosen):
                    total, failed = total + points, failed + len(lines)
                    print("\n".join([*lines, text]), flush=True)
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    print(f"crash points: {total} failed: {failed}")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
