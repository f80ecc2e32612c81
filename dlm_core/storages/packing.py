"""Put the small single files of a storage into bundles, and make bundles anew that are half empty.

A bundle counts only when it has been written, read back with a reader of plain tars and listed in
the index; its single files go only after that. Each step is a record in the index's log, so that
whoever comes after a crash goes on, or undoes what did not count yet. See docs/decisions/0022.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice

from dlm_core.errors import (
    DestinationDamagedError,
    DlmError,
    PackingError,
    PayloadNotFoundError,
    StorageUnavailableError,
)
from dlm_core.storages.bundle_index import Bundle, Change
from dlm_core.storages.bundle_tar import (
    Layout,
    Member,
    Part,
    TarSource,
    list_path,
    read_tar,
    tar_path,
)
from dlm_core.storages.bundle_writing import write_new
from dlm_core.storages.bundles import Bundled, sweep
from dlm_core.storages.cold import ColdStorage
from dlm_core.storages.port import Entry, Readable, remove_file, temp_path
from dlm_core.storages.prefetch import Prefetched
from dlm_core.storages.ranges import open_range
from dlm_core.types import new_id

_PAGE = 1000
_MOST_MEMBERS = 100_000
_MOST_THREADS = 16
#: bytes that a member takes in a tar beside its own, about
_OVERHEAD = 1024

#: of these single files those that may be packed, with the digest that their bytes must have
Known = Callable[[Sequence[Entry]], Mapping[str, str | None]]


@dataclass(slots=True)
class PackReport:
    """What was packed, or would be: bundles made of ``members`` (files; ``bytes`` of them), of
    which ``moved`` came out of bundles half empty; ``refused`` had other bytes than they should;
    ``removed`` bundles, ``freed`` bytes of tars; ``waiting`` files are too few for a bundle yet;
    ``offline`` files were not read: single ones stay as they are, bundles were asked for."""

    storage: str
    bundles: int = 0
    members: int = 0
    bytes: int = 0
    moved: int = 0
    refused: list[str] = field(default_factory=list)
    removed: int = 0
    freed: int = 0
    waiting: int = 0
    offline: int = 0


@dataclass(slots=True)
class _Group:
    """What goes into one bundle: members of older ones, and single files."""

    old: list[tuple[str, Member]] = field(default_factory=list)
    single: dict[str, str | None] = field(default_factory=dict)
    size: int = 0
    oldest: float = float("inf")

    def __len__(self) -> int:
        return len(self.old) + len(self.single)


def pack(
    storage: Bundled,
    known: Known,
    now: datetime,
    *,
    dry_run: bool = False,
    stop: threading.Event | None = None,
) -> PackReport:
    """Pack what is due. One at a time: who begins undoes what another has open; both stay safe.

    Parameters
    ----------
    known : asked of single files, some at once; those that it leaves out stay as they are.
    stop : ends it after the bundle that is being made.

    Raises
    ------
    StorageError
        what was begun is undone now, or by the next one.
    """
    report = PackReport(storage.name)
    before = dict(storage.index.look(lambda: storage.index.bundles))
    if not dry_run:
        tidy(storage)
    for group in _groups(storage, known, now, report, dry_run):
        if stop is not None and stop.is_set():
            break
        report.bundles += 1
        if dry_run:
            report.members += len(group)
            report.bytes += group.size - _OVERHEAD * len(group)
            report.moved += len(group.old)
        else:
            _pack(storage, group, report)
    if not dry_run:
        _clear_away(storage)
        gone = before.keys() - storage.index.look(lambda: storage.index.bundles).keys()
        report.removed, report.freed = len(gone), sum(before[one].size for one in gone)
    return report


def finish(storage: Bundled) -> PackReport:
    """Finish or undo what a packing or a removal left, and pack nothing: for a storage that is to
    become empty. ``removed`` are bundles that held nothing any more, whose size nobody knows.

    Raises
    ------
    StorageError
    """
    index = storage.index
    before = index.look(lambda: index.bundles.keys() | index.dropped)
    _clear_away(storage)
    after = index.look(lambda: index.bundles.keys() | index.dropped)
    return PackReport(storage.name, removed=len(before - after))


def _clear_away(storage: Bundled) -> None:
    tidy(storage)
    storage.index.clear_away()


# --- what is due ----------------------------------------------------------------------------------


def removed_share(bundle: Bundle) -> float:
    """How much of a bundle went, from 0 to 1."""
    if bundle.bytes:
        return 1 - bundle.live_bytes / bundle.bytes
    return 1 - bundle.live / bundle.members if bundle.members else 1.0


def _groups(
    storage: Bundled, known: Known, now: datetime, report: PackReport, dry_run: bool
) -> Iterator[_Group]:
    group = _Group()
    for path, member in _half_empty(storage, report, dry_run):
        group.old.append((path, member))
        group.size += member.size + _OVERHEAD
        if _is_full(storage, group):
            yield group
            group = _Group()
    for entry, digest in _singles(storage, known, report):
        group.single[entry.path] = digest
        group.size += entry.size + _OVERHEAD
        group.oldest = min(group.oldest, entry.mtime)
        if _is_full(storage, group):
            yield group
            group = _Group()
    limit = (now - timedelta(hours=storage.config.bundle_after_hours)).timestamp()
    if group.old or group.oldest <= limit:
        yield group
    else:
        report.waiting = len(group)


def _is_full(storage: Bundled, group: _Group) -> bool:
    return group.size >= storage.config.bundle_bytes or len(group) >= _MOST_MEMBERS


def _half_empty(
    storage: Bundled, report: PackReport, dry_run: bool
) -> Iterator[tuple[str, Member]]:
    """Members of bundles of which too much went, by bundle only as far as the index is sorted."""
    index = storage.index
    share = storage.config.repack_share
    chosen = index.look(
        lambda: {name for name, b in index.bundles.items() if removed_share(b) > share}
    )
    tars = {tar_path(name): name for name in chosen}
    away = set() if dry_run else _offline(storage, list(tars), report)
    if away:
        storage.stage(sorted(away))  # the next packing finds them
    chosen -= {tars[path] for path in away}
    after = ""
    while chosen and (page := index.look(lambda a=after: list(islice(index.since(a, ""), _PAGE)))):  # type: ignore[misc]
        yield from ((path, member) for path, member in page if member.bundle in chosen)
        after = f"{page[-1][0]}\0"


def _offline(storage: Bundled, paths: Sequence[str], report: PackReport) -> set[str]:
    """Those of ``paths`` that a cold storage does not have online."""
    if not isinstance(storage.inner, ColdStorage) or not paths:
        return set()
    away = set(paths) - storage.inner.look(paths)
    report.offline += len(away)
    return away


def _singles(
    storage: Bundled, known: Known, report: PackReport
) -> Iterator[tuple[Entry, str | None]]:
    entries = storage.inner.walk()
    while page := list(islice(entries, _PAGE)):
        small = [e for e in page if e.kind == "file" and e.size < storage.config.bundle_below]
        packed = storage.index.look(lambda s=small: [storage.index.get(e.path) for e in s])  # type: ignore[misc]
        single = [entry for entry, member in zip(small, packed, strict=True) if member is None]
        away = _offline(storage, [entry.path for entry in single], report)
        single = [entry for entry in single if entry.path not in away]
        digests = known(single) if single else {}
        yield from ((entry, digests[entry.path]) for entry in single if entry.path in digests)


# --- one bundle -----------------------------------------------------------------------------------


def _pack(storage: Bundled, group: _Group, report: PackReport) -> None:
    bundle = str(new_id())
    storage.index.change(lambda: _begin(storage, bundle))
    try:
        layout = Layout(bundle, _parts(storage, group))
        source = _write(storage, layout)
        changes = storage.index.change(lambda: _add(storage, source))
    except BaseException:
        with suppress(DlmError):  # the next one does it, if this storage is down
            _abort(storage, bundle)
        raise
    storage.inner.flush()
    report.refused.extend(layout.parts[number].path for number in source.refused)
    if changes[-1][0] != "add":
        return
    taken = set(source.digests) - set(changes[-1][3])
    report.members += len(taken)
    report.bytes += sum(layout.parts[n].size for n in taken)
    report.moved += sum(n < changes[-1][4] for n in taken)
    clean(storage, bundle)


def _begin(storage: Bundled, bundle: str) -> list[Change]:
    if storage.index.open is not None:
        raise PackingError(storage=storage.name)
    return [["begin", bundle]]


def _parts(storage: Bundled, group: _Group) -> list[Part]:
    """What is there now, after it was told to all that a bundle is made: older members first."""
    inner = storage.inner
    parts = [
        Part(
            path, m.size, m.mtime, m.digest,
            partial(open_range, inner, tar_path(m.bundle), m.offset, m.size), m,
        )
        for path, m in group.old
    ]  # fmt: skip
    found = inner.stat_many(group.single) if group.single else {}
    for path, digest in group.single.items():
        entry = found[path]
        if entry is not None and entry.kind == "file":
            source = partial(inner.open_read, path)
            parts.append(Part(path, entry.size, entry.mtime, digest, source))
    return parts


class _Reader:
    """Blocks, made in another thread, as what a storage writes from."""

    def __init__(self, blocks: Prefetched) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return bytes(self._rest) + b"".join(self._blocks)
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        taken = self._rest[:size]
        self._rest = self._rest[size:]
        return bytes(taken)


def _write(storage: Bundled, layout: Layout) -> TarSource:
    """Write a tar, read it back, give it its name and list its members; all of it is durable."""
    inner, bundle = storage.inner, layout.bundle
    source = TarSource(layout, min(inner.concurrency, _MOST_THREADS))
    final = tar_path(bundle)
    written = final if storage.atomic_write else temp_path(f"bundle/{bundle}")
    with closing(Prefetched(source.blocks())) as blocks:
        inner.write(written, _Reader(blocks), layout.size)
    inner.flush()
    with getattr(inner, "read_back", inner.open_read)(written) as stream:
        _compare(storage, stream, source)
    if written != final:
        inner.rename(written, final)
    write_new(inner, list_path(bundle), source.listing)
    inner.flush()
    return source


def _compare(storage: Bundled, stream: Readable, source: TarSource) -> None:
    """Read a tar back as anybody would: every member has to be where and what the index says."""
    layout = source.layout
    wanted = {
        (part.path, layout.offsets[n], part.size, source.digests[n])
        for n, part in enumerate(layout.parts)
        if n in source.digests
    }
    listing = None
    try:
        for found in read_tar(stream, layout.bundle):
            wanted.discard((found.path, found.offset, found.size, found.digest))
            listing = found.data if found.data is not None else listing
    except (tarfile.TarError, PayloadNotFoundError) as error:
        raise _damaged(storage, layout, str(error)) from error
    if wanted or listing != source.listing:
        raise _damaged(storage, layout, f"{len(wanted)} members with other bytes")


def _damaged(storage: Bundled, layout: Layout, found: str) -> DestinationDamagedError:
    return DestinationDamagedError(
        where=f"{storage.name}:{tar_path(layout.bundle)}",
        expected=f"{len(layout.parts)} members as they were written",
        found=found,
    )


def _add(storage: Bundled, source: TarSource) -> list[Change]:
    """The record by which a bundle counts, with all that happened to its members meanwhile."""
    index, layout = storage.index, source.layout
    if index.open != layout.bundle:
        raise PackingError(storage=storage.name)
    without = [
        number
        for number, part in enumerate(layout.parts)
        if number in source.digests
        and (index.get(part.path) != part.token or (part.token is None and _went(storage, part)))
    ]
    if len(without) == len(source.digests):
        return [["abort", layout.bundle]]
    first_single = sum(part.token is not None for part in layout.parts)
    return [["add", layout.bundle, layout.size, without, first_single]]


def _went(storage: Bundled, part: Part) -> bool:
    names = part.path.split("/")
    return any("/".join(names[:n]) in storage.index.gone for n in range(1, len(names) + 1))


# --- tidying up -----------------------------------------------------------------------------------


def tidy(storage: Bundled) -> None:
    """Finish or undo what was begun: nothing that counts is touched."""
    index = storage.index
    begun = index.look(lambda: index.open)
    if begun is not None:
        _abort(storage, begun)
    for bundle in index.look(lambda: list(index.cleaning)):
        clean(storage, bundle)
    garbage = index.look(lambda: set(index.garbage))
    if garbage:
        sweep(storage, garbage)


def _abort(storage: Bundled, bundle: str) -> None:
    """Give a bundle up, unless it counts already; its files go after all have been told so."""
    index, counts = storage.index, True

    def decide() -> list[Change]:
        nonlocal counts
        counts = bundle in index.bundles
        return [["abort", bundle]] if index.open == bundle else []

    index.change(decide)
    if not counts:
        sweep(storage, [bundle])


def clean(storage: Bundled, bundle: str) -> None:
    """Remove the single files that a bundle was made of; nobody writes there until it is done.

    A file that somebody changed meanwhile is not ours and stays, hidden by the member.

    Raises
    ------
    StorageError
        if one is still there after its removal: the next packing goes on.
    """
    inner, index = storage.inner, storage.index
    inner.flush()  # the record by which the bundle counts comes first
    paths = iter(index.look(lambda: list(index.cleaning.get(bundle, ()))))
    with ThreadPoolExecutor(inner.concurrency, "dlm-clean") as pool:
        while page := list(islice(paths, _PAGE)):
            members = index.look(lambda p=page: [index.get(path) for path in p])  # type: ignore[misc]
            entries = inner.stat_many(page)
            same = [
                path
                for path, member in zip(page, members, strict=True)
                if member is not None
                and member.bundle == bundle
                and _is_same(member, entries[path])
            ]
            list(pool.map(partial(remove_file, inner), same))
            _confirm_gone(storage, same)
    inner.flush()
    index.change(lambda: [["clean", bundle]] if bundle in index.cleaning else [])


def _confirm_gone(storage: Bundled, paths: Sequence[str]) -> None:
    # a reply may be wrong, and nobody would look there again; a "directory" is what lies below the
    # name of an object that went
    there = storage.inner.stat_many(paths) if paths else {}
    left = [path for path, entry in there.items() if entry is not None and entry.kind == "file"]
    if left:
        raise StorageUnavailableError(
            storage=storage.name, message=f"{left[0]} is still there after its removal"
        )


def _is_same(member: Member, entry: Entry | None) -> bool:
    return entry is not None and member.was(entry.size, entry.mtime)
