"""The copies of one claim: by link, several at once, and the large ones beside the small.

One slow storage holds up only what goes there, and one huge file only itself. What is copied is
written down while the rest is copied.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.engine import begin
from dlm_core.catalogue.traffic import link_key, storage_key
from dlm_core.lifecycle.fence import Fence
from dlm_core.lifecycle.staging import hold_back_copies, is_cold, looked_at_again
from dlm_core.lifecycle.work import LARGE, Claim, Context, Report
from dlm_core.storages.port import Storage
from dlm_core.transfers.mover import CopyResult, CopyTask, Lane, copy_batch, last_at_work
from dlm_core.transfers.throttle import paced
from dlm_core.types import ManifestEntry, PayloadKind, decode_path

Row = Mapping[str, Any]
#: source and destination
Link = tuple[uuid.UUID, uuid.UUID]
Record = Callable[[Sequence[CopyResult], Report], None]

_LARGE_AT_ONCE = 2
_RECORDED_AT_ONCE = 512


@dataclass(slots=True)
class Copies:
    """What is to be copied for a claim, and where to write how it went.

    ``storages`` are rows by key, ``limited`` the keys (storage_key, link_key) with a limit now.
    """

    context: Context
    claim: Claim
    storages: Mapping[uuid.UUID, Row]
    manifests: Mapping[uuid.UUID, Sequence[Row]]
    limited: frozenset[str]
    record: Record
    links: dict[Link, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def make(self) -> Report:
        """Make them all; what is not begun when the context's ``stop`` is set is left."""
        at_once = self.context.settings.links_at_once
        jobs: list[Callable[[], Report]] = []
        large: list[Callable[[], Report]] = []
        for link, rows in self.links.items():
            if self._is_cold(link):
                jobs.append(partial(self._copy_staged, link, rows))
                continue
            if small := _small(rows):
                jobs.append(partial(self._copy, link, small))
            if rest := _large(rows):
                large.append(partial(self._copy_large, link, rest))
        report = Report()
        if not jobs:
            self.claim.eased.set()
        if at_once == 1 or len(jobs) + len(large) == 1:
            for work in jobs + large:
                report.add(work())
            return report
        with (
            ThreadPoolExecutor(at_once, "dlm-link") as links,
            ThreadPoolExecutor(at_once, "dlm-large") as beside,
        ):
            going = {links.submit(work) for work in jobs}
            going |= {beside.submit(work) for work in large}
            while going:
                ended, going = wait(going, return_when=FIRST_COMPLETED)
                self.claim.eased.set()
                for future in ended:
                    report.add(future.result())
        return report

    def _is_cold(self, link: Link) -> bool:
        return any(is_cold(self.context.storages.open(self.storages[end])) for end in link)

    def _copy_staged(self, link: Link, rows: Sequence[Row]) -> Report:
        """From or to a cold storage: what all of them have to read is asked for together."""
        source, destination = (self.context.storages.open(self.storages[end]) for end in link)
        tasks = self._tasks(rows)
        held = hold_back_copies(self.context, source, destination, rows[0], tasks)
        report = Report()
        if held:
            waiting = [
                CopyResult(task, held[task.operation_id], 0.0)
                for task in tasks
                if task.operation_id in held
            ]
            self.record(waiting, report)
        ready = [row for row in rows if row["operation_id"] not in held]
        if small := _small(ready):
            report.add(self._copy(link, small))
        report.add(self._copy_large(link, _large(ready)))
        return report

    def _tasks(self, rows: Sequence[Row]) -> list[CopyTask]:
        return [_task(row, self.manifests, self.claim.token) for row in rows]

    def _copy_large(self, link: Link, rows: Sequence[Row]) -> Report:
        """Each by itself: what goes wrong or takes long with one is no other's."""
        report = Report()
        at_once = _LARGE_AT_ONCE if self.context.settings.links_at_once > 1 else 1
        with ThreadPoolExecutor(at_once, "dlm-large") as pool:
            for one in pool.map(lambda row: self._copy(link, [row], large=True), rows):
                report.add(one)
        return report

    def _copy(self, link: Link, rows: Sequence[Row], *, large: bool = False) -> Report:
        report = Report()
        if self.context.stop.is_set():
            return report
        keys = [storage_key(link[0]), storage_key(link[1]), link_key(*link)]
        traffic = self.context.traffic
        limited = not self.limited.isdisjoint(keys)
        with (
            traffic.using(self.context, keys, limited=limited),
            traffic.filling(None if large else link[1]) as over,
        ):

            def ease() -> None:
                over()
                self.claim.eased.set()

            self._copy_over(link, keys, rows, report, ease)
        return report

    def _copy_over(
        self,
        link: Link,
        keys: Sequence[str],
        rows: Sequence[Row],
        report: Report,
        ease: Callable[[], None],
    ) -> None:
        """Copy and write down; ``ease`` is called when the last of them are at work, so that others
        may be claimed beside them."""
        traffic = self.context.traffic
        reading, writing, between = (traffic.pace(key) for key in keys)
        source = paced(self.context.storages.open(self.storages[link[0]]), [reading])
        destination = self.context.storages.open(self.storages[link[1]])
        tasks = self._tasks(rows)
        left = len(tasks)
        # never before something has come through: a storage that hangs would take all claims
        last = min(last_at_work(tasks), left - 1)
        results = copy_batch(
            source,
            paced(destination, [writing], [writing, between]),
            tasks,
            stop=self.context.stop,
            resume_bytes=self.context.settings.resume_bytes,
            lane=self._lane(keys, {row["operation_id"]: row["size"] for row in rows}),
        )
        with ThreadPoolExecutor(1, "dlm-record") as recorder:
            # what is copied is written down while the next files are copied
            writing_down: Future[None] | None = None
            waiting: list[CopyResult] = []
            for result in results:
                traffic.ended(result.task.operation_id)
                waiting.append(looked_at_again(source, result))
                left -= 1
                if left == last:
                    ease()
                if len(waiting) >= _RECORDED_AT_ONCE:
                    if writing_down is not None:
                        writing_down.result()
                    writing_down = recorder.submit(self.record, waiting, report)
                    waiting = []
            if writing_down is not None:
                writing_down.result()
            if waiting:
                self.record(waiting, report)

    def _lane(self, keys: Sequence[str], sizes: Mapping[uuid.UUID, int]) -> Lane:
        context, traffic = self.context, self.context.traffic

        def places(back: bool, size: int) -> AbstractContextManager[None]:
            return traffic.places(keys[1:2] if back else keys, size)

        def watch(operation_id: uuid.UUID, step: str, size: int) -> None:
            traffic.moved(context, operation_id, sizes[operation_id], step, size)

        @contextmanager
        def taking_back(operation_id: uuid.UUID, storage: Storage) -> Iterator[Storage | None]:
            with begin(context.engine, context.actor, context.clock()) as connection:
                ours = queue.lock_claimed(connection, self.claim.token, [operation_id])
                yield Fence(connection).around(storage) if ours else None

        return Lane(places, watch, taking_back, lambda: traffic.limits(keys))


def _small(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["size"] <= LARGE]


def _large(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["size"] > LARGE]


def _task(row: Row, manifests: Mapping[uuid.UUID, Sequence[Row]], token: uuid.UUID) -> CopyTask:
    entries = manifests.get(row["oid"], ()) if manifests else ()
    manifest = tuple(
        [ManifestEntry(decode_path(one["path"]), one["size"], one["digest"]) for one in entries]
    )
    return CopyTask(
        row["operation_id"],
        decode_path(row["source_path"]),
        decode_path(row["path"]),
        PayloadKind(row["kind"]),
        row["size"],
        row["digest"],
        manifest,
        # unique for every try: a worker whose lease ran out writes beside its successor
        f"{row['uid'].hex}.{token.hex}",
        row["partial"],
    )
