"""A tape among the storages: what lies on it is staged before it is read, many in one call."""

import json
from dataclasses import replace

import pytest

from dlm_core.catalogue import staging as catalogue
from dlm_core.catalogue.engine import make_engine
from dlm_core.catalogue.operations import retry_failed
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.staging import execute_stage, request_staging
from dlm_core.lifecycle.trash import request_restore
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import StoragePool, drain
from dlm_core.types import OperationKind
from tests.crashpoints.points import Crash, Points, end_connections, watch_commits
from tests.site import make_site
from tests.tape import Tape


@pytest.fixture
def site(engine, tmp_path):
    """A tape with SOLID places elsewhere that are not there yet."""
    site = make_site(engine, tmp_path)
    root = site.add_storage("tape", "vault", **{"class": "tape"})
    site.tape = Tape(root, tmp_path / "hsm")
    use(site)
    site.add_storage("disk", "here")
    return site


def use(site, **config):
    """The tape's terms."""
    site.set_storage("tape", config=json.dumps(site.tape.config(**config)))


def operations(site, kind, columns="state, attempts, error_code, error, due_at"):
    return site.query(
        f"SELECT {columns} FROM operation WHERE kind = :kind ORDER BY operation_id", kind=kind
    )


def poll(site):
    site.advance(seconds=60)
    return site.settle()


def test_a_copy_from_tape_waits_for_one_call_and_is_made_when_all_is_there(site):
    """Many files of a claim are asked for in one call; their copies wait without a failed try and
    without another call, and are made and verified once the bytes are on disk."""
    oids = [site.add_item(f"d/{n:02}", b"%d" % n * 700, "tape") for n in range(20)]
    assert site.tape.migrate() == 20
    report = site.settle()
    assert site.tape.calls() == [[f"d/{n:02}" for n in range(20)]]
    assert report.retried == {"DLM-308": 20} and not report.failed
    waiting = operations(site, "copy")
    assert {(row["state"], row["attempts"], row["error_code"]) for row in waiting} == {
        ("QUEUED", 0, "DLM-308")
    }
    assert "waits for staging since 2026-06-01T00:00:00Z" in waiting[0]["error"]
    for _ in range(3):
        poll(site)
    assert len(site.tape.calls()) == 1 and site.visible("disk") == {}
    assert site.tape.deliver() == 20
    poll(site)
    assert {site.replicas(oid)["disk"] for oid in oids} == {"READY"}
    assert sorted(site.visible("disk").values()) == sorted(b"%d" % n * 700 for n in range(20))
    assert site.query("SELECT * FROM staging") == []


def test_requests_are_bounded_and_repeated_only_after_a_while(site):
    """stage_batch bounds a call; after stage_retry_hours what is still away is asked for again."""
    use(site, stage_batch=3, stage_retry_hours=0.1)
    for n in range(7):
        site.add_item(f"{n}", b"x", "tape")
    site.tape.migrate()
    site.settle()
    assert [len(paths) for paths in site.tape.calls()] == [3, 3, 1]
    for _ in range(6):
        assert len(site.tape.calls()) == 3
        poll(site)
    assert [len(paths) for paths in site.tape.calls()] == [3, 3, 1] * 2


def test_no_more_files_are_on_their_way_than_the_disk_may_take(site):
    """stage_most: the others wait for their turn, and say so; it comes as files arrive."""
    use(site, stage_most=3)
    oids = [site.add_item(f"{n}", b"x" * 99, "tape") for n in range(7)]
    site.tape.migrate()
    site.settle()
    told = [row["error"] for row in operations(site, "copy")]
    assert sum("for a turn while 3 files are on their way" in text for text in told) == 4
    poll(site)
    for _ in range(4):
        site.tape.deliver()
        poll(site)
    assert [len(paths) for paths in site.tape.calls()] == [3, 3, 1]
    assert {site.replicas(oid)["disk"] for oid in oids} == {"READY"}


def test_a_copy_whose_file_never_comes_goes_on_with_another_source(site):
    """Two tapes: what the first did not stage until its deadline is asked of the second."""
    root = site.add_storage("tape2", "bunker", mode="offline", **{"class": "tape"})
    oid = site.add_item("x", b"bytes" * 99, "tape")
    site.set_storage("disk", mode="offline")
    site.set_storage("tape2", mode="read_write")
    site.settle()
    second = Tape(root, site.folder / "hsm2")
    second.migrate()
    site.tape.migrate()
    site.set_storage("tape2", config=json.dumps(second.config()), mode="draining")
    site.set_storage("disk", mode="read_write")
    site.settle()
    first, other = (site.tape, second) if site.tape.calls() else (second, site.tape)
    assert (len(first.calls()), len(other.calls())) == (1, 0)
    for _ in range(7):
        site.advance(hours=12)
        site.settle()
    assert len(other.calls()) == 1
    other.deliver()
    site.advance(hours=1)
    site.settle()
    assert site.replicas(oid)["disk"] == "READY"


def test_what_takes_long_is_looked_at_less_often(site):
    """After a tenth of the time that it has waited, an hour at most."""
    use(site, stage_poll_seconds=100)
    on_both(site)
    ask_to_verify(site)
    due = []
    for hours in (0, 1, 9, 10):
        site.advance(hours=hours)
        site.work(OperationKind.VERIFY)
        due.append((operations(site, "verify")[0]["due_at"] - site.now).total_seconds())
    assert due == [100, 360, 3600, 3600]


def test_every_file_of_a_directory_is_staged(site):
    """A directory payload waits until all files of its manifest are online."""
    from dlm_core.lifecycle.admit import execute_admit
    from dlm_core.lifecycle.register import Source, register_tree

    folder = site.folder / "tape" / "o.ms"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "sub/c"):
        (folder / name).write_bytes(name.encode() * 999)
    site.tape.migrate()
    register_tree(site.context, Source("tape", "test", as_directory=["*.ms"]))
    admit = {OperationKind.ADMIT: execute_admit}
    drain(site.context, admit)
    names = ["o.ms/a", "o.ms/sub/b", "o.ms/sub/c"]
    assert site.tape.calls() == [names]
    site.tape.deliver()
    site.advance(seconds=60)
    assert drain(site.context, admit).done == {"admit": 1}
    site.tape.migrate()
    site.settle()
    assert site.tape.calls() == [names, names]
    site.tape.deliver()
    poll(site)
    assert sorted(site.visible("disk")) == [f"test/{name}" for name in names]


def test_sources_that_need_no_staging_come_first(site):
    """With a copy on disk the tape is left alone."""
    oid = site.add_item("x", b"bytes" * 99, "disk")
    site.settle()
    assert site.replicas(oid) == {"disk": "READY", "tape": "READY"}
    site.tape.migrate()
    site.add_storage("third", "elsewhere")
    site.set_storage("disk", mode="draining")
    site.settle()
    assert site.replicas(oid)["third"] == "READY" and site.tape.calls() == []


def test_what_was_just_written_is_verified_before_it_migrates(site):
    """A copy to tape is read back at once; then it may go offline, and counts all the same."""
    oid = site.add_item("x", b"bytes" * 99, "disk")
    site.settle()
    assert site.replicas(oid) == {"disk": "READY", "tape": "READY"}
    assert site.tape.calls() == [] and site.item(oid)["phase_weight"] == 4


def test_what_a_lost_try_left_on_tape_is_staged_and_adopted(site):
    """A worker died between rename and record, and the file migrated: the next try reads what is
    there instead of failing until it gives up."""
    oid = site.add_item("x", b"bytes" * 99, "disk")
    left = site.folder / "tape/test/x"
    left.parent.mkdir()
    left.write_bytes(b"bytes" * 99)
    site.tape.migrate()
    site.settle()
    assert site.tape.calls() == [["test/x"]]
    assert operations(site, "copy", "state, attempts") == [{"state": "QUEUED", "attempts": 0}]
    site.tape.deliver()
    poll(site)
    assert site.replicas(oid)["tape"] == "READY" and site.private("tape", "tmp") == []


def ask_to_verify(site, storage="tape"):
    site.context.transact(
        lambda c: request_verification(
            c, actor="user:test", now=site.now, storage_id=site.storages[storage]
        )
    )


def on_both(site, count=1, data=b"bytes" * 99):
    oids = [site.add_item(f"x{n}", data, "disk") for n in range(count)]
    site.settle()
    site.tape.migrate()
    return oids


def test_verification_stages_and_reads(site):
    """Asked for, tape copies are staged in one call and read; nothing is taken for damaged."""
    oids = on_both(site, 5)
    ask_to_verify(site)
    site.settle()
    assert [len(call) for call in site.tape.calls()] == [5]
    site.tape.deliver()
    poll(site)
    checked = {site.replica(oid, "tape")["checked_at"] for oid in oids}
    assert checked == {site.now}
    assert operations(site, "verify", "state, attempts") == [{"state": "DONE", "attempts": 1}] * 5


@pytest.mark.parametrize(("budget", "planned"), [({}, 0), ({"verify_bytes_per_day": 990}, 2)])
def test_scheduled_checks_recall_no_more_than_their_budget(site, budget, planned):
    """Without a budget of bytes a day nothing is checked on tape; with one, no more than that."""
    from dlm_core.catalogue.checks import storages_with_checks_due
    from dlm_core.lifecycle.check import plan_verification

    on_both(site, 9)
    site.set_storage("disk", verify_every_days=None)
    if budget:
        site.set_storage("tape", **budget)
    site.advance(days=100)
    due = site.context.transact(lambda c: storages_with_checks_due(c, site.now))
    assert due == (["tape"] if planned else [])
    assert plan_verification(site.context) == planned
    site.settle()
    assert sum(map(len, site.tape.calls())) == planned


def expire_on_disk(site, oids):
    for oid in oids:
        site.execute(
            "UPDATE replica SET expires_at = :now WHERE uid = :uid",
            now=site.now, uid=site.replica(oid, "disk")["uid"],
        )  # fmt: skip
        site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)


def let_go_of_disk(site, oid):
    """The copy on disk expires, and its grace is over."""
    expire_on_disk(site, [oid])
    site.settle()
    site.advance(hours=2)
    site.settle()


def test_a_purge_recalls_no_survivor(site):
    """The tape copy is there with its size and was read within stage_proof_days: the copy on disk
    may go, and nothing is staged for it."""
    (oid,) = on_both(site)
    site.advance(days=300)
    let_go_of_disk(site, oid)
    assert site.replicas(oid) == {"disk": "DELETED", "tape": "READY"}
    assert site.tape.calls() == [] and site.tape.stubs() == ["test/x0"]


def test_a_survivor_read_too_long_ago_stops_the_purge_until_it_is_read(site):
    """Beyond stage_proof_days an offline survivor proves nothing: the trash stays, nothing is
    recalled by itself; once the tape copy was verified the purge goes on."""
    (oid,) = on_both(site)
    site.advance(days=366)
    let_go_of_disk(site, oid)
    assert site.replicas(oid) == {"disk": "TRASHED", "tape": "READY"}
    assert site.tape.calls() == []
    ask_to_verify(site)
    site.settle()
    site.tape.deliver()
    poll(site)
    site.tape.migrate()
    poll(site)
    assert site.replicas(oid) == {"disk": "DELETED", "tape": "READY"}


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_survivor_that_does_not_look_right_stops_the_purge(site, harm):
    """A stub that is gone, or has another size, is no survivor: what was trashed comes back."""
    (oid,) = on_both(site)
    expire_on_disk(site, [oid])
    site.settle()
    stub = site.folder / "tape/test/x0"
    stub.unlink() if harm == "gone" else stub.write_bytes(b"")
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["disk"] != "DELETED"
    assert [*site.visible("disk").values()] == [b"bytes" * 99]


def test_trash_and_purge_on_tape_recall_nothing(site):
    """Renaming and removing need no bytes."""
    (oid,) = on_both(site)
    site.execute("UPDATE replica SET expires_at = :now WHERE uid = :uid", now=site.now,
                 uid=site.replica(oid, "tape")["uid"])  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.settle()
    assert site.replicas(oid)["tape"] == "TRASHED" and site.visible("tape") == {}
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid)["tape"] == "DELETED" and site.private("tape", "trash") == []
    assert site.tape.calls() == []


def test_what_comes_back_from_the_trash_is_staged_and_read(site):
    """A restore on tape waits for the bytes and believes them when it has read them."""
    (oid,) = on_both(site)
    site.execute("UPDATE replica SET expires_at = :now WHERE uid = :uid", now=site.now,
                 uid=site.replica(oid, "tape")["uid"])  # fmt: skip
    site.execute("UPDATE data_item SET target_phase = 'LIQUID' WHERE oid = :oid", oid=oid)
    site.settle()
    site.context.transact(
        lambda c: request_restore(
            c, oid=oid, storage_id=site.storages["tape"], actor="user:test", now=site.now
        )
    )
    site.work()
    uid = site.replica(oid, "tape")["uid"]
    assert site.tape.calls() == [[f".dlm/trash/{uid}"]]
    assert site.replicas(oid)["tape"] == "TRASHED"
    site.tape.deliver()
    site.advance(seconds=60)
    site.work()
    assert site.replicas(oid)["tape"] == "READY"
    assert site.visible("tape") == {"test/x0": b"bytes" * 99}


@pytest.mark.parametrize(("mode", "words"), [
    ("fails", "stage_command ended with exit code 1: no drive is free, password=… at https://…@"),
    ("hangs", "stage_command did not end within 0.3 s"),
])  # fmt: skip
def test_a_stage_command_that_fails_is_told_and_tried_again(site, mode, words):
    """Its one line stands beside the operation, without what looks like a password; it is asked
    again at the next look, and that is no failed try."""
    use(site, stage_timeout_seconds=0.3 if mode == "hangs" else 60)
    oid = site.add_item("x", b"bytes", "tape")
    site.tape.migrate()
    site.tape.mode = mode
    site.settle()
    (waiting,) = operations(site, "copy")
    assert words in waiting["error"] and "hunter2" not in waiting["error"]
    assert (waiting["state"], waiting["attempts"]) == ("QUEUED", 0)
    use(site)
    site.tape.mode = "at_once"
    poll(site)
    poll(site)
    assert site.replicas(oid)["disk"] == "READY" and site.tape.calls()[-1] == ["x"]


def test_a_file_that_never_comes_ends_failed_and_can_be_asked_for_again(site):
    """After stage_deadline_hours a look FAILED, visibly; 'dlm retry' begins anew."""
    (oid,) = on_both(site)
    ask_to_verify(site)
    site.settle()
    for _ in range(6):
        site.advance(hours=12)
        site.work(OperationKind.VERIFY)
    (failed,) = operations(site, "verify")
    assert (failed["state"], failed["error_code"]) == ("FAILED", "DLM-309")
    assert "since 2026-06-01" in failed["error"] and "after 72 h" in failed["error"]
    assert site.replicas(oid)["tape"] == "READY"
    assert len(site.tape.calls()) == 3
    site.context.transact(lambda c: retry_failed(c, site.now))
    site.work()
    assert operations(site, "verify")[0]["state"] == "QUEUED"
    site.tape.deliver()
    poll(site)
    assert operations(site, "verify")[0]["state"] == "DONE"


def test_a_storage_that_lies_makes_nothing_corrupted_before_it_was_staged_anew(site):
    """It says that a stub is online, so zeros are read: the copy is doubted, no more. Before the
    second look it is staged whatever is said, and then its bytes are good."""
    (oid,) = on_both(site)
    use(site, online_command=True)
    site.tape.mode = "lies"
    ask_to_verify(site)
    site.settle()
    assert site.replicas(oid)["tape"] == "SUSPECT"
    assert site.tape.calls() == [["test/x0"]] and site.private("tape", "quarantine") == []
    site.tape.deliver()
    poll(site)
    assert site.replicas(oid)["tape"] == "READY"


def test_a_copy_from_a_storage_that_lies_copies_no_zeros(site):
    """The digest shows that a stub was read: nothing is written, its source is doubted, staged,
    read, good again, and then copied."""
    use(site, online_command=True)
    oid = site.add_item("x", b"bytes" * 99, "tape")
    site.tape.migrate()
    site.tape.mode = "lies"
    site.settle()
    assert site.replicas(oid) == {"tape": "SUSPECT", "disk": "MISSING"}
    assert site.visible("disk") == {} and site.tape.calls() == [["x"]]
    site.tape.deliver()
    poll(site)
    site.advance(hours=2)
    site.settle()
    assert site.replicas(oid) == {"tape": "READY", "disk": "READY"}
    assert site.visible("disk") == {"test/x": b"bytes" * 99}


def test_a_file_that_goes_offline_while_it_is_read_is_not_taken_for_damaged(site, monkeypatch):
    """Online when asked, a stub when read: what was read says nothing, and it is staged again."""
    from dlm_core.storages.posix import PosixStorage

    (oid,) = on_both(site)
    ask_to_verify(site)
    site.settle()
    site.tape.deliver()
    opened = PosixStorage.open_read

    def migrate_first(storage, path):
        if storage.name == "tape":
            site.tape.migrate()
        return opened(storage, path)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStorage, "open_read", migrate_first)
        poll(site)
    assert site.replicas(oid)["tape"] == "READY"
    site.advance(seconds=60)
    site.settle()
    assert len(site.tape.calls()) == 2
    site.tape.deliver()
    poll(site)
    assert operations(site, "verify", "state") == [{"state": "DONE"}]


def test_damage_on_tape_is_found_when_it_is_there(site):
    """Bytes that are wrong after staging, twice, are set aside and the copy is made again."""
    (oid,) = on_both(site)
    (silo,) = (site.folder / "hsm/silo").iterdir()
    silo.write_bytes(b"evil!" * 99)
    ask_to_verify(site)
    site.settle()
    site.tape.mode = "at_once"
    site.tape.deliver()
    for _ in range(3):
        poll(site)
    assert len(site.private("tape", "quarantine")) == 1
    assert site.replicas(oid)["tape"] == "READY"
    assert site.visible("tape") == {"test/x0": b"bytes" * 99}


def test_a_drainer_that_is_lost_while_files_are_staged_loses_nothing(site):
    """What was asked for stays asked for: who takes the work over asks no second time."""
    oid = site.add_item("x", b"bytes", "tape")
    site.tape.migrate()
    plan_replication(site.context)
    site.settle()
    # killed as it looked again: the operation is RUNNING under a lease that runs out
    site.execute(
        "UPDATE operation SET state = 'RUNNING', lease_token = :t, lease_until = :until "
        "WHERE kind = 'copy'",
        t="00000000-0000-7000-8000-000000000001", until=site.now,
    )  # fmt: skip
    site.tape.deliver()
    poll(site)
    assert site.replicas(oid)["disk"] == "READY" and len(site.tape.calls()) == 1


def test_a_crash_amid_a_wait_ends_in_the_copy(site, database_url):
    """A process that stops for good at commits of every kind, from the plan to the request: who
    comes next makes the copy, and asks a second time at most."""
    usual, at, reached = site.context, 0, True
    while reached:
        at += 3
        oid = site.add_item(f"x{at}", b"bytes", "tape")
        site.tape.migrate()
        points = Points(at)
        engine = make_engine(database_url)
        watch_commits(engine, points)
        site.context = replace(usual, engine=engine, storages=StoragePool())
        try:
            site.settle()
            reached = False
        except Crash:
            pass
        end_connections(engine)
        site.context = usual
        site.advance(hours=1)  # leases have run out
        site.settle()
        site.tape.deliver()
        site.advance(minutes=10)
        site.settle()
        assert site.replicas(oid)["disk"] == "READY", points.names[-1]
        assert 1 <= sum([f"x{at}"] == call for call in site.tape.calls()) <= 2
    assert at > 8


def test_a_wait_that_nobody_looked_after_begins_anew(site):
    """A request of long ago, whose operation is gone, neither fails the next nor keeps it from
    being asked for."""
    oid = on_both(site)[0]
    ask_to_verify(site)
    site.settle()
    site.execute("UPDATE operation SET state = 'CANCELLED', finished_at = :now "
                 "WHERE kind = 'verify' AND state = 'QUEUED'", now=site.now)  # fmt: skip
    site.advance(days=30)
    ask_to_verify(site)
    site.settle()
    assert len(site.tape.calls()) == 2
    site.tape.deliver()
    poll(site)
    assert site.replica(oid, "tape")["checked_at"] == site.now


def test_what_nobody_waits_for_is_not_told_and_in_the_end_forgotten(site):
    """A wait whose operation is gone: after a day it is not counted, after a week not kept."""
    on_both(site)
    ask_to_verify(site)
    site.settle()
    for days, told in ((0.9, 1), (0.2, 0)):
        site.advance(days=days)
        overview = site.context.transact(lambda c: catalogue.waiting_overview(c, site.now))
        assert len(overview) == told
    assert site.context.transact(lambda c: catalogue.forget_waits(c, site.now)) == 0
    site.advance(days=7)
    assert site.context.transact(lambda c: catalogue.forget_waits(c, site.now)) == 1


def test_good_bytes_in_quarantine_on_tape_are_staged_and_brought_back(site):
    """A copy that was condemned wrongly and migrated: the look for it stages what was set aside."""
    (oid,) = on_both(site)
    uid = site.replica(oid, "tape")["uid"]
    aside = site.folder / f"tape/.dlm/quarantine/{uid}.1"
    aside.parent.mkdir(parents=True)
    (site.folder / "tape/test/x0").rename(aside)
    for state in ("SUSPECT", "CORRUPTED"):
        site.execute("UPDATE replica SET state = :s WHERE uid = :uid", s=state, uid=uid)
    ask_to_verify(site)
    site.work(OperationKind.VERIFY)
    assert site.tape.calls() == [[f".dlm/quarantine/{uid}.1"]]
    site.tape.deliver()
    site.advance(seconds=60)
    site.work(OperationKind.VERIFY)
    assert site.replicas(oid)["tape"] == "READY"
    assert site.visible("tape") == {"test/x0": b"bytes" * 99}


def test_staging_by_hand_comes_before_need(site):
    """Items are staged once, from one of their cold copies; then reading them waits for nothing."""
    oids = on_both(site, 3)
    ask = {"oids": oids, "actor": "user:test", "now": site.now}
    assert site.context.transact(lambda c: request_staging(c, **ask)) == 3
    assert site.context.transact(lambda c: request_staging(c, **ask)) == 0
    stage = {OperationKind.STAGE: execute_stage}
    drain(site.context, stage)
    (row,) = site.context.transact(lambda c: catalogue.waiting_overview(c, site.now))
    assert (row["storage"], row["files"], row["asked"], row["error"]) == ("tape", 3, 3, None)
    site.tape.deliver()
    site.advance(seconds=60)
    assert drain(site.context, stage).done == {"stage": 3}
    assert len(site.tape.calls()) == 1 and site.tape.stubs() == []
