"""Mutants of limits that drainers share, copies by servers, and copies that go on."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRANSFERS = (
    Mutant(
        "limit-for-each-drainer",
        "dlm_core/catalogue/traffic.py",
        "None if rate is None else rate / count",
        "rate",
        "each drainer reads as fast as all of them together may",
        ("lifecycle/test_traffic.py::test_bytes_and_places_are_shared_evenly",),
    ),
    Mutant(
        "place-given-twice",
        "dlm_core/catalogue/traffic.py",
        "max(0, min(-(-most // count), most - sum(others)))",
        "-(-most // count)",
        "more files are open on a storage than it takes, while drainers come and go",
        ("lifecycle/test_traffic.py::test_bytes_and_places_are_shared_evenly",),
    ),
    Mutant(
        "busy-storage-claimed",
        "dlm_core/lifecycle/work.py",
        "avoid=context.traffic.filled(),",
        "avoid=(),",
        "a slow storage takes all claims of a drainer",
        ("lifecycle/test_traffic.py::test_a_slow_storage_holds_up_only_what_goes_there",),
    ),
    Mutant(
        "server-copy-believed",
        "dlm_core/transfers/mover.py",
        "        return file.direct\n",
        "        file.proven = file.direct\n        return file.direct\n",
        "a copy that a server made by itself is not read back",
        (
            "transfers/test_mover.py"
            "::test_a_copy_by_the_kernel_that_differs_is_the_fault_of_who_has_other_bytes",
        ),
    ),
    Mutant(
        "process-beside-believed",
        "dlm_core/transfers/proving.py",
        "                self._compare(file, size, found)\n        return True",
        "                file.proven = True\n        return True",
        "what a process beside has read back is compared with nothing",
        ("transfers/test_beside.py::test_bytes_that_changed_on_the_medium_are_noticed_there",),
    ),
    Mutant(
        "source-blamed-for-partial",
        "dlm_core/transfers/resuming.py",
        "            if not begun:\n                raise\n",
        "            raise\n",
        "bytes that went bad in a partial file make a good source SUSPECT",
        ("lifecycle/test_resume.py::test_damage_to_what_was_left_is_not_the_sources",),
    ),
    Mutant(
        "partial-swept",
        "dlm_core/transfers/sweep.py",
        " and copy not in keep",
        "",
        "what a queued copy goes on from is cleared away",
        ("lifecycle/test_resume.py::test_what_a_queued_copy_goes_on_from_is_not_swept",),
    ),
    Mutant(
        "part-believed-by-its-size",
        "dlm_core/storages/s3_parts.py",
        "(len(data), digest.hex()) in upload.there.get(number, ())",
        "len(data) in [size for size, _ in upload.there.get(number, ())]",
        "a part that somebody left is taken for that of the source because it is as large",
        ("storages/test_s3_parts.py::test_parts_of_a_source_that_changed_are_sent_anew",),
    ),
    Mutant(
        "part-without-digest",
        "dlm_core/storages/s3_parts.py",
        "Body=data, ContentMD5=checked",
        "Body=data",
        "a part that was damaged on its way is taken",
        ("storages/test_s3_parts.py::test_a_part_that_is_damaged_on_the_wire_is_refused",),
    ),
    Mutant(
        "upload-replaces",
        "dlm_core/storages/s3_parts.py",
        (
            "                named, etag = self._pour(upload, source, part, sending)\n"
            "                must_be_free()\n"
        ),
        "                named, etag = self._pour(upload, source, part, sending)\n",
        "an upload replaces what came to its place, where the server knows no condition",
        ("storages/test_s3_parts.py::test_what_came_to_the_place_meanwhile_stays",),
    ),
    Mutant(
        "uploads-of-others-swept",
        "dlm_core/storages/s3_parts.py",
        "if self._s3.prefix or path in known or path",
        "if True or path",
        "in a storage that is a whole bucket the uploads of others are ended",
        ("storages/test_s3_parts.py::test_in_a_whole_bucket_only_what_is_ours_is_ended",),
    ),
    Mutant(
        "awaited-upload-swept",
        "dlm_core/storages/s3_parts.py",
        "default=None) if awaited else None",
        "default=None) if False else None",
        "an upload from which a queued copy would go on is ended",
        ("lifecycle/test_resume.py::test_an_upload_that_a_queued_copy_goes_on_from_is_not_swept",),
    ),
    Mutant(
        "clone-of-what-is-there-by-now",
        "dlm_core/storages/sftp_clone.py",
        "length = min(CHUNK, size - offset)",
        "length = CHUNK",
        "the clone of a file that is written to has more bytes than are sure to be right",
        ("storages/test_sftp.py::test_a_file_is_cloned_on_the_far_side",),
    ),
    Mutant(
        "plugged-mover-believed",
        "dlm_core/transfers/bringing.py",
        "if not any(file.error for file in files[name])",
        "if files[name]",
        "what somebody's mover spoiled on its way becomes a copy",
        ("transfers/test_plugged.py::test_what_it_spoils_or_leaves_out_is_copied_without_it",),
    ),
    Mutant(
        "plugged-mover-leaves-strangers",
        "dlm_core/transfers/bringing.py",
        "if found.get(name) == _wanted(some)",
        "if _wanted(some).items() <= found.get(name, {}).items()",
        "a log that somebody's mover left in a directory becomes visible with it",
        ("transfers/test_plugged.py::test_a_stranger_in_a_directory_does_not_become_visible",),
    ),
    Mutant(
        "plugged-mover-unpaced",
        "dlm_core/transfers/bringing.py",
        " and not held_back(self._source, self._destination)",
        "",
        "somebody's mover takes more bytes a second than a storage gives",
        ("transfers/test_plugged.py::test_it_is_not_used_while_something_is_limited",),
    ),
)
