"""The simulation in the suite: bounded, long, and able to fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dlm_core.catalogue import deletions
from dlm_core.lifecycle import trash
from dlm_core.storages.bundle_index import BundleIndex
from dlm_core.storages.cold import ColdStorage
from tests.simulation.machine import Lifecycle
from tests.simulation.mixed import Mixed
from tests.simulation.run import replay, simulate

Patch = pytest.MonkeyPatch


@pytest.mark.timeout(600)
def test_the_steps_go_all_the_way(engine):
    """To the purge and back; test_steps_*.py take many more of them."""
    result = simulate(engine, 700, 1)
    assert result.violation is None, "\n".join([result.violation or "", *result.story])
    assert result.steps >= 700
    for what in ("replica TRASHED to DELETED", "replica TRASHED to READY", "item READY to EXPIRED"):
        assert result.seen[what] > 0, what


def test_a_catalogue_that_goes_by_its_own_clock_is_refused(engine):
    """Nothing would ever be due there, and nothing go wrong."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION dlm_is_simulation() RETURNS boolean "
            "LANGUAGE sql IMMUTABLE AS 'SELECT false'"
        )
    with pytest.raises(AssertionError, match="present"):
        simulate(engine, 10, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [101, 102])
def test_nothing_is_lost_in_ten_thousand_steps(engine, seed):
    """As the short one, long enough to make every transition of the table but rare ones."""
    result = simulate(engine, 10_000, seed)
    assert result.violation is None, "\n".join([result.violation or "", *result.story])


def test_the_same_seed_brings_the_same_story(engine):
    """A violation can be looked at again: steps and what they did repeat."""
    first, second = (simulate(engine, 60, 5) for _ in range(2))
    assert (first.steps, first.seen) == (second.steps, second.seen)


# --- the simulation can fail ----------------------------------------------------------------------


def in_proof(old: str, new: str) -> Callable[[Patch], None]:
    def sabotage(patch: Patch) -> None:
        assert old in deletions._PROVE
        patch.setattr(deletions, "_PROVE", deletions._PROVE.replace(old, new))

    return sabotage


def pending_counts(patch: Patch) -> None:
    in_proof("r.state = 'READY' AND", "r.state IN ('READY', 'PENDING') AND")(patch)
    in_proof("r.checked_at >= known.floor AS seen", "true AS seen")(patch)


def survivors_are_not_looked_at(patch: Patch) -> None:
    patch.setattr(trash, "look_at_survivors", lambda *_: set())


def grace_is_too_short(patch: Patch) -> None:
    purge_later = trash._purge_later

    def early(context, effected, now):
        from dataclasses import replace
        from datetime import timedelta

        operation = purge_later(context, effected, now)
        return replace(operation, due_at=operation.due_at - timedelta(minutes=10))

    patch.setattr(trash, "_purge_later", early)


def holds_are_ignored(patch: Patch) -> None:
    in_proof("THEN (SELECT string_agg", "THEN NULL::text || (SELECT string_agg")(patch)


def removal_is_believed(patch: Patch) -> None:
    """A purge that believes its own "done"."""

    def purge(storage, row):
        if row["managed"]:
            storage.remove(trash.trash_path(row["uid"]))

    patch.setattr(trash, "_purge", purge)


def restored_unread(patch: Patch) -> None:
    """A restore that takes its bytes for good without reading them."""

    def believe(storage, row, moved):
        from dlm_core.types import Observation

        return Observation(row["item_size"], row["item_digest"])

    patch.setattr(trash, "_brought_back", believe)


def stubs_are_read(patch: Patch) -> None:
    """A cold storage that takes all its files for online."""
    patch.setattr(ColdStorage, "look", lambda _, paths: set(paths))


def moved_members_vanish(patch: Patch) -> None:
    """A rename of what lies in a bundle forgets it."""
    patch.setattr(BundleIndex, "_do_move", lambda self, source, _: self._do_remove(source))


QUICK = [(grace_is_too_short, {"trash-restorable"}, 1)]
SLOW = [
    (pending_counts, {"survivors-exist", "work-goes-on"}, 1),
    (survivors_are_not_looked_at, {"survivors-exist", "nothing-lost"}, 1),
    (holds_are_ignored, {"holds-keep", "work-goes-on"}, 1),
    (removal_is_believed, {"deleted-means-gone"}, 1),
    (restored_unread, {"ready-is-there"}, 2),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("sabotage", "promises", "seed"),
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_what_is_broken_on_purpose_is_found(engine, monkeypatch, sabotage, promises, seed):
    """Each of these faults breaks a promise within a bounded number of steps (the database's own
    refusal of what the code should not have tried is such a breach too), and is told as a story."""
    sabotage(monkeypatch)
    steps = 3000 if (sabotage, promises, seed) in QUICK else 20_000
    result = simulate(engine, steps, seed, shortened=False)
    assert result.violation is not None, "the fault was not found"
    assert result.violation.split(":")[0] in promises
    assert result.story[0].startswith("begin")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("sabotage", "promises"),
    [
        (stubs_are_read, {"good-copy-kept", "nothing-lost"}),
        (moved_members_vanish, {"no-deletion-without-certificate", "nothing-lost"}),
    ],
)
def test_what_is_broken_in_bundles_and_tapes_is_found(engine, monkeypatch, sabotage, promises):
    """So are faults of what only other storages than folders do."""
    sabotage(monkeypatch)
    result = simulate(engine, 20_000, 1, machine=Mixed, shortened=False)
    assert result.violation is not None, "the fault was not found"
    assert result.violation.split(":")[0] in promises


@pytest.mark.slow
def test_the_shortest_story_breaks_the_same_promise(engine, monkeypatch):
    """What has nothing to do with a violation is left out of its story; what is left breaks the
    same promise again, every time."""
    grace_is_too_short(monkeypatch)
    result = simulate(engine, 3000, 1)
    broken = Lifecycle.broken
    assert broken is not None and broken.violation is not None
    assert len(result.story) < len(broken.story)
    assert str(replay(broken.calls).violation) == str(broken.violation)
