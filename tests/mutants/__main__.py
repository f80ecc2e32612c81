"""``make mutants``: break one thing at a time in a copy of the sources; the tests must notice.

A mutant is killed when one of its tests fails in its own body or by its time limit; an error of a
fixture or while the tests are collected proves nothing. Exit code 1 if a mutant lives.
"""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from tests.mutants.mutant import Mutant, table
from tests.mutants.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
#: seconds for one test, for the tests of one mutant, and for all of them on the clean copy
_A_TEST, _A_MUTANT, _ALL = 60, 150, 900
_WORKERS = 2


def main(wanted: Sequence[str]) -> int:
    """Run the mutants whose names are given, all if none is."""
    if list(wanted) == ["--document"]:
        document(ROOT / "docs" / "mutants.md")
        return 0
    unknown = set(wanted) - {one.name for one in MUTANTS}
    if unknown:
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [one for one in MUTANTS if not wanted or one.name in wanted]
    home = Path(tempfile.mkdtemp(prefix="dlm-mutants-"))
    trees: Queue[Path] = Queue()
    try:
        for n in range(_WORKERS):
            trees.put(copy_tree(home / str(n)))
        with ThreadPoolExecutor(_WORKERS) as pool:
            problem = check_clean(trees, chosen, pool)
            if problem:
                print(f"the tests fail without a mutant:\n{problem}", file=sys.stderr)
                return 2
            killed = sum(pool.map(lambda one: tell(one, trees), chosen))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(f"killed {killed} of {len(chosen)}")
    return 0 if killed == len(chosen) else 1


def document(page: Path) -> None:
    """Write the table in ``page`` anew; it is the last thing there."""
    before, _, _ = page.read_text(encoding="utf-8").partition(table(()))
    page.write_text(before + table(MUTANTS), encoding="utf-8")


def copy_tree(target: Path) -> Path:
    """The tracked files, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def check_clean(trees: Queue[Path], chosen: Sequence[Mutant], pool: ThreadPoolExecutor) -> str:
    """Run all tests on the sources as they are; what went wrong, '' if nothing did."""
    tests = sorted({test for one in chosen for test in one.nodes})
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    halves: list[list[str]] = [[] for _ in range(_WORKERS)]
    for group in sorted(by_file.values(), key=len, reverse=True):
        min(halves, key=len).extend(group)

    def run(half: list[str]) -> str:
        if not half:
            return ""
        tree = trees.get()
        try:
            imported = where_imported(tree)
            if not imported.is_relative_to(tree.resolve()):
                return f"the tests would import {imported}, not the copy"
            failed, output = run_tests(tree, half, _ALL)
            return "" if failed is False else output
        finally:
            trees.put(tree)

    begun = time.monotonic()
    problems = "\n".join(filter(None, pool.map(run, halves)))
    if not problems:
        print(f"{len(tests)} tests pass without a mutant, {time.monotonic() - begun:.0f} s")
    return problems


def where_imported(tree: Path) -> Path:
    """Where the tests in ``tree`` get the sources from: an editable install must not win."""
    ask = "import dlm_core; print(dlm_core.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(found.stdout.strip()).resolve()


def environment(tree: Path) -> dict[str, str]:
    """The caller's, with the copy first; nothing compiled is kept, it would outlive its mutant."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[bool | None, str]:
    """Whether a test failed in its body (None: it could not be told), and what pytest printed."""
    told = tree / ".report.xml"
    told.unlink(missing_ok=True)
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", f"--timeout={_A_TEST}", "-m", ""]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, f"--junit-xml={told}", *tests],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # pytest ends its PostgreSQL when interrupted; what is left of its group goes after that
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            return None, f"{output}\nnot done after {seconds:.0f} s"
    if process.returncode == 0:
        return False, output
    failures = ElementTree.parse(told).iter("failure") if told.exists() else ()
    return (True if process.returncode == 1 and any(True for _ in failures) else None), output


def tell(mutant: Mutant, trees: Queue[Path]) -> bool:
    """Try one mutant and print a line; True if it was killed."""
    tree = trees.get()
    begun = time.monotonic()
    try:
        text = mutant.apply(tree)
        try:
            failed, output = run_tests(tree, mutant.nodes, _A_MUTANT)
        finally:
            (tree / mutant.file).write_text(text, encoding="utf-8")
    finally:
        trees.put(tree)
    verdict = "killed" if failed else "LIVES" if failed is False else "UNCLEAR"
    lines = [f"{verdict:8} {mutant.name:36} {time.monotonic() - begun:5.1f} s"]
    if not failed:
        changed = text.replace(mutant.old, mutant.new)
        lines += difflib.unified_diff(
            text.splitlines(), changed.splitlines(), mutant.file, mutant.file, "", "", 2, ""
        )
    if failed is None:
        lines.append(output[-3000:])
    print("\n".join(lines), flush=True)
    return bool(failed)


if __name__ == "__main__":
    # in the background of a script SIGINT is ignored, and so it would be by the tests
    for interrupted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupted, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
