"""What is printed, and who reads it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.site import Dlm


@pytest.mark.parametrize("more", ["", " --json"])
def test_a_reader_that_goes_away_is_no_error(dlm: Dlm, storages: Any, more: str) -> None:
    """dlm … | head -c 0: no traceback, and no failure for a shell that looks at every part."""
    # so much that it does not fit into the pipe
    lines = "import sys; sys.argv[1:] = ['storage', 'list'" + (", '--json'" if more else "") + "]"
    many = "import dlm_core.catalogue.places as p; l = p.list_storages"
    code = f"{lines}; {many}; p.list_storages = lambda c: l(c) * 700"
    code += "; from dlm_cli.main import main; main()"
    command = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_reader_of_the_help_that_goes_away_is_no_error() -> None:
    """dlm --help | head -1, as everybody tries it."""
    code = "import sys; sys.argv[1:] = ['storage', 'set', '--help']"
    code += "; from dlm_cli.main import main; main()"
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_users_write_is_shown_as_they_wrote_it(dlm: Dlm, storages: Any) -> None:
    """Brackets are no markup: they neither vanish nor end a listing with an error."""
    reason = "[ticket 12] keep [/x] :smile:"
    assert dlm("hold", "add", "--all", "--reason", reason).code == 0
    listed = dlm("hold", "list")
    assert listed.code == 0 and reason in listed.out, listed.error


def test_a_config_is_shown_as_it_was_given(dlm: Dlm, storages: Any, tmp_path: Path) -> None:
    """It is the user's text: nothing in it is taken for a number by its name."""
    (tmp_path / "c").mkdir()
    terms = ("bundle_bytes=10GiB", "bundle_below=64MiB", "repack_share=0.4")
    add = ("storage", "add", "c", "--location", "here", "--root", str(tmp_path / "c"))
    added = dlm(*add, *(word for term in terms for word in ("--config", term)))
    assert added.code == 0, added.error
    shown = dlm("storage", "show", "c")
    assert shown.code == 0, shown.error
    for term in terms:
        assert term.replace("=", " ") in shown.out


def test_nothing_that_a_terminal_obeys_is_printed(
    dlm: Dlm, storages: dict[str, Path], settle: Callable[[], None]
) -> None:
    """Of what users write: it stands in lists and in sentences as Python would write it."""
    (storages["a"] / "x").write_bytes(b"x")
    assert dlm("register", "a", "--tag", "k\x1b=v\x9b").code == 0
    settle()
    reason = "keep\x1b]0;title\x07 \u202eit\nall"
    assert dlm("hold", "add", "file:x", "--reason", reason).code == 0
    shown = "keep\\x1b]0;title\\x07 \\u202eit\\nall"
    for command in (["hold", "list"], ["item", "why", "file:x"], ["audit"]):
        told = dlm(*command).out
        assert shown in "".join(told.split("\n")), told
        assert all(line.isprintable() for line in told.split("\n")), told
    tags = dlm("item", "show", "file:x").out
    assert "k\\x1b v\\x9b" in tags and all(line.isprintable() for line in tags.split("\n"))
    assert dlm("hold", "list", "--json").json[0]["reason"] == reason


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_no_error(dlm: Dlm, storages: Any, closed: str) -> None:
    """As the shell closes it: the command is done all the same."""
    for words in (["status"], ["storage", "show", "a"], ["storage", "list", "--json"]):
        code = f"import sys; sys.argv[1:] = {words}; from dlm_cli.main import main; main()"
        command = f'{sys.executable} -c "{code}" {closed}'
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
