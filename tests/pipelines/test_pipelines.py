"""Jobs and sensors on a real catalogue and real files, without daemon."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
import yaml

from dlm_core.catalogue.browse import set_item_expiry
from dlm_core.catalogue.engine import make_engine
from dlm_core.catalogue.places import set_storage
from dlm_core.catalogue.plans import approve_plan
from dlm_core.clock import utc_now
from dlm_core.errors import DataRefusedError, InvalidValueError
from dlm_core.lifecycle import pack
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.lost import lose_storage, take_back
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import execute_copy, plan_replication
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from dlm_pipelines import jobs, maintenance, sensors
from dlm_pipelines.definitions import defs
from dlm_pipelines.jobs import JOBS
from dlm_pipelines.launch import launch_job
from dlm_pipelines.resources import Catalogue
from tests.site import make_site
from tests.tape import Tape


@pytest.fixture
def site(engine, database_url, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DLM_DATABASE_URL", database_url)
    monkeypatch.setenv("DLM_LINGER_SECONDS", "0")
    monkeypatch.setenv("DLM_TRASH_GRACE_SECONDS", "0")
    site = make_site(engine, tmp_path)
    site.context.clock = utc_now
    for name, location in (("a", "A"), ("b", "B")):
        site.add_storage(name, location)
    return site


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def execute(instance, name, **config):
    ops = {"ops": {f"drain_{name}": {"config": config}}} if config else {}
    return JOBS[name].execute_in_process(
        run_config=ops, instance=instance, resources={"catalogue": Catalogue()},
        raise_on_error=False,
    )  # fmt: skip


def metadata(result, name):
    (event,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
    return {key: value.value for key, value in event.event_specific_data.metadata.items()}


def sensor(instance, name):
    context = dg.build_sensor_context(instance=instance, resources={"catalogue": Catalogue()})
    (definition,) = [s for s in sensors.SENSORS if s.name == f"{name}_sensor"]
    return definition.evaluate_tick(context)


DAY = timedelta(days=1)


def register(site, files):
    for path, data in files.items():
        (site.folder / "a" / path).write_bytes(data)
    return register_tree(site.context, Source("a", "test"))


def expire(site, *uris):
    for uri in uris:
        site.context.transact(
            lambda c, u=uri: set_item_expiry(c, u, site.context.clock(), "no longer wanted")
        )


def private(site):
    return len(site.private("a", "trash") + site.private("b", "trash"))


def test_definitions_load():
    """The code location has the jobs, a sensor for each, and the housekeeping."""
    names = {job.name for job in defs.resolve_all_job_defs()}
    assert {f"{name}_job" for name in JOBS} | {"maintenance_job"} <= names
    assert {s.name for s in sensors.SENSORS} == {f"{name}_sensor" for name in JOBS}
    assert all(s.default_status is dg.DefaultSensorStatus.RUNNING for s in sensors.SENSORS)


def test_the_jobs_take_an_item_through_its_life(site, instance):
    """Registered, admitted, copied, expired, purged; each run tells what it did in numbers."""
    register(site, {"x": b"one", "y": b"two"})
    result = execute(instance, "registration")
    assert result.success and metadata(result, "registration")["done_admit"] == 2
    result = execute(instance, "replication")
    told = metadata(result, "replication")
    assert (told["done_copy"], told["bytes"], told["failed"]) == (2, 6, 0)
    assert "dlm item why test:x" in told["slowest"]
    site.context.transact(
        lambda c: set_item_expiry(c, "test:x", site.context.clock(), "no longer wanted")
    )
    told = metadata(execute(instance, "expiry"), "expiry")
    assert told["done_trash"] == 2
    execute(instance, "expiry")
    states = site.query("SELECT uri, state FROM data_item ORDER BY uri")
    assert [tuple(row.values()) for row in states] == [("test:x", "DELETED"), ("test:y", "READY")]


def test_what_waits_for_staging_is_in_the_runs_numbers(site, instance):
    """A copy from tape that waits: how many files, by storage; none of it failed."""
    register(site, {"x": b"one", "y": b"two"})
    execute(instance, "registration")
    tape = Tape(site.folder / "a", site.folder / "hsm")
    tape.migrate()
    site.set_storage("a", config=json.dumps(tape.config()))
    told = metadata(execute(instance, "replication"), "replication")
    assert (told["waiting_for_staging_a"], told["tried_again"], told["failed"]) == (2, 2, 0)
    assert "| a | 2 | 2 |" in told["staging"] and tape.calls() == [["x", "y"]]
    assert sensor(instance, "replication").skip_message == "nothing is due"


@pytest.mark.parametrize("name", ["registration", "replication", "expiry", "rebalance"])
def test_a_dry_run_shows_and_changes_nothing(site, instance, name):
    """Proposals are a table in the run's metadata: what is queued, and what would be planned."""
    register(site, {"x": b"one"})
    if name != "registration":
        execute(instance, "registration")
    if name in ("expiry", "rebalance"):
        execute(instance, "replication")
        site.set_storage("a", capacity_bytes=3)
        site.add_storage("c", "C")
    if name == "expiry":
        site.context.transact(
            lambda c: set_item_expiry(c, "test:x", site.context.clock(), "no longer wanted")
        )
    counts = "SELECT (SELECT count(*) FROM event) AS e, (SELECT count(*) FROM operation) AS o"
    before = site.query(counts)
    told = metadata(execute(instance, name, dry_run=True), name)
    assert told["dry_run"] is True and told["proposed"] >= 1
    after = site.query(counts)
    assert after == before


@pytest.mark.parametrize("name", ["registration", "replication", "expiry"])
def test_a_dry_run_says_that_more_is_due_than_it_shows(site, instance, name, monkeypatch):
    """Totals of the first of what is due are not told as totals of all."""
    monkeypatch.setattr(jobs, "_PROPOSED", 1)
    register(site, {"x": b"one"})
    if name != "registration":
        execute(instance, "registration")
    if name == "expiry":
        site.execute("UPDATE data_item SET expires_at = :now", now=site.context.clock())
    assert "more" not in metadata(execute(instance, name, dry_run=True), name)
    register(site, {"y": b"two"})
    if name != "registration":
        execute(instance, "registration")
    if name == "expiry":
        site.execute("UPDATE data_item SET expires_at = :now", now=site.context.clock())
    assert "more is due" in metadata(execute(instance, name, dry_run=True), name)["more"]


def test_a_dry_run_of_expiry_shows_what_that_run_would_do(site, instance):
    """With its own config: nothing planned without a plan, and the limit that stops it."""
    register(site, {"x": b"one", "y": b"two"})
    execute(instance, "registration")
    site.execute("UPDATE data_item SET expires_at = :now", now=site.context.clock())
    told = metadata(execute(instance, "expiry", dry_run=True), "expiry")
    assert told["proposed"] == 2 and "stopped" not in told
    assert "| test:x | trash the copy on a: its item has expired |" in told["proposals"]
    told = metadata(execute(instance, "expiry", dry_run=True, max_delete_items=1), "expiry")
    assert told["stopped"].startswith("by DLM_MAX_DELETE_ITEMS=1: ")
    told = metadata(execute(instance, "expiry", dry_run=True, plan=False), "expiry")
    assert told["proposed"] == 0 and "stopped" not in told


def test_sensors_ask_for_runs_only_when_work_is_due(site, instance):
    """Nothing due: skipped, in words. Work due: a run. Runs at it already: none more."""
    for name in JOBS:
        if name != "rebalance":
            assert sensor(instance, name).skip_message == "nothing is due"
    register(site, {"x": b"one"})
    assert len(sensor(instance, "registration").run_requests) == 1
    for _ in range(2):
        instance.create_run_for_job(JOBS["registration"], status=dg.DagsterRunStatus.STARTED)
    result = sensor(instance, "registration")
    assert not result.run_requests and "2 runs are at it" in result.skip_message


def test_a_catalogue_that_is_down_is_told_not_failed(site, instance, monkeypatch):
    """The tick is skipped with the reason."""
    monkeypatch.setenv("DLM_DATABASE_URL", "postgresql://dlm@127.0.0.1:1/none")
    result = sensor(instance, "replication")
    assert not result.run_requests and "cannot be reached" in result.skip_message


def test_an_older_schema_starts_no_runs(site, instance):
    """They would fail, each within seconds; what to do is told."""
    register(site, {"x": b"one"})
    site.execute("UPDATE alembic_version SET version_num = '0011'")
    assert "dlm db upgrade" in sensor(instance, "registration").skip_message


def test_runs_that_all_fail_are_asked_for_more_rarely(site, instance, monkeypatch):
    """After three the next one waits a minute; one that is well ends that."""
    register(site, {"x": b"one"})
    with monkeypatch.context() as broken:
        broken.setattr(jobs, "drain", None)
        for _ in range(3):
            assert sensor(instance, "registration").run_requests
            assert not execute(instance, "registration").success
    result = sensor(instance, "registration")
    assert not result.run_requests and "the last runs failed" in result.skip_message
    assert execute(instance, "registration").success
    register(site, {"y": b"two"})
    assert sensor(instance, "registration").run_requests


def test_too_much_to_delete_waits_for_an_operator(site, instance, monkeypatch):
    """The run that finds it fails in one line; then the sensor says what waits and how to go on,
    and a run cannot raise the limit by itself; approved, it is done."""
    register(site, {"x": b"one", "y": b"two"})
    execute(instance, "registration")
    execute(instance, "replication")
    monkeypatch.setenv("DLM_MAX_DELETE_ITEMS", "3")
    expire(site, "test:x", "test:y")
    assert sensor(instance, "expiry").run_requests
    assert not execute(instance, "expiry", max_delete_items=4).success
    assert site.query("SELECT count(*) AS n FROM deletion")[0]["n"] == 0
    (plan,) = site.query("SELECT * FROM plan")
    told = sensor(instance, "expiry")
    assert not told.run_requests and f"dlm plan approve {plan['plan_id']}" in told.skip_message
    site.context.transact(
        lambda c: approve_plan(
            c, plan["plan_id"], actor="user:kim", now=site.context.clock(), valid_for=DAY
        )
    )
    assert sensor(instance, "expiry").run_requests
    assert execute(instance, "expiry").success
    assert site.query("SELECT count(*) AS n FROM deletion WHERE plan_id IS NOT NULL")[0]["n"] == 4


def test_checks_that_are_due_are_asked_for_and_done(site, instance):
    """After the storage's interval the sensor asks for a run, which tells how old the looks are."""
    register(site, {"x": b"one"})
    execute(instance, "registration")
    execute(instance, "replication")
    assert not sensor(instance, "verification").run_requests
    site.execute(
        """UPDATE replica SET created_at = created_at - interval '91 days',
                  checked_at = checked_at - interval '91 days',
                  check_from = check_from - interval '91 days'"""
    )
    (request,) = sensor(instance, "verification").run_requests
    assert "storages with checks due: a, b" in request.tags["dlm/due"]
    result = execute(instance, "verification")
    assert result.success and result.output_for_node("drain_verification") == 2
    (event,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
    assert "oldest" in event.event_specific_data.metadata["verification"].value
    assert not sensor(instance, "verification").run_requests


def test_certified_deletions_go_on_while_too_much_waits(site, instance, monkeypatch):
    """What waits for approval keeps nothing else from being done."""
    register(site, {"x": b"one", "y": b"two", "z": b"six"})
    execute(instance, "registration")
    execute(instance, "replication")
    monkeypatch.setenv("DLM_TRASH_GRACE_SECONDS", "3600")
    expire(site, "test:x")
    assert execute(instance, "expiry").success
    assert private(site) == 2
    site.execute("UPDATE operation SET due_at = now() WHERE kind = 'purge' AND state = 'QUEUED'")
    monkeypatch.setenv("DLM_MAX_DELETE_ITEMS", "3")
    expire(site, "test:y", "test:z")
    assert not execute(instance, "expiry").success
    assert sensor(instance, "expiry").run_requests
    assert execute(instance, "expiry").success
    assert private(site) == 0
    assert len(site.visible("a")) == len(site.visible("b")) == 2


def test_failures_are_told_with_what_to_ask(site, instance):
    """The run succeeds; its metadata names causes, and the command that explains each failure."""
    register(site, {"it's here": b"one", "y": b"two"})
    (site.folder / "a" / "it's here").unlink()
    result = execute(instance, "registration")
    told = metadata(result, "registration")
    assert result.success and (told["failed"], told["done_admit"]) == (1, 1)
    assert "| DLM-303 | failed | 1 |" in told["failures"]
    (line,) = told["first_failures"].splitlines()[2:]
    assert "DLM-303: storage a has no payload" in line and "`dlm item why " in line


@pytest.mark.parametrize(
    "config", [{"batch_size": 0}, {"linger_seconds": -1.0}, {"linger_seconds": 1e12}]
)
def test_a_value_out_of_range_is_one_line(site, instance, config):
    """The run fails with the name of the setting and what is right, and no traceback of ours."""
    (failure,) = [
        e
        for e in execute(instance, "replication", **config).all_events
        if e.event_type_value == "STEP_FAILURE"
    ]
    told = failure.event_specific_data.user_failure_data.description
    name = next(iter(config)).upper()
    assert told.startswith(f"DLM-101: DLM_{name} ") and "\n" not in told


def test_a_sensor_is_quick(site, instance):
    """Due or not, a tick takes less than 100 ms; the quickest counts, since machines are noisy."""
    register(site, {f"f{n}": b"one" for n in range(50)})

    def seconds(name: str) -> float:
        begun = time.monotonic()
        sensor(instance, name)
        return time.monotonic() - begun

    for name in JOBS:
        assert any(seconds(name) < 0.1 for _ in range(50)), name


def test_a_long_tally_is_folded_by_a_sensor(site, instance):
    """Its rows become few, its sums stay."""
    register(site, {"x": b"one"})
    site.execute(
        "INSERT INTO tally SELECT 'item', NULL, 'READY', n, 2 * n "
        "FROM generate_series(1, 6000), (VALUES (1), (-1)) v(n)"
    )
    sums = (
        "SELECT noun, state, sum(n) AS n FROM tally GROUP BY 1, 2 HAVING sum(n) <> 0 ORDER BY 1, 2"
    )
    before = site.query(sums)
    sensor(instance, "rebalance")
    assert site.query("SELECT count(*) AS n FROM tally")[0]["n"] < 10
    assert site.query(sums) == before


def test_two_drainers_never_do_one_operation_twice(site, database_url):
    """Both work, each operation is claimed once, each copy becomes READY once."""
    register(site, {f"f{n}": b"x" * n for n in range(1, 301)})
    site.context.settings = site.context.settings.model_copy(update={"batch_size": 10})
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    plan_replication(site.context)
    contexts = [
        replace(site.context, engine=make_engine(database_url), worker=f"worker:{n}")
        for n in range(2)
    ]
    both = threading.Barrier(2)

    def work(context):
        first = iter([True])

        def copy(context, claim):
            if next(first, False):
                both.wait(60)  # until the other has a claim too
            return execute_copy(context, claim)

        return drain(context, {OperationKind.COPY: copy}, linger_seconds=0.5)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(work, contexts))
    for context in contexts:
        context.engine.dispose()
    assert [sum(r.failed.values()) + sum(r.retried.values()) for r in reports] == [0, 0]
    assert sum(r.done["copy"] for r in reports) == 300
    assert min(r.done["copy"] for r in reports) > 0
    done = site.query("SELECT attempts, state FROM operation WHERE kind = 'copy'")
    assert [(row["attempts"], row["state"]) for row in done] == [(1, "DONE")] * 300
    ready = site.query(
        "SELECT count(*) AS n, count(DISTINCT uid) AS uids FROM event WHERE noun = 'replica' "
        "AND storage_id = :b AND new_state = 'READY' AND old_state = 'PENDING'",
        b=site.storages["b"],
    )
    assert tuple(ready[0].values()) == (300, 300)


def test_housekeeping_runs(site, instance):
    """Partitions, tally, temporary files, old runs."""
    from dlm_pipelines.maintenance import maintenance_job

    register(site, {"x": b"one"})
    before = site.query("SELECT noun, state, sum(n) AS n FROM tally GROUP BY 1, 2 ORDER BY 1, 2")
    assert maintenance_job.execute_in_process(
        instance=instance, resources={"catalogue": Catalogue()}
    ).success
    after = site.query("SELECT noun, state, sum(n) AS n FROM tally GROUP BY 1, 2 ORDER BY 1, 2")
    assert after == before


def test_all_old_runs_are_forgotten_with_what_they_left(site, instance, monkeypatch):
    """However many there are; what they printed goes with them, and what has not ended stays."""
    monkeypatch.setenv("DLM_DAGSTER_RETENTION_DAYS", "0.00001")
    monkeypatch.setattr(maintenance, "_PRUNED_AT_ONCE", 2)
    job = defs.resolve_job_def("rebalance_job")
    runs = [job.execute_in_process(instance=instance).run_id for _ in range(5)]
    deleted = []
    monkeypatch.setattr(
        instance.compute_log_manager, "delete_logs", lambda prefix: deleted.append(*prefix)
    )
    result = Path(instance.storage_directory()) / runs[0] / "result"
    assert not result.parent.exists(), "nothing reads what a job returns"
    result.parent.mkdir(parents=True)
    result.touch()
    waiting = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED).run_id
    time.sleep(1)
    resources = {"catalogue": Catalogue()}
    done = maintenance.maintenance_job.execute_in_process(instance=instance, resources=resources)
    assert done.success
    assert {run.run_id for run in instance.get_runs()} == {waiting, done.run_id}
    assert sorted(deleted) == sorted(runs)
    assert not result.parent.exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [(DataRefusedError(message="two would overlap"), "DLM-210: "), (OverflowError("two"), "two")],
)
def test_a_part_of_the_catalogue_s_own_maintenance_keeps_no_other(
    site, instance, monkeypatch, error, line
):
    """The catalogue refuses one, or nobody expects what it does: the rest is done, and the run has
    failed and says why."""
    resources = {"catalogue": Catalogue()}

    def refused(*_):
        raise error

    monkeypatch.setattr(maintenance, "ensure_partitions", refused)
    for name in "xy":
        register(site, {name: b"one"})
    tallied = "SELECT count(*) AS n FROM tally WHERE noun = 'item'"
    assert site.query(tallied)[0]["n"] > 1
    done = maintenance.maintenance_job.execute_in_process(
        instance=instance, resources=resources, raise_on_error=False
    )
    (failed,) = (one for one in done.all_events if one.is_step_failure)
    told = failed.step_failure_data.error.to_string()
    assert not done.success
    assert line in told
    assert site.query(tallied)[0]["n"] == 1


def test_the_maintenance_packs_where_a_storage_wants_bundles(site, instance):
    """One that is down does not keep the others from it."""
    from dlm_pipelines.maintenance import maintenance_job

    terms = '{"bundle_bytes": 100, "bundle_after_hours": 0}'
    for name in ("down", "vault"):
        site.add_storage(name, name, config=terms, phase="PLASMA")
    site.add_item("small", b"1", "vault")
    (site.folder / "down").rmdir()
    resources = {"catalogue": Catalogue()}
    assert maintenance_job.execute_in_process(instance=instance, resources=resources).success
    assert not (site.folder / "vault" / "small").exists()
    assert len(list((site.folder / "vault" / ".dlm/bundles/tar").glob("*.tar"))) == 1


def test_what_nobody_expects_of_one_storage_fails_the_maintenance_at_its_end(
    site, instance, monkeypatch
):
    """The others are packed all the same."""
    from dlm_pipelines.maintenance import maintenance_job

    terms = '{"bundle_bytes": 100, "bundle_after_hours": 0}'
    for name in ("odd", "vault"):
        site.add_storage(name, name, config=terms, phase="PLASMA")
        site.add_item(f"on/{name}", b"1", name)
    pack_storage = pack.pack_storage

    def odd(context, name, **more):
        if name == "odd":
            raise OverflowError("nobody expects this")
        return pack_storage(context, name, **more)

    monkeypatch.setattr(pack, "pack_storage", odd)
    ended = maintenance_job.execute_in_process(
        instance=instance, resources={"catalogue": Catalogue()}, raise_on_error=False
    )
    assert not ended.success
    assert (site.folder / "odd/on/odd").exists() and not (site.folder / "vault/on/vault").exists()


def test_storages_describe_themselves_where_the_site_says_so(site, instance, monkeypatch):
    """DLM_EXPORT_HOURS lets the maintenance export what was not for so long; a storage that is
    down does not keep the others from it."""
    from dlm_pipelines.maintenance import maintenance_job

    def maintain():
        resources = {"catalogue": Catalogue()}
        assert maintenance_job.execute_in_process(instance=instance, resources=resources).success
        found = site.query(
            "SELECT name FROM storage_export JOIN storage USING (storage_id) ORDER BY name"
        )
        return [row["name"] for row in found]

    assert maintain() == []
    monkeypatch.setenv("DLM_EXPORT_HOURS", "24")
    names = [row["name"] for row in site.query("SELECT name FROM storage ORDER BY name")]
    (site.folder / names[0]).rename(site.folder / "gone")
    assert maintain() == names[1:]
    (site.folder / "gone").rename(site.folder / names[0])
    assert maintain() == names


def test_a_storage_that_is_back_is_audited_by_the_verification_job(site, instance):
    """Its sensor asks for a run as long as there is something to read or the audit to end."""
    register(site, {"x": b"one", "y": b"two"})
    execute(instance, "registration")
    execute(instance, "replication")
    assert sensor(instance, "verification").skip_message
    lose_storage(site.context, "b", "unplugged")
    take_back(site.context, "b")
    assert "checks due: b" in sensor(instance, "verification").run_requests[0].tags["dlm/due"]
    told = metadata(execute(instance, "verification"), "verification")
    assert told["done_verify"] == 2
    assert site.query("SELECT mode FROM storage WHERE name = 'b'") == [{"mode": "read_write"}]
    assert sensor(instance, "verification").skip_message


def test_a_drain_tells_its_progress_in_the_runs_metadata(site, instance):
    """The bytes left, which plot across runs, and a table."""
    register(site, {"x": b"one"})
    execute(instance, "registration")
    execute(instance, "replication")
    site.context.transact(lambda c: set_storage(c, "b", {"mode": "draining"}))
    told = metadata(execute(instance, "rebalance"), "rebalance")
    assert told["left_bytes_b"] == 3 and "stuck_items" in told["drains"]
    site.context.transact(lambda c: set_storage(c, "b", {"mode": "read_write"}))
    assert "drains" not in metadata(execute(instance, "rebalance"), "rebalance")


def test_a_job_takes_plain_values_only():
    """A variable that Dagster would look up, and lack, is no outage of its UI: it isn't asked."""
    for value in ({"env": "NO_SUCH"}, [1]):
        with pytest.raises(InvalidValueError, match=r"batch_size=.*a plain value"):
            launch_job("http://127.0.0.1:1", "expiry", {"batch_size": value})


def test_a_busy_run_ends_before_dagster_ends_it():
    """As failed, in the middle of what it does."""
    told = yaml.safe_load((Path(__file__).parents[2] / "dagster.yaml").read_text())
    assert told["run_monitoring"]["max_runtime_seconds"] >= 2 * jobs._MOST_SECONDS


def test_a_run_whose_copy_takes_long_is_let_go_on(site, instance, monkeypatch):
    """While bytes come through Dagster is told to let it last longer; of what is soon over it is
    told nothing."""
    monkeypatch.setattr(jobs, "_MOST_SECONDS", 0.5)
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.5)
    register(site, {"x": bytes(3 << 20)})
    assert dg.MAX_RUNTIME_SECONDS_TAG not in tags_of(instance, execute(instance, "registration"))
    site.set_storage("b", max_bytes_per_second=1 << 20)
    told = tags_of(instance, execute(instance, "replication"))
    assert site.replica(site.query("SELECT oid FROM data_item")[0]["oid"], "b")["state"] == "READY"
    assert int(told[dg.MAX_RUNTIME_SECONDS_TAG]) >= 2


def test_a_run_that_cannot_tell_dagster_so_goes_on(site, instance, monkeypatch):
    """Its database may be away for a while: the copy is what counts."""

    def away(*_):
        raise OSError("no database")

    monkeypatch.setattr(jobs, "_MOST_SECONDS", 0.3)
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.3)
    register(site, {"x": bytes(2 << 20)})
    execute(instance, "registration")
    site.set_storage("b", max_bytes_per_second=1 << 20)
    monkeypatch.setattr(type(instance), "add_run_tags", away)
    assert execute(instance, "replication").success
    assert site.query("SELECT count(*) AS n FROM replica WHERE state = 'READY'") == [{"n": 2}]


def tags_of(instance, result):
    return instance.get_run_by_id(result.run_id).tags
