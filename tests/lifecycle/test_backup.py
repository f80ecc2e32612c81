"""Backups of the catalogue, and what a restored one may and may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from sqlalchemy import Engine

from dlm_core.catalogue import backup, recovery, schema
from dlm_core.catalogue.engine import begin, make_engine
from dlm_core.catalogue.programs import address
from dlm_core.errors import (
    BackupError,
    CatalogueError,
    DlmError,
    IntegrityError,
    InvalidValueError,
    MissingProgramError,
    RestoreRefusedError,
)
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.expire import ExpiryPlanner
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind
from tests.sessions import end_sessions
from tests.site import Site, make_site


@pytest.fixture
def site(engine: Engine, tmp_path: Path) -> Site:
    """Two storages at two locations, one item on both."""
    site = make_site(engine, tmp_path)
    site.add_storage("a", "here")
    site.add_storage("b", "there")
    site.add_item("one", b"first", on="a", metadata='{"band": 5}')
    site.settle()
    return site


@pytest.fixture
def back(empty_database_url: str) -> str:
    """Where to restore to."""
    return empty_database_url


def reopened(site: Site, url: str) -> Site:
    """The same site on another catalogue."""
    other = make_site(make_engine(url), site.folder)
    other.now, other.storages = site.now, site.storages
    return other


def restored(site: Site, made: backup.Backup, url: str, **options: Any) -> Site:
    """A site on the catalogue that a backup gives back at the site's present."""
    found = backup.read_backup(made.path)
    backup.restore(url, found, actor="user:test", now=site.now, **options)
    return reopened(site, url)


def test_a_backup_is_whole_private_and_told(site: Site, database_url: str, tmp_path: Path) -> None:
    """A folder gets a file named after the time, readable by its owner alone, with a manifest that
    has schema, digest and counts; nothing temporary stays."""
    folder = tmp_path / "backups"
    folder.mkdir()
    made = backup.back_up(database_url, folder, now=site.now)
    assert sorted(f.name for f in folder.iterdir()) == [
        "dlm-20260601T000000Z.dump", "dlm-20260601T000000Z.dump.json",
    ]  # fmt: skip
    told = json.loads((folder / "dlm-20260601T000000Z.dump.json").read_text())
    assert told["schema"] == schema.expected_revision()
    assert (told["items"], told["replicas"]) == (1, 2)
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert backup.read_backup(made.path).manifest == told
    with pytest.raises(InvalidValueError, match="nothing is overwritten"):
        backup.back_up(database_url, made.path, now=site.now)


def test_a_restored_catalogue_is_the_same(site: Site, database_url: str, back: str) -> None:
    """All tables hold what they held, the recovery apart, and the schema keeps its rules."""
    made = backup.back_up(database_url, site.folder / "x.dump", now=site.now)
    again = restored(site, made, back)
    for table in ("data_item", "replica", "event", "operation", "storage", "tally"):
        query = f"SELECT t::text AS row FROM {table} t ORDER BY 1"
        assert again.query(query) == site.query(query)
    with pytest.raises(CatalogueError, match="never changed"):
        again.execute("DELETE FROM replica")
    assert again.context.transact(schema.check) == schema.expected_revision()


def expire_copy(site: Site, oid: Any, storage: str) -> None:
    """Let one copy's time be over now."""
    site.execute(
        "UPDATE replica SET expires_at = :now, expiry_reason = 'test' WHERE uid = :uid",
        uid=site.replica(oid, storage)["uid"],
        now=site.now,
    )


def refusals(site: Site) -> list[str]:
    """Why deletions were refused, in order."""
    query = "SELECT detail->>'reason' AS why FROM event WHERE action = 'refused' ORDER BY seq"
    return [row["why"] for row in site.query(query)]


def admit_all(site: Site) -> None:
    """What the registration job does."""
    drain(site.context, {OperationKind.ADMIT: execute_admit})


def test_a_drill_loses_nothing(site: Site, database_url: str, tmp_path: Path) -> None:
    """Filled, backed up, gone on, dropped, restored: a copy deleted since is found MISSING and
    counts for nobody's deletion, a file registered since is registered again."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    site.settle()
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    expire_copy(site, one, "a")
    site.settle()
    site.advance(hours=2)
    site.settle()
    assert site.replicas(one) == {"a": "DELETED", "b": "READY"}
    (tmp_path / "b" / "two").write_bytes(b"second")
    register_tree(site.context, Source("b", "test"), "two")
    admit_all(site)
    site.context.engine.dispose()
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    server = database_url.replace(str(name), "postgres")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
        connection.execute(f"CREATE DATABASE {name}".encode())

    again = restored(site, made, database_url)
    assert again.replicas(one) == {"a": "READY", "b": "READY"}
    # on the old catalogue's word this would be the end of the last copy
    again.set_storage("a", mode="read_only")
    again.advance(minutes=1)
    expire_copy(again, one, "b")
    again.settle()
    assert again.replicas(one) == {"a": "MISSING", "b": "READY"}
    again.advance(minutes=11)
    again.settle()
    assert again.replicas(one)["b"] == "READY"
    assert b"first" in again.visible("b").values()
    assert refusals(again) == ["the catalogue was recovered: this copy was not looked at since"]
    again.set_storage("a", mode="read_write")
    again.advance(minutes=11)
    again.settle()
    assert b"first" in again.visible("a").values()
    report = register_tree(again.context, Source("b", "test"), "two")
    admit_all(again)
    assert report.created == 1
    assert again.query("SELECT state FROM data_item WHERE uri = 'test:two'") == [{"state": "READY"}]


def test_copies_go_again_once_all_were_looked_at(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """A restored catalogue deletes a surplus copy by itself after it and its survivor were read."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    again.advance(minutes=1)
    expire_copy(again, one, "a")
    again.settle()
    assert again.replicas(one) == {"a": "READY", "b": "READY"}
    again.advance(minutes=11)
    again.settle()
    again.advance(hours=2)
    again.settle()
    assert again.replicas(one) == {"a": "DELETED", "b": "READY"}
    assert list(again.visible("a")) == []


def test_no_item_expires_before_a_person_confirms(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """An item's time of the old catalogue may have been prolonged since: it waits to be confirmed,
    and so does what lay in the trash."""
    two = site.add_item("two", b"second", on="a", target_phase="LIQUID", expires_at=site.now)
    site.settle()
    one = site.query("SELECT oid FROM data_item WHERE uri = 'test:one'")[0]["oid"]
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    assert again.replicas(two) == {"a": "TRASHED"}
    again.execute("UPDATE data_item SET expires_at = :now WHERE oid = :oid", now=site.now, oid=one)
    again.advance(days=2)
    again.settle()
    assert again.replicas(one) == {"a": "READY", "b": "READY"}
    assert again.replicas(two) == {"a": "TRASHED"}
    assert again.item(one)["state"] == "READY"
    again.context.transact(lambda c: recovery.confirm(c, "user:a", again.now))
    for _ in range(4):
        again.advance(hours=2)
        again.settle()
    assert set(again.replicas(one).values()) == {"DELETED"}
    assert again.replicas(two) == {"a": "DELETED"}
    with pytest.raises(DlmError, match="unconfirmed"):
        again.context.transact(lambda c: recovery.confirm(c, "user:a", again.now))


def test_the_database_itself_refuses_certificates_of_old_words(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """A certificate that names survivors not looked at since the restore is refused by a trigger,
    whoever writes it; a recovery is neither changed nor removed."""
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    a, b = (row["uid"] for row in again.query("SELECT uid FROM replica ORDER BY uid"))
    certificate = """
      INSERT INTO deletion (deletion_id, step, basis, uid, oid, storage_id, from_state, survivors,
                            survivor_weight, target_phase, holds_examined, reason, actor, proved_at,
                            valid_until)
      SELECT gen_random_uuid(), 'purge', 'replica_expired', r.uid, r.oid, r.storage_id, 'TRASHED',
             jsonb_build_array(jsonb_build_object('uid', CAST(:survivor AS text))), 4, 'SOLID', 0,
             'x', 'user:x', now(), now() + interval '1 hour' FROM replica r WHERE r.uid = :uid"""
    with pytest.raises(CatalogueError, match="a survivor was not looked at"):
        again.execute(certificate, uid=a, survivor=str(b))
    item = certificate.replace("replica_expired", "item_expired")
    with pytest.raises(CatalogueError, match="no item expires before"):
        again.execute(item, uid=a, survivor=str(b))
    with pytest.raises(CatalogueError, match="was not looked at since"):
        again.execute(certificate.replace("'purge'", "'trash'"), uid=a, survivor=str(b))
    for statement in ("UPDATE recovery SET recovered_at = now() - interval '1 year'",
                      "DELETE FROM recovery"):  # fmt: skip
        with pytest.raises(CatalogueError, match="never change"):
            again.execute(statement)


def test_a_place_that_is_anothers_by_now_is_left_alone(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """Bytes that changed since the backup are neither trashed nor set aside: they may be a newer
    version, which can be registered as that."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    (tmp_path / "a" / "one").write_bytes(b"a newer version")
    expire_copy(again, one, "a")
    for _ in range(4):
        again.advance(minutes=11)
        again.settle()
    assert again.visible("a") == {"one": b"a newer version"}
    assert again.replicas(one) == {"a": "SUSPECT", "b": "READY"}
    report = register_tree(again.context, Source("a", "test", new_version=True))
    admit_all(again)
    assert report.new_versions == 1
    versions = again.query("SELECT version, state FROM data_item ORDER BY version")
    assert versions == [{"version": 1, "state": "READY"}, {"version": 2, "state": "READY"}]


def test_an_unclean_backup_is_refused(site: Site, database_url: str, tmp_path: Path) -> None:
    """Changed bytes, a missing manifest, or a newer schema: nothing is restored."""
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    beside = backup.manifest_path(made.path)
    told = beside.read_text()
    beside.write_text(told.replace(f'"{schema.expected_revision()}"', '"9999"'))
    with pytest.raises(InvalidValueError, match="a newer DLM made it"):
        backup.read_backup(made.path)
    beside.write_text(told)
    data = bytearray(made.path.read_bytes())
    data[len(data) // 2] ^= 1
    made.path.write_bytes(data)
    with pytest.raises(IntegrityError):
        backup.read_backup(made.path)
    beside.unlink()
    with pytest.raises(InvalidValueError, match="manifest"):
        backup.read_backup(made.path)


def test_a_database_with_items_is_refused_unless_named(
    site: Site, database_url: str, tmp_path: Path
) -> None:
    """Into a database with items only by its name, not while others use it, and what was there is
    set aside, not destroyed."""
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    site.add_item("two", b"second", on="a")
    name = str(psycopg.conninfo.conninfo_to_dict(database_url)["dbname"])
    with pytest.raises(RestoreRefusedError, match="is not empty"):
        restored(site, made, database_url)
    with pytest.raises(RestoreRefusedError, match="is not empty"):
        restored(site, made, database_url, into_existing="other")
    with pytest.raises(RestoreRefusedError, match="other connections"):
        restored(site, made, database_url, into_existing=name)
    end_sessions(site.context.engine)
    again = restored(site, made, database_url, into_existing=name)
    assert again.query("SELECT uri FROM data_item") == [{"uri": "test:one"}]
    aside = again.query("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'before_restore%'")
    old = again.query(f"SELECT uri FROM {aside[0]['nspname']}.data_item ORDER BY uri")
    assert [row["uri"] for row in old] == ["test:one", "test:two"]


def test_a_restore_that_fails_leaves_the_database_as_it_was(
    site: Site, database_url: str, tmp_path: Path
) -> None:
    """A dump that breaks off in the middle changes nothing."""
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    data = made.path.read_bytes()
    made.path.write_bytes(data[: len(data) * 9 // 10])
    name = str(psycopg.conninfo.conninfo_to_dict(database_url)["dbname"])
    end_sessions(site.context.engine)
    with pytest.raises(BackupError, match="nothing was changed"):
        backup.restore(
            database_url, made, actor="user:test", now=site.now, into_existing=name
        )  # fmt: skip
    assert site.query("SELECT count(*) AS n FROM replica") == [{"n": 2}]
    assert site.query("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'before%'") == []


def test_a_backup_of_an_older_schema_is_upgraded(
    empty_database_url: str, database_url: str, engine: Engine, tmp_path: Path
) -> None:
    """A catalogue of revision 0001 comes back at the newest revision, and marked all the same."""
    old = make_engine(empty_database_url)
    with begin(old, "test") as connection:
        command.upgrade(schema._config(connection), "0001")
        connection.exec_driver_sql("SELECT dlm_ensure_partitions(now(), 3)")
    site = make_site(old, tmp_path)
    made = backup.back_up(empty_database_url, tmp_path / "x.dump", now=site.now)
    assert made.manifest["schema"] == "0001"
    end_sessions(old)
    backup.restore(
        empty_database_url, made, actor="user:test", now=site.now, into_existing=None
    )  # fmt: skip
    with begin(old, "test") as connection:
        assert schema.check(connection) == schema.expected_revision()
        assert recovery.recoveries(connection)[0]["source"].startswith("backup x.dump")
    old.dispose()


def test_the_feed_goes_on_after_the_old_servers_transactions(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """Events of a server that has counted further are visible at once, and later ones come behind
    them in the feed's order."""
    site.execute(
        "INSERT INTO event (xid, noun, action, actor) VALUES ('9999999999', 'audit', 'far', 'x')"
    )
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    again.execute("INSERT INTO event (noun, action, actor) VALUES ('audit', 'later', 'x')")
    feed = again.query("SELECT action FROM event_feed ORDER BY xid, seq")
    assert [row["action"] for row in feed][-2:] == ["far", "later"]
    assert len(feed) == again.query("SELECT count(*) AS n FROM event")[0]["n"]


def test_a_reader_who_was_ahead_of_the_backup_misses_nothing(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """It has seen events that the backup does not have, and goes on from its place: what happens
    after the restore lies behind that, the recovery itself first."""
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    site.execute(
        "INSERT INTO event (xid, noun, action, actor) VALUES ('9999999999', 'audit', 'lost', 'x')"
    )
    (place,) = site.query("SELECT xid, seq FROM event ORDER BY xid DESC LIMIT 1")
    again = restored(site, made, back)
    again.context.transact(recovery.note_recovery)
    again.execute("INSERT INTO event (noun, action, actor) VALUES ('audit', 'later', 'x')")
    found = again.query(
        """SELECT action FROM event_feed WHERE (xid, seq) > (CAST(:xid AS xid8), :seq)
            ORDER BY xid, seq""",
        xid=str(place["xid"]),
        seq=place["seq"],
    )
    assert [row["action"] for row in found] == ["recovered", "later"]


def test_no_password_is_on_a_command_line() -> None:
    """A password goes to PostgreSQL's programs by the environment only."""
    where, environment = address("postgresql://dlm:geheim@db:5433/dlm?sslmode=require")
    assert "geheim" not in where and environment["PGPASSWORD"] == "geheim"
    assert "port=5433" in where and "sslmode=require" in where


def test_missing_programs_are_told(site: Site, database_url: str, tmp_path: Path) -> None:
    """Without fitting programs it is said which, and where they were looked for."""
    with pytest.raises(MissingProgramError, match=r"pg_dump.*looked at: none in .*DLM_PG_BINDIR"):
        backup.back_up(database_url, tmp_path / "x.dump", now=site.now, bindir=tmp_path)
    assert not (tmp_path / "x.dump").exists()


def test_dagsters_database_comes_along(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """Its dump lies beside the catalogue's, named in the manifest, and is brought back."""
    name = str(psycopg.conninfo.conninfo_to_dict(database_url)["dbname"])
    dagster = database_url.replace(name, "dagster")
    with psycopg.connect(dagster, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS runs AS SELECT 1 AS id")
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now, dagster_url=dagster)
    assert made.dagster == tmp_path / "x.dagster.dump"
    found = backup.read_backup(made.path)
    with pytest.raises(RestoreRefusedError):
        backup.restore_dagster(dagster, found, now=site.now)
    assert backup.restore_dagster(back, found, now=site.now) is None
    with psycopg.connect(back) as connection:
        assert connection.execute("SELECT id FROM runs").fetchone() == (1,)


def test_an_old_trashing_moves_nothing_after_a_restore(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """What waited to be moved to the trash when the backup was made stays where it is: its place
    may be a newer payload's."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    expire_copy(site, one, "a")
    ExpiryPlanner(10, 1 << 40)(site.context)
    assert site.replicas(one)["a"] == "TRASHED"
    assert site.visible("a") == {"one": b"first"}
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    (tmp_path / "a" / "one").write_bytes(b"a newer payload")
    for _ in range(4):
        again.settle()
        again.advance(hours=2)
    assert again.visible("a") == {"one": b"a newer payload"}


def test_a_survivor_that_was_not_looked_at_is_none(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """A copy that was read since the restore stays while the one it would leave was not."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    site.execute("UPDATE data_item SET target_phase = 'LIQUID'")
    again = restored(site, backup.back_up(database_url, tmp_path / "x.dump", now=site.now), back)
    again.advance(minutes=1)
    again.context.transact(
        lambda c: request_verification(
            c, actor="user:a", now=again.now, storage_id=again.storages["a"]
        )
    )
    again.settle()
    expire_copy(again, one, "a")
    ExpiryPlanner(10, 1 << 40)(again.context)
    assert again.replicas(one) == {"a": "READY", "b": "READY"}
    assert refusals(again) == [
        "the catalogue was recovered: the copies that would be left were not all looked at since"
    ]


def test_what_was_trashed_since_the_backup_comes_back_from_there(
    site: Site, database_url: str, back: str, tmp_path: Path
) -> None:
    """The old catalogue believes in copies whose bytes lie in the trash by now, where no restore of
    its own would look for them: the item is not lost."""
    one = site.query("SELECT oid FROM data_item")[0]["oid"]
    made = backup.back_up(database_url, tmp_path / "x.dump", now=site.now)
    site.execute("UPDATE data_item SET expires_at = :now", now=site.now)
    site.settle()
    assert site.visible("a") == site.visible("b") == {}
    again = restored(site, made, back)
    again.advance(minutes=1)
    again.context.transact(lambda c: request_verification(c, actor="user:a", now=again.now))
    again.settle()
    assert again.replicas(one) == {"a": "READY", "b": "READY"}
    assert again.item(one)["state"] == "READY"
    for name in "ab":
        assert [*again.visible(name).values()] == [b"first"] and not again.private(name, "trash")
