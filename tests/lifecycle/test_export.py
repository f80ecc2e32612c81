"""What a storage carries of itself: only changes are written, and nothing half done is believed."""

from __future__ import annotations

import gzip
import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dlm_core.catalogue import backup, describe
from dlm_core.catalogue.engine import begin, make_engine, run
from dlm_core.errors import (
    ExportRunningError,
    IntegrityError,
    InvalidValueError,
    PayloadExistsError,
    StorageUnavailableError,
)
from dlm_core.lifecycle.description import FOLDER, Index, newest_index, read_index
from dlm_core.lifecycle.export import ExportReport, export_due, export_storage
from dlm_core.lifecycle.ingest import set_metadata
from dlm_core.lifecycle.work import StoragePool
from dlm_core.storages.open import open_storage
from tests.backends import s3_config
from tests.fakes import Hooked
from tests.site import Site, make_site, reopen


@pytest.fixture
def site(engine: Engine, tmp_path: Path) -> Site:
    """Forty items on two storages at two locations."""
    site = make_site(engine, tmp_path)
    for name, location in (("a", "here"), ("b", "there")):
        site.add_storage(name, location)
    for number in range(40):
        site.add_item(f"f{number}", b"%d" % number, on="a", target_phase="LIQUID")
    return site


def export(site: Site, name: str = "a", **options: Any) -> ExportReport:
    return export_storage(site.context, name, **options)


def index_of(site: Site, name: str = "a") -> Index:
    index, problems = newest_index(open_storage(name, "posix", str(site.folder / name), {}))
    assert index is not None and problems == []
    return index


def lines(site: Site, name: str = "a") -> dict[str, dict[str, Any]]:
    """What the newest description of a storage says, by uri."""
    found = {}
    for prefix, file in index_of(site, name).files.items():
        if prefix != "site":
            data = gzip.decompress((site.folder / name / file.path(prefix)).read_bytes())
            found |= {one["uri"]: one for one in map(json.loads, data.splitlines())}
    return found


def test_only_what_changed_is_written_again(site: Site) -> None:
    """The second export of a quiet storage writes no file; a change of metadata, a new item and a
    copy that went write the files they are in, and no others."""
    first = export(site)
    assert (first.generation, first.replicas) == (1, 40)
    assert first.written == first.files > 8
    assert export(site).written == 0
    one = site.query("SELECT oid FROM data_item WHERE uri = 'test:f7'")[0]["oid"]
    set_metadata(site.context, one, {"band": 5})
    assert export(site).written == 1
    assert lines(site)["test:f7"]["metadata"] == {"band": 5}
    site.add_item("new", b"new", on="a")
    assert export(site).written == 1
    site.add_item("elsewhere", b"new", on="b", target_phase="LIQUID")
    assert export(site).written == 0
    eight = site.query("SELECT oid FROM data_item WHERE uri = 'test:f8'")[0]["oid"]
    site.execute("UPDATE data_item SET expires_at = :t WHERE oid = :o", t=site.now, o=eight)
    site.settle()
    export(site)
    assert lines(site)["test:f8"]["state"] == "TRASHED"
    site.advance(hours=2)
    site.settle()
    assert export(site).written <= 2
    assert "test:f8" not in lines(site) and len(lines(site)) == 40
    assert export(site).written == 0


def test_a_late_commit_is_not_passed_over(site: Site) -> None:
    """A change whose transaction is still open while two exports run is in the one after."""
    export(site)
    with begin(site.context.engine, "user:slow") as connection:
        run(connection, "UPDATE data_item SET tags = '{\"late\": 1}' WHERE uri = 'test:f3'")
        site.add_item("quick", b"quick", on="a")
        assert export(site).written == 1
        assert export(site).written == 0
        assert lines(site)["test:f3"]["tags"] == {}
    export(site)
    assert lines(site)["test:f3"]["tags"] == {"late": 1}
    assert export(site).written <= 2
    assert export(site).written == 0


def test_the_cost_of_a_question_follows_what_changed(site: Site) -> None:
    """After an export the feed is read from where that one ended, not from its beginning."""
    export(site)
    known = site.context.transact(lambda c: describe.load_progress(c, site.storages["a"]))
    newest = site.query("SELECT max(seq) AS n FROM event")[0]["n"]
    assert known is not None and known["low_seq"] == newest


def test_two_generations_stay(site: Site) -> None:
    """Files that neither this description nor the one before names are removed; both are whole."""
    for number in range(4):
        site.add_item(f"more{number}", b"x", on="a")
        export(site)
    there = {str(Path(FOLDER, name)) for name in site.private("a", "manifest")}
    storage = open_storage("a", "posix", str(site.folder / "a"), {})
    assert there == read_index(storage, 4).paths | read_index(storage, 3).paths
    assert site.private("a", "tmp") == []


def test_a_storage_that_breaks_off_keeps_the_description_before(site: Site) -> None:
    """Whichever write, rename or removal fails, the newest index there is whole and names whole
    files, and the next export leaves nothing behind."""
    export(site)
    calls = 0

    def fail_at(wanted: int) -> Any:
        def hook(call: str, path: str) -> None:
            nonlocal calls
            if call in ("write", "rename", "remove", "flush"):
                calls += 1
                if calls == wanted:
                    raise StorageUnavailableError(storage="a", message="gone")

        return lambda row: Hooked(open_storage(row["name"], "posix", row["root"], {}), hook)

    for wanted in range(1, 12):
        site.add_item(f"more{wanted}", b"x", on="a")
        calls = 0
        reopen(site, fail_at(wanted))
        try:
            export(site)
        except StorageUnavailableError:
            pass
        reopen(site, None)
        assert len(lines(site)) in (39 + wanted, 40 + wanted)
        export(site)
        assert len(lines(site)) == 40 + wanted
        named = read_index(opened(site), index_of(site).generation - 1).paths
        there = {f"{FOLDER}/{name}" for name in site.private("a", "manifest")}
        assert there == named | index_of(site).paths
    assert calls < 12


def opened(site: Site) -> Any:
    return open_storage("a", "posix", str(site.folder / "a"), {})


def test_lost_files_are_written_again_and_damaged_ones_by_a_full_export(site: Site) -> None:
    """A file that went is noticed by the next export; one with other bytes by a full one."""
    export(site)
    first, second = sorted(prefix for prefix in index_of(site).files if prefix != "site")[:2]
    (site.folder / "a" / index_of(site).files[first].path(first)).unlink()
    assert export(site).written == 0
    assert len(lines(site)) == 40
    damaged = site.folder / "a" / index_of(site).files[second].path(second)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    export(site, full=True)
    assert len(lines(site)) == 40


def test_a_damaged_index_is_told_and_the_one_before_is_used(site: Site) -> None:
    """A bit flipped in the newest index: it is not believed, the one before is."""
    export(site)
    export(site)
    file = site.folder / "a" / index_of(site).path
    file.write_text(file.read_text().replace('"digits": 1', '"digits": 2'))
    index, problems = newest_index(opened(site))
    assert index is not None and index.generation == 1
    assert len(problems) == 1 and "index-00000002.json" in problems[0]
    with pytest.raises(IntegrityError):
        read_index(opened(site), 2)


def test_one_at_a_time(site: Site, database_url: str) -> None:
    """Two exports of one storage never run at once; those of two storages may."""
    engine = make_engine(database_url)
    with describe.exporting(engine, "user:other", site.storages["a"], "a"):
        with pytest.raises(ExportRunningError):
            export(site)
        assert export(site, "b").generation == 1
    assert export(site).generation == 1
    engine.dispose()


def test_what_another_catalogue_wrote_is_not_taken_for_ours(site: Site) -> None:
    """An index that this catalogue did not write: all is written anew, under the next number."""
    export(site)
    site.execute("UPDATE storage_export SET index_path = '.dlm/manifest/index-00000009.json'")
    index = index_of(site)
    assert export(site).generation == index.generation + 1
    assert export(site).written == 0


def test_a_number_that_is_taken_meanwhile_stops_the_export(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another DLM writes the same generation at the same time: its index is not replaced."""
    export(site)
    theirs = site.folder / "a" / FOLDER / "index-00000002.json"

    def hook(call: str, path: str) -> None:
        if call == "rename" and not theirs.exists():
            theirs.write_text("theirs")

    pool = StoragePool(lambda row: Hooked(open_storage("a", "posix", row["root"], {}), hook))
    monkeypatch.setattr(site.context, "storages", pool)
    with pytest.raises(PayloadExistsError):
        export(site)
    assert theirs.read_text() == "theirs"


def test_a_storage_that_may_not_be_written_to_is_refused(site: Site) -> None:
    """Read-only and unmanaged storages carry nothing of ours."""
    site.set_storage("a", mode="read_only")
    with pytest.raises(InvalidValueError, match="it is read_only"):
        export(site)
    site.set_storage("b", managed=False)
    with pytest.raises(InvalidValueError, match="it is not managed"):
        export(site, "b")
    assert list(export_due(site.context, timedelta())) == []


def test_exports_are_due_by_age(site: Site) -> None:
    """A storage is exported by the maintenance when its description is older than wanted."""
    assert [one().storage for one in export_due(site.context, timedelta(hours=24))] == ["a", "b"]
    assert list(export_due(site.context, timedelta(hours=24))) == []
    site.advance(hours=25)
    assert len(list(export_due(site.context, timedelta(hours=24)))) == 2


def test_after_a_restore_all_is_described_anew(
    site: Site, database_url: str, empty_database_url: str
) -> None:
    """A restored catalogue does not believe what the lost one noted of its exports."""
    export(site)
    made = backup.back_up(database_url, site.folder / "x.dump", now=site.now)
    site.add_item("later", b"later", on="a")
    export(site)
    backup.restore(
        empty_database_url, made, actor="user:test", now=site.now, into_existing=None
    )  # fmt: skip
    again = make_site(make_engine(empty_database_url), site.folder)
    assert export(again).generation == 3
    assert len(lines(again)) == 40


def test_many_replicas_are_split_into_more_files(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files have about as many lines as wanted; when there are four times as many the storage is
    described anew by longer prefixes."""
    import dlm_core.lifecycle.export as module

    export(site)
    monkeypatch.setattr(module, "_LINES_WANTED", 2)
    monkeypatch.setattr(module, "_LINES_MOST", 2)
    report = export(site)
    assert index_of(site).digits == 2 and report.written == report.files > 30
    assert len(lines(site)) == 40
    assert export(site).written == 0


def test_no_secret_is_in_a_description(site: Site, s3: Any) -> None:
    """A bucket's description names where its keys are found, and holds none of them."""
    root = f"{s3.bucket}/{uuid.uuid4().hex}"
    config = json.dumps(s3_config(s3))
    site.add_storage("c", "cloud", interface="s3", root=root, config=config)
    export(site, "c")
    storage = open_storage("c", "s3", root, s3_config(s3))
    found = b""
    for entry in storage.walk(FOLDER):
        with storage.open_read(entry.path) as stream:
            data = stream.read()
            found += gzip.decompress(data) if entry.path.endswith("gz") else data
    assert b"env:DLM_TEST_S3_SECRET" in found
    assert s3.secret_key.encode() not in found and s3.access_key.encode() not in found
