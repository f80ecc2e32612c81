"""Uploads to S3 that go on where an earlier one was: a part that is there is not sent again.

Nobody's word is taken for what lies there. Each part's MD5 is computed from the source's bytes, and
an upload is completed by naming these: a part that somebody else put in a part's place, however
late, makes the completion fail and never an object of other bytes.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import md5
from itertools import count
from typing import Any, TypeVar

from dlm_core.errors import PayloadExistsError, StorageError
from dlm_core.storages.port import PRIVATE, Readable
from dlm_core.storages.s3_client import DENIED, UNKNOWN, S3Client, code_of

_MIB = 1 << 20
# parts in memory, those that are sent and those that are read, of all uploads of a storage
_ROOM = 160
_SENT_AT_ONCE = 32 * _MIB
_BLOCK = _MIB
#: what the server copies by one request, in bytes; it takes 5 GiB at most
COPIED_PART = 1 << 30
_COPIED_AT_ONCE = 4
_MAX_PARTS = 10_000
# uploads whose keys the catalogue is asked for at a time
_ASKED_AT_ONCE = 1000

# why an upload may not be completed as it is
_NOT_SO = (
    "InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML", "InvalidRequest",
    "ConditionalRequestConflict",
)  # fmt: skip

_T = TypeVar("_T")
#: of some paths those that are the catalogue's, and whether a copy to it is still to be made
Owned = Callable[[Sequence[str]], Mapping[str, bool]]


@dataclass(slots=True)
class Upload:
    """One that was begun: ``initiated`` and ``touched`` in seconds since 1970.

    ``there`` has sizes and ETags by the number of a part; SeaweedFS keeps several of one number.
    """

    key: str
    upload_id: str
    initiated: float
    storage_class: str | None = None
    touched: float = 0.0
    there: dict[int, set[tuple[int, str]]] = field(default_factory=lambda: defaultdict(set))

    def size(self) -> int:
        """Bytes that are there."""
        return sum(max(size for size, _ in parts) for parts in self.there.values())


class Room:
    """Places for so many MiB; one who wants more than there are waits until all are free."""

    def __init__(self, places: int) -> None:
        self._places, self._free = places, threading.Semaphore(places)
        self._turn = threading.Lock()

    def take(self, size: int) -> int:
        """Wait for room for ``size`` bytes; how many places that took."""
        wanted = min(self._places, -(-size // _MIB))
        with self._turn:  # else a large part would wait for as long as there are small ones
            for _ in range(wanted):
                self._free.acquire()
        return wanted

    def give(self, places: int) -> None:
        """Give back what was taken."""
        self._free.release(places)


class Parts:
    """The unfinished uploads below a storage's prefix: goes on with them, and ends them."""

    def __init__(self, client: S3Client, storage_class: str | None) -> None:
        self._s3, self.prefix = client, client.prefix
        self._class = {"StorageClass": storage_class} if storage_class else {}
        self._room = Room(_ROOM)
        # some servers do not know this of a completion, and say so
        self._conditional = {"IfNoneMatch": "*"}

    def write(
        self,
        path: str,
        source: Readable,
        part: int,
        sending: Callable[[int], None],
        must_be_free: Callable[[], None],
    ) -> str:
        """Upload what ``source`` gives in parts of ``part`` bytes, but for those that are there.

        What was uploaded stays if it is interrupted, whosever fault it is: the next source may have
        the same parts. ``must_be_free`` raises if something is at ``path``. Returns the ETag that
        these bytes have.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError, PayloadExistsError
        """
        key = self._s3.prefix + path
        with self._s3.translated(path):
            found, findable = self._left_of(key)
            upload = found or self._begun(key)
        return self._made(upload, path, source, part, sending, must_be_free, kept=findable)

    def create(
        self, path: str, source: Readable, part: int, must_be_free: Callable[[], None]
    ) -> str:
        """As :meth:`write`, but all is sent, and nothing stays of what is interrupted."""
        with self._s3.translated(path):
            upload = self._begun(self._s3.prefix + path)
        return self._made(upload, path, source, part, _unheard, must_be_free, kept=False)

    def _made(
        self,
        upload: Upload,
        path: str,
        source: Readable,
        part: int,
        sending: Callable[[int], None],
        must_be_free: Callable[[], None],
        *,
        kept: bool,
    ) -> str:
        """Fill an upload and make an object of it; if it fails the upload stays if it is kept."""
        try:
            with self._s3.translated(path):
                named, etag = self._pour(upload, source, part, sending)
                must_be_free()
                self._complete(upload, named)
        except BaseException as error:
            if not kept or isinstance(error, PayloadExistsError):
                self._end_quietly(upload)
            raise
        return etag

    def copy(
        self,
        bucket: str,
        key: str,
        path: str,
        size: int,
        moved: Callable[[int], None],
        must_be_free: Callable[[], None],
    ) -> None:
        """Have the server make an object of another one, of ``size`` bytes, in any bucket of it.

        ``moved`` is called with the bytes of each part that it has copied; it may raise.

        Raises
        ------
        PayloadNotFoundError, AccessDeniedError
            of the source: it is not there, or not for these keys.
        StorageUnavailableError, PayloadExistsError
        """
        with self._s3.translated(path):
            upload = self._begun(self._s3.prefix + path)
        try:
            with self._s3.translated(path):
                named = self._copied(upload, {"Bucket": bucket, "Key": key}, size, moved)
                must_be_free()
                self._complete(upload, named)
        except BaseException:
            self._end_quietly(upload)
            raise

    def copy_within(
        self, source: str, path: str, size: int, must_be_free: Callable[[], None]
    ) -> None:
        """As :meth:`copy`, of the object at another path of this storage."""
        key = self._s3.prefix + source
        self.copy(self._s3.bucket, key, path, size, _unheard, must_be_free)

    def _copied(
        self, upload: Upload, source: dict[str, str], size: int, moved: Callable[[int], None]
    ) -> list[str]:
        part = max(COPIED_PART, -(-size // _MAX_PARTS))

        def copy(begin: int) -> str:
            end = min(begin + part, size)
            answer = self._client.upload_part_copy(
                **self._named(upload), PartNumber=begin // part + 1, CopySource=source,
                CopySourceRange=f"bytes={begin}-{end - 1}",
            )  # fmt: skip
            moved(end - begin)
            etag: str = answer["CopyPartResult"]["ETag"].strip('"')
            return etag

        with ThreadPoolExecutor(_COPIED_AT_ONCE, "dlm-part") as pool:
            waiting = deque(pool.submit(copy, begin) for begin in range(0, size, part))
            return [_first(waiting) for _ in range(len(waiting))]

    def forget(self, before: float, owned: Owned) -> int:
        """End what nobody has touched since ``before`` (seconds since 1970); how many uploads.

        In a storage that is a whole bucket only what is the DLM's: what ``owned`` knows, and what
        lies below ``.dlm``. Of each path to which a copy is still to be made the upload stays that
        it would go on from.

        Raises
        ------
        StorageUnavailableError, AccessDeniedError
        """
        ended = 0
        with self._s3.translated(""):
            by_path: dict[str, list[Upload]] = defaultdict(list)
            for upload in self._unfinished(self._s3.prefix):
                by_path[upload.key[len(self._s3.prefix) :]].append(upload)
            old = [p for p, some in by_path.items() if any(u.initiated < before for u in some)]
            for n in range(0, len(old), _ASKED_AT_ONCE):
                paths = old[n : n + _ASKED_AT_ONCE]
                known = owned(paths)
                for path in paths:
                    if self._s3.prefix or path in known or path.startswith(f"{PRIVATE}/"):
                        awaited = known.get(path, False)
                        ended += self._forget(by_path[path], before, awaited)
        return ended

    def _forget(self, uploads: list[Upload], before: float, awaited: bool) -> int:
        alive = [one for one in uploads if self._look(one)]
        kept = max(alive, key=_progress, default=None) if awaited else None
        old = [one for one in alive if one is not kept and one.touched < before]
        for one in old:
            self._end(one)
        return len(old)

    @property
    def _client(self) -> Any:
        """Asked for at each request: keys may be rotated while a large upload is made."""
        return self._s3.connected()

    # --- looking ---------------------------------------------------------------------------------

    def _left_of(self, key: str) -> tuple[Upload | None, bool]:
        """The upload to go on from, where most is there; and if a later try would find ours."""
        from botocore.exceptions import ClientError

        try:
            left = [
                one
                for one in self._unfinished(key)
                if one.key == key and self._is_of_our_class(one) and self._look(one)
            ]
        except ClientError as error:
            if code_of(error) in (*DENIED, *UNKNOWN):
                return None, False
            raise
        return max(left, key=_progress, default=None), True

    def _unfinished(self, prefix: str) -> Iterator[Upload]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._s3.bucket, Prefix=prefix
        )
        for page in pages:
            for one in page.get("Uploads", ()):
                if one["Key"].startswith(prefix):
                    begun = one["Initiated"].timestamp()
                    yield Upload(one["Key"], one["UploadId"], begun, one.get("StorageClass"))

    def _is_of_our_class(self, upload: Upload) -> bool:
        return not self._class or upload.storage_class in (None, *self._class.values())

    def _look(self, upload: Upload) -> bool:
        """Note which parts are there; False if the upload is not there any more."""
        from botocore.exceptions import ClientError

        pages = self._client.get_paginator("list_parts").paginate(**self._named(upload))
        upload.touched = upload.initiated
        try:
            for page in pages:
                for one in page.get("Parts", ()):
                    upload.there[one["PartNumber"]].add((one["Size"], one["ETag"].strip('"')))
                    upload.touched = max(upload.touched, one["LastModified"].timestamp())
        except ClientError as error:
            if code_of(error) == "NoSuchUpload":
                return False
            raise
        return True

    def _named(self, upload: Upload) -> dict[str, str]:
        return {"Bucket": self._s3.bucket, "Key": upload.key, "UploadId": upload.upload_id}

    # --- uploading -------------------------------------------------------------------------------

    def _begun(self, key: str) -> Upload:
        answer = self._client.create_multipart_upload(
            Bucket=self._s3.bucket, Key=key, **self._class
        )
        return Upload(key, answer["UploadId"], 0.0)

    def _pour(
        self,
        upload: Upload,
        source: Readable,
        part: int,
        sending: Callable[[int], None],
    ) -> tuple[list[str], str]:
        """Send what is missing, a few parts at once: the ETags to name in turn, and the whole's."""

        def settle(number: int, data: bytearray) -> tuple[bytes, str]:
            digest = md5(data, usedforsecurity=False).digest()
            if (len(data), digest.hex()) in upload.there.get(number, ()):
                return digest, digest.hex()
            sending(len(data))
            return digest, self._send(upload, number, data, digest)

        at_once = max(1, _SENT_AT_ONCE // part)
        waiting: deque[Future[tuple[bytes, str]]] = deque()
        settled: list[tuple[bytes, str]] = []
        # if the source fails, what was read of it is sent nevertheless: the next try need not
        with ThreadPoolExecutor(at_once, "dlm-part") as pool:
            for number in count(1):
                places, data = self._read(source, part)
                if not data:
                    break
                future = pool.submit(settle, number, data)
                del data  # else it is kept while the next one is read
                future.add_done_callback(lambda _, places=places: self._room.give(places))  # type: ignore[misc]
                waiting.append(future)
                if len(waiting) > at_once:
                    settled.append(_first(waiting))
            while waiting:
                settled.append(_first(waiting))
        whole = md5(b"".join(digest for digest, _ in settled), usedforsecurity=False).hexdigest()
        return [etag for _, etag in settled], f"{whole}-{len(settled)}"

    def _read(self, source: Readable, part: int) -> tuple[int, bytearray]:
        """The next part, which is shorter only at the end, and the places that it takes."""
        places = self._room.take(part)
        data = bytearray()
        try:
            while len(data) < part and (block := source.read(min(part - len(data), _BLOCK))):
                data += block
        except BaseException:
            self._room.give(places)
            raise
        if not data:
            self._room.give(places)
        return places, data

    def _send(self, upload: Upload, number: int, data: bytearray, digest: bytes) -> str:
        checked = b64encode(digest).decode("ascii")
        answer = self._client.upload_part(
            **self._named(upload), PartNumber=number, Body=data, ContentMD5=checked
        )
        etag: str = answer["ETag"].strip('"')
        return etag

    def _complete(self, upload: Upload, named: Sequence[str]) -> None:
        from botocore.exceptions import ClientError

        parts = [{"PartNumber": n, "ETag": f'"{etag}"'} for n, etag in enumerate(named, 1)]
        whole = {**self._named(upload), "MultipartUpload": {"Parts": parts}}
        try:
            try:
                self._client.complete_multipart_upload(**whole, **self._conditional)
            except ClientError as error:
                if not self._conditional or code_of(error) not in UNKNOWN:
                    raise
                self._conditional = {}
                self._client.complete_multipart_upload(**whole)
        except ClientError as error:
            if code_of(error) in _NOT_SO:
                self._doubt(upload, named)
            raise

    def _doubt(self, upload: Upload, named: Sequence[str]) -> None:
        """What somebody put in a part's place the next try replaces. If nothing is wrong to be seen
        it could only fail again, so it shall begin anew."""
        upload.there.clear()
        if self._look(upload) and all(
            etag in {told for _, told in upload.there.get(n, ())} for n, etag in enumerate(named, 1)
        ):
            self._end_quietly(upload)

    def _end(self, upload: Upload) -> None:
        """Have the server drop an upload and its parts."""
        from botocore.exceptions import ClientError

        try:
            self._client.abort_multipart_upload(**self._named(upload))
        except ClientError as error:
            if code_of(error) != "NoSuchUpload":
                raise

    def _end_quietly(self, upload: Upload) -> None:
        """As :meth:`_end` while an error is told; what does not work the sweep does."""
        from botocore.exceptions import BotoCoreError, ClientError

        with suppress(BotoCoreError, ClientError, StorageError):
            self._end(upload)


def _first(waiting: deque[Future[_T]]) -> _T:
    """The result of the first; if it failed, those that are not at work shall not begin."""
    try:
        return waiting.popleft().result()
    except BaseException:
        for one in waiting:
            one.cancel()
        raise


def _unheard(_: int) -> None:
    """Who is told that so many bytes are sent if nobody wants to know."""


def _progress(upload: Upload) -> tuple[int, float]:
    return upload.size(), upload.initiated
