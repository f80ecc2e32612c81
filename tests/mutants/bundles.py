"""Mutants of bundles: what would lose the small files that are packed, or bring them back."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CRASH = "storages/test_bundles.py::test_a_crash_at_any_call_of_packing_loses_nothing"
_MEANWHILE = "storages/test_bundles.py::test_what_is_trashed_while_it_is_packed_does_not_come_back"

BUNDLES = (
    Mutant(
        "singles-go-before-the-index",
        "dlm_core/storages/packing.py",
        "        changes = storage.index.change(lambda: _add(storage, source))\n",
        (
            "        [storage.inner.remove(path) for path in group.single]\n"
            "        changes = storage.index.change(lambda: _add(storage, source))\n"
        ),
        "single files are removed before their members count",
        (_CRASH,),
    ),
    Mutant(
        "bundle-not-read-back",
        "dlm_core/storages/packing.py",
        "    if wanted or listing != source.listing:\n",
        "    if False:\n",
        "a bundle counts though it reads back differently",
        ("storages/test_bundles.py::test_a_tar_that_reads_back_differently_does_not_count",),
    ),
    Mutant(
        "index-before-rename",
        "dlm_core/storages/packing.py",
        "    if written != final:\n        inner.rename(written, final)\n",
        "",
        "members count before their bundle has its name",
        (_CRASH,),
    ),
    Mutant(
        "member-offset-off-by-one",
        "dlm_core/storages/bundles.py",
        "open_range(self.inner, tar, member.offset, member.size)",
        "open_range(self.inner, tar, member.offset + 1, member.size)",
        "a member is read a byte too late",
        ("storages/test_bundles.py::test_small_files_are_packed_and_read_as_before",),
    ),
    Mutant(
        "trashed-while-packed-comes-back",
        "dlm_core/storages/packing.py",
        "(part.token is None and _went(storage, part))",
        "False",
        "what was trashed while it was packed is a member afterwards",
        (_MEANWHILE,),
    ),
    Mutant(
        "packed-single-stays",
        "dlm_core/storages/bundles.py",
        (
            "        if self.index.look(lambda: self.index.being_cleaned(path), fresh=False):\n"
            "            remove_file(self.inner, path)\n"
        ),
        "        return\n",
        "a member that is trashed leaves the single file that it was made of",
        (_MEANWHILE,),
    ),
    Mutant(
        "index-not-read-back",
        "dlm_core/storages/bundle_base.py",
        "    if hasher.digest() != wanted:\n",
        "    if False:\n",
        "a record of the index counts though it was cut short",
        ("storages/test_exclusive.py::test_a_record_that_was_cut_short_does_not_count",),
    ),
    Mutant(
        "log-with-a-hole-is-believed",
        "dlm_core/storages/bundle_index.py",
        "            if at not in there:\n",
        "            if False:\n",
        "an index with a hole ends in another error than an outage",
        ("storages/test_bundles.py::test_bundles_without_their_log_are_an_outage",),
    ),
    Mutant(
        "record-is-not-read-back",
        "dlm_core/storages/bundle_writing.py",
        "        if sha256(stream.read(-1)).digest() == digest:\n",
        "        if True:\n",
        "a record counts whose place another process has",
        ("storages/test_exclusive.py::test_a_record_that_is_not_at_its_place_was_another_s",),
    ),
    Mutant(
        "record-is-a-file-everywhere",
        "dlm_core/storages/bundle_writing.py",
        '    if getattr(storage, "exclusive", None) != "folder":\n',
        "    if True:\n",
        "two processes write the same record of the log, where a rename replaces files",
        (
            "storages/test_exclusive.py::test_several_processes_change_one_index[xrootd]",
            "storages/test_exclusive.py::test_a_record_that_is_not_at_its_place_was_another_s",
        ),
    ),
    Mutant(
        "no-log-is-empty",
        "dlm_core/storages/bundle_index.py",
        '                if entry.path.endswith(".tar"):\n',
        "                if False:\n",
        "a storage whose index is lost counts as empty",
        ("storages/test_bundles.py::test_bundles_without_their_log_are_an_outage",),
    ),
    Mutant(
        "damage-is-carried-over",
        "dlm_core/storages/bundle_tar.py",
        "        if length == part.size and part.digest in (None, digest):\n",
        "        if length == part.size:\n",
        "a damaged member is packed anew as if it were good",
        ("storages/test_bundles.py::test_damage_in_a_bundle_is_its_members_alone",),
    ),
)
