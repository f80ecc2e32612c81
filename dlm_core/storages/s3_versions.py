"""Removing for good from a bucket that keeps versions, where a plain delete frees nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dlm_core.errors import AccessDeniedError, StorageError
from dlm_core.storages.port import Entry
from dlm_core.storages.s3_client import AT_ONCE, UNKNOWN, S3Client, code_of, one_line

# versioning may be switched on while a worker runs, so what was told holds for so many seconds
_HOLDS = 300.0
# not a wrong key: with that nothing is known, and everything else is denied too
_NOT_ALLOWED = ("AccessDenied", "403")
_LOCKED = ("ObjectLocked",)  # MinIO's word; AWS says AccessDenied
_GONE = ("NoSuchVersion", "NoSuchKey", "404", "NotFound")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object, or a marker that it was deleted."""

    key: str
    version_id: str
    latest: bool
    marker: bool
    size: int
    etag: str


class Versions:
    """The versions of what lies below a storage's prefix; thread-safe."""

    def __init__(self, client: S3Client) -> None:
        self._s3 = client
        self._lock = threading.Lock()
        self._known: tuple[float, bool] | None = None

    def are_kept(self) -> bool:
        """Whether the bucket has versioning, or had it once; False if that cannot be told.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
        """
        with self._lock:
            if self._known is None or time.monotonic() > self._known[0] + _HOLDS:
                self._known = time.monotonic(), self._ask()
            return self._known[1]

    def _ask(self) -> bool:
        from botocore.exceptions import ClientError

        with self._s3.translated(""):
            try:
                told = self._s3.connected().get_bucket_versioning(Bucket=self._s3.bucket)
            except ClientError as error:
                if code_of(error) in (*_NOT_ALLOWED, *UNKNOWN):
                    return False
                raise
        return told.get("Status") in ("Enabled", "Suspended")

    def remove(
        self,
        root: str,
        paths: Collection[str],
        *,
        tree: bool = False,
        moved: Mapping[str, Entry] | None = None,
    ) -> None:
        """Delete all versions and markers of ``paths``, which are ``root`` or lie below it, until a
        look finds no version.

        The newest of each goes last. So nothing old comes to light, and what was cut off is still
        there to be seen, and is completed by doing it again.

        Parameters
        ----------
        tree : delete also all others below ``root``, those of objects that are deleted among them.
        moved : what was copied to another place; if the newest is something else, nothing goes. An
            older version with other bytes stays behind a marker: what somebody wrote over may be
            all that is left of the good ones.

        Raises
        ------
        StorageUnavailableError
            also if the newest is not what was moved, or versions stay though they are deleted.
        AccessDeniedError
            if versions may not be listed or deleted, or are locked.
        """
        deleted: set[Version] = set()
        moved = moved or {}
        found = set(self._found(root, paths, tree))
        if unlisted := moved.keys() - {self._path(one.key) for one in found}:
            raise self._s3.unavailable(f"no version of {min(unlisted)} is listed")
        self._compare(found, moved)
        if older := self._older(found, moved):
            self._hide(root, older, found)
            paths = set(paths) - older
            found = {one for one in found if self._path(one.key) not in older}
        # a listing may be partial (SeaweedFS forgets versions between its pages): looked for again
        while found:
            self._compare(found, moved)
            new = found - deleted
            if not new:
                # SeaweedFS keeps the marker of suspended versioning; it holds no bytes
                if all(one.marker for one in found):
                    return
                raise self._s3.unavailable(f"versions of {root} are still there after removal")
            self._delete([one for one in new if not one.latest])
            self._delete([one for one in new if one.latest])
            deleted |= new
            found = set(self._found(root, paths, tree))

    def _older(self, found: Collection[Version], moved: Mapping[str, Entry]) -> set[str]:
        """Paths of what was moved that have older versions with other bytes."""
        return {
            path
            for one in found
            if not (one.latest or one.marker)
            and (was := moved.get(path := self._path(one.key))) is not None
            and (one.size, one.etag) != (was.size, was.etag)
        }

    def _hide(self, root: str, paths: Collection[str], found: Collection[Version]) -> None:
        """A marker first, so that nothing older comes to light; then what was moved goes."""
        self._mark(paths)
        # one without a name of its own is replaced by the marker, which has none either
        newest = [one for one in found if one.latest and one.version_id != "null"]
        self._delete([one for one in newest if not one.marker and self._path(one.key) in paths])
        # SeaweedFS forgets the marker of suspended versioning by this
        listed = self._found(root, paths, False)
        self._mark({self._path(one.key) for one in listed if one.latest and not one.marker})

    def _mark(self, paths: Collection[str]) -> None:
        for path in paths:
            with self._s3.translated(path):
                self._s3.connected().delete_object(
                    Bucket=self._s3.bucket, Key=self._s3.prefix + path
                )

    def _compare(self, found: Collection[Version], moved: Mapping[str, Entry]) -> None:
        for one in found:
            path = self._path(one.key)
            was = moved.get(path)
            if was is None or not one.latest or one.marker:
                continue
            if (one.size, one.etag) != (was.size, was.etag or one.etag):
                raise self._s3.unavailable(f"{path} changed while it was moved")

    # --- looking ---------------------------------------------------------------------------------

    def _found(self, root: str, paths: Collection[str], tree: bool) -> list[Version]:
        key = self._s3.prefix + root
        found: list[Version] = []
        if root in paths:
            found += self._listed(key, root, only=True)
        if tree or len(paths) > (root in paths):
            below = self._listed(f"{key}/", root, only=False)
            found += [one for one in below if tree or self._path(one.key) in paths]
        return found

    def _listed(self, prefix: str, path: str, *, only: bool) -> Iterator[Version]:
        """Versions whose key begins with ``prefix``, or is ``prefix`` and no more."""
        from botocore.exceptions import ClientError

        pages = self._s3.connected().get_paginator("list_object_versions")
        # to a name alone belongs nothing of what lies below it, which may be much
        asked = {"Delimiter": "/"} if only else {}
        with self._s3.translated(path):
            try:
                for page in pages.paginate(Bucket=self._s3.bucket, Prefix=prefix, **asked):
                    for one in _versions(page):
                        if one.key == prefix or (not only and one.key.startswith(prefix)):
                            yield one
                    # in the order of keys: the exact one is first of those that begin with it
                    if only and page.get("NextKeyMarker", "") > prefix:
                        return
            except ClientError as error:
                if code_of(error) in _NOT_ALLOWED:
                    raise self._denied(path, "s3:ListBucketVersions is denied", error) from None
                raise

    def older(self) -> Iterator[Entry]:
        """Versions that are not the newest of their object; they are paid for all the same.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
        """
        for one in self._listed(self._s3.prefix, "", only=False) if self.are_kept() else ():
            if not (one.latest or one.marker):
                yield Entry(self._path(one.key), one.size, 0.0, "file", one.etag)

    def _path(self, key: str) -> str:
        return key[len(self._s3.prefix) :]

    # --- deleting --------------------------------------------------------------------------------

    def _delete(self, versions: Sequence[Version]) -> None:
        # one by one: of DeleteObjects servers want the one or the other digest, or have none
        with ThreadPoolExecutor(AT_ONCE, "dlm-version") as pool:
            list(pool.map(self._delete_one, versions))

    def _delete_one(self, one: Version) -> None:
        from botocore.exceptions import ClientError

        path = self._path(one.key)
        with self._s3.translated(path):
            try:
                self._s3.connected().delete_object(
                    Bucket=self._s3.bucket, Key=one.key, VersionId=one.version_id
                )
            except ClientError as error:
                code = code_of(error)
                if code in _GONE:
                    return
                if code in (*_NOT_ALLOWED, *_LOCKED):
                    what = "s3:DeleteObjectVersion is denied, or Object Lock holds the version"
                    raise self._denied(path, what, error) from None
                raise

    def _denied(self, path: str, what: str, error: BaseException) -> StorageError:
        message = f"{what}: {one_line(error)}"
        return AccessDeniedError(storage=self._s3.name, path=path, message=message)


def _versions(page: Mapping[str, Any]) -> Iterator[Version]:
    for kind in ("Versions", "DeleteMarkers"):
        for one in page.get(kind, ()):
            yield Version(
                one["Key"],
                one["VersionId"],
                bool(one.get("IsLatest")),
                kind == "DeleteMarkers",
                one.get("Size", 0),
                one.get("ETag", "").strip('"'),
            )
