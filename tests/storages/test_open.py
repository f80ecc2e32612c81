"""Storages are opened from what the catalogue says of them."""

import pytest

from dlm_core.errors import InvalidValueError
from dlm_core.storages.open import open_storage


def test_an_unknown_interface_is_refused():
    """The message names the ones there are."""
    with pytest.raises(InvalidValueError, match="posix, s3"):
        open_storage("x", "ftp", "/", {})


@pytest.mark.parametrize(("interface", "root"), [("s3", "bucket"), ("posix", "/somewhere")])
def test_a_secret_in_the_config_is_refused_and_not_shown(interface, root):
    """In one line, which says what may stand there."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", interface, root, {"secret_access_key": "hunter2hunter2"})
    message = str(caught.value)
    assert "hunter2" not in message and "secret_access_key" in message and "\n" not in message


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    """Before anything is asked of the server."""
    monkeypatch.delenv("DLM_TEST_UNSET", raising=False)
    with pytest.raises(InvalidValueError, match="DLM_TEST_UNSET"):
        open_storage("x", "s3", "bucket", {"access_key_env": "DLM_TEST_UNSET"})


def test_a_relative_root_is_refused():
    """It would depend on where the process was started."""
    with pytest.raises(InvalidValueError, match="absolute"):
        open_storage("x", "posix", "somewhere", {})


def test_a_mount_point_is_taken_from_the_config(tmp_path):
    """And has to be an absolute path."""
    assert open_storage("x", "posix", str(tmp_path), {"mount": "/"}).check() is None
    with pytest.raises(InvalidValueError, match="mount"):
        open_storage("x", "posix", str(tmp_path), {"mount": "relative"})
