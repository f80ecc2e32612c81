"""What the config of a storage may say of bundles."""

import pytest

from dlm_core.errors import InvalidValueError
from dlm_core.storages.bundles import Bundled
from dlm_core.storages.open import open_storage


def test_the_config_of_any_storage_may_ask_for_bundles(tmp_path):
    """Sizes as people write them; what is wrong is told in one line."""
    found = open_storage("disk", "posix", str(tmp_path), {"bundle_bytes": "10GiB", "mount": "/"})
    assert isinstance(found, Bundled)
    assert found.config.bundle_bytes == 10 << 30
    assert found.config.bundle_below == 64 << 20
    with pytest.raises(InvalidValueError, match="bundle_bytes"):
        open_storage("disk", "posix", str(tmp_path), {"bundle_below": "1MiB"})
    with pytest.raises(InvalidValueError):
        open_storage("disk", "posix", str(tmp_path), {"bundle_bytes": "1GiB", "repack_share": "2"})
    for hours in ("inf", "nan", "1e12", "-1"):
        terms = {"bundle_bytes": "1GiB", "bundle_after_hours": hours}
        with pytest.raises(InvalidValueError, match="bundle_after_hours"):
            open_storage("disk", "posix", str(tmp_path), terms)


def test_the_index_of_bundles_is_not_archived():
    """All that S3 writes in an archive class is offline at once; the index is read at any time."""
    config = {"bundle_bytes": "1GiB", "stage": "s3", "storage_class": "DEEP_ARCHIVE"}
    with pytest.raises(InvalidValueError, match=r"storage_class.*archive .dlm/bundles/tar/"):
        open_storage("deep", "s3", "bucket", config)
    assert isinstance(
        open_storage("deep", "s3", "bucket", config | {"storage_class": None}), Bundled
    )
