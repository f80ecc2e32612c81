"""The two-step ingest in its corners: nothing is left half there."""

import pytest

from dlm_core.errors import AlreadyExistsError, InvalidValueError, NotFoundError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.ingest import ingest_data_item, init_data_item, set_state, set_uri
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind, PayloadKind
from tests.site import make_site


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
