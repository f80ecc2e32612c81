"""Open a storage from what the catalogue says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from dlm_core.errors import InvalidValueError
from dlm_core.storages.bundles import Bundled, split_bundling
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.config import read_config
from dlm_core.storages.guarded import Guarded
from dlm_core.storages.plug_in import open_plug_in
from dlm_core.storages.port import Storage
from dlm_core.storages.staging import Place, open_stager, split_config

_CREDENTIALS = re.compile("://[^/]*@")

Opener = Callable[[str, str, Mapping[str, Any]], Storage]


class PosixConfig(BaseModel):
    """What ``config`` of a POSIX storage may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mount: str | None = Field(
        None,
        pattern="^/",
        description="A mount point; unless something is mounted there the storage is unreachable.",
    )


def _posix(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.posix import PosixStorage

    parsed = read_config(PosixConfig, name, config)
    if not root.startswith("/"):
        raise InvalidValueError(
            what=f"root of storage {name}", value=root, expected="an absolute path"
        )
    return PosixStorage(name, root, mount=parsed.mount)


def _s3(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.s3 import open_s3

    return open_s3(name, root, config)


def _sftp(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.sftp import open_sftp

    return open_sftp(name, root, config)


def _webdav(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.webdav import open_webdav

    return open_webdav(name, root, config)


def _http(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.rclone import open_http

    return open_http(name, root, config)


def _rclone(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.rclone import open_rclone

    return open_rclone(name, root, config)


def _xrootd(name: str, root: str, config: Mapping[str, Any]) -> Storage:
    from dlm_core.storages.xrootd import open_xrootd

    return open_xrootd(name, root, config)


_BUILT_IN: dict[str, Opener] = {
    "posix": _posix,
    "s3": _s3,
    "sftp": _sftp,
    "webdav": _webdav,
    "http": _http,
    "rclone": _rclone,
    "xrootd": _xrootd,
}


@lru_cache(maxsize=1)
def interfaces() -> dict[str, Opener]:
    """Openers by interface: ours, and others' found by the entry point group 'dlm.storages'."""
    found = dict(_BUILT_IN)
    for point in entry_points(group="dlm.storages"):
        found.setdefault(point.name, _by(point))
    return found


def _by(point: EntryPoint) -> Opener:
    def opener(name: str, root: str, config: Mapping[str, Any]) -> Storage:
        what, calls = f"interface of storage {name}", ("check", "stat", "open_read", "write")
        return cast(Storage, Guarded(open_plug_in(point, what, calls, name, root, config)))

    return opener


def must_have_options(name: str, interface: str, config: Mapping[str, Any]) -> None:
    """Look at what only the program that serves a storage can tell of its config: opening does not.

    Raises
    ------
    InvalidValueError
        if a key of it would be ignored.
    """
    if interface == "rclone":
        from dlm_core.storages import rclone_config

        rclone_config.must_have_options(name, split_config(split_bundling(name, config)[1])[0])


def open_storage(name: str, interface: str, root: str, config: Mapping[str, Any]) -> Storage:
    """The adapter for a storage; opening touches neither disk nor network.

    Parameters
    ----------
    root : absolute folder (posix), ``bucket/prefix`` (s3), ``user@host:port/folder`` (sftp), URL
        (webdav, http, xrootd) or a path on the remote (rclone)
    config : what the interface needs; secrets only by reference, never themselves. With ``stage``
        the storage is cold (:mod:`.staging`), with ``bundle_bytes`` small files are kept in bundles
        (:mod:`.bundles`), which lie on the cold storage then.

    Raises
    ------
    InvalidValueError
        if the interface is unknown, the config does not fit it, or a URL has a password in it.
    """
    if _CREDENTIALS.search(root):
        raise InvalidValueError(
            what=f"root of storage {name}",
            value="(not shown)",
            expected="a place without user:password@; secrets are named in config",
        )
    known = interfaces()
    bundling, rest = split_bundling(name, config)
    adapters, staging = split_config(rest)
    if interface not in known:
        raise InvalidValueError(
            what="interface", value=interface, expected=f"one of {', '.join(sorted(known))}"
        )
    if bundling is not None and staging and adapters.get("storage_class"):
        raise InvalidValueError(
            what=f"storage_class of storage {name}",
            value=adapters["storage_class"],
            expected="none with bundles: let a rule of the bucket archive .dlm/bundles/tar/",
        )
    storage = known[interface](name, root, adapters)
    if bundling is not None and not getattr(storage, "exclusive", None):
        raise InvalidValueError(
            what=f"bundle_bytes of storage {name}",
            value=bundling.bundle_bytes,
            expected=f"none with {interface}: there two processes may both have made one file",
        )
    if staging:
        stager, terms = open_stager(Place(name, interface, root, adapters), staging)
        storage = cast(Storage, ColdStorage(storage, stager, terms))
    return storage if bundling is None else cast(Storage, Bundled(storage, bundling))
