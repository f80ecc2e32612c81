"""Storages are opened from what the catalogue says of them."""

from importlib.metadata import EntryPoint

import pytest

from dlm_core.errors import InvalidValueError
from dlm_core.storages import open as opening
from dlm_core.storages import staging
from dlm_core.storages.config import has_host
from dlm_core.storages.open import open_storage
from dlm_core.storages.secrets import read_secret


def _keys(reference):
    return {"access_key": reference, "secret_key": reference}


def test_an_unknown_interface_is_refused():
    """The message names the ones there are."""
    with pytest.raises(InvalidValueError, match=r"posix.* s3"):
        open_storage("x", "ftp", "/", {})


@pytest.mark.parametrize(("interface", "root"), [("s3", "bucket"), ("posix", "/somewhere")])
def test_a_secret_in_the_config_is_refused_and_not_shown(interface, root):
    """In one line, which says what may stand there."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", interface, root, {"secret_access_key": "hunter2hunter2"})
    message = str(caught.value)
    assert "hunter2" not in message and "secret_access_key" in message and "\n" not in message


@pytest.mark.parametrize(
    ("interface", "root", "config", "told"),
    [
        ("posix", "/x", {"typo": "1"}, "config of storage x: typo '(not shown)' is not valid: "
         "one of mount"),
        ("sftp", "u@h/x", {}, "config of storage x 'without host_keys' is not valid: "
         "host_keys=…"),
        ("sftp", "u@h/x", {"host_keys": "x", "connections": "many"}, "config of storage x: "
         "connections '(not shown)' is not valid: Input should be a valid integer, unable to "
         "parse string as an integer"),
        ("s3", "bucket", {"secret_key": "hunter2"}, "config of storage x: secret_key '(not shown)'"
         " is not valid: env:NAME, file:/path or credential:NAME, where the secret is"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_says_what_would(interface, root, config, told):
    """The keys there are for one that is none, what it lacks, or how the value should look."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", interface, root, config)
    assert str(caught.value) == told


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    """Before anything is asked of the server."""
    monkeypatch.delenv("DLM_TEST_UNSET", raising=False)
    with pytest.raises(InvalidValueError, match="DLM_TEST_UNSET"):
        open_storage("x", "s3", "bucket", _keys("env:DLM_TEST_UNSET"))


def test_a_relative_root_is_refused():
    """It would depend on where the process was started."""
    with pytest.raises(InvalidValueError, match="absolute"):
        open_storage("x", "posix", "somewhere", {})


def test_a_mount_point_is_taken_from_the_config(tmp_path):
    """And has to be an absolute path."""
    assert open_storage("x", "posix", str(tmp_path), {"mount": "/"}).check() is None
    with pytest.raises(InvalidValueError, match="mount"):
        open_storage("x", "posix", str(tmp_path), {"mount": "relative"})


def test_a_secret_is_read_where_its_reference_says(monkeypatch, tmp_path):
    """From a variable, a file or a systemd credential; again at each use, so it can be rotated."""
    (tmp_path / "key").write_text("first\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("DLM_TEST_SECRET", "third")
    assert read_secret("x", f"file:{tmp_path}/key") == "first"
    (tmp_path / "key").write_text("second")
    assert read_secret("x", "credential:key") == "second"
    assert read_secret("x", "env:DLM_TEST_SECRET") == "third"


@pytest.mark.parametrize("reference", ["file:/nowhere/key", "credential:key", "env:DLM_TEST_UNSET"])
def test_a_reference_that_leads_nowhere_is_named(monkeypatch, reference):
    """So that the operator knows where to put the secret."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(InvalidValueError, match=reference):
        read_secret("x", reference)


def test_a_credential_that_is_missing_tells_what_would_be_right(monkeypatch, tmp_path):
    """In one line: a shell has none at all, and in a unit it is this one that was not loaded."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(InvalidValueError, match=r"systemd-run .*=key:.*, or set CRED"):
        read_secret("x", "credential:key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(InvalidValueError, match=r"a file key in .CREDENTIALS_DIRECTORY") as caught:
        read_secret("x", "credential:key")
    assert "\n" not in str(caught.value)


def test_a_secret_given_where_a_reference_belongs_is_not_shown():
    """It is refused in a line that says what a reference looks like."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", "s3", "bucket", {"secret_key": "hunter2hunter2"})
    assert "hunter2" not in str(caught.value) and "env:" in str(caught.value)


@pytest.mark.parametrize(
    ("interface", "root", "config"),
    [
        ("s3", "https://user:hunter2@host/bucket", {}),
        ("s3", "user:hunter2@bucket", {}),
        ("posix", "sftp://user:hunter2@host/folder", {}),
        ("s3", "bucket", {"endpoint": "https://user:hunter2@host"}),
        ("s3", "bucket", {"endpoint": "https://host/?secret=hunter2"}),
        ("s3", "bucket", {"region": "hunter2/secret"}),
        ("s3", "bucket", {"session_token": "hunter2"}),
        ("s3", "bucket", {"access_key": "env:hunter2"}),
    ],
)
def test_a_secret_in_a_value_is_refused_and_not_shown(interface, root, config):
    """A URL with a password in root or endpoint, or a value where none belongs."""
    with pytest.raises(InvalidValueError) as caught:
        open_storage("x", interface, root, config)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Plug-ins for storages and stagers that cannot be loaded or opened, by name."""
    texts = {
        "licence": "raise RuntimeError('no licence')",
        "syntax": "def (",
        "opener": "def opened(*_):\n    raise KeyError('host')",
        "nothing": "",
        "silent": "def opened(*_):\n    pass",
    }
    for name, text in texts.items():
        (tmp_path / f"dlm_test_{name}.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [*texts, "missing"]

    def points(group):
        return [EntryPoint(name, f"dlm_test_{name}:opened", group) for name in names]

    monkeypatch.setattr(opening, "entry_points", points)
    monkeypatch.setattr(staging, "entry_points", points)
    opening.interfaces.cache_clear(), staging.stagers.cache_clear()
    yield names
    opening.interfaces.cache_clear(), staging.stagers.cache_clear()


def test_a_broken_plug_in_is_told_by_name_and_in_nobodys_way(broken, tmp_path):
    """Whatever it raises: in one line, of the storage that wants it alone; others open."""
    for name in broken:
        with pytest.raises(InvalidValueError, match=f"interface.*'{name}'") as adapter:
            open_storage("x", name, "/x", {})
        with pytest.raises(InvalidValueError, match=f"stage of storage x.*'{name}'") as stager:
            open_storage("x", "posix", str(tmp_path), {"stage": name})
        assert "\n" not in str(adapter.value) + str(stager.value)
    cold = {"stage": "command", "stage_command": "true"}
    assert open_storage("x", "posix", str(tmp_path), cold).stager is not None


def test_what_a_plug_in_says_of_a_config_is_told_as_it_is(broken, tmp_path, monkeypatch):
    """An error of ours that its opener raises is the operator's answer."""

    def opened(*_):
        raise InvalidValueError(what="host", value="x", expected="a host")

    monkeypatch.setattr(EntryPoint, "load", lambda _: opened)
    for interface, config in (("licence", {}), ("posix", {"stage": "licence"})):
        with pytest.raises(InvalidValueError, match="a host"):
            open_storage("x", interface, str(tmp_path), config)


@pytest.mark.parametrize(
    "host",
    ["1.2.3.4.5", "256.256.256.256", "127.0.0.1:70000", "[::::]", "xn--a", "a..b", f"{'a' * 64}.b",
     ".".join(["a" * 60] * 5), "host:0", "09.1.1.1", "a.0x"],
)  # fmt: skip
def test_a_host_that_there_cannot_be_is_refused(host):
    """By every adapter that has one, when it is opened: what their clients do with it is anything,
    a panic included."""
    known = {"host_keys": "h ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ", "password": "env:HOME"}
    for interface, root, config in (
        ("s3", "bucket", {"endpoint": f"https://{host}"}),
        ("webdav", f"https://{host}/x", {}),
        ("http", f"https://{host}/x", {}),
        ("sftp", f"user@{host}/x", known),
        ("xrootd", f"root://{host}//x", {}),
    ):
        with pytest.raises(InvalidValueError, match=r"root|endpoint"):
            open_storage("x", interface, root, config)


@pytest.mark.parametrize(
    "host", ["host", "a.b.", "[::1]:9", "10.0.0.1:9000", "s3_local", "xn--strae-oqa.de", "1a.b2"]
)
def test_any_host_that_there_may_be_is_taken(host):
    """Underscores too, as container networks have them."""
    assert has_host(f"https://{host}/x")
    if "_" not in host:  # S3 has no such endpoint
        open_storage("x", "s3", "bucket", {"endpoint": f"https://{host}"})
