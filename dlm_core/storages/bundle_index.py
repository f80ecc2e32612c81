"""Which member lies where: a log on the storage itself, which every worker follows.

The log is numbered files, one a change, each made by an operation that never overwrites. So who
writes number n + 1 has seen all up to n; whoever comes second is refused, looks again and decides
anew. No clock, lock or leader is needed for that. What a record says is applied by everybody in the
same order. From time to time all is folded into a sorted file (:mod:`.bundle_base`), which a record
names; records far behind it are removed, lowest first.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dlm_core.errors import (
    DlmError,
    PayloadExistsError,
    PayloadNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from dlm_core.storages.bundle_base import (
    BASES,
    Base,
    SupersededError,
    write_base,
)
from dlm_core.storages.bundle_tar import FOLDER, Member, list_path, parse_listing
from dlm_core.storages.bundle_writing import write_record
from dlm_core.storages.port import Storage

#: where the log lies
LOG = f"{FOLDER}/log"
# records after which the log is folded, and entries in memory after which it is
_FOLD_RECORDS = 64
_FOLD_ENTRIES = 20_000
# records that stay behind a fold: who is further behind than that cannot write
_KEPT_RECORDS = 256

#: a word and what it is about; :meth:`BundleIndex._apply` says what each means
Change = list[Any]
_T = TypeVar("_T")


@dataclass(slots=True)
class Bundle:
    """A tar on the storage: its size in bytes, and how much of it is still wanted."""

    size: int
    members: int = 0
    bytes: int = 0
    live: int = 0
    live_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Wish:
    """What one thread wants to change, and how that ended."""

    decide: Callable[[], Sequence[Change]]
    changes: Sequence[Change] = ()
    error: BaseException | None = None
    done: bool = False


class BundleIndex:
    """The index of one storage's bundles, as far as this process has followed it. Thread-safe:
    :attr:`lock` is held while it is looked at."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        #: behind the number of a record, where that names the folder in which it lies
        self._within = "/record" if getattr(storage, "exclusive", None) == "folder" else ""
        self.lock = threading.RLock()
        self._looked = 0.0
        self._wishing = threading.Lock()
        self._wishes: list[_Wish] = []
        self._tokens: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Know nothing, and conclude nothing from that."""
        self._clear(Base(self._storage, None), 0)
        self._known, self._looked = False, 0.0

    def _clear(self, base: Base, generation: int) -> None:
        head = base.head
        self._base, self.generation, self._based_on = base, generation, generation
        self._changed: dict[str, Member | None] = {}
        self._keys: list[str] = []
        self.bundles = {name: Bundle(*row) for name, row in head.get("bundles", {}).items()}
        #: the bundle that is being made, and paths that went meanwhile
        self.open: str | None = head.get("open")
        self.gone: set[str] = set(head.get("gone", ()))
        #: by bundle, paths whose single files are still to be removed, in order
        self.cleaning: dict[str, list[str]] = dict(head.get("cleaning", {}))
        #: trees of which single files are being moved; their members follow
        self.moving: dict[str, str] = dict(head.get("moving", {}))
        #: bundles whose files are to be removed
        self.garbage: set[str] = set(head.get("garbage", ()))
        #: those of them that held nothing any more; the others never counted
        self.dropped: set[str] = set(head.get("dropped", ()))
        # lists of bundles that were removed: who reads the log from before the fold needs them
        self._lists: set[str] = set()
        self._old_lists: list[str] = head.get("lists", [])

    # --- following the log -----------------------------------------------------------------------

    def refresh(self) -> None:
        """Follow the log to its end as it is now.

        Raises
        ------
        StorageUnavailableError
            if it cannot be read, or a part of it is missing: nothing is concluded from a part.
        """
        asked = time.monotonic()
        with self.lock:
            if self._looked > asked:
                return  # somebody began to look after we asked
            begun = time.monotonic()
            self._tokens = set()
            try:
                self._catch_up()
            except SupersededError:
                self._begin_anew()
            except BaseException:
                self._forget()  # half of a record may have been followed
                raise
            self._known, self._looked = True, begun

    def _begin_anew(self) -> None:
        try:
            self._load()
            self._known = True
        except BaseException:
            self._forget()
            raise

    def _catch_up(self) -> None:
        if self.generation == 0:
            if self._storage.stat(FOLDER) is None:
                return
            self._load()
        # also behind a listing, which may leave out what is newest
        while self.generation and not self._is_at_end():
            self._load()

    def _is_at_end(self) -> bool:
        """Follow the log; False if it went on so far that records in between were removed.

        The next is asked for first: a record is removed only after all before it, so if this one is
        there still, the next was not there either when it was asked for.
        """
        while self._stat(self.generation + 1):
            try:
                record = self._read(self.generation + 1)
            except PayloadNotFoundError:
                break
            self._follow(record)
        return self._stat(self.generation)

    def look(self, work: Callable[[], _T], *, fresh: bool = True) -> _T:
        """What ``work`` finds in the index as it is now; as it was last known unless ``fresh``."""
        if fresh:
            self.refresh()  # without the lock: who waits for it shares what the other found
        with self.lock:
            if not self._known:
                self.refresh()
            try:
                return work()
            except SupersededError:
                self._begin_anew()
                return work()

    def _record(self, generation: int) -> str:
        return _place(generation) + self._within

    def _stat(self, generation: int) -> bool:
        return self._storage.stat(self._record(generation)) is not None

    def _read(self, generation: int) -> dict[str, Any]:
        with self._storage.open_read(self._record(generation)) as stream:
            data = stream.read(-1)
        try:
            record: dict[str, Any] = json.loads(data)
        except ValueError:
            raise self._broken(f"record {generation} is damaged") from None
        return record

    def _broken(self, what: str) -> StorageUnavailableError:
        return StorageUnavailableError(
            storage=self._storage.name,
            message=f"the index of its bundles is not whole: {what}; "
            "see 'dlm storage pack --reindex'",
        )

    def numbers(self) -> list[int]:
        """Numbers of the records that lie there, in order."""
        try:
            entries = list(self._storage.walk(LOG))
        except PayloadNotFoundError:
            return []
        names = (entry.path[len(LOG) + 1 :] for entry in entries)
        return sorted(
            int(number) for number, _, rest in (name.partition("/") for name in names)
            if rest == self._within[1:]
        )  # fmt: skip

    def _load(self) -> None:
        """Begin anew: from the newest fold, or the first record."""
        self._forget()
        numbers = self.numbers()
        if not numbers:
            self._refuse_without_log()
            return
        there, records = set(numbers), []
        at = numbers[-1]
        while at:
            if at not in there:
                raise self._broken(f"record {at} is missing")
            records.append(self._read(at))
            if _fold_of(records[-1]) is not None:
                break
            at -= 1
        self._clear(Base(self._storage, None), at - 1 if at else 0)
        for record in reversed(records):
            self._follow(record)

    def _refuse_without_log(self) -> None:
        with suppress(PayloadNotFoundError):
            for entry in self._storage.walk(f"{FOLDER}/tar"):
                if entry.path.endswith(".tar"):
                    raise self._broken("there are bundles and no log")

    def _follow(self, record: dict[str, Any]) -> None:
        fold = _fold_of(record)
        if fold is not None:
            self._clear(Base(self._storage, fold), self.generation + 1)
        else:
            for change in record["changes"]:
                self._apply(change)
            self.generation += 1
        self._tokens.add(record["token"])

    # --- what records mean -----------------------------------------------------------------------

    def _apply(self, change: Change) -> None:
        word, *rest = change
        getattr(self, f"_do_{word}")(*rest)

    def _do_begin(self, bundle: str) -> None:
        self.open, self.gone = bundle, set()

    def _do_abort(self, bundle: str) -> None:
        self.open, self.gone = None, set()
        self.garbage.add(bundle)

    def _do_gone(self, path: str) -> None:
        if self.open is not None:
            self.gone.add(path)

    def _do_moving(self, source: str, destination: str) -> None:
        self.moving[source] = destination

    def _do_add(self, bundle: str, size: int, without: list[int], first_single: int) -> None:
        """Members of ``bundle`` count, but those numbered in ``without``. From ``first_single`` on
        they were single files, which are to be removed now."""
        self.open, self.gone = None, set()
        left_out = set(without)
        self.bundles[bundle] = added = Bundle(size)
        singles: list[str] = []
        for path, member in self._members_of(bundle):
            added.members += 1
            added.bytes += member.size
            if member.number in left_out:
                continue
            self._put(path, member)
            if member.number >= first_single:
                singles.append(path)
        if singles:
            self.cleaning[bundle] = sorted(singles)
        self._drop_if_empty(bundle)

    def _members_of(self, bundle: str) -> Iterator[tuple[str, Member]]:
        try:
            with self._storage.open_read(list_path(bundle)) as stream:
                yield from parse_listing(stream.read(-1))
        except ValueError:
            raise self._broken(f"{list_path(bundle)} is damaged") from None
        except PayloadNotFoundError:
            # a fold behind this record may have made it superfluous
            raise SupersededError(
                storage=self._storage.name,
                message=f"the index of its bundles is not whole: {list_path(bundle)} is missing; "
                "see 'dlm storage pack --reindex'",
            ) from None

    def _do_clean(self, bundle: str) -> None:
        self.cleaning.pop(bundle, None)
        self._drop_if_empty(bundle)

    def _do_swept(self, bundles: list[str]) -> None:
        self.garbage -= set(bundles)
        self.dropped -= set(bundles)
        self._lists |= set(bundles)

    def _do_remove(self, path: str) -> None:
        self._do_gone(path)
        for name, _ in list(self.below(path)):
            self._put(name, None)

    def _do_move(self, source: str, destination: str) -> None:
        self.moving.pop(source, None)
        self._do_gone(source)
        for name, member in list(self.below(source)):
            self._put(name, None, keep=member.bundle)
            self._put(destination + name[len(source) :], member)

    def _put(self, path: str, member: Member | None, keep: str = "") -> None:
        before = self.get(path)
        if before is not None:
            bundle = self.bundles[before.bundle]
            bundle.live -= 1
            bundle.live_bytes -= before.size
        if member is not None:
            bundle = self.bundles[member.bundle]
            bundle.live += 1
            bundle.live_bytes += member.size
        if path not in self._changed:
            insort(self._keys, path)
        self._changed[path] = member
        if before is not None and before.bundle != keep:
            self._drop_if_empty(before.bundle)

    def _drop_if_empty(self, bundle: str) -> None:
        known = self.bundles.get(bundle)
        if known is not None and not known.live and bundle not in self.cleaning:
            del self.bundles[bundle]
            self.garbage.add(bundle)
            self.dropped.add(bundle)

    # --- looking ---------------------------------------------------------------------------------

    def get(self, path: str) -> Member | None:
        """The member at ``path``."""
        if path in self._changed:
            return self._changed[path]
        return self._base.get(path)

    def below(self, path: str) -> Iterator[tuple[str, Member]]:
        """The member at ``path``, or paths and members below it, in path order; all if it is empty.
        To a file belongs nothing whose path goes on where its own ends."""
        if not path:
            yield from self.since("", "")
            return
        own = self.get(path)
        if own is not None:
            yield path, own
            return
        yield from self.since(f"{path}/", f"{path}/")

    def since(self, first: str, prefix: str) -> Iterator[tuple[str, Member]]:
        """Paths with ``prefix`` and their members from path ``first`` on, in path order."""
        # both sorted runs as one; what was changed hides what was folded
        at = bisect_left(self._keys, first)
        folded = self._base.since(first)
        line = next(folded, None)
        while True:
            key = self._keys[at] if at < len(self._keys) else None
            if key is not None and (line is None or key <= line[0]):
                if line is not None and line[0] == key:
                    line = next(folded, None)
                at += 1
                found = self._changed[key]
            elif line is not None:
                key, found = line
                line = next(folded, None)
            else:
                return
            if not key.startswith(prefix):
                return
            if found is not None:
                yield key, found

    def is_folder(self, path: str) -> bool:
        """Whether members lie below ``path``."""
        return next(self.since(f"{path}/", f"{path}/"), None) is not None

    def being_cleaned(self, path: str) -> bool:
        """Whether a single file at ``path`` or below may be one that was packed already."""
        return any(_has(paths, path) for paths in self.cleaning.values())

    # --- changing --------------------------------------------------------------------------------

    def change(self, decide: Callable[[], Sequence[Change]]) -> Sequence[Change]:
        """Append what ``decide`` says, which looks at the index as it is just then; again from the
        beginning if somebody else was faster. What it raises goes through. What several threads
        want at once is one record.

        Raises
        ------
        StorageUnavailableError
            the change may have been made or not: look again.
        """
        wish = _Wish(decide)
        with self._wishing:
            self._wishes.append(wish)
        with self.lock:
            if not wish.done:
                with self._wishing:
                    wishes, self._wishes = self._wishes, []
                self._grant(wishes)
        if wish.error is not None:
            raise wish.error
        return wish.changes

    def _grant(self, wishes: Sequence[_Wish]) -> None:
        try:
            while True:
                self.refresh()
                for wish in wishes:
                    self._decide(wish)
                changes = [change for wish in wishes for change in wish.changes]
                if not changes or self._append(changes):
                    break
            if changes and self._is_long():
                with suppress(StorageError):  # the change is made; folding has time
                    self.fold()
        except BaseException as error:
            self._forget()
            for wish in wishes:
                wish.error = wish.error or error
            if not isinstance(error, DlmError):
                raise
        finally:
            for wish in wishes:
                wish.done = True

    def _decide(self, wish: _Wish) -> None:
        """What is wished is in the index before the next one decides, and before it is written."""
        wish.changes, wish.error = [], None
        try:
            wish.changes = wish.decide()
        except DlmError as error:
            wish.error = error
        for change in wish.changes:
            self._apply(change)

    def _append(self, changes: Sequence[Change]) -> bool:
        token = uuid.uuid4().hex
        if self._write({"token": token, "changes": changes}):
            self.generation += 1
            return True
        self._tokens = set()
        self._begin_anew()
        return token in self._tokens  # it was ours: only the answer got lost

    def _write(self, record: dict[str, Any]) -> bool:
        """Whether the record is the next one."""
        data = json.dumps(record).encode("ascii")
        try:
            write_record(self._storage, self._record(self.generation + 1), data)
        except PayloadExistsError:
            return False
        # if the one before was removed, this one may have been too, long ago, and was made again
        before = self.generation
        if not (self._stat(before) if before else self.numbers()[-1] <= _KEPT_RECORDS):
            raise StorageUnavailableError(
                storage=self._storage.name, message="the log of its bundles went on too fast"
            )
        return True

    def _is_long(self) -> bool:
        records = self.generation - self._based_on
        return records >= _FOLD_RECORDS or len(self._changed) >= _FOLD_ENTRIES

    def fold(self) -> bool:
        """Write all into a sorted file, and remove records that nobody needs; whether it was.

        Somebody's record in between makes it void: then it is done another time.
        """
        with self.lock:
            name = f"{self.generation:016d}-{uuid.uuid4().hex}"
            write_base(self._storage, name, self.since("", ""), self._head())
            if not self._write({"token": name, "changes": [["fold", name]]}):
                self._remove_base(name)
                return False
            self._clear(Base(self._storage, name), self.generation + 1)
            self.clear_away()
            return True

    def append_fold(self, behind: int, name: str) -> None:
        """Let the log go on behind record ``behind`` with a fold that was made by other means."""
        with self.lock:
            self._forget()
            self.generation = behind
            record = {"token": name, "changes": [["fold", name]]}
            data = json.dumps(record).encode("ascii")
            write_record(self._storage, self._record(behind + 1), data)
            self._storage.flush()
            self._begin_anew()

    def _head(self) -> dict[str, Any]:
        return {
            "bundles": {
                name: [b.size, b.members, b.bytes, b.live, b.live_bytes]
                for name, b in self.bundles.items()
            },
            "open": self.open,
            "gone": sorted(self.gone),
            "cleaning": self.cleaning,
            "moving": self.moving,
            "garbage": sorted(self.garbage),
            "dropped": sorted(self.dropped),
            "lists": sorted(self._lists),
        }

    def clear_away(self) -> None:
        """Remove folds before the present one, or that never counted, records far behind, and lists
        of bundles that were removed before the fold."""
        for number in self.numbers():
            if number >= self._based_on - _KEPT_RECORDS:
                break
            self._storage.remove(_place(number))
        for bundle in self._old_lists:
            self._storage.remove(list_path(bundle))
        names: set[str] = set()
        with suppress(PayloadNotFoundError):
            files = [entry.path.rpartition("/")[2] for entry in self._storage.walk(BASES)]
            names = {file.rpartition(".")[0] for file in files}
        for name in names - {self._base.name}:
            # a fold of this generation may be somebody's at this moment; of one before, it is void
            if int(name.partition("-")[0]) < self.generation:
                self._remove_base(name)

    def _remove_base(self, name: str) -> None:
        for part in ("data", "head"):
            self._storage.remove(f"{BASES}/{name}.{part}")


def _has(paths: Sequence[str], path: str) -> bool:
    """Whether ``path`` or something below it is among ``paths``, which are in order."""
    own, below = bisect_left(paths, path), bisect_left(paths, f"{path}/")
    return path in paths[own : own + 1] or any(
        one.startswith(f"{path}/") for one in paths[below : below + 1]
    )


def _place(generation: int) -> str:
    return f"{LOG}/{generation:016d}"


def _fold_of(record: dict[str, Any]) -> str | None:
    word, *rest = record["changes"][0]
    return str(rest[0]) if word == "fold" else None
