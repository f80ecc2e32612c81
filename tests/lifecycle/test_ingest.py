"""The two-step ingest in its corners: nothing is left half there."""

import uuid
from datetime import UTC, datetime, timedelta
from functools import reduce

import pytest

from dlm_core.catalogue.items import Terms
from dlm_core.catalogue.urgency import Urgency
from dlm_core.errors import AlreadyExistsError, InvalidValueError, NotFoundError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.ingest import (
    ingest_data_item,
    init_data_item,
    set_metadata,
    set_state,
    set_uri,
)
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.watch import add_watch
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind, PayloadKind
from tests.site import make_site

#: so that Python itself cannot go through it
DEEP = reduce(lambda within, _: {"a": within}, range(20_000), {})


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    site.add_storage("in", "A")
    return site


def test_a_directory_is_ingested_as_one(site):
    """If it is said to be one."""
    (site.folder / "in" / "s.ms").mkdir()
    (site.folder / "in" / "s.ms" / "t").write_bytes(b"data")
    oid = ingest_data_item(site.context, "t:s.ms", "in", "s.ms", kind=PayloadKind.DIRECTORY)
    drain(site.context, {OperationKind.ADMIT: execute_admit})
    item = site.item(oid)
    assert (item["kind"], item["state"], item["size"]) == ("directory", "READY", 4)


@pytest.mark.parametrize(
    ("storage", "path", "error"),
    [("nope", "x", NotFoundError), ("in", "../x", InvalidValueError),
     ("in", ".dlm/x", InvalidValueError)],
)  # fmt: skip
def test_what_cannot_be_ingested_leaves_no_item(site, storage, path, error):
    """So that the corrected call works."""
    with pytest.raises(error):
        ingest_data_item(site.context, "t:x", storage, path)
    assert site.query("SELECT FROM data_item") == []
    (site.folder / "in" / "x").write_bytes(b"data")
    ingest_data_item(site.context, "t:x", "in", "x")


def test_a_place_is_told_once(site):
    """Again is no change; another place of the item, or another item's place, is refused."""
    oid, other = (init_data_item(site.context, uri) for uri in ("t:x", "t:y"))
    uid = set_uri(site.context, oid, "in", "x")
    assert set_uri(site.context, oid, "in", "x") == uid
    with pytest.raises(AlreadyExistsError, match="t:x"):
        set_uri(site.context, oid, "in", "elsewhere")
    with pytest.raises(AlreadyExistsError, match="t:x"):
        set_uri(site.context, other, "in", "x")
    with pytest.raises(NotFoundError):
        set_state(site.context, other, "READY")
    with pytest.raises(AlreadyExistsError, match="t:x"):
        init_data_item(site.context, "t:x")


def test_all_terms_are_kept(site):
    """Tags, urgency and the copy's own end too, as registration keeps them."""
    (site.folder / "in" / "x").write_bytes(b"data")
    end, by = site.now + timedelta(days=9), site.now + timedelta(days=1)
    terms = Terms("GAS", None, "me", {"k": "v"}, end, by, Urgency(-3, by))
    oid = ingest_data_item(site.context, "t:x", "in", "x", terms=terms, metadata={"m": [1]})
    found = site.query(
        """SELECT i.target_phase, i.owner, i.tags, i.metadata, i.expires_at, u.priority,
                  u.needed_by, r.expires_at AS leaves
             FROM data_item i JOIN urgency u USING (oid) JOIN replica r USING (oid)
            WHERE oid = :oid""",
        oid=oid,
    )
    assert found == [
        {"target_phase": "GAS", "owner": "me", "tags": {"k": "v"}, "metadata": {"m": [1]},
         "expires_at": end, "priority": -3, "needed_by": by, "leaves": by}
    ]  # fmt: skip
    with pytest.raises(InvalidValueError, match="set_uri"):
        init_data_item(site.context, "t:y", terms=terms)
    oid = init_data_item(site.context, "t:y")
    set_uri(site.context, oid, "in", "y", expires_at=by)
    assert site.query("SELECT expires_at AS e FROM replica WHERE oid = :o", o=oid) == [{"e": by}]


def test_a_refusal_by_a_later_step_leaves_no_item(site):
    """One transaction for all of them: the place is another's."""
    (site.folder / "in" / "x").write_bytes(b"data")
    ingest_data_item(site.context, "t:x", "in", "x")
    with pytest.raises(AlreadyExistsError, match="t:x"):
        ingest_data_item(site.context, "t:y", "in", "x")
    assert site.query("SELECT uri FROM data_item") == [{"uri": "t:x"}]


@pytest.mark.parametrize(
    "metadata",
    [{"t": object()}, {"n": float("nan")}, {"s": "a\0b"}, [1], {1: {2, 3}}, {"s": "\ud800"}, DEEP],
)
def test_metadata_that_json_cannot_tell_are_refused(site, metadata):
    """In words, before anything is written."""
    with pytest.raises(InvalidValueError, match="metadata"):
        init_data_item(site.context, "t:x", metadata=metadata)
    oid = init_data_item(site.context, "t:x", metadata={"s": "a\\u0000b"})
    with pytest.raises(InvalidValueError, match="metadata"):
        set_metadata(site.context, oid, metadata)
    assert site.item(oid)["metadata"] == {"s": "a\\u0000b"}


def test_a_uri_is_text(site):
    """What a program gives by mistake is refused in words."""
    with pytest.raises(InvalidValueError, match="uri 5"):
        init_data_item(site.context, 5)


def test_a_kind_is_one_of_two(site):
    """And may be told as text."""
    oid = init_data_item(site.context, "t:x")
    with pytest.raises(InvalidValueError, match="file or directory"):
        set_uri(site.context, oid, "in", "x", "dir")
    set_uri(site.context, oid, "in", "x", "directory")
    assert site.item(oid)["kind"] == "directory"


@pytest.mark.parametrize(
    "terms",
    [
        {"target_phase": "METAL"},
        {"collection_id": "eb-1"},
        {"tags": {"t": object()}},
        {"tags": {"t": "a\0b"}},
        {"owner": 5},
        {"item_expires_at": "2030-01-01"},
        {"item_expires_at": datetime(2100, 1, 1)},
        {"item_expires_at": datetime(2200, 1, 1, tzinfo=UTC)},
    ],
)
def test_terms_that_are_none_are_refused(site, terms):
    """In words, before anything is written: by ingest, registration and a watch."""
    with pytest.raises(InvalidValueError):
        init_data_item(site.context, "t:x", terms=Terms(**terms))
    with pytest.raises(InvalidValueError):
        register_tree(site.context, Source("in", terms=Terms(**terms)))
    with pytest.raises(InvalidValueError):
        add_watch(site.context, Source("in", terms=Terms(**terms)))
    assert site.query("SELECT FROM data_item") == site.query("SELECT FROM watch") == []


def test_a_deadline_is_a_time_to_come(site):
    """With its zone; a priority is a number."""
    with pytest.raises(InvalidValueError, match="deadline"):
        init_data_item(
            site.context, "t:x", terms=Terms(urgency=Urgency(0, site.now - timedelta(days=1)))
        )
    for moment in (datetime(2100, 1, 1), "2100-01-01"):
        with pytest.raises(InvalidValueError, match="deadline"):
            Urgency(0, moment)
    with pytest.raises(InvalidValueError, match="priority"):
        Urgency("first")


def test_keys_and_places_that_are_none_are_refused(site):
    """In words, whatever a program gives; what is not there is not found."""
    oid = init_data_item(site.context, "t:x")
    for path in (None, 5, "\ud800"):
        with pytest.raises(InvalidValueError, match="path"):
            set_uri(site.context, oid, "in", path)
    with pytest.raises(InvalidValueError, match="expiry"):
        set_uri(site.context, oid, "in", "x", expires_at=datetime(2100, 1, 1))
    for call in (
        lambda key: set_uri(site.context, key, "in", "x"),
        lambda key: set_state(site.context, key, "READY"),
        lambda key: set_metadata(site.context, key, {}),
    ):
        with pytest.raises(InvalidValueError, match="oid"):
            call("nonsense")
        with pytest.raises(NotFoundError):
            call(uuid.uuid4())
    with pytest.raises(NotFoundError, match="collection"):
        init_data_item(site.context, "t:y", terms=Terms(collection_id=uuid.uuid4()))
