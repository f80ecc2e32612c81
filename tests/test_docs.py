"""The documents tell the truth about settings and error codes."""

import inspect
import re
from pathlib import Path

from typer.main import get_command

from dlm_cli.main import app
from dlm_core import errors
from dlm_core.settings import Settings
from tests.faulty import Fault

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


def test_every_option_of_the_command_line_is_explained():
    """With a word or two, as arguments are."""

    def options(command, path):
        for option in command.params:
            if option.name != "help":
                yield f"{path} {option.name}", getattr(option, "help", None)
        for name, below in getattr(command, "commands", {}).items():
            yield from options(below, f"{path} {name}")

    assert [name for name, told in options(get_command(app), "dlm") if not told] == []


def test_every_fault_is_documented_with_the_test_that_shows_it():
    """docs/faults.md has a row for each fault, and each test that it names exists."""
    text = (DOCS / "faults.md").read_text()
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in table] == [fault.value for fault in Fault]
    assert all(re.findall(r"`(test_\w+)`", row[3]) for row in table)
    tests = (DOCS.parent / "tests" / "storages" / "test_faults.py").read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests
