"""A storage's description of itself: the form of its files, how they are written and read.

Below ``.dlm/manifest`` lie ``index-<generation>.json``, the files it names (JSON lines, gzip), and
those of the generation before. A file is named after its bytes, so none is ever changed. An index
is one line of JSON and a second one with the digest of the first.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any

from dlm_core.errors import (
    DlmError,
    IntegrityError,
    InvalidValueError,
    PayloadExistsError,
    PayloadNotFoundError,
)
from dlm_core.storages.open import open_storage
from dlm_core.storages.port import PRIVATE, Storage
from dlm_core.transfers.mover import CopyTask, copy_batch
from dlm_core.types import PayloadKind, new_id

FOLDER = f"{PRIVATE}/manifest"
FORMAT = 1
#: the file of what belongs to no storage: collections and holds
SITE = "site"
_INDEX = re.compile(rf"{re.escape(FOLDER)}/index-(\d{{8}})\.json\Z")
_BLOCK = 1 << 20
_IN_MEMORY = 16 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One file of a description: its bytes as they lie there, and how many lines it has."""

    size: int
    digest: str
    lines: int

    def path(self, prefix: str) -> str:
        """Where it lies on its storage."""
        return f"{FOLDER}/{prefix}.{self.digest.removeprefix('sha256:')}.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Index:
    """What a storage says of itself: ``files`` by prefix of uri_bucket, and :data:`SITE`."""

    generation: int
    exported_at: str
    digits: int
    storage: dict[str, Any]
    location: dict[str, Any]
    files: dict[str, File] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it lies on its storage."""
        return f"{FOLDER}/index-{self.generation:08d}.json"

    @property
    def paths(self) -> set[str]:
        """It and its files."""
        return {self.path, *(file.path(prefix) for prefix, file in self.files.items())}


def write_lines(path: Path, lines: Iterable[str]) -> File:
    """Write a local file of JSON lines; the same lines give the same bytes."""
    count = 0
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        for line in lines:
            packed.write(line.encode() + b"\n")
            count += 1
    with open(path, "rb") as written:
        digest = file_digest(written, "sha256").hexdigest()
    return File(path.stat().st_size, f"sha256:{digest}", count)


def write_index(path: Path, index: Index) -> File:
    """Write an index into a local file."""
    files = {p: [f.size, f.digest, f.lines] for p, f in sorted(index.files.items())}
    body = {"format": FORMAT, "generation": index.generation, "exported_at": index.exported_at,
            "digits": index.digits, "storage": index.storage, "location": index.location,
            "files": files}  # fmt: skip
    line = json.dumps(body, sort_keys=True).encode()
    data = line + b"\n" + json.dumps({"sha256": sha256(line).hexdigest()}).encode() + b"\n"
    path.write_bytes(data)
    return File(len(data), f"sha256:{sha256(data).hexdigest()}", 1)


def publish(storage: Storage, folder: Path, files: Sequence[tuple[str, str, File]]) -> None:
    """Bring local files (name in ``folder``, path there, file) to ``storage``, each verified there
    before it becomes visible.

    Raises
    ------
    DlmError
        the first that failed; PayloadExistsError if other bytes lie there.
    """
    local = open_storage("export", "posix", str(folder), {})
    tasks = [
        CopyTask(new_id(), name, path, PayloadKind.FILE, file.size, file.digest, (), str(new_id()))
        for name, path, file in files
    ]
    for result in copy_batch(local, storage, tasks):
        if result.error is not None:
            raise result.error


def replace_damaged(storage: Storage, folder: Path, files: Sequence[tuple[str, str, File]]) -> None:
    """As :func:`publish` for files that are named after their bytes: other bytes there are damage,
    and make way."""
    try:
        publish(storage, folder, files)
    except PayloadExistsError:
        for one in files:
            try:
                publish(storage, folder, [one])
            except PayloadExistsError:
                storage.remove(one[1])
                publish(storage, folder, [one])


# --- reading --------------------------------------------------------------------------------------


def generations(storage: Storage) -> list[int]:
    """The generations of which an index lies on ``storage``, newest first."""
    try:
        found = [_INDEX.match(entry.path) for entry in storage.walk(FOLDER)]
    except PayloadNotFoundError:
        return []
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_index(storage: Storage) -> tuple[Index | None, list[str]]:
    """The newest index on ``storage`` that is whole, None if there is none; and what is wrong with
    newer ones."""
    problems: list[str] = []
    for generation in generations(storage):
        try:
            return read_index(storage, generation), problems
        except DlmError as error:
            problems.append(str(error))
    return None, problems


def read_index(storage: Storage, generation: int) -> Index:
    """One index.

    Raises
    ------
    IntegrityError
        if it is not as it was written.
    InvalidValueError
        if a newer DLM wrote it.
    """
    path = f"{FOLDER}/index-{generation:08d}.json"
    with storage.open_read(path) as stream:
        line, _, proof = stream.read().partition(b"\n")
    found = sha256(line).hexdigest()
    if proof.strip() != json.dumps({"sha256": found}).encode():
        raise IntegrityError(
            where=f"{storage.name}:{path}", expected="the digest in its last line", found=found
        )
    body = json.loads(line)
    if body["format"] != FORMAT:
        raise InvalidValueError(
            what=f"format of {storage.name}:{path}", value=body["format"],
            expected=f"{FORMAT}; another version of the DLM wrote it",
        )  # fmt: skip
    files = {prefix: File(*told) for prefix, told in body["files"].items()}
    return Index(
        generation, body["exported_at"], body["digits"], body["storage"], body["location"], files
    )


@contextmanager
def opened(storage: Storage, prefix: str, file: File) -> Iterator[Iterator[str]]:
    """The lines of a file, after all of it was read and is what the index says.

    Raises
    ------
    IntegrityError
        if it is not.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as kept:
        found = _fetch(storage, file.path(prefix), kept)
        if found != file.digest:
            where = f"{storage.name}:{file.path(prefix)}"
            raise IntegrityError(where=where, expected=file.digest, found=found)
        kept.seek(0)
        with gzip.GzipFile(fileobj=kept, mode="rb") as unpacked:
            yield (line.decode() for line in unpacked)


def _fetch(storage: Storage, path: str, kept: IO[bytes]) -> str:
    hasher = sha256()
    with storage.open_read(path) as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
            kept.write(block)
    return f"sha256:{hasher.hexdigest()}"
