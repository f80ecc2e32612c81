"""What somebody asks for while a worker decides, forced: who comes second is told."""

from __future__ import annotations

from datetime import timedelta

import pytest

from dlm_core.catalogue.browse import set_item_expiry
from dlm_core.errors import IllegalTransitionError
from dlm_core.lifecycle import expire
from tests.lifecycle.test_interleavings import overlap, two_copies
from tests.site import Site, make_site


@pytest.fixture
def site(engine, tmp_path) -> Site:
    site = make_site(engine, tmp_path)
    for name in "abc":
        site.add_storage(name, name.upper())
    return site


@pytest.mark.parametrize("later", [timedelta(days=30), None], ids=["later", "never"])
def test_an_expiry_that_is_put_off_when_its_item_has_expired_is_refused(site, later):
    """Who waited for the lock is told, and nothing is promised of what goes all the same."""
    oid = two_copies(site)
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "over"))
    until = later and site.now + later
    met = overlap(
        site,
        lambda c: expire.plan_batch(c, site.context, 10),
        lambda: site.context.transact(lambda c: set_item_expiry(c, "test:x", until, "kept")),
    )
    assert met.waited and isinstance(met.error, IllegalTransitionError)
    assert met.error.code == "DLM-105" and "EXPIRED" in str(met.error)
    assert site.query("SELECT expiry_reason FROM data_item")[0]["expiry_reason"] == "over"
    assert site.replicas(oid)["a"] == "TRASHED"


def test_an_expiry_that_is_put_off_first_keeps_the_item(site):
    """Expiry passes over what is locked, and then finds that it is not due."""
    oid = two_copies(site)
    site.context.transact(lambda c: set_item_expiry(c, "test:x", site.now, "over"))
    until = site.now + timedelta(days=30)

    def plan() -> object:
        return site.context.transact(lambda c: expire.plan_batch(c, site.context, 10))

    met = overlap(site, lambda c: set_item_expiry(c, "test:x", until, "kept"), plan)
    assert met.error is None and met.result == ([], [])
    assert plan() == ([], []) and site.replicas(oid)["a"] == "READY"
