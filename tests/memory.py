"""Memory as a folder, for what need not outlive the tests and should not wait for the disk."""

from __future__ import annotations

import os
import shutil

_FOLDER = "/dev/shm"
#: of the folders and of a catalogue's server
_NEEDED_BYTES = 2 << 30


def fast_folder() -> str | None:
    """A folder in memory where there is enough of it, else None: the usual place does too."""
    usable = os.access(_FOLDER, os.W_OK) and shutil.disk_usage(_FOLDER).free > _NEEDED_BYTES
    return _FOLDER if usable else None
