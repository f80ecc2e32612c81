"""The documents tell the truth about settings and error codes."""

import inspect
from pathlib import Path

from dlm_core import errors
from dlm_core.settings import Settings

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_setting_is_documented_with_its_meaning():
    """docs/settings.md has a row for each field, and none more."""
    text = (DOCS / "settings.md").read_text()
    told = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `DLM_")}
    assert told == {f"DLM_{name.upper()}" for name in Settings.model_fields}
    for field in Settings.model_fields.values():
        assert field.description in text


def test_every_error_code_is_documented():
    """docs/cli.md names each error's code, exit code and class; codes are unique."""
    text = (DOCS / "cli.md").read_text()
    classes = [
        one
        for one in vars(errors).values()
        if inspect.isclass(one) and issubclass(one, errors.DlmError)
    ]
    for one in classes:
        assert f"| {one.code} | {one.exit_code} | {one.__name__} |" in text
    assert len({one.code for one in classes}) == len(classes)
