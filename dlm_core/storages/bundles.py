"""Small files in bundles: a wrapper around any adapter, which behind the port changes nothing.

A new file is written to the inner storage as it is. :mod:`.packing` later puts small ones into
tars below ``.dlm/bundles`` and removes them; from then on they are *members*, found by the index
(:mod:`.bundle_index`). To rename or remove a member is a record in the index's log. What lies
below ``.dlm`` is never packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from dlm_core.errors import (
    DlmError,
    PathRefusedError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages.bundle_index import BundleIndex, Change
from dlm_core.storages.bundle_tar import Member, tar_path
from dlm_core.storages.cold import ColdStorage, beneath
from dlm_core.storages.config import read_config
from dlm_core.storages.port import (
    PRIVATE,
    Entry,
    Readable,
    ReadStream,
    Storage,
    Usage,
    remove_file,
    temp_path,
)
from dlm_core.storages.ranges import open_range

_TEMP = temp_path("")
# looks before a storage counts as too busy: each is void only if what it missed was moved meanwhile
_LOOKS = 5
_PAGE = 1000
_T = TypeVar("_T")
#: size and time of change of single files, before they are moved or removed
_Before = dict[str, tuple[int, float]]


class BundleConfig(BaseModel):
    """What ``config`` of any storage may hold beside what its interface needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle_bytes: ByteSize = Field(
        gt=0, description="Bundles of about this size, e.g. 10GiB. Set: small files are bundled."
    )
    bundle_below: ByteSize = Field(
        ByteSize(64 << 20), gt=0, description="Files smaller than this are bundled."
    )
    bundle_after_hours: float = Field(
        24, ge=0, le=876_600, description="What has waited so long is bundled, however little."
    )
    repack_share: float = Field(
        0.5, gt=0, le=1, description="A bundle of which more than this share went is made anew."
    )


def split_bundling(
    name: str, config: Mapping[str, Any]
) -> tuple[BundleConfig | None, dict[str, Any]]:
    """The part of a storage's config that is about bundles, if it has any, and the rest."""
    mine = {key: value for key, value in config.items() if key in BundleConfig.model_fields}
    rest = {key: value for key, value in config.items() if key not in mine}
    return (read_config(BundleConfig, name, mine) if mine else None), rest


class Bundled:
    """A storage whose small files are packed; see :class:`dlm_core.storages.port.Storage`."""

    def __init__(self, inner: Storage, config: BundleConfig) -> None:
        self.inner, self.config = inner, config
        self.name = inner.name
        # what says where everything lies has to be read at any time: it is kept online
        self.index = BundleIndex(beneath(inner))
        self.atomic_write = bool(getattr(inner, "atomic_write", False))
        self.remote = bool(getattr(inner, "remote", False))
        self.tells_content = bool(getattr(inner, "tells_content", False))
        # what the mover asks for goes to temporary names, or is about them
        for passed in ("part_size", "read_back", "digest_many", "take_many", "forget_parts"):
            if (found := getattr(inner, passed, None)) is not None:
                setattr(self, passed, found)
        for own in ("write_many", "rename_many", "write_in_parts"):
            if getattr(inner, own, None) is not None:
                setattr(self, own, getattr(self, f"_{own}"))

        if isinstance(inner, ColdStorage):
            # a member is staged with its bundle, and all of one bundle's by one request
            self.stager, self.terms = inner.stager, inner.terms
            self.renames_read = inner.renames_read

    def over(self, around: Callable[[Storage], Storage]) -> Bundled:
        """These bundles, by the same index, with something around the adapter below."""
        inner = self.inner
        if isinstance(inner, ColdStorage):
            inner = cast(Storage, ColdStorage(around(inner.inner), inner.stager, inner.terms))
        else:
            inner = around(inner)
        found = Bundled(inner, self.config)
        found.index = self.index
        return found

    @property
    def concurrency(self) -> int:
        return self.inner.concurrency

    @concurrency.setter
    def concurrency(self, value: int) -> None:
        self.inner.concurrency = value

    # --- looking ---------------------------------------------------------------------------------

    def stat(self, path: str) -> Entry | None:
        found = self.stat_many([path])[path]
        if found is None and not _is_temporary(path):
            if self.index.look(lambda: self.index.is_folder(path), fresh=False):
                return Entry(path, 0, 0.0, "directory")
        return found

    def stat_many(self, paths: Iterable[str]) -> dict[str, Entry | None]:
        wanted = list(dict.fromkeys(paths))
        if all(map(_is_temporary, wanted)):
            return self.inner.stat_many(wanted)

        def look(members: Mapping[str, Member]) -> dict[str, Entry | None]:
            found = self._told(members)
            single = [path for path in wanted if path not in members]
            return found | (self.inner.stat_many(single) if single else {})

        found: dict[str, Entry | None] = {}
        for found in self._looks(wanted, look):
            if all(found.values()):
                break
        return found

    def _looks(
        self, paths: Sequence[str], look: Callable[[Mapping[str, Member]], _T]
    ) -> Iterator[_T]:
        """What ``look`` finds, told which of ``paths`` are members: for whoever misses something,
        again for as long as the index has changed its mind of them meanwhile."""
        members = self._members(paths, fresh=True)
        for _ in range(_LOOKS):
            yield look(members)
            before, members = members, self._members(paths, fresh=True)
            if members == before:
                return
        raise self._unavailable("its bundles change too fast to look at it")

    def _unavailable(self, message: str) -> StorageUnavailableError:
        return StorageUnavailableError(storage=self.name, message=message)

    def _members(self, paths: Iterable[str], *, fresh: bool = False) -> dict[str, Member]:
        def look() -> dict[str, Member]:
            found = ((path, self.index.get(path)) for path in paths)
            return {path: member for path, member in found if member is not None}

        return self.index.look(look, fresh=fresh)

    def _told(self, members: Mapping[str, Member]) -> dict[str, Entry | None]:
        """Entries of members, as far as their bundles are there."""
        tars = self.inner.stat_many({tar_path(m.bundle) for m in members.values()})
        return {path: _entry(path, m, tars[tar_path(m.bundle)]) for path, m in members.items()}

    def walk(self, path: str = "") -> Iterator[Entry]:
        if not path:
            # in two runs: single files, then members
            yield from self._walk(path)
            return
        found = sorted(self._walk(path), key=lambda entry: entry.path)
        if not found:
            entry = self.inner.stat(path)
            if entry is None or entry.kind != "directory":
                raise PayloadNotFoundError(storage=self.name, path=path)
        yield from found

    def _walk(self, path: str) -> Iterator[Entry]:
        # single files first: what is packed meanwhile is a member by the time it is no file
        seen: set[str] = set()
        singles = self._single(path)
        while page := list(islice(singles, _PAGE)):
            members = self.index.look(lambda page=page: self._members(e.path for e in page))  # type: ignore[misc]
            for entry in page:
                if entry.path not in members:
                    if entry.size < self.config.bundle_below:
                        seen.add(entry.path)
                    yield entry
        hidden = not path.startswith(PRIVATE)
        after = f"{path}/" if path else ""
        while members := self.index.look(lambda after=after: self._page(path, after)):  # type: ignore[misc]
            for name, told in self._told(members).items():
                if told and name not in seen and not (hidden and name.startswith(f"{PRIVATE}/")):
                    yield told
            after = f"{next(reversed(members))}\0"

    def _single(self, path: str) -> Iterator[Entry]:
        """Single files below ``path``; none if all that is there are members."""
        with suppress(PayloadNotFoundError):
            yield from self.inner.walk(path)

    def _page(self, path: str, after: str) -> dict[str, Member]:
        return dict(islice(self.index.since(after, f"{path}/" if path else ""), _PAGE))

    def open_read(self, path: str) -> ReadStream:
        if _is_temporary(path):
            return self.inner.open_read(path)

        def look(members: Mapping[str, Member]) -> ReadStream | None:
            with suppress(PayloadNotFoundError):
                if (member := members.get(path)) is None:
                    return self.inner.open_read(path)
                tar = tar_path(member.bundle)
                return open_range(self.inner, tar, member.offset, member.size)
            return None

        for stream in self._looks([path], look):
            if stream is not None:
                return stream
        if self.index.look(lambda: self.index.is_folder(path), fresh=False):
            raise PathRefusedError(storage=self.name, path=path, message="not a regular file")
        raise PayloadNotFoundError(storage=self.name, path=path)

    # --- staging, on a cold storage ---------------------------------------------------------------

    def look(self, paths: Sequence[str]) -> set[str]:
        """Those of ``paths`` that are online: see :meth:`ColdStorage.look`."""
        places = self._places(paths)
        online = cast(ColdStorage, self.inner).look(sorted(set(places.values())))
        return {path for path, place in places.items() if place in online}

    def stage(self, paths: Sequence[str]) -> None:
        """Ask for the files in which ``paths`` lie: see :meth:`ColdStorage.stage`."""
        cast(ColdStorage, self.inner).stage(sorted(set(self._places(paths).values())))

    def _places(self, paths: Sequence[str]) -> dict[str, str]:
        """The file in which each path lies: its bundle, or itself."""
        members = self._members(paths)
        return {path: tar_path(members[path].bundle) if path in members else path for path in paths}

    # --- writing ---------------------------------------------------------------------------------

    def write(self, path: str, source: Readable, size: int) -> str | None:
        return self._write_free(path, lambda: self.inner.write(path, source, size))

    def _write_in_parts(self, path: str, *rest: Any) -> str | None:
        write: Callable[..., str | None] = self.inner.write_in_parts  # type: ignore[attr-defined]
        return self._write_free(path, lambda: write(path, *rest))

    def _write_free(self, path: str, write: Callable[[], str | None]) -> str | None:
        if _is_temporary(path):
            return write()
        self._must_be_free(path)
        etag = write()
        try:
            self._must_be_free(path)
        except PayloadExistsError:
            self.inner.remove(path)  # what was there was packed while we wrote
            raise
        return etag

    def _write_many(self, files: Sequence[tuple[str, bytes]]) -> list[DlmError | None]:
        if all(_is_temporary(path) for path, _ in files):
            return list(self.inner.write_many(files))  # type: ignore[attr-defined]
        return [_error_of(lambda f=f: self.write(f[0], BytesIO(f[1]), len(f[1]))) for f in files]  # type: ignore[misc]

    def _must_be_free(self, path: str, *, fresh: bool = True) -> None:
        def look() -> tuple[bool, bool]:
            taken = self.index.get(path) is not None or self.index.is_folder(path)
            return taken, self.index.being_cleaned(path)

        taken, waiting = self.index.look(look, fresh=fresh)
        if taken:
            raise PayloadExistsError(storage=self.name, path=path)
        if waiting:
            raise self._unavailable(f"what was at {path} is being packed")

    def flush(self) -> None:
        self.inner.flush()

    # --- moving ----------------------------------------------------------------------------------

    def rename(self, source: str, destination: str) -> None:
        if not _is_temporary(source) and self._rename_member(source, destination):
            return
        for _ in range(_LOOKS):
            if self._rename(source, destination):
                return
        raise self._unavailable("its bundles change too fast to rename in it")

    def _rename_member(self, source: str, destination: str) -> bool:
        """The usual case, decided within the change itself: what others want meanwhile goes along.
        False if it is another case."""
        taken = self.inner.stat(destination) is not None

        def decide() -> list[Change]:
            if not self._is_settled(source):
                return []
            if taken:
                raise PayloadExistsError(storage=self.name, path=destination)
            return self._move(source, destination)

        return bool(self._change(decide))

    def _is_settled(self, path: str) -> bool:
        return self.index.get(path) is not None and not self.index.being_cleaned(path)

    def _rename_many(self, pairs: Sequence[tuple[str, str]]) -> list[DlmError | None]:
        if not all(_is_temporary(source) for source, _ in pairs):
            return [_error_of(lambda p=p: self.rename(*p)) for p in pairs]  # type: ignore[misc]
        self.index.refresh()
        errors = [_error_of(lambda d=d: self._must_be_free(d, fresh=False)) for _, d in pairs]  # type: ignore[misc]
        free = [pair for pair, error in zip(pairs, errors, strict=True) if error is None]
        done = dict(zip(free, self.inner.rename_many(free), strict=True))  # type: ignore[attr-defined]
        self.index.refresh()
        for pair, error in done.items():
            if error is None:
                done[pair] = _error_of(lambda p=pair: self._take_back(*p))  # type: ignore[misc]
        return [error or done[pair] for pair, error in zip(pairs, errors, strict=True)]

    def _take_back(self, source: str, destination: str) -> None:
        """Undo a rename to where a member appeared meanwhile."""
        try:
            self._must_be_free(destination, fresh=False)
        except PayloadExistsError:
            self.inner.rename(destination, source)
            raise

    def _rename(self, source: str, destination: str) -> bool:
        """False if what is to be renamed was packed meanwhile."""
        if _is_temporary(source):
            self._must_be_free(destination)
            self.inner.rename(source, destination)
            self.index.refresh()
            self._take_back(source, destination)
            return True
        own, folder, goes_on = self.index.look(
            lambda: (
                self.index.get(source),
                self.index.is_folder(source),
                self.index.moving.get(source) == destination,
            )
        )
        if own is None and (not folder or self._is_file(source)):
            return self._rename_single(source, destination)
        if not goes_on:
            self._must_be_free(destination, fresh=False)
            if self.inner.stat(destination) is not None:
                raise PayloadExistsError(storage=self.name, path=destination)
        if own is not None:
            self._forget_single(source)
        else:
            self._move_singles(source, destination)
        self._change(lambda: self._move(source, destination))
        return True

    def _is_file(self, path: str) -> bool:
        """Whether it is a single file: an object store may have members below its name."""
        entry = self.inner.stat(path)
        return entry is not None and entry.kind == "file"

    def _move(self, source: str, destination: str) -> list[Change]:
        if self.index.get(source) is None and not self.index.is_folder(source):
            raise PayloadNotFoundError(storage=self.name, path=source)
        if self.index.get(destination) is not None or self.index.is_folder(destination):
            raise PayloadExistsError(storage=self.name, path=destination)
        return [["move", source, destination]]

    def _forget_single(self, path: str) -> None:
        """The single file that a member was made of goes first: else it would come to light."""
        if self.index.look(lambda: self.index.being_cleaned(path), fresh=False):
            remove_file(self.inner, path)

    def _move_singles(self, source: str, destination: str) -> None:
        """Of a tree, what is not packed; who is interrupted here goes on where it was."""
        for path in self.index.look(lambda: self._uncleaned(source), fresh=False):
            remove_file(self.inner, path)
        if self.inner.stat(source) is None:
            return
        self._change(lambda: [["moving", source, destination]])
        with suppress(PayloadNotFoundError):
            self.inner.rename(source, destination)

    def _uncleaned(self, path: str) -> list[str]:
        top = f"{path}/"
        waiting = self.index.cleaning.values()
        return [one for paths in waiting for one in paths if one == path or one.startswith(top)]

    def _rename_single(self, source: str, destination: str) -> bool:
        try:
            self._must_be_free(destination, fresh=False)
        except PayloadExistsError:
            if self.inner.stat(source) is None:  # moved by an earlier try, perhaps
                raise PayloadNotFoundError(storage=self.name, path=source) from None
            raise
        before = self._announce(source)
        try:
            self.inner.rename(source, destination)
        except PayloadNotFoundError:
            if self.index.look(lambda: self.index.get(source) or self.index.is_folder(source)):
                return False
            raise
        self._take_leave(source, before)
        self._take_back(source, destination)
        return True

    # --- removing --------------------------------------------------------------------------------

    def remove(self, path: str) -> None:
        if _is_temporary(path):
            self.inner.remove(path)
            return
        if self._change(lambda: [["remove", path]] * self._is_settled(path)):
            return
        if self._is_member(path):
            self._forget_single(path)
            self._change(lambda: [["remove", path]] * (self.index.get(path) is not None))
            return
        before = self._announce(path)
        members = path not in before and self.index.look(
            lambda: next(self.index.below(path), None) is not None
        )
        self.inner.remove(path)
        if members:
            self._change(lambda: [["remove", path]])
        else:
            self._take_leave(path, before)

    def _is_member(self, path: str) -> bool:
        return self.index.look(lambda: self.index.get(path), fresh=False) is not None

    def _announce(self, path: str) -> _Before:
        """Tell a packer at work that single files go, and keep what they are."""
        if path.startswith(f"{PRIVATE}/"):
            return {}  # never packed
        entry = self.inner.stat(path)
        if entry is None:
            return {}
        found = list(self.inner.walk(path)) if entry.kind == "directory" else [entry]
        if self.index.look(lambda: self.index.open) is not None:
            self._change(lambda: [["gone", path]])
        return {one.path: (one.size, one.mtime) for one in found}

    def _take_leave(self, path: str, before: _Before) -> None:
        """The single files went; if they were packed meanwhile their members go too."""

        def decide() -> list[Change]:
            packed = [
                name
                for name, member in self.index.below(path)
                if name in before and member.was(*before[name])
            ]
            late = self.index.open is not None and path not in self.index.gone
            return [["remove", name] for name in packed] + [["gone", path]] * late

        if not before:
            return
        if self.index.look(decide):
            self._change(decide)

    def _change(self, decide: Callable[[], Sequence[Change]]) -> Sequence[Change]:
        """Change the index; bundles that are empty now are removed at once."""
        changes = self.index.change(decide)
        if not changes:
            return changes
        empty = self.index.look(lambda: set(self.index.dropped), fresh=False)
        if empty:
            sweep(self, empty)
        return changes

    # --- the storage as a whole ------------------------------------------------------------------

    def usage(self) -> Usage | None:
        return self.inner.usage()

    def check(self) -> None:
        self.inner.check()
        self.index.refresh()


def sweep(storage: Bundled, bundles: Iterable[str]) -> None:
    """Remove bundles that hold nothing any more, for good; their lists go with the next fold."""
    inner, swept = storage.inner, sorted(bundles)
    inner.flush()  # the record that says so comes first
    for bundle in swept:
        for path in (tar_path(bundle), temp_path(f"bundle/{bundle}")):
            inner.remove(path)
    storage.index.change(lambda: [["swept", swept]])


def _is_temporary(path: str) -> bool:
    return path.startswith(_TEMP)


def _entry(path: str, member: Member, tar: Entry | None) -> Entry | None:
    """What can be said of a member: as much of it as its bundle is long enough for."""
    if tar is None:
        return None
    size = max(0, min(member.size, tar.size - member.offset))
    etag = f"{tar.etag}.{member.number}" if tar.etag else None
    return Entry(path, size, member.mtime, "file", etag)


def _error_of(call: Callable[[], object]) -> DlmError | None:
    try:
        call()
    except DlmError as error:
        return error
    return None
