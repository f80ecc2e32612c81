"""``make demo`` as its user runs it, on a folder of their own."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_folder_of_ones_own(tmp_path):
    """Passes with any names, changes nothing in the folder, and reports what it did."""
    own = tmp_path / "my data"
    (own / "sub ü").mkdir(parents=True)
    names = [b"plain", b"quo'te\"", b"new\nline", b"back\\slash", b"\xff\xfe.dat", b"empty"]
    for name in names:
        with open(os.path.join(os.fsencode(own), name), "wb") as file:
            file.write(b"" if name == b"empty" else name * 100)
    (own / "link").symlink_to("/etc/passwd")
    before = sorted((p, p.lstat().st_mtime_ns, p.lstat().st_size) for p in own.rglob("*"))
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "dlm"), "demo"],
        env={**os.environ, "DEMO_PATH": str(own)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "demo-report.json").read_text())
    assert report["items"] == len(names)
    assert report["items_lost"] == report["items_below_target_phase"] == 0
    assert report["certificates"] > 0
    after = sorted((p, p.lstat().st_mtime_ns, p.lstat().st_size) for p in own.rglob("*"))
    assert after == before
