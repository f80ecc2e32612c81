"""``dlm verification`` and the terms of a storage's scheduled checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, text

from tests.cli.site import Dlm, refused

Settle = Callable[[], None]


def test_terms_are_given_changed_and_taken_away(dlm: Dlm, storages: object, tmp_path: Path) -> None:
    """Every 90 days unless told; never and unlimited are words."""
    (tmp_path / "c").mkdir()
    added = dlm("storage", "add", "c", "--location", "here", "--root", str(tmp_path / "c"),
                "--verify-every", "never", "--verify-per-day", "2TB")  # fmt: skip
    assert added.code == 0, added.error
    keys = ("verify_every_days", "verify_bytes_per_second", "verify_bytes_per_day")

    def terms(name: str) -> list[int | None]:
        shown = dlm("storage", "show", name, "--json").json
        return [shown[key] for key in keys]

    assert terms("a") == [90, None, None]
    assert terms("c") == [None, None, 2 * 10**12]
    changed = dlm("storage", "set", "c", "--verify-every", "30d", "--verify-per-second", "50MB",
                  "--verify-per-day", "unlimited")  # fmt: skip
    assert changed.code == 0, changed.error
    assert terms("c") == [30, 50 * 10**6, None]
    for given, days in (("2w", 14), ("48h", 2), ("1y", 365)):
        assert dlm("storage", "set", "c", "--verify-every", given).code == 0
        assert dlm("storage", "show", "c", "--json").json["verify_every_days"] == days
    for given in ("often", "36h", "12h", "0s"):
        refused(dlm("storage", "set", "c", "--verify-every", given), "DLM-101", 2)
    refused(dlm("storage", "set", "c", "--verify-per-day", "0"), "DLM-101", 2)


def test_the_report_is_told_for_people_and_programs(
    dlm: Dlm, storages: dict[str, Path], settle: Settle, engine: Engine
) -> None:
    """Shares by storage and collection; damage with how long it lay and its repair took."""
    (storages["a"] / "x").write_bytes(b"12345")
    dlm("register", "a", "--collection", "eb-1")
    settle()
    found = dlm("verification", "--json").json
    assert [(row["storage"], row["read_fraction"]) for row in found["storages"]] == [
        ("a", 1.0), ("b", 1.0),
    ]  # fmt: skip
    assert found["collections"][0]["collection"] == "eb-1" and found["findings"] == []
    assert "nothing was found damaged" in dlm("verification").out
    (storages["a"] / "x").write_bytes(b"1234X")
    dlm("verify", "file:x")
    settle()
    (damage,) = dlm("verification", "--json").json["findings"]
    assert (damage["storage"], damage["damaged"], damage["open"]) == ("a", 1, 0)
    shown = dlm("verification", "--days", "7")
    assert shown.code == 0 and "UNNOTICED AT MOST" in shown.out and "100.0%" in shown.out
    with engine.begin() as connection:
        checked = connection.execute(text("SELECT count(*) FROM event WHERE action = 'doubted'"))
        assert checked.scalar() == 1
