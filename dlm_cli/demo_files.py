"""The demo's input: the files of the installed Python packages, or a folder of the user's."""

from __future__ import annotations

import base64
import csv
import io
import os
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

_WANTED = 5000
_MAX_BYTES = 400 << 20
_FIRST = "astropy-"


@dataclass(frozen=True, slots=True)
class Files:
    """Paths below ``root``, and digests by path that were not computed by us."""

    root: Path
    paths: list[str]
    digests: dict[str, str] = field(default_factory=dict)


def default_files() -> Files:
    """Some thousand files of installed packages, astropy's FITS files among them.

    Whole packages in the order of their names until there are enough. Each wheel's ``RECORD``
    (PyPA binary distribution format) tells the sha256 of its files, URL-safe base64.
    """
    root = Path(sysconfig.get_path("purelib"))
    digests: dict[str, str] = {}
    size = 0
    records = sorted(
        root.glob("*.dist-info/RECORD"), key=lambda p: (not p.parent.name.startswith(_FIRST), p)
    )
    for record in records:
        for path, digest in _read_record(record):
            try:
                found = os.stat(root / path).st_size
            except OSError:
                continue
            if size + found <= _MAX_BYTES and len(digests) < _WANTED:
                digests[path] = digest
                size += found
    return Files(root, sorted(digests), digests)


def _read_record(record: Path) -> list[tuple[str, str]]:
    """(path, digest) of a wheel's files below site-packages; installers rewrite those elsewhere."""
    found = []
    for row in csv.reader(io.StringIO(record.read_text(encoding="utf-8"))):
        if len(row) < 2 or not row[1].startswith("sha256=") or row[0].startswith(("..", "/")):
            continue
        if row[0].startswith("dlm-"):
            continue
        encoded = row[1].removeprefix("sha256=")
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        found.append((row[0], f"sha256:{raw.hex()}"))
    return found


def files_below(folder: Path) -> Files:
    """All regular files below a folder; links are not followed."""
    root = folder.resolve()
    paths = [
        os.path.relpath(os.path.join(top, name), root)
        for top, _, names in os.walk(root)
        for name in names
        if os.path.isfile(os.path.join(top, name)) and not os.path.islink(os.path.join(top, name))
    ]
    return Files(root, sorted(paths))
