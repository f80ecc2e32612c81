"""What was announced and never let in can be taken back; bytes are never touched by it."""

from __future__ import annotations

import hashlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from dlm_core.catalogue import items, recovery
from dlm_core.catalogue import operations as queue
from dlm_core.catalogue.announcements import Withdrawn
from dlm_core.catalogue.holds import Target, insert_hold
from dlm_core.catalogue.places import retire_storage, set_storage
from dlm_core.errors import (
    DeletionRefusedError,
    IllegalTransitionError,
    InvalidValueError,
    NotFoundError,
)
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.ingest import init_data_item, set_state, set_uri
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.withdraw import withdraw_failed, withdraw_item
from dlm_core.lifecycle.work import Claim, drain
from dlm_core.types import OperationKind, PayloadKind, new_id
from tests.site import Site, make_site

_WHY = "announced by mistake"


@pytest.fixture
def site(engine, tmp_path) -> Site:
    """Two files lie on a storage, and are announced."""
    site = make_site(engine, tmp_path, max_attempts=1)
    site.add_storage("in", "A")
    for name in ("kept", "typo"):
        (site.folder / "in" / name).write_bytes(name.encode())
    register_tree(site.context, Source("in", "test"))
    return site


def admit(site: Site) -> Any:
    return drain(site.context, {OperationKind.ADMIT: execute_admit})


def states(site: Site) -> dict[str, tuple[str, ...]]:
    """The state of each item, and those of its replicas."""
    found = site.query(
        """SELECT i.uri, i.state, array_agg(r.state ORDER BY r.uid) FILTER (WHERE r.uid IS NOT NULL)
                  AS replicas FROM data_item i LEFT JOIN replica r USING (oid)
            GROUP BY i.oid ORDER BY i.uri"""
    )
    return {row["uri"]: (row["state"], *(row["replicas"] or ())) for row in found}


def test_an_announcement_is_taken_back_and_its_bytes_stay(site):
    """Its item is DELETED, with a certificate that says who and why; the file lies as before, and
    can be registered under its right name."""
    assert withdraw_item(site.context, "test:typo", reason=_WHY) == Withdrawn(1, 1)
    assert dict(admit(site).done) == {"admit": 1}
    assert states(site) == {"test:kept": ("READY", "READY"), "test:typo": ("DELETED", "DELETED")}
    assert (site.folder / "in" / "typo").read_bytes() == b"typo"
    certificate = site.query("SELECT * FROM deletion")
    assert [(c["step"], c["basis"], c["reason"], c["from_state"]) for c in certificate] == [
        ("release", "withdrawn", _WHY, "PENDING")
    ]
    register_tree(site.context, Source("in", "right"), "typo")
    admit(site)
    assert states(site)["right:typo"] == ("READY", "READY")


def test_what_vanished_before_it_was_read_no_longer_keeps_its_storage(site):
    """An announcement whose admission FAILED is withdrawn with all of its kind, and the storage
    can be retired; what was let in is left alone."""
    (site.folder / "in" / "typo").unlink()
    admit(site)
    site.add_storage("out", "B")
    assert states(site)["test:typo"] == ("INITIALISED", "PENDING")
    assert withdraw_failed(site.context, reason=_WHY, storage="out") == Withdrawn(0, 0)
    assert withdraw_failed(site.context, reason=_WHY, storage="in") == Withdrawn(1, 1)
    assert withdraw_failed(site.context, reason=_WHY) == Withdrawn(0, 0)
    assert states(site) == {"test:kept": ("READY", "READY"), "test:typo": ("DELETED", "DELETED")}
    assert site.query("SELECT count(*) AS n FROM operation WHERE state = 'FAILED'")[0]["n"] == 0


def test_retiring_names_the_way_out_for_announcements(site):
    """What was only announced does not leave by a drain: the refusal says what ends it."""
    for name in ("kept", "typo"):
        (site.folder / "in" / name).unlink()
    admit(site)
    site.context.transact(lambda c: set_storage(c, "in", {"mode": "draining"}))

    def retire() -> None:
        site.context.transact(lambda c: retire_storage(c, "in", site.now))

    with pytest.raises(DeletionRefusedError, match="dlm withdraw --failed --storage in"):
        retire()
    assert withdraw_failed(site.context, reason=_WHY, storage="in") == Withdrawn(2, 2)
    site.execute("UPDATE storage SET mode = 'read_write'")
    set_uri(site.context, init_data_item(site.context, "step:1"), "in", "later")
    with pytest.raises(DeletionRefusedError, match="dlm withdraw URI"):
        retire()
    withdraw_item(site.context, "step:1", reason=_WHY)
    retire()


def test_what_was_let_in_is_not_withdrawn(site):
    """An item that is READY goes by expiry only; and a copy on its way is no announcement."""
    admit(site)
    site.add_storage("out", "B")
    plan_replication(site.context)
    assert states(site)["test:kept"] == ("READY", "READY", "PENDING")
    for storage in (None, "in", "out"):
        with pytest.raises(IllegalTransitionError, match="READY"):
            withdraw_item(site.context, "test:kept", reason=_WHY, storage=storage)
    assert withdraw_failed(site.context, reason=_WHY) == Withdrawn(0, 0)
    site.work(OperationKind.COPY)
    assert states(site)["test:kept"] == ("READY", "READY", "READY")


def test_a_copy_that_is_made_again_was_let_in_before(site):
    """It is PENDING like an announcement, even between two tries of its copy: it stays."""
    admit(site)
    for state in ("MISSING", "PENDING"):
        site.execute("UPDATE replica SET state = :s", s=state)
    with pytest.raises(IllegalTransitionError, match="READY"):
        withdraw_item(site.context, "test:kept", reason=_WHY)
    assert withdraw_failed(site.context, reason=_WHY) == Withdrawn(0, 0)


def test_a_copy_that_was_announced_beside_others_goes_alone(site):
    """Other bytes under the name of an item that is READY are refused: they are withdrawn, and the
    item stays with its good copy."""
    admit(site)
    other = site.add_storage("other", "B")
    (other / "kept").write_bytes(b"diff")
    register_tree(site.context, Source("other", "test"))
    admit(site)
    assert states(site)["test:kept"] == ("READY", "READY", "PENDING")
    assert withdraw_item(site.context, "test:kept", reason=_WHY) == Withdrawn(1, 0)
    assert states(site)["test:kept"] == ("READY", "READY", "DELETED")
    assert (other / "kept").read_bytes() == b"diff"


def test_an_item_keeps_what_was_announced_elsewhere(site):
    """Of two announcements of an item one can be taken back."""
    other = site.add_storage("other", "B")
    (other / "typo").write_bytes(b"typo")
    register_tree(site.context, Source("other", "test"))
    assert withdraw_item(site.context, "test:typo", reason=_WHY, storage="in") == Withdrawn(1, 0)
    admit(site)
    assert states(site)["test:typo"] == ("READY", "DELETED", "READY")


def test_a_hold_keeps_announcements_too(site):
    """What is held is refused by name, and left out of those that failed."""
    (site.folder / "in" / "typo").unlink()
    admit(site)
    site.context.transact(
        lambda c: insert_hold(
            c, Target(uri="test:typo"), reason="evidence", actor="user:test", now=site.now
        )
    )
    with pytest.raises(DeletionRefusedError, match="evidence"):
        withdraw_item(site.context, "test:typo", reason=_WHY)
    assert withdraw_failed(site.context, reason=_WHY) == Withdrawn(0, 0)
    assert states(site)["test:typo"] == ("INITIALISED", "PENDING")


def test_an_admission_under_way_writes_nothing_any_more(site):
    """Who reads the payload at this moment has lost its lease: withdrawn is withdrawn."""
    token = new_id()
    claimed = site.context.transact(
        lambda c: queue.claim_operations(
            c, OperationKind.ADMIT, token=token, worker="w", limit=9,
            lease=timedelta(minutes=5), now=site.now,
        )
    )  # fmt: skip
    withdraw_item(site.context, "test:typo", reason=_WHY)
    execute_admit(site.context, Claim(token, claimed))
    assert states(site) == {"test:kept": ("READY", "READY"), "test:typo": ("DELETED", "DELETED")}


def test_the_two_step_form_can_be_given_up_at_each_step(site):
    """With no place told, with one, and with its admission asked for."""
    for number, steps in enumerate(((), ("place",), ("place", "written"))):
        oid: uuid.UUID = init_data_item(site.context, f"step:{number}")
        if "place" in steps:
            set_uri(site.context, oid, "in", f"later-{number}")
        if "written" in steps:
            set_state(site.context, oid, "READY")
        gone = withdraw_item(site.context, f"step:{number}", reason=_WHY)
        assert gone == Withdrawn(len(steps[:1]), 1)
        with pytest.raises(IllegalTransitionError):
            set_uri(site.context, oid, "in", "later")


def test_what_was_withdrawn_comes_again_as_a_new_version_only(site):
    """Whatever finds the file again would undo the withdrawal; who says so gets version 2."""
    withdraw_item(site.context, "test:typo", reason=_WHY)
    again = register_tree(site.context, Source("in", "test"))
    assert [uri for uri, _ in again.reasons] == ["test:typo"]
    assert "new version" in again.reasons[0][1]
    assert register_tree(site.context, Source("in", "test", new_version=True)).new_versions == 1
    admit(site)
    found = site.query("SELECT version, state FROM data_item WHERE uri = 'test:typo' ORDER BY 1")
    assert [(row["version"], row["state"]) for row in found] == [(1, "DELETED"), (2, "READY")]


@pytest.mark.parametrize("claimed", [True, False])
def test_an_announcement_at_the_same_moment_is_waited_for(site, claimed):
    """Somebody announces the item elsewhere and has not committed: it is not ended under his hands,
    and what he announced is let in."""
    other = site.add_storage("other", "B")
    (other / "typo").write_bytes(b"typo")
    digest = "sha256:" + hashlib.sha256(b"typo").hexdigest() if claimed else None
    new = items.Announcement("test:typo", "typo", 4, 1e9, PayloadKind.FILE, digest)
    withdrawn: list[Withdrawn] = []
    with ThreadPoolExecutor(1) as pool:

        def announce(connection: Connection) -> None:
            items.announce(
                connection, site.storages["other"], [new], items.Terms(), "user:test", site.now
            )
            going = pool.submit(withdraw_item, site.context, "test:typo", reason=_WHY)
            going.add_done_callback(lambda future: withdrawn.append(future.result()))
            _wait_until_blocked(site)

        site.context.transact(announce)
    assert withdrawn == [Withdrawn(2, 1)] or withdrawn == [Withdrawn(1, 0)]
    admit(site)
    state, *replicas = states(site)["test:typo"]
    assert (state == "DELETED") == (set(replicas) == {"DELETED"})


def _wait_until_blocked(site: Site) -> None:
    """Until another session of this database waits for a lock."""
    waiting = """SELECT count(*) AS n FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    end = time.monotonic() + 60
    while not site.query(waiting)[0]["n"]:
        assert time.monotonic() < end, "nobody waits"
        time.sleep(0.02)


def test_after_a_recovery_nothing_is_withdrawn_before_it_is_confirmed(site):
    """What the old catalogue knows as announced may have been let in since, and be copied."""
    (site.folder / "in" / "typo").unlink()
    admit(site)
    site.context.transact(lambda c: recovery.distrust(c, "a backup", "user:test", site.now))
    with pytest.raises(DeletionRefusedError, match="dlm db confirm"):
        withdraw_item(site.context, "test:typo", reason=_WHY)
    with pytest.raises(DeletionRefusedError, match="dlm db confirm"):
        withdraw_failed(site.context, reason=_WHY)
    site.context.transact(lambda c: recovery.confirm(c, "user:test", site.now))
    assert withdraw_failed(site.context, reason=_WHY) == Withdrawn(1, 1)


def test_an_expired_item_ends_with_the_last_that_was_announced_of_it(site):
    """Its copies are gone, and what could not be let in elsewhere was all that kept its record."""
    admit(site)
    other = site.add_storage("other", "B")
    (other / "kept").write_bytes(b"diff")
    register_tree(site.context, Source("other", "test"))
    admit(site)
    site.execute("UPDATE data_item SET expires_at = :n WHERE uri LIKE '%kept'", n=site.now)
    for _ in range(3):
        site.settle()
        site.advance(hours=2)
    assert states(site)["test:kept"][0] == "DELETED"


def test_nothing_is_withdrawn_without_a_reason_or_twice(site):
    """A reason stands in the certificate; what has gone is told as such, and what never was."""
    for reason in ("", "  "):
        with pytest.raises(InvalidValueError, match="reason"):
            withdraw_item(site.context, "test:typo", reason=reason)
        with pytest.raises(InvalidValueError, match="reason"):
            withdraw_failed(site.context, reason=reason)
    withdraw_item(site.context, "test:typo", reason=_WHY)
    with pytest.raises(IllegalTransitionError, match="DELETED"):
        withdraw_item(site.context, "test:typo", reason=_WHY)
    with pytest.raises(NotFoundError):
        withdraw_item(site.context, "test:nothing", reason=_WHY)
    with pytest.raises(NotFoundError):
        withdraw_item(site.context, "test:kept", reason=_WHY, storage="nowhere")
